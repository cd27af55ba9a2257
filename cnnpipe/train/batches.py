"""Batches of a prepared split, for training in a seeded order and for validation in the file's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.train.backend import keras

__all__ = ["RESIDENT_NAME", "Augmentation", "Batches", "ResidentImages", "draw_views", "open_batches", "shrink",
           "stay_on_device"]  # fmt: skip

RESIDENT_NAME: Final = "resident_images"

_RESIDENT_BYTES: Final = 2 << 30
"""Largest training split that stays in a GPU's memory: 690,000 images of 32x32 pixels, or 14,000 of 224x224."""

Views = tuple[npt.NDArray[Any], ...]
"""Rows, int32 (N, H), and columns, int32 (N, W), that pixels are taken from; with cutout also which of the new rows and
columns are hidden, bool (N, H) and (N, W)."""


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split, straight from its memory-mapped bytes; a segment of an epoch may be taken.

    Every image comes once an epoch, in batches of equal sizes or one less. With `multiple` or `equal`, the few images
    that would be left over are left out, other ones in every epoch.

    Their order is not that of the file, which goes by class: a part of a batch would tell the classes of its images.

    With `augment`, each image is seen as `augmentation.draw_views` draws it. A random half of the images comes mirrored
    in the first epoch, the other half in the second, and so on: two epochs show both sides of every image, where a draw
    for each epoch shows only one side of every second image. Source: Jordan 2024, arXiv:2404.00498, "alternating flip".

    Args:
        images: uint8 (N, H, W, 3).
        one_hot: float32 (N, classes).
        batch_size: at most; a few more where `multiple` asks for it.
        seed: decides the order and what is drawn; None keeps the order of the file.
        multiple: every batch has a multiple of this many images, so that this many devices share it equally.
        equal: all batches have the same size, because each size is compiled anew.
        augment: (max_shift, cutout) of `augmentation.draw_views`, whose `Views` are given beside the images; None gives
            the images as they are.
        resident: give the indices of images in place of the images, see `augmentation.ResidentImages`.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        one_hot: npt.NDArray[np.float32],
        batch_size: int,
        seed: int | None,
        multiple: int = 1,
        *,
        equal: bool = False,
        augment: tuple[float, float] | None = None,
        resident: bool = False,
    ) -> None:
        super().__init__(workers=1)
        self._images, self._one_hot, self._augment, self._resident = images, one_hot, augment, resident
        self.number = math.ceil(len(images) / batch_size)
        """Batches of a whole epoch."""
        self._seed, self._multiple, self._equal = seed, multiple, equal
        self._order = np.arange(len(images))
        # The third number tells these draws from those of the order.
        self._mirrored = np.random.default_rng([seed or 0, 0, 1]).random(len(images)) < 0.5
        self._epoch = 0
        self._first, self._last = 0, self.number

    @property
    def smallest(self) -> int:
        """Images in the smallest batch."""
        return len(self._order) // self._multiple // self.number * self._multiple

    def num_images(self, number: int) -> int:
        """Return how many images the first `number` batches of an epoch have."""
        if self._equal:
            return number * self.smallest
        return number * (len(self._order) // self._multiple) // self.number * self._multiple

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> tuple[tuple[npt.NDArray[Any], ...], npt.NDArray[np.float32]]:
        number = self._first + index
        chosen = self._order[self.num_images(number) : self.num_images(number + 1)]
        given = chosen.astype(np.int32) if self._resident else self._images[chosen]  # (B,) or (B, H, W, 3) uint8
        if self._augment is None:
            return (given,), self._one_hot[chosen]  # (B, classes) float32
        mirrored = self._mirrored[chosen] ^ (self._epoch % 2 == 1)
        generator = np.random.default_rng([self._seed or 0, self._epoch, 2, number])
        views = draw_views(self._images.shape[1:3], mirrored, generator, *self._augment)
        return (given, *views), self._one_hot[chosen]

    def shuffle(self, epoch: int, first: int = 0, last: int | None = None) -> None:
        """Take the order of an epoch, and what is drawn in it; both follow from the seed and the epoch.

        Args:
            epoch: index, 0 for the first.
            first: index of the first batch to give.
            last: index after the last batch to give; None is the end of the epoch.
        """
        self._epoch = epoch
        self._first, self._last = first, self.number if last is None else last
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._order))


def open_batches(
    dataset: PreparedDataset, split: str, batch_size: int, seed: int | None = None, **options: Any
) -> Batches:
    """Return a split's batches.

    Args:
        batch_size, seed, options: see `Batches`.
    """
    one_hot = np.eye(len(dataset.class_names), dtype=np.float32)[dataset.labels(split)]
    return Batches(dataset.images(split), one_hot, batch_size, seed, **options)


