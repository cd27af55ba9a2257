"""A training that is under way, beside what it has made so far: killed at any moment, it goes on from its last epoch.

    <run folder>/training/      gone when the training is complete
        job.json                what is trained here; written first
        lock                    held by the process that does it
        checkpoint.npz          all state after the last epoch; one file, so that it is never of two epochs

The manifest of a run takes no notice of it.
"""

from __future__ import annotations

import json
import logging
import re
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
from cnnpipe.manifest import MANIFEST_FILE
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.registry import create_run, list_runs
from cnnpipe.settings import RetrainSettings
from cnnpipe.storage import make_folder, storage_errors, write_file, write_json
from cnnpipe.train.backend import keras
from cnnpipe.train.batches import RESIDENT_NAME

__all__ = ["Checkpoints", "Epochs", "TrainingJob", "open_training", "training_state"]

logger = logging.getLogger(__name__)

_FOLDER: Final = "training"
_JOB_FILE: Final = "job.json"
_LOCK_FILE: Final = "lock"
_CHECKPOINT_FILE: Final = "checkpoint.npz"

_HALF_WRITTEN: Final = re.compile(r"\.(model|history|config|environment|job|checkpoint)\.[0-9a-f]{16}\.[a-z]+")
"""Temporary names of `cnnpipe.storage`, of the files that training writes."""

_PACKAGES: Final = ("tensorflow", "keras", "numpy")
"""The distributions that decide over weights."""


@dataclass(frozen=True)
class TrainingJob:
    """All that decides over the weights; a training goes on only where the job is equal."""

    settings: dict[str, Any]
    """The whole retraining's, because the run's later stages go by them; without `train.resume`."""
    dataset: str
    """Fingerprint of the prepared dataset."""
    device: str
    """`cpu`, `cuda:N` or `cuda:all`, as really used."""
    precision: str
    """The one that is really used too."""
    versions: dict[str, str]

    @classmethod
    def describe(cls, settings: RetrainSettings, dataset: PreparedDataset, device: str, precision: str) -> Self:
        """Return the job of a training in this process.

        Args:
            device: what `backend.select_device` returned.
            precision: what `backend.select_precision` returned.
        """
        values = settings.model_dump(mode="json")
        del values["train"]["resume"]
        return cls(values, dataset.fingerprint, device, precision, package_versions(_PACKAGES))


@dataclass(frozen=True)
class Epochs:
    """The epochs that are done."""

    rows: tuple[dict[str, float], ...] = ()
    """Of `history.csv`."""
    seconds: float = 0.0
    """Since the start of the training, in all processes that had a part in it."""
    images: int = 0
    """That training saw, in all of them together."""
    share: float = 0.0
    """Of the training, 0-1; 1 where it is complete."""
    seconds_per_image: float = 0.0
    """Of training at last, for an image of the whole size."""
    compile_seconds: float = 0.0
    """Until the first batch of a piece was done, at most."""
    validation_seconds: float = 0.0
    """Of the last epoch."""
    batches: int = 0
    """Of the epoch that is under way, which no checkpoint is."""

    @property
    def best_epoch(self) -> int:
        """The one of the highest validation accuracy, then of the lowest loss; 1 for the first, 0 if there is none."""
        scores = [(row["val_accuracy"], -row["val_loss"]) for row in self.rows]
        return scores.index(max(scores)) + 1 if scores else 0

    @property
    def best_accuracy(self) -> float:
        """The validation accuracy of the best epoch, 0-1; there must be one."""
        return self.rows[self.best_epoch - 1]["val_accuracy"]

    @property
    def epochs_since_best(self) -> int:
        """How many epochs have brought no improvement by now."""
        return len(self.rows) - self.best_epoch


