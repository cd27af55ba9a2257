"""The stage `evaluate`: apply a model, and score a run on its test split or any model on any labelled images."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import CnnpipeError, ModelError, RegistryError, one_line
from cnnpipe.evaluate.metrics import (
    METRICS_FILE,
    Evaluation,
    Probabilities,
    evaluate_probabilities,
    read_evaluation,
    write_evaluation,
)
from cnnpipe.machine import usable_cores
from cnnpipe.manifest import MANIFEST_FILE, choose_model_file, read_manifest, read_origin, require_unfinished
from cnnpipe.paths import expand_path
from cnnpipe.prepare.dataset import (
    DATASET_FILE,
    PreparedDataset,
    find_shared,
    load_prepared,
    prepare_dataset,
    read_digests,
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

if TYPE_CHECKING:
    from cnnpipe.session import ClassifierSession

logger = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]  # (N, H, W, 3) RGB


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to be applied."""

    path: Path  # the .keras or .onnx file
    class_names: tuple[str, ...] | None  # None if neither the file nor its run folder names the classes
    image_size: tuple[int, int]  # (height, width) in pixels
    predict: Callable[[Images], Probabilities]  # (N, height, width, 3) uint8 -> (N, classes) float32


def open_model(path: Path) -> OpenModel:
    """Open a `.keras` or `.onnx` file; raises ModelError if it is not a model."""
    if path.suffix == ".onnx":
        from cnnpipe.session import open_session

        session = open_session(path)
        return OpenModel(path, session.info.class_names, session.info.image_size, partial(predict_onnx, session))
    if path.suffix != ".keras":
        raise ModelError(f"a model to evaluate must end in .keras or .onnx, received {path}; check the path")
    network, class_names = load_keras_model(path), None
    if path.with_name(MANIFEST_FILE).is_file():
        class_names = read_manifest(path.parent).model.class_names
    elif path.with_name(METRICS_FILE).is_file():
        class_names = read_evaluation(path.parent).class_names
    return OpenModel(path, class_names, network.input_shape[1:3], partial(predict_keras, network))


def load_keras_model(path: Path) -> Any:
    """Load a `.keras` file as a `keras.Model`, ready to predict.

    Raises:
        ModelError: the file is missing or not a Keras model, or does not map images to classes.
    """
    # Imported here: an ONNX model is evaluated without waiting for TensorFlow.
    import cnnpipe.train.networks  # noqa: F401  registers our layers, so that they can be loaded
    from cnnpipe.train.backend import keras

    if not path.is_file():
        raise ModelError(f"there is no model file at {path}; check the path")
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path} is not a Keras model, or a truncated one; train again")
    try:
        model = keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is not a Keras model that can be loaded: {one_line(error)}; train again") from error
    shapes = [getattr(model, name, None) for name in ("input_shape", "output_shape")]
    if [len(shape) if isinstance(shape, tuple) else None for shape in shapes] != [4, 2]:
        raise ModelError(
            f"{path} must map (batch, height, width, 3) images to (batch, classes), received input {shapes[0]} and "
            f"output {shapes[1]}; use a model trained by `cnnpipe train`"
        )
    return model


def predict_keras(model: Any, images: Images, batch_size: int = 256) -> Probabilities:
    """Return a Keras model's probabilities, (N, classes) float32, computed in full float32 on a GPU too.

    Args:
        model: the path of a `.keras` file, or the model that `load_keras_model` returned.
        images: (N, H, W, 3) uint8; may be a memory map, which is read one batch at a time.
    """
    from cnnpipe.train.backend import full_float32

    network = load_keras_model(model) if isinstance(model, Path) else model
    network.jit_compile = False  # on a GPU, Keras would have XLA compile for each batch size
    size = max(1, min(batch_size, len(images)))

    def run(batch: Images) -> Probabilities:
        # Padded to one shape for all batches, because the backend compiles the network again for every new shape.
        padding = [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]
        return np.asarray(network.predict_on_batch(np.pad(batch, padding)), dtype=np.float32)[: len(batch)]

    with full_float32():
        return _predict_in_batches(run, images, size, network.output_shape[-1])


def predict_onnx(session: ClassifierSession, images: Images, batch_size: int | None = None) -> Probabilities:
    """Return an ONNX session's probabilities, (N, classes) float32.

    Args:
        images: as for `predict_keras`.
        batch_size: images in a step; None is the size that suits the session's device.
    Raises:
        ModelError: the images are not of the model's size, or the model failed.
    """
    size = batch_size or session.default_batch_size
    return _predict_in_batches(session.run, images, size, len(session.info.class_names))


def _predict_in_batches(
    run: Callable[[Images], Probabilities], images: Images, size: int, num_classes: int
) -> Probabilities:
    probabilities = np.empty((len(images), num_classes), dtype=np.float32)
    for start in range(0, len(images), size):
        probabilities[start : start + size] = run(np.ascontiguousarray(images[start : start + size]))
    return probabilities


@dataclass(frozen=True)
class LoadedRun:
    """Settings and dataset of a run, as the stages after training need them."""

    settings: RetrainSettings
    dataset: PreparedDataset
    location: str  # source of the images: the absolute path of a folder, or the name of a built-in dataset


