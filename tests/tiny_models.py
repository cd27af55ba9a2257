"""A small real classifier for the tests: ridge regression on scikit-learn's digits, as ONNX by the contract."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnpipe.manifest import ModelInfo, TrainingStatistics

IMAGE_SIZE = (8, 8)
CLASS_NAMES = tuple(f"digit {number}" for number in range(10))


@functools.cache
def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the 1,797 digits, (N, 8, 8) uint8 0-255, and their labels."""
    from sklearn.datasets import load_digits as load

    digits = load()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


@functools.cache
def fit_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return weights (64, 10) and bias (10,) of a ridge regression on pixels 0-1, right for 95 % of the digits."""
    images, labels = load_digits()
    pixels = np.column_stack([images.reshape(len(images), -1) / 255, np.ones(len(images))])
    logits = 10 * np.eye(10)[labels] - 5
    fitted = np.linalg.solve(pixels.T @ pixels + 0.1 * np.eye(65), pixels.T @ logits).astype(np.float32)
    return fitted[:-1], fitted[-1]


def expected_probabilities(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return what the model must say of (N, 8, 8, 3) images, (N, 10), computed with NumPy."""
    weights, bias = fit_digits()
    scores = (images.astype(np.float64).mean(axis=3) / 255).reshape(len(images), -1) @ weights + bias
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True), np.float64)


def model_info(**changes: Any) -> ModelInfo:
    """Return the tiny model's metadata, with some fields changed."""
    fields = {
        "cnnpipe_version": "0.1.0",
        "name": "tiny",
        "run_id": "20260101T000000Z",
        "preset": "baseline",
        "class_names": CLASS_NAMES,
        "image_size": IMAGE_SIZE,
        "dataset_fingerprint": "0" * 64,
        "test_accuracy": 0.97,
        "training_statistics": TrainingStatistics(
            num_images=1797,
            channel_mean=(78.0, 78.0, 78.0),
            channel_std=(96.0, 96.0, 96.0),
            brightness_deciles=tuple(range(0, 110, 10)),
            class_shares=(0.1,) * 10,
        ),
    }
    return ModelInfo.model_validate(fields | changes)


def write_model(
    path: Path,
    info: ModelInfo | None = None,
    *,
    metadata: bool = True,
    names: tuple[str, str] = ("images", "probabilities"),
    input_type: str = "UINT8",
    batch: str | int = "batch",
    scale: float = 1 / 255,
    layer: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None,
) -> Path:
    """Write the tiny model to `path`; all but the last argument break the contract in one place each.

    Args:
        layer: other weights (64, classes) and bias (classes,) than those of `fit_digits`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights, bias = layer or fit_digits()
    constants = {"scale": np.float32(scale), "weights": weights, "bias": bias}
    nodes = [
        helper.make_node("Cast", [names[0]], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled"], ["gray"], axes=[3], keepdims=0),
        helper.make_node("Flatten", ["gray"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [names[1]], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(names[0], getattr(TensorProto, input_type), [batch, *IMAGE_SIZE, 3])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [batch, len(bias)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if metadata:
        helper.set_model_props(model, (info or model_info()).to_metadata())
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def write_digits(folder: Path, indices: Sequence[int]) -> list[str]:
    """Write digits as PNG files `<label>/<index>.png`, and return their paths in the order of `find_files`."""
    images, labels = load_digits()
    paths = []
    for index in indices:
        path = f"{labels[index]}/{index:04d}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(folder / path)
        paths.append(path)
    return sorted(paths)
