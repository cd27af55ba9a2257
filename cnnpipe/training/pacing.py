"""How many epochs a training has: the recipe's or, where its time is limited, as many as there is time for.

A training that is broken off at a high rate has learned far less than it could: so what is left is planned anew after
every epoch, by the time that the last one took, and a triangular rate falls to zero within it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from cnnpipe.training.checkpoints import Epochs
from cnnpipe.training.recipes import Recipe, small_size

__all__ = ["Plan", "plan_epochs"]

_FIRST_EPOCH_SHARE: Final = 0.2
"""Of the time, after which the first epoch ends, so that the others can be planned."""

_USED_SHARE: Final = 0.95
"""Of the time that is left: not every epoch takes as long as the last one."""


@dataclass(frozen=True)
class Plan:
    """What is left of a training."""

    epochs: int
    """That are left."""
    image_size: tuple[int, int]
    """(height, width) of training images in the next one."""
    image_cost: float
    """Of such an image, in images of the whole size."""
    images: float
    """Share of the training images that each of the epochs sees."""
    start: float
    """Share of the training that is done."""
    end: float
    """The same after the next epoch."""
    until: float
    """Seconds since the start of the training after which the next epoch is cut short; infinite where it never is."""


def plan_epochs(
    recipe: Recipe, image_size: tuple[int, int], num_images: int, done: Epochs, max_seconds: float | None
) -> Plan:
    """Return the plan for the epochs that are left; there is none left where `done.share` is 1.

    Args:
        image_size: (height, width) of the dataset.
        num_images: to train on.
        max_seconds: for the whole training, the epochs that are done included; None is no limit.
    """
    start = done.share
    small = small_size(image_size)
    small_cost = math.prod(small) / math.prod(image_size)
    seconds = math.inf if max_seconds is None else _USED_SHARE * (max_seconds - done.seconds)

    def share_of_images(epochs: int) -> float:
        """Return how much of the images each of so many epochs has time for; more than 1 where there is time left."""
        small_epochs = recipe.small_epochs(image_size, epochs, start)
        cost = num_images * (epochs - small_epochs * (1.0 - small_cost)) * done.seconds_per_image
        return (seconds - epochs * done.validation_seconds) / cost

    epochs, images = max(1, math.ceil((1.0 - start) * recipe.epochs - 1e-6)), 1.0
    if max_seconds is not None and done.rows:
        fewest = 1 + bisect_left(range(1, epochs), True, key=lambda number: share_of_images(number) <= 1.0)
        epochs, images = fewest, min(1.0, max(0.0, share_of_images(fewest)))
    shrunk = recipe.small_epochs(image_size, epochs, start) > 0
    return Plan(
        epochs=epochs,
        image_size=small if shrunk else image_size,
        image_cost=small_cost if shrunk else 1.0,
        images=images,
        start=start,
        end=start + (1.0 - start) / epochs if epochs > 1 else 1.0,
        until=math.inf if done.rows or max_seconds is None else _FIRST_EPOCH_SHARE * max_seconds,
    )
