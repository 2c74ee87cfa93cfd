"""GPT-2 in plain NumPy. Read it from the top: first the model, then generation, then the command line.

Shape comments: n_seq is the number of tokens, n_embd the width of the model, and n_head the number of attention heads,
each n_embd / n_head wide. `...` stands for any number of batch axes, or none.
"""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

import functools
import itertools
import math
import os
from collections.abc import Generator

import numpy as np
from numpy import ndarray as Array
from numpy.typing import ArrayLike

from engine.threads import split_over_cores
from sampling import check_count, check_finite, check_memory, check_options, sample

QUERY_BLOCK = 96  # positions in a block of `causal_attention`


def gelu(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the GELU that GPT-2 uses (Hendrycks and Gimpel 2016, section 2).

    The steps share one array. As a single expression, gelu would create seven arrays and take 1.5 times as long.
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
    """exp(x) / sum(exp(x)) over the last axis, into a new array or `out`. Subtracting the maximum avoids overflow."""
    # np.max's Python wrapper costs more than the reduction of a small array, so this calls the ufunc directly.
    exp_x = np.subtract(x, np.maximum.reduce(x, axis=-1, keepdims=True), out=out)
    exp_x = np.exp(exp_x, out=out)
    exp_x /= np.add.reduce(exp_x, axis=-1, keepdims=True)
    return exp_x


def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Array:
    """Normalize the last axis to mean 0 and variance 1, then scale by g and shift by b (Ba et al. 2016)."""
    n_embd = x.shape[-1]
    x = x - np.add.reduce(x, axis=-1, keepdims=True) / n_embd
    variance = np.vecdot(x, x)[..., None] / n_embd
    x *= 1 / np.sqrt(variance + eps)
    x *= g
    x += b
    return x


def matmul(x: Array, w: Array) -> Array:
    """x @ w as a single product: [..., n_in] @ [n_in, n_out] -> [..., n_out]. NumPy computes one per batch index."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= 4:  # BLAS copies w to multiply several rows at once, so a few rows are faster one by one
        rows = rows[:, None]
    return (rows @ w).reshape(*x.shape[:-1], w.shape[-1])


def linear(x: Array, w: Array, b: Array) -> Array:
    """x @ w + b: [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]."""
    y = matmul(x, w)
    y += b
    return y


def ffn(x: Array, c_fc: dict, c_proj: dict) -> Array:
    """The feed-forward network of a block. Positions do not mix: [..., n_seq, n_embd] -> the same shape."""
    a = gelu(linear(x, **c_fc))  # [..., n_seq, n_embd] -> [..., n_seq, 4*n_embd]
    return linear(a, **c_proj)  # [..., n_seq, 4*n_embd] -> [..., n_seq, n_embd]


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

    [..., n_q, d_k], [..., n_k, d_k], [..., n_k, d_v] -> [..., n_q, d_v]. The mask is added to the scores of the last
    keys: it is [n_q, n_masked], with n_masked at most n_k.
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.swapaxes(-1, -2)  # -> [..., n_q, n_k]
    if mask is not None:
        scores[..., -mask.shape[-1] :] += mask
    return softmax(scores, out=scores) @ v  # in place: 0.8 of the time, as scores stay in the processor's cache


@functools.cache
def causal_mask(n_seq: int, dtype: np.dtype) -> Array:
    """The mask to add to scores, [n_seq, n_seq]: -inf where a key comes after the query, 0 elsewhere."""
    return np.where(np.tri(n_seq, dtype=bool), dtype.type(0), dtype.type(-np.inf))


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention in which each position sees itself and the positions before it.

    [..., n_q, d_k], [..., n_k, d_k], [..., n_k, d_v] -> [..., n_q, d_v]. The queries belong to the last n_q of the
    n_k positions. They are taken in blocks, so that most scores of later keys are never computed.
    """
    n_q, n_past = q.shape[-2], k.shape[-2] - q.shape[-2]
    if n_q == 1:
        return attention(q, k, v)  # the last position sees all positions
    heads = np.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype)
    for start in range(0, n_q, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n_q)
        n_seen = n_past + end
        mask = causal_mask(end - start, q.dtype)  # for the keys of this block; every query sees the earlier keys
        heads[..., start:end, :] = attention(q[..., start:end, :], k[..., :n_seen, :], v[..., :n_seen, :], mask)
    return heads


