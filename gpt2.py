"""GPT-2 in plain NumPy, to be read from the top: the model, generation, the command line.

In the shape comments n_seq is the number of tokens, n_embd the width of the model, n_head the number of its heads, each
n_embd / n_head wide; `...` stands for leading batch axes, of which there may be none.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy import ndarray as Array

from sampling import check_count, check_options, sample


def gelu(x: Array) -> Array:
    """Gaussian error linear unit, in the tanh form of GPT-2 (Hendrycks and Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; less its maximum first, which changes nothing but avoids overflow."""
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Array:
    """Mean 0 and variance 1 over the last axis, then scaled by g and shifted by b (Ba et al. 2016)."""
    x = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(x * x, axis=-1, keepdims=True)
    return g * (x / np.sqrt(variance + eps)) + b


def matmul(x: Array, w: Array) -> Array:
    """x @ w, [..., n_in] @ [n_in, n_out] -> [..., n_out], as one product for all leading axes.

    NumPy would make one for each index of them: 16 sequences would read the weights 16 times.
    """
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def linear(x: Array, w: Array, b: Array) -> Array:
    """x @ w + b: [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]."""
    return matmul(x, w) + b


def ffn(x: Array, c_fc: dict, c_proj: dict) -> Array:
    """The feed-forward network of a block, at each position on its own: [..., n_seq, n_embd] -> the same shape."""
    a = gelu(linear(x, **c_fc))  # [..., n_seq, n_embd] -> [..., n_seq, 4*n_embd]
    return linear(a, **c_proj)  # [..., n_seq, 4*n_embd] -> [..., n_seq, n_embd]


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), plus the mask.

    [..., n_q, d_k], [..., n_k, d_k], [..., n_k, d_v], [n_q, n_k] -> [..., n_q, d_v].
    """
    return softmax(q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]) + mask) @ v


def mha(x: Array, c_attn: dict, c_proj: dict, n_head: int, kv_cache: Array | None = None) -> Array:
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> the same shape.

    `kv_cache`, if given, is one layer's [2, ..., n_head, n_past + n_seq, n_embd/n_head]: the keys and values of the
    n_past positions before x, and at the end the room for those of x, which are written there.
    """
    n_seq, n_embd = x.shape[-2:]
    qkv = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    qkv = qkv.reshape(*qkv.shape[:-1], 3, n_head, n_embd // n_head)  # -> [..., n_seq, 3, n_head, n_embd/n_head]
    qkv = np.moveaxis(qkv, (-3, -2), (0, -3))  # -> [3, ..., n_head, n_seq, n_embd/n_head]
    q, k, v = qkv
    if kv_cache is not None:
        kv_cache[..., -n_seq:, :] = qkv[1:]  # its last positions are those of x
        k, v = kv_cache  # each [..., n_head, n_past + n_seq, n_embd/n_head]
    n_past = k.shape[-2] - n_seq
    mask = (1 - np.tri(n_seq, n_past + n_seq, n_past, dtype=x.dtype)) * -1e10  # a position sees none after itself
    heads = attention(q, k, v, mask)  # [..., n_head, n_seq, n_embd/n_head]
    merged = np.swapaxes(heads, -2, -3).reshape(x.shape)  # -> [..., n_seq, n_embd]
    return linear(merged, **c_proj)


def transformer_block(
    x: Array, mlp: dict, attn: dict, ln_1: dict, ln_2: dict, n_head: int, kv_cache: Array | None = None
) -> Array:
    """One layer, normalized before each part (GPT-2 paper, section 2.3): [..., n_seq, n_embd] -> the same shape."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv_cache=kv_cache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def hidden_states(
    inputs: Array, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, cache: dict | None = None
) -> Array:
    """The model up to and including `ln_f`: token ids [..., n_seq] -> [..., n_seq, n_embd].

    With a `cache` of `new_cache` the inputs are the positions after those it holds; theirs are added to it. Raises
    ValueError for ids outside the vocabulary and for more positions than the model, or the cache, has room for.
    """
    n_past, n_room = (cache["n_past"], cache["kv"].shape[-2]) if cache else (0, wpe.shape[0])
    ids = check_ids(inputs, wte.shape[0], n_room - n_past)
    n_all = n_past + ids.shape[-1]
    x = wte[ids] + wpe[n_past:n_all]  # [..., n_seq] -> [..., n_seq, n_embd]
    layers = cache["kv"][..., :n_all, :] if cache else [None] * len(blocks)  # of each layer, up to the new positions
    for block, kv_cache in zip(blocks, layers, strict=True):
        x = transformer_block(x, **block, n_head=n_head, kv_cache=kv_cache)
    if cache:
        cache["n_past"] = n_all
    return layer_norm(x, **ln_f)


