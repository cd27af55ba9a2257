"""Training: what it writes, what it keeps, where it stops."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cnnpipe.cli import app
from cnnpipe.errors import ProviderError, TrainingError
from cnnpipe.evaluate.predict import predict_keras
from cnnpipe.machine import Processor
from cnnpipe.prepare.dataset import PreparedDataset, prepare_dataset
from cnnpipe.registry import create_run
from cnnpipe.settings import PrepareSettings, RetrainSettings, TrainSettings, load_toml
from cnnpipe.train.backend import keras, pipeline, select_precision
from cnnpipe.train.batches import Batches
from cnnpipe.train.fit import HISTORY_COLUMNS, _class_weights, train_model
from cnnpipe.train.schedule import Piece, plan_piece


def history_of(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def count_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass with every look at the clock: about one for each step."""
    clock = count(0.0)
    monkeypatch.setattr("cnnpipe.train.fit.time", SimpleNamespace(perf_counter=lambda: next(clock)))


def watch_pieces(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """Return the list to which every piece of a training will be added."""
    pieces: list[Piece] = []

    def plan(*given: Any) -> Piece:
        pieces.append(plan_piece(*given))
        return pieces[-1]

    monkeypatch.setattr("cnnpipe.train.fit.plan_piece", plan)
    return pieces


def test_history_has_a_row_for_every_epoch(finished_run: Path) -> None:
    rows = history_of(finished_run)

    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["learning_rate"]) == pytest.approx(1e-3) for row in rows)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_the_kept_model_is_the_one_of_the_best_validation_accuracy(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=3, seed=1, precision="float32"))
    run = train_model(settings, digits, create_run(tmp_path, "digits")).run
    model = keras.saving.load_model(run / "model.keras")
    predicted = predict_keras(model, digits.images("val")).argmax(axis=1)

    best = max(float(row["val_accuracy"]) for row in history_of(run))
    assert np.mean(predicted == digits.labels("val")) == pytest.approx(best, abs=1e-6)


def test_settings_and_environment_are_written_to_the_run(finished_run: Path, digits: PreparedDataset) -> None:
    settings = load_toml(RetrainSettings, finished_run / "config.toml")
    environment = json.loads((finished_run / "environment.json").read_text())

    assert settings.train == TrainSettings(epochs=3, seed=1)
    assert environment["device"] == "cpu"
    assert environment["dataset"] == str(digits.path)
    assert environment["source"] == "digits"
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


def test_every_image_comes_once_an_epoch_in_an_order_of_the_seed_and_the_epoch() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    orders = []
    for seed, epoch in ((5, 0), (5, 1), (6, 0), (5, 0)):
        batches = Batches(images, np.zeros((100, 2), np.float32), batch_size=30, seed=seed)
        batches.shuffle(epoch)
        orders.append(np.concatenate([batches[index][0][0].ravel() for index in range(len(batches))]).tolist())

    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] == orders[3]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_two_epochs_show_every_image_and_its_mirror_image_once() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1).repeat(2, axis=2)
    batches = Batches(images, np.zeros((100, 2), np.float32), batch_size=30, seed=5, augment=(0.0, 0.0))
    mirrored = []
    for epoch in (0, 1, 2, 0):
        batches.shuffle(epoch)
        seen = [batches[index][0] for index in range(len(batches))]
        given, columns = (np.concatenate([each[part] for each in seen]) for part in (0, 2))
        assert sorted(given[:, 0, 0, 0].tolist()) == list(range(100))
        mirrored.append(set(given[columns[:, 0] > columns[:, 1], 0, 0, 0].tolist()))

    assert mirrored[0] | mirrored[1] == set(range(100))
    assert not mirrored[0] & mirrored[1]
    assert 30 < len(mirrored[0]) < 70
    assert mirrored[0] == mirrored[2] == mirrored[3]


def test_equal_batches_leave_out_other_images_in_every_epoch() -> None:
    images = np.arange(99, dtype=np.uint8).reshape(99, 1, 1, 1)
    batches = Batches(images, np.zeros((99, 2), np.float32), batch_size=50, seed=5, equal=True)
    left_out = set()
    for epoch in range(2):
        batches.shuffle(epoch)
        seen = [batches[index][0][0].ravel() for index in range(len(batches))]
        assert [len(each) for each in seen] == [49, 49]
        left_out |= set(range(99)) - set(np.concatenate(seen).tolist())
    assert len(left_out) == 2


def test_what_is_read_ahead_of_one_epoch_does_not_get_into_the_next() -> None:
    images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
    batches = Batches(images, np.zeros((200, 2), np.float32), batch_size=10, seed=5)
    source = pipeline(batches)
    orders = []
    for epoch in range(3):
        next(iter(source))  # Keras does so too, and drops the rest
        batches.shuffle(epoch)
        orders.append(np.concatenate([np.array(part).ravel() for (part,), _ in source]).tolist())

    assert orders == [np.random.default_rng([5, epoch]).permutation(200).tolist() for epoch in range(3)]
    assert not source.options().autotune.enabled  # it would hold up the end


