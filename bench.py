"""Speed and memory, each beside its physical limit and the same work done by other libraries, measured in turn.

A machine's speed changes from minute to minute. So the limit, this project and its peers follow each other in every
measure, a round takes each measure once, medians are compared, and rows whose rounds differ a lot are marked.
"""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import functools
import importlib.metadata
import importlib.util
import json as jsonlib  # main has a flag of that name
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics  # Python's help: some 465,000 characters of English and code
from timeit import repeat, timeit

import numpy as np
from numpy import ndarray as Array
from threadpoolctl import threadpool_info
from tqdm import tqdm

from dev import peers
from dev.peers import Engine, Model
from encoder import WORD, Encoder, read_encoder, split_words
from engine.threads import n_blas_threads
from gpt2 import stream
from optimizer import initialize
from sampling import check_count
from show.terminal import read_document
from store.models import HPARAMS, PROJECT, RELEASED, TOKENIZER_FILES, find_model
from store.params import count_params, param_shapes, view_as
from store.tensors import WEIGHTS
from utils import load_encoder_hparams_and_params, save_model

SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
PROMPTS, CONTEXTS, BATCHES, LENGTHS = (16, 128, 512, 1000), (10, 500, 1000), (1, 4, 16, 64), (1, 8, 40)
N_CONTEXT, N_DECODE, N_PROMPT_INT8 = 10, 20, 512  # context of batches and of int8; tokens of a figure; prompt of int8
PROMPT = "Alan Turing theorized that computers would one day become"
READ_SHAPE, PRODUCT_SIZE = (3072, 40_000), 2048  # 491 MB, of which a processor's cache holds little
LEAST_SECONDS = 0.2  # what takes less is repeated
UNSTEADY = 1.5  # a row is marked if the largest of its figures is so many times the smallest
PAUSE = 0.1  # seconds after which the threads of the library before have stopped waiting for work and free the cores
TIMER = """if True:
    import os, subprocess, sys, time
    start = time.perf_counter()
    status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
    print(time.perf_counter() - start)
    if os.name == "posix":
        import resource
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    sys.exit(status)
"""
LIMITS = {
    "prefill": "a prompt: two operations for each weight of the blocks and each token, at {operations:,.0f} GFLOP/s",
    "decode": "decoding: for each token, reading the weights once, at {bytes:,.1f} GB/s",
    "batch": "batches: for a token of each sequence, reading the weights once, or the operations; what takes longer",
    "startup": 'start-up: python -c "import numpy"',
    "memory": "memory: the weights",
    "tokenizer": "tokenizer: cutting the text into words",
}


@dataclass(frozen=True)
class Measure:
    """What is measured, and the functions that do it in turn: of the `limit`, this project (`here`) and its peers."""

    group: str
    name: str
    unit: str
    parties: dict[str, Callable[[], float]]
    cost: dict[str, float] = field(default_factory=dict)  # `bytes` and `operations` of a token
    figures: dict[str, list[float]] = field(default_factory=dict)  # each party's, round by round


@functools.cache
def large_matrix() -> Array:
    return np.ones(READ_SHAPE, np.float32)  # not zeros, all of which would be the same page of memory


@functools.cache
def compiled_sum() -> Callable[[Array], float]:
    """The sum of a matrix, compiled, in as many threads as matrix products have."""
    import numba

    numba.set_num_threads(min(n_blas_threads(), numba.config.NUMBA_NUM_THREADS))
    return numba.njit(parallel=True, fastmath=True, nogil=True)(lambda a: a.sum())


def read_bandwidth() -> float:
    """The best bytes/s of reading a large matrix, for a product from either side or, with Numba, for its sum."""
    a = large_matrix()
    v, u = (np.ones(n, np.float32) for n in a.shape)
    readers = [lambda: v @ a, lambda: a @ u]
    if importlib.util.find_spec("numba"):
        readers.append(functools.partial(compiled_sum(), a))
    return a.nbytes / min(min(repeat(reader, number=1, repeat=12)) for reader in readers)


def product_rate() -> float:
    """The best operations/s of a float32 matrix product."""
    a = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    product = np.empty_like(a)
    return 2 * len(a) ** 3 / min(repeat(lambda: np.matmul(a, a, out=product), number=1, repeat=3))


def token_limit(cost: dict[str, float]) -> float:
    """The highest possible tokens/s if a token costs so many `bytes` and `operations`: the slower of them counts."""
    rates = {"bytes": read_bandwidth, "operations": product_rate}
    return min(rates[name]() / amount for name, amount in cost.items())


