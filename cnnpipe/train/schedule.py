"""What a training does next: a piece of an epoch, at one size of images, on its way along the rate's triangle.

Pieces end where images become whole, and with their epoch. Where time is limited, the first piece is a short one that
measures the pace, and what is left is planned anew after every piece: as many batches as there is time for, at the end
of which the rate is zero. A training that is broken off at a high rate has learned far less than it could.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from cnnpipe.train.checkpoints import Epochs
from cnnpipe.train.presets import Recipe, small_size

__all__ = ["Piece", "plan_piece"]

_MEASURED_SHARE: Final = 0.05
"""Of the time, for which the pace is measured once the first batch is done, so that the rest can be planned."""

_MEASURED_BATCHES: Final = 5
"""At least so many have a piece that measures."""

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
    """For which a piece measures the pace; infinite for one that does not."""

    def has_measured(self, batches: int, seconds: float) -> bool:
        """Return whether a piece has measured enough.

        Args:
            batches: that are done.
            seconds: since the first of them was.
        """
        return seconds > self.seconds and batches >= _MEASURED_BATCHES


def plan_piece(
    recipe: Recipe,
    image_size: tuple[int, int],
    num_batches: int,
    num_images: tuple[int, int],
    done: Epochs,
    max_seconds: float | None,
    compiled: Collection[tuple[int, int]] = (),
) -> Piece:
    """Return what comes next; nothing does where `done.share` is 1.

    Args:
        image_size: (height, width) of the dataset.
        num_batches: of a whole epoch.
        num_images: for training and for validation.
        max_seconds: for the whole training, what is done included; None is no limit.
        compiled: the sizes of images that this process has trained on.
    """
    left, small_end, small = 1.0 - done.share, recipe.small_until(image_size), small_size(image_size)
    small_left = max(0.0, small_end - done.share) / left
    small_cost = math.prod(small) / math.prod(image_size)
    rest = num_batches - done.batches  # of this epoch
    batches, late = max(1, round(left * recipe.epochs * num_batches)), False
    if max_seconds is not None and done.seconds_per_image:
        seconds = _USED_SHARE * (max_seconds - done.seconds)
        sizes = {image_size, small} if small_left else {image_size}
        seconds -= done.compile_seconds * len(sizes - set(compiled))
        pace = done.seconds_per_image * num_images[0] / num_batches * (1.0 - small_left * (1.0 - small_cost))
        batches, late = _count_batches(batches, rest, num_batches, num_images[1], pace, done, seconds), seconds <= 0.0
    epochs = _count_epochs(batches, rest, num_batches)
    own = max(1, round(batches * rest / (rest + (epochs - 1) * num_batches)))  # of this epoch
    # The last batch is always of whole images, unless there is no time to compile that.
    small_batches = 0 if not small_left else batches if late else min(round(small_left * batches), batches - 1)
    number = small_batches if 0 < small_batches < own else own
    end = small_end if number == small_batches else done.share + left * number / batches
    return Piece(
        epochs=epochs,
        batches=batches,
        image_size=small if small_batches else image_size,
        image_cost=small_cost if small_batches else 1.0,
        first=done.batches,
        last=done.batches + number,
        ends_epoch=number == own,
        start=done.share,
        end=1.0 if number == batches else end,
        seconds=math.inf if max_seconds is None or done.seconds_per_image else _MEASURED_SHARE * max_seconds,
    )


def _count_epochs(batches: int, rest: int, num_batches: int) -> int:
    """Return over how many epochs so many batches go, of which this one has so many left."""
    return 1 + max(0, math.ceil((batches - rest) / num_batches))


def _count_batches(
    most: int, rest: int, num_batches: int, num_val: int, pace: float, done: Epochs, seconds: float
) -> int:
    """Return for how many batches there is time, and for the validation of their epochs; one at least.

    Args:
        most: there are no more.
        rest: batches that are left of this epoch.
        num_batches: of a whole epoch.
        num_val: images for validation.
        pace: seconds a batch, on average.
        seconds: that are left.
    """
    validation_seconds = _FORWARD_SHARE * num_val * done.seconds_per_image
    if len(done.rows) > 1:
        validation_seconds = done.validation_seconds
    elif done.rows:  # the first one had to be compiled
        validation_seconds = min(validation_seconds, done.validation_seconds)
    else:
        seconds -= _FORWARD_SHARE * done.compile_seconds

    def cost(batches: int) -> float:
        return batches * pace + _count_epochs(batches, rest, num_batches) * validation_seconds

    return max(1, bisect_right(range(1, most + 1), seconds, key=cost))
