"""Batches of a prepared split, for training in a seeded order and for validation in the file's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.train.augmentation import draw_views
from cnnpipe.train.backend import keras

__all__ = ["Batches", "open_batches"]


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
