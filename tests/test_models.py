"""The networks and their augmentation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cnnpipe.errors import TrainingError
from cnnpipe.training.backend import keras
from cnnpipe.training.datasets import PreparedDataset
from cnnpipe.training.models import Augmentation, build_model


def noise(image_size: tuple[int, int], number: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (number, *image_size, 3), dtype=np.uint8)


def test_baseline_is_the_tutorials_network() -> None:
    model = build_model("baseline", (32, 32), 10, noise((32, 32)))

    assert model.count_params() == 319_178
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Rescaling", *["Conv2D", "MaxPooling2D"] * 2, "Conv2D", "Flatten", "Dense", "Dense"]
    assert [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)] == [32, 64, 64]


@pytest.mark.parametrize("preset", ["baseline", "fast"])
@pytest.mark.parametrize(("image_size", "num_classes"), [((8, 8), 2), ((33, 47), 3), ((64, 32), 100), ((224, 224), 5)])
def test_model_takes_bytes_of_any_size_and_gives_probabilities(
    preset: str, image_size: tuple[int, int], num_classes: int
) -> None:
    images = noise(image_size, 5)
    model = build_model(preset, image_size, num_classes, images)

    probabilities = keras.ops.convert_to_numpy(model(images))

    assert model.inputs[0].dtype == "uint8"
    assert probabilities.shape == (5, num_classes)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_fast_sees_patches_that_are_uncorrelated_and_of_bounded_variance(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("train"))
    model = build_model("fast", (32, 32), 10, images)
    rescaling, whitening = model.layers[1], model.get_layer("whitening")

    seen = keras.ops.convert_to_numpy(whitening(rescaling(images)))[..., :12]

    covariance = np.cov(seen.reshape(-1, 12).T)
    varied = np.diag(covariance) > 0.5  # digits are gray: most directions do not vary at all
    assert 3 <= varied.sum() <= 4
    whitened = covariance[np.ix_(varied, varied)]
    assert np.abs(whitened - np.diag(np.diag(whitened))).max() < 0.02
    assert np.diag(whitened).max() < 1.05
    assert not whitening.trainable_weights


def test_fast_takes_images_of_one_colour() -> None:
    images = np.full((20, 32, 32, 3), 128, np.uint8)
    probabilities = keras.ops.convert_to_numpy(build_model("fast", (32, 32), 3, images)(images))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_too_small_images_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match=r"at least 8x8 pixels, received image_size \(4, 32\)"):
        build_model("baseline", (4, 32), 10, noise((4, 32)))


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
