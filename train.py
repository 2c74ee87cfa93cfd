"""Train a small GPT-2 on a text, in plain NumPy: from a text file to a model directory that gpt2.py loads."""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import csv
import hashlib
import math
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from tqdm import tqdm

import bigram
from encoder import END_OF_TEXT, Encoder, get_encoder, read_encoder, train_bpe, whole_words
from engine.threads import core_threads, deferred, n_blas_threads
from evaluate import text_losses
from gpt2 import generate
from optimizer import adamw, clip_gradient, compute_gradient, initialize, learning_rate_at, weight_decay
from sampling import check_count, check_memory
from show.pictures import loss_figure, save_figure
from show.terminal import document_pieces, is_stream, progress
from store.files import HOLDER, LOCK, digests, locked, replacing, replacing_directory, sweep
from store.models import MODEL_FILES, RELEASED, TABLES
from store.params import count_params, flatten, map_params, param_shapes, save_params, tensor_name, view_as
from store.tables import LARGEST
from store.tensors import WEIGHTS
from store.training import SHAPE, VECTORS, Settings, Training, load_state, save_state
from utils import load_encoder_hparams_and_params, write_model

STATE, LOG, PLOT = "training.safetensors", "train.csv", "loss.png"
COLUMNS = ("step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second")
CHANGEABLE = ("max_steps", "minutes", "eval_every", "learning_rate")  # in a training that is resumed
FINE_TUNING_RATE = 1e-4  # the default learning rate for weights that have been trained before
FINISHING = b"\nfinishing this step, then saving; Ctrl-C again ends at once\n"
SAMPLE_LENGTH, SAMPLE_TEMPERATURE = 200, 0.8


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: its first nine tenths to train with, its last tenth to validate with."""

    digest: str  # SHA-256
    encoder: Encoder
    tokens: Array
    validation: Array
    tokens_per_char: float  # of the validation text


def train(out: Path, corpus: Corpus, training: Training) -> None:
    """Train until the settings say that it is done; the best weights are in `out` then.

    Each step draws its random numbers from the seed and its own number, so that none need be saved. After Ctrl-C or
    SIGTERM the step is finished and saved, and KeyboardInterrupt raised. FloatingPointError if the loss diverges.
    """
    settings, vectors = training.settings, training.vectors
    max_steps, max_seconds = settings.max_steps or math.inf, 60 * (settings.minutes or math.inf)
    shapes = param_shapes(settings.hparams)
    params, decay = view_as(shapes, vectors["weights"]), weight_decay(shapes)
    buffers = [np.empty_like(decay) for _ in range(min(n_blas_threads(), settings.batch_size))]
    shares = [(buffer, view_as(shapes, buffer)) for buffer in buffers]
    bar = tqdm(initial=training.step, unit="step", disable=None)
    speed_since, speed_tokens = time.perf_counter(), 0
    began = speed_since - training.seconds

    with core_threads() as pool, deferred((signal.SIGINT, signal.SIGTERM), FINISHING) as received, bar:
        while True:
            step = training.step
            training.seconds = time.perf_counter() - began
            progress = max(step / max_steps, training.seconds / max_seconds)
            learning_rate = learning_rate_at(progress, settings.learning_rate)
            is_evaluated = bool(training.rows) and training.rows[-1][0] == step
            if (progress >= 1 or step % settings.eval_every == 0) and not is_evaluated:
                speed = speed_tokens / (time.perf_counter() - speed_since) if speed_tokens else None
                tqdm.write(evaluate(out, corpus, training, params, learning_rate, speed))
                speed_since, speed_tokens = time.perf_counter(), 0
            if progress >= 1:
                return
            if received:
                save_state(out / STATE, training)
                raise KeyboardInterrupt(received[0])
            seed = (settings.seed, step + 1)  # the initial weights have (seed, 0)
            starts = np.random.default_rng(seed).integers(0, len(corpus.tokens) - settings.n_ctx, settings.batch_size)
            windows = corpus.tokens[starts[:, None] + np.arange(settings.n_ctx + 1)]  # [n_batch, n_ctx + 1]
            loss, gradient = compute_gradient(windows, params, settings.n_head, settings.dropout, seed, shares, pool)
            norm = clip_gradient(gradient)
            check_loss(loss if math.isfinite(norm) else math.nan, out, training)
            adamw(**vectors, gradient=gradient, decay=decay, step=step + 1, learning_rate=learning_rate)
            training.step += 1
            training.losses = [*training.losses, loss][-settings.eval_every :]  # the mean of a few would be misleading
            speed_tokens += windows[:, 1:].size
            bar.total = round((step + 1) / progress) if settings.minutes and progress else settings.max_steps
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed_tokens / (time.perf_counter() - speed_since):,.0f} tokens/s")


def evaluate(
    out: Path, corpus: Corpus, training: Training, params: dict, learning_rate: float, speed: float | None
) -> str:
    """Measure the validation loss; save the weights, if they are the best, the log and the state; a line to print."""
    loss = float(text_losses(corpus.validation, params, training.settings.n_head).mean())
    check_loss(loss, out, training)
    train_loss = sum(training.losses) / len(training.losses) if training.losses else None
    training.rows.append([training.step, train_loss, loss, learning_rate, speed])  # of the log; None is left empty
    if loss < training.best_loss:
        training.best_step, training.best_loss = training.step, loss
        save_params(out / WEIGHTS, params, TABLES)
    with replacing(out / LOG) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *training.rows])
    save_state(out / STATE, training)
    line = f"step {training.step:6,}  validation {loss:.4f} nats/token, "
    line += f"{loss * corpus.tokens_per_char:.4f} nats/character"
    if train_loss is not None:
        line += f"  train {train_loss:.4f}  learning rate {learning_rate:.1e}"
    return line if speed is None else f"{line}  {speed:,.0f} tokens/s"


def check_loss(loss: float, out: Path, training: Training) -> None:
    """Raise FloatingPointError, with what to do, if the loss is not finite."""
    if not math.isfinite(loss):
        advice = f"Try a lower --learning_rate, anew or with --resume from step {training.saved_step}"
        best = f"{out} has the best weights so far, of step {training.best_step}"
        problem = f"the training diverged: after step {training.step} the loss is {loss}"
        raise FloatingPointError(f"{problem}. {advice}; {best}")


def choose_settings(given: dict, begun: Settings | None = None) -> Settings:
    """The settings that are `given`, else those of the training that is resumed, else the defaults; or ValueError."""
    for name in given.keys() - set(CHANGEABLE) if begun else ():
        if given[name] != (was := getattr(begun, name)):
            raise ValueError(f"the training was begun with {name} = {was}: it cannot go on with {given[name]}")
    default = begun or (Settings(learning_rate=FINE_TUNING_RATE) if "init_from" in given else Settings())
    for limit, other in (("max_steps", "minutes"), ("minutes", "max_steps")):
        if limit in given and other not in given:
            default = replace(default, **{other: None})
    settings = replace(default, **given)
    check_count("seed", settings.seed)
    for name in (*SHAPE, "batch_size", "eval_every", "max_steps"):
        if (value := getattr(settings, name)) is not None:
            check_count(name, value, least=1, most=LARGEST.get(name))
    for name in ("dropout", "learning_rate", "minutes"):
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a number, 0 or more, not {value!r}")
    if settings.dropout >= 1:
        raise ValueError(f"dropout must be below 1, not {settings.dropout}")
    if settings.minutes == 0:
        raise ValueError("minutes must be more than 0")
    return settings


def choose_tokenizer(settings: Settings, text: Iterable[str]) -> Encoder:
    """The tokenizer of the model that is named in the settings, or one that is learned from the pieces of `text`."""
    if None not in (settings.init_from, settings.encoder):
        raise ValueError("the model to start from has its own tokenizer: leave out --init_from or --encoder")
    source = settings.encoder if settings.init_from is None else settings.init_from
    if source is None:
        return Encoder(*train_bpe((piece.replace(END_OF_TEXT, "\n") for piece in whole_words(text)), settings.n_vocab))
    encoder = get_encoder(source)
    # Of what a tokenizer of Hugging Face may have, encoder.json and vocab.bpe cannot hold this.
    odd = [text for text, token in encoder.added_tokens.items() if text != END_OF_TEXT or not token.special]
    if not odd and encoder.eot_id != encoder.encoder.get(END_OF_TEXT):
        odd = ["another end of text"]
    if odd:
        names = ", ".join(odd)[:80]
        raise ValueError(f"{source}: its tokenizer has {names}, which a model trained here cannot keep")
    return encoder


def read_corpus(file: str, settings: Settings, encoder: Encoder | None = None) -> Corpus:
    """The text in `file` as tokens, of `encoder` or of the tokenizer that the settings ask for.

    The file is read several times, so that its text is never held; only that of a pipe is.
    """
    kept = [piece.encode() for piece in document_pieces(file)] if is_stream(file) else None

    def part(start: int, end: int) -> Iterator[str]:
        """The pieces of the text from one character to another."""
        for piece in document_pieces(file) if kept is None else map(bytes.decode, kept):
            yield piece[max(start, 0) : max(end, 0)]
            start, end = start - len(piece), end - len(piece)

    def tokens(start: int, end: int) -> Array:
        """The tokens of that part, in as few bytes as hold them."""
        ids = array("H" if len(encoder.encoder) <= 1 << 16 else "I")
        for piece in encoder.pieces(progress(part(start, end), "character", lambda: end - start)):
            ids.extend(encoder.encode(piece, allow_special=True))
        return np.asarray(ids)

    digest, n_characters = hashlib.sha256(), 0
    for piece in part(0, sys.maxsize):
        digest.update(piece.encode())
        n_characters += len(piece)
    split = n_characters * 9 // 10
    encoder = encoder or choose_tokenizer(settings, progress(part(0, split), "character", lambda: split))
    training, validation = tokens(0, split), tokens(split, n_characters)
    if len(validation) < 2:
        raise ValueError(f"{file} is too short: its last tenth, for validation, must have 2 tokens")
    tokens_per_char = (len(validation) - 1) / (n_characters - split)
    return Corpus(digest.hexdigest(), encoder, training, validation, tokens_per_char)


def begin(settings: Settings, given: dict, corpus: Corpus) -> Training:
    """A new training, whose settings have the shape of the model, `given` on the command line or of another model."""
    params = None
    if (source := settings.init_from) is not None:
        _, hparams, params = load_encoder_hparams_and_params(source)
        if odd := {"lm_head"} & params.keys() | {"eps"} & params["ln_f"].keys() | {"n_inner"} & hparams.keys():
            raise ValueError(f"{source} has {' and '.join(sorted(odd))} of its own, which train.py cannot train")
        hparams = {name: hparams[name] for name in SHAPE}
        hparams["n_ctx"] = min(given.get("n_ctx", math.inf), hparams["n_ctx"])  # fewer positions are a smaller model
        params["wpe"] = params["wpe"][: hparams["n_ctx"]]
    else:
        hparams = settings.hparams | {"n_vocab": len(corpus.encoder.encoder)}
    for name in hparams.keys() & given.keys():
        if given[name] != hparams[name]:
            raise ValueError(f"{name} is {hparams[name]} in {source or settings.encoder}: it cannot be {given[name]}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"n_embd = {hparams['n_embd']} is not a multiple of n_head = {hparams['n_head']}")
    shapes, settings = param_shapes(hparams), replace(settings, **hparams)
    check_size(settings)
    vectors = {name: np.zeros(count_params(shapes), np.float32) for name in VECTORS}
    if params:
        np.concatenate([array.ravel() for array in flatten(params, tensor_name).values()], out=vectors["weights"])
    else:
        initialize(view_as(shapes, vectors["weights"]), np.random.default_rng(settings.seed))
    return Training(settings, corpus.digest, vectors)


def check_size(settings: Settings) -> None:
    """Raise ValueError unless weights, moments, gradients, windows and a window's activations fit into memory."""
    n_ctx, n_layer, n_params = settings.n_ctx, settings.n_layer, count_params(param_shapes(settings.hparams))
    n_threads = min(n_blas_threads(), settings.batch_size)
    # backprop.py keeps some 25 arrays of a block's width, and two of attention weights; three of logits.
    block = n_ctx * (25 * settings.n_embd + 2 * settings.n_head * n_ctx)
    activations = n_layer * block + 3 * n_ctx * settings.n_vocab
    n_bytes = 4 * (n_params * (4 + n_threads) + n_threads * activations) + 16 * settings.batch_size * (n_ctx + 1)
    check_memory(n_bytes, f"training with {settings.hparams}, batch_size = {settings.batch_size:,}")


