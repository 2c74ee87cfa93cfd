"""Train a small GPT-2 on a text, in plain NumPy: from a text file to a model directory that gpt2.py loads.

The gradients come from backprop.py. Here are the optimizer, a bigram model to be beaten, the loop, and what it takes to
stop and go on, and the command line.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_info, threadpool_limits
from tqdm import tqdm

from backprop import gpt2_loss
from encoder import Encoder, get_encoder, train_bpe
from gpt2 import generate
from sampling import check_count, sample
from utils import (
    WEIGHTS,
    count_bytes,
    flatten,
    load_encoder_hparams_and_params,
    map_leaves,
    map_params,
    param_shapes,
    read_encoder,
    read_hparams,
    replacing,
    save_model,
    save_params,
    tensor_name,
)

STATE, LOG, PLOT = "training.safetensors", "train.csv", "loss.png"
VECTORS = ("weights", "m", "v")  # m and v are AdamW's moments
COLUMNS = ("step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second")
SHAPE = {"n_vocab": 1024, "n_ctx": 256, "n_embd": 192, "n_head": 4, "n_layer": 4}
DEFAULTS = {
    **SHAPE, "dropout": 0.1, "batch_size": 16, "learning_rate": 1.5e-3, "max_steps": 2000, "minutes": None,
    "eval_every": 100, "seed": 0, "encoder": None, "init_from": None,
}  # fmt: skip
FINE_TUNING = {"learning_rate": 1e-4}  # the defaults that are other for weights that have been trained before
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0
WARM_UP, LAST_RATE = 0.03, 0.05  # the share of the training that the rate grows, and what is left of it at the end
SAMPLE_LENGTH, SAMPLE_TEMPERATURE = 200, 0.8


def view_as(shapes: dict, vector: Array) -> dict:
    """Consecutive parts of `vector` as arrays of `shapes`, nested as those are: what happens to one happens to both."""
    end = 0

    def view(path: tuple, shape: tuple) -> Array:
        nonlocal end
        start, end = end, end + math.prod(shape)
        return vector[start:end].reshape(shape)

    return map_leaves(view, shapes)


def initialize(params: dict, rng: np.random.Generator) -> None:
    """GPT-2's initial weights, in place (GPT-2 paper, section 2.3; the numbers are those of its code)."""
    n_layer = len(params["blocks"])

    def fill(path: tuple, array: Array) -> None:
        if array.ndim == 1:
            array[...] = path[-1] == "g"  # gains are 1, biases 0
        elif "c_proj" in path:  # 2 n_layer of these add to the residual stream, which should not grow with the layers
            array[...] = rng.normal(0, 0.02 / math.sqrt(2 * n_layer), array.shape)
        else:
            array[...] = rng.normal(0, 0.01 if path == ("wpe",) else 0.02, array.shape)

    map_leaves(fill, params)


def weight_decay(shapes: dict) -> Array:
    """The rate at which each weight decays, as one vector: matrices do, gains and biases do not."""
    leaves = flatten(shapes, tensor_name).values()
    return np.concatenate([np.full(math.prod(s), WEIGHT_DECAY if len(s) > 1 else 0, np.float32) for s in leaves])


