"""The parameters: their number, their names in files, and the check that they fit hparams.json."""

import numpy as np
import pytest

from gpt2 import gpt2
from helpers.models import TINY, assert_same_params
from store.params import checkpoint_name, count_params, flatten, map_params, param_shapes, tensor_name
from store.tensors import WEIGHTS


@pytest.mark.parametrize(("n_embd", "n_head", "n_layer", "n_params"), [
    (768, 12, 12, 124_439_808), (1024, 16, 24, 354_823_168), (1280, 20, 36, 774_030_080), (1600, 25, 48, 1_557_611_200),
])  # fmt: skip
def test_the_released_models_have_the_published_number_of_parameters(n_embd, n_head, n_layer, n_params):
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    assert count_params(param_shapes(hparams)) == n_params


def test_parameters_have_the_names_in_files():
    shapes = flatten(param_shapes(TINY), tensor_name)
    assert len(shapes) == 2 + 12 * TINY["n_layer"] + 2
    assert (shapes["wte.weight"], shapes["h.1.attn.c_attn.weight"]) == ((300, 48), (48, 144))
    assert (shapes["h.0.mlp.c_proj.bias"], shapes["ln_f.weight"]) == ((48,), (48,))
    assert {"model/wte", "model/h1/attn/c_attn/w", "model/ln_f/b"} <= set(flatten(param_shapes(TINY), checkpoint_name))


def test_weights_are_mapped_as_read_only_float32(tiny_model, tiny_params):
    params = map_params(tiny_model / WEIGHTS, param_shapes(TINY))
    assert_same_params(params, tiny_params)
    for array in flatten(params, tensor_name).values():
        assert (array.dtype, array.flags.owndata, array.flags.c_contiguous) == (np.float32, False, True)
    with pytest.raises(ValueError, match="read-only"):
        params["wte"][0] = 0
    assert gpt2([1, 2], **params, n_head=TINY["n_head"]).shape == (2, 300)
