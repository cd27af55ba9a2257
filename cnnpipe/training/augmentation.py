"""What training does to a batch of images before the network sees it; backend-neutral, and on the device."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.training.backend import keras, replica_number

__all__ = ["RESIDENT_NAME", "Augmentation", "ResidentImages", "shrink", "stay_on_device"]

RESIDENT_NAME: Final = "resident_images"

_RESIDENT_BYTES: Final = 2 << 30
"""Of training images, up to which they stay in a GPU's memory: 690,000 images of 32x32 pixels, or 14,000 of 224x224."""


class _ReplicaSeeds(keras.random.SeedGenerator):  # type: ignore[misc]
    """Seeds that differ between the devices that share a batch, which all have the same state."""

    def next(self, ordered: bool = True) -> keras.KerasTensor:
        """Return the next seed, (2,)."""
        ops = keras.ops
        seed = super().next(ordered)
        own = ops.cast(replica_number(), seed.dtype) * 1_000_003  # a prime: far from the next seeds of the others
        return seed + ops.stack([own, ops.zeros((), seed.dtype)])


class Augmentation(keras.layers.Layer):  # type: ignore[misc]
    """Random shifts of a batch of images, in training only; `Batches` mirrors them.

    Every image draws its own, of up to `max_shift` of each side, the uncovered edge filled by the nearest pixels. Works
    on uint8, so it moves a quarter of float32's bytes.
    """

    def __init__(self, max_shift: float = 1 / 16, seed: int = 0) -> None:
        super().__init__(trainable=False, name="augmentation", dtype="uint8")
        self.max_shift = max_shift
        self.seed_generator = _ReplicaSeeds(seed)

    def call(self, images: keras.KerasTensor, training: bool = False) -> keras.KerasTensor:  # (N, H, W, C) -> same
        """Return the images, changed if `training`."""
        if not training:
            return images
        ops = keras.ops
        number, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
        rows = self._source_indices(number, height)  # (N, H)
        columns = self._source_indices(number, width)  # (N, W)
        image_starts = ops.arange(number, dtype="int32")[:, None, None] * (height * width)
        pixels = image_starts + rows[:, :, None] * width + columns[:, None, :]  # (N, H, W), into the flattened batch
        return ops.take(ops.reshape(images, (-1, channels)), pixels, axis=0)

    def _source_indices(self, number: int, length: int) -> keras.KerasTensor:
        """Return, for each image, the index along one side that each place takes its pixel from, (N, length)."""
        reach = round(self.max_shift * length)
        shift = keras.random.randint((number, 1), -reach, reach + 1, dtype="int32", seed=self.seed_generator)
        return keras.ops.clip(keras.ops.arange(length, dtype="int32")[None, :] + shift, 0, length - 1)


def stay_on_device(images: npt.NDArray[np.uint8], device: str) -> bool:
    """Return whether training images are sent to the device once, not batch by batch.

    Args:
        device: what `backend.select_device` returned.
    """
    return device != "cpu" and images.nbytes <= _RESIDENT_BYTES


class ResidentImages(keras.layers.Layer):  # type: ignore[misc]
    """All images of a split, in the memory of the device: a batch is told by places of which each is four bytes.

    Args:
        images: uint8 (N, H, W, 3), read once.
    """

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        super().__init__(trainable=False, name="resident", dtype="uint8")

        def take_over(shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ARG001
            return keras.ops.convert_to_tensor(np.asarray(images), dtype)

        self._images = self.add_weight(images.shape, take_over, "uint8", trainable=False, name=RESIDENT_NAME)

    def call(self, places: keras.KerasTensor) -> keras.KerasTensor:  # int32 (B,) -> uint8 (B, H, W, 3)
        """Return the images of places: twice their index, and one more for the mirror image."""
        ops = keras.ops
        images = ops.take(self._images, places // 2, axis=0)
        return ops.where((places % 2 == 1)[:, None, None, None], ops.flip(images, axis=2), images)


def shrink(images: keras.KerasTensor, size: tuple[int, int]) -> keras.KerasTensor:  # uint8 (N, H, W, C) -> same
    """Return smaller images, each pixel from all that it covers.

    Args:
        size: (height, width), pixels.
    """
    ops = keras.ops
    smaller = ops.image.resize(ops.cast(images, "float32"), size, antialias=True)
    return ops.cast(ops.clip(ops.round(smaller), 0, 255), "uint8")
