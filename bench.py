"""Speed and memory, each beside its physical limit and the same work done by other libraries, measured in turn.

A machine's speed changes from minute to minute, by a tenth and more where it is shared. So the limit, this project and
its peers follow each other in every measure; a round takes each measure once, so that what disturbs one round spares
the others; and medians are compared. Rows whose rounds differ a lot are marked.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json as jsonlib  # main has a flag of that name
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from numpy import ndarray as Array
from threadpoolctl import threadpool_info
from tqdm import tqdm

import utils
from encoder import WORD, Encoder, split_words
from gpt2 import stream
from prefill import n_blas_threads
from sampling import check_count
from train import initialize, view_as

GROUPS = ("prefill", "decode", "batch", "startup", "memory", "tokenizer")
PEERS = {  # the modules that a peer needs, and the packages that they are in
    "transformers": {"torch": "torch", "transformers": "transformers"},
    "llama_cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "tiktoken": {"tiktoken": "tiktoken"},
}
SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
PROMPTS, CONTEXTS, BATCHES, LENGTHS = (16, 128, 512, 1000), (10, 500, 1000), (1, 4, 16, 64), (1, 8, 40)
N_CONTEXT, N_DECODE, N_PROMPT_INT8 = 10, 20, 512  # context of a batch and of int8; tokens of a figure; prompt of int8
PROMPT = "Alan Turing theorized that computers would one day become"
READ_SHAPE, PRODUCT_SIZE = (3072, 40_000), 2048  # 491 MB, of which a cache holds little
LEAST_SECONDS = 0.2  # what takes less is repeated
UNSTEADY = 1.5  # where the largest of a row's figures is so many times the smallest, the row is marked
PAUSE = 0.1  # seconds, in which the threads of the library before stop waiting for more work, and free the cores
TIMER = """if True:
    import json, os, subprocess, sys, time
    start, peak = time.perf_counter(), None
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        status = child.wait()
    print(json.dumps([status, time.perf_counter() - start, peak]))
