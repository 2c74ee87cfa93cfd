"""A step of training: the gradient of a batch, on all cores, and AdamW, on one vector of all weights."""

import math
from concurrent.futures import Executor

import numpy as np
from numpy import ndarray as Array

from backprop import gpt2_loss
from engine.threads import on_all_cores
from store.params import flatten, map_leaves, tensor_name

BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0
WARM_UP, LAST_RATE = 0.03, 0.05  # the warm-up's share of the training; the last learning rate's share of the highest


def initialize(params: dict, rng: np.random.Generator) -> None:
    """GPT-2's initial weights, in place (GPT-2 paper, section 2.3; the numbers are those of its code)."""
    n_layer = len(params["blocks"])

    def fill(path: tuple, array: Array) -> None:
        if array.ndim == 1:
            array[...] = path[-1] == "g"  # gains are 1, biases 0
        elif "c_proj" in path:  # 2 n_layer of these add to the residual stream, which should not grow with the layers
            array[...] = rng.normal(0, 0.02 / math.sqrt(2 * n_layer), array.shape)
        else:
            array[...] = rng.normal(0, 0.01 if path == ("wpe",) else 0.02, array.shape)

    map_leaves(fill, params)


def weight_decay(shapes: dict) -> Array:
    """The rate at which each weight decays, as one vector: matrices do, gains and biases do not."""
    leaves = flatten(shapes, tensor_name).values()
    return np.concatenate([np.full(math.prod(s), WEIGHT_DECAY if len(s) > 1 else 0, np.float32) for s in leaves])


def learning_rate_at(progress: float, peak: float) -> float:
    """Linear warm-up to `peak`, then a half cosine; `progress` is the share of the training that is done."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1)))
    return peak * (LAST_RATE + (1 - LAST_RATE) * cosine)


def clip_gradient(gradient: Array) -> float:
    """Scale the gradient down to the norm MAX_NORM, in place, if it is longer; the norm that it had."""
    norm = math.sqrt(gradient @ gradient)
    if norm > MAX_NORM:
        gradient *= MAX_NORM / norm
    return norm


def adamw(weights: Array, gradient: Array, m: Array, v: Array, decay: Array, step: int, learning_rate: float) -> None:
    """Update vectors of weights and moments in place; steps count from 1 (Loshchilov and Hutter 2019, algorithm 2)."""
    beta_1, beta_2 = BETAS
    for start in range(0, len(weights), 2**16):  # in pieces that stay in the processor's cache
        part = slice(start, start + 2**16)
        g = gradient[part]
        m[part] += (1 - beta_1) * (g - m[part])
        v[part] += (1 - beta_2) * (g * g - v[part])
        weights[part] *= 1 - learning_rate * decay[part]
        weights[part] -= learning_rate / (1 - beta_1**step) * m[part] / (np.sqrt(v[part] / (1 - beta_2**step)) + 1e-8)


def compute_gradient(
    windows: Array, params: dict, n_head: int, dropout: float, seed: tuple, shares: list, pool: Executor
) -> tuple[float, Array]:
    """The mean loss of `windows` [n_batch, n_seq + 1] and its gradient, as one vector.

    Each thread takes its windows one at a time, so that activations stay in the processor's cache, and adds up their
    gradients in a vector of its own: `shares` has each vector and its `view_as`.
    """

    def work(i: int) -> float:
        vector, grads = shares[i]
        vector[:] = 0
        total = 0.0
        for n in range(i, len(windows), len(shares)):
            rng = np.random.default_rng((*seed, n + 1))  # of each window, whichever thread has it; 0 is `seed` itself
            loss, backward = gpt2_loss(windows[n], params, n_head, dropout, rng)
            backward(1 / len(windows), grads)
            total += loss
        return total / len(windows)

    loss = sum(on_all_cores(work, range(len(shares)), pool=pool))
    (gradient, _), *others = shares
    for vector, _ in others:
        gradient += vector
    return loss, gradient
