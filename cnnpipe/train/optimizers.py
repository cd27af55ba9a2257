"""How weights follow from gradients, where Keras has no such optimizer or rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cnnpipe.train.backend import keras

__all__ = ["Muon", "TriangularRate"]

_WARM_UP: Final = 0.1
"""Share of the training in which a triangular rate rises."""

_FIRST_SHARE: Final = 0.1
"""Of the highest rate, at the first step."""

_TINY: Final = 1e-14
"""Added to sums of squares, so that nothing is divided by 0."""

_ITERATIONS: Final = 3
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a·s + b·s³ + c·s⁵ that takes singular values between 0 and 1 to about 1 within few iterations.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers", kellerjordan.github.io/posts/muon.
"""


class Muon(keras.optimizers.SGD):  # type: ignore[misc]
    """SGD with Nesterov's momentum, but every step of a convolution goes equally far in all directions.

    A convolution's kernel is a matrix here, (height · width · channels in, channels out). Its step has the singular
    vectors of SGD's, and singular values of about the rate times `share`. Before it, the kernel is scaled to a sum of
    squares of 1 for each channel out, on average, so that a rate means the same for all of them and at all times; the
    scale of what comes out is for the batch normalisation that follows. All other weights take the steps of SGD, and
    only matrices decay. Keras' own optimizer of this name leaves convolutions to AdamW.

    Source: Jordan et al. 2024 (see above); scaled kernels as in github.com/KellerJordan/cifar10-airbench.

    Args:
        share: fraction of the rate that convolutions take.
    """

    def __init__(self, learning_rate: Any = 0.8, momentum: float = 0.8, share: float = 1 / 8, **options: Any) -> None:
        super().__init__(learning_rate, momentum, **{**options, "nesterov": True})
        self.share = share
        if isinstance(learning_rate, TriangularRate):
            self.course = learning_rate.course  # a variable of the optimizer's now, saved and computed with as such
            self._rate = learning_rate

    def set_course(self, start: float, end: float, steps: int) -> None:
        """Say how the triangular rate goes on from here.

        Args:
            start: where the next step is in the triangle, as a share of its length.
            end: where the one after so many steps will be.
        """
        step = float(keras.ops.convert_to_numpy(self.iterations.value))
        self._rate.course.assign([step, start, (end - start) / steps])

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        """Leave it to `update_step`, which has the rate already: kernels are scaled, and vectors do not decay."""

    def _backend_update_step(
        self, grads: list[keras.KerasTensor], trainable_variables: list[keras.Variable], learning_rate: Any
    ) -> None:
        """Change all variables, the kernels of convolutions together; with several replicas each alone."""
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
        """Change one variable, and its momentum."""
        if len(variable.shape) == 4:
            self._step_convolutions([(gradient, variable)], learning_rate)
            return
        if len(variable.shape) == 2 and self.weight_decay is not None:
            self.assign_sub(variable, (self.weight_decay * learning_rate) * variable)
        super().update_step(gradient, variable, learning_rate)

    def _step_convolutions(
        self, pairs: Sequence[tuple[keras.KerasTensor, keras.Variable]], learning_rate: keras.KerasTensor
    ) -> None:
        """Change kernels, and their momentum.

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
        steps = _orthogonalise(matrices, self.share * learning_rate)
        for (_, kernel), value, scale, step in zip(pairs, values, scales, steps, strict=True):
            self.assign(kernel, scale * value - ops.reshape(step, kernel.shape))


def _orthogonalise(matrices: Sequence[keras.KerasTensor], length: Any = 1.0) -> list[keras.KerasTensor]:
    """Return matrices of the same singular vectors, with all singular values near `length`.

    The polynomial is one of XᵀX, a small matrix, so it is computed for all matrices at once: X·p(XᵀX) has the singular
    vectors of X, and its product with its own transpose is XᵀX·p(XᵀX)². What pads the smaller ones stays apart.

    Args:
        matrices: (rows, columns) each; those of fewer rows than columns are turned over meanwhile.
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
    turned = [
        ops.matmul(each, factor[:width, :width])
        for each, factor, width in zip(tall, ops.unstack(factors, len(tall)), widths, strict=True)
    ]
    return [
        each if each.shape == given.shape else ops.transpose(each) for each, given in zip(turned, matrices, strict=True)
    ]


class TriangularRate(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A rate that rises along a line for the first tenth, and falls along another to zero at the end.

    How far along it is at which step is for `Muon.set_course` to say, piece by piece: where time is short, a step goes
    further.

    Args:
        peak: the highest rate.
    """

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.course = keras.Variable([0.0, 0.0, 0.0], trainable=False, dtype="float32", name="course")
        """A step, where the rate is then (0-1), and how much further with each one after it."""

    def __call__(self, step: Any) -> Any:
        """Return the rate of a step."""
        ops = keras.ops
        first, start, change = ops.unstack(self.course.value, 3)
        place = start + change * (ops.cast(step, "float32") - first)
        rising = _FIRST_SHARE + (1.0 - _FIRST_SHARE) * place / _WARM_UP
        falling = (1.0 - place) / (1.0 - _WARM_UP)
        return self.peak * ops.maximum(ops.minimum(rising, falling), 0.0)
