"""An interrupted training: what it is resumed from, its result, and when it starts over."""

from __future__ import annotations

import csv
import json
import logging
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnpipe.errors import TrainingError
from cnnpipe.evaluate.evaluation import predict_keras
from cnnpipe.manifest import digest_files
from cnnpipe.prepare.dataset import PreparedDataset, read_digests
from cnnpipe.registry import list_runs
from cnnpipe.settings import PromoteSettings, RetrainSettings, TrainSettings, load_toml
from cnnpipe.train.backend import keras
from cnnpipe.train.checkpoints import Epochs, TrainingJob, open_training
from cnnpipe.train.fit import TrainingResult
from cnnpipe.train.stage import train_run

# Every kind of state: two image sizes, averaged weights, augmentation, a rate that changes.
SETTINGS = RetrainSettings(train=TrainSettings(preset="fast", epochs=4, seed=3, average_weights=True))
SHORT = RetrainSettings(train=TrainSettings(epochs=2, batch_size=256, seed=3))

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
from cnnpipe.settings import RetrainSettings
from cnnpipe.train.stage import train_run  # once for all attempts: TensorFlow starts nothing yet
from cnnpipe.train import checkpoints, fit  # once for all attempts: TensorFlow starts nothing yet

settings = RetrainSettings.model_validate_json(sys.argv[1])
prepared, artifacts, moments = Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
replace = os.replace
renamed = 0

def die_at(moment):  # 2.0 is right before the second file takes its name, 2.5 right after
    def replace_or_die(source, target):
        global renamed
        renamed += 1
        if renamed == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if renamed + 0.5 == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace_or_die

def attempt(kind, moment):
    child = os.fork()
    if child == 0:
        if kind == "rename":
            die_at(moment)
        try:
            train_run(settings, prepared, artifacts)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if kind == "seconds":
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

started = time.monotonic()
statuses = []
for kind, moment in moments:
    statuses.append(attempt(kind, moment))
statuses.append(attempt("never", 0))
print(json.dumps({"statuses": statuses, "seconds": time.monotonic() - started}))
"""


def train_in_attempts(
    settings: RetrainSettings, digits: PreparedDataset, artifacts: Path, moments: list[tuple[str, float]]
) -> dict[str, Any]:
    """Train in processes of which each but the last is killed; return their exit statuses and the time they took."""
    command = [sys.executable, "-c", DRIVER, settings.model_dump_json(), str(digits.path), str(artifacts)]
    result = subprocess.run([*command, json.dumps(moments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert values["statuses"][-1] == 0, result.stdout
    return values


def only_run(artifacts: Path) -> Path:
    (run,) = list_runs(artifacts, "digits")
    return run


def history_of(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same_weights(run: Path, other: Path) -> None:
    assert history_of(run) == history_of(other)  # of the weights after each epoch, to the last digit
    models = [keras.saving.load_model(each / "model.keras") for each in (run, other)]
    for first, second in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(first, second)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    first, second = (predict_keras(model, images) for model in models)
    np.testing.assert_array_equal(first, second)  # so the temperature, which is no weight, is the same


class InterruptedForTestError(Exception):
    """As ctrl-c or a full disk: anything but an error of the training itself."""


def interrupt(settings: RetrainSettings, digits: PreparedDataset, artifacts: Path, epoch: int = 2) -> Path:
    """Interrupt a training in an epoch; return its run."""

    def stop(what: str, done: int, total: int) -> None:
        if f"epoch {epoch}/" in what:
            raise InterruptedForTestError

    before = set(list_runs(artifacts, "digits"))
    with pytest.raises(InterruptedForTestError):
        train_run(settings, digits.path, artifacts, stop)
    (run,) = set(list_runs(artifacts, "digits")) - before
    return run


def train(settings: RetrainSettings, digits: PreparedDataset, artifacts: Path) -> TrainingResult:
    return train_run(settings, digits.path, artifacts)


@pytest.fixture(scope="module")
def uninterrupted(digits: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A training in this process, beside a thread that draws from Python's and NumPy's generators."""
    ended = threading.Event()

    def draw() -> None:
        while not ended.wait(0.002):
            random.random()
            np.random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        return train(SETTINGS, digits, tmp_path_factory.mktemp("uninterrupted"))
    finally:
        ended.set()
        thread.join()


