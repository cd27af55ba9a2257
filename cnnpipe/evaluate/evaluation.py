"""The stage `evaluate`: score a run on its test split, or any model on any labelled images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cnnpipe.errors import CnnpipeError, DatasetError, ModelError, RegistryError
from cnnpipe.evaluate.metrics import (
    METRICS_FILE,
    Evaluation,
    evaluate_probabilities,
    read_evaluation,
    write_evaluation,
)
from cnnpipe.evaluate.predict import OpenModel, Probabilities, open_model
from cnnpipe.machine import usable_cores
from cnnpipe.manifest import MANIFEST_FILE, choose_model_file, read_manifest, read_origin, require_unfinished
from cnnpipe.paths import expand_path
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
from cnnpipe.registry import find_model
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedRun:
    """Settings and dataset of a run, as the stages after training need them."""

    settings: RetrainSettings
    """Settings that the run was made with."""
    dataset: PreparedDataset
    """Dataset that it was trained on."""
    location: str
    """Source of its images: the absolute path of a folder, or the name of a built-in dataset."""


def load_run(run: Path) -> LoadedRun:
    """Read a run's settings and find its dataset.

    Raises:
        RegistryError: the folder is not a run, or its dataset is gone.
        ConfigError: its `config.toml` is damaged.
        DatasetError: the prepared dataset is damaged.
    """
    if not (run / "config.toml").is_file():
        raise RegistryError(f"{run} is not a run folder: it has no config.toml; check the path")
    settings, origin = load_toml(RetrainSettings, run / "config.toml"), read_origin(run)
    if origin.prepared is None:
        raise RegistryError(f"{run / 'environment.json'} does not name the dataset of the run; train again")
    if not origin.prepared.is_dir():
        raise RegistryError(
            f"the dataset of {run} is gone: {origin.prepared}; prepare it again: "
            f"cnnpipe prepare --config {run / 'config.toml'} --data {origin.prepared.parent.parent}"
        )
    return LoadedRun(settings, load_prepared(origin.prepared), origin.location)


def evaluate_run(run: Path, chosen: EvaluateSettings | None = None) -> Evaluation:
    """Score a run's `model.keras` on the test split, and write the figures beside it.

    Args:
        chosen: used instead of the run's own settings.
    Raises:
        RegistryError: the run is complete, or its dataset is gone.
        ModelError: `model.keras` is missing or damaged, or does not fit the dataset.
        StorageError: the figures cannot be written.
    """
    from cnnpipe.train.backend import select_device

    require_unfinished(run)
    loaded = load_run(run)
    dataset = loaded.dataset
    select_device(loaded.settings.train.device)
    probabilities = _predict_test(open_model(run / "model.keras"), dataset)
    labels, paths = dataset.labels("test"), dataset.paths("test")
    evaluation = evaluate_probabilities(probabilities, labels, dataset.class_names, chosen or loaded.settings.evaluate)
    write_evaluation(run, evaluation, probabilities, labels, paths)
    logger.info(
        "test: accuracy %.4f, loss %.4f, top-%d %.4f on %d images",
        *(evaluation.accuracy, evaluation.loss, evaluation.top_k, evaluation.top_k_accuracy, evaluation.num_images),
    )
    predicted, actual = (dataset.class_names[index] for index in (probabilities[0].argmax(), labels[0]))
    logger.info("first test image, %s: predicted %s, actual %s", paths[0], predicted, actual)
    return evaluation


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
        dataset: a folder of images, which are all scored (or those in its `test`); or a built-in or prepared dataset,
            of which the test split is scored. None, and the folder that the run was trained on, mean the run's own
            test split.
        data: folder of raw and prepared datasets.
        artifacts: folder of all runs.
    Returns:
        The file that was scored, and its evaluation. Written to the run only if the run is not complete.
    Raises:
        ModelError: there is no such model, or it does not fit the dataset.
        DatasetError: the dataset cannot be read.
        RegistryError: None was given for a file outside any run.
    """
    file = find_model(model, artifacts)
    if file.is_dir():
        run, complete = file, (file / MANIFEST_FILE).is_file()
        file = choose_model_file(run, "cpu", "fp32").path if complete else run / "model.keras"
        if dataset is None and not complete:
            own = load_run(run).settings.evaluate
            return file, evaluate_run(run, own.model_copy(update=settings.model_dump(exclude_unset=True)))
    opened = open_model(file)
    if dataset is None:
        prepared = load_run(file.parent).dataset
    elif (expand_path(dataset) / DATASET_FILE).is_file():
        prepared = load_prepared(expand_path(dataset))
    elif dataset in BUILT_IN_DATASETS or _is_source_of(file.parent, dataset):
        prepared = _prepare_for(dataset, opened, data, progress)
    else:
        return file, _evaluate_folder(opened, expand_path(dataset), settings, data, progress)
    logger.info("scoring %s on the %d test images of %s", file, prepared.num_images["test"], prepared.name)
    return file, evaluate_split(opened, prepared, settings)


