"""The operations of gpt2.py once more, each with its derivative: what a training step computes.

Each operation returns its result and a function `backward`, which keeps the activations that it needs. `backward` takes
the gradient of the loss with respect to the result, adds the gradients of the parameters to `grads`, and returns the
gradient with respect to the input. The gradient with respect to x is called d_x and has the shape of x.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy import ndarray as Array

import gpt2

Result = tuple[Array, Callable]  # the result of an operation, and its `backward`


def gelu(x: Array) -> Result:
    """`gpt2.gelu`: x * s, with s = (1 + tanh(u)) / 2 and u = sqrt(2/pi) (x + 0.044715 x^3)."""
    c = math.sqrt(2 / math.pi)
    s = x * x  # the steps below are in place, because new arrays cost more than the arithmetic
    s *= 0.044715 * c
    s += c
    s *= x
    np.tanh(s, out=s)
    s += 1
    s *= 0.5

    def backward(d_y: Array) -> Array:  # dy/dx = s (1 + 2 x (1 - s) du/dx)
        d_x = x * x
        d_x *= 6 * 0.044715 * c
        d_x += 2 * c  # 2 du/dx
        d_x *= x
        d_x *= 1 - s
        d_x += 1
        d_x *= s
        d_x *= d_y
        return d_x

    return x * s, backward


def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Result:
    """`gpt2.layer_norm`: g * normalized + b, with normalized = (x - mean) / sqrt(variance + eps) over the last axis."""
    normalized = x - np.mean(x, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(normalized * normalized, axis=-1, keepdims=True) + eps)  # [..., n_seq, 1]
    normalized *= scale

    def backward(d_y: Array, grads: dict) -> Array:
        grads["g"] += np.sum((d_y * normalized).reshape(-1, len(g)), axis=0)  # [..., n_seq, n_embd] -> [n_embd]
        grads["b"] += np.sum(d_y.reshape(-1, len(b)), axis=0)
        d_normalized = d_y * g
        # Shifting or scaling x does not change the result, so d_x has no part along a constant or along `normalized`.
        constant = np.mean(d_normalized, axis=-1, keepdims=True)  # [..., n_seq, 1]
        along = np.mean(d_normalized * normalized, axis=-1, keepdims=True)
        return scale * (d_normalized - constant - along * normalized)

    return g * normalized + b, backward


def linear(x: Array, w: Array, b: Array) -> Result:
    """`gpt2.linear`: x @ w + b, [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]."""

    def backward(d_y: Array, grads: dict) -> Array:
        d_y = d_y.reshape(-1, len(b))  # [..., n_out] -> [n_rows, n_out], for one product per gradient
        grads["w"] += x.reshape(-1, len(w)).T @ d_y
        grads["b"] += np.sum(d_y, axis=0)
        return (d_y @ w.T).reshape(x.shape)

    return gpt2.linear(x, w, b), backward


def dropout(x: Array, rate: float, rng: np.random.Generator) -> Result:
    """Zero each number with probability `rate`, and scale the others to keep the mean (Srivastava et al. 2014)."""
    if rate == 0:
        return x, lambda d_y: d_y
    kept = rng.integers(0, 2**16, x.shape, dtype=np.uint16) >= round(rate * 2**16)  # twice as fast as drawing floats
    mask = kept * x.dtype.type(1 / (1 - rate))
    return x * mask, lambda d_y: d_y * mask


def attention(q: Array, k: Array, v: Array, drop: Callable) -> Result:
    """Causal `gpt2.attention` with dropout of the weights: three of [..., n_head, n_seq, d] -> the same shape."""
    q = q / math.sqrt(q.shape[-1])  # cheaper than scaling the scores, because q is smaller
    scores = q @ np.swapaxes(k, -1, -2)  # -> [..., n_head, n_seq, n_seq]
    scores += gpt2.causal_mask(q.shape[-2], q.dtype)
    weights = gpt2.softmax(scores, out=scores)
    dropped, back_drop = drop(weights)
    heads = dropped @ v  # -> [..., n_head, n_seq, d]

    def backward(d_heads: Array) -> tuple[Array, Array, Array]:
        d_scores = back_drop(d_heads @ np.swapaxes(v, -1, -2))  # d_weights at first: [..., n_head, n_seq, n_seq]
        # Softmax: d_scores = weights * (d_weights - sum(weights * d_weights)), and that sum equals sum(heads * d_heads)
        d_scores -= np.sum(heads * d_heads, axis=-1, keepdims=True)  # the cheaper sum (Dao et al. 2022, appendix B.2)
        d_scores *= weights
        d_q = d_scores @ k / math.sqrt(q.shape[-1])
        return d_q, np.swapaxes(d_scores, -1, -2) @ q, np.swapaxes(dropped, -1, -2) @ d_heads

    return heads, backward


def mha(x: Array, c_attn: dict, c_proj: dict, n_head: int, drop: Callable) -> Result:
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> the same shape. Below, d is n_embd / n_head."""
    qkv, back_c_attn = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    q, k, v = np.moveaxis(qkv.reshape(*x.shape[:-1], 3, n_head, -1), (-3, -2), (0, -3))  # three [..., n_head, n_seq, d]
    heads, back_attention = attention(q, k, v, drop)
    merged = np.swapaxes(heads, -2, -3).reshape(x.shape)  # -> [..., n_seq, n_embd]
    y, back_c_proj = linear(merged, **c_proj)

    def backward(d_y: Array, grads: dict) -> Array:
        d_merged = back_c_proj(d_y, grads["c_proj"]).reshape(*x.shape[:-1], n_head, -1)  # -> [..., n_seq, n_head, d]
        d_qkv = np.stack(back_attention(np.swapaxes(d_merged, -2, -3)))  # -> [3, ..., n_head, n_seq, d]
        d_qkv = np.moveaxis(d_qkv, (0, -3), (-3, -2)).reshape(qkv.shape)  # -> [..., n_seq, 3*n_embd]
        return back_c_attn(d_qkv, grads["c_attn"])

    return y, backward