class Checkpoints:
    """The checkpoint of one training, in a run folder whose lock this process holds; made by `open_training`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._path = run / _FOLDER / _CHECKPOINT_FILE

    def save(self, state: Sequence[keras.Variable], epochs: Epochs) -> None:
        """Write down all state after an epoch, whole or not at all.

        The order of the images needs none: it is made anew for each epoch, from the seed.

        Args:
            state: of the training, from `training_state`.
        Raises:
            StorageError: it cannot be written.
        """
        arrays = {f"{index:04}": keras.ops.convert_to_numpy(variable.value) for index, variable in enumerate(state)}
        with write_file(self._path) as temporary, storage_errors(self._path), temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, epochs=np.array(json.dumps(asdict(epochs))), **arrays)

    def restore(self, state: Sequence[keras.Variable]) -> Epochs:
        """Assign what the checkpoint holds, if there is one, and return the epochs that it has behind it.

        Args:
            state: of a training that is freshly made and compiled.
        Raises:
            TrainingError: the checkpoint is damaged, or of another network.
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
                f"{self._path} is damaged: {error}; it is given up: run again to train from the start"
            ) from error
        shapes = [(tuple(each.shape), each.dtype) for each in state]
        if [(array.shape, str(array.dtype)) for array in arrays] != shapes:
            raise TrainingError(
                f"{self._path} is of another network; it is given up: run again to train from the start"
            )
        for variable, array in zip(state, arrays, strict=True):
            variable.assign(array)
        return epochs


def training_state(model: keras.Model, candidate: keras.Model) -> list[keras.Variable]:
    """Return all that a training goes on from.

    That is the weights, the state of every `SeedGenerator`, that of the optimizer with its step, by which its rate
    goes, and the weights that would be kept, which may be averages of earlier ones.

    Args:
        model: compiled, as it is trained, its optimizer built.
    """
    weights = [variable for variable in model.variables if variable.name != RESIDENT_NAME]
    return [*weights, *model.optimizer.variables, *candidate.variables]


@contextmanager
def open_training(artifacts: Path, name: str, job: TrainingJob, *, resume: bool) -> Iterator[Checkpoints]:
    """Go on with the newest run of a job that was broken off, or create one; the lock ends with the process.

    A block that ends, or with a TrainingError, leaves nothing to go on with: it would come to the same end again.

    Args:
        resume: False always creates one.
    Raises:
        StorageError: the run folder cannot be written.
    """
    run, lock = (_broken_off(artifacts, name, job) if resume else None) or _create(artifacts, name, job)
    try:
        try:
            yield Checkpoints(run)
        except TrainingError:
            _remove_training(run)
            raise
        _remove_training(run)
    finally:
        lock.release()


def _create(artifacts: Path, name: str, job: TrainingJob) -> tuple[Path, FileLock]:
    run = create_run(artifacts, name)
    folder = make_folder(run / _FOLDER)
    lock = FileLock(folder / _LOCK_FILE)
    with storage_errors(folder):
        lock.acquire(blocking=False)
    write_json(folder / _JOB_FILE, asdict(job))
    logger.info("run folder: %s", run)
    return run, lock


def _broken_off(artifacts: Path, name: str, job: TrainingJob) -> tuple[Path, FileLock] | None:
    """Return the newest run of a job that is not complete and that nobody works at, and its lock."""
    for run in reversed(list_runs(artifacts, name)):
        if not _is_at(run, job):
            continue
        lock = FileLock(run / _FOLDER / _LOCK_FILE)
        with storage_errors(run):
            try:
                lock.acquire(blocking=False)
            except Timeout:  # inside, because it is an OSError too
                logger.info("%s is trained by another process; this one trains apart from it", run)
                continue
        if _is_at(run, job):
            _remove_half_written(run)
            logger.info("going on with %s, which was broken off; --no-resume would start afresh", run)
            return run, lock
        lock.release()  # completed meanwhile
    return None


def _is_at(run: Path, job: TrainingJob) -> bool:
    """Return whether a run is not complete and has this job."""
    try:
        begun = json.loads((run / _FOLDER / _JOB_FILE).read_bytes())
    except (OSError, ValueError):  # not there, or no JSON
        return False
    return bool(begun == asdict(job)) and not (run / MANIFEST_FILE).exists()


def _remove_half_written(run: Path) -> None:
    with storage_errors(run):
        for file in (*run.iterdir(), *(run / _FOLDER).iterdir()):
            if _HALF_WRITTEN.fullmatch(file.name):
                file.unlink(missing_ok=True)


def _remove_training(run: Path) -> None:
    """Remove what a training would go on with; what it is goes first, so that the rest is never taken for one."""
    folder = run / _FOLDER
    with storage_errors(folder):
        for name in (_JOB_FILE, _CHECKPOINT_FILE, _LOCK_FILE):
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody has put something into it, or has just tried its lock
        folder.rmdir()