def gpt2(
    inputs: Array, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, cache: dict | None = None
) -> Array:
    """GPT-2: token ids [..., n_seq] -> logits of each position's next token [..., n_seq, n_vocab].

    `cache` and what is raised: as for `hidden_states`.
    """
    x = hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache)
    return matmul(x, wte.T)  # [..., n_seq, n_embd] -> [..., n_seq, n_vocab]


def new_cache(params: dict, n_head: int, n_positions: int, n_batch: int | None = None) -> dict:
    """An empty KV cache: room for the keys and values of n_positions, of one sequence or of n_batch.

    `n_past` counts the positions it holds; `kv` is [n_layer, 2, (n_batch,) n_head, n_positions, n_embd/n_head].
    """
    n_ctx, n_embd = params["wpe"].shape
    check_count("n_positions", n_positions, least=1)
    if n_positions > n_ctx:
        raise ValueError(f"n_positions must be at most the model's {n_ctx}, not {n_positions}")
    batch = () if n_batch is None else (n_batch,)
    shape = (len(params["blocks"]), 2, *batch, n_head, n_positions, n_embd // n_head)
    return {"n_past": 0, "kv": np.zeros(shape, dtype=params["wpe"].dtype)}


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
        if value is not None:
            check_count(name, value, least=1)
    n_ctx = params["wpe"].shape[0]
    context = check_ids(inputs, params["wte"].shape[0], n_ctx)
    if context.ndim > 2 or (n_samples is not None and context.ndim > 1):
        raise ValueError("generation takes one prompt [n_seq], or without n_samples a batch of them [n_batch, n_seq]")
    cache = new_cache(params, n_head, min(n_ctx, context.shape[-1] + n_tokens_to_generate), *context.shape[:-1])
    rng, new, ended = np.random.default_rng(seed), context, False
    for _ in range(n_tokens_to_generate):
        if cache["n_past"] + new.shape[-1] > n_ctx:
            cache["n_past"] = 0  # as good as empty: what it holds from there on is never read, only written over
            new = context = context[..., max(n_ctx // 2, 1) :]
        x = hidden_states(new, **params, n_head=n_head, cache=cache)[..., -1, :]  # [..., n_embd]
        logits = (x @ params["wte"].T)[..., :n_vocab]  # -> [..., n_vocab]
        if n_samples is not None and context.ndim == 1:  # the prompt was computed once: now go on as a batch
            context, logits = (np.repeat(a[None], n_samples, axis=0) for a in (context, logits))
            cache["kv"] = np.repeat(cache["kv"][:, :, None], n_samples, axis=2)
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
    stop: str | None = None, ignore_eot: bool = False,
) -> None:  # fmt: skip
    """Continue PROMPT with GPT-2. `-` reads it from standard input; --prompt=TEXT is for one that looks like a flag.

    --n_tokens_to_generate 40   how many tokens to add at most
    --model_size 124M           124M, 355M, 774M, 1558M (downloaded once), a name in models_dir, or a directory
    --models_dir models         where the models are
    --temperature 0             0 takes the likeliest token, 1 draws by the model's probabilities
    --top_k 0                   draw from the k likeliest tokens only; 0: from all
    --top_p 1                   draw from the likeliest tokens that together have probability p only
    --seed N                    a number: the same one gives the same text
    --n_samples 1               how many continuations, made at once
    --stop TEXT                 end before this text
    --ignore_eot                go on after the model ends its text with <|endoftext|>
    """
    check_options(temperature, top_k, top_p, seed)
    check_count("n_tokens_to_generate", n_tokens_to_generate)
    check_count("n_samples", n_samples, least=1)
    if stop == "":
        raise ValueError("stop must not be empty")
    from cli import print_samples  # late, both: who imports the model needs neither
    from utils import load_encoder_hparams_and_params

    if prompt == "-":
        with open(0, "rb", closefd=False) as stdin:
            prompt = stdin.read().decode("utf-8", "replace")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    if not prompt and encoder.eot_id is None:
        raise ValueError("the prompt is empty, and this model has no <|endoftext|> to start from")
    inputs = encoder.encode(prompt) or [encoder.eot_id]
    eot_id = None if ignore_eot else encoder.eot_id
    options = (temperature, top_k, top_p, seed, eot_id, len(encoder.encoder), n_samples)
    steps = stream(inputs, params, hparams["n_head"], n_tokens_to_generate, *options)
    print_samples(steps, encoder, n_tokens_to_generate, n_samples, stop, eot_id)


if __name__ == "__main__":
    from cli import run

    run(main)
