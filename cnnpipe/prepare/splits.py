"""Decide which image learns, which one chooses the checkpoint, and which one only judges."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["SPLITS", "TEST", "TRAIN", "VAL", "assign_splits"]

SPLITS: Final = ("train", "val", "test")

TRAIN: Final = 0
VAL: Final = 1
TEST: Final = 2


def assign_splits(
    labels: npt.NDArray[np.int64],
    digests: Sequence[str],
    given: npt.NDArray[np.int8],
    *,
    val_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> npt.NDArray[np.int8]:
    """Take test and val out of train, class by class, where the source does not come with them.

    Images of the same content are never parted, or the test would ask what train has told. The order in which the
    images of a class are taken follows from a hash of their content and the seed, not from a shuffled list: so a
    folder that grows every night keeps nearly all of its images in the splits where they were, and a champion
    trained last week is not judged today on what it has learnt.

    Args:
        labels: class of each image, shape (N,).
        digests: content of each image; equal if and only if the content is.
        given: the split each image comes with, shape (N,), an index into `SPLITS`.
        val_fraction: share of train, once test is taken out, that becomes val; None keeps the val that is given.
        test_fraction: share of train that becomes test; None keeps the test that is given.
        seed: another seed, another choice.
    Returns:
        The split of each image, shape (N,). A class with at least one different image for each split has one in each;
        one with fewer stays whole in train.
    """
    # A content in several classes is a mistake in the labels; it counts for the class where it is seen first.
    groups: dict[int, dict[str, list[int]]] = {}
    home: dict[str, int] = {}
    for index in np.flatnonzero(given == TRAIN).tolist():
        digest = digests[index]
        label = home.setdefault(digest, int(labels[index]))
        groups.setdefault(label, {}).setdefault(digest, []).append(index)
    splits = given.copy()
    for contents in groups.values():
        ranked = sorted(contents, key=lambda digest: _rank(digest, seed))
        num_test, num_val = _held_out(len(ranked), test_fraction, val_fraction)
        for position, digest in enumerate(ranked[: num_test + num_val]):
            splits[contents[digest]] = TEST if position < num_test else VAL
    return splits


def _rank(digest: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()


def _held_out(count: int, test_fraction: float | None, val_fraction: float | None) -> tuple[int, int]:
    """Return how many of a class's `count` different images become test and val."""
    num_splits = 1 + (test_fraction is not None) + (val_fraction is not None)
    if count < num_splits:
        return 0, 0
    num_test = num_val = 0
    if test_fraction is not None:
        num_test = min(max(round(count * test_fraction), 1), count - (num_splits - 1))
    if val_fraction is not None:
        rest = count - num_test
        num_val = min(max(round(rest * val_fraction), 1), rest - 1)
    return num_test, num_val
