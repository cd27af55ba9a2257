"""Training: what it writes, which weights it saves, when it stops."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from cnnpipe.cli import app
from cnnpipe.errors import ProviderError, TrainingError
from cnnpipe.evaluate.evaluation import predict_keras
from cnnpipe.machine import Processor
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.registry import create_run
from cnnpipe.settings import RetrainSettings, TrainSettings, load_toml
from cnnpipe.train.backend import keras, select_precision
from cnnpipe.train.fit import HISTORY_COLUMNS, train_model
from cnnpipe.train.schedule import Pace, Schedule


def history_of(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_history_has_a_row_for_every_epoch(finished_run: Path) -> None:
    rows = history_of(finished_run)

    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["learning_rate"]) == pytest.approx(1e-3) for row in rows)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_the_saved_model_has_the_accuracy_and_loss_of_the_best_epoch(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=3, seed=1, precision="float32", label_smoothing=0.1))
    run = train_model(settings, digits, create_run(tmp_path, "digits")).run
    model = keras.saving.load_model(run / "model.keras")
    probabilities, labels = predict_keras(model, digits.images("val")), np.asarray(digits.labels("val"))

    best = max(history_of(run), key=lambda row: float(row["val_accuracy"]))
    assert np.mean(probabilities.argmax(axis=1) == labels) == pytest.approx(float(best["val_accuracy"]), abs=1e-6)
    smooth = 0.9 * np.eye(10)[labels] + 0.01
    assert -np.mean(np.sum(smooth * np.log(probabilities), axis=1)) == pytest.approx(float(best["val_loss"]), rel=1e-4)


def test_settings_and_environment_are_written_to_the_run(finished_run: Path, digits: PreparedDataset) -> None:
    settings = load_toml(RetrainSettings, finished_run / "config.toml")
    environment = json.loads((finished_run / "environment.json").read_text())

    assert settings.train == TrainSettings(epochs=3, seed=1)
    assert environment["device"] == "cpu"
    assert environment["dataset"] == str(digits.path)
    assert environment["source"] == "digits"
    assert environment["backend"] == "tensorflow"
    assert environment["versions"]["keras"] == keras.__version__


def test_the_same_seed_gives_the_same_weights(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=1, seed=7, augment=True))
    weights = []
    for name in ("first", "second"):
        run = create_run(tmp_path, name)
        train_model(settings, digits, run)
        weights.append(keras.saving.load_model(run / "model.keras").get_weights())

    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_images_that_stay_on_the_device_give_the_same_weights(
    digits: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=2, batch_size=128, seed=7, augment=True))
    weights = []
    for resident in (False, True):
        monkeypatch.setattr("cnnpipe.train.fit.stay_on_device", lambda *_, answer=resident: answer)
        run = create_run(tmp_path, "digits")
        train_model(settings, digits, run)
        weights.append(keras.saving.load_model(run / "model.keras").get_weights())

    for sent, stayed in zip(*weights, strict=True):
        np.testing.assert_array_equal(sent, stayed)


def test_patience_stops_after_that_many_epochs_without_improvement(
    digits: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cnnpipe")
    # At this rate no weight moves: the first epoch stays the best.
    settings = RetrainSettings(train=TrainSettings(epochs=30, batch_size=256, patience=2, learning_rate=1e-30))
    result = train_model(settings, digits, create_run(tmp_path, "digits"))
    rows = history_of(result.run)

    assert (len(rows), result.epochs, result.best_epoch) == (3, 3, 1)
    assert result.stopped == "no better weights by validation for 2 epochs than those of epoch 1"
    assert f"stopped after epoch 3: {result.stopped}" in caplog.text


def test_with_a_time_budget_fewer_epochs_are_trained_and_the_rate_falls_to_zero(
    digits: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Pace] = []

    def plan(full: Schedule, epochs: int, steps: int, pace: Pace, seconds: float) -> Schedule:
        paces.append(pace)
        return Schedule(2, 13, full.small_fraction)  # whatever the speed of this machine

    monkeypatch.setattr("cnnpipe.train.fit.shorten", plan)
    shown: list[tuple[int, int]] = []
    train = TrainSettings(preset="fast", epochs=20, batch_size=128, augment=False, max_minutes=0.5)
    run = create_run(tmp_path, "digits")
    result = train_model(RetrainSettings(train=train), digits, run, lambda _, done, total: shown.append((done, total)))

    assert all(each > 0.0 for pace in paces for each in astuple(pace))
    assert [float(row["learning_rate"]) for row in history_of(run)][1] == pytest.approx(0.0, abs=1e-6)
    assert (len(paces), result.epochs) == (2, 2)
    assert result.stopped == "0.5 minutes were enough for 1.4 epochs of 20"
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1] == round(result.images_per_second * result.seconds)


@pytest.mark.slow
def test_measuring_the_pace_leaves_the_training_as_it_is(digits: PreparedDataset, tmp_path: Path) -> None:
    histories = []
    for max_minutes in (None, 1.0):
        train = TrainSettings(preset="fast", epochs=1, batch_size=128, max_minutes=max_minutes)
        run = create_run(tmp_path, "digits")
        result = train_model(RetrainSettings(train=train), digits, run)
        histories.append([{**row, "seconds": ""} for row in history_of(run)])
        assert result.stopped is None
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_figures_of_an_epoch_of_two_image_sizes_are_over_all_its_images(
    digits: PreparedDataset, tmp_path: Path
) -> None:
    shown: list[tuple[int, int]] = []
    train = TrainSettings(preset="fast", epochs=1, batch_size=128, augment=False, learning_rate=1e-30)
    run = create_run(tmp_path, "digits")
    result = train_model(RetrainSettings(train=train), digits, run, lambda _, done, total: shown.append((done, total)))
    (row,) = history_of(run)

    assert result.epochs == 1
    assert round(result.images_per_second * result.seconds) == digits.num_images["train"]
    assert shown == sorted(shown)
    assert {total for _, total in shown} == {shown[-1][0]} == {digits.num_images["train"]}
    assert 0.0 < float(row["accuracy"]) < 0.5  # not the sum of two means
    assert 0.0 < float(row["loss"]) < 3.0


def test_a_budget_shorter_than_one_epoch_shortens_that_epoch(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=30, batch_size=16, max_minutes=0.0001))
    result = train_model(settings, digits, create_run(tmp_path, "digits"))

    assert (result.epochs, len(history_of(result.run))) == (1, 1)
    assert result.images_per_second * result.seconds < digits.num_images["train"] / 2
    assert result.stopped is not None
    assert re.fullmatch(r"0\.0001 minutes were enough for 0\.\d epochs of 30", result.stopped)


def test_a_training_that_reached_its_last_epoch_was_not_stopped(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=1, batch_size=256, max_minutes=1.0))

    assert train_model(settings, digits, create_run(tmp_path, "digits")).stopped is None


def test_class_weights_change_the_loss_that_is_trained_and_not_the_one_of_validation(
    digits: PreparedDataset, tmp_path: Path
) -> None:
    losses = []
    for weighted in (False, True):  # at this rate no weight moves
        train = TrainSettings(epochs=1, batch_size=256, learning_rate=1e-30, class_weights=weighted)
        run = create_run(tmp_path, "digits")
        train_model(RetrainSettings(train=train), digits, run)
        losses.append([float(history_of(run)[0][key]) for key in ("loss", "val_loss")])

    assert losses[0][0] != losses[1][0]
    assert losses[0][1] == losses[1][1]


def test_the_command_offers_what_ends_and_resumes_a_training() -> None:
    text = " ".join(CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"]).output.split())

    assert "--class-weights / --no-class-weights" in text
    assert "--patience" in text
    assert "--max-minutes" in text
    assert "--resume / --no-resume" in text


def test_the_saved_model_has_no_augmentation_in_it(digits: PreparedDataset, tmp_path: Path) -> None:
    run = create_run(tmp_path, "digits")
    train_model(RetrainSettings(train=TrainSettings(epochs=1, augment=True)), digits, run)

    kinds = {type(layer).__name__ for layer in keras.saving.load_model(run / "model.keras").layers}
    assert "Augmentation" not in kinds
    assert "Conv2D" in kinds


def test_progress_counts_every_training_image_of_every_epoch(digits: PreparedDataset, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    train_model(
        RetrainSettings(train=TrainSettings(epochs=2)),
        digits,
        create_run(tmp_path, "digits"),
        lambda *update: seen.append(update),
    )

    total = 2 * digits.num_images["train"]
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert "epoch 2/2" in seen[-1][0]


def test_a_diverging_loss_stops_with_one_line(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=3, learning_rate=1e30))

    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) in epoch 1; .* smaller --learning-rate"):
        train_model(settings, digits, create_run(tmp_path, "digits"))


def test_cuda_without_a_gpu_is_refused(digits: PreparedDataset, tmp_path: Path) -> None:
    if keras.distribution.list_devices("gpu"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ProviderError, match="'cuda' was requested, but TensorFlow finds 0 GPUs"):
        train_model(RetrainSettings(train=TrainSettings(device="cuda")), digits, create_run(tmp_path, "digits"))


@pytest.mark.slow
def test_importing_keras_leaves_the_choice_of_devices_open() -> None:
    code = """
