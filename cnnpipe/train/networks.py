"""The networks: pixels in, probabilities out, preprocessing inside.

Every network takes decoded pixels as they are, uint8 (batch, height, width, 3) RGB, and scales them itself, so that the
saved model, the exported one and every client share one preprocessing. Preprocessing and probabilities are float32 in
every compute precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import TrainingError
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME
from cnnpipe.train.backend import BatchNormalization, keras

__all__ = [
    "WHITENING_NAME",
    "InputStatistics",
    "PartialIdentity",
    "View",
    "average_views",
    "build_network",
    "measure_input",
    "prediction_views",
    "set_temperature",
]

Images = npt.NDArray[np.uint8]  # (N, H, W, 3)


@dataclass(frozen=True)
class _Blocks:
    """The three blocks of convolutions, in which `fast`, `accurate` and `wide` differ."""

    convolutions: int
    """Number of convolutions in each block."""
    residual: bool
    """Whether all but the first add to their input. Source: He et al. 2015, arXiv:1512.03385."""
    widths: tuple[int, int, int] = (64, 128, 256)
    """Number of channels of each block."""
    smooth: bool = False
    """Whether activations are `gelu`, which costs a CPU more than it gains, instead of ReLU."""


_BLOCKS: Final = {
    "fast": _Blocks(2, residual=False),
    "accurate": _Blocks(3, residual=True),
    # Widths and GELU of airbench96, github.com/KellerJordan/cifar10-airbench: seven times the arithmetic of `accurate`.
    "wide": _Blocks(3, residual=True, widths=(128, 384, 512), smooth=True),
}

WHITENING_NAME: Final = "whitening"
"""Name of the whitening layer, also part of its name in exported models."""

_PATCH: Final = 2
"""Side of the whitened patches, pixels."""

_DIRECTIONS: Final = 8
"""Number of directions of a patch, of 12, that are kept: those of most variance; the others are mostly colour noise."""

_WHITENED_PIXELS: Final = 5_000_000
"""Largest number of pixels that are measured: 5,000 images of 32x32."""

_WHITENING_FLOOR: Final = 5e-4
"""Added to the variances of scaled pixels, so that directions that hardly vary are not amplified.

Source: Jordan 2024, arXiv:2404.00498, section 3.
"""

_LOGIT_SCALE: Final = 1 / 9
"""Factor of the logits, which keeps them small at the start; same source."""

_LOGITS_NAME: Final = "logits"


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the training images, with which `fast` and `accurate` scale and whiten their input."""

    mean: list[float]
    """Mean of each channel, 0-255."""
    deviation: list[float]
    """Standard deviation of each channel plus 1, which keeps it from 0."""
    filters: npt.NDArray[np.float32]
    """Filters (2, 2, 3, 16) that turn patches of scaled pixels into uncorrelated values and their negatives."""


def measure_input(images: Images) -> InputStatistics:
    """Return the statistics of training images, measured on an evenly spaced sample.

    Args:
        images: (N, H, W, 3); only the sample is read.
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
) -> keras.Model:
    """Build a network with fresh weights.

    Args:
        network: `baseline`, `fast`, `accurate` or `wide`, see `presets.Recipe`.
        image_size: (height, width) in pixels.
        num_classes: length of the output.
        statistics: result of `measure_input`; not used by `baseline`.
        any_size: leave the input size open, so that the network takes smaller images too; not used by `baseline`.
    Returns:
        A model from `images` uint8 (batch, height, width, 3) to `probabilities` float32 (batch, num_classes).
    Raises:
        TrainingError: the images are too small for the network.
    """
    if min(image_size) < 8:
        raise TrainingError(f"the images must be at least 8x8 pixels, received image_size {image_size}; enlarge it")
    if network == "baseline":
        return _build_baseline(image_size, num_classes)
    return _build_fast(network, image_size, num_classes, statistics, any_size=any_size)


def set_temperature(network: keras.Model, temperature: float) -> None:
    """Divide the logits of a network, in the model that is saved next, by a temperature; not for `baseline`."""
    network.get_layer(_LOGITS_NAME).scale = _LOGIT_SCALE / temperature


@dataclass(frozen=True)
class View:
    """One view of an image at prediction."""

    rows: npt.NDArray[np.int32]
    """(H,): index of the row that each row shows."""
    columns: npt.NDArray[np.int32]
    """(W,): likewise."""
    weight: float
    """Weight of its probabilities; those of all views sum to 1."""


def prediction_views(image_size: tuple[int, int], *, flips: bool, shifts: bool) -> list[View]:
    """Return the views whose probabilities a saved model averages; the first is the image itself.

    Args:
        image_size: (height, width), pixels.
        flips: add the mirror image of every view.
        shifts: add two diagonal shifts by a pixel in 32, each at half the weight of the image, with reflected edges.

    Source: Jordan 2024, arXiv:2404.00498, section 3.5, "multi-crop evaluation".
    """
    reach = max(1, min(image_size) // 32)
    views = []
    for offset, weight in ((0, 0.5), (-reach, 0.25), (reach, 0.25)) if shifts else ((0, 1.0),):
        rows, columns = (reflect(np.arange(length, dtype=np.int32) + offset, length) for length in image_size)
        both = (columns, columns[::-1]) if flips else (columns,)
        views += [View(rows, each, weight / len(both)) for each in both]
    return views


def reflect(indices: npt.NDArray[np.int32], length: int) -> npt.NDArray[np.int32]:
    """Return indices below `length`: those outside are reflected at the edge, which is not repeated."""
    indices = np.abs(indices)
    return np.where(indices < length, indices, 2 * length - 2 - indices)


def average_views(network: keras.Model, views: Sequence[View]) -> keras.Model:
    """Return a model that averages a network's probabilities over views of each image."""
    ops = keras.ops
    pixels = keras.Input(network.input_shape[1:], dtype="uint8", name=INPUT_NAME)
    shown = []
    for view in views:
        x = pixels
        for axis, indices in ((1, view.rows), (2, view.columns)):
            x = x if np.array_equal(indices, np.arange(len(indices))) else ops.take(x, indices, axis=axis)
        shown.append(x)
    each = ops.reshape(network(ops.concatenate(shown)), (len(views), -1, network.output_shape[-1]))
    weights = np.array([view.weight for view in views], np.float32)[:, None, None]
    mean = ops.sum(each * weights, axis=0)
    return keras.Model(pixels, keras.layers.Identity(name=OUTPUT_NAME)(mean), name=network.name)