def learning_rate_at(progress: float, peak: float) -> float:
    """Linear warm-up to `peak`, then a half cosine; `progress` is the share of the training that is done."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1)))
    return peak * (LAST_RATE + (1 - LAST_RATE) * cosine)


def clip(gradient: Array) -> float:
    """Scale the gradient down to the norm MAX_NORM, in place, if it is longer; the norm that it had."""
    norm = math.sqrt(gradient @ gradient)
    if norm > MAX_NORM:
        gradient *= MAX_NORM / norm
    return norm


def adamw(weights: Array, gradient: Array, m: Array, v: Array, decay: Array, step: int, rate: float) -> None:
    """Update vectors of weights and moments in place; steps count from 1 (Loshchilov and Hutter 2019, algorithm 2)."""
    beta_1, beta_2 = BETAS
    for start in range(0, len(weights), 2**16):  # in pieces that stay in the processor's cache
        part = slice(start, start + 2**16)
        g = gradient[part]
        m[part] += (1 - beta_1) * (g - m[part])
        v[part] += (1 - beta_2) * (g * g - v[part])
        weights[part] *= 1 - rate * decay[part]
        weights[part] -= rate / (1 - beta_1**step) * m[part] / (np.sqrt(v[part] / (1 - beta_2**step)) + 1e-8)


def n_blas_threads() -> int:
    """The threads that NumPy's matrix products would use: one a core, unless the environment says otherwise."""
    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def compute_gradient(
    windows: Array, params: dict, n_head: int, rate: float, seed: tuple, shares: list, pool: ThreadPoolExecutor
) -> tuple[float, Array]:
    """The mean loss of `windows` [n_batch, n_seq + 1] and its gradient, as one vector.

    Each thread of `pool` adds up the gradients of its share of the windows, one at a time: so the activations stay in
    the processor's cache, and all arithmetic, not only matrix products, uses every core. `shares` has for each thread
    a vector and its `view_as`. Dropout draws from `seed` and the window's number.
    """

    def work(i: int) -> float:
        vector, grads = shares[i]
        vector[:] = 0
        total = 0.0
        with np.errstate(all="ignore"):  # what overflows becomes a NaN, and that is reported once
            for n in range(i, len(windows), len(shares)):
                loss, backward = gpt2_loss(windows[n], params, n_head, rate, np.random.default_rng((*seed, n + 1)))
                backward(1 / len(windows), grads)
                total += loss
        return total / len(windows)

    loss = sum(pool.map(work, range(len(shares))))
    (gradient, _), *others = shares
    for vector, _ in others:
        gradient += vector
    return loss, gradient


def evaluate(tokens: Array, params: dict, n_head: int, pool: ThreadPoolExecutor) -> float:
    """The mean loss over tokens[1:], each predicted from those before it in its window; windows do not overlap."""
    n_ctx = len(params["wpe"])

    def nats(start: int) -> float:
        window = tokens[start : start + n_ctx + 1]
        with np.errstate(all="ignore"):
            return gpt2_loss(window, params, n_head)[0] * (len(window) - 1)

    return sum(pool.map(nats, range(0, len(tokens) - 1, n_ctx))) / (len(tokens) - 1)


def bigram(tokens: list[int], n_vocab: int) -> Callable[[int, int], float]:
    """log P(b | a) with P = (count of a b + 1) / (count of a + n_vocab): counted in `tokens`, add-one smoothing."""
    pairs, firsts = Counter(itertools.pairwise(tokens)), Counter(tokens[:-1])
    return lambda a, b: math.log((pairs[a, b] + 1) / (firsts[a] + n_vocab))


def save_state(path: Path, vectors: dict[str, Array], record: dict) -> None:
    """Write what `--resume` needs: the vectors of weights and moments, and a record of everything else."""
    with replacing(path) as temporary:
        save_file(vectors, temporary, metadata={"record": json.dumps(record)})


