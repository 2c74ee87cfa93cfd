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
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from safetensors import SafetensorError, safe_open
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from backprop import gpt2_loss
from cli import read_document
from encoder import END_OF_TEXT, Encoder, get_encoder, train_bpe
from files import replacing, sweep
from gpt2 import generate
from prefill import n_blas_threads
from sampling import check_count, sample
from utils import (
    RELEASED,
    WEIGHTS,
    count_bytes,
    flatten,
    load_encoder_hparams_and_params,
    map_leaves,
    map_params,
    param_shapes,
    read_encoder,
    read_hparams,
    save_model,
    save_params,
    save_tensors,
    tensor_name,
)

STATE, LOG, PLOT = "training.safetensors", "train.csv", "loss.png"
VECTORS = ("weights", "m", "v")  # m and v are AdamW's moments
COLUMNS = ("step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second")
SHAPE = {"n_vocab": 1024, "n_ctx": 256, "n_embd": 192, "n_head": 4, "n_layer": 4}
DEFAULTS = {
    **SHAPE, "dropout": 0.1, "batch_size": 16, "learning_rate": 1.5e-3, "max_steps": 1400, "minutes": None,
    "eval_every": 100, "seed": 0, "encoder": None, "init_from": None,
}  # fmt: skip
FINE_TUNING = {"learning_rate": 1e-4}  # instead of the above, for weights that have been trained before
CHANGEABLE = ("max_steps", "minutes", "eval_every", "learning_rate")  # in a training that is resumed
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0
WARM_UP, LAST_RATE = 0.03, 0.05  # the warm-up's share of the training; the last learning rate's share of the highest
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


def clip_gradient(gradient: Array) -> float:
    """Scale the gradient down to the norm MAX_NORM, in place, if it is longer; the norm that it had."""
    norm = math.sqrt(gradient @ gradient)
    if norm > MAX_NORM:
        gradient *= MAX_NORM / norm
    return norm


def adamw(weights: Array, gradient: Array, m: Array, v: Array, decay: Array, step: int, learning_rate: float) -> None:
    """Update vectors of weights and moments in place; steps count from 1 (Loshchilov and Hutter 2019, algorithm 2)."""
    beta_1, beta_2 = BETAS
    for start in range(0, len(weights), 2**16):  # in pieces that stay in the processor's cache
        part = slice(start, start + 2**16)
        g = gradient[part]
        m[part] += (1 - beta_1) * (g - m[part])
        v[part] += (1 - beta_2) * (g * g - v[part])
        weights[part] *= 1 - learning_rate * decay[part]
        weights[part] -= learning_rate / (1 - beta_1**step) * m[part] / (np.sqrt(v[part] / (1 - beta_2**step)) + 1e-8)


def compute_gradient(
    windows: Array, params: dict, n_head: int, dropout: float, seed: tuple, shares: list, pool: ThreadPoolExecutor
) -> tuple[float, Array]:
    """The mean loss of `windows` [n_batch, n_seq + 1] and its gradient, as one vector.

    Each thread of `pool` adds up the gradients of its share of the windows, one at a time: so the activations stay in
    the processor's cache, and all arithmetic, not only matrix products, uses every core. `shares` has for each thread
    a vector and its `view_as`.
    """

    def work(i: int) -> float:
        vector, grads = shares[i]
        vector[:] = 0
        total = 0.0
        with np.errstate(all="ignore"):  # what overflows becomes a NaN, and that is reported once
            for n in range(i, len(windows), len(shares)):
                rng = np.random.default_rng(
                    (*seed, n + 1)
                )  # of each window, whichever thread has it; 0 is `seed` itself
                loss, backward = gpt2_loss(windows[n], params, n_head, dropout, rng)
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

    def window_loss(start: int) -> float:
        window = tokens[start : start + n_ctx + 1]
        with np.errstate(all="ignore"):
            return gpt2_loss(window, params, n_head)[0] * (len(window) - 1)

    return sum(pool.map(window_loss, range(0, len(tokens) - 1, n_ctx))) / (len(tokens) - 1)


def bigram(tokens: list[int], n_vocab: int) -> Callable[[int], Array]:
    """The bigram model of `tokens`: a function from a token to the probabilities of the next, [n_vocab].

    P(b | a) = (count of a b + 1) / (count of a + n_vocab), which is add-one smoothing.
    """
    followers = defaultdict(Counter)
    for a, b in itertools.pairwise(tokens):
        followers[a][b] += 1

    def probabilities(a: int) -> Array:
        counts = np.ones(n_vocab)
        counts[list(followers[a])] += list(followers[a].values())
        return counts / counts.sum()

    return probabilities


