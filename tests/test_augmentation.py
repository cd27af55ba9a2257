"""What training does to images: shifts and smaller sizes."""

from __future__ import annotations

import numpy as np

from cnnpipe.training.augmentation import Augmentation, ResidentImages, shrink
from cnnpipe.training.backend import keras
from cnnpipe.training.checkpoints import training_state
from cnnpipe.training.datasets import PreparedDataset


def test_augmentation_changes_nothing_outside_training(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("val")[:16])
    np.testing.assert_array_equal(Augmentation()(images, training=False), images)


def test_augmentation_only_shifts(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("val")[:16])

    changed = np.asarray(Augmentation(max_shift=1 / 16, seed=3)(images, training=True))

    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for index, image in enumerate(changed):
        shifts = [padded[index, dy : dy + 32, dx : dx + 32] for dy in range(5) for dx in range(5)]
        assert any(np.array_equal(image, each) for each in shifts)


def test_augmentation_gives_each_image_its_own_change_and_repeats_by_seed(digits: PreparedDataset) -> None:
    images = np.repeat(np.asarray(digits.images("val")[:1]), 64, axis=0)

    first = np.asarray(Augmentation(seed=5)(images, training=True))
    again = np.asarray(Augmentation(seed=5)(images, training=True))
    other = np.asarray(Augmentation(seed=6)(images, training=True))

    assert len(np.unique(first, axis=0)) > 10
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_resident_images_come_by_their_places_and_as_mirror_images(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("val")[:9])
    batch = ResidentImages(digits.images("val"))(np.array([16, 3, 0, 17], np.int32))
    np.testing.assert_array_equal(np.asarray(batch), [images[8], images[1, :, ::-1], images[0], images[8, :, ::-1]])


def test_resident_images_are_no_part_of_what_a_training_goes_on_from(digits: PreparedDataset) -> None:
    places = keras.Input((), dtype="int32")
    resident = ResidentImages(digits.images("val"))
    model = keras.Model(places, keras.layers.Dense(2)(keras.layers.Flatten()(resident(places))))
    model.compile("sgd")
    names = [variable.name for variable in training_state(model, keras.Sequential())]
    assert names == ["kernel", "bias", "iteration", "learning_rate"]


def test_shrink_averages_what_a_pixel_covers() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    smaller = keras.ops.convert_to_numpy(shrink(keras.ops.convert_to_tensor(images), (24, 24)))

    assert (smaller.shape, smaller.dtype) == ((3, 24, 24, 3), np.uint8)
    # Of pixels without neighbours in common the mean stays, and what averages of noise lose is their spread.
    np.testing.assert_allclose(smaller.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=2.0)
    assert smaller.std() < 0.8 * images.std()


def test_shrink_leaves_one_colour_as_it_is() -> None:
    images = np.full((2, 16, 16, 3), (0, 128, 255), np.uint8)
    assert np.unique(keras.ops.convert_to_numpy(shrink(keras.ops.convert_to_tensor(images), (12, 12)))).tolist() == [
        0,
        128,
        255,
    ]
