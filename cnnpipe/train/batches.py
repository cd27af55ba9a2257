"""Batches of training and validation images, and every random change to training images: mirror, shift, crop, cutout.

`Batches` draws on the host what is random; `Augmentation` and `shrink` apply it on the device. The views that a
saved model averages at prediction are in `networks.prediction_views`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.train.backend import keras
from cnnpipe.train.networks import reflect

__all__ = ["RESIDENT_NAME", "Augmentation", "Batches", "ResidentImages", "draw_views", "shrink", "stay_on_device"]

RESIDENT_NAME: Final = "resident_images"
"""Name of the variable that holds a whole split."""

_RESIDENT_BYTES: Final = 2 << 30
"""Size of the largest training split that stays in a GPU's memory: 690,000 images of 32x32, or 14,000 of 224x224."""

Views = tuple[npt.NDArray[Any], ...]
"""Rows, int32 (N, H), and columns, int32 (N, W), that pixels are taken from; with cutout also masks of the hidden rows,
bool (N, H), and columns, bool (N, W)."""


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split, read from its memory-mapped bytes; part of an epoch may be selected.

    An epoch has every image once, in batches whose sizes differ by one at most. `multiple` and `equal` leave out a few
    images, other ones in every epoch.

    Training images are shuffled because the file is sorted by class, and a batch would tell the classes of its images.

    With `augment`, a random half of the images is mirrored in the first epoch, the other half in the second, and so on:
    two epochs show both sides of every image. Source: Jordan 2024, arXiv:2404.00498, "alternating flip".

    Args:
        images: uint8 (N, H, W, 3).
        labels: integer class indices, (N,); batches have them one-hot, made a batch at a time.
        num_classes: length of the one-hot labels.
        batch_size: largest number of images; a few more where `multiple` asks for it.
        seed: decides the order and the augmentation; None keeps the order of the file.
        multiple: make the size of every batch a multiple of this number, so that as many devices share it equally.
        equal: give all batches the same size, because each size would be compiled separately.
        augment: (max_shift, cutout, reflected) of `draw_views`, whose `Views` come with the images; None is none.
        resident: give indices of images instead of pixels, for `ResidentImages`.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer[Any]],
        num_classes: int,
        batch_size: int,
        seed: int | None = None,
        *,
        multiple: int = 1,
        equal: bool = False,
        augment: tuple[float, float, bool] | None = None,
        resident: bool = False,
    ) -> None:
        super().__init__(workers=1)
        self._images, self._labels, self._num_classes = images, labels, num_classes
        self._seed, self._multiple, self._equal = seed, multiple, equal
        self._augment, self._resident = augment, resident
        self.number = math.ceil(len(images) / batch_size)
        """Number of batches of a whole epoch."""
        self._order = np.arange(len(images))
        # The third number sets these draws apart from those of the order.
        self._mirrored = np.random.default_rng([seed or 0, 0, 1]).random(len(images)) < 0.5
        self._epoch = 0
        self._first, self._last = 0, self.number

    @property
    def smallest(self) -> int:
        """Number of images in the smallest batch."""
        return len(self._order) // self._multiple // self.number * self._multiple

    def num_images(self, number: int) -> int:
        """Return the number of images in the first `number` batches of an epoch."""
        if self._equal:
            return number * self.smallest
        return number * (len(self._order) // self._multiple) // self.number * self._multiple

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> tuple[tuple[npt.NDArray[Any], ...], npt.NDArray[np.float32]]:
        number = self._first + index
        chosen = self._order[self.num_images(number) : self.num_images(number + 1)]
        images = chosen.astype(np.int32) if self._resident else self._images[chosen]  # (B,) or (B, H, W, 3) uint8
        one_hot = np.zeros((len(chosen), self._num_classes), np.float32)
        one_hot[np.arange(len(chosen)), self._labels[chosen]] = 1.0
        if self._augment is None:
            return (images,), one_hot
        mirrored = self._mirrored[chosen] ^ (self._epoch % 2 == 1)
        generator = np.random.default_rng([self._seed or 0, self._epoch, 2, number])
        return (images, *draw_views(self._images.shape[1:3], mirrored, generator, *self._augment)), one_hot

    def select(self, epoch: int, first: int = 0, last: int | None = None) -> None:
        """Select batches of an epoch; their order and augmentation follow from the seed and the epoch alone.

        Args:
            epoch: index of the epoch, 0 for the first.
            first: index of the first batch.
            last: index after the last batch; None is the end of the epoch.
        """
        self._epoch = epoch
        self._first, self._last = first, self.number if last is None else last
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._order))


