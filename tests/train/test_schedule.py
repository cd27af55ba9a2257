"""The schedule of a training, with and without a time budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from cnnpipe.train.schedule import Pace, Schedule, shorten

BATCHES = 80
PACE = Pace(small_step=0.3, step=0.5, epoch_end=4.0)


def full_schedule(epochs: int, batches: int, small_fraction: float) -> Schedule:
    return Schedule(epochs, epochs * batches, small_fraction)


def train(full: Schedule, budget: float, speed: Callable[[float], float] = lambda _: 1.0) -> tuple[Schedule, float]:
    """Return the last schedule of a training and its seconds, planned again after every epoch as `fit` does.

    Args:
        speed: factor by which everything takes longer than the pace measured at the start, by the seconds passed.
    """
    epoch = steps = 0
    seconds, pace, schedule = 0.0, PACE, full
    while steps < schedule.steps and (not epoch or seconds < budget):
        schedule = shorten(full, epoch, steps, pace, budget - seconds)
        segments = schedule.segments(epoch, steps)
        sizes = {segment.small: segment.last - segment.first for segment in segments}
        taken = speed(seconds) * PACE.seconds(sizes.get(True, 0), sizes.get(False, 0), 1)
        epoch, steps, seconds = epoch + 1, steps + segments[-1].last, seconds + taken
        pace = pace.corrected(segments, taken)
    assert steps == schedule.steps or seconds >= budget
    return schedule, seconds


@pytest.mark.parametrize("batches", [1, 2, 3, 16, 80])
@pytest.mark.parametrize("epochs", [1, 2, 3, 6, 14, 30, 71])
def test_without_a_budget_every_epoch_has_all_batches_and_the_last_third_has_whole_images(
    epochs: int, batches: int
) -> None:
    full = full_schedule(epochs, batches, 2 / 3)
    sizes = []
    for epoch in range(epochs):
        segments = full.segments(epoch, epoch * batches)
        assert (segments[0].first, segments[-1].last) == (0, batches)
        assert all(before.last == after.first for before, after in pairwise(segments))
        sizes += [segment.small for segment in segments for _ in range(segment.first, segment.last)]
    assert len(sizes) == full.steps == epochs * batches
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes[-1]
    assert sum(sizes) == pytest.approx(2 / 3 * len(sizes), abs=2 / 3)


def test_without_small_images_an_epoch_is_one_segment() -> None:
    full = full_schedule(5, BATCHES, 0.0)
    for epoch in range(5):
        (segment,) = full.segments(epoch, epoch * BATCHES)
        assert (segment.small, segment.first, segment.last) == (False, 0, BATCHES)


def test_a_budget_that_is_long_enough_changes_nothing() -> None:
    full = full_schedule(6, BATCHES, 2 / 3)
    assert train(full, 1_000.0)[0] == full


@pytest.mark.parametrize("small_fraction", [0.0, 2 / 3])
@pytest.mark.parametrize("budget", [25.0, 45.0, 90.0, 160.0, 1_000.0])
def test_a_shortened_training_fills_its_budget(small_fraction: float, budget: float) -> None:
    schedule, seconds = train(full_schedule(50, BATCHES, small_fraction), budget)
    assert 0.9 * budget < seconds <= budget
    assert schedule.steps <= BATCHES * schedule.epochs


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_the_plan_follows_the_speed_of_the_machine(factor: float) -> None:
    _, seconds = train(full_schedule(100, BATCHES, 2 / 3), 600.0, lambda passed: 1.0 if passed < 200.0 else factor)
    assert 0.9 * 600.0 < seconds < 1.05 * 600.0


def test_more_time_does_not_mean_less_training() -> None:
    steps = [train(full_schedule(9, BATCHES, 2 / 3), budget)[0].steps for budget in range(20, 400, 4)]
    assert all(more >= less for less, more in pairwise(steps))
    assert steps[-1] == 9 * BATCHES


@pytest.mark.parametrize("budget", [-5.0, 0.0, 1.0])
def test_where_there_is_no_time_one_step_on_whole_images_is_left(budget: float) -> None:
    schedule = shorten(full_schedule(9, BATCHES, 2 / 3), 0, 0, PACE, budget)
    assert (schedule.epochs, schedule.steps) == (1, 1)
    (segment,) = schedule.segments(0, 0)
    assert (segment.small, segment.last) == (False, 1)


def test_an_epoch_of_one_batch_is_planned_too() -> None:
    schedule, seconds = train(full_schedule(1_000, 1, 0.0), 60.0)
    assert schedule.steps == schedule.epochs == 13
    assert seconds <= 60.0