def split_heads(x: Array, c_attn: dict, n_head: int, kv_cache: Array | None = None) -> tuple[Array, Array, Array]:
    """The queries, keys and values of all heads: [..., n_seq, n_embd] -> three of [..., n_head, n_seq, n_embd/n_head].

    `kv_cache` belongs to one layer: [..., n_head, 2, n_past + n_seq, n_embd/n_head]. It holds the keys and values of
    n_past earlier positions. Those of x are written after them, and the keys and values of all positions are returned.
    """
    qkv = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    qkv = qkv.reshape(*qkv.shape[:-1], 3, n_head, -1)  # -> [..., n_seq, 3, n_head, n_embd/n_head]
    qkv = qkv.swapaxes(-2, -4)  # -> [..., n_head, 3, n_seq, n_embd/n_head]
    q, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
    if kv_cache is not None:
        kv_cache[..., -x.shape[-2] :, :] = kv
        kv = kv_cache
    return q, kv[..., 0, :, :], kv[..., 1, :, :]


def mha(x: Array, c_attn: dict, c_proj: dict, n_head: int, kv_cache: Array | None = None) -> Array:
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> the same shape. See `split_heads` for `kv_cache`."""
    q, k, v = split_heads(x, c_attn, n_head, kv_cache)
    heads = causal_attention(q, k, v)  # -> [..., n_head, n_seq, n_embd/n_head]
    merged = heads.swapaxes(-2, -3).reshape(x.shape)  # -> [..., n_seq, n_embd]
    return linear(merged, **c_proj)


def transformer_block(
    x: Array, mlp: dict, attn: dict, ln_1: dict, ln_2: dict, n_head: int, kv_cache: Array | None = None
) -> Array:
    """One layer, with a norm before each part (GPT-2 paper, section 2.3): [..., n_seq, n_embd] -> the same shape."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv_cache=kv_cache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def check_ids(inputs: ArrayLike, n_vocab: int, n_room: int) -> Array:
    """Return `inputs` as an array. Raise ValueError unless each row has 1 to n_room token ids below n_vocab."""
    ids = np.asarray(inputs)
    if ids.ndim == 0 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError("the inputs must be token ids: a list or array of whole numbers that is not empty")
    if ids.shape[-1] > n_room:
        raise ValueError(f"the input is {ids.shape[-1]:,} tokens long, but there is room for {n_room:,}: shorten it")
    if ids.min() < 0 or ids.max() >= n_vocab:
        raise ValueError(f"token ids must be from 0 to {n_vocab - 1}, not {ids.min() if ids.min() < 0 else ids.max()}")
    return ids.astype(np.intp, copy=False)


def check_heads(n_head: int, n_embd: int, cache: dict | None = None) -> None:
    """Raise ValueError unless n_head is a whole number that divides n_embd and fits the cache."""
    check_count("n_head", n_head, least=1, most=n_embd)
    if n_embd % n_head:
        raise ValueError(f"n_head = {n_head} does not divide the model's n_embd = {n_embd}")
    if cache and cache["kv"].shape[-4::3] != (n_head, n_embd // n_head):
        raise ValueError(f"the cache has the shape {cache['kv'].shape}, which does not fit n_head = {n_head}")


def embed(inputs: ArrayLike, wte: Array, wpe: Array, blocks: list, cache: dict | None = None, **_: object) -> tuple:
    """The input of the first block, [..., n_seq] -> [..., n_seq, n_embd], and the `kv_cache` of each block."""
    n_past, n_room = (cache["n_past"], cache["kv"].shape[-2]) if cache else (0, wpe.shape[0])
    check_count("the cache's n_past", n_past, most=cache.get("n_filled", n_room) if cache else 0)
    ids = check_ids(inputs, wte.shape[0], n_room - n_past)
    if cache and cache["kv"].shape[:-4] != (len(blocks), *ids.shape[:-1]):
        raise ValueError(f"the cache has the shape {cache['kv'].shape}, which does not fit inputs of {ids.shape}")
    n_all = n_past + ids.shape[-1]
    x = wte[ids] + wpe[n_past:n_all]  # [..., n_seq] -> [..., n_seq, n_embd]
    return x, (cache["kv"][..., :n_all, :] if cache else [None] * len(blocks))


def apply_blocks(x: Array, blocks: list, n_head: int, kv_cache: Array | list) -> Array:
    """Apply one block after another: [..., n_seq, n_embd] -> the same shape. `kv_cache` has an entry for each block."""
    for block, kv in zip(blocks, kv_cache, strict=True):
        x = transformer_block(x, **block, n_head=n_head, kv_cache=kv)
    return x


def hidden_states(
    inputs: ArrayLike, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, cache: dict | None = None,
    lm_head: Array | None = None,
) -> Array:  # fmt: skip
    """The model up to and including `ln_f`: token ids [..., n_seq] -> [..., n_seq, n_embd]. `lm_head` is not used.

    With a `cache` from `new_cache`, the inputs follow the positions in the cache, and are added to it. Raises
    ValueError for ids outside the vocabulary, and if the model or the cache has no room for the inputs.
    """
    check_heads(n_head, wpe.shape[1], cache)
    x, kv_cache = embed(inputs, wte, wpe, blocks, cache)
    x = apply_blocks(x, blocks, n_head, kv_cache)
    if cache:
        cache["n_past"] = cache["n_filled"] = kv_cache.shape[-2]
    return layer_norm(x, **ln_f)


def to_logits(x: Array, wte: Array, lm_head: Array | None = None, **_: object) -> Array:
    """Hidden states [..., n_embd] -> logits [..., n_vocab]. GPT-2 reuses `wte`; other models may have an `lm_head`."""
    return matmul(x, (wte if lm_head is None else lm_head).T)


def gpt2(
    inputs: ArrayLike, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, cache: dict | None = None,
    lm_head: Array | None = None,
) -> Array:  # fmt: skip
    """GPT-2: token ids [..., n_seq] -> logits of each next token [..., n_seq, n_vocab]. See also `hidden_states`."""
    x = hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache)
    return to_logits(x, wte, lm_head)  # [..., n_seq, n_embd] -> [..., n_seq, n_vocab]


