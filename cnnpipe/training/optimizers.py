"""How weights follow from gradients, where Keras has no such optimizer or rate; backend-neutral."""

from __future__ import annotations

import math
from typing import Any, Final

from cnnpipe.training.backend import keras

__all__ = ["Muon", "TriangularRate"]

_WARM_UP: Final = 0.1
"""Share of the training in which a triangular rate rises."""

_FIRST_SHARE: Final = 0.1
"""Of the highest rate, at the first step."""

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
    scale of what comes out is for the batch normalisation that follows. All other weights take the steps of SGD.
    Keras' own optimizer of this name leaves convolutions to AdamW.

    Source: Jordan et al. 2024 (see above); scaled kernels as in github.com/KellerJordan/cifar10-airbench.

    Args:
        share: of the rate, for convolutions.
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

    def update_step(
        self, gradient: keras.KerasTensor, variable: keras.Variable, learning_rate: keras.KerasTensor
    ) -> None:
        """Change one variable, and its momentum."""
        if len(variable.shape) != 4:
            super().update_step(gradient, variable, learning_rate)
            return
        ops = keras.ops
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, self.momentum * velocity + gradient)
        matrix = ops.reshape(self.momentum * velocity + gradient, (-1, variable.shape[-1]))
        step = ops.reshape(_orthogonalised(matrix), variable.shape)
        scaled = variable * (math.sqrt(variable.shape[-1]) / _norm(variable))
        self.assign(variable, scaled - self.share * learning_rate * step)


def _orthogonalised(matrix: keras.KerasTensor) -> keras.KerasTensor:  # (rows, columns) -> same
    """Return a matrix of the same singular vectors, with all singular values near 1."""
    ops = keras.ops
    tall = matrix.shape[0] > matrix.shape[1]
    x = ops.transpose(matrix) if tall else matrix
    x = x / _norm(x)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        squares = ops.matmul(x, ops.transpose(x))  # the smaller of the two products
        x = first * x + ops.matmul(second * squares + third * ops.matmul(squares, squares), x)
    return ops.transpose(x) if tall else x


def _norm(values: keras.KerasTensor) -> keras.KerasTensor:
    """Return the square root of the sum of squares, a little more than 0."""
    return keras.ops.sqrt(keras.ops.sum(keras.ops.square(values)) + 1e-14)


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
        first, start, change = (self.course[index] for index in range(3))
        place = start + change * (ops.cast(step, "float32") - first)
        rising = _FIRST_SHARE + (1.0 - _FIRST_SHARE) * place / _WARM_UP
        falling = (1.0 - place) / (1.0 - _WARM_UP)
        return self.peak * ops.maximum(ops.minimum(rising, falling), 0.0)
