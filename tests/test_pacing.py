"""How many epochs a training has, with and without a limit of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest

from cnnpipe.config import TrainSettings
from cnnpipe.training.checkpoints import Epochs
from cnnpipe.training.pacing import Plan, plan_epochs
from cnnpipe.training.recipes import Recipe, resolve_recipe

IMAGES = 40_000
WHOLE = (32, 32)


def recipe_of(epochs: int, preset: str = "fast") -> Recipe:
    return resolve_recipe(TrainSettings.model_validate({"preset": preset, "epochs": epochs}), IMAGES)


def train(
    recipe: Recipe, max_seconds: float | None, between: float, seconds_per_image: Callable[[int], float]
) -> tuple[list[Plan], Epochs]:
    """Return the plan of every epoch and what was done, where training costs so much, by the number of the epoch."""
    done, plans = Epochs(), list[Plan]()
    while done.share < 1.0 and (max_seconds is None or done.seconds < max_seconds):
        plan = plan_epochs(recipe, WHOLE, IMAGES, done, max_seconds)
        pace = seconds_per_image(len(plans))
        images = plan.images * IMAGES
        seconds = images * pace * plan.image_cost
        share = plan.end
        if done.seconds + seconds > plan.until:
            used = (plan.until - done.seconds) / seconds
            images, seconds = used * images, used * seconds
            share = plan.start + used * (plan.end - plan.start)
        plans.append(plan)
        done = Epochs(
            rows=(*done.rows, {}),
            seconds=done.seconds + seconds + between,
            images=done.images + round(images),
            share=share,
            seconds_per_image=pace,
            validation_seconds=between,
        )
    return plans, done


@pytest.mark.parametrize("epochs", [1, 2, 6, 14, 30, 71])
def test_without_a_limit_every_epoch_of_the_recipe_is_whole(epochs: int) -> None:
    plans, done = train(recipe_of(epochs), None, 5.0, lambda _: 1e-3)
    assert [plan.epochs for plan in plans] == list(range(epochs, 0, -1))
    assert {plan.images for plan in plans} == {1.0}
    small = recipe_of(epochs).small_epochs(WHOLE, epochs)
    assert [plan.image_size for plan in plans] == [(24, 24)] * small + [WHOLE] * (epochs - small)
    assert [plan.start for plan in plans] == pytest.approx([epoch / epochs for epoch in range(epochs)])
    assert done.share == 1.0


def test_a_limit_that_is_long_enough_changes_nothing() -> None:
    recipe = recipe_of(6)
    free, limited = (train(recipe, limit, 5.0, lambda _: 1e-3)[0] for limit in (None, 3600.0))
    assert [replace(plan, until=inf) for plan in limited] == free
    assert limited[1:] == free[1:]


@pytest.mark.parametrize("preset", ["baseline", "fast"])
@pytest.mark.parametrize("seconds", [45.0, 90.0, 160.0, 1_000.0])
def test_a_shortened_training_fills_its_time_and_ends_at_the_end_of_the_schedule(preset: str, seconds: float) -> None:
    recipe = recipe_of(50, preset)
    plans, done = train(recipe, seconds, 5.0, lambda _: 1e-3)
    assert done.share == 1.0
    assert 0.75 * seconds < done.seconds <= seconds
    assert (plans[-1].epochs, plans[-1].image_size) == (1, WHOLE)
    small = [plan.image_size != WHOLE for plan in plans]
    assert small == sorted(small, reverse=True)  # never small again after whole ones


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_the_plan_follows_the_speed_of_the_machine(factor: float) -> None:
    recipe = recipe_of(50)
    plans, done = train(recipe, 600.0, 5.0, lambda epoch: 1e-3 if epoch < 4 else factor * 1e-3)
    assert done.share == 1.0
    assert 0.8 * 600.0 < done.seconds < 1.05 * 600.0
    unchanged, _ = train(recipe, 600.0, 5.0, lambda _: 1e-3)
    assert (len(plans) > len(unchanged)) == (factor < 1)


def test_where_validation_alone_takes_the_time_an_epoch_has_hardly_an_image() -> None:
    done = Epochs(({},), 50.0, IMAGES, 0.1, seconds_per_image=1e-3, validation_seconds=40.0)
    plan = plan_epochs(recipe_of(10), WHOLE, IMAGES, done, 60.0)
    assert (plan.images, plan.end, plan.epochs, plan.image_size) == (0.0, 1.0, 1, WHOLE)


def test_a_single_epoch_that_was_cut_is_followed_by_what_is_left_of_it() -> None:
    plans, done = train(recipe_of(1), 30.0, 5.0, lambda _: 1e-3)
    assert len(plans) == 2
    assert done.share == 1.0
    assert done.seconds <= 30.0
    assert plans[0] == Plan(1, WHOLE, 1.0, 1.0, 0.0, 1.0, until=6.0)
