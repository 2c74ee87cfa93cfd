"""Every derivative against finite differences in float64, the whole gradient against PyTorch's autograd."""

from functools import partial

import numpy as np
import pytest

import backprop
import gpt2
from helpers import TINY, random_params
from make_golden import GRADIENT_HPARAMS, golden, gradient_inputs, reference_gradient
from train import view_as
from utils import flatten, map_leaves, param_shapes, tensor_name

TIGHT = {"n_vocab": 11, "n_ctx": 5, "n_embd": 6, "n_head": 2, "n_layer": 2}


def no_drop(x):
    return x, lambda d_y: d_y


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape)


def zeros_like(tree):
    return map_leaves(lambda _, array: np.zeros_like(array), tree)


def check_gradients(forward, x, params):
    """Compare `backward` of forward(x, params) with central differences, by x and by every parameter.

    The loss is the sum of the result times fixed random numbers, so that no two derivatives can be mixed up.
    """
    y, backward = forward(x, params)
    weighting = draw(*np.shape(y), seed=1)
    grads = map_leaves(lambda _, array: np.full_like(array, 3.0), params)  # backward must add to what is there
    d_x = backward(weighting, grads)
    found = {name: grad - 3 for name, grad in flatten(grads, str).items()} | ({"x": d_x} if d_x is not None else {})
    arrays = flatten(params, str) | ({"x": x} if d_x is not None else {})
    for name, array in arrays.items():
        expected = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            before = array[i]
            ends = []
            for step in (1e-5, -1e-5):
                array[i] = before + step
                ends.append(np.sum(forward(x, params)[0] * weighting))
            array[i] = before
            expected[i] = (ends[0] - ends[1]) / 2e-5
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)


def without_params(operation):
    """`operation` in the form that check_gradients takes."""

    def forward(x, params):
        y, backward = operation(x)
        return y, lambda d_y, grads: backward(d_y)

    return forward


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_gelu(batch):
    check_gradients(without_params(backprop.gelu), 2 * draw(*batch, 4, 5), {})


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_layer_norm(batch):
    params = {"g": draw(5, seed=2), "b": draw(5, seed=3)}
    check_gradients(lambda x, p: backprop.layer_norm(x, **p), 3 * draw(*batch, 4, 5) + 1, params)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_linear(batch):
    params = {"w": draw(5, 7, seed=2), "b": draw(7, seed=3)}
    check_gradients(lambda x, p: backprop.linear(x, **p), draw(*batch, 4, 5), params)


def test_dropout():
    def drop(x):
        return backprop.dropout(x, 0.4, np.random.default_rng(0))

    check_gradients(without_params(drop), draw(6, 7), {})


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("rate", [0, 0.3])
def test_attention(batch, rate):
    def forward(qkv, params):
        drop = partial(backprop.dropout, rate=rate, rng=np.random.default_rng(0))
        heads, backward = backprop.attention(*qkv, drop)
        return heads, lambda d_y, grads: np.stack(backward(d_y))

    check_gradients(forward, draw(3, *batch, 2, 5, 3), {})


