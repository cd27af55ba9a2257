"""The arithmetic of training: how much a network needs for one image, and how fast this machine's convolutions are.

`python -m benchmarks.arithmetic PRECISION` measures the convolutions and prints one JSON object on the last line.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import numpy as np

from cnnpipe.machine import usable_cores

__all__ = ["count_flops"]

SHAPES = ((32, 16, 32, 64), (32, 16, 64, 64), (32, 8, 128, 128))
"""(images per core, side in pixels, channels in, channels out) of 3x3 convolutions, typical of small networks."""

SECONDS = 4.0


def count_flops(network: Any) -> int:
    """Return the floating-point operations of one training step for one image.

    A layer takes three passes of equal cost: forward, the gradient of its weights, and the gradient of its input. A
    frozen layer has no gradient of its weights, and the layers up to the first trained one need none of their input.

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


def main(precision: str) -> None:
    """Time each shape, every core on its own images in one thread, and report the fastest in FLOP/s.

    Args:
        precision: type of images and kernels, such as `float32`.
    """
    import tensorflow as tf

    import cnnpipe.train.backend  # noqa: F401  sets the threads as in training

    rates = []
    for number, side, channels_in, channels_out in SHAPES:
        kernel = tf.Variable(tf.zeros((3, 3, channels_in, channels_out), precision))
        images = tf.zeros((usable_cores(), number, side, side, channels_in), precision)

        def gradients_of_all(images: Any = images, kernel: Any = kernel) -> list[Any]:
            """Return both gradients of a convolution, for each core."""
            gradients = []
            for part in tf.unstack(images):
                with tf.GradientTape() as tape:
                    tape.watch(part)
                    out = tf.nn.conv2d(part, kernel, 1, "SAME")
                gradients += tape.gradient(out, [part, kernel])
            return [tf.cast(tf.reduce_sum(gradient), tf.float32) for gradient in gradients]

        step = tf.function(gradients_of_all)
        step()
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            np.asarray(step()[0])
            steps += 1
        seconds = time.perf_counter() - began
        # The value of a convolution is not needed for its gradients, which are two of its three passes.
        flops = 2 * 2 * 9 * channels_in * channels_out * side * side * number * usable_cores()
        rates.append(steps * flops / seconds)
    print(json.dumps({"flops_per_second": max(rates)}))


if __name__ == "__main__":
    main(sys.argv[1])
