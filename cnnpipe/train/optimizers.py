"""The Muon optimizer and the triangular learning rate, which Keras does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cnnpipe.train.backend import keras

__all__ = ["Muon", "TriangularRate"]

_WARM_UP: Final = 0.1
"""Fraction of the training in which a triangular rate rises."""

_FIRST_FRACTION: Final = 0.1
"""Rate of the first step, as a fraction of the highest rate."""

_TINY: Final = 1e-14
"""Added to sums of squares, so that nothing is divided by zero."""

_ITERATIONS: Final = 3
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of a·s + b·s³ + c·s⁵, a polynomial that takes singular values in 0-1 to about 1 in a few iterations.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers", kellerjordan.github.io/posts/muon.
"""


class Muon(keras.optimizers.SGD):  # type: ignore[misc]
    """SGD with Nesterov momentum whose updates of convolution kernels are orthogonalised.

    A convolution's kernel is treated as a matrix, (height · width · channels in, channels out). Its update has the
    singular vectors of SGD's update, and singular values of about `scale` times the rate. Before each update the kernel
    is scaled to a mean sum of squares of 1 for each output channel, so that a rate means the same for every kernel at
    every step; the batch normalisation that follows restores the scale of the output. All other weights take the steps
    of SGD, and only matrices decay. Keras' own Muon leaves convolutions to AdamW.

    Source: Jordan et al. 2024 (see above); scaled kernels as in github.com/KellerJordan/cifar10-airbench.

    Args:
        scale: rate of convolutions, as a fraction of the learning rate.
    """

    def __init__(self, learning_rate: Any = 0.8, momentum: float = 0.8, scale: float = 1 / 8, **options: Any) -> None:
        super().__init__(learning_rate, momentum, **{**options, "nesterov": True})
        self.scale = scale

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        """Do nothing: `update_step` decays matrices, kernels are scaled, and vectors do not decay."""

    def _backend_update_step(
        self, grads: list[keras.KerasTensor], trainable_variables: list[keras.Variable], learning_rate: Any
    ) -> None:
        """Update all variables: the kernels of convolutions in one go, or one by one with several replicas."""
        pairs = list(zip(grads, trainable_variables, strict=True))
        together = self._distribution_strategy.num_replicas_in_sync == 1
        kernels = [pair for pair in pairs if together and len(pair[1].shape) == 4]
        others = [pair for pair in pairs if not (together and len(pair[1].shape) == 4)]
        if kernels:
            self._step_convolutions(kernels, learning_rate)
        if others:
            super()._backend_update_step([each for each, _ in others], [each for _, each in others], learning_rate)

    def update_step(
        self, gradient: keras.KerasTensor, variable: keras.Variable, learning_rate: keras.KerasTensor
    ) -> None:
        """Update one variable and its momentum."""
        if len(variable.shape) == 4:
            self._step_convolutions([(gradient, variable)], learning_rate)
            return
        if len(variable.shape) == 2 and self.weight_decay is not None:
            self.assign_sub(variable, (self.weight_decay * learning_rate) * variable)
        super().update_step(gradient, variable, learning_rate)

    def _step_convolutions(
        self, pairs: Sequence[tuple[keras.KerasTensor, keras.Variable]], learning_rate: keras.KerasTensor
    ) -> None:
        """Update kernels and their momentum.

        Args:
            pairs: gradient and kernel, each (height, width, channels in, channels out).
        """
        ops = keras.ops
        matrices = []
        for gradient, kernel in pairs:
            momentum = self.momentums[self._get_variable_index(kernel)]
            velocity = self.momentum * momentum + gradient
            self.assign(momentum, velocity)
            matrices.append(ops.reshape(self.momentum * velocity + gradient, (-1, kernel.shape[-1])))
        values = [ops.convert_to_tensor(kernel) for _, kernel in pairs]
        widths = np.array([kernel.shape[-1] for kernel in values], np.float32)
        norms = ops.stack([ops.sum(ops.square(kernel)) for kernel in values])
        scales = ops.unstack(np.sqrt(widths) * ops.rsqrt(norms + _TINY), len(values))
        steps = _orthogonalise(matrices, self.scale * learning_rate)
        for (_, kernel), value, scale, step in zip(pairs, values, scales, steps, strict=True):
            self.assign(kernel, scale * value - ops.reshape(step, kernel.shape))


def _orthogonalise(matrices: Sequence[keras.KerasTensor], length: Any = 1.0) -> list[keras.KerasTensor]:
    """Return matrices with the same singular vectors, and all singular values near `length`.

    The polynomial p is taken of XᵀX, a small matrix, so that all matrices are computed in one batch, the smaller ones
    padded with zeros: X·p(XᵀX) has the singular vectors of X, and its Gram matrix is XᵀX·p(XᵀX)².

    Args:
        matrices: (rows, columns) each; those with fewer rows than columns are transposed while computing.
    """
    ops = keras.ops
    tall = [each if each.shape[0] >= each.shape[1] else ops.transpose(each) for each in matrices]
    widths = [each.shape[1] for each in tall]
    pads = [max(widths) - width for width in widths]
    products = [ops.matmul(ops.transpose(each), each) for each in tall]
    squares = ops.stack([ops.pad(each, ((0, pad), (0, pad))) for each, pad in zip(products, pads, strict=True)])
    total = ops.trace(squares, axis1=1, axis2=2)[:, None, None] + _TINY
    squares = squares / total
    first, second, third = _COEFFICIENTS
    identity = np.eye(max(widths), dtype=np.float32)
    factors = identity * (ops.rsqrt(total) * length)
    for iteration in range(_ITERATIONS):
        polynomial = ops.matmul(third * squares + second * identity, squares) + first * identity
        factors = ops.matmul(factors, polynomial)
        if iteration < _ITERATIONS - 1:
            squares = ops.matmul(ops.matmul(squares, polynomial), polynomial)
    results = [
        ops.matmul(each, factor[:width, :width])
        for each, factor, width in zip(tall, ops.unstack(factors, len(tall)), widths, strict=True)
    ]
    return [
        each if each.shape == matrix.shape else ops.transpose(each)
        for each, matrix in zip(results, matrices, strict=True)
    ]


class TriangularRate(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A learning rate that rises linearly over the first tenth of the steps, then falls linearly to zero.

    Args:
        peak: highest rate.
    """

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.steps = keras.Variable(1.0, trainable=False, dtype="float32", name="steps")
        """Number of steps of the training; a variable, so that a compiled step need not be compiled for each number."""

    def __call__(self, step: Any) -> Any:
        """Return the rate of a step; the first step is 0."""
        ops = keras.ops
        fraction = ops.cast(step, "float32") / self.steps.value
        rising = _FIRST_FRACTION + (1.0 - _FIRST_FRACTION) * fraction / _WARM_UP
        falling = (1.0 - fraction) / (1.0 - _WARM_UP)
        return self.peak * ops.maximum(ops.minimum(rising, falling), 0.0)
