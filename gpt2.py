"""GPT-2 in plain NumPy, to be read from the top: the model, generation, the command line.

In the shape comments n_seq is the number of tokens, n_embd the width of the model and n_head the number of its heads,
each n_embd / n_head wide; `...` stands for leading batch axes, of which there may be none.
"""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import functools
import itertools
import math
import os
from collections.abc import Iterator

import numpy as np
from numpy import ndarray as Array

from engine.threads import in_parts
from sampling import check_count, check_finite, check_memory, check_options, sample

QUERY_BLOCK = 96  # positions


def gelu(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's form of the unit (Hendrycks and Gimpel 2016, section 2).

    Computed step by step in one array: written as one expression it makes seven arrays and takes 1.5 times as long.
    """
    c = math.sqrt(2 / math.pi)
    y = np.asarray(0.044715 * c * x)
    y *= x
    y += c
    y *= x
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= 0.5
    return y


def softmax(x: Array, out: Array | None = None) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, in a new array or in `out`. Subtracting the maximum avoids overflow."""
    # np.max's Python wrapper costs more than the reduction of a small array, so the ufunc is called directly.
    exp_x = np.subtract(x, np.maximum.reduce(x, axis=-1, keepdims=True), out=out)
    exp_x = np.exp(exp_x, out=out)
    exp_x /= np.add.reduce(exp_x, axis=-1, keepdims=True)
    return exp_x


def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Array:
    """Mean 0 and variance 1 over the last axis, then scaled by g and shifted by b (Ba et al. 2016)."""
    n_embd = x.shape[-1]
    x = x - np.add.reduce(x, axis=-1, keepdims=True) / n_embd
    variance = np.vecdot(x, x)[..., None] / n_embd
    x *= 1 / np.sqrt(variance + eps)
    x *= g
    x += b
    return x


def matmul(x: Array, w: Array) -> Array:
    """x @ w, [..., n_in] @ [n_in, n_out] -> [..., n_out], as one product; NumPy would make one per leading index."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= 4:  # faster one by one, 2 in 0.6 of the time: BLAS copies w before it multiplies several rows
        rows = rows[:, None]
    return (rows @ w).reshape(*x.shape[:-1], w.shape[-1])


def linear(x: Array, w: Array, b: Array) -> Array:
    """x @ w + b: [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]."""
    y = matmul(x, w)
    y += b
    return y


def ffn(x: Array, c_fc: dict, c_proj: dict) -> Array:
    """The feed-forward network of a block, at each position on its own: [..., n_seq, n_embd] -> the same shape."""
    a = gelu(linear(x, **c_fc))  # [..., n_seq, n_embd] -> [..., n_seq, 4*n_embd]
    return linear(a, **c_proj)  # [..., n_seq, 4*n_embd] -> [..., n_seq, n_embd]


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1); the mask is added to the scores of the last keys.

    [..., n_q, d_k], [..., n_k, d_k], [..., n_k, d_v], [n_q, up to n_k] -> [..., n_q, d_v].
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.swapaxes(-1, -2)  # -> [..., n_q, n_k]
    if mask is not None:
        scores[..., -mask.shape[-1] :] += mask
    return softmax(scores, out=scores) @ v  # in place, so that it stays in the processor's cache: 0.8 of the time


@functools.cache
def causal_mask(n_seq: int, dtype: np.dtype) -> Array:
    """[n_seq, n_seq], to be added to scores: -inf where a key comes after the query, else 0."""
    return np.where(np.tri(n_seq, dtype=bool), dtype.type(0), dtype.type(-np.inf))


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention in which a position sees itself and those before it; q has the last n_q of the positions of k and v.

    [..., n_q, d_k], [..., n_k, d_k], [..., n_k, d_v] -> [..., n_q, d_v]. Queries are taken in blocks: so half of a
    prompt's scores are never computed, and the others stay in the processor's cache.
    """
    n_q, n_past = q.shape[-2], k.shape[-2] - q.shape[-2]
    if n_q == 1:
        return attention(q, k, v)  # the last position sees all
    heads = np.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype)
    for start in range(0, n_q, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n_q)
        n_seen = n_past + end
        mask = causal_mask(end - start, q.dtype)  # all see what is before the block
        heads[..., start:end, :] = attention(q[..., start:end, :], k[..., :n_seen, :], v[..., :n_seen, :], mask)
    return heads


