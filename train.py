"""Train a small GPT-2 on a text file, in plain NumPy. The result is a model directory that gpt2.py loads."""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from tqdm import tqdm

import bigram
from encoder import END_OF_TEXT, Encoder, get_encoder, read_encoder, train_bpe, whole_words
from engine.threads import defer_signals, n_blas_threads, one_thread_per_core
from evaluate import text_losses
from gpt2 import check_heads, generate
from optimizer import adamw, clip_gradient, compute_gradient, initialize, learning_rate_at, weight_decay
from sampling import check_count, check_memory
from show.pictures import loss_figure, save_figure
from show.terminal import document_pieces, is_stream, print_table, progress
from store.files import digests, locked, remove_leftovers, replacing_directory, write_text
from store.models import MODEL_FILES, RELEASED, SMALL_FILES, WEIGHTS
from store.params import count_params, flatten, map_params, param_shapes, save_params, tensor_name, view_as
from store.tables import LARGEST
from store.training import SHAPE, VECTORS, Settings, Training, load_state, save_state
from utils import load_encoder_hparams_and_params, write_model

STATE, LOG, PLOT = "training.safetensors", "train.csv", "loss.png"
COLUMNS = ("step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second")
CHANGEABLE = {"max_steps", "minutes", "eval_every", "learning_rate"}  # settings that --resume may change
FINE_TUNING_RATE = 1e-4  # the default learning rate with --init_from
FINISHING = b"\nfinishing this step, then saving; press Ctrl-C again to stop at once\n"


@dataclass(frozen=True)
class Corpus:
    """A text as tokens. The model trains on the first nine tenths; the last tenth is for validation."""

    digest: str  # SHA-256 of the text
    encoder: Encoder
    tokens: Array
    validation: Array
    tokens_per_char: float  # of the validation text


def train(out: Path, corpus: Corpus, training: Training) -> None:
    """Train until the limit in the settings is reached. `out` always has the weights with the lowest validation loss.

    The random numbers of a step depend only on the seed and the step, so a resumed training draws the same ones. After
    Ctrl-C or SIGTERM, finish the step, save, and raise KeyboardInterrupt. FloatingPointError if the loss diverges.
    """
    settings, vectors, shapes = training.settings, training.vectors, param_shapes(training.settings.hparams)
    max_steps, max_seconds = settings.max_steps or math.inf, 60 * (settings.minutes or math.inf)
    params, decay = view_as(shapes, vectors["weights"]), weight_decay(shapes)
    gradients = np.empty((min(n_blas_threads(), settings.batch_size), len(decay)), np.float32)  # one for each thread
    buffers = [(vector, view_as(shapes, vector)) for vector in gradients]
    bar = tqdm(initial=training.step, unit="step", disable=None)
    speed_since, speed_tokens = time.perf_counter(), 0
    start = speed_since - training.seconds

    with one_thread_per_core() as pool, defer_signals((signal.SIGINT, signal.SIGTERM), FINISHING) as received, bar:
        while True:
            step = training.step
            training.seconds = time.perf_counter() - start
            done = max(step / max_steps, training.seconds / max_seconds)  # from 0 to 1
            learning_rate = learning_rate_at(done, settings.learning_rate)
            is_evaluated = bool(training.rows) and training.rows[-1][0] == step
            if (done >= 1 or step % settings.eval_every == 0) and not is_evaluated:
                speed = speed_tokens / (time.perf_counter() - speed_since)
                evaluate_and_save(out, corpus, training, params, learning_rate, speed)
                speed_since, speed_tokens = time.perf_counter(), 0
            if done >= 1:
                return
            if received:
                save_state(out / STATE, training)
                raise KeyboardInterrupt(received[0])
            seed = (settings.seed, step + 1)  # (seed, 0) is for the initial weights
            starts = np.random.default_rng(seed).integers(0, len(corpus.tokens) - settings.n_ctx, settings.batch_size)
            windows = corpus.tokens[starts[:, None] + np.arange(settings.n_ctx + 1)]  # [n_batch, n_ctx + 1]
            loss, gradient = compute_gradient(windows, params, settings.n_head, settings.dropout, seed, buffers, pool)
            norm = clip_gradient(gradient)
            check_loss(loss if math.isfinite(norm) else math.nan, out, training)
            adamw(**vectors, gradient=gradient, decay=decay, step=step + 1, learning_rate=learning_rate)
            training.step += 1
            training.losses = [*training.losses, loss][-settings.eval_every :]  # the log gets the mean of these
            speed_tokens += settings.batch_size * settings.n_ctx
            bar.total = round((step + 1) / done) if settings.minutes and done else settings.max_steps
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed_tokens / (time.perf_counter() - speed_since):,.0f} tokens/s")


