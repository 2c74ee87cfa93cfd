"""The results of transformers' GPT2LMHeadModel: computed now, or recorded in tests/golden.npz by dev/make_golden.py.

Weights and inputs come from seeds and from a random generator that NumPy promises never to change.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from helpers.models import random_params
from store.params import flatten, tensor_name

PATH = Path(__file__).parents[1] / "golden.npz"


class Case(NamedTuple):
    n_layer: int
    n_embd: int
    n_head: int
    n_ctx: int
    n_seq: int
    n_vocab: int = 300

    @property
    def hparams(self) -> dict:
        return {name: getattr(self, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}

    @property
    def seed(self) -> int:
        return self.n_layer * 1000 + self.n_seq

    @property
    def positions(self) -> list[int]:
        """The positions whose logits are recorded: the first, the middle and the last."""
        return sorted({0, self.n_seq // 2, self.n_seq - 1})

    def __str__(self) -> str:
        return "-".join(map(str, self))


CASES = [
    Case(1, 48, 1, 16, 1), Case(1, 48, 3, 16, 16), Case(2, 48, 12, 64, 33), Case(12, 96, 6, 64, 64),
    Case(3, 192, 4, 1024, 1000), Case(2, 768, 12, 128, 100),
]  # fmt: skip
TRACED = Case(2, 48, 3, 16, 10)  # all intermediate results of this case are recorded
GRADIENT_HPARAMS = {"n_vocab": 60, "n_ctx": 12, "n_embd": 16, "n_head": 4, "n_layer": 2}


def inputs_of(case: Case) -> np.ndarray:
    return np.random.RandomState(case.seed).randint(0, case.n_vocab, case.n_seq)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(PATH) as arrays:
        return dict(arrays)


def reference_model(hparams: dict, params: dict):
    """transformers' GPT-2 with the weights `params`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"], **sizes)).eval()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in flatten(params, tensor_name).items()}
    model.transformer.load_state_dict(tensors)
    model.tie_weights()
    return model


def reference_trace(case: Case, params: dict) -> dict[str, np.ndarray]:
    """The intermediate results of a model, named as in lens.py."""
    import torch

    model = reference_model(case.hparams, params)
    model.set_attn_implementation("eager")  # other implementations do not return attention weights
    hooked = {"mha": [], "ffn": [], "activations": []}
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda module, inputs, output: hooked["mha"].append(output[0]))
        block.mlp.register_forward_hook(lambda module, inputs, output: hooked["ffn"].append(output))
        block.mlp.act.register_forward_hook(lambda module, inputs, output: hooked["activations"].append(output))
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: hooked.update(last=inputs[0]))
    with torch.no_grad():
        output = model(torch.tensor(inputs_of(case))[None], output_hidden_states=True, output_attentions=True)
    *residual, hidden_states = output.hidden_states
    return {
        **{name: torch.stack(hooked[name])[:, 0].numpy() for name in ("mha", "ffn", "activations")},
        "attention": torch.stack(output.attentions)[:, 0].numpy(),
        "residual": torch.stack([*residual, hooked["last"]])[:, 0].numpy(),
        "hidden_states": hidden_states[0].numpy(),
        "logits": output.logits[0].numpy(),
    }


def gradient_inputs() -> tuple[dict, np.ndarray]:
    """The weights and the window [n_batch, n_seq + 1] of the recorded gradient."""
    window = np.random.RandomState(0).randint(0, GRADIENT_HPARAMS["n_vocab"], (3, 10))
    return random_params(GRADIENT_HPARAMS), window


def reference_gradient(hparams: dict, params: dict, window: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of predicting each token of `window`, and its gradient by tensor name, from PyTorch's autograd."""
    import torch

    model = reference_model(hparams, params)
    logits = model(torch.tensor(window[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(window[:, 1:]).flatten())
    loss.backward()
    return loss.item(), {name: tensor.grad.numpy() for name, tensor in model.transformer.named_parameters()}
