"""What a training does next: a piece of an epoch, at one size of images, on its way along the rate's triangle.

Pieces end where images become whole, and with their epoch. Where time is limited, the first piece is a short one that
measures the pace, and what is left is planned anew after every piece: as many epochs as there is time for, the rate of
which falls to zero in them. A training that is broken off at a high rate has learned far less than it could.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from cnnpipe.training.checkpoints import Epochs
from cnnpipe.training.recipes import Recipe, small_size

__all__ = ["Piece", "plan_piece"]

_MEASURED_SHARE: Final = 0.05
"""Of the time, after which the first piece ends, so that the others can be planned."""

_USED_SHARE: Final = 0.95
"""Of the time that is left: the pace of what comes is not quite that of what was."""

_FORWARD_SHARE: Final = 1 / 3
"""Of a training step's work, which validation does too: the other two thirds are gradients."""


@dataclass(frozen=True)
class Piece:
    """Of an epoch, with what is known of the epochs that are left."""

    epochs: int
    """That are left, this one included."""
    batches: int
    """Of those, as far as there is time for them."""
    image_size: tuple[int, int]
    """(height, width) of training images."""
    image_cost: float
    """Of such an image, in images of the whole size."""
    first: int
    """Batch of the epoch, 0 for its first."""
    last: int
    """The batch after it."""
    ends_epoch: bool
    start: float
    """Share of the training that is done."""
    end: float
    """The same after the piece."""
    seconds: float = math.inf
    """After its first batch, when it is cut short; infinite where it never is."""


def plan_piece(
    recipe: Recipe,
    image_size: tuple[int, int],
    num_batches: int,
    num_images: tuple[int, int],
    done: Epochs,
    max_seconds: float | None,
) -> Piece:
    """Return what comes next; nothing does where `done.share` is 1.

    Args:
        image_size: (height, width) of the dataset.
        num_batches: of a whole epoch.
        num_images: for training and for validation.
        max_seconds: for the whole training, what is done included; None is no limit.
    """
    left, small_end = 1.0 - done.share, recipe.small_until(image_size)
    small_left = max(0.0, small_end - done.share) / left
    small_cost = math.prod(small_size(image_size)) / math.prod(image_size)
    rest = num_batches - done.batches  # of this epoch
    unlimited = done.batches + round(left * recipe.epochs * num_batches)  # batches, from the beginning of this epoch
    epochs, share = max(1, math.ceil(unlimited / num_batches)), 1.0
    if max_seconds is not None and done.seconds_per_image:
        cost = 1.0 - small_left * (1.0 - small_cost)
        compiling = done.compile_seconds if done.share <= small_end else 0.0  # for whole images
        seconds = _USED_SHARE * (max_seconds - done.seconds) - compiling
        epochs, share = _shorten(epochs, rest / num_batches, num_images, cost, done, seconds)
    batches = max(1, int(share * rest))
    all_batches = batches + (epochs - 1) * int(share * num_batches)
    small_batches = min(round(small_left * all_batches), all_batches - 1)  # the last one is always whole
    number = small_batches if 0 < small_batches < batches else batches
    end = done.share + left * number / all_batches if number < all_batches else 1.0
    return Piece(
        epochs=epochs,
        batches=all_batches,
        image_size=small_size(image_size) if small_batches else image_size,
        image_cost=small_cost if small_batches else 1.0,
        first=done.batches,
        last=done.batches + number,
        ends_epoch=number == batches,
        start=done.share,
        end=small_end if number == small_batches else end,
        seconds=math.inf if max_seconds is None or done.seconds_per_image else _MEASURED_SHARE * max_seconds,
    )


def _shorten(
    epochs: int, rest: float, num_images: tuple[int, int], cost: float, done: Epochs, seconds: float
) -> tuple[int, float]:
    """Return how many epochs there is time for, at most so many, and for which share of their images.

    Args:
        rest: share of this epoch's images that is left.
        num_images: for training and for validation.
        cost: of an image, on average, in images of the whole size.
        seconds: that are left.
    """
    estimate = _FORWARD_SHARE * (num_images[1] * done.seconds_per_image + done.compile_seconds)
    validation_seconds = done.validation_seconds or estimate

    def share_of_images(number: int) -> float:
        """Return the share that so many epochs have time for; more than 1 where there is time left."""
        images = (seconds - number * validation_seconds) / (cost * done.seconds_per_image)
        return images / num_images[0] / (rest + number - 1)

    fewest = 1 + bisect_left(range(1, epochs), True, key=lambda number: share_of_images(number) <= 1.0)
    return fewest, min(1.0, max(0.0, share_of_images(fewest)))