def load_state(path: Path) -> tuple[dict[str, Array], dict]:
    """What `save_state` has written; FileNotFoundError if it is not there, ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing to resume: {path} is missing")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in VECTORS}, json.loads(file.metadata()["record"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): train anew, with --overwrite") from error


@contextlib.contextmanager
def ctrl_c() -> Iterator[list]:
    """Yield a list that is empty until Ctrl-C is pressed, so that a step can be finished; the second one counts."""
    pressed = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    out: Path, tokens: Array, validation: Array, tokens_per_char: float, hparams: dict, vectors: dict, record: dict
) -> None:
    """Train until the settings in `record` say that it is done; the best weights are in `out` then.

    `vectors` are the `weights` and AdamW's moments `m` and `v`, in place. Every evaluation also saves the log and all
    that is needed to resume. Ctrl-C saves that after the step at hand, and raises KeyboardInterrupt. Raises
    FloatingPointError before a loss that is not a number reaches the weights.
    """
    settings, rows, losses = record["settings"], record["rows"], record["losses"]
    max_steps, max_seconds = settings["max_steps"] or math.inf, 60 * (settings["minutes"] or math.inf)
    shapes, n_head, n_ctx = param_shapes(hparams), hparams["n_head"], hparams["n_ctx"]
    params, decay = view_as(shapes, vectors["weights"]), weight_decay(shapes)
    n_threads = n_blas_threads()
    buffers = [np.empty_like(decay) for _ in range(min(n_threads, settings["batch_size"]))]
    shares = [(buffer, view_as(shapes, buffer)) for buffer in buffers]
    bar = tqdm(initial=record["step"], unit="step", disable=None)
    now = time.perf_counter()
    began, since, n_tokens = now - record["seconds"], now, 0  # `since` then, n_tokens were trained on

    with threadpool_limits(1), ThreadPoolExecutor(n_threads) as pool, ctrl_c() as pressed, bar:
        while True:
            step = record["step"]
            record["seconds"] = time.perf_counter() - began
            progress = max(step / max_steps, record["seconds"] / max_seconds)
            rate = learning_rate_at(progress, settings["learning_rate"])
            if (progress >= 1 or step % settings["eval_every"] == 0) and not (rows and rows[-1][0] == step):
                speed = n_tokens / (time.perf_counter() - since) if losses else None
                loss = evaluate(validation, params, n_head, pool)
                rows.append([step, sum(losses) / len(losses) if losses else None, loss, rate, speed])
                losses.clear()
                if loss < record["best_loss"]:
                    record.update(best_step=step, best_loss=loss)
                    save_params(out / WEIGHTS, params)
                write_log(out / LOG, rows)
                save_state(out / STATE, vectors, record)
                tqdm.write(describe(rows[-1], tokens_per_char))
                since, n_tokens = time.perf_counter(), 0
            if progress >= 1:
                return
            if pressed:
                save_state(out / STATE, vectors, record)
                raise KeyboardInterrupt
            seed = (settings["seed"], step + 1)
            starts = np.random.default_rng(seed).integers(0, len(tokens) - n_ctx, settings["batch_size"])
            windows = tokens[starts[:, None] + np.arange(n_ctx + 1)]  # [n_batch, n_ctx + 1]
            loss, gradient = compute_gradient(windows, params, n_head, settings["dropout"], seed, shares, pool)
            if not math.isfinite(clip(gradient)):
                raise FloatingPointError(
                    f"the training diverged at step {step + 1}, where the loss is {loss}: try a lower --learning_rate. "
                    f"{out} keeps the best weights so far, those of step {record['best_step']}"
                )
            adamw(**vectors, gradient=gradient, decay=decay, step=step + 1, rate=rate)
            record["step"] += 1
            losses.append(loss)
            n_tokens += windows[:, 1:].size
            bar.total = settings["max_steps"] or round(record["step"] / progress)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / (time.perf_counter() - since):,.0f} tokens/s")


def describe(row: list, tokens_per_char: float) -> str:
    step, train_loss, loss, rate, speed = row
    text = f"step {step:6,}  validation {loss:.4f} nats/token, {loss * tokens_per_char:.4f} nats/character"
    return text if speed is None else f"{text}  train {train_loss:.4f}  rate {rate:.1e}  {speed:,.0f} tokens/s"


def write_log(path: Path, rows: list[list]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def draw_losses(path: Path, rows: list[list], bigram_loss: float) -> None:
    """The curves of the log as a picture; without matplotlib, a line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not drawn: pip install matplotlib")
        return
    steps, train_losses, losses = list(zip(*rows, strict=True))[:3]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps[1:], train_losses[1:], label="GPT, training text (with dropout)")
    axes.plot(steps, losses, label="GPT, validation text")
    axes.axhline(bigram_loss, color="gray", linestyle="--", label="bigram, validation text")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"Training of {path.parent.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def report(losses: dict[str, float], tokens_per_char: float) -> None:
    """Print the losses side by side."""
    print(f"\n{'validation loss':16}{'nats/token':>12}{'nats/character':>16}")
    for name, loss in losses.items():
        print(f"{name:16}{loss:12.4f}{loss * tokens_per_char:16.4f}")