def run_process(*arguments: str) -> tuple[float, float]:
    """Run Python with `arguments` in a process of its own: its seconds, and its peak resident memory in MB."""
    # A small process stands between, because Linux counts from the peak of the process that starts another.
    command = [sys.executable, "-c", TIMER, sys.executable, *arguments]
    timer = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if timer.returncode:
        raise OSError(f"{' '.join(arguments)[:80]} has failed: {' '.join(timer.stderr.split())[-300:]}")
    seconds, peak = map(float, [*timer.stdout.split(), "nan"][:2])
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def prefill_speed(engine: Engine, ids: Array) -> float:
    """The tokens/s of the prompt `ids`, up to the first new id."""
    seconds = []
    while sum(seconds) < LEAST_SECONDS or not seconds:
        seconds.append(timeit(lambda: next(engine(ids, 1)), number=1))
    return ids.size * len(seconds) / sum(seconds)


def decode_speed(engine: Engine, ids: Array) -> float:
    """The tokens/s, of all sequences together, after the context `ids` and the first new id."""
    steps = engine(ids, 1 + N_DECODE)
    next(steps)
    start = time.perf_counter()
    return sum(np.size(new) for new in steps) / (time.perf_counter() - start)


def tokenizer_speed(new_encode: Callable[[], Callable], text: str) -> float:
    """The MB/s of the first text that the function `new_encode()` cuts up; making the function does not count."""
    encode = new_encode()
    return len(text.encode()) / 1e6 / timeit(lambda: encode(text), number=1)


def engines_of(model: Model, against: list[str], temporary: Path) -> tuple[dict, dict]:
    """This project and its peers, each an `Engine`: with float32 weights, and with int8 weights if there is Numba."""
    n_head = model.hparams["n_head"]
    float32, int8 = peers.engines(model, against, temporary)
    float32 = {"here": lambda ids, n_tokens: stream(ids, model.params, n_head, n_tokens), **float32}
    if not importlib.util.find_spec("numba"):
        return float32, {}
    from engine.int8 import quantize  # imported late: it needs Numba

    quantized = functools.cache(lambda: quantize(model.params))  # once, when it is first used
    return float32, {"here": lambda ids, n_tokens: stream(ids, quantized(), n_head, n_tokens), **int8}


def engine_measures(model: Model, against: list[str], temporary: Path) -> Iterator[Measure]:
    """Prompts, decoding and batches, within this process; what does not fit the model's context is left out."""
    n_vocab, n_embd = model.hparams["n_vocab"], model.hparams["n_embd"]
    n_blocks = 12 * n_embd * n_embd * model.hparams["n_layer"]  # weights in matrices: 3 + 1 in attn, 4 + 4 in mlp
    n_matrices = n_blocks + n_vocab * n_embd
    prompt, decode = {"operations": 2 * n_blocks}, {"bytes": 4 * model.n_weights}
    decode_int8 = {"bytes": decode["bytes"] - 3 * n_matrices}  # a byte for each weight of the matrices, 4 for others
    batches = {n: {"bytes": decode["bytes"] / n, "operations": 2 * n_matrices} for n in BATCHES}
    float32, int8 = engines_of(model, against, temporary)
    of_batches = {name: engine for name, engine in float32.items() if name != "llama_cpp"}
    for group, name, shape, cost, engines in [
        *(("prefill", f"prompt of {n:,}", (n,), prompt, float32) for n in PROMPTS),
        ("prefill", f"prompt of {N_PROMPT_INT8:,}, int8", (N_PROMPT_INT8,), prompt, int8),
        *(("decode", f"decode after {n:,}", (n,), decode, float32) for n in CONTEXTS),
        ("decode", f"decode after {N_CONTEXT}, int8", (N_CONTEXT,), decode_int8, int8),
        *(("batch", f"decode, batch of {n}", (n, N_CONTEXT), batches[n], of_batches) for n in BATCHES),
    ]:
        n_new, speed = (0, prefill_speed) if group == "prefill" else (N_DECODE, decode_speed)
        if engines and shape[-1] + n_new <= model.hparams["n_ctx"]:
            ids = np.random.default_rng(0).integers(0, n_vocab, shape)
            parties = {party: functools.partial(speed, engine, ids) for party, engine in engines.items()}
            limit = functools.partial(token_limit, cost)
            yield Measure(group, name, "tokens/s", {"limit": limit, **parties}, cost)