def test_patience_stops_after_so_many_epochs_without_improvement(
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


def test_where_time_is_limited_fewer_epochs_are_planned_and_the_rate_falls_to_zero_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = prepare_dataset(PrepareSettings(image_size=(12, 12)), tmp_path)
    count_seconds(monkeypatch)
    train = TrainSettings(preset="fast", epochs=20, batch_size=128, augment=False, max_minutes=1.0)
    result = train_model(RetrainSettings(train=train), dataset, create_run(tmp_path, "digits"))
    rows = history_of(result.run)

    assert 3 <= len(rows) == result.epochs < 10
    assert 45 < result.seconds <= 60
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert rates == sorted(rates, reverse=True)
    assert result.stopped is not None
    assert re.fullmatch(r"1 minutes were enough for \d\.\d epochs of 20", result.stopped)


def test_an_epoch_in_pieces_has_every_image_once_and_one_row(
    digits: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = watch_pieces(monkeypatch)
    shown: list[tuple[int, int]] = []
    train = TrainSettings(preset="fast", epochs=1, batch_size=128, augment=False)
    run = create_run(tmp_path, "digits")
    result = train_model(RetrainSettings(train=train), digits, run, lambda _, done, total: shown.append((done, total)))

    assert [(piece.image_size, piece.first, piece.last) for piece in pieces] == [((24, 24), 0, 6), ((32, 32), 6, 9)]
    assert len(history_of(run)) == result.epochs == 1
    assert round(result.images_per_second * result.seconds) == digits.num_images["train"]
    assert shown == sorted(shown)
    assert {total for _, total in shown} == {shown[-1][0]} == {digits.num_images["train"]}


def test_figures_of_an_epoch_are_over_all_its_images_however_it_was_cut(
    digits: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_seconds(monkeypatch)
    pieces = watch_pieces(monkeypatch)
    rows = []
    for max_minutes in (None, 1.0):  # at this rate no weight moves
        train = TrainSettings(epochs=1, batch_size=128, learning_rate=1e-30, max_minutes=max_minutes)
        run = create_run(tmp_path, "digits")
        train_model(RetrainSettings(train=train), digits, run)
        rows.append([float(history_of(run)[0][key]) for key in ("accuracy", "loss")])

    assert [(piece.first, piece.last) for piece in pieces] == [(0, 9), (0, 9), (5, 9)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)


def test_time_is_planned_too_where_an_epoch_is_one_batch(
    digits: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_seconds(monkeypatch)
    train = TrainSettings(epochs=1000, batch_size=4096, max_minutes=1.0)
    result = train_model(RetrainSettings(train=train), digits, create_run(tmp_path, "digits"))

    assert 5 < result.epochs < 60
    assert 45 < result.seconds <= 60
    assert result.stopped is not None
    assert re.fullmatch(r"1 minutes were enough for \d+\.0 epochs of 1000", result.stopped)


def test_where_time_is_too_short_for_one_epoch_it_is_cut(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=30, batch_size=16, max_minutes=0.0001))
    result = train_model(settings, digits, create_run(tmp_path, "digits"))

    assert (result.epochs, len(history_of(result.run))) == (1, 1)
    assert result.images_per_second * result.seconds < digits.num_images["train"] / 2
    assert result.stopped is not None
    assert re.fullmatch(r"0\.0001 minutes were enough for 0\.\d epochs of 30", result.stopped)


def test_a_training_that_reached_its_last_epoch_was_not_stopped(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=1, batch_size=256, max_minutes=10))

    assert train_model(settings, digits, create_run(tmp_path, "digits")).stopped is None


def test_class_weights_let_every_class_weigh_the_same() -> None:
    labels = np.array([2, 0, 0, 2, 0, 1, 0, 0])
    weights = _class_weights(labels)

    assert [weights[label] * np.sum(labels == label) for label in range(3)] == pytest.approx([8 / 3] * 3)
    assert sum(weights[label] for label in labels.tolist()) == pytest.approx(len(labels))


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
    with pytest.raises(ProviderError, match="'cuda' was asked for, but TensorFlow sees 0 GPUs"):
        train_model(RetrainSettings(train=TrainSettings(device="cuda")), digits, create_run(tmp_path, "digits"))


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
        ({"floatx": "int8"}, {}),
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


@pytest.mark.parametrize("preset", ["baseline", "fast"])
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


def test_averages_leave_the_training_as_it_is(digits: PreparedDataset, tmp_path: Path) -> None:
    runs = []
    for average in (False, True):
        train = TrainSettings(epochs=3, batch_size=256, average_weights=average)
        runs.append(train_model(RetrainSettings(train=train), digits, create_run(tmp_path, "digits")).run)
    last, averaged = (history_of(run) for run in runs)

    assert [row["loss"] for row in last] == [row["loss"] for row in averaged]
    assert last[0]["val_loss"] == averaged[0]["val_loss"]
    assert last[2]["val_loss"] != averaged[2]["val_loss"]
