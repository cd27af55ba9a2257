"""Assign each image to train, val or test: to learn from, to choose the checkpoint by, or to judge the model on."""

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
    given_split: npt.NDArray[np.int8],
    *,
    val_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> npt.NDArray[np.int8]:
    """Take test and val out of train, class by class, where the source does not come with them.

    Images of the same content stay in one split: a model must not be judged on what it has learned. The order in which
    the images of a class are taken follows from a hash of their content and the seed, not from a shuffled list, so a
    folder that grows every night keeps nearly all of its images in their splits. Test is taken from the front of that
    order and val after it, so that val lies between the other two: an image that changes its split as a class grows
    hardly ever moves from train to test, and last week's champion is not judged on what it has learned.

    Args:
        labels: class of each image, (N,).
        digests: digest of each image's content.
        given_split: split that each image comes with, (N,), an index into `SPLITS`.
        val_fraction: fraction of train, without test, that becomes val; None keeps the given val.
        test_fraction: fraction of train that becomes test; None keeps the given test.
        seed: determines the choice.
    Returns:
        The split of each image, (N,). A class with at least one different image for each split has one in each;
        a class with fewer stays in train.
    """
    # The same content in several classes is a mistake in the labels; it counts for the class where it is seen first.
    groups: dict[int, dict[str, list[int]]] = {}
    first_label: dict[str, int] = {}
    for index in np.flatnonzero(given_split == TRAIN).tolist():
        digest = digests[index]
        label = first_label.setdefault(digest, int(labels[index]))
        groups.setdefault(label, {}).setdefault(digest, []).append(index)
    splits = given_split.copy()
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