def _build_baseline(image_size: tuple[int, int], num_classes: int) -> keras.Model:
    """Build the tutorial's CNN: 319,178 parameters at 32x32 pixels and 10 classes."""
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
) -> keras.Model:
    """Build a small network that learns in few epochs: a whitened first layer, then blocks of convolutions.

    Larger images are averaged down to 32-63 pixels first, so that every size costs about the same.

    Source: Jordan 2024, arXiv:2404.00498, with other widths, fewer filters in the first layer, and ReLU but in `wide`.
    """
    layers, blocks = keras.layers, _BLOCKS[network]
    activation = gelu if blocks.smooth else "relu"
    scale = [1 / deviation for deviation in statistics.deviation]
    offset = [-mean * factor for mean, factor in zip(statistics.mean, scale, strict=True)]
    whitening = layers.Conv2D(2 * _DIRECTIONS, _PATCH, use_bias=False, trainable=False, name=WHITENING_NAME)
    pixels = keras.Input((*((None, None) if any_size else image_size), 3), dtype="uint8", name=INPUT_NAME)
    x = layers.Rescaling(scale, offset, dtype="float32")(pixels)
    reduction = _reduction(image_size)
    if reduction > 1:
        x = layers.AveragePooling2D(reduction)(x)
    x = layers.Activation(activation)(whitening(x))
    side = min(image_size) // reduction - _PATCH + 1
    # Not a partial identity: channels of colours that no image has would be amplified by batch normalisation.
    initializer: keras.initializers.Initializer = keras.initializers.HeNormal()
    for width in blocks.widths:
        x = _convolution(width, initializer)(x)
        initializer = PartialIdentity()
        if side > 1:
            x, side = layers.MaxPooling2D(2)(x), side // 2
        x = layers.Activation(activation)(_normalization()(x))
        for _ in range(blocks.convolutions - 1):
            y = layers.Activation(activation)(_normalization()(_convolution(width, initializer)(x)))
            x = layers.Add()([x, y]) if blocks.residual else y
    x = layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(num_classes, use_bias=False)(x)
    x = layers.Rescaling(_LOGIT_SCALE, name=_LOGITS_NAME)(x)
    model = keras.Model(pixels, layers.Softmax(dtype="float32", name=OUTPUT_NAME)(x), name=network)
    whitening.set_weights([statistics.filters])
    return model


@keras.saving.register_keras_serializable("cnnpipe")  # type: ignore[untyped-decorator]
def gelu(x: keras.KerasTensor) -> keras.KerasTensor:
    """Return the Gaussian error linear unit of x; Keras' own is made of an operation that tf2onnx lacks."""
    return 0.5 * x * (1.0 + keras.ops.erf(x * math.sqrt(0.5)))


def _reduction(image_size: tuple[int, int]) -> int:
    """Return the side in pixels of the squares that `fast` and `accurate` average first."""
    return max(1, min(image_size) // 32)


def _averaged(images: Images, side: int) -> npt.NDArray[np.float32]:  # (N, H, W, 3) -> (N, H // side, W // side, 3)
    """Return the averages of squares; incomplete squares at the edge are left out."""
    height, width = (length // side for length in images.shape[1:3])
    squares = images[:, : height * side, : width * side].reshape(len(images), height, side, width, side, 3)
    averages: npt.NDArray[np.float32] = squares.mean(axis=(2, 4), dtype=np.float32)
    return averages


def _convolution(width: int, initializer: keras.initializers.Initializer) -> keras.layers.Layer:
    return keras.layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer=initializer)


def _normalization() -> keras.layers.Layer:
    """Return batch normalisation with a low momentum, because trainings have few steps."""
    return BatchNormalization(momentum=0.6)


def _whitening_filters(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return filters that turn patches into uncorrelated values of variance 1 and their negatives.

    Args:
        images: (N, H, W, 3), scaled.
    Returns:
        (2, 2, 3, 16), directions of most variance first.
    """
    windows: Any = np.lib.stride_tricks.sliding_window_view(images, (_PATCH, _PATCH), axis=(1, 2))
    patches = windows[:, ::2, ::2].transpose(0, 1, 2, 4, 5, 3).reshape(-1, _PATCH * _PATCH * 3)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / np.sqrt(variances + _WHITENING_FLOOR))[:, : -_DIRECTIONS - 1 : -1]
    both = np.concatenate([filters, -filters], axis=1).reshape(_PATCH, _PATCH, 3, -1)
    return np.ascontiguousarray(both, np.float32)


@keras.saving.register_keras_serializable("cnnpipe")
class PartialIdentity(keras.initializers.Initializer):  # type: ignore[misc]
    """Kernels whose first output channels copy the input, and whose others are drawn as by `he_normal`.

    Source: Jordan 2024, arXiv:2404.00498, section 3.2.
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
        """Return the arguments of the constructor."""
        return {"seed": self.seed}
