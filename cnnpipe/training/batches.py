"""Batches of a prepared split, for training in a seeded order and for validation in the file's."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cnnpipe.training.backend import keras
from cnnpipe.training.datasets import PreparedDataset

__all__ = ["Batches", "open_batches"]


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split, straight from its memory-mapped bytes, of equal sizes or one less; every image once an epoch.

    Their order is not that of the file, which goes by class: a part of a batch would tell the classes of its images.

    With several replicas, which take equal parts of each batch, sizes are multiples of their number, and the few images
    of an epoch that would be left over, each time others, are left out.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        one_hot: npt.NDArray[np.float32],
        batch_size: int,
        seed: int | None,
        replicas: int = 1,
    ) -> None:
        super().__init__(workers=1)
        self._images, self._one_hot = images, one_hot
        self._number = math.ceil(len(images) / batch_size)
        self._seed, self._replicas = seed, replicas
        self._order = np.arange(len(images))

    @property
    def smallest(self) -> int:
        """Images in the smallest batch."""
        return len(self._order) // self._replicas // self._number * self._replicas

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        shares = len(self._order) // self._replicas
        start, end = (place * shares // self._number * self._replicas for place in (index, index + 1))
        chosen = self._order[start:end]
        return self._images[chosen], self._one_hot[chosen]  # (B, H, W, 3) uint8, (B, classes) float32

    def shuffle(self, epoch: int) -> None:
        """Take the order of an epoch, 0 for the first, which follows from it and the seed alone."""
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._order))


def open_batches(
    dataset: PreparedDataset, split: str, batch_size: int, seed: int | None = None, replicas: int = 1
) -> Batches:
    """Return a split's batches.

    Args:
        batch_size: at most.
        seed: of the order, which `Batches.shuffle` makes anew for each epoch; None keeps that of the file.
        replicas: devices that share each batch.
    """
    one_hot = np.eye(len(dataset.class_names), dtype=np.float32)[dataset.labels(split)]
    return Batches(dataset.images(split), one_hot, batch_size, seed, replicas)