# Before its first checkpoint; between a checkpoint and its weights; before the next one; after the last file.
@pytest.mark.parametrize("moments", [[3.5, 11.5], pytest.param([4.0, 3.5, 5.0, 11.5], marks=pytest.mark.slow)])
def test_killed_at_moments_between_start_and_end_it_ends_with_the_same_weights(
    digits: PreparedDataset, tmp_path: Path, uninterrupted: TrainingResult, moments: list[float]
) -> None:
    values = train_in_attempts(SETTINGS, digits, tmp_path, [("rename", moment) for moment in moments])

    assert values["statuses"] == [*([-9] * len(moments)), 0]
    run = only_run(tmp_path)
    assert_same_weights(run, uninterrupted.run)
    assert not (run / "training").exists()
    assert not list(run.glob(".*"))  # nor what was half written
    assert uninterrupted.best_epoch == 4  # so that the weights compared are those of the end


@pytest.mark.slow
def test_two_processes_come_to_the_same_weights(
    digits: PreparedDataset, tmp_path: Path, uninterrupted: TrainingResult
) -> None:
    train_in_attempts(SETTINGS, digits, tmp_path, [])

    assert_same_weights(only_run(tmp_path), uninterrupted.run)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["baseline", "fast"])
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    digits: PreparedDataset, tmp_path: Path, preset: str
) -> None:
    settings = RetrainSettings.model_validate({"train": {"preset": preset, "epochs": 8, "augment": True, "seed": 1}})
    seconds = train_in_attempts(settings, digits, tmp_path / "uninterrupted", [])["seconds"]
    moments = np.random.default_rng(5).uniform(0.0, 0.8 * seconds, 8)
    statuses = train_in_attempts(settings, digits, tmp_path / "killed", [("seconds", each) for each in moments])

    assert statuses["statuses"].count(-9) >= 3  # the others found it done, and began another
    first = list_runs(tmp_path / "killed", "digits")[0]
    assert_same_weights(first, only_run(tmp_path / "uninterrupted"))


