"""The measurements of bench.py: prompts, decoding, batches, whole processes and the tokenizer.

A machine's speed changes from minute to minute. So a round measures the limit, this project and the other libraries
right after each other.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from timeit import Timer, timeit

import numpy as np
from numpy import ndarray as Array
from tqdm import tqdm

from dev import peers
from dev.machine import run_process, token_limit
from encoder import WORD, Encoder, split_words
from store.models import PROJECT

PROMPTS, CONTEXTS, BATCHES = (16, 128, 512, 1000), (10, 500, 1000), (1, 4, 16, 64)
N_CONTEXT, N_PROMPT_INT8 = 10, 512  # the context of batches and of decoding with int8; the prompt with int8
N_DECODE = 20  # tokens that are decoded for a figure
LENGTHS = (1, 8, 40)  # tokens that a whole process generates
PROMPT = "Alan Turing theorized that computers would one day become"
UNSTEADY = 1.5  # a row is marked if its largest figure is this many times the smallest
PAUSE = 0.1  # seconds in which the threads of the previous library stop waiting for work and free the cores


@dataclass(frozen=True)
class Measure:
    """A row of the table, and the functions that measure the `limit`, this project (`here`) and the peers."""

    group: str
    name: str
    unit: str
    parties: dict[str, Callable[[], float]]
    cost: dict[str, float] = field(default_factory=dict)  # `bytes` and `operations` of a token
    figures: dict[str, list[float]] = field(default_factory=dict)  # by party, one for each round


def prefill_speed(engine: peers.Engine, ids: Array) -> float:
    """The tokens/s of the prompt `ids`, up to the first new id."""
    n_runs, seconds = Timer(lambda: next(engine(ids, 1))).autorange()
    return ids.size * n_runs / seconds


def decode_speed(engine: peers.Engine, ids: Array) -> float:
    """The tokens/s of all sequences together, after the context `ids` and the first new id."""
    steps = engine(ids, 1 + N_DECODE)
    next(steps)
    start = time.perf_counter()
    return sum(np.size(new) for new in steps) / (time.perf_counter() - start)


def engine_measures(model: peers.Model, against: list[str], temporary: Path) -> Iterator[Measure]:
    """Prompts, decoding and batches within this process, if they fit the model's context."""
    n_vocab, n_embd = model.hparams["n_vocab"], model.hparams["n_embd"]
    n_blocks = 12 * n_embd * n_embd * model.hparams["n_layer"]  # weights in matrices: 3 + 1 in attn, 4 + 4 in mlp
    n_matrices = n_blocks + n_vocab * n_embd
    prompt, decode = {"operations": 2 * n_blocks}, {"bytes": 4 * model.n_weights}
    decode_int8 = {"bytes": decode["bytes"] - 3 * n_matrices}  # one byte for each weight of the matrices
    batches = {n: {"bytes": decode["bytes"] / n, "operations": 2 * n_matrices} for n in BATCHES}
    float32, int8 = peers.engines(model, against, temporary)
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
            parties = {party: partial(speed, engine, ids) for party, engine in engines.items()}
            yield Measure(group, name, "tokens/s", {"limit": partial(token_limit, cost), **parties}, cost)


def other_measures(model: peers.Model, against: list[str], text: str) -> Iterator[Measure]:
    """Whole processes, from the command line to their end, and the tokenizer."""

    def tokenizer_speed(encode: Callable[[str], list]) -> float:
        return len(text.encode()) / 1e6 / timeit(lambda: encode(text), number=1)

    generate = partial(run_process, str(PROJECT / "gpt2.py"), PROMPT, "--ignore_eot", "-m", str(model.directory), "-n")
    for n in LENGTHS:
        here = partial(lambda n_tokens: generate(n_tokens)[0], str(n))
        parties: dict[str, Callable[[], float]] = {"limit": lambda: run_process("-c", "import numpy")[0], "here": here}
        yield Measure("startup", f"start-up, {n} token{'s' * (n > 1)}", "s", parties)
    if os.name == "posix":
        parties = {"limit": lambda: 4 * model.n_weights / 1e6, "here": lambda: generate(str(LENGTHS[-1]))[1]}
        yield Measure("memory", "peak memory", "MB", parties)
    tables = (model.encoder.encoder, model.encoder.bpe_ranks)  # a new Encoder remembers no words
    parties = {"limit": lambda: tokenizer_speed(split_words), "here": lambda: tokenizer_speed(Encoder(*tables).encode)}
    if "tiktoken" in against:
        parties["tiktoken"] = lambda: tokenizer_speed(peers.tiktoken_encode(model.encoder, WORD.pattern))
    yield Measure("tokenizer", "tokenizer", "MB/s", parties)


def measure_rows(measures: list[Measure], n_rounds: int) -> Iterator[dict]:
    """Measure all, round by round. Yield rows with medians, all figures, and how this project compares."""
    bar = tqdm(measures * (1 + n_rounds), unit="measure", disable=None, leave=False)
    for measure in bar:
        bar.set_description_str(measure.name)
        for party, measure_once in measure.parties.items():
            time.sleep(PAUSE)
            measure.figures.setdefault(party, []).append(measure_once())
    for measure in measures:
        figures = {party: values[1:] for party, values in measure.figures.items()}  # the first round warms up
        medians = {party: float(np.median(values)) for party, values in figures.items()}
        sign = -1 if measure.unit in ("s", "MB") else 1  # for seconds and MB, less is better
        ratios = {party: (medians["here"] / median) ** sign for party, median in medians.items()}
        unsteady = [party for party, values in figures.items() if max(values) > UNSTEADY * min(values)]
        row = {name: getattr(measure, name) for name in ("group", "name", "unit", "cost")}
        yield row | {"medians": medians, "figures": figures, "ratios": ratios, "unsteady": unsteady}