@pytest.mark.parametrize("part", ["attn", "mlp", "block"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_parts_of_a_block(part, batch):
    block = random_params(TIGHT, dtype=np.float64)["blocks"][0]

    def forward(x, params):
        drop = partial(backprop.dropout, rate=0.3, rng=np.random.default_rng(0))
        if part == "attn":
            return backprop.mha(x, **params, n_head=2, drop=drop)
        if part == "mlp":
            return backprop.ffn(x, **params)
        return backprop.transformer_block(x, **params, n_head=2, drop=drop)

    check_gradients(forward, draw(*batch, 4, 6), block if part == "block" else block[part])


@pytest.mark.parametrize("ids", [[3, 1, 3, 0], [[3, 1, 3], [3, 2, 2]]])
def test_embedding(ids):
    params = {"wte": draw(5, 6, seed=2), "wpe": draw(7, 6, seed=3)}
    check_gradients(lambda x, p: backprop.embedding(np.array(ids), **p), None, params)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_tied_output(batch):
    params = {"wte": draw(7, 5, seed=2)}
    check_gradients(lambda x, p: backprop.tied_output(x, **p), draw(*batch, 4, 5), params)


@pytest.mark.parametrize("targets", [[3, 1, 0], [[3, 1, 0], [2, 2, 4]]])
def test_cross_entropy(targets):
    logits = 3 * draw(*np.shape(targets), 5)
    check_gradients(without_params(lambda x: backprop.cross_entropy(x, np.array(targets))), logits, {})


def test_whole_model_with_dropout():
    params, window = random_params(TIGHT, dtype=np.float64), np.array([[3, 1, 3, 0, 10], [2, 2, 7, 9, 1]])

    def forward(x, params):
        loss, backward = backprop.gpt2_loss(window, params, 2, 0.2, np.random.default_rng(0))
        return loss, backward

    check_gradients(forward, None, params)


def test_cross_entropy_is_the_mean_of_the_negative_log_probabilities():
    logits, targets = draw(2, 4, 6), np.array([[0, 5, 2, 2], [1, 1, 3, 4]])
    probabilities = gpt2.softmax(logits)
    expected = -np.mean([np.log(probabilities[i, j, targets[i, j]]) for i in range(2) for j in range(4)])
    assert backprop.cross_entropy(logits, targets)[0] == pytest.approx(expected, rel=1e-12)
    with np.errstate(over="raise", invalid="raise"):
        assert backprop.cross_entropy(1e4 * logits, targets)[0] > 1000  # logits that exp alone could not take


@pytest.mark.parametrize("shape", [(17,), (3, 32)])
def test_logits_are_those_of_gpt2(tiny_params, shape):
    ids = np.random.RandomState(0).randint(0, 300, shape)
    logits, _ = backprop.gpt2_logits(ids, **tiny_params, n_head=4, drop=no_drop)
    expected = gpt2.gpt2(ids, **tiny_params, n_head=4)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 1e-5 * np.ptp(expected)


def test_training_stays_float32(tiny_params):
    shapes = param_shapes({"n_vocab": 300, "n_ctx": 32, "n_embd": 48, "n_head": 4, "n_layer": 2})
    dtypes = set()

    def spy(operation):
        def spied(*args, **kwargs):
            y, backward = operation(*args, **kwargs)
            dtypes.add(np.asarray(y).dtype if isinstance(y, np.ndarray) else np.dtype(np.float32))

            def spied_backward(*gradients):
                d_x = backward(*gradients)
                dtypes.update(d.dtype for d in (d_x if isinstance(d_x, tuple) else [d_x]) if d is not None)
                return d_x

            return y, spied_backward

        return spied

    names = ("gelu", "layer_norm", "linear", "dropout", "attention", "mha", "ffn", "transformer_block", "embedding",
             "tied_output", "cross_entropy")  # fmt: skip
    vector = np.zeros(sum(array.size for array in flatten(tiny_params, str).values()), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(backprop, name, spy(getattr(backprop, name)))
        window = np.random.RandomState(0).randint(0, 300, (2, 20))
        _, backward = backprop.gpt2_loss(window, tiny_params, 4, 0.1, np.random.default_rng(0))
        backward(0.5, view_as(shapes, vector))
    assert dtypes == {np.dtype(np.float32)}


def test_backward_adds_to_the_gradients_and_scales_them(tiny_params):
    window = np.random.RandomState(0).randint(0, 300, (2, 20))
    grads, twice = zeros_like(tiny_params), zeros_like(tiny_params)
    _, backward = backprop.gpt2_loss(window, tiny_params, 4)
    backward(1.0, grads)
    backward(0.5, twice)
    backward(1.5, twice)
    for name, grad in flatten(twice, tensor_name).items():
        np.testing.assert_allclose(grad, 2 * flatten(grads, tensor_name)[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_dropout_drops_the_share_and_keeps_the_mean():
    x = np.ones((500, 500), np.float32)
    y, backward = backprop.dropout(x, 0.25, np.random.default_rng(0))
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.005)
    assert np.unique(y).tolist() == [0, np.float32(1 / 0.75)]
    assert np.array_equal(backward(x), y)


def test_dropout_is_of_embeddings_attention_weights_and_what_is_added_to_the_residual_stream(tiny_params, monkeypatch):
    original, shapes = backprop.dropout, []

    def dropout(x, rate, rng):
        shapes.append(x.shape)
        return original(x, rate, rng)

    monkeypatch.setattr(backprop, "dropout", dropout)
    backprop.gpt2_loss(np.arange(21), tiny_params, 4, 0.1, np.random.default_rng(0))
    assert shapes == [(20, 48)] + TINY["n_layer"] * [(4, 20, 20), (20, 48), (20, 48)]


def test_dropout_of_zero_changes_nothing_and_draws_nothing():
    x = draw(3, 4)
    assert backprop.dropout(x, 0, None)[0] is x


def gradient(params, window):
    grads = zeros_like(params)
    loss, backward = backprop.gpt2_loss(window, params, GRADIENT_HPARAMS["n_head"])
    backward(1.0, grads)
    return loss, grads


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_gradient_is_that_of_pytorch_as_recorded():
    loss, grads = gradient(*gradient_inputs())
    assert loss == pytest.approx(float(golden()["gradient-loss"]), rel=1e-5)
    expected = view_as(param_shapes(GRADIENT_HPARAMS), golden()["gradient"])
    for name, grad in flatten(grads, tensor_name).items():
        assert relative_error(grad, flatten(expected, tensor_name)[name]) < 1e-4, name


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_pytorch(seed):
    hparams = {"n_vocab": 300, "n_ctx": 64, "n_embd": 48, "n_head": 4, "n_layer": 3}
    params = random_params(hparams, seed)
    window = np.random.RandomState(seed).randint(0, 300, (3, 50))
    loss, expected = reference_gradient(hparams, params, window)
    grads = zeros_like(params)
    found_loss, backward = backprop.gpt2_loss(window, params, 4)
    backward(1.0, grads)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in flatten(grads, tensor_name).items():
        assert relative_error(grad, expected[name]) < 1e-4, name