def save_state(path: Path, vectors: dict[str, Array], record: dict) -> None:
    """Write what `--resume` needs: the vectors of weights and moments, and a record of everything else."""
    save_tensors(path, vectors, {"record": json.dumps(record)})
    record["saved_step"] = record["step"]


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
def deferred_ctrl_c() -> Iterator[list]:
    """Yield a list that is empty until Ctrl-C is pressed, so that a step can be finished; the second one interrupts."""
    pressed = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        with contextlib.suppress(OSError):  # not print: the signal may have come in the midst of one
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again ends at once\n")

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
    that is needed to resume: of the random numbers nothing, as each step draws its own from the seed and its number.
    Ctrl-C saves after the step at hand, and raises KeyboardInterrupt. Raises FloatingPointError before a loss that is
    not a number is saved.
    """
    settings, rows, losses = record["settings"], record["rows"], record["losses"]
    max_steps, max_seconds = settings["max_steps"] or math.inf, 60 * (settings["minutes"] or math.inf)
    shapes, n_head, n_ctx = param_shapes(hparams), hparams["n_head"], hparams["n_ctx"]
    params, decay = view_as(shapes, vectors["weights"]), weight_decay(shapes)
    n_threads = n_blas_threads()
    buffers = [np.empty_like(decay) for _ in range(min(n_threads, settings["batch_size"]))]
    shares = [(buffer, view_as(shapes, buffer)) for buffer in buffers]
    bar = tqdm(initial=record["step"], unit="step", disable=None)
    speed_since, speed_tokens = time.perf_counter(), 0
    began = speed_since - record["seconds"]

    with threadpool_limits(1), ThreadPoolExecutor(n_threads) as pool, deferred_ctrl_c() as pressed, bar:
        while True:
            step = record["step"]
            record["seconds"] = time.perf_counter() - began
            progress = max(step / max_steps, record["seconds"] / max_seconds)
            learning_rate = learning_rate_at(progress, settings["learning_rate"])
            if (progress >= 1 or step % settings["eval_every"] == 0) and not (rows and rows[-1][0] == step):
                speed = speed_tokens / (time.perf_counter() - speed_since) if speed_tokens else None
                loss = evaluate(validation, params, n_head, pool)
                check_loss(loss, out, record)
                rows.append([step, sum(losses) / len(losses) if losses else None, loss, learning_rate, speed])
                if loss < record["best_loss"]:
                    record.update(best_step=step, best_loss=loss)
                    save_params(out / WEIGHTS, params)
                write_log(out / LOG, rows)
                save_state(out / STATE, vectors, record)
                tqdm.write(describe(rows[-1], tokens_per_char))
                speed_since, speed_tokens = time.perf_counter(), 0
            if progress >= 1:
                return
            if pressed:
                save_state(out / STATE, vectors, record)
                raise KeyboardInterrupt
            seed = (settings["seed"], step + 1)  # the initial weights have (seed, 0)
            starts = np.random.default_rng(seed).integers(0, len(tokens) - n_ctx, settings["batch_size"])
            windows = tokens[starts[:, None] + np.arange(n_ctx + 1)]  # [n_batch, n_ctx + 1]
            loss, gradient = compute_gradient(windows, params, n_head, settings["dropout"], seed, shares, pool)
            norm = clip_gradient(gradient)
            check_loss(loss if math.isfinite(norm) else math.nan, out, record)
            adamw(**vectors, gradient=gradient, decay=decay, step=step + 1, learning_rate=learning_rate)
            record["step"] += 1
            losses.append(loss)
            del losses[: -settings["eval_every"]]  # so that an early last evaluation does not show the mean of a few
            speed_tokens += windows[:, 1:].size
            bar.total = round((step + 1) / progress) if settings["minutes"] and progress else settings["max_steps"]
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed_tokens / (time.perf_counter() - speed_since):,.0f} tokens/s")


def check_loss(loss: float, out: Path, record: dict) -> None:
    """Raise FloatingPointError, with what to do, if the loss is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the training diverged: after step {record['step']} the loss is {loss}. Try a lower --learning_rate, anew "
            f"or with --resume from step {record['saved_step']}; {out} has the best weights so far, of step "
            f"{record['best_step']}"
        )


def describe(row: list, tokens_per_char: float) -> str:
    """A row of the log as a line to print."""
    step, train_loss, loss, learning_rate, speed = row
    line = f"step {step:6,}  validation {loss:.4f} nats/token, {loss * tokens_per_char:.4f} nats/character"
    if train_loss is not None:
        line += f"  train {train_loss:.4f}  learning rate {learning_rate:.1e}"
    return line if speed is None else f"{line}  {speed:,.0f} tokens/s"


