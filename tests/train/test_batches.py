"""Batches of a split, and changes to training images: mirror images, shifts, cutout and smaller sizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.train.backend import keras, pipeline
from cnnpipe.train.batches import Augmentation, Batches, ResidentImages, draw_views, shrink
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


def test_cutout_hides_one_rectangle_at_a_random_position_in_each_image() -> None:
    images = np.full((40, 16, 24, 3), 200, np.uint8)
    drawn = draw_views((16, 24), np.zeros(40, np.bool_), np.random.default_rng(2), cutout=3 / 8)
    hidden = np.asarray(Augmentation(fill=(1.4, 2.0, 3.0))([images, *drawn])) != 200

    np.testing.assert_array_equal(hidden.sum(axis=(1, 2, 3)), 6 * 9 * 3)
    positions = {tuple(np.argwhere(each)[0]) for each in hidden}
    assert len(positions) > 20
    for each in hidden:
        top, left, _ = np.argwhere(each)[0]
        assert each[top : top + 6, left : left + 9].all()


def test_a_shift_uncovers_the_nearest_pixels_or_reflected_ones() -> None:
    nearest, reflected = (
        draw_views((8, 8), np.zeros(200, np.bool_), np.random.default_rng(3), 1 / 4, reflected=each)[0]
        for each in (False, True)
    )
    assert {tuple(row[:3]) for row in nearest if row[2] == 0} == {(0, 0, 0)}
    assert {tuple(row[:3]) for row in reflected if row[2] == 0} == {(2, 1, 0)}
    assert all(0 <= row.min() <= row.max() <= 7 for row in reflected)


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


def test_resident_images_are_not_part_of_the_state_of_a_training(digits: PreparedDataset) -> None:
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


def test_labels_are_class_indices_that_each_batch_has_one_hot() -> None:
    labels = np.array([2, 0, 1, 2, 2], np.int64)
    batches = Batches(np.zeros((5, 2, 2, 3), np.uint8), labels, num_classes=4, batch_size=3)
    one_hot = [batches[index][1] for index in range(len(batches))]
    assert [each.shape for each in one_hot] == [(2, 4), (3, 4)]
    assert one_hot[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(one_hot), np.eye(4)[labels])


def test_every_image_comes_once_an_epoch_in_an_order_of_the_seed_and_the_epoch() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    orders = []
    for seed, epoch in ((5, 0), (5, 1), (6, 0), (5, 0)):
        batches = Batches(images, np.zeros(100, np.int64), 2, batch_size=30, seed=seed)
        batches.select(epoch)
        orders.append(np.concatenate([batches[index][0][0].ravel() for index in range(len(batches))]).tolist())

    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] == orders[3]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_two_epochs_show_every_image_and_its_mirror_image_once() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1).repeat(2, axis=2)
    batches = Batches(images, np.zeros(100, np.int64), 2, batch_size=30, seed=5, augment=(0.0, 0.0, False))
    mirrored = []
    for epoch in (0, 1, 2, 0):
        batches.select(epoch)
        seen = [batches[index][0] for index in range(len(batches))]
        images_seen, columns = (np.concatenate([each[part] for each in seen]) for part in (0, 2))
        assert sorted(images_seen[:, 0, 0, 0].tolist()) == list(range(100))
        mirrored.append(set(images_seen[columns[:, 0] > columns[:, 1], 0, 0, 0].tolist()))

    assert mirrored[0] | mirrored[1] == set(range(100))
    assert not mirrored[0] & mirrored[1]
    assert 30 < len(mirrored[0]) < 70
    assert mirrored[0] == mirrored[2] == mirrored[3]


def test_equal_batches_leave_out_other_images_in_every_epoch() -> None:
    images = np.arange(99, dtype=np.uint8).reshape(99, 1, 1, 1)
    batches = Batches(images, np.zeros(99, np.int64), 2, batch_size=50, seed=5, equal=True)
    left_out = set()
    for epoch in range(2):
        batches.select(epoch)
        seen = [batches[index][0][0].ravel() for index in range(len(batches))]
        assert [len(each) for each in seen] == [49, 49]
        left_out |= set(range(99)) - set(np.concatenate(seen).tolist())
    assert len(left_out) == 2


def test_batches_read_ahead_in_one_epoch_do_not_get_into_the_next() -> None:
    images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
    batches = Batches(images, np.zeros(200, np.int64), 2, batch_size=10, seed=5)
    source = pipeline(batches)
    orders = []
    for epoch in range(3):
        next(iter(source))  # Keras does so too, and drops the rest
        batches.select(epoch)
        orders.append(np.concatenate([np.array(part).ravel() for (part,), _ in source]).tolist())

    assert orders == [np.random.default_rng([5, epoch]).permutation(200).tolist() for epoch in range(3)]
    assert not source.options().autotune.enabled  # it would hold up the end