def evaluate_and_save(out: Path, corpus: Corpus, training: Training, params: dict, rate: float, speed: float) -> None:
    """Measure and print the validation loss. Save the log, the state, and the weights if they are the best so far."""
    loss = float(text_losses(corpus.validation, params, training.settings.n_head).mean())
    check_loss(loss, out, training)
    train_loss = sum(training.losses) / len(training.losses) if training.losses else None
    training.rows.append([training.step, train_loss, loss, rate, speed or None])
    if loss < training.best_loss:
        training.best_step, training.best_loss = training.step, loss
        save_params(out / WEIGHTS, params, SMALL_FILES)
    log = (",".join("" if value is None else str(value) for value in row) for row in (COLUMNS, *training.rows))
    write_text(out / LOG, "\n".join([*log, ""]))
    save_state(out / STATE, training)
    line = f"step {training.step:6,}  validation {loss:.4f} nats/token, {loss * corpus.tokens_per_char:.4f} nats/char"
    if train_loss is not None:
        line += f"  train {train_loss:.4f}  learning rate {rate:.1e}  {speed:,.0f} tokens/s"
    tqdm.write(line)


def check_loss(loss: float, out: Path, training: Training) -> None:
    """Raise FloatingPointError, with advice, if the loss is not finite."""
    if not math.isfinite(loss):
        problem = f"the training diverged: after step {training.step} the loss is {loss}"
        advice = f"Try a lower --learning_rate, from the start or with --resume from step {training.saved_step}"
        raise FloatingPointError(f"{problem}. {advice}; {out} has the best weights, from step {training.best_step}")


