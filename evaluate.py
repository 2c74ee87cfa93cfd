"""How good a model is: the loss and perplexity of a text, the likeliest of several answers, the last word of a passage.

The loss of a token is -log of the probability that the model gives it after those before it, in nats. The perplexity of
a text is the exponential of their mean. `token_losses` takes one window of context, `text_losses` any length.
"""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy import ndarray as Array

from encoder import Encoder
from engine.threads import on_all_cores
from gpt2 import check_ids, hidden_states, matmul, to_logits
from sampling import check_count, check_finite, log_sum_exp
from show.terminal import document_pieces, is_stream, print_table, progress, read_document
from utils import load_encoder_hparams_and_params

ROWS = 1024  # positions computed at a time: several windows if the context is short
VOCABULARY_BLOCK = 1024  # logits of a position at a time: those of ROWS are 4 MB then and stay in the processor's cache


def token_losses(inputs: Array, params: dict, n_head: int, n_scored: int | None = None) -> Array:
    """The loss of each of the last n_scored tokens, by default of all but the first, in nats.

    Token ids [..., n_seq] -> float64 [..., n_scored]. The vocabulary is taken in blocks, because all logits of 1,024
    positions of GPT-2 are 206 MB. Raises ValueError for less than 2 or more than n_ctx + 1 tokens, and for wrong ids.
    """
    table = params.get("lm_head", params["wte"])
    ids = check_ids(inputs, table.shape[0], params["wpe"].shape[0] + 1)
    if ids.shape[-1] < 2:
        raise ValueError("one token has no loss, as nothing predicts the first: at least two are needed")
    n_scored = ids.shape[-1] - 1 if n_scored is None else n_scored
    check_count("n_scored", n_scored, least=1, most=ids.shape[-1] - 1)
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
    """The mean of `token_losses`, of all tokens but the first of each row, in nats."""
    return float(token_losses(inputs, params, n_head).mean())


def windows(pieces: Iterable[Array], n_ctx: int, stride: int) -> Iterator[tuple[Array, int]]:
    """Each window over the ids of a text, which come in pieces, and how many ids at its end are scored there.

    As in Hugging Face's guide "Perplexity of fixed-length models", windows of n_ctx tokens begin `stride` tokens apart,
    and each token but the first is scored once. Windows that do not overlap are one token longer, so that the first
    token of the next one, which is only context there, is scored too.
    """
    length, n_before, ids = n_ctx + (stride == n_ctx), 1, None  # before: ids at the beginning that are only context
    for piece in pieces:
        ids = np.asarray(piece) if ids is None else np.concatenate([ids, piece])
        while len(ids) > length:
            yield ids[:length], length - n_before
            ids, n_before = ids[stride:], length - stride
    yield ids, len(ids) - n_before


