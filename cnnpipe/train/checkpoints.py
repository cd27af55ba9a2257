"""Checkpoints of a training in progress: killed at any moment, it is resumed after its last complete epoch.

    <run folder>/training/      removed when the training is complete
        job.json                settings and versions of the training; written first
        lock                    held by the process that trains
        checkpoint.npz          all state after the last epoch; one file, so that it never mixes two epochs
    <run folder>/training.json  job and result of a complete training: a run that was interrupted in a later stage is
                                not trained again

The manifest of a run does not list the folder.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from filelock import FileLock, Timeout

from cnnpipe.errors import TrainingError
from cnnpipe.machine import package_versions
from cnnpipe.manifest import MANIFEST_FILE, TRAINING_FILE, best_epoch
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.registry import TRAINING_LOCK, create_run, list_runs
from cnnpipe.settings import RetrainSettings
from cnnpipe.storage import TEMPORARY_NAME, make_folder, storage_errors, write_file, write_json
from cnnpipe.train.backend import keras
from cnnpipe.train.batches import RESIDENT_NAME

__all__ = ["Checkpoints", "Epochs", "TrainingJob", "open_training", "training_state"]

logger = logging.getLogger(__name__)

_FOLDER: Final = "training"
_JOB_FILE: Final = "job.json"
_CHECKPOINT_FILE: Final = "checkpoint.npz"

_PACKAGES: Final = ("tensorflow", "keras", "numpy")
"""Distributions whose versions change the weights."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that determines the weights; a training is resumed only by an equal job."""

    settings: dict[str, Any]
    """Settings of training, without `resume`."""
    dataset: str
    """Fingerprint of the prepared dataset."""
    device: str
    """Device in use: `cpu`, `cuda:N` or `cuda:all`."""
    precision: str
    """Compute precision in use."""
    versions: dict[str, str]
    """Versions of cnnpipe and of the packages that change the weights."""

    @classmethod
    def describe(cls, settings: RetrainSettings, dataset: PreparedDataset, device: str, precision: str) -> Self:
        """Return the job of a training in this process.

        Args:
            device: result of `backend.select_device`.
            precision: result of `backend.select_precision`.
        """
        values = settings.train.model_dump(mode="json", exclude={"resume"})
        return cls(values, dataset.fingerprint, device, precision, package_versions(_PACKAGES))


@dataclass(frozen=True)
class Epochs:
    """The complete epochs of a training."""

    rows: tuple[dict[str, float], ...] = ()
    """Rows of `history.csv`."""
    seconds: float = 0.0
    """Seconds spent on the training, in all processes that took part."""
    steps: int = 0
    """Number of optimizer steps."""
    images: int = 0
    """Number of training images, counted once in every epoch."""

    @property
    def best_epoch(self) -> int:
        """Number of the epoch with the highest validation accuracy, then the lowest loss; 0 if there is none."""
        values = ([row[name] for row in self.rows] for name in ("val_accuracy", "val_loss"))
        return best_epoch(*values) + 1 if self.rows else 0

    @property
    def best_accuracy(self) -> float:
        """Validation accuracy of the best epoch, 0-1; there must be one."""
        return self.rows[self.best_epoch - 1]["val_accuracy"]

    @property
    def epochs_since_best(self) -> int:
        """Number of epochs since the best one."""
        return len(self.rows) - self.best_epoch


class Checkpoints:
    """The checkpoint of one training, in a run folder whose lock this process holds; made by `open_training`."""

    def __init__(self, run: Path, job: TrainingJob) -> None:
        self.run, self.job = run, job
        self._path = run / _FOLDER / _CHECKPOINT_FILE

    @property
    def result(self) -> dict[str, Any] | None:
        """Result that `finish` has kept, or None while the training is not complete."""
        record = _read_json(self.run / TRAINING_FILE)
        return None if record is None else dict(record["result"])

    def finish(self, result: dict[str, Any]) -> None:
        """Keep the result of the complete training, values for JSON; raises StorageError if it cannot be written."""
        write_json(self.run / TRAINING_FILE, {"job": asdict(self.job), "result": result})

    def save(self, state: Sequence[keras.Variable], epochs: Epochs) -> None:
        """Write all state after an epoch, whole or not at all.

        The order of images and their augmentation are not part of it: they follow from the seed and the epoch.

        Args:
            state: variables from `training_state`.
        Raises:
            StorageError: it cannot be written.
        """
        arrays = {f"{index:04}": keras.ops.convert_to_numpy(variable.value) for index, variable in enumerate(state)}
        with write_file(self._path) as temporary, storage_errors(self._path), temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, epochs=np.array(json.dumps(asdict(epochs))), **arrays)

    def restore(self, state: Sequence[keras.Variable]) -> Epochs:
        """Assign the values of the checkpoint, if there is one, and return its epochs.

        Args:
            state: variables from `training_state`, of models that are freshly built and compiled.
        Raises:
            TrainingError: the checkpoint is damaged, or belongs to another network.
        """
        if not self._path.exists():
            return Epochs()
        try:
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                values = json.loads(str(file["epochs"]))
                epochs = Epochs(**{**values, "rows": tuple(values["rows"])})
                arrays = [file[name] for name in sorted(set(file.files) - {"epochs"})]
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"{self._path} is damaged: {error}; it was removed, run again to train from the start"
            ) from error
        shapes = [(tuple(each.shape), each.dtype) for each in state]
        if [(array.shape, str(array.dtype)) for array in arrays] != shapes:
            raise TrainingError(
                f"{self._path} belongs to another network; it was removed, run again to train from the start"
            )
        for variable, array in zip(state, arrays, strict=True):
            variable.assign(array)
        return epochs