def start_training(directory: Path, text: str, given: dict) -> tuple[Corpus, Training]:
    """Begin a training; the model in `directory` is replaced by one with the initial weights when that is whole."""
    started, settings = time.perf_counter(), choose_settings(given)
    check_size(settings)
    corpus = read_corpus(text, settings)
    training = begin(settings, given, corpus)
    check_length(text, corpus, training.settings.n_ctx)
    hparams = training.settings.hparams
    sweep(directory)
    with replacing_directory(directory, (*MODEL_FILES, STATE, LOG, PLOT)) as new:
        write_model(new, corpus.encoder, hparams, view_as(param_shapes(hparams), training.vectors["weights"]))
        training.tables = digests(new, TABLES)
        training.seconds = time.perf_counter() - started
        save_state(new / STATE, training)
    return corpus, training


def resume_training(directory: Path, text: str, given: dict) -> tuple[Corpus, Training]:
    """The training in `directory`; ValueError if its files, or the text, are not those that it was begun with."""
    for file in (WEIGHTS, STATE, LOG):
        sweep(directory / file)
    training = load_state(directory / STATE)
    training.settings = choose_settings(given, training.settings)
    found = digests(directory, TABLES)
    if odd := [file for file in TABLES if found.get(file) != training.tables.get(file)]:
        raise ValueError(f"{directory / odd[0]} is not the one that the training was begun with: restore it")
    corpus = read_corpus(text, training.settings, read_encoder(directory))
    if corpus.digest != training.text:
        raise ValueError(f"the training in {directory} was begun with another text than {text}")
    check_length(text, corpus, training.settings.n_ctx)
    return corpus, training


