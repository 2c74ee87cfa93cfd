"""How good a model is: the loss of a text, the probabilities of several options, the last words of texts.

The loss of a token is -log of its probability after the tokens before it, in nats. Perplexity is exp of the mean loss.
"""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy import ndarray as Array
from numpy.typing import ArrayLike

from encoder import Encoder
from engine.threads import map_on_all_cores
from gpt2 import check_ids, hidden_states, matmul, to_logits
from sampling import check_count, check_finite, log_sum_exp
from show.terminal import document_pieces, is_stream, print_table, progress
from utils import load_encoder_hparams_and_params

VOCABULARY_BLOCK = 1024  # logits per position that are computed at a time: 4 MB for 1,024 positions instead of 206 MB


def token_losses(inputs: Array, params: dict, n_head: int, n_scored: int | None = None) -> Array:
    """The losses of the last n_scored tokens, by default of all tokens but the first, in nats.

    Token ids [..., n_seq] -> float64 [..., n_scored]; n_seq is 2 to n_ctx + 1. Raises ValueError for anything else.
    """
    table = params.get("lm_head", params["wte"])
    ids = check_ids(inputs, table.shape[0], params["wpe"].shape[0] + 1)
    if ids.shape[-1] < 2:
        raise ValueError("one token has no loss, because nothing predicts the first token: give at least two")
    n_scored = ids.shape[-1] - 1 if n_scored is None else n_scored
    check_count("n_scored", n_scored, least=1, most=ids.shape[-1] - 1)
    x = hidden_states(ids[..., :-1], **params, n_head=n_head)[..., -n_scored:, :]  # [..., n_scored, n_embd]
    log_total: Array | float = -np.inf  # the log of the sum of exp(logit) over all blocks so far
    for start in range(0, table.shape[0], VOCABULARY_BLOCK):
        logits = matmul(x, table[start : start + VOCABULARY_BLOCK].T)  # -> [..., n_scored, VOCABULARY_BLOCK]
        largest = logits.max(axis=-1)
        logits -= largest[..., None]
        total = np.exp(logits, out=logits).sum(axis=-1)
        log_total = np.logaddexp(log_total, largest + np.log(total, dtype=np.float64))
    return log_total - np.vecdot(x, table[ids[..., -n_scored:]])


def loss(inputs: Array, params: dict, n_head: int) -> float:
    """The mean of `token_losses`, in nats."""
    return float(token_losses(inputs, params, n_head).mean())


def split_windows(pieces: Iterable[ArrayLike], n_ctx: int, stride: int | None) -> Iterator[tuple[Array, int]]:
    """Split a text, which arrives as pieces of ids, into windows; yield each with how many ids at its end are scored.

    As in Hugging Face's guide "Perplexity of fixed-length models", windows of n_ctx tokens start `stride` tokens apart,
    and each token but the first is scored once. Without overlap, each window also scores the first token of the next.
    """
    stride = n_ctx if stride is None else stride
    check_count("stride", stride, least=1, most=n_ctx)
    length, n_context, ids = n_ctx + (stride == n_ctx), 1, np.empty(0, np.uint8)  # the ids keep the type of the pieces
    for piece in pieces:
        ids = np.concatenate([ids, piece])
        while len(ids) > length:
            yield ids[:length], length - n_context
            ids, n_context = ids[stride:], length - stride
    yield ids, len(ids) - n_context


def losses_in_parts(pieces: Iterable[ArrayLike], params: dict, n_head: int, stride: int | None) -> Iterator[Array]:
    """`text_losses` of a text that arrives as pieces of ids: yields the losses window by window."""
    windows = split_windows(pieces, params["wpe"].shape[0], stride)
    return map_on_all_cores(lambda window: token_losses(window[0], params, n_head, window[1]), windows)


def text_losses(ids: Sequence[int] | Array, params: dict, n_head: int, stride: int | None = None) -> Array:
    """The losses of all tokens but the first of a text of any length, in nats: [n_tokens] -> float64 [n_tokens - 1].

    See `split_windows`; by default, windows do not overlap. Raises ValueError for one token and for a wrong stride.
    """
    return np.concatenate(list(progress(losses_in_parts([ids], params, n_head, stride), "token", lambda: len(ids) - 1)))


def measures(nats: float, n_tokens: int, n_bytes: int, n_characters: int, n_words: int) -> dict[str, float]:
    """A text's total loss in the usual measures. n_tokens does not count the first token; words end at white space."""
    with np.errstate(over="ignore"):
        return {
            "nats per token": nats / n_tokens, "perplexity": float(np.exp(nats / n_tokens)),
            "bits per byte": nats / np.log(2) / n_bytes, "bits per character": nats / np.log(2) / n_characters,
            "perplexity per word": float(np.exp(nats / max(1, n_words))),  # as in the GPT-2 paper, section 3.1
        }  # fmt: skip


def encode_after(context: str, texts: Iterable[str], encoder: Encoder) -> list[tuple[Array, int]]:
    """The token ids of each text, and how many of them come after the ids that `context` and all texts start with."""
    all_ids = [encoder.encode(text) for text in texts]
    columns = zip(encoder.encode(context), *all_ids, strict=False)
    n_context = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    if n_context == 0 and encoder.bos_id is None:  # bos_id goes before texts that share no context
        raise ValueError("there is no context, and this model has no <|endoftext|> to start from: give a context")
    return [(np.array(ids if n_context else [encoder.bos_id, *ids]), len(ids) - n_context) for ids in all_ids]


