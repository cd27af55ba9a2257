"""The networks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cnnpipe.errors import TrainingError
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.train.backend import BatchNormalization, keras
from cnnpipe.train.batches import shrink
from cnnpipe.train.networks import PartialIdentity, average_views, build_network, measure_input, prediction_views


def noise(image_size: tuple[int, int], number: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (number, *image_size, 3), dtype=np.uint8)


def test_baseline_is_the_tutorials_network() -> None:
    model = build_network("baseline", (32, 32), 10, measure_input(noise((32, 32))))

    assert model.count_params() == 319_178
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Rescaling", *["Conv2D", "MaxPooling2D"] * 2, "Conv2D", "Flatten", "Dense", "Dense"]
    assert [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)] == [32, 64, 64]


@pytest.mark.parametrize("preset", ["baseline", "fast", "accurate"])
@pytest.mark.parametrize(("image_size", "num_classes"), [((8, 8), 2), ((33, 47), 3), ((64, 32), 100), ((224, 224), 5)])
def test_model_takes_bytes_of_any_size_and_gives_probabilities(
    preset: str, image_size: tuple[int, int], num_classes: int
) -> None:
    images = noise(image_size, 5)
    model = build_network(preset, image_size, num_classes, measure_input(images))

    probabilities = keras.ops.convert_to_numpy(model(images))

    assert model.inputs[0].dtype == "uint8"
    assert probabilities.shape == (5, num_classes)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_fast_sees_patches_that_are_uncorrelated_and_of_bounded_variance(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("train"))
    model = build_network("fast", (32, 32), 10, measure_input(images))
    rescaling, whitening = model.layers[1], model.get_layer("whitening")

    seen = keras.ops.convert_to_numpy(whitening(rescaling(images)))[..., :8]

    covariance = np.cov(seen.reshape(-1, 8).T)
    varied = np.diag(covariance) > 0.5  # digits are gray: most directions do not vary at all
    assert 3 <= varied.sum() <= 4
    whitened = covariance[np.ix_(varied, varied)]
    assert np.abs(whitened - np.diag(np.diag(whitened))).max() < 0.02
    assert np.diag(whitened).max() < 1.05
    assert not whitening.trainable_weights


def test_accurate_has_one_more_convolution_in_each_block_and_sums_where_fast_replaces() -> None:
    kinds = {}
    for preset in ("fast", "accurate"):
        model = build_network(preset, (32, 32), 10, measure_input(noise((32, 32))))
        kinds[preset] = [type(layer).__name__ for layer in model.layers]

    assert (kinds["fast"].count("Conv2D"), kinds["fast"].count("Add")) == (1 + 3 * 2, 0)
    assert (kinds["accurate"].count("Conv2D"), kinds["accurate"].count("Add")) == (1 + 3 * 3, 3 * 2)


def test_fast_takes_images_of_one_colour() -> None:
    images = np.full((20, 32, 32, 3), 128, np.uint8)
    probabilities = keras.ops.convert_to_numpy(build_network("fast", (32, 32), 3, measure_input(images))(images))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_too_small_images_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match=r"at least 8x8 pixels, received image_size \(4, 32\)"):
        build_network("baseline", (4, 32), 10, measure_input(noise((4, 32))))


def test_fast_passes_on_what_it_sees_before_it_has_learned() -> None:
    kernel = keras.ops.convert_to_numpy(PartialIdentity(seed=1)((3, 3, 4, 6)))
    images = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)

    passed = keras.ops.convert_to_numpy(keras.ops.conv(images, kernel, padding="same"))

    np.testing.assert_array_equal(passed[..., :4], images)
    assert kernel[..., 4:].std() == pytest.approx(np.sqrt(2 / 36), rel=0.3)
    np.testing.assert_array_equal(kernel, keras.ops.convert_to_numpy(PartialIdentity(seed=1)((3, 3, 4, 6))))


@pytest.mark.parametrize("image_size", [(16, 16), (33, 47), (64, 64), (100, 224)])
def test_fast_takes_images_of_three_quarters_of_the_side(image_size: tuple[int, int]) -> None:
    network = build_network("fast", image_size, 3, measure_input(noise(image_size, 5)), any_size=True)
    smaller = shrink(
        keras.ops.convert_to_tensor(noise(image_size, 2)), (image_size[0] * 3 // 4, image_size[1] * 3 // 4)
    )
    assert tuple(network(smaller).shape) == (2, 3)


def test_shifts_of_one_pixel_at_the_edge_are_reflected_and_weigh_half_as_much() -> None:
    views = prediction_views((32, 48), flips=True, shifts=True)
    assert [view.weight for view in views] == [1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8]
    _, _, up, _, down, mirrored_down = views
    assert (up.rows[:3].tolist(), up.columns[:3].tolist()) == ([1, 0, 1], [1, 0, 1])
    assert (down.rows[-3:].tolist(), down.columns[-3:].tolist()) == ([30, 31, 30], [46, 47, 46])
    assert mirrored_down.columns.tolist() == down.columns[::-1].tolist()
    assert prediction_views((224, 320), flips=False, shifts=True)[1].rows[:2].tolist() == [7, 6]


@pytest.mark.parametrize("preset", ["fast", "wide"])
def test_a_model_of_views_gives_their_weighted_mean(preset: str) -> None:
    images = noise((16, 24), 7)
    network = build_network(preset, (16, 24), 3, measure_input(images))
    views = prediction_views((16, 24), flips=True, shifts=True)
    shown = [np.asarray(network(images[:, view.rows][:, :, view.columns])) * view.weight for view in views]
    np.testing.assert_allclose(np.asarray(average_views(network, views)(images)), sum(shown), atol=1e-6)


@pytest.mark.parametrize("preset", ["baseline", "fast"])
def test_average_of_flips_is_the_mean_of_an_image_and_its_mirror_image(preset: str) -> None:
    images = noise((16, 24), 7)
    network = build_network(preset, (16, 24), 3, measure_input(images))
    model = average_views(network, prediction_views((16, 24), flips=True, shifts=False))

    alone, mirrored = (keras.ops.convert_to_numpy(network(each)) for each in (images, images[:, :, ::-1]))

    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(images)), (alone + mirrored) / 2, atol=1e-6)
    assert (model.input_shape, model.output_shape) == (network.input_shape, network.output_shape)
    assert [variable.path for variable in model.variables] == [variable.path for variable in network.variables]


def test_large_images_are_measured_as_the_network_averages_them() -> None:
    small = noise((32, 32), 20)
    large = small.repeat(7, axis=1).repeat(7, axis=2)
    of_small, of_large = measure_input(small), measure_input(large)
    assert of_large.mean == pytest.approx(of_small.mean)
    assert of_large.deviation == pytest.approx(of_small.deviation)
    np.testing.assert_allclose(of_large.filters, of_small.filters, atol=1e-3)


def test_no_more_pixels_are_measured_than_statistics_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.train.networks._WHITENED_PIXELS", 10 * 32 * 32)
    images = np.zeros((100, 32, 32, 3), np.uint8)
    images[::10] = 100  # every tenth is looked at
    assert measure_input(images).mean == [100.0] * 3
    assert measure_input(images[:7]).mean == pytest.approx([100 / 7] * 3)


def test_batch_normalization_gives_what_keras_gives_and_learns_as_keras_does() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(3.0, 2.0, (16, 5, 5, 4)).astype(np.float32)
    wanted = generator.normal(size=images.shape).astype(np.float32)
    seen = []
    for kind in (BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(momentum=0.6, scale=False)
        first = keras.layers.Dense(4, kernel_initializer="identity")  # whose gradients come through the layer
        model = keras.Sequential([keras.Input((5, 5, 4)), first, layer])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        outputs = keras.ops.convert_to_numpy(layer(images, training=True))
        model.fit(images, wanted, batch_size=16, epochs=2, verbose=0)
        seen.append([outputs, *model.get_weights(), model.predict(images, verbose=0)])

    number = images.size // 4
    for own, keras_own in zip(*seen, strict=True):
        np.testing.assert_allclose(own, keras_own, rtol=number / (number - 1) - 1 + 1e-4, atol=1e-4)
    assert abs(seen[0][0].mean()) < 1e-4
    assert seen[0][0].std() == pytest.approx(1.0, abs=1e-3)