def ffn(x: Array, c_fc: dict, c_proj: dict) -> Result:
    """The feed-forward network of a block: [..., n_seq, n_embd] -> the same shape."""
    a, back_c_fc = linear(x, **c_fc)  # -> [..., n_seq, 4*n_embd]
    a, back_gelu = gelu(a)
    y, back_c_proj = linear(a, **c_proj)  # -> [..., n_seq, n_embd]

    def backward(d_y: Array, grads: dict) -> Array:
        return back_c_fc(back_gelu(back_c_proj(d_y, grads["c_proj"])), grads["c_fc"])

    return y, backward


def transformer_block(x: Array, mlp: dict, attn: dict, ln_1: dict, ln_2: dict, n_head: int, drop: Callable) -> Result:
    """One layer, with dropout of what each part adds to the residual stream: [..., n_seq, n_embd] -> the same shape."""
    a, back_ln_1 = layer_norm(x, **ln_1)
    a, back_attn = mha(a, **attn, n_head=n_head, drop=drop)
    a, back_drop_1 = drop(a)
    x = x + a
    a, back_ln_2 = layer_norm(x, **ln_2)
    a, back_mlp = ffn(a, **mlp)
    a, back_drop_2 = drop(a)

    def backward(d_x: Array, grads: dict) -> Array:
        d_x = d_x + back_ln_2(back_mlp(back_drop_2(d_x), grads["mlp"]), grads["ln_2"])
        return d_x + back_ln_1(back_attn(back_drop_1(d_x), grads["attn"]), grads["ln_1"])

    return x + a, backward


def embedding(ids: Array, wte: Array, wpe: Array) -> Result:
    """wte[ids] + wpe: ids [..., n_seq] -> [..., n_seq, n_embd]."""

    def backward(d_x: Array, grads: dict) -> None:
        np.add.at(grads["wte"], ids, d_x)  # unlike +=, this adds all gradients of a token that occurs several times
        grads["wpe"][: ids.shape[-1]] += np.sum(d_x.reshape(-1, *d_x.shape[-2:]), axis=0)  # -> [n_seq, n_embd]

    return wte[ids] + wpe[: ids.shape[-1]], backward


def tied_output(x: Array, wte: Array) -> Result:
    """The logits, from the matrix that also embeds the tokens: [..., n_seq, n_embd] -> [..., n_seq, n_vocab]."""

    def backward(d_logits: Array, grads: dict) -> Array:
        d_logits = d_logits.reshape(-1, len(wte))  # -> [n_rows, n_vocab]
        grads["wte"] += d_logits.T @ x.reshape(-1, x.shape[-1])
        return (d_logits @ wte).reshape(x.shape)

    return x @ wte.T, backward


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Callable]:
    """The mean of -log softmax(logits)[target], in nats: [..., n_seq, n_vocab], [..., n_seq] -> one number."""
    rows, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)  # -> [n_rows, n_vocab], [n_rows]
    log_p = rows - np.max(rows, axis=-1, keepdims=True)
    log_p -= np.log(np.sum(np.exp(log_p), axis=-1, keepdims=True))
    is_target = np.arange(len(rows)), targets

    def backward(d_loss: float = 1.0) -> Array:  # (softmax(logits) - one_hot(targets)) / n_rows
        d_logits = np.exp(log_p)
        d_logits[is_target] -= 1
        d_logits *= d_loss / len(rows)
        return d_logits.reshape(logits.shape)

    return -float(np.mean(log_p[is_target])), backward


def gpt2_logits(ids: Array, wte: Array, wpe: Array, blocks: list, ln_f: dict, n_head: int, drop: Callable) -> Result:
    """The whole model: ids [..., n_seq] -> logits [..., n_seq, n_vocab]."""
    x, back_embedding = embedding(ids, wte, wpe)
    x, back_drop = drop(x)
    back_blocks = []
    for block in blocks:
        x, back_block = transformer_block(x, **block, n_head=n_head, drop=drop)
        back_blocks.append(back_block)
    x, back_ln_f = layer_norm(x, **ln_f)
    logits, back_output = tied_output(x, wte)

    def backward(d_logits: Array, grads: dict) -> None:
        d_x = back_ln_f(back_output(d_logits, grads), grads["ln_f"])
        for back_block, block_grads in zip(reversed(back_blocks), reversed(grads["blocks"]), strict=True):
            d_x = back_block(d_x, block_grads)
        back_embedding(back_drop(d_x), grads)

    return logits, backward


def gpt2_loss(
    window: Array, params: dict, n_head: int, dropout_rate: float = 0, rng: np.random.Generator | None = None
) -> tuple[float, Callable]:
    """The loss of predicting each token of `window` [..., n_seq + 1] from those before it; dropout draws from `rng`."""
    drop = partial(dropout, rate=dropout_rate, rng=rng or np.random.default_rng())
    logits, back_logits = gpt2_logits(window[..., :-1], **params, n_head=n_head, drop=drop)
    loss, back_loss = cross_entropy(logits, window[..., 1:])
    return loss, lambda d_loss, grads: back_logits(back_loss(d_loss), grads)
