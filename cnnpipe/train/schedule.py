"""The schedule of a training: how many epochs and steps it has, and which of them use small images.

With a time budget (`--max-minutes`) the rest is planned from a measured pace and again after every epoch, so that the
learning rate reaches zero when the time is up: a training that is stopped at a high rate has learned far less.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import astuple, dataclass
from typing import Final, Self

__all__ = ["Pace", "Schedule", "Segment", "shorten"]

_USED_FRACTION: Final = 0.97
"""Fraction of the remaining time that is planned; the rest is for a pace that changes."""


@dataclass(frozen=True)
class Segment:
    """Consecutive batches of one epoch at one image size: one call of Keras' `fit`."""

    small: bool
    """Whether images are at 3/4 resolution."""
    first: int
    """Index of the first batch in its epoch."""
    last: int
    """Index after the last batch in its epoch."""


@dataclass(frozen=True)
class Schedule:
    """The planned length of a training."""

    epochs: int
    steps: int
    """Number of optimizer steps, spread evenly over the epochs."""
    small_fraction: float
    """Leading fraction of the steps that use small images, 0-1."""

    def batches(self, epoch: int, done_steps: int) -> int:
        """Return the number of batches of an epoch; the first epoch has index 0."""
        return max(1, round((self.steps - done_steps) / (self.epochs - epoch)))

    def segments(self, epoch: int, done_steps: int) -> list[Segment]:
        """Return the one or two segments of an epoch; the last step of a training always uses whole images.

        Args:
            epoch: index of the epoch, 0 for the first.
            done_steps: number of steps before it.
        """
        batches = self.batches(epoch, done_steps)
        small_steps = min(round(self.small_fraction * self.steps), self.steps - 1)
        boundary = min(max(small_steps - done_steps, 0), batches)
        segments = [Segment(True, 0, boundary), Segment(False, boundary, batches)]
        return [segment for segment in segments if segment.first < segment.last]


@dataclass(frozen=True)
class Pace:
    """Measured seconds of the parts of a training."""

    small_step: float
    """Seconds a step on small images; 0 if none are trained."""
    step: float
    """Seconds a step on whole images."""
    epoch_end: float
    """Seconds between two epochs: validation, checkpoint and saved model."""

    def seconds(self, small_steps: float, steps: float, epochs: int) -> float:
        """Return the seconds of this many epochs, with steps on small and on whole images."""
        return small_steps * self.small_step + steps * self.step + epochs * self.epoch_end

    def corrected(self, segments: list[Segment], seconds: float) -> Self:
        """Return the pace at which one epoch of these segments takes the seconds that it took."""
        sizes = {segment.small: segment.last - segment.first for segment in segments}
        factor = seconds / self.seconds(sizes.get(True, 0), sizes.get(False, 0), 1)
        return type(self)(*(factor * each for each in astuple(self)))


def shorten(full: Schedule, done_epochs: int, done_steps: int, pace: Pace, seconds: float) -> Schedule:
    """Return the longest schedule, up to the full one, whose rest fits the time that is left; one step at least.

    Args:
        full: the schedule without a time budget.
        done_epochs: number of epochs that are complete.
        done_steps: number of their steps.
        seconds: time left for training.
    """
    batches = full.steps // full.epochs

    def cost(steps: int) -> float:
        small = max(0.0, full.small_fraction * (done_steps + steps) - done_steps)
        return pace.seconds(small, steps - small, math.ceil(steps / batches))

    most = (full.epochs - done_epochs) * batches
    steps = max(1, bisect_right(range(1, most + 1), _USED_FRACTION * seconds, key=cost))
    return Schedule(done_epochs + math.ceil(steps / batches), done_steps + steps, full.small_fraction)