def check_length(text: str, corpus: Corpus, n_ctx: int) -> None:
    if (n_tokens := len(corpus.tokens)) <= n_ctx:
        needed = f"and a context of n_ctx = {n_ctx} needs {n_ctx + 1}"
        raise ValueError(f"{text} is too short: it has {n_tokens} tokens to train with, {needed}")


def check_out(out: str | None, resume: bool, overwrite: bool) -> Path:
    """The directory `out`; OSError or ValueError if the training must not be written there."""
    if not out:
        raise ValueError("--out is missing: the directory for the model, such as --out models/mine")
    if resume and overwrite:
        raise ValueError("--resume goes on with what is there, --overwrite replaces it: leave out one of them")
    directory = Path(out)
    if directory.name in RELEASED:
        raise ValueError(f"{directory.name} is the name of a released model: choose another for --out")
    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(f"{out} is not a directory")
    if directory.is_dir() and not resume:
        if directory.samefile("."):
            raise ValueError(f"{out} is the current directory: give another one in --out")
        if not overwrite and set(os.listdir(directory)) - {LOCK, HOLDER}:
            or_resume = ", --resume goes on with its training" if (directory / STATE).is_file() else ""
            raise FileExistsError(f"{out} exists already: --overwrite replaces its model{or_resume}")
    if resume and not (directory / STATE).is_file():
        raise FileNotFoundError(f"there is nothing to resume: {directory / STATE} is missing")
    return directory