def draw_views(
    image_size: tuple[int, int],
    mirrored: npt.NDArray[np.bool_],
    generator: np.random.Generator,
    max_shift: float = 1 / 16,
    cutout: float = 0.0,
    reflected: bool = False,
) -> Views:
    """Draw a random view of each image: shifted in both directions, mirrored if asked for, partly hidden.

    Args:
        image_size: (height, width), pixels.
        mirrored: (N,), whether an image becomes its mirror image.
        max_shift: largest shift, as a fraction of each side.
        cutout: side of the hidden rectangle, as a fraction of each side; 0 hides nothing.
        reflected: fill the uncovered edge with reflected pixels instead of the nearest ones.
    """
    number = (len(mirrored), 1)
    indices, hidden = [], []
    for length in image_size:
        index = np.arange(length, dtype=np.int32)
        reach, hole = round(max_shift * length), round(cutout * length)
        shifted = index + generator.integers(-reach, reach + 1, number, np.int32)
        indices.append(reflect(shifted, length) if reflected else np.clip(shifted, 0, length - 1))
        if cutout:
            start = generator.integers(0, length - hole + 1, number)
            hidden.append((index >= start) & (index < start + hole))
    rows, columns = indices
    columns[mirrored] = columns[mirrored, ::-1]
    return (rows, columns, *hidden)


def stay_on_device(images: npt.NDArray[np.uint8], device: str) -> bool:
    """Return whether training images are sent to the device once instead of batch by batch.

    Args:
        device: result of `backend.select_device`.
    """
    return device != "cpu" and images.nbytes <= _RESIDENT_BYTES


class ResidentImages(keras.layers.Layer):  # type: ignore[misc]
    """All images of a split in the memory of the device: a batch is sent as one int32 index for each image.

    Args:
        images: uint8 (N, H, W, 3), read once.
    """

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        super().__init__(trainable=False, name="resident", dtype="uint8")

        def initial_value(shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ARG001
            return keras.ops.convert_to_tensor(np.asarray(images), dtype)

        self.images = self.add_weight(images.shape, initial_value, "uint8", trainable=False, name=RESIDENT_NAME)

    def call(self, indices: keras.KerasTensor) -> keras.KerasTensor:  # int32 (B,) -> uint8 (B, H, W, 3)
        """Return the images of a batch."""
        return keras.ops.take(self.images, indices, axis=0)


class Augmentation(keras.layers.Layer):  # type: ignore[misc]
    """Applies drawn views to a batch in one gather, on uint8, which has a quarter of the bytes of float32.

    Args:
        resident: layer that holds the images; None takes them from the batch.
        fill: colour of hidden pixels, RGB, 0-255.
    """

    def __init__(self, resident: ResidentImages | None = None, fill: Sequence[float] = (0, 0, 0)) -> None:
        super().__init__(trainable=False, name="augmentation", dtype="uint8")
        self._resident = resident
        self._fill = np.round(fill).astype(np.uint8)

    def call(self, inputs: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
        """Return the views of a batch, uint8 (B, H, W, 3).

        Args:
            inputs: images, uint8 (B, H, W, 3), or indices of resident images, int32 (B,); then their `Views`.
        """
        ops = keras.ops
        batch, rows, columns, *hidden = inputs
        images = batch if self._resident is None else self._resident.images
        indices = ops.arange(ops.shape(batch)[0], dtype="int32") if self._resident is None else batch
        _, height, width, channels = images.shape
        pixels = (indices[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]  # (B, H, W)
        views = ops.take(ops.reshape(images, (-1, channels)), pixels, axis=0)
        if hidden:
            views = ops.where((hidden[0][:, :, None] & hidden[1][:, None, :])[..., None], self._fill, views)
        return views


def shrink(images: keras.KerasTensor, size: tuple[int, int]) -> keras.KerasTensor:  # uint8 (N, H, W, C) -> same
    """Return smaller images, as antialiased bilinear resizing makes them.

    Two matrix products, which XLA compiles; it refuses `ops.image.resize` with `antialias`.

    Args:
        size: (height, width), pixels.
    """
    ops = keras.ops
    x = ops.cast(images, "float32")
    for shorter in size:  # each pass shrinks the height, then swaps height and width
        _, length, other, channels = x.shape
        x = ops.matmul(_shrinking(length, shorter), ops.reshape(x, (-1, length, other * channels)))
        x = ops.transpose(ops.reshape(x, (-1, shorter, other, channels)), (0, 2, 1, 3))
    return ops.cast(ops.round(x), "uint8")


def _shrinking(length: int, shorter: int) -> npt.NDArray[np.float32]:
    """Return the matrix (shorter, length) that shrinks a side; every row sums to 1.

    Source: antialiased bilinear resizing as in Pillow and TensorFlow, a triangle of twice the new pixel's width.
    """
    scale = length / shorter
    centres = (np.arange(shorter) + 0.5) * scale - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(length) - centres[:, None]) / scale)
    rows: npt.NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return rows