def other_measures(model: Model, against: list[str], text: str) -> Iterator[Measure]:
    """The whole process, from the command line to its end, and the tokenizer."""

    def generate(n_tokens: int) -> tuple[float, float]:
        options = ("--model_size", str(model.directory), "--n_tokens_to_generate", str(n_tokens), "--ignore_eot")
        return run_process(str(PROJECT / "gpt2.py"), PROMPT, *options)

    for n in LENGTHS:
        parties = {"limit": lambda: run_process("-c", "import numpy")[0], "here": lambda n=n: generate(n)[0]}
        yield Measure("startup", f"start-up, {n} token{'s' * (n > 1)}", "s", parties)
    if os.name == "posix":
        parties = {"limit": lambda: 4 * model.n_weights / 1e6, "here": lambda: generate(LENGTHS[-1])[1]}
        yield Measure("memory", "peak memory", "MB", parties)
    tables = (model.encoder.encoder, model.encoder.bpe_ranks)
    encoders = {"limit": lambda: split_words, "here": lambda: Encoder(*tables).encode}
    if "tiktoken" in against:
        encoders["tiktoken"] = functools.cache(lambda: peers.tiktoken_encode(model.encoder, WORD.pattern))
    parties = {name: functools.partial(tokenizer_speed, make, text) for name, make in encoders.items()}
    yield Measure("tokenizer", "tokenizer", "MB/s", parties)


def take_all(measures: list[Measure], n_rounds: int) -> list[dict]:
    """The rows of all measures, with a bar on standard error if it is a terminal."""
    bar = tqdm(measures * (1 + n_rounds), unit="measure", disable=None, leave=False)
    for measure in bar:
        bar.set_description_str(measure.name)
        if measure.group not in ("decode", "batch"):
            large_matrix.cache_clear()
        for party, figure in measure.parties.items():
            time.sleep(PAUSE)
            measure.figures.setdefault(party, []).append(figure())
    rows = [summarize(measure) for measure in measures]
    batches = [row for row in rows if row["group"] == "batch"]
    for row in batches:
        row["times_one_sequence"] = row["here"] / batches[0]["here"]
    return rows


def summarize(measure: Measure) -> dict:
    """The row of a measure: medians, how many times as good this project is, and the figures of all rounds."""
    figures = {party: values[1:] for party, values in measure.figures.items()}  # the first round warms up
    medians = {party: statistics.median(values) for party, values in figures.items()}
    sign = -1 if measure.unit in ("s", "MB") else 1  # less of these is better
    ratios = {party: (medians["here"] / median) ** sign for party, median in medians.items()}
    return {
        **{name: getattr(measure, name) for name in ("group", "name", "unit", "cost")},
        "limit": medians["limit"], "here": medians["here"], "share_of_limit": ratios["limit"],
        "peers": {party: {"median": medians[party], "ratio": ratios[party]} for party in list(figures)[2:]},
        "unsteady": [party for party, values in figures.items() if max(values) > UNSTEADY * min(values)],
        "figures": figures,
    }  # fmt: skip