def split_heads(x: Array, c_attn: dict, n_head: int, kv_cache: Array | None = None) -> tuple[Array, Array, Array]:
    """The queries, keys and values of all heads: [..., n_seq, n_embd] -> three of [..., n_head, n_seq, n_embd/n_head].

    `kv_cache` is one layer's [..., n_head, 2, n_past + n_seq, n_embd/n_head]: keys and values of n_past earlier
    positions, and room for those of x, which are written there. Then keys and values of all positions are returned.
    """
    qkv = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    qkv = qkv.reshape(*qkv.shape[:-1], 3, n_head, -1)  # -> [..., n_seq, 3, n_head, n_embd/n_head]
    qkv = qkv.swapaxes(-2, -4)  # -> [..., n_head, 3, n_seq, n_embd/n_head]
    q, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
    if kv_cache is not None:
        kv_cache[..., -x.shape[-2] :, :] = kv  # its last positions are those of x
        kv = kv_cache
    return q, kv[..., 0, :, :], kv[..., 1, :, :]


def mha(x: Array, c_attn: dict, c_proj: dict, n_head: int, kv_cache: Array | None = None) -> Array:
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> the same shape. `kv_cache`: as in `split_heads`."""
    q, k, v = split_heads(x, c_attn, n_head, kv_cache)
    heads = causal_attention(q, k, v)  # -> [..., n_head, n_seq, n_embd/n_head]
    merged = heads.swapaxes(-2, -3).reshape(x.shape)  # -> [..., n_seq, n_embd]
    return linear(merged, **c_proj)


def transformer_block(
    x: Array, mlp: dict, attn: dict, ln_1: dict, ln_2: dict, n_head: int, kv_cache: Array | None = None
) -> Array:
    """One layer, normalized before each part (GPT-2 paper, section 2.3): [..., n_seq, n_embd] -> the same shape."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv_cache=kv_cache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def check_ids(inputs: Array, n_vocab: int, n_room: int) -> Array:
    """`inputs` as an array; ValueError unless they are 1 to n_room token ids (in each row), from 0 to n_vocab - 1."""
    ids = np.asarray(inputs)
    if ids.ndim == 0 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError("the inputs must be token ids: a list or array of whole numbers, and not an empty one")
    if ids.shape[-1] > n_room:
        raise ValueError(f"the input is {ids.shape[-1]:,} tokens long, and there is room for {n_room:,}: shorten it")
    if ids.min() < 0 or ids.max() >= n_vocab:
        raise ValueError(f"token ids must be from 0 to {n_vocab - 1}, not {ids.min() if ids.min() < 0 else ids.max()}")
    return ids.astype(np.intp, copy=False)


def check_heads(n_head: int, n_embd: int, cache: dict | None = None) -> None:
    """Raise ValueError unless n_head is a whole number that divides n_embd, and that of the cache."""
    check_count("n_head", n_head, least=1, most=n_embd)
    if n_embd % n_head:
        raise ValueError(f"n_head = {n_head} does not divide the model's n_embd = {n_embd}")
    if cache and cache["kv"].shape[-4::3] != (n_head, n_embd // n_head):
        raise ValueError(f"the cache has the shape {cache['kv'].shape}: it is not for n_head = {n_head} here")


def embed(inputs: Array, wte: Array, wpe: Array, blocks: list, cache: dict | None = None, **_: object) -> tuple:
    """What enters the first block, [..., n_seq] -> [..., n_seq, n_embd], and the `kv_cache` of each block."""
    n_past, n_room = (cache["n_past"], cache["kv"].shape[-2]) if cache else (0, wpe.shape[0])
    check_count("the cache's n_past", n_past, most=cache.get("n_filled", n_room) if cache else 0)
    ids = check_ids(inputs, wte.shape[0], n_room - n_past)
    if cache and cache["kv"].shape[:-4] != (len(blocks), *ids.shape[:-1]):
        raise ValueError(f"the cache has the shape {cache['kv'].shape}, and the inputs {ids.shape}: they do not fit")
    n_all = n_past + ids.shape[-1]
    x = wte[ids] + wpe[n_past:n_all]  # [..., n_seq] -> [..., n_seq, n_embd]
    return x, (cache["kv"][..., :n_all, :] if cache else [None] * len(blocks))


def apply_blocks(x: Array, blocks: list, n_head: int, kv_cache: Array | list) -> Array:
    """One block after another: [..., n_seq, n_embd] -> the same shape. `kv_cache` is that of each block."""
    for block, kv in zip(blocks, kv_cache, strict=True):
        x = transformer_block(x, **block, n_head=n_head, kv_cache=kv)
    return x


def hidden_states(
    inputs: Array, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, cache: dict | None = None,
    lm_head: Array | None = None,
) -> Array:  # fmt: skip
    """The model up to and including `ln_f`: token ids [..., n_seq] -> [..., n_seq, n_embd]. `lm_head` is not used.

    With a `cache` of `new_cache` the inputs follow the positions that it holds, and are added to it. Raises ValueError
    for ids outside the vocabulary and for more positions than the model, or the cache, has room for.
    """
    check_heads(n_head, wpe.shape[1], cache)
    x, kv_cache = embed(inputs, wte, wpe, blocks, cache)
    x = apply_blocks(x, blocks, n_head, kv_cache)
    if cache:
        cache["n_past"] = cache["n_filled"] = kv_cache.shape[-2]
    return layer_norm(x, **ln_f)


def to_logits(x: Array, wte: Array, lm_head: Array | None = None, **_: object) -> Array:
    """Hidden states [..., n_embd] -> logits [..., n_vocab]. GPT-2 uses `wte` here too; others may have an `lm_head`."""
    return matmul(x, (wte if lm_head is None else lm_head).T)


def gpt2(
    inputs: Array, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, cache: dict | None = None,
    lm_head: Array | None = None,
) -> Array:  # fmt: skip
    """GPT-2: token ids [..., n_seq] -> logits of each next token [..., n_seq, n_vocab]. More: see `hidden_states`."""
    x = hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache)
    return to_logits(x, wte, lm_head)  # [..., n_seq, n_embd] -> [..., n_seq, n_vocab]


