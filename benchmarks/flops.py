"""The arithmetic of a training step: additions and multiplications of convolutions and dense layers, both ways."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["count_flops"]


def count_flops(network: Any) -> int:
    """Return the floating-point operations of one training step for one image.

    A layer takes three passes of equal cost: forward, the gradient of its weights, that of its input. A layer that is
    not trained has no second one, and nothing before the first trained layer a third.

    Args:
        network: a built `keras.Model` with an input of fixed size; layers without a kernel are not counted.
    """
    total, trained_before = 0, False
    for layer in network.layers:
        if not hasattr(layer, "kernel"):
            continue
        passes = 1 + layer.trainable + trained_before
        positions = math.prod(layer.output.shape[1:-1])
        total += 2 * passes * positions * math.prod(layer.kernel.shape)
        trained_before = trained_before or layer.trainable
    return total