def describe_machine(packages: Iterable[str]) -> dict:
    """The processor, the cores that this process may use, the threads of BLAS, and the versions of libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    model_name = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")
    processor = model_name[1] if model_name else platform.processor() or platform.machine()
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"Python": platform.python_version(), "NumPy": np.__version__}
    versions |= {str(p["internal_api"]): str(p["version"]) for p in threadpool_info() if p["user_api"] == "blas"}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return {"processor": processor, "n_cores": n_cores, "n_threads": n_blas_threads(), "versions": versions}


def open_model(name: str, models_dir: str, temporary: Path) -> Model:
    """The model `name`; a released one that is not there is not downloaded, but its shape gets random weights."""
    directory = tokenizer = find_model(name, models_dir)
    missing = [file for file in (*TOKENIZER_FILES, HPARAMS, WEIGHTS) if not (directory / file).is_file()]
    weights = WEIGHTS
    if name in RELEASED and missing:
        weights = f"random, as {directory / WEIGHTS} is not there"
        if missing[0] in TOKENIZER_FILES:
            tokenizer = PROJECT / "models" / "shakespeare"
        directory = temporary / name
        n_embd, n_head, n_layer = SHAPES[name]
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
        shapes = param_shapes(hparams)
        params = view_as(shapes, np.empty(count_params(shapes), np.float32))
        initialize(params, np.random.default_rng(0))
        save_model(directory, read_encoder(tokenizer), hparams, params)
    directory = directory.resolve()
    source = str(directory) if name in RELEASED else name  # a model of Hugging Face is downloaded by its name
    return Model(directory, weights, str(tokenizer), *load_encoder_hparams_and_params(source, models_dir))


def number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"


def format_table(report: dict) -> str:
    """The report as text: the machine, a line for each measure, and what the limits are."""
    machine, model, rows = (report[name] for name in ("machine", "model", "rows"))
    lines = [
        f"{model['name']}: {model['n_weights'] / 1e6:,.1f} M weights",
        f"weights: {model['weights']}; tokenizer: {model['tokenizer']}",
        f"{machine['processor']}, {machine['n_cores']} cores, {machine['n_threads']} threads",
        textwrap.fill(", ".join(map(" ".join, machine["versions"].items())), 119),
        f"rounds: {report['rounds']}, of which these are the medians\n",
        f"{'':34}{'limit':>9}{'here':>9}{'share':>7}" + "".join(f"{peer:>13}{'ratio':>6}" for peer in report["peers"]),
    ]
    for row in rows:
        line = f"{row['name']:25}{row['unit']:9}{number(row['limit']):>9}{number(row['here']):>9}"
        line += f"{row['share_of_limit']:>7.0%}"
        for figure in map(row["peers"].get, report["peers"]):
            line += f"{number(figure['median']):>13}{figure['ratio']:>6.2f}" if figure else f"{'-':>13}{'-':>6}"
        lines.append(line + " ~" * bool(row["unsteady"]))
    return "\n".join([*lines, "", *notes(rows), *report["remarks"]])


def notes(rows: list[dict]) -> list[str]:
    """What the columns of the table mean, and what its limits are."""
    rates = {}
    for name in ("bytes", "operations"):
        limits = [row["limit"] * row["cost"][name] / 1e9 for row in rows if list(row["cost"]) == [name]]
        rates[name] = statistics.median(limits or [0])
    groups = {row["group"] for row in rows}
    lines = ["share: of the limit; ratio: how many times as good as the peer. The limits are, of"]
    lines += [f"  {text.format(**rates)}" for group, text in LIMITS.items() if group in groups]
    if any(row["unsteady"] for row in rows):
        lines.append(f"~ rounds differ by a factor of {UNSTEADY} or more: something else ran, do not trust the row")
    if factors := [f"{row['times_one_sequence']:.1f}" for row in rows if row["group"] == "batch"]:
        lines.append(f"batches, times the speed of the first: {', '.join(factors)}")
    return lines


def choose(names: str | None, known: Iterable[str], option: str) -> list[str]:
    """The names in a list with commas; ValueError for one that is not known."""
    chosen = list(dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip()))
    if odd := [name for name in chosen if name not in known]:
        raise ValueError(f"{option} takes {', '.join(known)}, or several with commas between, not {odd[0]!r}")
    return chosen


def main(
    model_size: str = "124M", models_dir: str = "models", against: str | None = None, only: str | None = None,
    rounds: int = 5, text: str | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Measure speed and memory, beside the physical limit and other libraries, all in turn.

    --model_size 124M     124M, 355M, 774M, 1558M (random weights if it is not there), a name in models_dir, a directory
    --against NAMES       peers to measure too: transformers,llama_cpp,tiktoken
    --only NAMES          not all, but these: prefill,decode,batch,startup,memory,tokenizer
    --rounds 5            how often each figure is taken; the table shows medians
    --text FILE           what the tokenizer reads, instead of the help texts that come with Python
    --json                print everything as JSON, each round too
    """
    check_count("rounds", rounds, least=1)
    rivals, groups = choose(against, peers.PEERS, "against"), choose(only, LIMITS, "only") or LIMITS
    machine = describe_machine(peers.check_installed(rivals))
    english = "\n".join(topics.values()) if text is None else read_document(text, errors="replace")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        model = open_model(model_size, models_dir, Path(temporary))
        measures = [*engine_measures(model, rivals, Path(temporary)), *other_measures(model, rivals, english)]
        rows = take_all([measure for measure in measures if measure.group in groups], rounds)
    about = {"name": model_size, "weights": model.weights, "tokenizer": model.tokenizer, "n_weights": model.n_weights}
    report = {"model": {**about, **model.hparams}, "machine": machine, "rounds": rounds}
    report |= {"peers": rivals, "rows": rows, "remarks": model.remarks}
    print(jsonlib.dumps(report, indent=1) if json else format_table(report))


if __name__ == "__main__":
    run(main)
