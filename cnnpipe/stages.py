"""The stages of a retraining, each from paths to paths: run by hand from the command line, or by Prefect as tasks.

    prepare -> train -> evaluate -> plot -> export -> promote

Every stage reads what the one before it left on the disk, so each can be run again alone. Keras is imported only by
the stages that need it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cnnpipe.devices import ask_driver
from cnnpipe.errors import CnnpipeError, RegistryError
from cnnpipe.files import user_path
from cnnpipe.machine import package_versions, usable_cores
from cnnpipe.manifest import MANIFEST_FILE
from cnnpipe.prepare.dataset import (
    DATASET_FILE,
    PreparedDataset,
    count_shared,
    load_prepared,
    prepare_dataset,
    scratch_folder,
)
from cnnpipe.prepare.report import warn_of_unreadable
from cnnpipe.progress import ProgressCallback
from cnnpipe.registry import resolve_model_file, resolve_run
from cnnpipe.settings import (
    BUILT_IN_DATASETS,
    COMMAND_LINE,
    EvaluateSettings,
    PrepareSettings,
    RetrainSettings,
    dataset_location,
    dataset_name,
    load_toml,
    validate_settings,
)
from cnnpipe.storage import make_folder, storage_errors

if TYPE_CHECKING:
    from cnnpipe.evaluate.metrics import Evaluation, Parity
    from cnnpipe.promote.gate import Decision
    from cnnpipe.train.fit import TrainingResult

__all__ = [
    "conclude_run",
    "evaluate_any",
    "evaluate_run",
    "export_run",
    "keep_compiled_code",
    "load_run",
    "plot_run",
    "train_run",
]

logger = logging.getLogger(__name__)

_COMPILED_FOLDER: Final = ".compiled"
"""Folder in the artifacts that keeps what XLA has compiled for a GPU, so that the next night does not compile again."""

_MAX_COMPILED_BYTES: Final = 512 << 20
"""Size up to which compiled code is kept; a training step takes a few megabytes."""


def load_run(run: Path) -> tuple[RetrainSettings, PreparedDataset]:
    """Return the settings a run was made with and the prepared dataset it was made from.

    Raises:
        RegistryError: the folder is no run, or its dataset is gone.
        ConfigError: its `config.toml` is damaged.
        DatasetError: the prepared dataset is damaged.
    """
    try:
        environment = json.loads((run / "environment.json").read_bytes())
        prepared = user_path(environment["dataset"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"{run} is no run folder: its environment.json cannot be read ({error}); check the path"
        ) from error
    settings = load_toml(RetrainSettings, run / "config.toml")
    if not prepared.is_dir():
        raise RegistryError(
            f"the dataset of {run} is gone: {prepared}; prepare it again: "
            f"cnnpipe prepare --config {run / 'config.toml'} --data {prepared.parent.parent}"
        )
    return settings, load_prepared(prepared)


def _require_unfinished(run: Path) -> None:
    """Refuse to change a file whose digest is in the manifest already."""
    if (run / MANIFEST_FILE).is_file():
        raise RegistryError(f"{run} is complete, and its files stay as they are; train again for another run")


def train_run(
    settings: RetrainSettings, prepared: Path, artifacts: Path, progress: ProgressCallback | None = None
) -> TrainingResult:
    """Train in a new run folder `artifacts/<name>/runs/<run id>`, or in that of the same training if it was broken off.

    See `fit.train_model` and `checkpoints.open_training`.
    """
    driver = ask_driver()
    if driver.gpus:
        keep_compiled_code(make_folder(artifacts / _COMPILED_FOLDER), *driver.gpus, driver.cuda)
    from cnnpipe.train.backend import select_device, select_precision
    from cnnpipe.train.checkpoints import TrainingJob, open_training
    from cnnpipe.train.fit import train_model

    dataset = load_prepared(prepared)
    device = select_device(settings.train.device)  # now, so that a wrong one leaves no run folder behind
    precision = select_precision(settings.train.precision, device)
    job = TrainingJob.describe(settings, dataset, device, precision)
    with open_training(artifacts, settings.prepare.resolved_name, job, resume=settings.train.resume) as checkpoints:
        return train_model(settings, dataset, checkpoints.run, progress, checkpoints)


def keep_compiled_code(folder: Path, *machine: str) -> None:
    """Let XLA keep what it compiles, and take what it finds; remove the oldest files beyond 512 MiB.

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
    flag = f"--tf_xla_persistent_cache_directory={quote}{own}{quote}"
    os.environ["TF_XLA_FLAGS"] = f"{os.environ.get('TF_XLA_FLAGS', '')} {flag}".strip()


def evaluate_run(run: Path, chosen: EvaluateSettings | None = None) -> Evaluation:
    """Score `model.keras` on the test split and write the figures; see `evaluation.evaluate_model`.

    Args:
        chosen: used in place of the run's own settings.
    """
    from cnnpipe.evaluate.metrics import METRICS_FILE, evaluate_model
    from cnnpipe.train.backend import select_device

    _require_unfinished(run)
    settings, dataset = load_run(run)
    select_device(settings.train.device)
    evaluation = evaluate_model(run / "model.keras", dataset, chosen or settings.evaluate, output=run)
    logger.info(
        "test: accuracy %.4f, loss %.4f, top-%d %.4f on %d images",
        *(evaluation.accuracy, evaluation.loss, evaluation.top_k, evaluation.top_k_accuracy, evaluation.num_images),
    )
    first = json.loads((run / METRICS_FILE).read_bytes())["first_image"]
    logger.info(
        "first test image, %s: predicted %s, actual %s", *(first[key] for key in ("path", "predicted", "actual"))
    )
    return evaluation