def test_it_is_resumed_in_the_interrupted_run_and_logs_that(
    digits: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = interrupt(SHORT, digits, tmp_path)
    files = {"config.toml", "digests.npz", "environment.json", "history.csv", "model.keras"}
    assert set(digest_files(run)) == files
    (run / "digests.npz").unlink()
    caplog.set_level(logging.INFO, "cnnpipe")
    result = train(SHORT, digits, tmp_path)

    assert (result.run, result.epochs, result.resumed_after) == (run, 2, 1)
    assert f"resuming {run}, which was interrupted; use --no-resume to start over" in caplog.text
    assert set(digest_files(run)) == files | {"training.json"}
    assert [row["epoch"] for row in history_of(run)] == ["1", "2"]
    for split, digests in read_digests(run).items():
        assert np.array_equal(digests, digits.digests(split))
    assert result.seconds >= sum(float(line.split(",")[-1]) for line in (run / "history.csv").read_text().split()[1:])


def test_other_settings_of_later_stages_are_those_of_the_resumed_run(digits: PreparedDataset, tmp_path: Path) -> None:
    run = interrupt(SHORT, digits, tmp_path)
    settings = SHORT.model_copy(update={"promote": PromoteSettings(min_accuracy=0.9)})
    result = train(settings, digits, tmp_path)

    assert (result.run, result.resumed_after) == (run, 1)
    assert load_toml(RetrainSettings, run / "config.toml") == settings


def test_a_finished_training_whose_run_was_interrupted_later_is_not_repeated(
    digits: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = RetrainSettings(train=SHORT.train.model_copy(update={"epochs": 1}))
    first = train(settings, digits, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in first.run.iterdir()}
    caplog.set_level(logging.INFO, "cnnpipe")
    settings = settings.model_copy(update={"promote": PromoteSettings(min_accuracy=0.9)})
    again = train(settings, digits, tmp_path)

    assert again == replace(first, resumed_after=1)
    assert "its training is complete" in caplog.text
    after = {file.name: file.stat().st_mtime_ns for file in first.run.iterdir()}
    assert {name for name in after if before[name] != after[name]} == {"config.toml", "environment.json"}
    assert load_toml(RetrainSettings, first.run / "config.toml") == settings


def test_a_training_with_a_time_budget_is_resumed(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=SHORT.train.model_copy(update={"max_minutes": 1.0}))
    interrupt(settings, digits, tmp_path)
    result = train(settings, digits, tmp_path)

    assert (result.epochs, result.resumed_after, result.stopped) == (2, 1, None)


def start_and_interrupt(artifacts: Path, job: TrainingJob, *, resume: bool = True) -> Path:
    """Start or resume a training, do nothing and interrupt it; return its run."""
    with pytest.raises(InterruptedForTestError), open_training(artifacts, "digits", job, resume=resume) as checkpoints:
        raise InterruptedForTestError
    return checkpoints.run


@pytest.fixture
def job(digits: PreparedDataset) -> TrainingJob:
    return TrainingJob.describe(SHORT, digits, "cpu", "float32")


def test_only_the_same_training_is_resumed(digits: PreparedDataset, tmp_path: Path, job: TrainingJob) -> None:
    run = start_and_interrupt(tmp_path, job)
    settings = SHORT.model_copy(update={"train": SHORT.train.model_copy(update={"seed": 4})})
    others = [
        TrainingJob.describe(settings, digits, "cpu", "float32"),
        TrainingJob.describe(SHORT, digits, "cpu", "bfloat16"),
        replace(job, dataset="0" * 64),
        replace(job, versions={**job.versions, "keras": "0.1"}),
    ]

    assert len({run, *(start_and_interrupt(tmp_path, other) for other in others)}) == 5
    assert start_and_interrupt(tmp_path, job) == run
    assert start_and_interrupt(tmp_path, job, resume=False) != run


def test_the_choice_to_resume_makes_no_other_training(digits: PreparedDataset, job: TrainingJob) -> None:
    settings = SHORT.model_copy(update={"train": SHORT.train.model_copy(update={"resume": False})})

    assert TrainingJob.describe(settings, digits, "cpu", "float32") == job


def test_the_newest_interrupted_run_is_resumed(tmp_path: Path, job: TrainingJob) -> None:
    start_and_interrupt(tmp_path, job)
    newest = start_and_interrupt(tmp_path, job, resume=False)

    assert start_and_interrupt(tmp_path, job) == newest


def test_a_training_that_ended_is_not_resumed(tmp_path: Path, job: TrainingJob) -> None:
    with open_training(tmp_path, "digits", job, resume=True) as checkpoints:
        assert (checkpoints.run / "training" / "job.json").exists()

    assert list(checkpoints.run.iterdir()) == []
    assert start_and_interrupt(tmp_path, job) != checkpoints.run


def test_a_complete_run_is_never_changed(tmp_path: Path, job: TrainingJob) -> None:
    run = start_and_interrupt(tmp_path, job)
    (run / "manifest.json").write_text("{}")

    assert start_and_interrupt(tmp_path, job) != run


def test_two_processes_never_train_one_run(tmp_path: Path, job: TrainingJob) -> None:
    with open_training(tmp_path, "digits", job, resume=True) as checkpoints:
        assert start_and_interrupt(tmp_path, job) != checkpoints.run


def test_half_written_files_are_removed_and_nothing_else(tmp_path: Path, job: TrainingJob) -> None:
    run = start_and_interrupt(tmp_path, job)
    kept = {".notes", "model.keras", ".metrics.json"}
    half_written = ("model.0123456789abcdef.keras", "model.int8.0123456789abcdef.onnx")  # a later stage's too
    for name in (*kept, *(f".{each}" for each in half_written), "training/.checkpoint.0123456789abcdef.npz"):
        (run / name).touch()
    start_and_interrupt(tmp_path, job)

    assert {file.name for file in run.iterdir()} == {*kept, "training"}
    assert {file.name for file in (run / "training").iterdir()} == {"job.json", "lock"}


def test_a_training_that_diverged_starts_over(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = RetrainSettings(train=TrainSettings(epochs=3, learning_rate=1e30))

    for _ in range(2):
        with pytest.raises(TrainingError, match="in epoch 1; nothing was learned"):
            train(settings, digits, tmp_path)
    assert len(list_runs(tmp_path, "digits")) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "other network"])
def test_a_checkpoint_that_does_not_fit_is_removed_with_one_line(
    digits: PreparedDataset, tmp_path: Path, damage: str
) -> None:
    checkpoint = interrupt(SHORT, digits, tmp_path) / "training" / "checkpoint.npz"
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    elif damage == "empty":
        checkpoint.write_bytes(b"")
    else:
        with np.load(checkpoint) as file:
            arrays = dict(file)
        np.savez(checkpoint, **{**arrays, "0000": np.zeros((3, 3), np.float32)})

    message = "belongs to another network" if damage == "other network" else "is damaged"
    with pytest.raises(TrainingError, match=rf"checkpoint\.npz {message}.*run again to train from the start"):
        train(SHORT, digits, tmp_path)
    assert not checkpoint.parent.exists()


def test_the_best_epoch_is_the_first_of_the_highest_accuracy_then_of_the_lowest_loss() -> None:
    scores = [(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.1)]
    epochs = Epochs(tuple({"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in scores))

    assert (epochs.best_epoch, epochs.best_accuracy, epochs.epochs_since_best) == (3, 0.7, 2)
    assert Epochs().best_epoch == 0