def add_space(context: str, option: str) -> str:
    """`option`, after a space unless it starts with white space or `context` ends with it."""
    if not option.strip():
        raise ValueError(f"an option is {'nothing but white space' if option else 'empty'}: give it some text")
    return option if not context or context[-1].isspace() or option[0].isspace() else f" {option}"


def option_scores(context: str, options: Sequence[str], encoder: Encoder, params: dict, n_head: int) -> Array:
    """The log-probability of each option after `context` (see `add_space`), in nats: [n_options]."""
    pairs = encode_after(context, [context + add_space(context, option) for option in options], encoder)
    return np.array([-token_losses(ids, params, n_head, n_scored).sum() for ids, n_scored in pairs])


def last_words(texts: Sequence[str], encoder: Encoder, params: dict, n_head: int) -> tuple[Array, Array]:
    """Whether the model predicts the last word of each text, and the word's log-probability in nats: two [n_texts].

    A word is predicted if each of its tokens is the most likely one (LAMBADA, Paperno et al. 2016; as in
    lm-evaluation-harness). Of a text longer than the model's context, only the end is used.
    """
    if not texts or any(len(text.split()) < 2 for text in texts):
        raise ValueError("to predict last words, give at least one text, and two or more words in each text")

    def score(text: str) -> list[tuple[bool, float]]:
        ((ids, n_scored),) = encode_after(text.rsplit(maxsplit=1)[0], [text.rstrip()], encoder)
        states = hidden_states(ids[-params["wpe"].shape[0] - 1 : -1], **params, n_head=n_head)[-n_scored:]
        is_right, log_p = True, 0.0
        for x, i in zip(states, ids[-len(states) :], strict=True):
            logits = to_logits(x, **params)  # [n_embd] -> [n_vocab]
            is_right &= bool(logits[: len(encoder.encoder)].argmax() == i)  # ids beyond the tokenizer's are padding
            log_p += logits[i] - log_sum_exp(logits)
        return [(is_right, log_p)]

    scores = np.concatenate(list(progress(map_on_all_cores(score, texts), "text", lambda: len(texts))))
    return scores[:, 0] == 1, scores[:, 1]


def show_text(
    file: str, stride: int | None = None, errors: str = "strict", model_size: str = "124M",
    models_dir: str | None = None,
) -> None:  # fmt: skip
    """Measure how well a model predicts the text in FILE: loss, perplexity, bits per byte.

    `-` reads standard input. Documents in a text are separated by <|endoftext|>.

    --stride N            tokens from one window to the next, default: the model's context; fewer give more context
    --errors strict       or replace: read bytes that are not UTF-8 as U+FFFD
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be strict or replace, not {errors!r}")
    check_count("stride", 1 if stride is None else stride, least=1)
    counts, nats = np.zeros(4, int), 0.0  # counts: tokens, bytes, characters, words

    def encode_pieces() -> Iterator[list[int]]:
        for piece in encoder.pieces(document_pieces(file, errors)):
            ids = encoder.encode(piece, allow_special=True)
            counts[:] += len(ids), len(piece.encode()), len(piece), len(piece.split())
            yield ids

    try:
        # Reading all of the text first finds its errors now, not after hours. A stream can be read only once.
        length = None if is_stream(file) else sum(map(len, document_pieces(file, errors)))
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
        parts = losses_in_parts(encode_pieces(), params, hparams["n_head"], stride)
        for losses in progress(parts, "token", lambda: length and round(length * (counts[0] / counts[2]))):
            nats += check_finite(losses, "losses").sum()
    except UnicodeError as error:
        raise ValueError(f"{error}; or use --errors replace") from error
    print("{:,} tokens, {:,} bytes, {:,} characters, {:,} words".format(*counts))
    for name, value in measures(nats, *(counts - [1, 0, 0, 0])).items():  # the first token has no loss
        print(f"{name:<20}{value:>12{',.4f' if value < 1e6 else '.4g'}}")


def show_options(context: str, *options: str, model_size: str = "124M", models_dir: str | None = None) -> None:
    """Tell which of OPTIONS a model finds most likely after CONTEXT: classification without training.

    Shows the log of each option's probability, in nats: in total, from the best option down, and per byte, which is
    fairer to long options. A space is added between context and option, unless one of them has white space there.
    """
    texts = [add_space(context, option) for option in options]
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    scores = check_finite(option_scores(context, options, encoder, params, hparams["n_head"]), "losses")
    n_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
    rows = [(scores[i], scores[i] / n_bytes[i], repr(texts[i])) for i in np.argsort(-scores)]
    print_table({"log p": ".4f", "per byte": ".4f", "option": "s"}, rows)


def show_last_words(file: str, model_size: str = "124M", models_dir: str | None = None) -> None:
    """Count how often a model predicts the last word of LAMBADA's texts: the lines of FILE, {"text": "..."}."""
    texts = []
    for n, line in enumerate("".join(document_pieces(file)).split("\n"), start=1):
        try:
            if line.strip():
                texts.append(json.loads(line)["text"])
                texts[-1].split()[1]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f'{file}, line {n} must be JSON like {{"text": "..."}} with two or more words') from error
    if not texts:
        raise ValueError(f"{file} has no passages, only empty lines")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    is_right, log_p = last_words(texts, encoder, params, hparams["n_head"])
    check_finite(log_p, "losses")
    print(f"accuracy    {is_right.mean():>9.2%}  ({is_right.sum():,} of {len(texts):,} last words)")
    print(f"perplexity  {np.exp(-log_p.mean()):>9,.2f}  (of the last word)")


if __name__ == "__main__":
    run({"": show_text, "choose": show_options, "last_word": show_last_words})