def draw_views(
    image_size: tuple[int, int],
    mirrored: npt.NDArray[np.bool_],
    generator: np.random.Generator,
    max_shift: float = 1 / 16,
    cutout: float = 0.0,
) -> Views:
    """Draw how each image is seen: shifted at random in both directions, mirrored where asked for, partly hidden.

    The uncovered edge is filled by the nearest pixels.

    Args:
        image_size: (height, width), pixels.
        mirrored: (N,), whether an image becomes its mirror image.
        max_shift: largest shift, as a fraction of each side.
        cutout: side of the hidden square, as a fraction of each side; 0 hides nothing.
    """
    number = (len(mirrored), 1)
    indices, hidden = [], []
    for length in image_size:
        index = np.arange(length, dtype=np.int32)
        reach, hole = round(max_shift * length), round(cutout * length)
        indices.append(np.clip(index + generator.integers(-reach, reach + 1, number, np.int32), 0, length - 1))
        if cutout:
            start = generator.integers(0, length - hole + 1, number)
            hidden.append((index >= start) & (index < start + hole))
    rows, columns = indices
    columns[mirrored] = columns[mirrored, ::-1]
    return (rows, columns, *hidden)


def stay_on_device(images: npt.NDArray[np.uint8], device: str) -> bool:
    """Return whether training images are sent to the device once, not batch by batch.

    Args:
        device: what `backend.select_device` returned.
    """
    return device != "cpu" and images.nbytes <= _RESIDENT_BYTES


class ResidentImages(keras.layers.Layer):  # type: ignore[misc]
    """All images of a split in the memory of the device: a batch is told by indices of four bytes each.

    Args:
        images: uint8 (N, H, W, 3), read once.
    """

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        super().__init__(trainable=False, name="resident", dtype="uint8")

        def take_over(shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ARG001
            return keras.ops.convert_to_tensor(np.asarray(images), dtype)

        self.images = self.add_weight(images.shape, take_over, "uint8", trainable=False, name=RESIDENT_NAME)

    def call(self, indices: keras.KerasTensor) -> keras.KerasTensor:  # int32 (B,) -> uint8 (B, H, W, 3)
        """Return the images of a batch."""
        return keras.ops.take(self.images, indices, axis=0)


class Augmentation(keras.layers.Layer):  # type: ignore[misc]
    """The images of a batch as `draw_views` has drawn them; works on uint8, a quarter of the bytes of float32.

    Args:
        resident: where the images are; None takes them from the batch.
        fill: colour of what is hidden, RGB, 0-255.
    """

    def __init__(self, resident: ResidentImages | None = None, fill: Sequence[float] = (0, 0, 0)) -> None:
        super().__init__(trainable=False, name="augmentation", dtype="uint8")
        self._resident = resident
        self._fill = np.round(fill).astype(np.uint8)

    def call(self, inputs: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
        """Return the views of a batch, uint8 (B, H, W, 3).

        Args:
            inputs: images, uint8 (B, H, W, 3), or int32 (B,) of those that are resident; then their `Views`.
        """
        ops = keras.ops
        given, rows, columns, *hidden = inputs
        images = given if self._resident is None else self._resident.images
        starts = ops.arange(ops.shape(given)[0], dtype="int32") if self._resident is None else given
        _, height, width, channels = images.shape
        pixels = (starts[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]  # (B, H, W)
        views = ops.take(ops.reshape(images, (-1, channels)), pixels, axis=0)
        if hidden:
            views = ops.where((hidden[0][:, :, None] & hidden[1][:, None, :])[..., None], self._fill, views)
        return views

    def build(self, input_shape: Any) -> None:
        """Make no weights."""

    def compute_output_spec(self, inputs: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
        """Return the shape and dtype of what comes out."""
        _, rows, columns, *_ = inputs
        return keras.KerasTensor((rows.shape[0], rows.shape[1], columns.shape[1], 3), dtype="uint8")


def shrink(images: keras.KerasTensor, size: tuple[int, int]) -> keras.KerasTensor:  # uint8 (N, H, W, C) -> same
    """Return smaller images, each pixel the average of those that it covers, nearer ones weighing more.

    Two matrix products, which every device and XLA have; `ops.image.resize` with `antialias` is not compiled by XLA.

    Args:
        size: (height, width), pixels.
    """
    ops = keras.ops
    x = ops.cast(images, "float32")
    for shorter in size:  # the height becomes the width and the other way round, twice
        _, length, other, channels = x.shape
        x = ops.matmul(_shrinking(length, shorter), ops.reshape(x, (-1, length, other * channels)))
        x = ops.transpose(ops.reshape(x, (-1, shorter, other, channels)), (0, 2, 1, 3))
    return ops.cast(ops.round(x), "uint8")


def _shrinking(length: int, shorter: int) -> npt.NDArray[np.float32]:
    """Return the matrix that shrinks a side by a triangle of twice the new pixel's width, (shorter, length).

    Source: antialiased bilinear resizing as in Pillow and TensorFlow; every row sums to 1.
    """
    scale = length / shorter
    centres = (np.arange(shorter) + 0.5) * scale - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(length) - centres[:, None]) / scale)
    rows: npt.NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return rows
