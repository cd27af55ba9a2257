"""Changes to training images: mirror images, shifts, cutout and smaller sizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.train.backend import keras
from cnnpipe.train.batches import Augmentation, ResidentImages, draw_views, shrink
from cnnpipe.train.checkpoints import training_state

Images = npt.NDArray[np.uint8]


def views(images: Images, mirrored: bool, seed: int = 3) -> Images:
    """Return what training sees of images."""
    drawn = draw_views(images.shape[1:3], np.full(len(images), mirrored), np.random.default_rng(seed))
    return np.asarray(Augmentation()([images, *drawn]))


@pytest.mark.parametrize("mirrored", [False, True])
def test_augmentation_only_mirrors_and_shifts(mirrored: bool, digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("val")[:16])

    changed = views(images, mirrored)

    originals = images[:, :, ::-1] if mirrored else images
    padded = np.pad(originals, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for index, image in enumerate(changed):
        shifts = [padded[index, dy : dy + 32, dx : dx + 32] for dy in range(5) for dx in range(5)]
        assert any(np.array_equal(image, each) for each in shifts)


def test_augmentation_gives_each_image_its_own_change_and_repeats_by_seed(digits: PreparedDataset) -> None:
    images = np.repeat(np.asarray(digits.images("val")[:1]), 64, axis=0)

    first, again, other = (views(images, False, seed) for seed in (5, 5, 6))

    assert len(np.unique(first, axis=0)) > 10
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cutout_hides_a_square_of_each_image_at_a_place_of_its_own() -> None:
    images = np.full((40, 16, 24, 3), 200, np.uint8)
    drawn = draw_views((16, 24), np.zeros(40, np.bool_), np.random.default_rng(2), cutout=3 / 8)
    hidden = np.asarray(Augmentation(fill=(1.4, 2.0, 3.0))([images, *drawn])) != 200

    np.testing.assert_array_equal(hidden.sum(axis=(1, 2, 3)), 6 * 9 * 3)
    places = {tuple(np.argwhere(each)[0]) for each in hidden}
    assert len(places) > 20
    for each in hidden:
        top, left, _ = np.argwhere(each)[0]
        assert each[top : top + 6, left : left + 9].all()


def test_images_that_are_not_square_keep_their_sides() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    assert views(images, True).shape == images.shape


def test_resident_images_are_fetched_by_index_and_augmented_as_those_of_a_batch(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("val")[:9])
    resident = ResidentImages(digits.images("val"))
    indices = np.array([8, 1, 0, 8], np.int32)
    mirrored = np.array([False, True, False, True])
    drawn = draw_views((32, 32), mirrored, np.random.default_rng(1))

    np.testing.assert_array_equal(np.asarray(resident(indices)), images[indices])
    np.testing.assert_array_equal(
        np.asarray(Augmentation(resident)([indices, *drawn])),
        np.asarray(Augmentation()([images[indices], *drawn])),
    )


def test_resident_images_are_not_part_of_what_a_training_goes_on_from(digits: PreparedDataset) -> None:
    indices = keras.Input((), dtype="int32")
    resident = ResidentImages(digits.images("val"))
    model = keras.Model(indices, keras.layers.Dense(2)(keras.layers.Flatten()(resident(indices))))
    model.compile("sgd")
    names = [variable.name for variable in training_state(model, keras.Sequential())]
    assert names == ["kernel", "bias", "iteration", "learning_rate"]


@pytest.mark.parametrize(("image_size", "size"), [((32, 32), (24, 24)), ((17, 40), (12, 30))])
def test_shrink_is_the_antialiased_resizing_of_keras(image_size: tuple[int, int], size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *image_size, 3), dtype=np.uint8)

    smaller = keras.ops.convert_to_numpy(shrink(keras.ops.convert_to_tensor(images), size))

    assert (smaller.shape, smaller.dtype) == ((3, *size, 3), np.uint8)
    expected = keras.ops.convert_to_numpy(keras.ops.image.resize(images.astype(np.float32), size, antialias=True))
    np.testing.assert_allclose(smaller, expected, atol=0.51)


def test_shrink_leaves_one_colour_as_it_is() -> None:
    images = np.full((2, 16, 16, 3), (0, 128, 255), np.uint8)
    smaller = keras.ops.convert_to_numpy(shrink(keras.ops.convert_to_tensor(images), (12, 12)))
    assert np.unique(smaller).tolist() == [0, 128, 255]
