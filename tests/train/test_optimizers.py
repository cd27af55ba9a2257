"""The Muon optimizer and the triangular learning rate."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from cnnpipe.train.backend import keras
from cnnpipe.train.optimizers import Muon, TriangularRate

Values = npt.NDArray[np.float32]


def random_values(*shape: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def steps(optimizer: keras.optimizers.Optimizer, start: Values, gradients: list[Values]) -> list[Values]:
    """Return the values of a variable after each gradient."""
    variable = keras.Variable(start)
    values = []
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        values.append(np.array(variable))
    return values


@pytest.mark.parametrize("shape", [(3, 3, 4, 16), (3, 3, 2, 40), (1, 1, 5, 5)])
def test_updates_of_convolutions_go_equally_far_in_all_directions(shape: tuple[int, ...]) -> None:
    kernel, gradient = random_values(*shape), random_values(*shape, seed=1)
    (after,) = steps(Muon(0.5, scale=0.2), kernel, [gradient])
    scaled = kernel * np.sqrt(shape[-1]) / np.linalg.norm(kernel)
    step = (scaled - after).reshape(-1, shape[-1]) / (0.5 * 0.2)
    values = np.linalg.svd(step, compute_uv=False)
    assert 0.5 < values.min() <= values.max() < 1.3
    original = np.linalg.svd(gradient.reshape(-1, shape[-1]), compute_uv=False)
    assert values.max() / values.min() < original.max() / original.min()
    assert np.sum(step * gradient.reshape(step.shape)) > 0  # downhill


def test_the_scale_of_a_kernel_and_of_its_gradient_makes_no_difference() -> None:
    kernel, gradient = random_values(3, 3, 4, 8), random_values(3, 3, 4, 8, seed=1)
    (after,) = steps(Muon(0.3), kernel, [gradient])
    (of_others,) = steps(Muon(0.3), kernel * np.float32(50), [gradient / np.float32(1000)])
    np.testing.assert_allclose(of_others, after, atol=1e-5)
    (unmoved,) = steps(Muon(0.0), kernel, [gradient])
    assert np.sum(np.square(unmoved)) == pytest.approx(8, rel=1e-5)


def test_a_gradient_of_nothing_moves_nothing() -> None:
    kernel = random_values(3, 3, 4, 8)
    first, second = steps(Muon(0.3), kernel, [np.zeros_like(kernel)] * 2)
    np.testing.assert_allclose(second, first, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (4, 6)])
def test_other_weights_take_the_steps_of_sgd(shape: tuple[int, ...]) -> None:
    start, gradients = random_values(*shape), [random_values(*shape, seed=seed) for seed in (1, 2, 3)]
    expected = steps(keras.optimizers.SGD(0.3, 0.8, nesterov=True), start, gradients)
    for value, of_sgd in zip(steps(Muon(0.3, 0.8), start, gradients), expected, strict=True):
        np.testing.assert_array_equal(value, of_sgd)


def test_the_momentum_of_a_convolution_carries_on() -> None:
    kernel, large, small = (random_values(3, 3, 4, 8, seed=seed) for seed in range(3))
    gradients = [large, small / np.float32(100)]
    first, second = steps(Muon(0.1, momentum=0.8), kernel, gradients)
    assert np.sum((first - second) * large) > np.sum((first - second) * small)
    first, second = steps(Muon(0.1, momentum=1e-4), kernel, gradients)
    assert np.sum((first - second) * large) < np.sum((first - second) * small)


def test_weight_decay_shrinks_matrices_and_leaves_vectors() -> None:
    rate = TriangularRate(0.8)
    rate.steps.assign(100)
    optimizer = Muon(rate, weight_decay=5e-3)
    matrix, vector = random_values(4, 3), random_values(3)
    variables = [keras.Variable(matrix), keras.Variable(vector)]
    optimizer.apply([keras.ops.zeros(variable.shape) for variable in variables], variables)
    np.testing.assert_allclose(np.array(variables[0]), matrix * (1 - 0.08 * 5e-3), rtol=1e-6)
    np.testing.assert_array_equal(np.array(variables[1]), vector)


def test_triangular_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rate = TriangularRate(0.4)
    rate.steps.assign(100)
    rates = [float(rate(step)) for step in range(101)]
    assert int(np.argmax(rates)) == 10
    assert max(rates) == pytest.approx(0.4)
    assert (rates[0], rates[100]) == pytest.approx((0.04, 0.0))
    assert all(np.diff(rates[:11]) > 0)
    assert all(np.diff(rates[10:]) < 0)


def test_a_rate_follows_a_changed_number_of_steps_without_compiling_again() -> None:
    rate, tracings = TriangularRate(0.4), []

    @tf.function  # type: ignore[untyped-decorator]
    def compiled(step: tf.Tensor) -> tf.Tensor:
        tracings.append(step)
        return rate(step)

    for steps in (100, 50):
        rate.steps.assign(steps)
        assert float(compiled(tf.constant(steps // 2))) == pytest.approx(0.4 * 0.5 / 0.9)
        assert float(compiled(tf.constant(steps))) == pytest.approx(0.0, abs=1e-6)
    assert len(tracings) == 1