def read_document(path: str) -> str:
    """The text in a file; ValueError if it is empty or not UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def choose_settings(given: dict, begun: dict) -> dict:
    """All settings, of which `given` are from the command line and `begun` from the training that is resumed.

    Raises ValueError, naming it, for one that makes no sense, or is not what it was in the training that is resumed.
    """
    for name in begun.keys() & given.keys() - {"max_steps", "minutes", "eval_every"}:
        if given[name] != begun[name]:
            raise ValueError(
                f"the training was begun with {name} = {begun[name]}, and can not go on with {given[name]}"
            )
    settings = DEFAULTS | (FINE_TUNING if "init_from" in given else {}) | begun | given
    for limit, other in (("max_steps", "minutes"), ("minutes", "max_steps")):
        if limit in given and other not in given:
            settings[other] = None
    for name in (*SHAPE, "batch_size", "eval_every", "max_steps", "seed"):
        if settings[name] is not None:
            check_count(name, settings[name], least=0 if name == "seed" else 1)
    for name, ceiling in (("dropout", 1), ("learning_rate", math.inf), ("minutes", math.inf)):
        value = settings[name]
        valid = isinstance(value, (int, float)) and (0 < value < ceiling or (name == "dropout" and value == 0))
        if value is not None and not valid:
            raise ValueError(f"{name} must be a number above 0 and below {ceiling}, not {value!r}")
    if settings["n_embd"] % settings["n_head"]:
        raise ValueError(f"n_embd = {settings['n_embd']} is not a multiple of n_head = {settings['n_head']}")
    return settings


def begin(given: dict, text: str) -> tuple[Encoder, dict, dict, dict]:
    """A new training on `text`: its tokenizer, hyperparameters, vectors and record, as for `train`."""
    settings = choose_settings(given, {})
    source = settings["init_from"] or settings["encoder"]
    if settings["init_from"] and settings["encoder"]:
        raise ValueError("the model to start from has its own tokenizer: leave out --init_from or --encoder")
    if settings["init_from"]:
        encoder, hparams, params = load_encoder_hparams_and_params(source)
        hparams["n_ctx"] = min(given.get("n_ctx", math.inf), hparams["n_ctx"])  # fewer positions are a smaller model
        params["wpe"] = params["wpe"][: hparams["n_ctx"]]
    else:
        encoder = get_encoder(source) if source else Encoder(*train_bpe(text, settings["n_vocab"]))
        hparams = settings | {"n_vocab": len(encoder.encoder)}
    hparams = {name: hparams[name] for name in SHAPE}
    for name in SHAPE.keys() & given.keys():
        if given[name] != hparams[name]:
            raise ValueError(f"{name} is {hparams[name]} in {source}, and can not be {given[name]}")
    shapes = param_shapes(hparams)
    vectors = {name: np.zeros(count_bytes(shapes) // 4, np.float32) for name in VECTORS}
    if settings["init_from"]:
        np.concatenate([array.ravel() for array in flatten(params, tensor_name).values()], out=vectors["weights"])
    else:
        initialize(view_as(shapes, vectors["weights"]), np.random.default_rng(settings["seed"]))
    record = {"step": 0, "seconds": 0.0, "best_step": 0, "best_loss": math.inf, "rows": [], "losses": []}
    return encoder, hparams, vectors, record | {"settings": settings | hparams}


def go_on(directory: Path, given: dict) -> tuple[Encoder, dict, dict, dict]:
    """The training that was stopped in `directory`, as `begin` returns it."""
    vectors, record = load_state(directory / STATE)
    record["settings"] = choose_settings(given, record["settings"])
    return read_encoder(directory), read_hparams(directory), vectors, record


def main(
    text: str, out: str | None = None, model: str = "gpt", n_vocab: int | None = None, n_ctx: int | None = None,
    n_embd: int | None = None, n_head: int | None = None, n_layer: int | None = None, dropout: float | None = None,
    batch_size: int | None = None, learning_rate: float | None = None, max_steps: int | None = None,
    minutes: float | None = None, eval_every: int | None = None, seed: int | None = None, encoder: str | None = None,
    init_from: str | None = None, resume: bool = False, overwrite: bool = False,
) -> None:  # fmt: skip
    """Train a GPT-2 on the file TEXT, of which the last tenth is kept for validation.

    --out DIRECTORY         where the model goes, for gpt2.py --model_size DIRECTORY
    --model gpt             bigram: only count pairs of tokens, which gives the loss that a GPT has to beat
    --n_vocab 1024          tokens in the vocabulary, which is learned from the text
    --n_ctx 256             tokens in the context
    --n_embd 192            width
    --n_head 4              heads in each layer
    --n_layer 4             layers
    --dropout 0.1           share of activations to drop: more for a small text and a long training
    --batch_size 16         windows of n_ctx tokens in a step
    --learning_rate 0.0015  at its highest, after the warm-up (with --init_from: 0.0001)
    --max_steps 2000        how long
    --minutes N             how long, instead
    --eval_every 100        steps from one evaluation to the next; the best weights are kept
    --seed 0                the same one gives the same model, on one machine and number of threads
    --encoder NAME          take the tokenizer of this model
    --init_from NAME        start from the weights of this model, such as 124M
    --resume                go on where a training into --out has stopped
    --overwrite             replace the model in --out
    """
    started = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in DEFAULTS and value is not None}
    if model not in ("gpt", "bigram"):
        raise ValueError(f"model must be gpt or bigram, not {model!r}")
    if model == "gpt" and not out:
        raise ValueError("--out is missing: the directory for the model, such as --out models/mine")
    if resume and overwrite:
        raise ValueError("--resume goes on with what is there, --overwrite replaces it: leave out one of them")
    directory = Path(out or "")
    if model == "gpt" and directory.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{out} exists already: --resume goes on with its training, --overwrite replaces its model"
        )
    document = read_document(text)
    split = len(document) * 9 // 10
    tokenizer, hparams, vectors, record = go_on(directory, given) if resume else begin(given, document[:split])
    digest = hashlib.sha256(document.encode()).hexdigest()
    if record.setdefault("text", digest) != digest:
        raise ValueError(f"the training in {out} was begun with another text than {text}")
    tokens, validation = (
        np.array(tokenizer.encode(part, allow_special=True)) for part in (document[:split], document[split:])
    )
    if len(tokens) <= hparams["n_ctx"] or len(validation) < 2:
        raise ValueError(
            f"{text} is too short: {len(tokens)} tokens to train with and {len(validation)} to validate with, where a "
            f"context of n_ctx = {hparams['n_ctx']} needs {hparams['n_ctx'] + 1} and 2"
        )
    n_tokens = len(tokenizer.encoder)
    log_probability = bigram(tokens.tolist(), n_tokens)
    bigram_loss = -np.mean([log_probability(a, b) for a, b in itertools.pairwise(validation.tolist())])
    losses = {"uniform": math.log(n_tokens), "bigram": bigram_loss}
    tokens_per_char = (len(validation) - 1) / (len(document) - split)
    ids, seed = tokenizer.encode("\n"), record["settings"]["seed"]
    if model == "bigram":
        rng = np.random.default_rng(seed)
        for _ in range(SAMPLE_LENGTH):
            logits = np.array([log_probability(ids[-1], b) for b in range(n_tokens)])
            ids.append(int(sample(logits, rng, SAMPLE_TEMPERATURE)))
    else:
        shapes = param_shapes(hparams)
        if not resume:
            for file in (STATE, LOG, PLOT):
                (directory / file).unlink(missing_ok=True)
            save_model(directory, tokenizer, hparams, view_as(shapes, vectors["weights"]))
        record["seconds"] += time.perf_counter() - started
        try:
            train(directory, tokens, validation, tokens_per_char, hparams, vectors, record)
        except KeyboardInterrupt:
            best = f"{out} has the best weights so far, those of step {record['best_step']}"
            print(f"\nstopped after step {record['step']}: --resume goes on from there. {best}", file=sys.stderr)
            raise
        losses["GPT"] = record["best_loss"]
        draw_losses(directory / PLOT, record["rows"], bigram_loss)
        params = map_params(directory / WEIGHTS, shapes)
        ids += generate(
            ids, params, hparams["n_head"], SAMPLE_LENGTH, temperature=SAMPLE_TEMPERATURE, seed=seed, n_vocab=n_tokens
        )
    report(losses, tokens_per_char)
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    from cli import run

    run(main)