"""
PROBE = "import llama_cpp, sys; llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False).eval([0] * 8)"
LIMITS = {
    "prefill": "a prompt: two operations for each weight of the blocks and each token, at {operations:,.0f} GFLOP/s",
    "decode": "decoding: for each token, reading the weights once, at {bytes:,.1f} GB/s",
    "batch": "batches: for a token of each sequence, reading the weights once, or the operations; what takes longer",
    "startup": 'start-up: python -c "import numpy"',
    "memory": "memory: the weights",
    "tokenizer": "tokenizer: cutting the text into words",
}

Engine = Callable[[Array, int], Iterator]  # as gpt2.stream: ids [n_seq] or [n_batch, n_seq], n_tokens -> new ids
Measure = tuple[str, str, str, dict, dict]  # group, name, unit, what a token costs, and who takes the figures


def fastest(action: Callable[[], object]) -> float:
    """The seconds of the fastest of several calls: of a limit the best counts."""
    seconds, end = [], time.perf_counter() + LEAST_SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def large_matrix() -> Array:
    return np.ones(READ_SHAPE, np.float32)  # not zeros, all of which would be the same page of memory


@functools.cache
def compiled_sum() -> Callable[[Array], float]:
    """The sum of a matrix, compiled, in as many threads as matrix products have."""
    import numba

    numba.set_num_threads(min(n_blas_threads(), numba.config.NUMBA_NUM_THREADS))

    @numba.njit(parallel=True, fastmath=True, nogil=True)
    def total(a):
        result = np.float32(0)
        for i in numba.prange(a.shape[0]):
            row = np.float32(0)
            for j in range(a.shape[1]):
                row += a[i, j]
            result += row
        return result

    total(np.ones((2, 2), np.float32))  # that compiles it
    return total


def read_bandwidth() -> float:
    """The best bytes/s at which a large matrix is read: by a product from either side, and with Numba by a sum."""
    a = large_matrix()
    v, u = (np.ones(n, np.float32) for n in a.shape)
    readers = [lambda: v @ a, lambda: a @ u]
    if importlib.util.find_spec("numba"):
        readers.append(functools.partial(compiled_sum(), a))
    return a.nbytes / min(map(fastest, readers))


def product_rate() -> float:
    """The operations/s of a float32 matrix product, at best."""
    a = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    product = np.empty_like(a)
    return 2 * len(a) ** 3 / fastest(lambda: np.matmul(a, a, out=product))


def token_limit(cost: dict[str, float]) -> float:
    """The highest possible tokens/s where one costs so many `bytes` or `operations`, or what takes longer of both."""
    rates = {"bytes": read_bandwidth, "operations": product_rate}
    return min(rates[name]() / amount for name, amount in cost.items())


def run_process(*arguments: str) -> tuple[float, float]:
    """Run Python with `arguments` in a process of its own: its seconds and its peak resident memory in MB.

    A small process stands between, as Linux counts from the peak of the one that starts it. OSError if it fails.
    """
    command = [sys.executable, "-c", TIMER, sys.executable, *arguments]
    timer = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    status, seconds, peak = jsonlib.loads(timer.stdout or "[1, 0, null]")
    if status:
        raise OSError(f"{' '.join(arguments)[:80]} has failed: {' '.join(timer.stderr.split())[-300:]}")
    return seconds, (peak or math.nan) / 1e6


def transformers_engine(model: SimpleNamespace) -> Engine:
    """Hugging Face transformers on PyTorch, float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(n_blas_threads())
    if utils.is_huggingface(model.directory):
        gpt2 = GPT2LMHeadModel.from_pretrained(model.directory, dtype=torch.float32).eval()
    else:
        shape = {name: model.hparams[name] for name in ("n_embd", "n_head", "n_layer")}
        shape |= {"vocab_size": model.hparams["n_vocab"], "n_positions": model.hparams["n_ctx"]}
        gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
        gpt2.transformer.load_state_dict(load_file(model.directory / utils.WEIGHTS))

    def run(ids: Array, n_tokens: int) -> Iterator:
        new, past = torch.from_numpy(np.atleast_2d(ids)), None
        for _ in range(n_tokens):
            with torch.inference_mode():
                output = gpt2(new, past_key_values=past, use_cache=True, logits_to_keep=1)
                new, past = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            yield new[:, 0].tolist() if ids.ndim == 2 else new.item()

    return run