def baselines(corpus: Corpus) -> tuple[Callable, dict[str, float]]:
    """The bigram model of a corpus, and the validation losses that a GPT has to beat."""
    n_vocab = len(corpus.encoder.encoder)
    pairs = bigram.bigram(corpus.tokens.data, n_vocab)
    return pairs, {"uniform": math.log(n_vocab), "bigram": bigram.loss(pairs, corpus.validation.data)}


def report(corpus: Corpus, losses: dict[str, float], sample: list[int]) -> None:
    """Print the losses side by side, then the sample."""
    print(f"\n{'validation loss':16}{'nats/token':>12}{'nats/character':>16}")
    for name, loss in losses.items():
        print(f"{name:16}{loss:12.4f}{loss * corpus.tokens_per_char:16.4f}")
    print(corpus.encoder.decode(sample))


def show_bigram(corpus: Corpus, seed: int) -> None:
    """Print the loss of a bigram model, and a sample."""
    pairs, losses = baselines(corpus)
    start, rng = corpus.encoder.encode("\n"), np.random.default_rng(seed)
    report(corpus, losses, bigram.generate(pairs, start, SAMPLE_LENGTH, SAMPLE_TEMPERATURE, rng))


def show_gpt(corpus: Corpus, training: Training, directory: Path) -> None:
    """Draw the losses of a training; print the loss of the best weights, and a sample."""
    losses = baselines(corpus)[1] | {"GPT": training.best_loss}
    try:
        figure = loss_figure(training.rows, losses["bigram"], f"Training of {directory.name}")
        save_figure(figure, str(directory / PLOT))
    except ImportError:
        print(f"{PLOT} was not drawn: pip install matplotlib")
    hparams, ids = training.settings.hparams, corpus.encoder.encode("\n")
    params = map_params(directory / WEIGHTS, param_shapes(hparams))
    options = {"seed": training.settings.seed, "n_vocab": len(corpus.encoder.encoder)}
    ids += generate(ids, params, hparams["n_head"], SAMPLE_LENGTH, temperature=SAMPLE_TEMPERATURE, **options)
    report(corpus, losses, ids)


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
    flags = (
        n_vocab, n_ctx, n_embd, n_head, n_layer, dropout, batch_size, learning_rate, max_steps, minutes, eval_every,
        seed, encoder, init_from,
    )  # fmt: skip
    given = {field.name: flag for field, flag in zip(fields(Settings), flags, strict=True) if flag is not None}
    if model == "bigram":
        settings = choose_settings(given)
        show_bigram(read_corpus(text, settings), settings.seed)
        return
    if model != "gpt":
        raise ValueError(f"model must be gpt or bigram, not {model!r}")
    directory = check_out(out, resume, overwrite)
    with locked(directory, wait=False):
        corpus, training = (resume_training if resume else start_training)(directory.resolve(), text, given)
        sizes = f"{len(corpus.tokens):,} tokens to train with, {len(corpus.validation):,} to validate with"
        print(f"{sizes}; {len(training.vectors['weights']):,} parameters; {n_blas_threads()} threads")
        begun_at = training.step
        try:
            train(directory, corpus, training)
        except KeyboardInterrupt:
            best = f"{out} has the best weights so far, of step {training.best_step}"
            print(f"\nstopped: --resume goes on from step {training.saved_step}; {best}", file=sys.stderr)
            raise
        if training.step == begun_at:
            print("the training was finished before: a larger --max_steps, or --minutes, goes on with it")
        show_gpt(corpus, training, directory)
    where = out if Path(out).name != out else f"./{out}"  # a bare name would be looked for in models first
    print(f"\nto go on from a text of your own: python gpt2.py TEXT --model_size {where}")


if __name__ == "__main__":
    run(main)
