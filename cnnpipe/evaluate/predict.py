"""Apply a model, Keras or ONNX, to labelled images in memory: a batch at a time, every image counted."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError, ModelError, one_line
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import ClassifierSession, open_session

__all__ = [
    "OpenModel",
    "describe_difference",
    "load_keras_model",
    "open_model",
    "predict_keras",
    "predict_model",
    "predict_onnx",
]

Images = npt.NDArray[np.uint8]  # (N, H, W, 3) RGB
Probabilities = npt.NDArray[np.float32]  # (N, classes)


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to be scored."""

    class_names: tuple[str, ...] | None
    """None for a `.keras` file of which nobody knows them."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    predict: Callable[[Images], Probabilities]
    """(N, height, width, 3) uint8 -> (N, classes) float32."""


def open_model(model: Path, recorded_classes: tuple[str, ...] | None = None) -> OpenModel:
    """Open a `.keras` or `.onnx` file.

    Args:
        recorded_classes: what is known of the classes of a `.keras` file, which does not name them itself.
    Raises:
        ModelError: the file is not a model.
    """
    if model.suffix == ".onnx":
        session = open_session(model)
        return OpenModel(session.info.class_names, session.info.image_size, partial(predict_onnx, session))
    if model.suffix == ".keras":
        network = load_keras_model(model)
        height, width = network.input_shape[1:3]
        return OpenModel(recorded_classes, (height, width), partial(predict_keras, network))
    raise ModelError(f"a model to evaluate must end in .keras or .onnx, received {model}; check the path")


def predict_model(
    model: Path, dataset: PreparedDataset, recorded_classes: tuple[str, ...] | None = None
) -> Probabilities:
    """Return a model file's probabilities for a dataset's test split, (N, classes) float32.

    Args:
        recorded_classes: as for `open_model`.
    Raises:
        ModelError: the file is not a model, or its classes or image size are not the dataset's.
        DatasetError: the test split is empty.
    """
    images = dataset.images("test")
    if not len(images):
        raise DatasetError(f"{dataset.path} has no test images; prepare the dataset with a test split")
    opened = open_model(model, recorded_classes)
    _require_classes(model, opened.class_names, dataset)
    _require_image_size(model, opened.image_size, dataset)
    return opened.predict(images)


def _require_classes(model: Path, class_names: tuple[str, ...] | None, dataset: PreparedDataset) -> None:
    if class_names is None or class_names == dataset.class_names:
        return
    difference = describe_difference(class_names, dataset.class_names, ("only the model", "only the dataset"))
    raise ModelError(
        f"{model} knows {len(class_names)} classes, the dataset {dataset.name} has {len(dataset.class_names)}, "
        f"and they differ: {difference}; evaluate it on a dataset with its own classes"
    )


def describe_difference(first: Sequence[str], second: Sequence[str], owners: tuple[str, str]) -> str:
    """Return in words how two lists of classes differ, such as "only the model has cat; only the dataset has dog".

    Args:
        owners: what to call whoever has classes that the other lacks, first and second.
    """
    if sorted(first) == sorted(second):
        return "the same in another order"
    lacking = ([name for name in first if name not in second], [name for name in second if name not in first])
    return "; ".join(
        f"{owner} has {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for owner, names in zip(owners, lacking, strict=True)
        if names
    )


def _require_image_size(model: Path, image_size: tuple[int | None, ...], dataset: PreparedDataset) -> None:
    if tuple(image_size) != dataset.image_size:
        raise ModelError(
            f"{model} takes images of {image_size[0]}x{image_size[1]} pixels, the dataset {dataset.name} was prepared "
            f"with {dataset.image_size[0]}x{dataset.image_size[1]}; prepare it with the model's --image-size"
        )


def load_keras_model(path: Path) -> Any:
    """Load a `.keras` file as a `keras.Model`, ready to predict.

    Raises:
        ModelError: the file is missing, no Keras model, or has no image input and class output.
    """
    # Imported here: an ONNX model is evaluated without waiting for TensorFlow.
    import cnnpipe.train.networks  # noqa: F401  registers our layers, so that they can be loaded
    from cnnpipe.train.backend import keras

    if not path.is_file():
        raise ModelError(f"no model file at {path}; check the path")
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
    """Return a Keras model's probabilities.

    Args:
        model: the path of a `.keras` file, or the model that `load_keras_model` returned.
        images: (N, H, W, 3) uint8; may be a memory map, of which one batch at a time is read.
        batch_size: images a step; every image counts, the last batch too.
    Returns:
        (N, classes) float32.
    Raises:
        ModelError: the file is no model.
    """
    network = load_keras_model(model) if isinstance(model, Path) else model
    network.jit_compile = False  # on a GPU, Keras would have XLA compile for each batch size
    size = max(1, min(batch_size, len(images)))

    def run(batch: Images) -> Probabilities:
        # Filled up to one shape for all batches, because the backend compiles the network anew for every shape.
        padding = [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]
        return np.asarray(network.predict_on_batch(np.pad(batch, padding)), dtype=np.float32)[: len(batch)]

    return _predict_in_batches(run, images, size, network.output_shape[-1])


def predict_onnx(session: ClassifierSession, images: Images, batch_size: int | None = None) -> Probabilities:
    """Return an ONNX session's probabilities, (N, classes) float32.

    Args:
        images: (N, H, W, 3) uint8; may be a memory map, of which one batch at a time is read.
        batch_size: images a step; None is what suits the session's device. The last batch counts too.
    Raises:
        ModelError: the images are not of the model's size, or the model failed.
    """
    size = session.default_batch_size if batch_size is None else batch_size
    return _predict_in_batches(session.run, images, size, len(session.info.class_names))


def _predict_in_batches(
    run: Callable[[Images], Probabilities], images: Images, batch_size: int, num_classes: int
) -> Probabilities:
    probabilities = np.empty((len(images), num_classes), dtype=np.float32)
    for start in range(0, len(images), batch_size):
        probabilities[start : start + batch_size] = run(np.ascontiguousarray(images[start : start + batch_size]))
    return probabilities