def write_log(path: Path, rows: list[list]) -> None:
    """Write the log as CSV; what is not known, as the training loss before the first step, is left empty."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


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


def report(losses: dict[str, float], tokens_per_char: float, sample: str) -> None:
    """Print the losses side by side, then the sample."""
    print(f"\n{'validation loss':16}{'nats/token':>12}{'nats/character':>16}")
    for name, loss in losses.items():
        print(f"{name:16}{loss:12.4f}{loss * tokens_per_char:16.4f}")
    print(sample)


def choose_settings(given: dict, begun: dict) -> dict:
    """All settings, of which `given` are from the command line and `begun` from the training that is resumed.

    Raises ValueError, naming it, for one that makes no sense, or is not what it was in the training that is resumed.
    """
    for name in begun.keys() & given.keys() - set(CHANGEABLE):
        if given[name] != begun[name]:
            raise ValueError(f"the training was begun with {name} = {begun[name]}: it cannot go on with {given[name]}")
    settings = DEFAULTS | (FINE_TUNING if "init_from" in given else {}) | begun | given
    for limit, other in (("max_steps", "minutes"), ("minutes", "max_steps")):
        if limit in given and other not in given:
            settings[other] = None
    for name in (*SHAPE, "batch_size", "eval_every", "max_steps", "seed"):
        if settings[name] is not None:
            check_count(name, settings[name], least=0 if name == "seed" else 1)
    for name in ("dropout", "learning_rate", "minutes"):
        value = settings[name]
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a number, 0 or more, not {value!r}")
    if settings["dropout"] >= 1:
        raise ValueError(f"dropout must be below 1, not {settings['dropout']}")
    if settings["minutes"] == 0:
        raise ValueError("minutes must be more than 0")
    return settings


def choose_tokenizer(settings: dict, text: str) -> Encoder:
    """The tokenizer of the model that is named in the settings, or one that is learned from `text`."""
    if settings["init_from"] and settings["encoder"]:
        raise ValueError("the model to start from has its own tokenizer: leave out --init_from or --encoder")
    if source := settings["init_from"] or settings["encoder"]:
        encoder = get_encoder(source)
        # Of what a tokenizer of Hugging Face may have, encoder.json and vocab.bpe cannot hold this.
        odd = [*encoder.added, *sorted(encoder.special.keys() - {END_OF_TEXT})]
        if not odd and encoder.eot_id != encoder.encoder.get(END_OF_TEXT):
            odd = ["another end of text"]
        if odd:
            names = ", ".join(odd)[:80]
            raise ValueError(f"{source}: its tokenizer has {names}, which a model trained here cannot keep")
        return encoder
    return Encoder(*train_bpe(text.replace(END_OF_TEXT, "\n"), settings["n_vocab"]))


def begin(settings: dict, given: dict, n_vocab: int) -> tuple[dict, dict, dict]:
    """A new training: its hyperparameters, vectors and record, as for `train`."""
    if settings["init_from"]:
        _, hparams, params = load_encoder_hparams_and_params(settings["init_from"])
        if odd := {"lm_head"} & params.keys() | {"eps"} & params["ln_f"].keys() | {"n_inner"} & hparams.keys():
            raise ValueError(
                f"{settings['init_from']} has {' and '.join(sorted(odd))} of its own, which train.py cannot train"
            )
        hparams["n_ctx"] = min(given.get("n_ctx", math.inf), hparams["n_ctx"])  # fewer positions are a smaller model
        params["wpe"] = params["wpe"][: hparams["n_ctx"]]
    else:
        hparams = settings | {"n_vocab": n_vocab}
    hparams = {name: hparams[name] for name in SHAPE}
    for name in SHAPE.keys() & given.keys():
        if given[name] != hparams[name]:
            source = settings["init_from"] or settings["encoder"]
            raise ValueError(f"{name} is {hparams[name]} in {source}: it cannot be {given[name]}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"n_embd = {hparams['n_embd']} is not a multiple of n_head = {hparams['n_head']}")
    shapes = param_shapes(hparams)
    vectors = {name: np.zeros(count_bytes(shapes) // 4, np.float32) for name in VECTORS}
    if settings["init_from"]:
        np.concatenate([array.ravel() for array in flatten(params, tensor_name).values()], out=vectors["weights"])
    else:
        initialize(view_as(shapes, vectors["weights"]), np.random.default_rng(settings["seed"]))
    record = {"step": 0, "seconds": 0.0, "best_step": 0, "best_loss": math.inf, "rows": [], "losses": []}
    return hparams, vectors, record | {"settings": settings | hparams}


def check_out(out: str | None, resume: bool, overwrite: bool) -> Path:
    """The directory `out`; OSError or ValueError if the training must not be written there."""
    if not out:
        raise ValueError("--out is missing: the directory for the model, such as --out models/mine")
    if resume and overwrite:
        raise ValueError("--resume goes on with what is there, --overwrite replaces it: leave out one of them")
    directory = Path(out)
    if directory.name in RELEASED:
        raise ValueError(f"{directory.name} is the name of a released model: choose another for --out")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{out} is a file, not a directory")
    if directory.exists() and not (resume or overwrite):
        or_resume = ", --resume goes on with its training" if (directory / STATE).is_file() else ""
        raise FileExistsError(f"{out} exists already: --overwrite replaces its model{or_resume}")
    return directory


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
    --max_steps 1400        how long
    --minutes N             how long, instead
    --eval_every 100        steps from one evaluation to the next; the best weights are kept
    --seed 0                the same one gives the same model, on one machine and number of threads
    --encoder NAME          take the tokenizer of this model
    --init_from NAME        start from the weights of this model, such as 124M
    --resume                go on where the training into --out has stopped
    --overwrite             replace the model in --out
    """
    started = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in DEFAULTS and value is not None}
    if model not in ("gpt", "bigram"):
        raise ValueError(f"model must be gpt or bigram, not {model!r}")
    resume = resume and model == "gpt"  # a bigram model is counted anew each time, and not saved
    directory = check_out(out, resume, overwrite) if model == "gpt" else Path()
    if model == "gpt":
        for file in (WEIGHTS, STATE):
            sweep(directory / file)
    vectors, record = load_state(directory / STATE) if resume else ({}, {})
    settings = choose_settings(given, record.get("settings", {}))

    document = read_document(text)
    digest, split = hashlib.sha256(document.encode()).hexdigest(), len(document) * 9 // 10
    if record.get("text", digest) != digest:
        raise ValueError(f"the training in {out} was begun with another text than {text}")
    tokenizer = read_encoder(directory) if resume else choose_tokenizer(settings, document[:split])
    tokens = np.array(tokenizer.encode(document[:split], allow_special=True))
    validation = np.array(tokenizer.encode(document[split:], allow_special=True))
    if len(validation) < 2:
        raise ValueError(f"{text} is too short: its last tenth, for validation, must have 2 tokens")
    n_vocab, tokens_per_char = len(tokenizer.encoder), (len(validation) - 1) / (len(document) - split)
    next_probabilities = bigram(tokens.tolist(), n_vocab)
    pairs = itertools.pairwise(validation.tolist())
    losses = {"uniform": math.log(n_vocab), "bigram": -np.mean([np.log(next_probabilities(a)[b]) for a, b in pairs])}
    ids, rng = tokenizer.encode("\n"), np.random.default_rng(settings["seed"])
    if model == "bigram":
        for _ in range(SAMPLE_LENGTH):
            ids.append(int(sample(np.log(next_probabilities(ids[-1])), rng, SAMPLE_TEMPERATURE)))
        report(losses, tokens_per_char, tokenizer.decode(ids))
        return

    if resume:
        hparams = read_hparams(directory / "hparams.json")
        record.update(settings=settings, saved_step=record["step"])
    else:
        hparams, vectors, record = begin(settings, given, n_vocab)
    if len(tokens) <= hparams["n_ctx"]:
        raise ValueError(
            f"{text} is too short: it has {len(tokens)} tokens to train with, and a context of "
            f"n_ctx = {hparams['n_ctx']} needs {hparams['n_ctx'] + 1}"
        )
    shapes = param_shapes(hparams)
    if not resume:
        for file in (STATE, LOG, PLOT):
            (directory / file).unlink(missing_ok=True)
        save_model(directory, tokenizer, hparams, view_as(shapes, vectors["weights"]))
        record["text"], record["seconds"] = digest, time.perf_counter() - started
        save_state(directory / STATE, vectors, record)
    print(
        f"{len(tokens):,} tokens to train with, {len(validation):,} to validate with; "
        f"{len(vectors['weights']):,} parameters; {n_blas_threads()} threads"
    )
    begun_at = record["step"]
    try:
        train(directory, tokens, validation, tokens_per_char, hparams, vectors, record)
    except KeyboardInterrupt:
        best = f"{out} has the best weights so far, of step {record['best_step']}"
        print(f"\nstopped: --resume goes on from step {record['saved_step']}; {best}", file=sys.stderr)
        raise
    if record["step"] == begun_at:
        print("the training was finished before: a larger --max_steps, or --minutes, goes on with it")
    losses["GPT"] = record["best_loss"]
    draw_losses(directory / PLOT, record["rows"], losses["bigram"])
    params = map_params(directory / WEIGHTS, shapes)
    options = {"temperature": SAMPLE_TEMPERATURE, "seed": settings["seed"], "n_vocab": n_vocab}
    ids += generate(ids, params, hparams["n_head"], SAMPLE_LENGTH, **options)
    report(losses, tokens_per_char, tokenizer.decode(ids))
    where = out if Path(out).name != out else f"./{out}"  # a bare name would be looked for in models first
    print(f"\nto go on from a text of your own: python gpt2.py TEXT --model_size {where}")


if __name__ == "__main__":
    from cli import run

    run(main)
