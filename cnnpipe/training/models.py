"""The networks, by preset: pixels in, probabilities out, preprocessing inside.

Every network takes the decoder's bytes as they are, uint8 (batch, height, width, 3) RGB, and does its own scaling:
so the saved model, the exported one and every client see the same preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from cnnpipe.config import TrainSettings
from cnnpipe.errors import TrainingError
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME
from cnnpipe.training.backend import keras

__all__ = ["PRESETS", "Augmentation", "Recipe", "build_model", "resolve_recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the preset's values, overridden by the user's."""

    epochs: int
    batch_size: int
    learning_rate: float
    """Of Adam."""
    augment: bool


PRESETS: Final = {"baseline": Recipe(epochs=15, batch_size=64, learning_rate=1e-3, augment=False)}
"""The settings of each preset. `baseline` is the classic CIFAR-10 tutorial's, with Adam at its default rate.

Source: https://www.tensorflow.org/tutorials/images/cnn; here with "same" padding, softmax and one-hot labels.
"""


def resolve_recipe(settings: TrainSettings) -> Recipe:
    """Return the preset's recipe with what the user set in its place."""
    recipe = PRESETS[settings.preset]
    chosen = {name: getattr(settings, name) for name in ("epochs", "batch_size", "learning_rate", "augment")}
    return replace(recipe, **{name: value for name, value in chosen.items() if value is not None})


def build_model(preset: str, image_size: tuple[int, int], num_classes: int) -> keras.Model:
    """Build a preset's network with fresh weights.

    Args:
        preset: a key of `PRESETS`.
        image_size: (height, width) in pixels.
        num_classes: length of the output.
    Returns:
        A model from `images` uint8 (batch, height, width, 3) to `probabilities` float32 (batch, num_classes).
    Raises:
        TrainingError: the images are too small for the network.
    """
    builders = {"baseline": _build_baseline}
    if min(image_size) < 8:
        raise TrainingError(f"the images must be at least 8x8 pixels, received image_size {image_size}; enlarge it")
    return builders[preset](image_size, num_classes)


def _build_baseline(image_size: tuple[int, int], num_classes: int) -> keras.Model:
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