def plot_run(run: Path) -> list[Path]:
    """Draw every plot of an evaluated run; see `plots.plot_run`."""
    from cnnpipe.plot import plots

    _require_unfinished(run)
    return plots.plot_run(run, load_run(run)[1])


def export_run(run: Path) -> Parity:
    """Write `model.onnx` of an evaluated run and its variants, all checked; see `export.export_onnx`."""
    from cnnpipe.export.onnx import export_onnx
    from cnnpipe.train.backend import select_device

    _require_unfinished(run)
    settings, dataset = load_run(run)
    select_device(settings.train.device)
    return export_onnx(run, settings.train.preset, dataset, settings.export)


def conclude_run(run: Path, forced: str | None = None) -> Decision:
    """Decide on an exported run, complete it, and promote it if it passes; see `gate.conclude_run`."""
    from cnnpipe.promote import gate

    settings, dataset = load_run(run)
    return gate.conclude_run(run, dataset, settings, forced)


def evaluate_any(
    model: str,
    dataset: str | None,
    settings: EvaluateSettings,
    data: Path,
    artifacts: Path,
    progress: ProgressCallback | None = None,
) -> tuple[Path, Evaluation]:
    """Score whatever a user means by `model`.

    Args:
        model: a `.keras` or `.onnx` file, a run folder, or a name (its champion).
        dataset: a folder of images, all of which are scored, or those in its `test`; a built-in or a prepared dataset,
            of which the test split is scored, as it is of None and of the folder that the run was trained on.
    Returns:
        The file that was scored, and its evaluation. Written to the run only if the run is not complete.
    Raises:
        ModelError: there is no such model, or it does not fit the dataset.
        DatasetError: the dataset cannot be read, or None was given for a file outside any run.
    """
    from cnnpipe.evaluate.metrics import evaluate_model

    if Path(model).suffix in (".keras", ".onnx"):
        file = resolve_model_file(model, artifacts)
    else:
        run = resolve_run(model, artifacts)
        complete = (run / MANIFEST_FILE).is_file()
        file = run / ("model.onnx" if complete else "model.keras")
        if dataset is None and not complete:
            own = load_run(run)[0].evaluate
            chosen = {name: getattr(settings, name) for name in settings.model_fields_set}
            return file, evaluate_run(run, own.model_copy(update=chosen))
    if dataset is None:
        prepared = load_run(file.parent)[1]
    elif (user_path(dataset) / DATASET_FILE).is_file():
        prepared = load_prepared(user_path(dataset))
    elif dataset in BUILT_IN_DATASETS or _is_source_of(file.parent, dataset):
        prepared = _prepare_for(dataset, file, data, progress)
    else:
        return file, _evaluate_folder(file, user_path(dataset), settings, data, progress)
    logger.info("scoring %s on the %d test images of %s", file, prepared.num_images["test"], prepared.name)
    return file, evaluate_model(file, prepared, settings)


def _is_source_of(run: Path, dataset: str) -> bool:
    from cnnpipe.promote.gate import read_location

    return (run / "config.toml").is_file() and read_location(run) == dataset_location(dataset)


def _prepare_for(dataset: str, model: Path, data: Path, progress: ProgressCallback | None) -> PreparedDataset:
    """Prepare a dataset at the model's image size, split as its run's own was, or find it prepared already."""
    from cnnpipe.evaluate.predict import open_model

    config = model.parent / "config.toml"
    own = load_toml(RetrainSettings, config).prepare if config.is_file() else PrepareSettings()
    # Another seed would put images into test that the model was trained on.
    name = own.name if dataset == own.dataset else dataset_name(dataset) or own.resolved_name
    values = own.model_dump() | {"dataset": dataset, "name": name, "image_size": open_model(model).image_size}
    if dataset != own.dataset:  # the patterns are of the run's own folder
        values |= {"include": (), "exclude": ()}
    settings = validate_settings(PrepareSettings, values, COMMAND_LINE)
    return prepare_dataset(settings, data, progress=progress)


def _evaluate_folder(
    model: Path, folder: Path, settings: EvaluateSettings, data: Path, progress: ProgressCallback | None
) -> Evaluation:
    """Score a model on all images of a folder, whatever their number: no limit of training holds, and no split."""
    from cnnpipe.evaluate.metrics import evaluate_probabilities, recorded_classes
    from cnnpipe.evaluate.predict import open_model
    from cnnpipe.prepare.folders import list_scored_folder
    from cnnpipe.prepare.sources import FolderSource

    opened = open_model(model, recorded_classes(model.parent))
    source = FolderSource(list_scored_folder(folder, opened.class_names), usable_cores(), progress or (lambda *_: None))
    with scratch_folder(data / "prepared") as scratch:
        images = source.read(opened.image_size, scratch / "pixels")
        for warning in (*images.warnings, *warn_of_unreadable(images.unreadable, len(images.labels))):
            logger.warning("%s", warning)
        with suppress(CnnpipeError):  # a file outside a run, or one whose dataset is gone: nobody knows what it learned
            if learned := count_shared(images.pixels, load_run(model.parent)[1], ("train", "val")):
                logger.warning("%d of these images were learned: the model is better on them than on others", learned)
        logger.info("scoring %s on %d images of %s", model, len(images.labels), folder)
        return evaluate_probabilities(opened.predict(images.pixels), images.labels, images.class_names, settings)
