"""The operations of gpt2.py once more, each with its derivative: what a training step computes.

An operation returns its result and a function `backward`, a closure that keeps the activations it needs. That takes the
gradient of the loss with respect to the result, adds to `grads` those of the operation's parameters, and returns that
of its input. A gradient has the shape of what it is for, and its name with a `d_` before it.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy import ndarray as Array

from gpt2 import causal_mask

Result = tuple[Array, Callable]  # of an operation: what it computes, and `backward`


def gelu(x: Array) -> Result:
    """`gpt2.gelu`, 0.5 x (1 + t) with t = tanh(u) and u = sqrt(2/pi) (x + 0.044715 x^3)."""
    scale = math.sqrt(2 / math.pi)
    t = x * x  # from here on in place: at these sizes a new array costs more than the arithmetic
    t *= 0.044715 * scale
    t += scale
    t *= x
    np.tanh(t, out=t)
    y = t + 1
    y *= x
    y *= 0.5

    def backward(d_y: Array) -> Array:  # dy/dx = 0.5 (1 + t) + 0.5 x (1 - t^2) du/dx
        d_x = x * x
        d_x *= 3 * 0.044715 * scale
        d_x += scale  # du/dx
        d_x *= x
        d_x *= 1 - t * t
        d_x += t
        d_x += 1
        d_x *= d_y
        d_x *= 0.5
        return d_x

    return y, backward


def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Result:
    """`gpt2.layer_norm` over the last axis: g * normalized + b, with normalized = (x - mean) / sqrt(variance + eps)."""
    normalized = x - np.mean(x, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(normalized * normalized, axis=-1, keepdims=True) + eps)  # [..., n_seq, 1]
    normalized *= scale

    def backward(d_y: Array, grads: dict) -> Array:
        grads["g"] += np.sum((d_y * normalized).reshape(-1, len(g)), axis=0)
        grads["b"] += np.sum(d_y.reshape(-1, len(b)), axis=0)
        d_normalized = d_y * g
        # The mean and the variance depend on x, too: that takes away what d_normalized has in the direction of a
        # constant and of `normalized`, the two changes of x that the norm undoes.
        along_constant = np.mean(d_normalized, axis=-1, keepdims=True)
        along_normalized = np.mean(d_normalized * normalized, axis=-1, keepdims=True)
        return scale * (d_normalized - along_constant - along_normalized * normalized)

    return g * normalized + b, backward


def linear(x: Array, w: Array, b: Array) -> Result:
    """x @ w + b: [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]."""
    n_in, n_out = w.shape
    y = x.reshape(-1, n_in) @ w  # as one product for all leading axes
    y += b

    def backward(d_y: Array, grads: dict) -> Array:
        d_y = d_y.reshape(-1, n_out)
        grads["w"] += x.reshape(-1, n_in).T @ d_y
        grads["b"] += np.sum(d_y, axis=0)
        return (d_y @ w.T).reshape(x.shape)

    return y.reshape(*x.shape[:-1], n_out), backward


def dropout(x: Array, rate: float, rng: np.random.Generator) -> Result:
    """Zero each number with the probability `rate`, and scale the others so that the mean stays (Srivastava 2014)."""
    if rate == 0:
        return x, lambda d_y: d_y
    kept = rng.integers(0, 2**16, x.shape, dtype=np.uint16) >= round(rate * 2**16)  # half the time of floats
    mask = kept * x.dtype.type(1 / (1 - rate))
    return x * mask, lambda d_y: d_y * mask


def attention(q: Array, k: Array, v: Array, drop: Callable) -> Result:
    """Causal `gpt2.attention` with dropout of its weights: three of [..., n_head, n_seq, d] -> the same shape."""
    q = q / math.sqrt(q.shape[-1])  # here, and not in the scores, which are many more
    weights = q @ np.swapaxes(k, -1, -2)  # [..., n_head, n_seq, n_seq]
    weights += causal_mask(q.shape[-2], q.dtype)
    weights -= np.max(weights, axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= np.sum(weights, axis=-1, keepdims=True)
    dropped, back_drop = drop(weights)
    heads = dropped @ v

    def backward(d_heads: Array) -> tuple[Array, Array, Array]:
        d_scores = back_drop(d_heads @ np.swapaxes(v, -1, -2))
        # Softmax: d_scores = weights * (d_weights - sum(weights * d_weights)). That sum is also the one of
        # heads * d_heads, which are fewer (Dao et al. 2022, appendix B.2).
        d_scores -= np.sum(heads * d_heads, axis=-1, keepdims=True)
        d_scores *= weights
        d_q = d_scores @ k / math.sqrt(q.shape[-1])
        return d_q, np.swapaxes(d_scores, -1, -2) @ q, np.swapaxes(dropped, -1, -2) @ d_heads

    return heads, backward


def mha(x: Array, c_attn: dict, c_proj: dict, n_head: int, drop: Callable) -> Result:
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> the same shape."""
    qkv, back_c_attn = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    split = (*x.shape[:-1], 3, n_head, x.shape[-1] // n_head)
    q, k, v = np.moveaxis(qkv.reshape(split), (-3, -2), (0, -3))  # -> three of [..., n_head, n_seq, n_embd/n_head]
    heads, back_attention = attention(q, k, v, drop)
    merged = np.swapaxes(heads, -2, -3).reshape(x.shape)  # -> [..., n_seq, n_embd]
    y, back_c_proj = linear(merged, **c_proj)

    def backward(d_y: Array, grads: dict) -> Array:
        d_merged = back_c_proj(d_y, grads["c_proj"]).reshape(*split[:-3], *split[-2:])
        d_qkv = back_attention(np.swapaxes(d_merged, -2, -3))
        d_qkv = np.moveaxis(np.stack(d_qkv), (0, -3), (-3, -2)).reshape(qkv.shape)  # -> [..., n_seq, 3*n_embd]
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
    n_seq = ids.shape[-1]

    def backward(d_x: Array, grads: dict) -> None:
        np.add.at(grads["wte"], ids, d_x)  # a token that occurs twice gets both
        grads["wpe"][:n_seq] += np.sum(d_x.reshape(-1, *d_x.shape[-2:]), axis=0)

    return wte[ids] + wpe[:n_seq], backward


def tied_output(x: Array, wte: Array) -> Result:
    """The logits: [..., n_seq, n_embd] @ [n_vocab, n_embd]^T -> [..., n_seq, n_vocab]."""

    def backward(d_logits: Array, grads: dict) -> Array:
        d_logits = d_logits.reshape(-1, len(wte))
        grads["wte"] += d_logits.T @ x.reshape(-1, x.shape[-1])
        return (d_logits @ wte).reshape(x.shape)

    return x @ wte.T, backward


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Callable]:
    """The mean of -log softmax(logits)[target], in nats: [..., n_seq, n_vocab], [..., n_seq] -> one number."""
    probabilities = logits - np.max(logits, axis=-1, keepdims=True)
    of_targets = np.take_along_axis(probabilities, targets[..., None], axis=-1)
    np.exp(probabilities, out=probabilities)
    total = np.sum(probabilities, axis=-1, keepdims=True)
    loss = np.mean(np.log(total) - of_targets)
    probabilities /= total

    def backward(d_loss: float = 1.0) -> Array:  # softmax(logits) - one_hot(target), over the number of targets
        d_logits = probabilities.copy()
        rows = d_logits.reshape(-1, d_logits.shape[-1])
        rows[np.arange(len(rows)), targets.reshape(-1)] -= 1
        d_logits *= d_loss / targets.size
        return d_logits

    return float(loss), backward


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
    drop = partial(dropout, rate=dropout_rate, rng=rng)
    logits, back_logits = gpt2_logits(window[..., :-1], **params, n_head=n_head, drop=drop)
    loss, back_loss = cross_entropy(logits, window[..., 1:])

    def backward(d_loss: float, grads: dict) -> None:
        back_logits(back_loss(d_loss), grads)

    return loss, backward
