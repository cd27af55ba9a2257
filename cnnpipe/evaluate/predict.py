"""Apply a model, Keras or ONNX, to images in memory: a batch at a time, and every image counts."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import ModelError, one_line

if TYPE_CHECKING:
    from cnnpipe.session import ClassifierSession

Images = npt.NDArray[np.uint8]  # (N, H, W, 3) RGB
Probabilities = npt.NDArray[np.float32]  # (N, classes)


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to be applied."""

    path: Path
    """The .keras or .onnx file."""
    class_names: tuple[str, ...] | None
    """None for a `.keras` file, which does not name its classes."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    predict: Callable[[Images], Probabilities]
    """(N, height, width, 3) uint8 -> (N, classes) float32."""


def open_model(path: Path) -> OpenModel:
    """Open a `.keras` or `.onnx` file.

    Raises:
        ModelError: the file is not a model.
    """
    if path.suffix == ".onnx":
        from cnnpipe.session import open_session

        session = open_session(path)
        return OpenModel(path, session.info.class_names, session.info.image_size, partial(predict_onnx, session))
    if path.suffix == ".keras":
        network = load_keras_model(path)
        height, width = network.input_shape[1:3]
        return OpenModel(path, None, (height, width), partial(predict_keras, network))
    raise ModelError(f"a model to evaluate must end in .keras or .onnx, received {path}; check the path")


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
    """Return a Keras model's probabilities, computed in full float32 on a GPU too.

    Args:
        model: the path of a `.keras` file, or the model that `load_keras_model` returned.
        images: (N, H, W, 3) uint8; may be a memory map, which is read one batch at a time.
        batch_size: images in a step.
    Returns:
        (N, classes) float32.
    Raises:
        ModelError: the file is not a model.
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
        images: (N, H, W, 3) uint8; may be a memory map, which is read one batch at a time.
        batch_size: images in a step; None is the size that suits the session's device.
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
