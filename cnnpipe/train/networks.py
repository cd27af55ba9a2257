"""The networks: pixels in, probabilities out, preprocessing inside.

Every network takes the decoder's bytes as they are, uint8 (batch, height, width, 3) RGB, and does its own scaling:
so the saved model, the exported one and every client see the same preprocessing. Where the layers compute in less than
float32, that and the probabilities stay float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import TrainingError
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME
from cnnpipe.train.backend import BatchNormalization, keras

__all__ = ["WHITENING_NAME", "InputStatistics", "PartialIdentity", "average_flips", "build_network", "measure_input"]

Images = npt.NDArray[np.uint8]  # (N, H, W, 3)


@dataclass(frozen=True)
class _Blocks:
    """The three blocks of a network: what sets `fast`, `accurate` and `wide` apart."""

    convolutions: int
    """Convolutions in each block."""
    residual: bool
    """Whether all but the first of them add to what they get. Source: He et al. 2015, arXiv:1512.03385."""
    widths: tuple[int, int, int] = (64, 128, 256)
    """Channels of each block."""


_BLOCKS: Final = {
    "fast": _Blocks(2, residual=False),
    "accurate": _Blocks(3, residual=True),
    # The widths of airbench96, github.com/KellerJordan/cifar10-airbench: seven times the arithmetic of `accurate`.
    "wide": _Blocks(3, residual=True, widths=(128, 384, 512)),
}

WHITENING_NAME: Final = "whitening"
"""Of the layer that whitens, and part of its name in exported models."""

_PATCH: Final = 2
"""Side of the patches that are whitened, pixels."""

_DIRECTIONS: Final = 8
"""Of the 12 of such patches, those of most variance: the others are hardly more than the noise of colours."""

_WHITENED_PIXELS: Final = 5_000_000
"""At most so many are looked at: 5,000 images of 32x32."""

_WHITENING_FLOOR: Final = 5e-4
"""Added to the variances, so that what hardly varies is not blown up; of pixels 0-1 by their standard deviation.

Source: Jordan 2024, arXiv:2404.00498, section 3.
"""

_LOGIT_SCALE: Final = 1 / 9
"""Keeps the logits of a maximum over the picture small at the start; same source."""


@dataclass(frozen=True)
class InputStatistics:
    """What `fast` and `accurate` scale and whiten their input by."""

    mean: list[float]
    """Of each channel, 0-255."""
    deviation: list[float]
    """Its standard deviation, and 1 that keeps it from 0."""
    filters: npt.NDArray[np.float32]
    """(2, 2, 3, 16): turn patches of scaled pixels into uncorrelated values, and their negatives."""


def measure_input(images: Images) -> InputStatistics:
    """Return the statistics of images for training, from some of them, evenly spread.

    Args:
        images: (N, H, W, 3), read where they are needed.
    """
    size = images.shape[1:3]
    number = max(1, min(len(images), _WHITENED_PIXELS // math.prod(size)))
    sample = _averaged(images[:: math.ceil(len(images) / number)], _reduction(size))
    mean, deviation = sample.mean(axis=(0, 1, 2)), sample.std(axis=(0, 1, 2)) + 1.0
    return InputStatistics(mean.tolist(), deviation.tolist(), _whitening_filters((sample - mean) / deviation))


def build_network(
    network: str,
    image_size: tuple[int, int],
    num_classes: int,
    statistics: InputStatistics,
    *,
    any_size: bool = False,
    temperature: float = 1.0,
) -> keras.Model:
    """Build a network with fresh weights.

    Args:
        network: `baseline`, `fast`, `accurate` or `wide`, as a `cnnpipe.train.presets.Recipe` names it.
        image_size: (height, width) in pixels.
        num_classes: length of the output.
        statistics: of the images for training; `baseline` needs none of them.
        any_size: leave the size of the input open, so that it takes smaller images too; not for `baseline`.
        temperature: logits are divided by it, see `cnnpipe.train.calibrate`; not for `baseline`.
    Returns:
        A model from `images` uint8 (batch, height, width, 3) to `probabilities` float32 (batch, num_classes).
    Raises:
        TrainingError: the images are too small for the network.
    """
    if min(image_size) < 8:
        raise TrainingError(f"the images must be at least 8x8 pixels, received image_size {image_size}; enlarge it")
    if network == "baseline":
        return _build_baseline(image_size, num_classes)
    return _build_fast(network, image_size, num_classes, statistics, any_size=any_size, temperature=temperature)


def average_flips(network: keras.Model) -> keras.Model:
    """Return a model that gives the mean of a network's probabilities for each image and for its mirror image."""
    ops = keras.ops
    pixels = keras.Input(network.input_shape[1:], dtype="uint8", name=INPUT_NAME)
    mirrored = ops.take(pixels, np.arange(network.input_shape[2])[::-1], axis=2)
    both = ops.reshape(network(ops.concatenate([pixels, mirrored])), (2, -1, network.output_shape[-1]))
    return keras.Model(pixels, keras.layers.Identity(name=OUTPUT_NAME)(ops.mean(both, axis=0)), name=network.name)