def write_gguf(path: Path, model: SimpleNamespace, kind: str) -> None:
    """Write the weights as llama.cpp reads them: f32, or q8_0, in which the matrices are int8."""
    import gguf

    dtype, writer = gguf.GGMLQuantizationType[kind.upper()], gguf.GGUFWriter(path, "gpt2")
    fields = {"block_count": "n_layer", "context_length": "n_ctx", "embedding_length": "n_embd"}
    for field, name in {**fields, "head_count": "n_head", "vocab_size": "n_vocab"}.items():
        getattr(writer, f"add_{field}")(model.hparams[name])
    writer.add_feed_forward_length(model.params["blocks"][0]["mlp"]["c_fc"]["b"].size)
    writer.add_layer_norm_eps(model.params["ln_f"].get("eps", 1e-5))
    writer.add_tokenizer_model("no_vocab")  # it is given ids and asked for ids
    names = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "h.": "blk."}
    names |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    names |= {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
    for name, array in utils.tensors_of(model.params).items():
        is_matrix = array.ndim == 2 and name != "wpe.weight"
        array = np.ascontiguousarray(array.T) if is_matrix and name not in ("wte.weight", "lm_head.weight") else array
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if is_matrix:
            writer.add_tensor(name, gguf.quants.quantize(array, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_engine(model: SimpleNamespace, temporary: Path, kind: str) -> Engine:
    """llama.cpp, which continues one sequence here."""
    import llama_cpp

    path, params = temporary / f"{kind}.gguf", llama_cpp.llama_model_default_params()
    write_gguf(path, model, kind)
    try:
        run_process("-c", PROBE, str(path))
    except OSError:  # as where a processor says that it has AMX, and the system does not let it be used
        model.remarks.append(f"llama.cpp crashes here with {kind} weights, but not without repacking them, as measured")
        params.use_extra_bufts = False
    options = {"n_ctx": model.hparams["n_ctx"], "n_threads": n_blas_threads(), "n_threads_batch": n_blas_threads()}
    with mock.patch("llama_cpp.llama_cpp.llama_model_default_params", lambda: params):  # Llama has no option for it
        llama = llama_cpp.Llama(str(path), **options, verbose=False)

    def run(ids: Array, n_tokens: int) -> Iterator:
        llama.reset()
        new = ids.tolist()
        for _ in range(n_tokens):
            llama.eval(new)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)  # the library's own sampler is slower
            new = [int(np.ctypeslib.as_array(logits, (model.hparams["n_vocab"],)).argmax())]
            yield new[0]

    return run


def tiktoken_encode(encoder: Encoder) -> Callable[[str], list[int]]:
    """OpenAI's tiktoken with the tables of `encoder`."""
    import tiktoken

    special = {token: encoder.encoder[token] for token in encoder.special}
    plain = encoder.encoder.keys() - special.keys() - encoder.added.keys()
    ranks = {encoder.token_bytes(encoder.encoder[token]): encoder.encoder[token] for token in plain}
    return tiktoken.Encoding("", pat_str=WORD.pattern, mergeable_ranks=ranks, special_tokens=special).encode_ordinary


def prefill_speed(engine: Callable[[], Engine], ids: Array) -> float:
    """The tokens/s of the prompt `ids`, up to the first new id."""
    run, n_tokens, seconds = engine(), 0, 0.0
    while seconds < LEAST_SECONDS or not n_tokens:
        start = time.perf_counter()
        next(run(ids, 1))
        seconds += time.perf_counter() - start
        n_tokens += ids.size
    return n_tokens / seconds


def decode_speed(engine: Callable[[], Engine], ids: Array) -> float:
    """The tokens/s, of all sequences together, after the context `ids` and the first new id."""
    steps = engine()(ids, 1 + N_DECODE)
    next(steps)
    start = time.perf_counter()
    return sum(np.size(new) for new in steps) / (time.perf_counter() - start)


def tokenizer_speed(new_encode: Callable[[], Callable], text: str) -> float:
    """The MB/s of the first text that `new_encode()` cuts up; making it does not count."""
    encode, start = new_encode(), time.perf_counter()
    encode(text)
    return len(text.encode()) / 1e6 / (time.perf_counter() - start)


def engine_measures(model: SimpleNamespace, against: list[str], temporary: Path) -> Iterator[Measure]:
    """Prompts, decoding and batches, within this process; what does not fit the model's context is left out."""
    n_ctx, n_head, n_vocab, n_embd = (model.hparams[name] for name in ("n_ctx", "n_head", "n_vocab", "n_embd"))
    engines, engines_int8 = {"here": lambda: lambda ids, n: stream(ids, model.params, n_head, n)}, {}
    if "transformers" in against:
        engines["transformers"] = functools.cache(lambda: transformers_engine(model))
    if "llama_cpp" in against:
        engines["llama_cpp"] = functools.cache(lambda: llama_cpp_engine(model, temporary, "f32"))
    if importlib.util.find_spec("numba"):
        from quantize import quantize

        params_int8 = functools.cache(lambda: quantize(model.params))
        engines_int8["here"] = lambda: lambda ids, n: stream(ids, params_int8(), n_head, n)
        if "llama_cpp" in against and n_embd % 32 == 0:  # the numbers in a block of q8_0
            engines_int8["llama_cpp"] = functools.cache(lambda: llama_cpp_engine(model, temporary, "q8_0"))
    one_by_one = {name: engine for name, engine in engines.items() if name != "llama_cpp"}

    n_bytes = utils.count_bytes(utils.param_shapes(model.hparams))
    n_blocks = 12 * n_embd * n_embd * model.hparams["n_layer"]  # weights in matrices: 3 + 1 in attn, 4 + 4 in mlp
    n_matrices = n_blocks + n_vocab * n_embd
    n_bytes_int8 = n_bytes - 3 * n_matrices  # a byte for each weight of the matrices, 4 for the others
    prefill, decode = {"operations": 2 * n_blocks}, {"bytes": n_bytes}
    table = [("prefill", f"prompt of {n:,}", prefill_speed, (n,), prefill, engines) for n in PROMPTS]
    n = N_PROMPT_INT8
    table += [("prefill", f"prompt of {n:,}, int8", prefill_speed, (n,), prefill, engines_int8)]
    table += [("decode", f"decode after {n:,}", decode_speed, (n,), decode, engines) for n in CONTEXTS]
    n, cost = N_CONTEXT, {"bytes": n_bytes_int8}
    table += [("decode", f"decode after {n:,}, int8", decode_speed, (n,), cost, engines_int8)]
    for n in BATCHES:
        cost, shape = {"bytes": n_bytes / n, "operations": 2 * n_matrices}, (n, N_CONTEXT)
        table += [("batch", f"decode, batch of {n}", decode_speed, shape, cost, one_by_one)]
    for group, name, speed, shape, cost, engines in table:
        if engines and shape[-1] + (N_DECODE if speed is decode_speed else 0) <= n_ctx:
            ids = np.random.default_rng(0).integers(0, n_vocab, shape)
            figures = {engine: functools.partial(speed, begin, ids) for engine, begin in engines.items()}
            yield group, name, "tokens/s", cost, {"limit": functools.partial(token_limit, cost), **figures}


def other_measures(model: SimpleNamespace, against: list[str], text: str) -> Iterator[Measure]:
    """The whole process, from the command line to its end, and the tokenizer."""

    def generate(n_tokens: int) -> tuple[float, float]:
        options = ("--model_size", str(model.directory), "--n_tokens_to_generate", str(n_tokens), "--ignore_eot")
        return run_process(str(utils.CODE / "gpt2.py"), PROMPT, *options)

    for n in LENGTHS:
        figures = {"limit": lambda: run_process("-c", "import numpy")[0], "here": lambda n=n: generate(n)[0]}
        yield "startup", f"start-up, {n} token{'s' * (n > 1)}", "s", {}, figures
    if hasattr(os, "wait4"):
        n_bytes = utils.count_bytes(utils.param_shapes(model.hparams))
        figures = {"limit": lambda: n_bytes / 1e6, "here": lambda: generate(LENGTHS[-1])[1]}
        yield "memory", "peak memory", "MB", {}, figures
    tables = (model.encoder.encoder, model.encoder.bpe_ranks)
    encoders = {"limit": lambda: split_words, "here": lambda: Encoder(*tables).encode}
    if "tiktoken" in against:
        encoders["tiktoken"] = functools.cache(lambda: tiktoken_encode(model.encoder))
    figures = {name: functools.partial(tokenizer_speed, begin, text) for name, begin in encoders.items()}
    yield "tokenizer", "tokenizer", "MB/s", {}, figures


def take_all(measures: list[Measure], n_rounds: int) -> list[dict]:
    """The rows of all measures; on a terminal, standard error shows how far it is."""
    taken = [{party: [] for party in parties} for *_, parties in measures]
    with tqdm(total=(1 + n_rounds) * len(measures), unit="measure", disable=None, leave=False) as bar:
        for _ in range(1 + n_rounds):
            for (group, name, *_, parties), figures in zip(measures, taken, strict=True):
                bar.set_description_str(name)
                if group not in ("decode", "batch"):
                    large_matrix.cache_clear()
                for party, figure in parties.items():
                    time.sleep(PAUSE)
                    figures[party].append(figure())
                bar.update()
    rows = [summarize(measure, figures) for measure, figures in zip(measures, taken, strict=True)]
    batches = [row for row in rows if row["group"] == "batch"]
    for row in batches:
        row["times_one_sequence"] = row["here"] / batches[0]["here"]
    return rows


def summarize(measure: Measure, figures: dict[str, list[float]]) -> dict:
    """The row of a measure: medians, ratios by which this project does better, and the figures of all rounds."""
    group, name, unit, cost, _ = measure
    figures = {party: values[1:] for party, values in figures.items()}  # the first round warms up
    medians = {party: statistics.median(values) for party, values in figures.items()}
    sign = -1 if unit in ("s", "MB") else 1  # of these, less is better
    ratios = {party: (medians["here"] / median) ** sign for party, median in medians.items()}
    peers = {party: {"median": medians[party], "ratio": ratios[party]} for party in list(figures)[2:]}
    row = {"group": group, "name": name, "unit": unit, "cost": cost, "limit": medians["limit"], "here": medians["here"]}
    unsteady = [party for party, values in figures.items() if max(values) > UNSTEADY * min(values)]
    return row | {"share_of_limit": ratios["limit"], "peers": peers, "unsteady": unsteady, "figures": figures}


def describe_machine(packages: list[str]) -> dict:
    """The processor, the cores that this process may use, and the threads and versions of what computes."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"Python": platform.python_version(), "NumPy": np.__version__}
    versions |= {str(p["internal_api"]): str(p["version"]) for p in threadpool_info() if p["user_api"] == "blas"}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return {"processor": processor, "n_cores": n_cores, "n_threads": n_blas_threads(), "versions": versions}


def open_model(name: str, models_dir: str, temporary: Path) -> SimpleNamespace:
    """The model `name`; of a released one that is not there, nothing is downloaded: its shape gets random weights."""
    weights, places = utils.WEIGHTS, [Path(models_dir) / name, utils.CODE / models_dir / name]
    tables = [place for place in places if all((place / file).is_file() for file in utils.TOKENIZER_FILES)]
    complete = [p for p in tables if (p / "hparams.json").is_file() and (p / utils.WEIGHTS).is_file()]
    if name not in utils.RELEASED:
        directory = tokenizer = utils.find_model(name, models_dir)
    elif complete:
        directory = tokenizer = complete[0]
    else:
        directory, tokenizer = temporary / name, [*tables, utils.CODE / "models" / "shakespeare"][0]
        weights = f"random, as {places[0] / utils.WEIGHTS} is not there"
        n_embd, n_head, n_layer = SHAPES[name]
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
        shapes = utils.param_shapes(hparams)
        params = view_as(shapes, np.empty(utils.count_bytes(shapes) // 4, np.float32))
        initialize(params, np.random.default_rng(0))
        utils.save_model(directory, utils.read_encoder(tokenizer), hparams, params)
    directory = directory.resolve()
    source = str(directory) if name in utils.RELEASED else name  # by its name, one of Hugging Face is downloaded
    encoder, hparams, params = utils.load_encoder_hparams_and_params(source, models_dir)
    about = {"directory": directory, "weights": weights, "tokenizer": str(tokenizer)}
    return SimpleNamespace(**about, encoder=encoder, hparams=hparams, params=params, remarks=[])


def number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"


def format_table(report: dict) -> str:
    """The report as text: a line a measure, and under it what the limits are."""
    machine, model, rows, peers = (report[name] for name in ("machine", "model", "rows", "peers"))
    lines = [
        f"{model['name']}: {model['n_weights'] / 1e6:,.1f} M weights",
        f"weights: {model['weights']}; tokenizer: {model['tokenizer']}",
        f"{machine['processor']}, {machine['n_cores']} cores, {machine['n_threads']} threads",
        textwrap.fill(", ".join(map(" ".join, machine["versions"].items())), 119),
        f"rounds: {report['rounds']}, of which these are the medians",
        "",
        f"{'':34}{'limit':>9}{'here':>9}{'share':>7}" + "".join(f"{peer:>13}{'ratio':>6}" for peer in peers),
    ]
    for row in rows:
        line = f"{row['name']:25}{row['unit']:9}{number(row['limit']):>9}{number(row['here']):>9}"
        line += f"{row['share_of_limit']:>7.0%}"
        for peer in peers:
            figure = row["peers"].get(peer)
            line += f"{number(figure['median']):>13}{figure['ratio']:>6.2f}" if figure else f"{'-':>13}{'-':>6}"
        lines.append(line + " ~" * bool(row["unsteady"]))
    return "\n".join([*lines, "", *notes(rows), *report["remarks"]])


def notes(rows: list[dict]) -> list[str]:
    """What the columns of the table are, and of what its limits are made."""
    rates = {}
    for row in rows:
        if len(row["cost"]) == 1:
            [(name, amount)] = row["cost"].items()
            rates.setdefault(name, []).append(row["limit"] * amount / 1e9)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    groups = {row["group"] for row in rows}
    lines = ["share: of the limit; ratio: how many times as good as the peer. The limits are, of"]
    lines += [f"  {text.format(**medians)}" for group, text in LIMITS.items() if group in groups]
    factors = [f"{row['times_one_sequence']:.1f}" for row in rows if row["group"] == "batch"]
    if any(row["unsteady"] for row in rows):
        lines.append(
            f"~ rounds differ by more than a factor of {UNSTEADY}: something else ran, so do not trust the row"
        )
    return lines + ([f"batches, times the speed of the first: {', '.join(factors)}"] if factors else [])


def read_text(file: str | None) -> str:
    """The text of a file, or the help texts that come with Python: some 465,000 characters of English, and code."""
    if file is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    if not text:
        raise ValueError(f"{file} is empty: it is what the tokenizer reads")
    return text


def choose(names: str | None, known: Iterable[str], option: str) -> list[str]:
    """The names in a list with commas; ValueError for one that is not known."""
    chosen = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise ValueError(f"{option} takes {', '.join(known)}, or several with commas between, not {name!r}")
    return list(dict.fromkeys(chosen))


def main(
    model_size: str = "124M", models_dir: str = "models", against: str | None = None, only: str | None = None,
    rounds: int = 5, text: str | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Measure speed and memory, beside the physical limit and other libraries, all in turn.

    --model_size 124M     124M, 355M, 774M, 1558M (random weights if it is not there), a name in models_dir, a directory
    --models_dir models   where the models are
    --against NAMES       peers to measure too: transformers,llama_cpp,tiktoken
    --only NAMES          not all, but these: prefill,decode,batch,startup,memory,tokenizer
    --rounds 5            how often each figure is taken; the table shows medians
    --text FILE           what the tokenizer reads, instead of the help texts that come with Python
    --json                print everything as JSON, each round too
    """
    check_count("rounds", rounds, least=1)
    peers, groups = choose(against, PEERS, "against"), choose(only, GROUPS, "only") or GROUPS
    modules = {module: package for peer in peers for module, package in PEERS[peer].items()}
    if missing := [package for module, package in modules.items() if not importlib.util.find_spec(module)]:
        raise ImportError(f"not installed: pip install {' '.join(missing)}, or leave it out of --against")
    machine = describe_machine(list(modules.values()))
    english = read_text(text)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        model = open_model(model_size, models_dir, Path(temporary))
        measures = [*engine_measures(model, peers, Path(temporary)), *other_measures(model, peers, english)]
        rows = take_all([measure for measure in measures if measure[0] in groups], rounds)
    about = {"name": model_size, "weights": model.weights, "tokenizer": model.tokenizer, **model.hparams}
    about["n_weights"] = utils.count_bytes(utils.param_shapes(model.hparams)) // 4
    report = {"model": about, "machine": machine, "rounds": rounds, "peers": peers, "rows": rows}
    report["remarks"] = model.remarks
    print(jsonlib.dumps(report, indent=1) if json else format_table(report))


if __name__ == "__main__":
    from cli import run

    run(main)