def new_cache(params: dict, n_head: int, n_positions: int, n_batch: int | None = None) -> dict:
    """An empty KV cache for n_positions of one sequence, or of n_batch. A lower `n_past` forgets the last positions.

    `kv` has the keys and values, [n_layer, (n_batch,) n_head, 2, n_positions, n_embd/n_head]; those of the first
    `n_filled` positions are computed, and `n_past` cannot be more. ValueError for numbers that do not fit the model.
    """
    n_ctx, n_embd = params["wpe"].shape
    check_count("n_positions", n_positions, least=1, most=n_ctx)
    check_heads(n_head, n_embd)
    check_count("n_batch", 1 if n_batch is None else n_batch, least=1)
    batch = () if n_batch is None else (n_batch,)
    shape = (len(params["blocks"]), *batch, n_head, 2, n_positions, n_embd // n_head)
    check_memory(4 * math.prod(shape), f"a cache of {n_positions:,} positions for n_batch = {n_batch}")
    return {"n_past": 0, "n_filled": 0, "kv": np.zeros(shape, dtype=params["wpe"].dtype)}


def prefill(inputs: Array, params: dict, n_head: int, cache: dict) -> Array:
    """`hidden_states` of the last position only: [..., n_seq] -> [..., n_embd]. A long prompt uses all cores."""
    if np.shape(inputs)[-1:] == (1,):
        return hidden_states(inputs, **params, n_head=n_head, cache=cache)[..., 0, :]
    check_heads(n_head, params["wpe"].shape[1], cache)
    x, kv_cache = embed(inputs, **params, cache=cache)
    *blocks, last = params["blocks"]

    def fill(x: Array, kv_cache: Array | list) -> Array:
        """All blocks but the last, of which the other positions need keys and values only."""
        x = apply_blocks(x, blocks, n_head, kv_cache[:-1])
        split_heads(layer_norm(x, **last["ln_1"]), last["attn"]["c_attn"], n_head, kv_cache[-1])
        return x[..., -1:, :]

    x = in_parts(fill, x, kv_cache)[..., -1:, :]
    x = transformer_block(x, **last, n_head=n_head, kv_cache=kv_cache[-1])
    cache["n_past"] = cache["n_filled"] = kv_cache.shape[-2]
    return layer_norm(x, **params["ln_f"])[..., 0, :]


def stream(
    inputs: Array, params: dict, n_head: int, n_tokens_to_generate: int, temperature: float = 0, top_k: int = 0,
    top_p: float = 1, seed: int | None = None, eot_id: int | None = None, n_vocab: int | None = None,
    n_samples: int | None = None,
) -> Iterator[int | list[int]]:  # fmt: skip
    """Yield the id of each new token as it is made; of several sequences, the list of their ids.

    The inputs are one prompt [n_seq], continued n_samples times as one batch if that is given, or a batch
    [n_batch, n_seq]. Greedy unless `temperature`, `top_k`, `top_p` and `seed` say otherwise (see sampling.py). Ends
    after n_tokens_to_generate or before `eot_id`; in a batch, ended sequences repeat `eot_id` until all have ended.
    Ids from `n_vocab` on, padding that the tokenizer lacks, are never chosen. When all n_ctx positions are taken, the
    older half of the context is dropped and the rest computed anew. Raises ValueError, when the first id is asked for,
    for options that make no sense, a prompt longer than n_ctx, and ids outside the vocabulary.
    """
    check_options(temperature, top_k, top_p, seed)
    check_count("n_tokens_to_generate", n_tokens_to_generate)
    for name, value in (("n_samples", n_samples), ("n_vocab", n_vocab)):
        check_count(name, 1 if value is None else value, least=1)
    n_ctx = params["wpe"].shape[0]
    context = check_ids(inputs, params["wte"].shape[0], n_ctx)
    if context.ndim > 2 or (n_samples is not None and context.ndim > 1):
        raise ValueError("generation takes one prompt [n_seq], or without n_samples a batch of them [n_batch, n_seq]")
    cache = new_cache(params, n_head, min(n_ctx, context.shape[-1] + n_tokens_to_generate), *context.shape[:-1])
    n_bytes = (n_samples or 1) * (cache["kv"].nbytes + 8 * params["wte"].shape[0])
    check_memory(n_bytes, f"generation with n_samples = {n_samples}")
    rng, new, ended = np.random.default_rng(seed), context, False
    for _ in range(n_tokens_to_generate):
        if cache["n_past"] + new.shape[-1] > n_ctx:
            cache["n_past"] = 0  # forget everything
            new = context = context[..., max(n_ctx // 2, 1) :]
        x = prefill(new, params, n_head, cache)  # [..., n_embd]
        logits = check_finite(to_logits(x, **params)[..., :n_vocab])  # -> [..., n_vocab]
        if n_samples is not None and context.ndim == 1:  # the prompt was computed once: now go on as a batch
            context, logits = (np.repeat(a[None], n_samples, axis=0) for a in (context, logits))
            cache["kv"] = np.repeat(cache["kv"][:, None], n_samples, axis=1)
        ids = sample(logits, rng, temperature, top_k, top_p)  # -> [...]
        if eot_id is not None:
            ended = ended | (ids == eot_id)
            if np.all(ended):
                return
            ids = np.where(ended, eot_id, ids)
        yield ids.tolist()
        new = ids[..., None]  # [...] -> [..., 1]
        context = np.concatenate([context, new], axis=-1)


def generate(inputs: Array, params: dict, n_head: int, n_tokens_to_generate: int, **options) -> list:
    """The ids that `stream`, with the same options, yields: one list, or for a batch one for each sequence."""
    ids = list(stream(inputs, params, n_head, n_tokens_to_generate, **options))
    n_sequences = options.get("n_samples") or (len(inputs) if np.ndim(inputs) == 2 else None)
    if n_sequences is None:
        return ids
    rows = np.reshape(ids, (-1, n_sequences)).T.tolist()
    return [list(itertools.takewhile(lambda i: i != options.get("eot_id"), row)) for row in rows]


def main(
    prompt: str, n_tokens_to_generate: int = 40, model_size: str = "124M", models_dir: str = "models",
    temperature: float = 0, top_k: int = 0, top_p: float = 1, seed: int | None = None, n_samples: int = 1,
    stop: str | None = None, ignore_eot: bool = False, quantize: str | None = None, offline: bool = False,
    verify: bool = False,
) -> None:  # fmt: skip
    """Continue PROMPT with GPT-2. `-` reads it from standard input; --prompt=TEXT is for one that looks like a flag.

    --n_tokens_to_generate 40   how many tokens to add at most
    --model_size 124M           124M, 355M, 774M, 1558M (downloaded once), a name in models_dir, a directory, or a
                                model of Hugging Face such as distilbert/distilgpt2
    --models_dir models         where the models are
    --temperature 0             0 takes the likeliest token, 1 draws by the model's probabilities
    --top_k 0                   draw from the k likeliest tokens only; 0: from all
    --top_p 1                   draw from the likeliest tokens that together have probability p only
    --seed N                    a number: the same one gives the same text
    --n_samples 1               how many continuations, made at once
    --stop TEXT                 end before this text
    --ignore_eot                go on after the model ends its text with <|endoftext|>
    --quantize int8             weights of a quarter of the size: of a large model, three times as fast (needs Numba)
    --offline                   never use the network, as with GPT2_OFFLINE=1 in the environment
    --verify                    first compare the model's files with the digests that were written with them
    """
    check_options(temperature, top_k, top_p, seed)
    check_count("n_tokens_to_generate", n_tokens_to_generate)
    check_count("n_samples", n_samples, least=1)
    if stop == "":
        raise ValueError("stop must not be empty")
    from show.terminal import print_samples, prompt_ids  # imported late: only the command line needs these
    from utils import load_encoder_hparams_and_params

    if offline:
        os.environ["GPT2_OFFLINE"] = "1"
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir, quantize, verify)
    inputs = prompt_ids(prompt, encoder, hparams["n_ctx"])
    eot_id = None if ignore_eot else encoder.eot_id
    options = (temperature, top_k, top_p, seed, eot_id, len(encoder.encoder), n_samples)
    steps = stream(inputs, params, hparams["n_head"], n_tokens_to_generate, *options)
    print_samples(steps, encoder, n_tokens_to_generate, n_samples, stop, eot_id)


if __name__ == "__main__":
    run(main)
