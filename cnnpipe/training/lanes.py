"""A batch spread over the cores of a CPU: each takes a part of it through the whole network, in one thread.

With every operation on all cores instead, they wait for each other after each one: on two cores a training step of the
tutorial's network is 1.2 times as fast this way, and one of `fast` 1.2 to 1.4 times.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from cnnpipe.environment import usable_cores
from cnnpipe.training.backend import keras

__all__ = ["count_lanes", "spread"]

_MIN_IMAGES: Final = 16
"""In a part: fewer make convolutions slow, and the averages of batch normalisation, one for each part, poor."""


def count_lanes(batch_size: int, device: str) -> int:
    """Return into how many parts batches should be split.

    Args:
        batch_size: of the smallest batch.
        device: what `backend.select_device` returned.
    """
    if device != "cpu" or keras.backend.backend() != "tensorflow":
        return 1  # a GPU is kept busy by one large batch, and JAX runs one operation after the other
    return max(1, min(usable_cores(), batch_size // _MIN_IMAGES))


def spread(network: keras.Model, lanes: int) -> keras.layers.Layer:
    """Return what does what the network does, its batches in so many parts; the weights are the same objects.

    In training, batch normalisation sees the parts apart from each other.
    """
    return _Lanes(network, lanes) if lanes > 1 else network


class _Lanes(keras.layers.Layer):  # type: ignore[misc]
    """A network that takes its batch in parts that do not depend on each other, side by side."""

    def __init__(self, network: keras.Model, number: int) -> None:
        super().__init__(name="lanes")
        self.network = network
        self._number = number

    def call(self, images: keras.KerasTensor, training: bool = False) -> keras.KerasTensor:  # (N, …) -> (N, classes)
        """Return the network's output for the whole batch, in its order."""
        ops = keras.ops
        length = ops.shape(images)[0]
        edges = [place * length // self._number for place in range(self._number + 1)]
        parts = [images[start:end] for start, end in pairwise(edges)]
        return ops.concatenate([self.network(part, training=training) for part in parts])

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of what comes out for a shape that goes in."""
        return (input_shape[0], *self.network.output_shape[1:])