def choose_settings(given: dict, saved: Settings | None = None) -> Settings:
    """The `given` settings, completed with the `saved` ones when resuming, or with defaults. Raises ValueError."""
    for name in given.keys() - CHANGEABLE if saved else ():
        if given[name] != (old := getattr(saved, name)):
            raise ValueError(f"the training was started with {name} = {old}: it cannot be resumed with {given[name]}")
    if given.keys() & {"max_steps", "minutes"}:
        given = {"max_steps": None, "minutes": None} | given  # a given limit replaces the other one
    rate = FINE_TUNING_RATE if "init_from" in given else Settings.learning_rate
    settings = replace(saved or Settings(learning_rate=rate), **given)
    for name in ("seed", *SHAPE, "batch_size", "eval_every", "max_steps"):
        if (value := getattr(settings, name)) is not None:
            check_count(name, value, least=0 if name == "seed" else 1, most=LARGEST.get(name))
    rules = {
        f"dropout must be 0 or more and below 1, not {settings.dropout}": 0 <= settings.dropout < 1,
        f"learning_rate must be 0 or more, not {settings.learning_rate}": 0 <= settings.learning_rate < math.inf,
        f"minutes must be above 0, not {settings.minutes}": settings.minutes is None or 0 < settings.minutes < math.inf,
        "--init_from has its own tokenizer: leave out --encoder": None in (settings.init_from, settings.encoder),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(broken[0])
    return settings


def load_source(given: dict) -> tuple[Settings, Encoder | None, dict | None]:
    """The settings of a new training, and the tokenizer and weights of the model that they name. Raises ValueError."""
    settings, params = choose_settings(given), None
    if settings.init_from is not None:
        encoder, hparams, params = load_encoder_hparams_and_params(source := settings.init_from)
        hparams["n_ctx"] = min(given.get("n_ctx", math.inf), hparams["n_ctx"])  # a shorter context is allowed
        params["wpe"] = params["wpe"][: hparams["n_ctx"]]
        fixed = {name: hparams[name] for name in SHAPE}
    elif settings.encoder is not None:
        encoder = get_encoder(source := settings.encoder)
        fixed = {"n_vocab": len(encoder.encoder)}
    else:
        return settings, None, None
    # encoder.json and vocab.bpe cannot store other special tokens, and backprop.py does not compute these parameters.
    extra = [text for text, token in encoder.added_tokens.items() if text != END_OF_TEXT or not token.special]
    if encoder.eot_id != encoder.encoder.get(END_OF_TEXT):
        extra.append("end of text")
    if params:
        extra += sorted({"lm_head"} & params.keys() | {"eps"} & params["ln_f"].keys() | {"n_inner"} & hparams.keys())
    if extra:
        raise ValueError(f"{source} cannot be used here, because it has its own {' and '.join(extra)[:80]}")
    for name in fixed.keys() & given.keys():
        if given[name] != fixed[name]:
            raise ValueError(f"{name} is {fixed[name]} in {source}: it cannot be {given[name]}")
    return replace(settings, **fixed), encoder, params


def read_corpus(file: str, settings: Settings, encoder: Encoder | None = None) -> Corpus:
    """Read a text as tokens, with `encoder` or a tokenizer learned from the training part. Raises ValueError."""
    # A file is read several times, so that memory never holds its whole text. A pipe can be read only once.
    kept = [piece.encode() for piece in document_pieces(file)] if is_stream(file) else None

    def read(start: int = 0, end: int = sys.maxsize) -> Iterator[str]:
        """Yield the text from character `start` to `end`, in pieces."""
        for piece in document_pieces(file) if kept is None else map(bytes.decode, kept):
            yield piece[max(start, 0) : max(end, 0)]
            start, end = start - len(piece), end - len(piece)

    def encode(encoder: Encoder, start: int, end: int) -> Array:
        pieces = encoder.pieces(progress(read(start, end), "character", lambda: end - start))
        ids = chain.from_iterable(encoder.encode(piece, allow_special=True) for piece in pieces)
        return np.fromiter(ids, np.uint16 if len(encoder.encoder) <= 2**16 else np.uint32)

    digest, n_characters = hashlib.sha256(), 0
    for piece in read():
        digest.update(piece.encode())
        n_characters += len(piece)
    split = n_characters * 9 // 10
    if encoder is None:
        words = whole_words(progress(read(0, split), "character", lambda: split))
        encoder = Encoder(*train_bpe((word.replace(END_OF_TEXT, "\n") for word in words), settings.n_vocab))
    tokens, validation = encode(encoder, 0, split), encode(encoder, split, n_characters)
    if len(tokens) <= settings.n_ctx or len(validation) < 2:
        found = f"{len(tokens):,} tokens for training and {len(validation):,} for validation"
        raise ValueError(f"{file} is too short: it has {found}, but {settings.n_ctx + 1:,} and 2 are needed")
    return Corpus(digest.hexdigest(), encoder, tokens, validation, (len(validation) - 1) / (n_characters - split))


def check_size(settings: Settings) -> None:
    """Raise ValueError unless weights, moments, gradients, windows and a window's activations fit into memory."""
    n_vocab, n_ctx, n_embd, n_head, n_layer = settings.hparams.values()
    n_params, n_threads = count_params(param_shapes(settings.hparams)), min(n_blas_threads(), settings.batch_size)
    # backprop.py keeps about 25 arrays of width n_embd and two of attention weights per block, and three of logits.
    activations = n_ctx * (n_layer * (25 * n_embd + 2 * n_head * n_ctx) + 3 * n_vocab)
    n_bytes = 4 * (n_params * (4 + n_threads) + n_threads * activations) + 16 * settings.batch_size * (n_ctx + 1)
    check_memory(n_bytes, f"training with {settings.hparams}, batch_size = {settings.batch_size:,}")


def start_training(directory: Path, text: str, given: dict) -> tuple[Corpus, Training]:
    """Start a training. It replaces the model in `directory` once the new one, with initial weights, is complete."""
    start = time.perf_counter()
    settings, encoder, params = load_source(given)
    check_heads(settings.n_head, settings.n_embd)
    check_size(settings)
    corpus, shapes = read_corpus(text, settings, encoder), param_shapes(settings.hparams)
    vectors = {name: np.zeros(count_params(shapes), np.float32) for name in VECTORS}
    weights = view_as(shapes, vectors["weights"])
    if params:
        np.concatenate([array.ravel() for array in flatten(params, tensor_name).values()], out=vectors["weights"])
    else:
        initialize(weights, np.random.default_rng(settings.seed))
    training = Training(settings, corpus.digest, vectors)
    remove_leftovers(directory)
    with replacing_directory(directory, (*MODEL_FILES, STATE, LOG, PLOT)) as new:
        write_model(new, corpus.encoder, settings.hparams, weights)
        training.tables = digests(new, SMALL_FILES)
        training.seconds = time.perf_counter() - start
        save_state(new / STATE, training)
    return corpus, training


def resume_training(directory: Path, text: str, given: dict) -> tuple[Corpus, Training]:
    """Load the training in `directory`. ValueError if its files or the text have changed since it was started."""
    for file in (WEIGHTS, STATE, LOG):
        remove_leftovers(directory / file)
    training = load_state(directory / STATE)
    training.settings = choose_settings(given, training.settings)
    found = digests(directory, SMALL_FILES)
    if changed := [file for file in SMALL_FILES if found.get(file) != training.tables.get(file)]:
        raise ValueError(f"{directory / changed[0]} has changed since the training was started: restore it")
    corpus = read_corpus(text, training.settings, read_encoder(directory))
    if corpus.digest != training.text:
        raise ValueError(f"the training in {directory} was started with another text than {text}")
    return corpus, training


def check_paths(text: str, out: str | None, resume: bool, overwrite: bool) -> Path:
    """The directory `out`. ValueError if the training must not be written there, or if the file `text` is missing."""
    directory = Path(out := out or "")
    can_resume = (directory / STATE).is_file()
    problems = {
        "--out is missing: name a directory for the model, such as --out models/mine": not out,
        f"{text} cannot be read: there is no such file": text != "-" and not os.path.exists(text),
        "--resume continues a training and --overwrite replaces it: leave out one of them": resume and overwrite,
        f"{directory.name} is the name of a released model: choose another --out": directory.name in RELEASED,
        f"{out} is not a directory: choose another --out": os.path.lexists(directory) and not directory.is_dir(),
        f"there is nothing to resume: {directory / STATE} is missing": resume and not can_resume,
        f"{out} is the current directory: choose another --out": not resume and os.path.realpath(out) == os.getcwd(),
        f"{out} exists already: --overwrite replaces its model{', --resume continues its training' * can_resume}":
            any(directory.glob("[!.]*")) and not (resume or overwrite),
    }  # fmt: skip
    if found := [problem for problem, applies in problems.items() if applies]:
        raise ValueError(found[0])
    return directory


def report(corpus: Corpus, settings: Settings, out: Path = Path(), training: Training | None = None) -> None:
    """Print the validation losses of two simple models and, if given, of the `training` in `out`; then a sample."""
    n_vocab, ids, length, temperature = len(corpus.encoder.encoder), corpus.encoder.encode("\n"), 200, 0.8
    pairs = bigram.bigram(corpus.tokens.data, n_vocab)
    losses = {"uniform": math.log(n_vocab), "bigram": bigram.loss(pairs, corpus.validation.data)}
    if training is None:
        ids = bigram.generate(pairs, ids, length, temperature, settings.seed)
    else:
        losses["GPT"] = training.best_loss
        try:
            save_figure(loss_figure(training.rows, losses["bigram"], f"Training of {out.name}"), str(out / PLOT))
        except ImportError:
            print(f"{PLOT} was not drawn: pip install matplotlib")
        params = map_params(out / WEIGHTS, param_shapes(settings.hparams))
        options = {"temperature": temperature, "seed": settings.seed, "n_vocab": n_vocab}
        ids += generate(ids, params, settings.n_head, length, **options)
    print()
    rows = [(name, loss, loss * corpus.tokens_per_char) for name, loss in losses.items()]
    print_table({"validation loss": "s", "nats/token": ".4f", "nats/character": ".4f"}, rows)
    print(corpus.encoder.decode(ids))


def main(
    text: str, out: str | None = None, model: str = "gpt", resume: bool = False, overwrite: bool = False,
    **settings: Settings,
) -> None:  # fmt: skip
    """Train a GPT-2 on the file TEXT. The last tenth of the text is kept for validation.

    --out DIRECTORY         where to save the model; gpt2.py --model_size DIRECTORY loads it
    --model gpt             or bigram: only count pairs of tokens; a GPT has to beat the loss of this model
    --resume                continue the training in --out after it was stopped
    --overwrite             replace the model in --out
    --n_vocab 1024          tokens in the vocabulary, which is learned from the text
    --n_ctx 256             tokens in the context
    --n_embd 192            width of the model
    --n_head 4              attention heads in each layer
    --n_layer 4             layers
    --dropout 0.1           share of activations to drop; a small text or a long training needs more
    --batch_size 16         windows of n_ctx tokens in a step
    --learning_rate 0.0015  the highest learning rate, after the warm-up (with --init_from: 0.0001)
    --max_steps 1400        how many steps to train
    --minutes N             how long to train, instead of --max_steps
    --eval_every 100        steps between evaluations; the best weights are kept
    --seed 0                the same seed gives the same model on the same machine and number of threads
    --encoder NAME          use the tokenizer of this model
    --init_from NAME        start from the weights of this model, such as 124M
    """
    given: dict = {name: value for name, value in settings.items() if value is not None}
    if model == "bigram":
        given["n_ctx"] = 1  # a bigram model sees one token
        chosen, encoder, _ = load_source(given)
        report(read_corpus(text, chosen, encoder), chosen)
        return
    if model != "gpt":
        raise ValueError(f"model must be gpt or bigram, not {model!r}")
    directory = check_paths(text, out, resume, overwrite)
    with locked(directory, wait=False):
        corpus, training = (resume_training if resume else start_training)(directory.resolve(), text, given)
        sizes = f"{len(corpus.tokens):,} tokens for training, {len(corpus.validation):,} for validation"
        print(f"{sizes}; {len(training.vectors['weights']):,} parameters; {n_blas_threads()} threads")
        first_step = training.step
        try:
            train(directory, corpus, training)
        except KeyboardInterrupt:
            best = f"{directory} has the best weights so far, from step {training.best_step}"
            print(f"\nstopped: --resume continues from step {training.saved_step}; {best}", file=sys.stderr)
            raise
        if training.step == first_step:
            print("the training was already finished: a larger --max_steps or --minutes continues it")
        report(corpus, training.settings, directory, training)
    # "./" because gpt2.py looks for a name without a path in models first
    print(f"\nto continue a text of your own: python gpt2.py TEXT --model_size {os.path.join('.', directory)}")


if __name__ == "__main__":
    run(main)
