"""Compare the parts of a training step with independent formulas and with PyTorch."""

import numpy as np
import pytest

import optimizer
from backprop import gpt2_loss
from engine.threads import one_thread_per_core
from helpers.models import TINY
from store.params import count_params, flatten, param_shapes, tensor_name, view_as

SHAPES = param_shapes(TINY)


def test_initial_weights_are_those_of_gpt2():
    hparams = {"n_vocab": 500, "n_ctx": 300, "n_embd": 192, "n_head": 4, "n_layer": 8}
    params = view_as(param_shapes(hparams), np.full(4_000_000, np.nan, np.float32))
    optimizer.initialize(params, np.random.default_rng(0))
    for name, array in flatten(params, tensor_name).items():
        if array.ndim == 1:
            assert np.all(array == (1 if "ln_" in name and name.endswith("weight") else 0)), name
        else:
            std = 0.01 if name == "wpe.weight" else 0.02 / 4 if "c_proj" in name else 0.02
            assert np.std(array) == pytest.approx(std, rel=0.02), name
            assert abs(np.mean(array)) < 0.02 * std, name


def test_learning_rate_warms_up_and_then_follows_a_cosine():
    warm_up, last = optimizer.WARM_UP, optimizer.LAST_RATE
    points = {0: 0.01, warm_up / 2: 0.5, warm_up: 1, (1 + warm_up) / 2: (1 + last) / 2, 1: last, 1.1: last}
    points[warm_up + (1 - warm_up) / 4] = last + (1 - last) * (1 + np.sqrt(0.5)) / 2
    for progress, share in points.items():
        assert optimizer.learning_rate_at(progress, 2.0) == pytest.approx(2.0 * share)
    rates = [optimizer.learning_rate_at(progress, 2.0) for progress in np.linspace(warm_up, 1, 1001)]
    assert np.all(np.diff(rates) < 0)


@pytest.mark.parametrize(("norm", "clipped"), [(5, [0.6, 0.8]), (0.5, [0.3, 0.4])])
def test_gradient_is_clipped_to_norm_1_only_if_it_is_longer(norm, clipped):
    gradient = np.array([0.6 * norm, 0.8 * norm], np.float32)
    assert optimizer.clip_gradient(gradient) == pytest.approx(norm)
    assert gradient == pytest.approx(clipped)


def test_only_matrices_decay():
    decay = optimizer.weight_decay(SHAPES)
    assert decay.dtype == np.float32
    for name, array in flatten(view_as(SHAPES, decay), tensor_name).items():
        assert np.all(array == np.float32(0.1 if array.ndim == 2 else 0)), name


def adamw_weights(weights, gradients, rates, decay):
    """The weights after one step for each gradient, in float32."""
    m, v = np.zeros((2, len(weights)), np.float32)
    vectors = {"weights": weights.astype(np.float32), "m": m, "v": v}
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        optimizer.adamw(**vectors, gradient=gradient.astype(np.float32), decay=decay, step=step, learning_rate=rate)
    assert all(vector.dtype == np.float32 for vector in vectors.values())
    return vectors["weights"]


def test_adamw_follows_the_paper():
    """Algorithm 2 of Loshchilov and Hutter in float64, on a vector longer than one piece."""
    random, n, rates = np.random.RandomState(0), 2**16 + 5, [0.01, 0.02, 0.03, 0.04, 0.05]
    weights, decay = random.standard_normal(n), 0.1 * random.randint(0, 2, n)
    gradients = [0.1 * random.standard_normal(n) for _ in rates]
    found = adamw_weights(weights, gradients, rates, decay.astype(np.float32))
    m, v = np.zeros(n), np.zeros(n)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        corrected = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        weights = weights - rate * (corrected + decay * weights)
    np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.reference
def test_adamw_equals_that_of_pytorch():
    torch = pytest.importorskip("torch")
    random = np.random.RandomState(0)
    weights, gradients = random.standard_normal(1000), random.standard_normal((5, 1000))
    found = adamw_weights(weights, gradients, [0.01] * 5, np.full(1000, 0.1, np.float32))
    parameter = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float32))
    reference = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        reference.step()
    np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def loss_and_gradient(params, n_threads, dropout=0, seed=(1, 2)):
    windows = np.random.RandomState(0).randint(0, 300, (5, 20))
    vectors = np.full((n_threads, count_params(SHAPES)), np.nan, np.float32)  # old contents must not matter
    buffers = [(vector, view_as(SHAPES, vector)) for vector in vectors]
    with one_thread_per_core() as pool:
        loss, gradient = optimizer.compute_gradient(windows, params, TINY["n_head"], dropout, seed, buffers, pool)
    return windows, loss, gradient


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_gradient_of_a_batch_is_the_mean_over_its_windows(tiny_params, n_threads):
    windows, loss, gradient = loss_and_gradient(tiny_params, n_threads)
    expected = np.zeros_like(gradient)
    expected_loss, backward = gpt2_loss(windows, tiny_params, TINY["n_head"])  # all at once
    backward(1.0, view_as(SHAPES, expected))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def test_dropout_depends_on_the_seed_but_not_on_the_number_of_threads(tiny_params):
    losses = [loss_and_gradient(tiny_params, *options)[1] for options in [(1, 0.3), (2, 0.3), (1, 0.3, (1, 3))]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
