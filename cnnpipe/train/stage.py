"""The stage `train`: from a prepared dataset to a run folder with `model.keras`."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from cnnpipe.errors import CnnpipeError
from cnnpipe.machine import ask_driver, package_versions
from cnnpipe.manifest import MANIFEST_FILE, read_manifest
from cnnpipe.prepare.dataset import DIGESTS_FILE, load_prepared, read_digests
from cnnpipe.progress import ProgressCallback
from cnnpipe.registry import list_runs
from cnnpipe.settings import RetrainSettings, dataset_location, load_toml
from cnnpipe.storage import make_folder, storage_errors, write_file

if TYPE_CHECKING:
    from cnnpipe.train.fit import TrainingResult

_COMPILED_FOLDER: Final = ".compiled"
"""Folder in the artifacts that keeps what XLA has compiled for a GPU, so that the next night does not compile again."""

_MAX_COMPILED_BYTES: Final = 512 << 20
"""Size up to which compiled code is kept; a training step takes a few megabytes."""


def train_run(
    settings: RetrainSettings, prepared: Path, artifacts: Path, progress: ProgressCallback | None = None
) -> TrainingResult:
    """Train in a new run folder `artifacts/<name>/runs/<run id>`, or go on in that of the same training.

    The digests of the images are written first. See `fit.train_model` and `checkpoints.open_training`.

    Args:
        prepared: folder of the prepared dataset.
        artifacts: folder of all runs.
    """
    driver = ask_driver()
    if driver.gpus:
        set_xla_flags(make_folder(artifacts / _COMPILED_FOLDER), *driver.gpus, driver.cuda)
    from cnnpipe.train.backend import select_device, select_precision
    from cnnpipe.train.checkpoints import TrainingJob, open_training
    from cnnpipe.train.fit import train_model

    # From any folder, config.toml must mean the same dataset, and a resumed training must find its run.
    location = {"dataset": dataset_location(settings.prepare.dataset)}
    settings = settings.model_copy(update={"prepare": settings.prepare.model_copy(update=location)})
    dataset = load_prepared(prepared)
    device = select_device(settings.train.device)  # before the run folder is made, so that a wrong device leaves none
    precision = select_precision(settings.train.precision, device)
    job = TrainingJob.describe(settings, dataset, device, precision)
    with open_training(artifacts, settings.prepare.resolved_name, job, resume=settings.train.resume) as checkpoints:
        if not (path := checkpoints.run / DIGESTS_FILE).is_file():
            with write_file(path) as temporary, storage_errors(path):
                np.savez(temporary, allow_pickle=False, **read_digests(prepared))
        return train_model(settings, dataset, checkpoints.run, progress, checkpoints)


def find_repeated_run(settings: RetrainSettings, prepared: Path, artifacts: Path) -> Path | None:
    """Return the newest decided run if this training would only repeat it, else None; loads no TensorFlow.

    It would if images, settings and package versions are equal.

    Args:
        prepared: folder of the prepared dataset.
        artifacts: folder of all runs.
    """

    def deciding(each: RetrainSettings) -> dict[str, Any]:
        # The fingerprint stands for the dataset's path, and the folder of the runs for its name.
        return each.model_dump(exclude={"clean": True, "train": {"resume"}, "prepare": {"dataset", "name"}})

    runs = [run for run in list_runs(artifacts, settings.prepare.resolved_name) if (run / MANIFEST_FILE).is_file()]
    fingerprint = load_prepared(prepared).fingerprint
    with suppress(CnnpipeError, OSError, ValueError, LookupError):  # no run, or a damaged or much older one
        if (
            read_manifest(runs[-1]).model.dataset_fingerprint == fingerprint
            and json.loads((runs[-1] / "environment.json").read_bytes())["versions"] == package_versions()
            and deciding(load_toml(RetrainSettings, runs[-1] / "config.toml")) == deciding(settings)
        ):
            return runs[-1]
    return None


def set_xla_flags(folder: Path, *machine: str) -> None:
    """Let XLA compile quickly, and save and reuse what it compiles; remove the oldest files beyond 512 MiB.

    Without Triton's matrix products, of which XLA would time many variants, the first step of `fast` comes after 37 s
    instead of 50 s on one H100 (four trainings at once); a step is not slower.

    Has an effect only before TensorFlow is imported, which reads its flags then.

    Args:
        folder: existing.
        machine: what compiled code depends on besides the version of TensorFlow, such as the names of GPUs.
    Raises:
        StorageError: the folder cannot be changed.
    """
    left = _MAX_COMPILED_BYTES
    with storage_errors(folder):
        files = [(file.stat(), file) for file in folder.rglob("*") if file.is_file()]
        for status, file in sorted(files, key=lambda each: each[0].st_mtime, reverse=True):
            left -= status.st_size
            if left < 0:
                file.unlink(missing_ok=True)
    key = "-".join((*package_versions(("tensorflow",)).values(), *machine))
    own = folder.resolve() / re.sub(r"[^A-Za-z0-9.]+", "-", key)
    quote = '"' if "'" in str(own) else "'"
    _add_flag("TF_XLA_FLAGS", f"--tf_xla_persistent_cache_directory={quote}{own}{quote}")
    _add_flag("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")


def _add_flag(variable: str, flag: str) -> None:
    """Put a flag before those that the user has set, which decide."""
    flags = os.environ.get(variable, "")
    if flag not in flags:
        os.environ[variable] = f"{flag} {flags}".strip()
