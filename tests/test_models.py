"""The networks and their augmentation."""

from __future__ import annotations

import numpy as np
import pytest

from cnnpipe.config import TrainSettings
from cnnpipe.errors import TrainingError
from cnnpipe.training.backend import keras
from cnnpipe.training.datasets import PreparedDataset
from cnnpipe.training.models import Augmentation, build_model, resolve_recipe


def test_baseline_is_the_tutorials_network() -> None:
    model = build_model("baseline", (32, 32), 10)

    assert model.count_params() == 319_178
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Rescaling", *["Conv2D", "MaxPooling2D"] * 2, "Conv2D", "Flatten", "Dense", "Dense"]
    assert [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)] == [32, 64, 64]


def test_baseline_trains_as_the_tutorial_does_unless_told_otherwise() -> None:
    recipe = resolve_recipe(TrainSettings())
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.augment) == (15, 64, 1e-3, False)

    changed = resolve_recipe(TrainSettings(epochs=2, augment=True))
    assert (changed.epochs, changed.batch_size, changed.augment) == (2, 64, True)


@pytest.mark.parametrize(("image_size", "num_classes"), [((8, 8), 2), ((33, 47), 3), ((64, 32), 100)])
def test_model_takes_bytes_of_any_size_and_gives_probabilities(image_size: tuple[int, int], num_classes: int) -> None:
    model = build_model("baseline", image_size, num_classes)
    images = np.random.default_rng(0).integers(0, 256, (5, *image_size, 3), dtype=np.uint8)

    probabilities = keras.ops.convert_to_numpy(model(images))

    assert model.input_dtype == "uint8"
    assert probabilities.shape == (5, num_classes)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_too_small_images_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match=r"at least 8x8 pixels, received image_size \(4, 32\)"):
        build_model("baseline", (4, 32), 10)


class TestAugmentation:
    def test_changes_nothing_outside_training(self, digits: PreparedDataset) -> None:
        images = np.asarray(digits.images("val")[:16])
        np.testing.assert_array_equal(Augmentation()(images, training=False), images)

    def test_only_flips_and_shifts(self, digits: PreparedDataset) -> None:
        images = np.asarray(digits.images("val")[:16])

        changed = np.asarray(Augmentation(max_shift=1 / 16, seed=3)(images, training=True))

        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
        for index, image in enumerate(changed):
            shifts = [padded[index, dy : dy + 32, dx : dx + 32] for dy in range(5) for dx in range(5)]
            assert any(np.array_equal(image, each) or np.array_equal(image, each[:, ::-1]) for each in shifts)

    def test_gives_each_image_its_own_change_and_repeats_by_seed(self, digits: PreparedDataset) -> None:
        images = np.repeat(np.asarray(digits.images("val")[:1]), 64, axis=0)

        first = np.asarray(Augmentation(seed=5)(images, training=True))
        again = np.asarray(Augmentation(seed=5)(images, training=True))
        other = np.asarray(Augmentation(seed=6)(images, training=True))

        assert len(np.unique(first, axis=0)) > 10
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
