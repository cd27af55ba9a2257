"""Changes to a batch of training images on the device: fetch, mirror, shift, hide a part, shrink.

What is random is drawn by `batches.Batches` on the host. Here it is one gather, whatever is done to an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.train.backend import keras

__all__ = ["RESIDENT_NAME", "Augmentation", "ResidentImages", "draw_views", "shrink", "stay_on_device"]

RESIDENT_NAME: Final = "resident_images"

_RESIDENT_BYTES: Final = 2 << 30
"""Largest training split that stays in a GPU's memory: 690,000 images of 32x32 pixels, or 14,000 of 224x224."""

Views = tuple[npt.NDArray[Any], ...]
"""Rows, int32 (N, H), and columns, int32 (N, W), that pixels are taken from; with cutout also which of the new rows and
columns are hidden, bool (N, H) and (N, W)."""


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
