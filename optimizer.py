"""A step of training: compute a batch's gradient on all cores, then update one vector of all weights with AdamW."""

import math
from concurrent.futures import Executor

import numpy as np
from numpy import ndarray as Array

from backprop import gpt2_loss
from engine.threads import map_on_all_cores
from store.params import flatten, map_leaves, tensor_name

BETA_1, BETA_2, WEIGHT_DECAY, MAX_NORM = 0.9, 0.95, 0.1, 1.0
WARM_UP, LAST_RATE = 0.03, 0.05  # the warm-up as a share of the training; the last learning rate as a share of the peak


def initialize(params: dict, rng: np.random.Generator) -> None:
    """Set GPT-2's initial weights, in place (GPT-2 paper, section 2.3; the numbers are from its code)."""

    def fill(path: tuple, array: Array) -> None:
        std = 0.01 if path == ("wpe",) else 0.02
        if "c_proj" in path:  # 2 n_layer of these add to the residual stream, whose size should not depend on n_layer
            std /= math.sqrt(2 * len(params["blocks"]))
        array[...] = rng.normal(0, std, array.shape) if array.ndim > 1 else path[-1] == "g"  # gains are 1, biases 0

    map_leaves(fill, params)


def weight_decay(shapes: dict) -> Array:
    """The decay rate of each weight, as one vector. Matrices decay; gains and biases do not."""
    leaves = flatten(shapes, tensor_name).values()
    return np.concatenate([np.full(math.prod(s), WEIGHT_DECAY if len(s) > 1 else 0, np.float32) for s in leaves])


def learning_rate_at(progress: float, peak: float) -> float:
    """A linear warm-up to `peak`, then half a cosine. `progress` is the share of the training that is done."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1)))
    return peak * (LAST_RATE + (1 - LAST_RATE) * cosine)


def clip_gradient(gradient: Array) -> float:
    """Scale the gradient down, in place, to a norm of at most MAX_NORM. Return the norm that it had before."""
    norm = math.sqrt(gradient @ gradient)
    if norm > MAX_NORM:
        gradient *= MAX_NORM / norm
    return norm


def adamw(weights: Array, gradient: Array, m: Array, v: Array, decay: Array, step: int, learning_rate: float) -> None:
    """Update weights and moments (m, v) in place (Loshchilov and Hutter 2019, algorithm 2); steps count from 1."""
    for start in range(0, len(weights), 2**16):  # in pieces that stay in the processor's cache
        part = slice(start, start + 2**16)
        m[part] += (1 - BETA_1) * (gradient[part] - m[part])
        v[part] += (1 - BETA_2) * (gradient[part] ** 2 - v[part])
        weights[part] *= 1 - learning_rate * decay[part]
        weights[part] -= learning_rate / (1 - BETA_1**step) * m[part] / (np.sqrt(v[part] / (1 - BETA_2**step)) + 1e-8)


def compute_gradient(
    windows: Array, params: dict, n_head: int, dropout: float, seed: tuple, buffers: list, pool: Executor
) -> tuple[float, Array]:
    """The mean loss of `windows` [n_batch, n_seq + 1] and its gradient, as one vector: the first one in `buffers`."""

    def add_gradients(i: int) -> float:
        vector, grads = buffers[i]  # this thread's share of the gradient, and a nested view of it (`view_as`)
        vector[:], total = 0, 0.0
        for n in range(i, len(windows), len(buffers)):  # one by one, so that activations stay in the processor's cache
            rng = np.random.default_rng((*seed, n + 1))  # whatever the number of threads; (*seed, 0) would equal `seed`
            loss, backward = gpt2_loss(windows[n], params, n_head, dropout, rng)
            backward(1 / len(windows), grads)
            total += loss
        return total / len(windows)

    loss = sum(map_on_all_cores(add_gradients, range(len(buffers)), pool))
    gradient = buffers[0][0]
    for vector, _ in buffers[1:]:
        gradient += vector
    return loss, gradient
