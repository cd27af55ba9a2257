"""The networks, by preset: pixels in, probabilities out, preprocessing inside.

Every network takes the decoder's bytes as they are, uint8 (batch, height, width, 3) RGB, and does its own scaling:
so the saved model, the exported one and every client see the same preprocessing.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import TrainingError
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME
from cnnpipe.training.backend import keras

__all__ = ["Augmentation", "build_model"]

Images = npt.NDArray[np.uint8]  # (N, H, W, 3)

_FAST_WIDTHS: Final = (32, 96, 128)
"""Channels of each block of `fast`."""

_PATCH: Final = 2
"""Side of the patches that `fast` whitens, pixels."""

_WHITENED_IMAGES: Final = 5000
_WHITENING_FLOOR: Final = 5e-4
"""Added to the variances, so that what hardly varies is not blown up; of pixels 0-1 by their standard deviation.

Source: Jordan 2024, arXiv:2404.00498, section 3.
"""

_LOGIT_SCALE: Final = 1 / 9
"""Keeps the logits of a maximum over the picture small at the start; same source."""


def build_model(preset: str, image_size: tuple[int, int], num_classes: int, images: Images) -> keras.Model:
    """Build a preset's network with fresh weights.

    Args:
        preset: a key of `cnnpipe.training.recipes.PRESETS`.
        image_size: (height, width) in pixels.
        num_classes: length of the output.
        images: for training, of which some decide how `fast` scales and whitens its input.
    Returns:
        A model from `images` uint8 (batch, height, width, 3) to `probabilities` float32 (batch, num_classes).
    Raises:
        TrainingError: the images are too small for the network.
    """
    builders = {"baseline": _build_baseline, "fast": _build_fast}
    if min(image_size) < 8:
        raise TrainingError(f"the images must be at least 8x8 pixels, received image_size {image_size}; enlarge it")
    return builders[preset](image_size, num_classes, images)


def _build_baseline(image_size: tuple[int, int], num_classes: int, _: Images) -> keras.Model:
    """The tutorial's CNN: 319,178 parameters at 32x32 pixels and 10 classes."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((*image_size, 3), dtype="uint8", name=INPUT_NAME),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(num_classes, activation="softmax", name=OUTPUT_NAME),
        ],
        name="baseline",
    )


def _build_fast(image_size: tuple[int, int], num_classes: int, images: Images) -> keras.Model:
    """A small network that learns in few epochs: a whitened first layer, then blocks of two convolutions.

    Larger images are brought to 32-63 pixels by averages first, so that every size costs about the same.

    Source: Jordan 2024, arXiv:2404.00498, with narrower blocks.
    """
    layers = keras.layers
    sample = images[:: max(1, len(images) // _WHITENED_IMAGES)].astype(np.float32)
    mean, deviation = sample.mean(axis=(0, 1, 2)), sample.std(axis=(0, 1, 2)) + 1.0
    whitening = layers.Conv2D(24, _PATCH, use_bias=False, trainable=False, name="whitening")
    pixels = keras.Input((*image_size, 3), dtype="uint8", name=INPUT_NAME)
    x = layers.Rescaling((1 / deviation).tolist(), (-mean / deviation).tolist())(pixels)
    shrink = min(image_size) // 32
    if shrink > 1:
        x = layers.AveragePooling2D(shrink)(x)
    x = _gelu(whitening(x))
    for width in _FAST_WIDTHS:
        x = _convolution(width)(x)
        if min(x.shape[1:3]) > 1:
            x = layers.MaxPooling2D(2)(x)
        x = _gelu(_normalization()(x))
        x = _gelu(_normalization()(_convolution(width)(x)))
    x = layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(num_classes, use_bias=False)(x)
    x = layers.Rescaling(_LOGIT_SCALE)(x)
    model = keras.Model(pixels, layers.Softmax(name=OUTPUT_NAME)(x), name="fast")
    whitening.set_weights([_whitening_filters((sample - mean) / deviation)])
    return model


def _gelu(x: keras.KerasTensor) -> keras.KerasTensor:
    """The approximation by tanh: the exact one becomes an operator in the conversion that ONNX does not have."""
    return keras.ops.gelu(x, approximate=True)


def _convolution(width: int) -> keras.layers.Layer:
    return keras.layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer="he_normal")


def _normalization() -> keras.layers.Layer:
    """Batch normalisation whose averages follow within few steps, as there are few; GELU needs no scale of its own."""
    return keras.layers.BatchNormalization(momentum=0.6, epsilon=1e-5, scale=False)


def _whitening_filters(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return filters that turn patches into uncorrelated values of variance 1, and their negatives.

    Args:
        images: (N, H, W, 3), scaled.
    Returns:
        (2, 2, 3, 24), the directions of most variance first.
    """
    windows: Any = np.lib.stride_tricks.sliding_window_view(images, (_PATCH, _PATCH), axis=(1, 2))
    patches = windows[:, ::2, ::2].transpose(0, 1, 2, 4, 5, 3).reshape(-1, _PATCH * _PATCH * 3)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / np.sqrt(variances + _WHITENING_FLOOR))[:, ::-1]
    both = np.concatenate([filters, -filters], axis=1).reshape(_PATCH, _PATCH, 3, -1)
    return np.ascontiguousarray(both, np.float32)


@keras.saving.register_keras_serializable("cnnpipe")
class Augmentation(keras.layers.Layer):  # type: ignore[misc]
    """Random horizontal flips and shifts of a batch of images, in training only.

    Every image draws its own: a flip with probability one half, and a shift of up to `max_shift` of each side, the
    uncovered edge filled by the nearest pixels. Works on uint8, so it moves a quarter of float32's bytes.
    """

    def __init__(self, max_shift: float = 1 / 16, seed: int = 0) -> None:
        super().__init__(trainable=False, name="augmentation", dtype="uint8")
        self.max_shift = max_shift
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images: keras.KerasTensor, training: bool = False) -> keras.KerasTensor:  # (N, H, W, C) -> same
        """Return the images, changed if `training`."""
        if not training:
            return images
        ops = keras.ops
        number, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
        rows = self._source_indices(number, height)  # (N, H)
        columns = self._source_indices(number, width)  # (N, W)
        mirrored = keras.random.uniform((number, 1), seed=self.seed_generator) < 0.5
        columns = ops.where(mirrored, width - 1 - columns, columns)
        image_starts = ops.arange(number, dtype="int32")[:, None, None] * (height * width)
        pixels = image_starts + rows[:, :, None] * width + columns[:, None, :]  # (N, H, W), into the flattened batch
        return ops.take(ops.reshape(images, (-1, channels)), pixels, axis=0)

    def _source_indices(self, number: int, length: int) -> keras.KerasTensor:
        """Return, for each image, the index along one side that each place takes its pixel from, (N, length)."""
        reach = round(self.max_shift * length)
        shift = keras.random.randint((number, 1), -reach, reach + 1, dtype="int32", seed=self.seed_generator)
        return keras.ops.clip(keras.ops.arange(length, dtype="int32")[None, :] + shift, 0, length - 1)