import cnnpipe.train.backend
import tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)  # refused once TensorFlow has set up its devices
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (
            {"floatx": "float16", "epsilon": 0.01, "image_data_format": "channels_first", "backend": "torch"},
            {"KERAS_BACKEND": "torch", "KERAS_MAX_EPOCHS": "1", "KERAS_MAX_STEPS_PER_EPOCH": "many"},
        ),
        pytest.param({"floatx": "int8"}, {}, marks=pytest.mark.slow),
    ],
)
def test_settings_of_keras_in_a_home_or_the_environment_decide_nothing(
    settings: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(settings))
    code = """
from cnnpipe.train.backend import keras
weight = keras.Variable([1.0])
config = keras.config
print(config.floatx(), config.epsilon(), config.image_data_format(), config.backend(), weight.dtype)
print(config.max_epochs(), config.max_steps_per_epoch())
"""
    variables = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=variables)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "float32 1e-07 channels_last tensorflow float32\nNone None\n"


def test_the_summary_of_the_model_is_logged(
    digits: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cnnpipe")
    train_model(RetrainSettings(train=TrainSettings(epochs=1)), digits, create_run(tmp_path, "digits"))

    assert "319,178" in caplog.text
    assert "epoch 1/1" in caplog.text


@pytest.mark.parametrize("preset", ["baseline", pytest.param("fast", marks=pytest.mark.slow)])
def test_what_is_trained_in_bfloat16_is_saved_in_float32(preset: str, digits: PreparedDataset, tmp_path: Path) -> None:
    train = TrainSettings.model_validate({"preset": preset, "epochs": 2, "precision": "bfloat16", "augment": False})
    result = train_model(RetrainSettings(train=train), digits, create_run(tmp_path, "digits"))
    model = keras.saving.load_model(result.run / "model.keras")

    layers = model._flatten_layers(include_self=False)
    assert {layer.compute_dtype for layer in layers} == {"float32"}
    assert json.loads((result.run / "environment.json").read_text())["precision"] == "bfloat16"
    assert float(history_of(result.run)[-1]["loss"]) < float(history_of(result.run)[0]["loss"])
    # Validated in bfloat16 too: a few of 288 images may come out otherwise.
    correct = np.sum(predict_keras(model, digits.images("val")).argmax(axis=1) == digits.labels("val"))
    assert correct == pytest.approx(result.val_accuracy * digits.num_images["val"], abs=5)
    assert keras.config.dtype_policy().name == "float32"


def test_float16_on_a_cpu_is_refused(digits: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="precision float16 is for GPUs; on a CPU use float32"):
        train_model(RetrainSettings(train=TrainSettings(precision="float16")), digits, create_run(tmp_path, "digits"))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (Processor("AuthenticAMD", "AMD EPYC 9654", frozenset({"avx512f", "avx512_bf16"})), "bfloat16"),
        (Processor("AuthenticAMD", "AMD EPYC 7763", frozenset({"avx2"})), "float32"),
        (Processor("GenuineIntel", "Intel Xeon", frozenset({"avx512f", "avx512_bf16"})), "float32"),
        (Processor(), "float32"),
    ],
)
def test_a_cpu_computes_in_what_it_is_faster_in_unless_told_otherwise(
    processor: Processor, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnpipe.train.backend.find_processor", lambda: processor)
    assert [select_precision(asked, "cpu") for asked in ("auto", "float32", "bfloat16")] == [
        expected,
        "float32",
        "bfloat16",
    ]


@pytest.mark.slow
def test_averages_of_weights_halve_the_part_of_each_earlier_epoch_and_leave_the_training_as_it_is(
    digits: PreparedDataset, tmp_path: Path
) -> None:
    histories, saved = [], []
    for average in (False, True):
        train = TrainSettings(epochs=3, batch_size=128, learning_rate=3e-4, average_weights=average)
        run = create_run(tmp_path, "digits")
        weights: dict[str, list[npt.NDArray[np.float32]]] = {}

        def read(what: str, *_: int, run: Path = run, weights: dict[str, Any] = weights) -> None:
            label = what.split(",")[0]
            if label not in weights and (run / "model.keras").exists():
                weights[label] = keras.saving.load_model(run / "model.keras").get_weights()

        result = train_model(RetrainSettings(train=train), digits, run, read)
        assert result.best_epoch == 3  # every epoch is saved
        saved.append([*weights.values(), keras.saving.load_model(run / "model.keras").get_weights()])
        histories.append(history_of(run))

    (first, second, third), (_, _, averages) = saved
    for index, average in enumerate(averages):
        expected = first[index] / 4 + second[index] / 4 + third[index] / 2
        np.testing.assert_allclose(average, expected, atol=1e-6)
    last, averaged = histories
    assert [row["loss"] for row in last] == [row["loss"] for row in averaged]
    assert last[0]["val_loss"] == averaged[0]["val_loss"]
    assert last[2]["val_loss"] != averaged[2]["val_loss"]