def losses_in_parts(pieces: Iterable[Array], params: dict, n_head: int, stride: int | None = None) -> Iterator[Array]:
    """`text_losses` of ids that come in pieces: yields one array after another, and never holds the whole text."""
    n_ctx = params["wpe"].shape[0]
    stride = n_ctx if stride is None else stride
    check_count("stride", stride, least=1, most=n_ctx)

    def batches() -> Iterator[tuple[list[Array], int]]:
        """Windows of the same length, and their n_scored."""
        spans = windows(pieces, n_ctx, stride)
        for (length, n_scored), alike in itertools.groupby(spans, key=lambda window: (len(window[0]), window[1])):
            while inputs := [ids for ids, _ in itertools.islice(alike, max(1, ROWS // length))]:
                yield inputs, n_scored

    yield from on_all_cores(lambda batch: token_losses(batch[0], params, n_head, batch[1]).reshape(-1), batches())


def text_losses(ids: list[int], params: dict, n_head: int, stride: int | None = None) -> Array:
    """The loss of each token but the first of a text of any length, in nats: [n_tokens] -> float64 [n_tokens - 1].

    The text is cut into `windows`, by default without overlap. Raises ValueError for one token, or a wrong stride.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"a text is one row of token ids, not an array of the shape {ids.shape}")
    return np.concatenate(list(progress(losses_in_parts([ids], params, n_head, stride), "token", lambda: len(ids) - 1)))


def measures(nats: float, n_tokens: int, n_bytes: int, n_characters: int, n_words: int) -> dict[str, float]:
    """The sum of the losses of a text's tokens as the usual measures: per token, byte (of UTF-8), character and word.

    Words are separated by white space (GPT-2 paper, section 3.1). n_tokens does not count the first, which has no loss.
    """
    with np.errstate(over="ignore"):
        return {
            "nats per token": nats / n_tokens,
            "perplexity": float(np.exp(nats / n_tokens)),
            "bits per byte": nats / math.log(2) / n_bytes,
            "bits per character": nats / math.log(2) / n_characters,
            "perplexity per word": float(np.exp(nats / max(1, n_words))),
        }


def continuations(encoder: Encoder, context: str, texts: Sequence[str]) -> list[tuple[list[int], int]]:
    """For each text that begins with `context`, its token ids and how many of them are not the context's.

    The context's are those that it shares with all texts: a token that a continuation changes, such as a space at the
    end of the context, is the continuation's. If none is shared, the id that begins a text comes first.
    """
    all_ids = [encoder.encode(text) for text in texts]
    columns = zip(encoder.encode(context), *all_ids, strict=False)
    n_context = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    if n_context == 0:
        if encoder.bos_id is None:
            raise ValueError("there is no context, and this model has no <|endoftext|> to start from")
        all_ids, n_context = [[encoder.bos_id, *ids] for ids in all_ids], 1
    return [(ids, len(ids) - n_context) for ids in all_ids]


def option_scores(context: str, options: Sequence[str], encoder: Encoder, params: dict, n_head: int) -> Array:
    """The log-probability of each option, `spaced`, after `context`, in nats: [n_options]. No option may be empty."""
    pairs = continuations(encoder, context, [context + spaced(context, option) for option in options])
    return np.array([-token_losses(ids, params, n_head, n_scored).sum() for ids, n_scored in pairs])


def spaced(context: str, option: str) -> str:
    """`option` as it follows `context`: after a space, unless one of them has white space there."""
    if not option.strip():
        raise ValueError(f"an option is {'empty' if not option else 'nothing but white space'}: it needs some text")
    return option if not context or context[-1].isspace() or option[0].isspace() else f" {option}"


def last_words(texts: Sequence[str], encoder: Encoder, params: dict, n_head: int) -> tuple[Array, Array]:
    """For each text, whether the model predicts its last word, and that word's log-probability in nats: two [n_texts].

    A word is predicted if each of its tokens, with the space before, is the likeliest (LAMBADA, Paperno et al. 2016; as
    in lm-evaluation-harness). Of a text that is too long, the end counts. Raises ValueError for a text of one word.
    """

    def compute(text: str) -> list[tuple[bool, float]]:
        text = text.rstrip()
        if len(text.split()) < 2:
            raise ValueError(f"{text[:40]!r} has no word before its last one")
        ((ids, n_scored),) = continuations(encoder, text.rsplit(maxsplit=1)[0], [text])
        ids = np.asarray(ids[-params["wpe"].shape[0] - 1 :])
        n_scored = min(n_scored, len(ids) - 1)
        is_right, log_p = True, 0.0
        for x, i in zip(hidden_states(ids[:-1], **params, n_head=n_head)[-n_scored:], ids[-n_scored:], strict=True):
            logits = to_logits(x, **params)  # [n_embd] -> [n_vocab]
            is_right &= bool(logits[: len(encoder.encoder)].argmax() == i)  # without padding, which stands for no token
            log_p += logits[i] - log_sum_exp(logits)
        return [(is_right, log_p)]

    if not texts:
        raise ValueError("there are no texts")
    parts = progress(on_all_cores(compute, texts), "text", lambda: len(texts))
    is_right, log_probabilities = zip(*itertools.chain.from_iterable(parts), strict=True)
    return np.array(is_right), np.array(log_probabilities)


def read_passages(path: str) -> list[str]:
    """The texts in a file of JSON lines, {"text": "..."}; ValueError, with its number, for a line that is none."""
    texts = []
    for n, line in enumerate(read_document(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
            n_words = len(texts[-1].split())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f'{path}, line {n}: it is not JSON like {{"text": "..."}}') from error
        if n_words < 2:
            raise ValueError(f"{path}, line {n}: its text has no word before the last one")
    if not texts:
        raise ValueError(f"{path} has no passages, only empty lines")
    return texts


def show_text(
    file: str, stride: int | None = None, errors: str = "strict", model_size: str = "124M", models_dir: str = "models"
) -> None:
    """Measure how well a model predicts the text in FILE: loss, perplexity, bits per byte.

    `-` stands for standard input. Documents in a text are separated by <|endoftext|>.

    --stride N            tokens from one window of context to the next, by default as many as it holds; fewer take
                          longer and give each token more context
    --errors strict       replace: put U+FFFD where the text is not UTF-8, and go on
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be strict or replace, not {errors!r}")
    check_count("stride", 1 if stride is None else stride, least=1)
    counts, nats = np.zeros(4, int), 0.0  # of tokens, bytes, characters, words

    def encoded() -> Iterator[Array]:
        """The ids of the text, in pieces, which are counted."""
        for piece in encoder.pieces(document_pieces(file, errors)):
            ids = encoder.encode(piece, allow_special=True)
            counts[:] += len(ids), len(piece.encode()), len(piece), len(piece.split())
            yield np.array(ids)

    try:
        # What is wrong with a text is said now, not after hours; what can be read only once has an unknown length.
        length = None if is_stream(file) else sum(map(len, document_pieces(file, errors)))
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
        parts = losses_in_parts(encoded(), params, hparams["n_head"], stride)
        for losses in progress(parts, "token", lambda: length and round(length * (counts[0] / counts[2]))):
            nats += check_finite(losses, "losses").sum()
    except UnicodeError as error:
        raise ValueError(f"{error}; or go on with --errors replace") from error
    n_tokens, n_bytes, n_characters, n_words = counts.tolist()
    print(f"{n_tokens:,} tokens, {n_bytes:,} bytes, {n_characters:,} characters, {n_words:,} words")
    for name, value in measures(nats, n_tokens - 1, n_bytes, n_characters, n_words).items():
        print(f"{name:<20}{value:>12{',.4f' if value < 1e6 else '.4g'}}")


def show_options(context: str, *options: str, model_size: str = "124M", models_dir: str = "models") -> None:
    """Tell which of OPTIONS a model finds likeliest after CONTEXT: classification without training.

    The log of each option's probability is shown, in nats: in total, by which options are sorted, and per byte, which
    is fairer to long ones. A space goes between context and option, unless one of them has white space there.
    """
    texts = [spaced(context, option) for option in options]
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    scores = check_finite(option_scores(context, options, encoder, params, hparams["n_head"]), "losses")
    n_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
    rows = [(f"{scores[i]:.4f}", f"{scores[i] / n_bytes[i]:.4f}", repr(texts[i])) for i in np.argsort(-scores)]
    print_table({"log p": "right", "per byte": "right", "option": "left"}, rows)


def show_last_words(file: str, model_size: str = "124M", models_dir: str = "models") -> None:
    """Count how often a model predicts the last word of LAMBADA's texts: the lines of FILE, {"text": "..."}."""
    texts = read_passages(file)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    is_right, log_probabilities = last_words(texts, encoder, params, hparams["n_head"])
    check_finite(log_probabilities, "losses")
    print(f"accuracy    {is_right.mean():>9.2%}  ({is_right.sum():,} of {len(texts):,} last words)")
    with np.errstate(over="ignore"):
        print(f"perplexity  {np.exp(-log_probabilities.mean()):>9,.2f}  (of the last word)")


if __name__ == "__main__":
    run({"": show_text, "choose": show_options, "last_word": show_last_words})