def evaluate_split(model: OpenModel, dataset: PreparedDataset, settings: EvaluateSettings) -> Evaluation:
    """Score an open model on a dataset's test split.

    Raises:
        ModelError: the model's classes or image size are not the dataset's.
        DatasetError: the test split is empty.
    """
    probabilities = _predict_test(model, dataset)
    return evaluate_probabilities(probabilities, dataset.labels("test"), dataset.class_names, settings)


def _predict_test(model: OpenModel, dataset: PreparedDataset) -> Probabilities:
    """Return a model's probabilities for a dataset's test split, (N, classes) float32."""
    images = dataset.images("test")
    if not len(images):
        raise DatasetError(f"{dataset.path} has no test images; prepare the dataset with a test split")
    classes = _class_names(model)
    if classes is not None and classes != dataset.class_names:
        difference = describe_difference(classes, dataset.class_names, ("only the model", "only the dataset"))
        raise ModelError(
            f"{model.path} knows {len(classes)} classes, the dataset {dataset.name} has {len(dataset.class_names)}, "
            f"and they differ: {difference}; evaluate it on a dataset with its own classes"
        )
    if model.image_size != dataset.image_size:
        sizes = ("x".join(map(str, size)) for size in (model.image_size, dataset.image_size))
        raise ModelError(
            f"{model.path} takes images of {next(sizes)} pixels, the dataset {dataset.name} was prepared "
            f"with {next(sizes)}; prepare it with the model's --image-size"
        )
    return model.predict(images)


def _class_names(model: OpenModel) -> tuple[str, ...] | None:
    """Return a model's classes; those of a `.keras` file are in its run folder, and unknown without one."""
    run = model.path.parent
    if model.class_names is None and (run / MANIFEST_FILE).is_file():
        return read_manifest(run).model.class_names
    if model.class_names is None and (run / METRICS_FILE).is_file():
        return read_evaluation(run).class_names
    return model.class_names


def describe_difference(first: Sequence[str], second: Sequence[str], owners: tuple[str, str]) -> str:
    """Return in words how two lists of classes differ, such as "only the model has cat; only the dataset has dog".

    Args:
        owners: the names of the two lists in that text.
    """
    if sorted(first) == sorted(second):
        return "the same in another order"
    lacking = ([name for name in first if name not in second], [name for name in second if name not in first])
    return "; ".join(
        f"{owner} has {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for owner, names in zip(owners, lacking, strict=True)
        if names
    )


def _is_source_of(run: Path, dataset: str) -> bool:
    return (run / "config.toml").is_file() and read_origin(run).location == dataset_location(dataset)


def _prepare_for(dataset: str, model: OpenModel, data: Path, progress: ProgressCallback | None) -> PreparedDataset:
    """Prepare a dataset at the model's image size with the splits of the model's run, or find it prepared already."""
    config = model.path.parent / "config.toml"
    own = load_toml(RetrainSettings, config).prepare if config.is_file() else PrepareSettings()
    # With another seed the test split would hold images that the model was trained on.
    name = own.name if dataset == own.dataset else dataset_name(dataset) or own.resolved_name
    values = own.model_dump() | {"dataset": dataset, "name": name, "image_size": model.image_size}
    if dataset != own.dataset:  # the patterns are meant for the run's own folder
        values |= {"include": (), "exclude": ()}
    settings = validate_settings(PrepareSettings, values, COMMAND_LINE)
    return prepare_dataset(settings, data, progress=progress)


def _evaluate_folder(
    model: OpenModel, folder: Path, settings: EvaluateSettings, data: Path, progress: ProgressCallback | None
) -> Evaluation:
    """Score a model on all images of a folder, however many: the limits of training and the splits do not apply."""
    from cnnpipe.prepare.sources import FolderSource, list_scored_folder

    listed = list_scored_folder(folder, _class_names(model))
    source = FolderSource(listed, usable_cores(), progress or (lambda *_: None))
    with scratch_folder(data / "prepared") as scratch:
        images = source.read(model.image_size, scratch / "pixels")
        for warning in (*images.warnings, *warn_of_unreadable(images.unreadable, len(images.labels))):
            logger.warning("%s", warning)
        with suppress(CnnpipeError):  # a file outside a run, or a run whose dataset is gone
            if shared := count_shared(images.pixels, load_run(model.path.parent).dataset, ("train", "val")):
                logger.warning("the model was trained on %d of these images, so it scores higher on them", shared)
        logger.info("scoring %s on %d images of %s", model.path, len(images.labels), folder)
        return evaluate_probabilities(model.predict(images.pixels), images.labels, images.class_names, settings)