def _build_baseline(image_size: tuple[int, int], num_classes: int) -> keras.Model:
    """The tutorial's CNN: 319,178 parameters at 32x32 pixels and 10 classes."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((*image_size, 3), dtype="uint8", name=INPUT_NAME),
            layers.Rescaling(1 / 255, dtype="float32"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(num_classes, activation="softmax", dtype="float32", name=OUTPUT_NAME),
        ],
        name="baseline",
    )


def _build_fast(
    network: str,
    image_size: tuple[int, int],
    num_classes: int,
    statistics: InputStatistics,
    *,
    any_size: bool,
    temperature: float,
) -> keras.Model:
    """A small network that learns in few epochs: a whitened first layer, then blocks of convolutions.

    Larger images are brought to 32-63 pixels by averages first, so that every size costs about the same.

    Source: Jordan 2024, arXiv:2404.00498, with other widths, fewer filters in the first layer, and ReLU, which on a CPU
    costs less than GELU.
    """
    layers = keras.layers
    scale = [1 / deviation for deviation in statistics.deviation]
    offset = [-mean * factor for mean, factor in zip(statistics.mean, scale, strict=True)]
    whitening = layers.Conv2D(2 * _DIRECTIONS, _PATCH, use_bias=False, trainable=False, name=WHITENING_NAME)
    pixels = keras.Input((*((None, None) if any_size else image_size), 3), dtype="uint8", name=INPUT_NAME)
    x = layers.Rescaling(scale, offset, dtype="float32")(pixels)
    reduction = _reduction(image_size)
    if reduction > 1:
        x = layers.AveragePooling2D(reduction)(x)
    x = layers.ReLU()(whitening(x))
    side = min(image_size) // reduction - _PATCH + 1
    # Colours that no image has are whitened to nothing, which batch normalisation would blow up: the first one mixes.
    initializer: keras.initializers.Initializer = keras.initializers.HeNormal()
    blocks = _BLOCKS[network]
    for width in blocks.widths:
        x = _convolution(width, initializer)(x)
        initializer = PartialIdentity()
        if side > 1:
            x, side = layers.MaxPooling2D(2)(x), side // 2
        x = layers.ReLU()(_normalization()(x))
        for _ in range(blocks.convolutions - 1):
            y = layers.ReLU()(_normalization()(_convolution(width, initializer)(x)))
            x = layers.Add()([x, y]) if blocks.residual else y
    x = layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(num_classes, use_bias=False)(x)
    x = layers.Rescaling(_LOGIT_SCALE / temperature)(x)
    model = keras.Model(pixels, layers.Softmax(dtype="float32", name=OUTPUT_NAME)(x), name=network)
    whitening.set_weights([statistics.filters])
    return model


def _reduction(image_size: tuple[int, int]) -> int:
    """Return the side of the squares of which `fast` and `accurate` take the average first, pixels."""
    return max(1, min(image_size) // 32)


def _averaged(images: Images, side: int) -> npt.NDArray[np.float32]:  # (N, H, W, 3) -> (N, H // side, W // side, 3)
    """Return the averages of squares, those that the edge cuts left out."""
    height, width = (length // side for length in images.shape[1:3])
    squares = images[:, : height * side, : width * side].reshape(len(images), height, side, width, side, 3)
    averages: npt.NDArray[np.float32] = squares.mean(axis=(2, 4), dtype=np.float32)
    return averages


def _convolution(width: int, initializer: keras.initializers.Initializer) -> keras.layers.Layer:
    return keras.layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer=initializer)


def _normalization() -> keras.layers.Layer:
    """Batch normalisation whose averages follow within few steps, as there are few; what ReLU gets needs no scale."""
    return BatchNormalization(momentum=0.6)


def _whitening_filters(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return filters that turn patches into uncorrelated values of variance 1, and their negatives.

    Args:
        images: (N, H, W, 3), scaled.
    Returns:
        (2, 2, 3, 16), the directions of most variance first.
    """
    windows: Any = np.lib.stride_tricks.sliding_window_view(images, (_PATCH, _PATCH), axis=(1, 2))
    patches = windows[:, ::2, ::2].transpose(0, 1, 2, 4, 5, 3).reshape(-1, _PATCH * _PATCH * 3)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / np.sqrt(variances + _WHITENING_FLOOR))[:, : -_DIRECTIONS - 1 : -1]
    both = np.concatenate([filters, -filters], axis=1).reshape(_PATCH, _PATCH, 3, -1)
    return np.ascontiguousarray(both, np.float32)


@keras.saving.register_keras_serializable("cnnpipe")
class PartialIdentity(keras.initializers.Initializer):  # type: ignore[misc]
    """Kernels whose first channels pass on what comes in, and whose others are drawn as by `he_normal`.

    So every layer starts with all that the earlier ones saw. Source: Jordan 2024, arXiv:2404.00498, section 3.2.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        """Return a kernel, (height, width, channels in, channels out)."""
        kernel = np.array(keras.initializers.HeNormal(self.seed)(shape, dtype))
        height, width, channels = shape[0] // 2, shape[1] // 2, range(min(shape[2:]))
        kernel[..., : len(channels)] = 0.0
        kernel[height, width, channels, channels] = 1.0
        return keras.ops.convert_to_tensor(kernel)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make it again."""
        return {"seed": self.seed}
