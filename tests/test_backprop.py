"""Compare every derivative with finite differences in float64, and the whole gradient with PyTorch's autograd."""

from functools import partial

import numpy as np
import pytest

import backprop
import gpt2
from helpers.golden import GRADIENT_HPARAMS, golden, gradient_inputs, reference_gradient
from helpers.models import TINY, random_params
from store.params import flatten, map_leaves, param_shapes, tensor_name, view_as

TIGHT = {"n_vocab": 11, "n_ctx": 5, "n_embd": 6, "n_head": 2, "n_layer": 2}
BLOCK = random_params(TIGHT, dtype=np.float64)["blocks"][0]


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape)


def drop(x, rate=0.3):
    """Dropout that drops the same numbers each time."""
    return backprop.dropout(x, rate, np.random.default_rng(0))


def check_gradients(forward, x, params):
    """Compare `backward` of forward(x, params) with central differences, for x and for every parameter.

    The loss is the result times fixed random numbers, summed, so that no two derivatives are equal.
    """
    y, backward = forward(x, params)
    weighting = draw(*np.shape(y), seed=1)
    grads = map_leaves(lambda _, array: np.full_like(array, 3.0), params)  # backward must add to this
    d_x = backward(weighting, grads) if params else backward(weighting)
    found = {name: grad - 3 for name, grad in flatten(grads, str).items()} | ({"x": d_x} if d_x is not None else {})
    arrays = flatten(params, str) | ({"x": x} if d_x is not None else {})
    for name, array in arrays.items():
        expected = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            before = array[i]
            for step in (1e-5, -1e-5):
                array[i] = before + step
                expected[i] += np.sum(forward(x, params)[0] * weighting) / (2 * step)
            array[i] = before
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)


IDS = np.array([[3, 1, 3, 0], [3, 2, 2, 1]])
OPERATIONS = {  # functions of x [..., 4, 6] and params
    "gelu": (lambda x, p: backprop.gelu(x), {}),
    "layer_norm": (lambda x, p: backprop.layer_norm(x, **p), {"g": draw(6, seed=2), "b": draw(6, seed=3)}),
    "linear": (lambda x, p: backprop.linear(x, **p), {"w": draw(6, 7, seed=2), "b": draw(7, seed=3)}),
    "dropout": (lambda x, p: drop(x), {}),
    "mha": (lambda x, p: backprop.mha(x, **p, n_head=2, drop=drop), BLOCK["attn"]),
    "ffn": (lambda x, p: backprop.ffn(x, **p), BLOCK["mlp"]),
    "transformer_block": (lambda x, p: backprop.transformer_block(x, **p, n_head=2, drop=drop), BLOCK),
    "embedding": (lambda x, p: backprop.embedding(IDS, **p), {"wte": draw(5, 6, seed=2), "wpe": draw(7, 6, seed=3)}),
    "tied_output": (lambda x, p: backprop.tied_output(x, **p), {"wte": draw(7, 6, seed=2)}),
    "cross_entropy": (lambda x, p: backprop.cross_entropy(x, np.indices(x.shape[:-1])[-1]), {}),
}


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_of_an_operation_is_its_derivative(name, batch):
    forward, params = OPERATIONS[name]
    check_gradients(forward, 2 * draw(*batch, 4, 6) + 0.5, params)


def test_backward_of_the_whole_model_with_dropout_is_its_derivative():
    params, window = random_params(TIGHT, dtype=np.float64), np.array([[3, 1, 3, 0, 10], [2, 2, 7, 9, 1]])
    check_gradients(lambda x, p: backprop.gpt2_loss(window, p, 2, 0.2, np.random.default_rng(0)), None, params)


