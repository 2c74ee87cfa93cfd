"""How good a model is: the loss and perplexity of a text, the likeliest of several answers, the last word of a passage.

The loss of a token is -log of the probability that the model gives it after those before it, in nats; the perplexity of
a text is the exponential of their mean. `token_losses` has one window of context, `text_losses` a text of any length.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral

import numpy as np
from numpy import ndarray as Array
from tqdm import tqdm

from cli import read_document
from encoder import Encoder
from gpt2 import check_ids, hidden_states, matmul, to_logits
from pictures import print_table
from prefill import blas, n_blas_threads, one_at_a_time
from sampling import log_sum_exp
from utils import load_encoder_hparams_and_params

VOCABULARY_BLOCK = 1024  # tokens whose logits are there at a time: with 1,024 positions 4 MB, which stay in the cache
NO_LOSS = "one token has no loss, as nothing predicts the first: at least two are needed"
ROWS = 1024  # positions that are computed at a time: several windows of a short context


def token_losses(inputs: Array, params: dict, n_head: int, n_scored: int | None = None) -> Array:
    """The loss of each of the last n_scored tokens, by default of all but the first, in nats.

    Token ids [..., n_seq] -> float64 [..., n_scored]. The log of the softmax is taken stably, and block by block of the
    vocabulary: all logits of 1,023 positions of GPT-2 would be 206 MB. Raises ValueError for less than two tokens, for
    more than n_ctx + 1, and for ids outside the vocabulary.
    """
    table = params.get("lm_head", params["wte"])
    ids = check_ids(inputs, table.shape[0], params["wpe"].shape[0] + 1)
    if ids.shape[-1] < 2:
        raise ValueError(NO_LOSS)
    n_scored = ids.shape[-1] - 1 if n_scored is None else n_scored
    if not 1 <= n_scored < ids.shape[-1]:
        raise ValueError(f"n_scored must be from 1 to {ids.shape[-1] - 1}, not {n_scored}")
    states = hidden_states(ids[..., :-1], **params, n_head=n_head)[..., -n_scored:, :]
    x, targets = states.reshape(-1, states.shape[-1]), ids[..., -n_scored:]
    largest, total = np.full(len(x), -np.inf, np.float32), np.zeros(len(x))  # of the logits; of exp(logits - largest)
    for start in range(0, table.shape[0], VOCABULARY_BLOCK):
        logits = matmul(x, table[start : start + VOCABULARY_BLOCK].T)  # -> [n_rows, VOCABULARY_BLOCK]
        larger = np.maximum(largest, logits.max(axis=-1))
        logits -= larger[:, None]
        total = total * np.exp(largest - larger) + np.exp(logits, out=logits).sum(axis=-1)
        largest = larger
    target_logits = np.vecdot(x, table[targets.reshape(-1)])
    return (largest + np.log(total) - target_logits).reshape(targets.shape)


def loss(inputs: Array, params: dict, n_head: int) -> float:
    """The mean loss of the tokens of `inputs` [..., n_seq], but for the first of each row, in nats.

    Raises what `token_losses` does.
    """
    return float(token_losses(inputs, params, n_head).mean())


def windows(n_tokens: int, n_ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, n_scored) of each window over a text, of which the last n_scored tokens are scored there.

    They are those of Hugging Face's guide "Perplexity of fixed-length models": n_ctx tokens, each `stride` after the
    one before, so that each token but the first of all is scored once, with n_ctx - stride tokens of context or more.
    Windows that do not overlap are one longer, as their first token is only context: so it is scored too.
    """
    length, scored = n_ctx + (stride == n_ctx), 1
    for start in itertools.count(0, stride):
        end = min(start + length, n_tokens)
        yield start, end, end - scored
        if end == n_tokens:
            return
        scored = end


