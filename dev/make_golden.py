"""Write tests/golden.npz, the results of transformers' GPT2LMHeadModel, for tests on machines without PyTorch.

python dev/make_golden.py        # needs requirements-reference.txt
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from helpers.golden import (
    CASES,
    GRADIENT_HPARAMS,
    PATH,
    TRACED,
    gradient_inputs,
    inputs_of,
    reference_gradient,
    reference_model,
    reference_trace,
)
from helpers.models import random_params
from store.params import flatten, tensor_name


def main() -> None:
    logits = {}
    for case in CASES:
        model = reference_model(case.hparams, random_params(case.hparams, case.seed))
        with torch.no_grad():
            logits[str(case)] = model(torch.tensor(inputs_of(case))[None]).logits[0].numpy()[case.positions]
    trace = reference_trace(TRACED, random_params(TRACED.hparams, TRACED.seed))
    loss, grads = reference_gradient(GRADIENT_HPARAMS, *gradient_inputs())
    names = flatten(gradient_inputs()[0], tensor_name)  # the gradient has the parameters' order
    gradient = np.concatenate([grads[name].ravel() for name in names])
    traced = {f"trace-{name}": array for name, array in trace.items()}
    np.savez_compressed(PATH, **logits, **traced, **{"gradient": gradient, "gradient-loss": loss})


if __name__ == "__main__":
    main()
