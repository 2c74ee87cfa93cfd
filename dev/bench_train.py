"""Compare training speed with PyTorch: the same model, batch, precision and number of threads, measured in turn.

    python dev/bench_train.py        # needs requirements-reference.txt

The shape is that of models/shakespeare. One PyTorch model computes attention one product at a time, as gpt2.py does.
The other uses PyTorch's fused function.
"""

import math
import statistics
import sys
import time
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.threads import n_blas_threads, one_thread_per_core
from optimizer import adamw, clip_gradient, compute_gradient, initialize, weight_decay
from store.params import count_params, param_shapes, view_as

HPARAMS = {"n_vocab": 1024, "n_ctx": 256, "n_embd": 192, "n_head": 4, "n_layer": 4}
BATCH_SIZE, DROPOUT, RATE = 16, 0.2, 1e-3
ROUNDS, STEPS = 7, 5


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, fused: bool) -> None:
        super().__init__()
        self.n_head, self.fused = n_head, fused
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.attn_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.c_fc, self.mlp_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)
        self.drop = nn.Dropout(DROPOUT)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        n_batch, n_seq, n_embd = x.shape
        qkv = self.c_attn(x).view(n_batch, n_seq, 3, self.n_head, n_embd // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of [n_batch, n_head, n_seq, n_embd/n_head]
        if self.fused:
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=DROPOUT)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(n_embd // self.n_head)
            mask = torch.ones(n_seq, n_seq, dtype=torch.bool).triu(1)
            heads = self.drop(scores.masked_fill(mask, -math.inf).softmax(-1)) @ v
        return self.attn_proj(heads.transpose(1, 2).reshape(x.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.ln_1(x)))
        return x + self.drop(self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")))


class GPT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        n_embd = HPARAMS["n_embd"]
        self.wte, self.wpe = nn.Embedding(HPARAMS["n_vocab"], n_embd), nn.Embedding(HPARAMS["n_ctx"], n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, HPARAMS["n_head"], fused) for _ in range(HPARAMS["n_layer"])))
        self.ln_f, self.drop = nn.LayerNorm(n_embd), nn.Dropout(DROPOUT)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.wte(ids) + self.wpe.weight[: ids.shape[1]])
        return self.ln_f(self.blocks(x)) @ self.wte.weight.T


def torch_trainer(fused: bool):
    """A function that trains a PyTorch model on one batch."""
    model = GPT(fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step(windows: np.ndarray) -> None:
        ids = torch.from_numpy(windows)
        loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def numpy_trainer(n_threads: int, pool: Executor):
    """A function that trains this project's model on one batch."""
    shapes = param_shapes(HPARAMS)
    weights, m, v, *gradients = np.zeros((3 + n_threads, count_params(shapes)), np.float32)
    params, decay = view_as(shapes, weights), weight_decay(shapes)
    initialize(params, np.random.default_rng(0))
    buffers = [(vector, view_as(shapes, vector)) for vector in gradients]

    def step(windows: np.ndarray) -> None:
        _, gradient = compute_gradient(windows, params, HPARAMS["n_head"], DROPOUT, (0, 1), buffers, pool)
        clip_gradient(gradient)
        adamw(weights, gradient, m, v, decay, 1, RATE)

    return step


def main() -> None:
    n_threads = n_blas_threads()
    torch.set_num_threads(n_threads)
    n_tokens = STEPS * BATCH_SIZE * HPARAMS["n_ctx"]
    windows = np.random.default_rng(0).integers(0, HPARAMS["n_vocab"], (STEPS, BATCH_SIZE, HPARAMS["n_ctx"] + 1))
    speeds: dict[str, list[float]] = {}
    with one_thread_per_core() as pool:
        trainers = {
            "this project": numpy_trainer(n_threads, pool),
            "PyTorch, eager": torch_trainer(fused=False),
            "PyTorch, eager, fused attention": torch_trainer(fused=True),
        }
        for _ in range(1 + ROUNDS):
            for name, step in trainers.items():
                start = time.perf_counter()
                for batch in windows:
                    step(batch)
                speeds.setdefault(name, []).append(n_tokens / (time.perf_counter() - start))
    print(f"{HPARAMS}, batches of {BATCH_SIZE}, dropout {DROPOUT}, {n_threads} threads, float32")
    ours = statistics.median(speeds["this project"][1:])  # the first round warms up
    for name, figures in speeds.items():
        median = statistics.median(figures[1:])
        print(f"{name:32} {median:8,.0f} tokens/s   speed of this project, relative to it: {ours / median:.2f}")


if __name__ == "__main__":
    main()