def training_state(model: keras.Model, saved: keras.Model) -> list[keras.Variable]:
    """Return every variable that a training is resumed from.

    These are the weights, the state of every `SeedGenerator`, the state of the optimizer with its step, which sets the
    rate, and the weights of the saved model, which may be averages of earlier epochs.

    Args:
        model: the compiled model that is trained, its optimizer built.
        saved: the model that is written to the run.
    """
    weights = [variable for variable in model.variables if variable.name != RESIDENT_NAME]
    return [*weights, *model.optimizer.variables, *saved.variables]


@contextmanager
def open_training(artifacts: Path, name: str, job: TrainingJob, *, resume: bool) -> Iterator[Checkpoints]:
    """Resume the newest incomplete run of a job, or create a run; its lock ends with the process.

    The state is removed when the block ends, or fails with a TrainingError, which a resumed training would repeat.

    Args:
        resume: whether to resume; False always creates a run.
    Raises:
        StorageError: the run folder cannot be written.
    """
    run, lock = (_find_interrupted(artifacts, name, job) if resume else None) or _create(artifacts, name, job)
    try:
        try:
            yield Checkpoints(run, job)
        except TrainingError:
            _remove_training(run)
            raise
        _remove_training(run)
    finally:
        lock.release()


def _create(artifacts: Path, name: str, job: TrainingJob) -> tuple[Path, FileLock]:
    run = create_run(artifacts, name)
    folder = make_folder(run / _FOLDER)
    lock = FileLock(run / TRAINING_LOCK)
    with storage_errors(folder):
        lock.acquire(blocking=False)
    write_json(folder / _JOB_FILE, asdict(job))
    logger.info("run folder: %s", run)
    return run, lock


def _find_interrupted(artifacts: Path, name: str, job: TrainingJob) -> tuple[Path, FileLock] | None:
    """Return the newest incomplete run of a job that no other process trains, and its lock."""
    for run in reversed(list_runs(artifacts, name)):
        if not _has_job(run, job):
            continue
        make_folder(run / _FOLDER)  # that of a finished training is gone
        lock = FileLock(run / TRAINING_LOCK)
        with storage_errors(run):
            try:
                lock.acquire(blocking=False)
            except Timeout:  # inside, because it is an OSError too
                logger.info("another process trains %s; this one trains in a folder of its own", run)
                continue
        if _has_job(run, job):
            with storage_errors(run):
                for file in (*run.iterdir(), *(run / _FOLDER).iterdir()):  # what was half written
                    if TEMPORARY_NAME.fullmatch(file.name):
                        file.unlink(missing_ok=True)
            logger.info("resuming %s, which was interrupted; use --no-resume to start over", run)
            return run, lock
        lock.release()  # completed meanwhile
        _remove_training(run)
    return None


def _has_job(run: Path, job: TrainingJob) -> bool:
    """Return whether a run is incomplete, and its training, finished or not, is that of the job."""
    found = _read_json(run / _FOLDER / _JOB_FILE) or (_read_json(run / TRAINING_FILE) or {}).get("job")
    return bool(found == asdict(job)) and not (run / MANIFEST_FILE).exists()


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None if the file is missing or does not hold one."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _remove_training(run: Path) -> None:
    """Remove the state of a training; the job goes first, so that the rest is never resumed."""
    folder = run / _FOLDER
    with storage_errors(folder):
        for file in (folder / _JOB_FILE, folder / _CHECKPOINT_FILE, run / TRAINING_LOCK):
            file.unlink(missing_ok=True)
    with suppress(OSError):  # another process has just tried the lock, or somebody put a file there
        folder.rmdir()
