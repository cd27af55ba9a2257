"""Which pieces a training has, with and without a limit of time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest

from cnnpipe.settings import TrainSettings
from cnnpipe.train.checkpoints import Epochs
from cnnpipe.train.presets import Recipe, resolve_recipe
from cnnpipe.train.schedule import Piece, plan_piece

IMAGES = 40_000
BATCHES = 80
WHOLE, SMALL = (32, 32), (24, 24)
COMPILING = 3.0


def recipe_of(epochs: int, preset: str = "fast") -> Recipe:
    return resolve_recipe(TrainSettings.model_validate({"preset": preset, "epochs": epochs}), IMAGES)


def plan(
    recipe: Recipe,
    done: Epochs,
    max_seconds: float | None,
    batches: int = BATCHES,
    compiled: Collection[tuple[int, int]] = (SMALL, WHOLE),
) -> Piece:
    return plan_piece(recipe, WHOLE, batches, (IMAGES, IMAGES // 4), done, max_seconds, compiled)


def train(
    recipe: Recipe,
    max_seconds: float | None,
    seconds_per_image: Callable[[float], float],
    batches: int = BATCHES,
    validation_cost: float = 1 / 3,
) -> tuple[list[Piece], Epochs]:
    """Return all pieces and what was done, where training costs so much, by the share that is done.

    Args:
        validation_cost: of an image, in images for training.
    """
    done, pieces, compiled = Epochs(), list[Piece](), set[tuple[int, int]]()
    while done.share < 1.0 and (max_seconds is None or done.batches or done.seconds < max_seconds):
        piece = plan(recipe, done, max_seconds, batches, compiled)
        pace = seconds_per_image(done.share)
        of_a_batch = IMAGES / batches * pace * piece.image_cost
        planned = piece.last - piece.first
        measured = (number for number in range(1, planned) if piece.has_measured(number, (number - 1) * of_a_batch))
        number = next(measured, planned)
        compiling = 0.0 if piece.image_size in compiled else COMPILING
        compiled.add(piece.image_size)
        ended = number == planned and piece.ends_epoch
        validation = IMAGES / 4 * pace * validation_cost + (0.0 if done.rows else COMPILING / 3) if ended else 0.0
        pieces.append(replace(piece, last=piece.first + number, ends_epoch=ended))
        share = piece.start + (piece.end - piece.start) * number / planned
        done = Epochs(
            rows=(*done.rows, {}) if ended else done.rows,
            seconds=done.seconds + compiling + number * of_a_batch + validation,
            images=done.images + round(number * IMAGES / batches),
            share=piece.end if number == planned else share,
            seconds_per_image=pace,
            compile_seconds=max(done.compile_seconds, compiling),
            validation_seconds=validation or done.validation_seconds,
            batches=0 if ended else piece.first + number,
        )
    return pieces, done


@pytest.mark.parametrize("batches", [1, 2, 3, 16, 80])
@pytest.mark.parametrize("epochs", [1, 2, 3, 6, 14, 30, 71])
def test_without_a_limit_every_epoch_is_whole_and_so_are_the_images_of_the_last_third(
    epochs: int, batches: int
) -> None:
    pieces, done = train(recipe_of(epochs), None, lambda _: 1e-3, batches)
    ends = [place for place, piece in enumerate(pieces) if piece.ends_epoch]
    assert [pieces[end].last for end in ends] == [batches] * epochs
    assert [pieces[end].epochs for end in ends] == list(range(epochs, 0, -1))
    for before, piece in pairwise(pieces):
        assert piece.first == (0 if before.ends_epoch else before.last)
        assert piece.start == before.end
    small = [piece.image_size == SMALL for piece in pieces]
    assert small == sorted(small, reverse=True)
    assert sum(piece.last - piece.first for piece in pieces if piece.image_size == SMALL) == pytest.approx(
        2 / 3 * epochs * batches, abs=2 / 3
    )
    assert (len(done.rows), done.share) == (epochs, 1.0)
    assert len(pieces) <= epochs + 1


def test_the_rate_goes_the_same_way_at_every_step() -> None:
    pieces, _ = train(recipe_of(2), None, lambda _: 1e-3)
    steps = [(piece.end - piece.start) / (piece.last - piece.first) for piece in pieces]
    assert steps == pytest.approx([1 / (2 * BATCHES)] * 3, rel=0.02)  # the boundary is at no whole batch


def test_images_too_small_to_be_shrunk_and_other_presets_have_a_piece_an_epoch() -> None:
    pieces, _ = train(recipe_of(5, "baseline"), None, lambda _: 1e-3)
    assert [(piece.epochs, piece.image_size, piece.ends_epoch) for piece in pieces] == [
        (left, WHOLE, True) for left in (5, 4, 3, 2, 1)
    ]
    tiny = plan_piece(recipe_of(1), (15, 32), BATCHES, (IMAGES, IMAGES // 4), Epochs(), None)
    assert tiny == Piece(1, BATCHES, (15, 32), 1.0, 0, BATCHES, ends_epoch=True, start=0.0, end=1.0)


def test_a_limit_that_is_long_enough_only_measures_the_pace_first() -> None:
    recipe = recipe_of(6)
    free, limited = (train(recipe, limit, lambda _: 1e-3)[0] for limit in (None, 300.0))
    assert (limited[0].first, limited[1].first, limited[1].last) == (0, limited[0].last, BATCHES)
    assert [replace(piece, start=0.0, end=0.0) for piece in limited[2:]] == [
        replace(piece, start=0.0, end=0.0) for piece in free[1:]
    ]
    assert [piece.end for piece in limited[1:]] == pytest.approx([piece.end for piece in free])


@pytest.mark.parametrize("preset", ["baseline", "fast"])
@pytest.mark.parametrize("seconds", [25.0, 45.0, 90.0, 160.0, 1_000.0])
def test_a_shortened_training_fills_its_time_and_ends_at_the_end_of_the_schedule(preset: str, seconds: float) -> None:
    pieces, done = train(recipe_of(50, preset), seconds, lambda _: 1e-3)
    assert done.share == 1.0
    assert 0.75 * seconds < done.seconds <= seconds
    assert (pieces[-1].epochs, pieces[-1].image_size, pieces[-1].ends_epoch) == (1, WHOLE, True)
    small = [piece.image_size != WHOLE for piece in pieces]
    assert small == sorted(small, reverse=True)  # never small again after whole ones
    epochs = sum(piece.ends_epoch for piece in pieces)
    assert len(pieces) <= epochs + 2  # one that measures, one up to whole images


def test_what_is_measured_first_takes_a_twentieth_of_the_time() -> None:
    first = plan(recipe_of(6), Epochs(), 600.0)
    assert (first.seconds, first.first, first.last) == (30.0, 0, BATCHES)
    assert plan(recipe_of(6), Epochs(), None).seconds == inf


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_the_plan_follows_the_speed_of_the_machine(factor: float) -> None:
    recipe = recipe_of(50)
    pieces, done = train(recipe, 600.0, lambda share: 1e-3 if share < 0.3 else factor * 1e-3)
    assert done.share == 1.0
    assert 0.8 * 600.0 < done.seconds < 1.05 * 600.0
    unchanged, _ = train(recipe, 600.0, lambda _: 1e-3)
    assert (len(pieces) > len(unchanged)) == (factor < 1)


def test_where_validation_alone_takes_the_time_an_epoch_has_hardly_an_image() -> None:
    done = Epochs(({}, {}), 50.0, IMAGES, 0.9, seconds_per_image=1e-3, validation_seconds=40.0)
    piece = plan(recipe_of(10), done, 60.0)
    assert (piece.last, piece.end, piece.epochs, piece.image_size, piece.ends_epoch) == (1, 1.0, 1, WHOLE, True)


def test_an_epoch_that_is_under_way_goes_on_with_its_own_batches() -> None:
    done = Epochs(seconds=9.0, images=5_000, share=1 / 8, seconds_per_image=1e-3, compile_seconds=1.0, batches=10)
    piece = plan(recipe_of(1), done, 1e6)
    assert (piece.first, piece.image_size, piece.ends_epoch) == (10, SMALL, False)
    assert piece.last == 10 + round((2 / 3 - 1 / 8) / (7 / 8) * 70)
    assert piece.end == 2 / 3


@pytest.mark.parametrize("batches", [1, 2, 16, 80])
@pytest.mark.parametrize(("validation_cost", "share"), [(1 / 3, 1.0), (8.0, 0.7)])
def test_more_time_does_not_mean_less_training(batches: int, validation_cost: float, share: float) -> None:
    """But a little, where validation is dearer than an epoch of training, which only the first one tells."""
    trained = []
    for seconds in range(120, 400, 4):
        pieces, done = train(recipe_of(9), seconds, lambda _: 1e-3, batches, validation_cost)
        assert pieces[-1].ends_epoch
        assert done.share == 1.0 or done.seconds >= seconds
        trained.append(sum(piece.last - piece.first for piece in pieces))
    assert trained[-1] > 1.2 * trained[0]
    assert all(more >= share * less for less, more in pairwise(trained))


def test_a_training_that_goes_on_compiles_again_and_has_less_time() -> None:
    done = Epochs(({}, {}), 60.0, 2 * IMAGES, 0.5, 1e-3, compile_seconds=20.0, validation_seconds=1.0)
    batches = [
        plan(recipe_of(9), done, 120.0, compiled=compiled).batches for compiled in ((SMALL, WHOLE), (SMALL,), ())
    ]
    pace = IMAGES / BATCHES * 1e-3 * (2 / 3 + 1 / 3 * (24 / 32) ** 2)
    assert [batches[0] - more for more in batches[1:]] == pytest.approx([20.0 / pace, 40.0 / pace], abs=3)


def test_where_time_is_up_no_other_size_is_compiled() -> None:
    done = Epochs((), 30.0, 1_000, 0.01, seconds_per_image=1e-3, compile_seconds=10.0, batches=5)
    piece = plan(recipe_of(9), done, 10.0, compiled=(SMALL,))
    assert (piece.image_size, piece.last, piece.ends_epoch, piece.end) == (SMALL, 6, True, 1.0)