def new_cache(params: dict, n_head: int, n_positions: int, n_batch: int | None = None) -> dict:
    """An empty KV cache with room for n_positions of one sequence, or of n_batch sequences.

    `kv` holds the keys and values, [n_layer, (n_batch,) n_head, 2, n_positions, n_embd/n_head], and `n_past`
    counts the positions before the next input. Lower `n_past` to forget the last positions; it cannot exceed
    `n_filled`, the number of positions that were computed. Raises ValueError for numbers that do not fit the model.
    """
    n_ctx, n_embd = params["wpe"].shape
    check_count("n_positions", n_positions, least=1, most=n_ctx)
    check_heads(n_head, n_embd)
    check_count("n_batch", 1 if n_batch is None else n_batch, least=1)
    batch = () if n_batch is None else (n_batch,)
    shape = (len(params["blocks"]), *batch, n_head, 2, n_positions, n_embd // n_head)
    check_memory(4 * math.prod(shape), f"a cache of {n_positions:,} positions for n_batch = {n_batch}")
    return {"n_past": 0, "n_filled": 0, "kv": np.zeros(shape, dtype=params["wpe"].dtype)}


def prefill(inputs: ArrayLike, params: dict, n_head: int, cache: dict) -> Array:
    """`hidden_states` of the last position only: [..., n_seq] -> [..., n_embd]. Long prompts use all cores."""
    if np.shape(inputs)[-1:] == (1,):
        return hidden_states(inputs, **params, n_head=n_head, cache=cache)[..., 0, :]
    check_heads(n_head, params["wpe"].shape[1], cache)
    x, kv_cache = embed(inputs, **params, cache=cache)
    *blocks, last = params["blocks"]

    def fill(x: Array, kv_cache: Array | list) -> Array:
        """Apply all blocks but the last. Most positions need only their keys and values from the last block."""
        x = apply_blocks(x, blocks, n_head, kv_cache[:-1])
        split_heads(layer_norm(x, **last["ln_1"]), last["attn"]["c_attn"], n_head, kv_cache[-1])
        return x[..., -1:, :]

    x = split_over_cores(fill, x, kv_cache)[..., -1:, :]
    x = transformer_block(x, **last, n_head=n_head, kv_cache=kv_cache[-1])
    cache["n_past"] = cache["n_filled"] = kv_cache.shape[-2]
    return layer_norm(x, **params["ln_f"])[..., 0, :]


def stream(
    inputs: ArrayLike, params: dict, n_head: int, n_tokens_to_generate: int, temperature: float = 0, top_k: int = 0,
    top_p: float = 1, seed: int | None = None, eot_id: int | None = None, n_vocab: int | None = None,
    n_samples: int | None = None,
) -> Generator[int | list[int], None, None]:  # fmt: skip
    """Yield the id of each new token as soon as it is chosen; for a batch, yield a list with one id per sequence.

    The inputs are one prompt [n_seq] or a batch [n_batch, n_seq]. With `n_samples`, one prompt is continued that many
    times, as a batch. The options of sampling.py choose the tokens; by default the most likely one is taken.
    Generation ends after n_tokens_to_generate, or before `eot_id`. In a batch, a sequence that has ended repeats
    `eot_id` until all have ended. Ids from `n_vocab` on are padding, which the tokenizer lacks, and are never chosen.
    When the context of n_ctx positions is full, its older half is dropped and the rest is computed again. Raises
    ValueError for invalid options, for a prompt longer than n_ctx, and for ids outside the vocabulary.
    """
    check_options(temperature, top_k, top_p, seed)
    check_count("n_tokens_to_generate", n_tokens_to_generate)
    for name, value in (("n_samples", n_samples), ("n_vocab", n_vocab)):
        check_count(name, 1 if value is None else value, least=1)
    n_ctx = params["wpe"].shape[0]
    context = check_ids(inputs, params["wte"].shape[0], n_ctx)
    if context.ndim > 2 or (n_samples is not None and context.ndim > 1):
        raise ValueError("the inputs must be one prompt [n_seq] or, without n_samples, a batch [n_batch, n_seq]")
    cache = new_cache(params, n_head, min(n_ctx, context.shape[-1] + n_tokens_to_generate), *context.shape[:-1])
    n_bytes = (n_samples or 1) * (cache["kv"].nbytes + 8 * params["wte"].shape[0])
    check_memory(n_bytes, f"generation with n_samples = {n_samples}")
    rng, new, ended = np.random.default_rng(seed), context, False
    for _ in range(n_tokens_to_generate):
        if cache["n_past"] + new.shape[-1] > n_ctx:
            cache["n_past"] = 0
            new = context = context[..., max(n_ctx // 2, 1) :]
        x = prefill(new, params, n_head, cache)  # [..., n_embd]
        logits = check_finite(to_logits(x, **params)[..., :n_vocab])  # -> [..., n_vocab]
        if n_samples is not None and context.ndim == 1:  # the prompt was computed once; from here on, it is a batch
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


def generate(inputs: ArrayLike, params: dict, n_head: int, n_tokens_to_generate: int, **options) -> list:
    """All ids that `stream` yields with these options: one list, or for a batch a list of lists."""
    ids = list(stream(inputs, params, n_head, n_tokens_to_generate, **options))
    n_sequences = options.get("n_samples") or (np.shape(inputs)[0] if np.ndim(inputs) == 2 else None)
    if n_sequences is None:
        return ids
    rows = np.reshape(ids, (-1, n_sequences)).T.tolist()
    return [list(itertools.takewhile(lambda i: i != options.get("eot_id"), row)) for row in rows]


def main(
    prompt: str, n_tokens_to_generate: int = 40, model_size: str = "124M", models_dir: str | None = None,
    temperature: float = 0, top_k: int = 0, top_p: float = 1, seed: int | None = None, n_samples: int = 1,
    stop: str | None = None, ignore_eot: bool = False, quantize: str | None = None, offline: bool = False,
    verify: bool = False,
) -> None:  # fmt: skip
    """Continue PROMPT with GPT-2. If PROMPT is `-`, read it from standard input.

    --n_tokens_to_generate 40   how many tokens to add at most
    --model_size 124M           124M, 355M, 774M or 1558M (downloaded once), a name in models_dir, a directory, or
                                a model on Hugging Face such as distilbert/distilgpt2
    --models_dir DIR            where models are kept
    --temperature 0             0 takes the most likely token, 1 draws from the model's probabilities
    --top_k 0                   draw from the k most likely tokens only; 0 means from all
    --top_p 1                   draw from the most likely tokens that together have probability p
    --seed N                    the same seed gives the same text
    --n_samples 1               how many continuations to make at once
    --stop TEXT                 stop before this text
    --ignore_eot                continue after the model ends its text with <|endoftext|>
    --quantize int8             a quarter of the memory; large models run three times as fast (needs Numba)
    --offline                   never use the network, like GPT2_OFFLINE=1 in the environment
    --verify                    first compare the model's files with their stored digests
    """
    check_options(temperature, top_k, top_p, seed)
    check_count("n_tokens_to_generate", n_tokens_to_generate)
    check_count("n_samples", n_samples, least=1)
    if stop == "":
        raise ValueError("stop must not be empty")
    from show.terminal import print_samples, prompt_ids  # imported late: only the command line needs them
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