def test_cross_entropy_is_the_mean_of_the_negative_log_probabilities():
    logits, targets = draw(2, 4, 6), np.array([[0, 5, 2, 2], [1, 1, 3, 4]])
    probabilities = gpt2.softmax(logits)
    expected = -np.mean([np.log(probabilities[i, j, targets[i, j]]) for i in range(2) for j in range(4)])
    assert backprop.cross_entropy(logits, targets)[0] == pytest.approx(expected, rel=1e-12)
    with np.errstate(over="raise", invalid="raise"):
        assert backprop.cross_entropy(1e4 * logits, targets)[0] > 1000  # exp of these logits would overflow


@pytest.mark.parametrize("shape", [(17,), (3, 32)])
@pytest.mark.parametrize("scale", [1, 1e6])  # with large attention scores, an error in the mask shows
def test_logits_equal_those_of_gpt2(tiny_params, shape, scale):
    ids = np.random.RandomState(0).randint(0, 300, shape)
    params = map_leaves(lambda path, array: array * np.float32(scale if "c_attn" in path else 1), tiny_params)
    logits, _ = backprop.gpt2_logits(ids, **params, n_head=4, drop=partial(drop, rate=0))
    expected = gpt2.gpt2(ids, **params, n_head=4)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 1e-5 * np.ptp(expected)


def test_everything_stays_float32(tiny_params, monkeypatch):
    results = []

    def spy(operation):
        def spied(*args, **kwargs):
            y, backward = operation(*args, **kwargs)
            results.append(y)
            return y, lambda *gradients: (results.append(d_x := backward(*gradients)), d_x)[1]

        return spied

    for name in [*OPERATIONS, "attention"]:
        monkeypatch.setattr(backprop, name, spy(getattr(backprop, name)))
    window = np.random.RandomState(0).randint(0, 300, (2, 20))
    _, backward = backprop.gpt2_loss(window, tiny_params, 4, 0.1, np.random.default_rng(0))
    backward(0.5, map_leaves(lambda _, array: np.zeros_like(array), tiny_params))
    arrays = [array for result in results for array in (result if isinstance(result, tuple) else [result])]
    assert {array.dtype for array in arrays if np.ndim(array)} == {np.dtype(np.float32)}


def test_dropout_drops_the_share_and_keeps_the_mean():
    x = np.ones((500, 500), np.float32)
    y, backward = backprop.dropout(x, 0.25, np.random.default_rng(0))
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.005)
    assert np.unique(y).tolist() == [0, np.float32(1 / 0.75)]
    assert np.array_equal(backward(x), y)


def test_dropout_applies_to_embeddings_attention_weights_and_the_outputs_of_both_parts(tiny_params, monkeypatch):
    dropout, shapes = backprop.dropout, []
    monkeypatch.setattr(backprop, "dropout", lambda x, **options: (shapes.append(x.shape), dropout(x, **options))[1])
    backprop.gpt2_loss(np.arange(21), tiny_params, 4, 0.1, np.random.default_rng(0))
    assert shapes == [(20, 48)] + TINY["n_layer"] * [(4, 20, 20), (20, 48), (20, 48)]


def assert_gradient(params, window, n_head, expected_loss, expected):
    grads = map_leaves(lambda _, array: np.zeros_like(array), params)
    loss, backward = backprop.gpt2_loss(window, params, n_head)
    backward(1.0, grads)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in flatten(grads, tensor_name).items():
        assert np.linalg.norm(grad - expected[name]) < 1e-4 * np.linalg.norm(expected[name]), name


def test_gradient_equals_the_recorded_one_of_pytorch():
    expected = flatten(view_as(param_shapes(GRADIENT_HPARAMS), golden()["gradient"]), tensor_name)
    assert_gradient(*gradient_inputs(), GRADIENT_HPARAMS["n_head"], float(golden()["gradient-loss"]), expected)


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_that_of_pytorch(seed):
    hparams = {"n_vocab": 300, "n_ctx": 64, "n_embd": 48, "n_head": 4, "n_layer": 3}
    params, window = random_params(hparams, seed), np.random.RandomState(seed).randint(0, 300, (3, 50))
    assert_gradient(params, window, hparams["n_head"], *reference_gradient(hparams, params, window))
