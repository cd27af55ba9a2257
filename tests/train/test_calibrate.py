"""Temperature: what it is fitted to, and what becomes of the probabilities of a model that is kept."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cnnpipe.evaluate.evaluation import evaluate_split, open_model
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.registry import create_run
from cnnpipe.settings import EvaluateSettings, RetrainSettings, TrainSettings
from cnnpipe.train.backend import keras
from cnnpipe.train.calibrate import apply_temperature, fit_temperature
from cnnpipe.train.fit import train_model


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_by_which_labels_were_drawn_is_found(temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=2.0, size=(5_000, 10))
    labels = np.array([generator.choice(10, p=row / row.sum()) for row in softmax(logits / temperature).astype(float)])

    assert fit_temperature(softmax(logits)[None], labels) == pytest.approx(temperature, rel=0.05)


def test_few_images_that_are_all_right_do_not_make_a_network_certain() -> None:
    labels = np.arange(30) % 3
    right = softmax(np.eye(3)[labels])[None]  # 0.58 for the actual class
    surer = apply_temperature(right, fit_temperature(right, labels))

    assert surer.argmax(axis=1).tolist() == labels.tolist()
    assert 0.95 < surer.max() < 0.99


def test_probabilities_of_zero_have_a_temperature_too() -> None:
    certain = np.eye(3, dtype=np.float32)[None, [0, 1, 2, 0]]

    assert np.isfinite(fit_temperature(certain, np.array([0, 1, 2, 1])))


def test_a_temperature_is_applied_to_each_view_before_their_mean() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 6, 4))
    expected = softmax(logits / 0.3).mean(axis=0)

    np.testing.assert_allclose(apply_temperature(softmax(logits), 0.3), expected, atol=1e-6)
    np.testing.assert_allclose(apply_temperature(softmax(logits), 1.0), softmax(logits).mean(axis=0), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("augment", [True, False])
def test_what_fast_keeps_is_as_certain_as_it_is_right(
    digits: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, augment: bool
) -> None:
    caplog.set_level(logging.INFO, "cnnpipe")
    train = TrainSettings(preset="fast", epochs=3, augment=augment, seed=1)
    run = train_model(RetrainSettings(train=train), digits, create_run(tmp_path, "digits")).run
    evaluation = evaluate_split(open_model(run / "model.keras"), digits, EvaluateSettings())

    said = re.search(r"temperature (\S+) by 287 .* confidence (\S+), not (\S+), at accuracy (\S+)", caplog.text)
    assert said
    temperature, after, before, accuracy = map(float, said.groups())
    assert abs(after - accuracy) < 0.03 < abs(before - accuracy)
    assert temperature < 1.0
    assert evaluation.expected_calibration_error < 0.06
    layers = keras.saving.load_model(run / "model.keras")._flatten_layers(include_self=False)
    (scale,) = (layer.scale for layer in layers if getattr(layer, "offset", None) == 0.0)
    assert scale == pytest.approx(1 / 9 / temperature, rel=2e-3)