def text_losses(ids: list[int], params: dict, n_head: int, stride: int | None = None) -> Array:
    """The loss of each token but the first of a text of any length, in nats: [n_tokens] -> float64 [n_tokens - 1].

    In `windows`, by default without overlap, several at a time. Raises ValueError for a text of one token and a stride
    that is not from 1 to n_ctx.
    """
    n_ctx = params["wpe"].shape[0]
    check_stride(stride, n_ctx)
    ids = np.asarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"a text is one row of token ids, not an array of the shape {ids.shape}")
    if len(ids) < 2:
        raise ValueError(NO_LOSS)
    spans = windows(len(ids), n_ctx, n_ctx if stride is None else stride)
    batches = []  # of windows with the same sizes
    for _, alike in itertools.groupby(spans, key=lambda span: (span[1] - span[0], span[2])):
        alike = list(alike)
        n = max(1, ROWS // (alike[0][1] - alike[0][0]))
        batches += [alike[i : i + n] for i in range(0, len(alike), n)]

    def compute(batch: list[tuple[int, int, int]]) -> Array:
        inputs = np.stack([ids[start:end] for start, end, _ in batch])
        return token_losses(inputs, params, n_head, n_scored=batch[0][2]).reshape(-1)

    return np.concatenate(on_all_cores(compute, batches))


def check_stride(stride: int | None, n_ctx: int | None = None) -> None:
    """Raise ValueError unless `stride` is None or a whole number from 1 to n_ctx, if that is known."""
    is_count = isinstance(stride, Integral) and not isinstance(stride, bool) and stride >= 1
    if stride is not None and not (is_count and stride <= (n_ctx or stride)):
        most = "on" if n_ctx is None else f"to the model's context of {n_ctx}"
        raise ValueError(f"stride must be a whole number from 1 {most}, not {stride!r}")


def on_all_cores(function: Callable, items: Sequence) -> list:
    """function(item) for each of `items`, in one thread a core, with one thread in each matrix product; and a bar."""
    n_threads = n_blas_threads() if blas().info() else 1  # a BLAS that is not known cannot be limited
    quiet = None if sys.stderr else True  # None: unless it is a terminal
    with one_at_a_time, blas().limit(limits=1), ThreadPoolExecutor(n_threads) as pool:
        try:
            return list(tqdm(pool.map(function, items), total=len(items), leave=False, disable=quiet))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C what has not begun does not begin


def measures(text: str, losses: Array) -> dict[str, float]:
    """What the losses of the tokens of `text` come to, per token and, in all, per byte (of UTF-8), character and word.

    Words are what white space separates, as where GPT-2's paper counts them (section 3.1: "canonical units"). The first
    token, which has no loss, is nevertheless part of the text's length.
    """
    nats = float(losses.sum())
    with np.errstate(over="ignore"):
        return {
            "nats per token": nats / len(losses),
            "perplexity": float(np.exp(nats / len(losses))),
            "bits per byte": nats / math.log(2) / len(text.encode("utf-8", "replace")),
            "bits per character": nats / math.log(2) / len(text),
            "perplexity per word": float(np.exp(nats / max(1, len(text.split())))),
        }


def continuations(encoder: Encoder, context: str, texts: Sequence[str]) -> list[tuple[list[int], int]]:
    """Of each text that begins with `context`, its token ids and how many of them are not the context's.

    These are the same first ids for all: a token that a continuation would change, as it does a space at the end of the
    context, belongs to it. If nothing is left, the id that begins a text is put before. ValueError if there is none.
    """
    context_ids, all_ids = encoder.encode(context), [encoder.encode(text) for text in texts]
    columns = zip(context_ids, *all_ids, strict=False)
    n_context = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    if n_context == 0:
        if encoder.bos_id is None:
            raise ValueError("there is no context, and this model has no <|endoftext|> to start from")
        all_ids, n_context = [[encoder.bos_id, *ids] for ids in all_ids], 1
    return [(ids, len(ids) - n_context) for ids in all_ids]


def option_scores(context: str, options: Sequence[str], encoder: Encoder, params: dict, n_head: int) -> Array:
    """The log-probability of each option as the continuation of `context`, in nats: [n_options].

    Between the two goes a space, unless one of them has white space there. Raises ValueError for an option that is
    empty, and for texts longer than the model's context.
    """
    texts = [context + spaced(context, option) for option in options]
    pairs = continuations(encoder, context, texts)
    return np.array([-token_losses(ids, params, n_head, n_scored).sum() for ids, n_scored in pairs])


def spaced(context: str, option: str) -> str:
    """`option` as it follows `context`: after a space, unless one of them has white space there."""
    if not option.strip():
        raise ValueError(f"an option is {'empty' if not option else 'nothing but white space'}: it needs some text")
    return option if not context or context[-1].isspace() or option[0].isspace() else f" {option}"


def last_words(texts: Sequence[str], encoder: Encoder, params: dict, n_head: int) -> tuple[Array, Array]:
    """Of each text, whether the model predicts its last word, and that word's log-probability in nats: two [n_texts].

    It does so if each token of the word, with the space before, is the likeliest one: so would greedy generation
    produce it (LAMBADA, Paperno et al. 2016; as in EleutherAI's lm-evaluation-harness). Of texts that are too long for
    the model, the end counts. Raises ValueError for a text of a single word.
    """

    def compute(text: str) -> tuple[bool, float]:
        text = text.rstrip()
        context = text[: len(text) - len(text.split()[-1])].rstrip() if text else ""
        if not context:
            raise ValueError(f"{text[:40]!r} has no word before its last one")
        ((ids, n_scored),) = continuations(encoder, context, [text])
        ids = np.asarray(ids[-params["wpe"].shape[0] - 1 :])
        n_scored = min(n_scored, len(ids) - 1)
        is_right, log_p = True, 0.0
        for x, i in zip(hidden_states(ids[:-1], **params, n_head=n_head)[-n_scored:], ids[-n_scored:], strict=True):
            logits = to_logits(x, **params)  # [n_embd] -> [n_vocab]
            is_right &= bool(logits[: len(encoder.encoder)].argmax() == i)  # without padding, which stands for no token
            log_p += logits[i] - log_sum_exp(logits)
        return is_right, log_p

    if not texts:
        raise ValueError("there are no texts")
    is_right, log_probabilities = zip(*on_all_cores(compute, texts), strict=True)
    return np.array(is_right), np.array(log_probabilities)


def read_passages(path: str) -> list[str]:
    """The texts in a file of JSON lines, {"text": "..."}; ValueError, with the line, for what is none."""
    texts = []
    for n, line in enumerate(read_document(path).split("\n"), start=1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                if len(text.split()) < 2:
                    raise ValueError("its text has no word before the last one")
                texts.append(text)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                reason = error if type(error) is ValueError else 'it is not JSON like {"text": "..."}'
                raise ValueError(f"{path}, line {n}: {reason}") from error
    if not texts:
        raise ValueError(f"{path} has no passages, only empty lines")
    return texts


def show_text(
    file: str, stride: int | None = None, errors: str = "strict", model_size: str = "124M", models_dir: str = "models"
) -> None:
    """Measure how well a model predicts the text in FILE: loss, perplexity, bits per byte.

    `-` stands for standard input. Documents in a text are separated by <|endoftext|>.

    --stride N            how far each window of the context is from the one before, by default as far as it is long;
                          with less it takes longer, and each token has more context
    --errors strict       replace: go on where the text is not UTF-8, with U+FFFD
    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be strict or replace, not {errors!r}")
    try:
        text = read_document(file, errors)
    except UnicodeError as error:
        raise ValueError(f"{error}; or go on with --errors replace") from error
    check_stride(stride)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    ids = encoder.encode(text, allow_special=True)
    losses = check_finite(text_losses(ids, params, hparams["n_head"], stride))
    sizes = f"{len(ids):,} tokens, {len(text.encode('utf-8', 'replace')):,} bytes, {len(text):,} characters"
    print(f"{sizes}, {len(text.split()):,} words")
    for name, value in measures(text, losses).items():
        print(f"{name:<20}{value:>12{',.4f' if value < 1e6 else '.4g'}}")


def show_options(context: str, options: list[str], model_size: str = "124M", models_dir: str = "models") -> None:
    """Tell which of OPTIONS a model finds likeliest after CONTEXT: classification without training.

    Of each one's probability the logarithm is shown, in nats: of all of it, by which they are sorted, and per byte,
    which is fairer to longer ones. A space goes between the two, unless one of them has white space there.

    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    texts = [spaced(context, option) for option in options]
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    scores = check_finite(option_scores(context, options, encoder, params, hparams["n_head"]))
    rows = []
    for i in np.argsort(-scores):
        n_bytes = len(texts[i].encode("utf-8", "replace"))
        rows.append((f"{scores[i]:.4f}", f"{scores[i] / n_bytes:.4f}", repr(texts[i])))
    print_table({"log p": "right", "per byte": "right", "option": "left"}, rows)


def show_last_words(file: str, model_size: str = "124M", models_dir: str = "models") -> None:
    """Count how often a model predicts the last word of the texts in FILE, as LAMBADA has them.

    Each line of the file is one: {"text": "..."}.

    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    texts = read_passages(file)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    is_right, log_probabilities = last_words(texts, encoder, params, hparams["n_head"])
    check_finite(log_probabilities)
    print(f"accuracy    {is_right.mean():>9.2%}  ({is_right.sum():,} of {len(texts):,} last words)")
    with np.errstate(over="ignore"):
        print(f"perplexity  {np.exp(-log_probabilities.mean()):>9,.2f}  (of the last word)")


def check_finite(losses: Array) -> Array:
    """`losses`, if they are numbers, else ValueError."""
    if not np.isfinite(losses).all():
        raise ValueError("the model's losses are not finite numbers: its weights are damaged, or not a GPT-2's")
    return losses


if __name__ == "__main__":
    from cli import run

    run({"": show_text, "choose": show_options, "last_word": show_last_words})