def load_run(run: Path) -> LoadedRun:
    """Read a run's settings and find its dataset.

    Raises:
        RegistryError: the folder is not a run, or its dataset is gone.
        ConfigError, DatasetError: its `config.toml` or its dataset is damaged.
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
        ModelError: `model.keras` is missing or damaged.
        DatasetError: the test split is empty.
        StorageError: the figures cannot be written.
    """
    from cnnpipe.train.backend import select_device

    require_unfinished(run)
    loaded = load_run(run)
    dataset = loaded.dataset
    labels, paths = dataset.labels("test"), dataset.paths("test")
    select_device(loaded.settings.train.device)
    probabilities = predict_keras(run / "model.keras", dataset.images("test"))
    evaluation = evaluate_probabilities(probabilities, labels, dataset.class_names, chosen or loaded.settings.evaluate)
    write_evaluation(run, evaluation, probabilities, labels, paths)
    figures = (evaluation.accuracy, evaluation.loss, evaluation.top_k, evaluation.top_k_accuracy, len(labels))
    logger.info("test: accuracy %.4f, loss %.4f, top-%d %.4f on %d images", *figures)
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
    opened, run = open_model(file), file.parent
    in_run = (run / "config.toml").is_file()
    if dataset is None:
        prepared = load_run(run).dataset
    elif (expand_path(dataset) / DATASET_FILE).is_file():
        prepared = load_prepared(expand_path(dataset))
    elif dataset in BUILT_IN_DATASETS or (in_run and read_origin(run).location == dataset_location(dataset)):
        own_settings = load_toml(RetrainSettings, run / "config.toml").prepare if in_run else PrepareSettings()
        prepared = _prepare_for(dataset, opened.image_size, own_settings, data, progress)
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
    own, theirs = model.class_names or dataset.class_names, dataset.class_names
    if own != theirs:
        difference = describe_difference(own, theirs, ("only the model", "only the dataset"))
        raise ModelError(
            f"{model.path} has {len(own)} classes, the dataset {dataset.name} has {len(theirs)}, and they differ: "
            f"{difference}; evaluate it on a dataset with its own classes"
        )
    if model.image_size != dataset.image_size:
        sizes = "takes images of {}x{} pixels, the dataset was prepared with {}x{}"
        sizes = sizes.format(*model.image_size, *dataset.image_size)
        raise ModelError(f"{model.path} {sizes}; prepare {dataset.name} with the model's --image-size")
    probabilities = model.predict(dataset.images("test"))
    return evaluate_probabilities(probabilities, dataset.labels("test"), dataset.class_names, settings)


def describe_difference(first: Sequence[str], second: Sequence[str], owners: tuple[str, str]) -> str:
    """Return how two lists of classes differ, such as "only the model has cat; only the dataset has dog"."""
    parts = []
    for owner, names, others in ((owners[0], first, second), (owners[1], second, first)):
        if own := [name for name in names if name not in others]:
            parts.append(f"{owner} has {', '.join(own[:3])}{', …' if len(own) > 3 else ''}")
    return "; ".join(parts) or "the same in another order"


def _prepare_for(
    dataset: str, image_size: tuple[int, int], own: PrepareSettings, data: Path, progress: ProgressCallback | None
) -> PreparedDataset:
    """Prepare a dataset with the settings of the model's run, whose split keeps training images out of the test."""
    values = own.model_dump() | {"image_size": image_size}
    if dataset != own.dataset:  # the patterns are meant for the run's own folder
        name = dataset_name(dataset) or own.resolved_name
        values |= {"dataset": dataset, "name": name, "include": (), "exclude": ()}
    return prepare_dataset(validate_settings(PrepareSettings, values, COMMAND_LINE), data, progress=progress)


def _evaluate_folder(
    model: OpenModel, folder: Path, settings: EvaluateSettings, data: Path, progress: ProgressCallback | None
) -> Evaluation:
    """Score a model on all images of a folder, however many: the limits of training and the splits do not apply."""
    from cnnpipe.prepare.sources import FolderSource, hash_pixels, list_scored_folder, pack_digests

    source = FolderSource(list_scored_folder(folder, model.class_names), usable_cores(), progress or (lambda *_: None))
    with scratch_folder(data / "prepared") as scratch:
        images = source.read(model.image_size, scratch / "pixels")
        for warning in (*images.warnings, *warn_of_unreadable(images.unreadable, len(images.labels))):
            logger.warning("%s", warning)
        with suppress(CnnpipeError):  # a file outside a run, or an older run whose dataset is gone
            own, digests = read_digests(model.path.parent), pack_digests(hash_pixels(images.pixels))
            if shared := int(find_shared(digests, own["train"], own["val"]).sum()):
                logger.warning("the model was trained on %d of these images, so it scores higher on them", shared)
        logger.info("scoring %s on %d images of %s", model.path, len(images.labels), folder)
        return evaluate_probabilities(model.predict(images.pixels), images.labels, images.class_names, settings)
