"""How the presets are trained."""

from __future__ import annotations

import math

import pytest

from cnnpipe.settings import TrainSettings
from cnnpipe.train.presets import PRESETS, resolve_recipe, small_size


def test_baseline_trains_as_the_tutorial_does_unless_told_otherwise() -> None:
    recipe = resolve_recipe(TrainSettings(), 40_000)
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.augment) == (15, 64, 1e-3, False)
    assert recipe == resolve_recipe(TrainSettings(), 100)

    changed = resolve_recipe(TrainSettings(epochs=2, augment=True), 40_000)
    assert (changed.epochs, changed.batch_size, changed.augment) == (2, 64, True)


@pytest.mark.parametrize("num_images", [40, 300, 1_150, 10_000, 40_000])
def test_fast_takes_enough_steps_whatever_the_size_of_the_dataset(num_images: int) -> None:
    recipe = resolve_recipe(TrainSettings(preset="fast"), num_images)
    assert recipe.epochs * math.ceil(num_images / recipe.batch_size) >= 300
    assert recipe.learning_rate == pytest.approx(0.8 * recipe.batch_size / 512)
    assert (recipe.batch_size, recipe.epochs) == (512, 7) or num_images < 22_000


def test_what_the_user_sets_is_never_adapted() -> None:
    recipe = resolve_recipe(TrainSettings(preset="fast", epochs=1, batch_size=512, learning_rate=0.1), 40)
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (1, 512, 0.1)


def test_fast_begins_with_small_images_and_ends_with_whole_ones() -> None:
    recipe = resolve_recipe(TrainSettings(preset="fast"), 40_000)
    assert (recipe.small_until((32, 40)), small_size((32, 40))) == (2 / 3, (24, 30))
    assert recipe.small_until((15, 40)) == 0.0
    assert resolve_recipe(TrainSettings(), 40_000).small_until((32, 32)) == 0.0


def test_a_gpu_trains_longer_or_wider_on_whole_images_and_a_user_still_decides() -> None:
    for preset in PRESETS:
        on_a_cpu, on_a_gpu = (
            resolve_recipe(TrainSettings.model_validate({"preset": preset}), 40_000, each) for each in ("cpu", "cuda:0")
        )
        assert on_a_gpu.small_until((32, 32)) == 0.0
        assert on_a_gpu.epochs >= on_a_cpu.epochs
        assert on_a_cpu.cutout == 0.0
    wide = resolve_recipe(TrainSettings(preset="accurate"), 40_000, "cuda:0")
    assert (wide.network, wide.cutout, wide.max_shift) == ("wide", 12 / 32, 4 / 32)
    assert wide.average_shifts
    plain = resolve_recipe(TrainSettings(preset="accurate", augment=False), 40_000, "cuda:0")
    assert not plain.average_shifts
    assert resolve_recipe(TrainSettings(preset="fast", epochs=3), 40_000, "cuda:1").epochs == 3


def test_flips_are_averaged_only_where_they_are_trained() -> None:
    assert resolve_recipe(TrainSettings(preset="fast"), 40_000).average_flips
    assert not resolve_recipe(TrainSettings(preset="fast", augment=False), 40_000).average_flips
    assert not resolve_recipe(TrainSettings(augment=True), 40_000).average_flips


def test_label_smoothing_is_the_users_or_the_presets() -> None:
    smoothing = [
        resolve_recipe(TrainSettings(preset=preset, label_smoothing=chosen), 40_000).label_smoothing
        for preset, chosen in (("baseline", None), ("baseline", 0.3), ("fast", None), ("fast", 0.0))
    ]
    assert smoothing == [0.0, 0.3, 0.1, 0.0]
