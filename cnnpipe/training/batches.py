"""Batches of a prepared split, for training in a seeded order and for validation in the file's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnpipe.training.backend import keras
from cnnpipe.training.datasets import PreparedDataset

__all__ = ["Batches", "open_batches"]


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split, straight from its memory-mapped bytes, of equal sizes or one less; every image once an epoch,
    of which a piece may be taken.

    Their order is not that of the file, which goes by class: a part of a batch would tell the classes of its images.

    With several replicas, which take equal parts of each batch, sizes are multiples of their number, and the few images
    of an epoch that would be left over, each time others, are left out.

    Mirrored, a random half of the images comes as mirror images in the first epoch, the other half in the second, and
    so on: two epochs show both sides of every image, where a draw for each epoch shows only one side of every second.
    Source: Jordan 2024, arXiv:2404.00498, "alternating flip".

    With `places`, images stay where they are, and their places in the split are given, as `augmentation.ResidentImages`
    takes them.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        one_hot: npt.NDArray[np.float32],
        batch_size: int,
        seed: int | None,
        replicas: int = 1,
        *,
        mirrored: bool = False,
        places: bool = False,
    ) -> None:
        super().__init__(workers=1)
        self._images, self._one_hot, self._places = images, one_hot, places
        self.number = math.ceil(len(images) / batch_size)
        """Batches of a whole epoch."""
        self._seed, self._replicas = seed, replicas
        self._order = np.arange(len(images))
        self._mirrored: npt.NDArray[np.bool_] | None = None
        if mirrored and seed is not None:
            # The third number tells these draws from those of the order.
            self._mirrored = np.random.default_rng([seed, 0, 1]).random(len(images)) < 0.5
        self._epoch = 0
        self._first, self._last = 0, self.number

    @property
    def smallest(self) -> int:
        """Images in the smallest batch."""
        return len(self._order) // self._replicas // self.number * self._replicas

    def num_images(self, number: int) -> int:
        """Return how many images the first so many batches of an epoch have."""
        return number * (len(self._order) // self._replicas) // self.number * self._replicas

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        number = self._first + index
        chosen = self._order[self.num_images(number) : self.num_images(number + 1)]
        mirrored = np.zeros(len(chosen), np.bool_)
        if self._mirrored is not None:
            mirrored = self._mirrored[chosen] ^ (self._epoch % 2 == 1)
        if self._places:
            return (2 * chosen + mirrored).astype(np.int32), self._one_hot[chosen]  # (B,), (B, classes) float32
        images = self._images[chosen]
        images[mirrored] = images[mirrored, :, ::-1]
        return images, self._one_hot[chosen]  # (B, H, W, 3) uint8, (B, classes) float32

    def shuffle(self, epoch: int, first: int = 0, last: int | None = None) -> None:
        """Take the order of an epoch, 0 for the first, and its mirror images; both follow from the seed and it.

        Args:
            first: batch of the epoch to give, 0 for its first.
            last: the batch after those to give; None is all.
        """
        self._epoch = epoch
        self._first, self._last = first, self.number if last is None else last
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._order))


def open_batches(
    dataset: PreparedDataset,
    split: str,
    batch_size: int,
    seed: int | None = None,
    replicas: int = 1,
    *,
    mirrored: bool = False,
    places: bool = False,
) -> Batches:
    """Return a split's batches.

    Args:
        batch_size: at most; with several replicas, of which each gets as many images, a few more now and then.
        seed: of the order, which `Batches.shuffle` makes anew for each epoch; None keeps that of the file.
        replicas: devices that share each batch.
        mirrored: every other time an image comes, as its mirror image; only with a seed.
        places: give no images, but where they are in the split.
    """
    one_hot = np.eye(len(dataset.class_names), dtype=np.float32)[dataset.labels(split)]
    return Batches(dataset.images(split), one_hot, batch_size, seed, replicas, mirrored=mirrored, places=places)
