"""How many epochs a training has: the recipe's or, where its time is limited, as many as there is time for.

A training that is broken off at a high rate has learned far less than it could: so what is left is planned anew after
every epoch, by the time that the last one took, and the rate falls to zero within it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from cnnpipe.training.checkpoints import Epochs
from cnnpipe.training.recipes import Recipe

__all__ = ["FIRST_EPOCH_SHARE", "Plan", "plan_epochs", "relative_cost"]

FIRST_EPOCH_SHARE: Final = 0.2
"""Of the time, after which the first epoch ends, so that the others can be planned."""

_USED_SHARE: Final = 0.95
"""Of the time that is left: not every epoch takes as long as the last one."""


@dataclass(frozen=True)
class Plan:
    """What is left of a training."""

    image_sizes: tuple[tuple[int, int], ...]
    """(height, width) of training images, for each epoch that is left."""
    images: float
    """Share of the training images that each of these epochs sees."""
    start: float
    """Share of the training that is done."""
    end: float
    """The same after the next epoch."""


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
    most = max(1, math.ceil((1.0 - start) * recipe.epochs - 1e-6))
    plan = _plan(recipe, image_size, start, most)
    if max_seconds is None or not done.rows:
        return plan
    seconds = _USED_SHARE * (max_seconds - done.seconds)
    for number in range(1, most + 1):  # the fewest that fill the time
        plan = _plan(recipe, image_size, start, number)
        cost = num_images * sum(relative_cost(size, image_size) for size in plan.image_sizes)
        images = (seconds - number * done.validation_seconds) / (cost * done.seconds_per_image)
        if images <= 1.0:
            return Plan(plan.image_sizes, max(0.0, images), plan.start, plan.end)
    return plan


def relative_cost(size: tuple[int, int], whole: tuple[int, int]) -> float:
    """Return what an image of a size costs, in images of the whole size."""
    return math.prod(size) / math.prod(whole)


def _plan(recipe: Recipe, image_size: tuple[int, int], start: float, number: int) -> Plan:
    end = start + (1.0 - start) / number if number > 1 else 1.0
    return Plan(tuple(recipe.image_sizes(image_size, number, start)), 1.0, start, end)
