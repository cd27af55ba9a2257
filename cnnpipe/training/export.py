"""Keras to ONNX: one file that stands alone, checked against the model it came from before it gets its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from cnnpipe import __version__
from cnnpipe.config import ExportSettings
from cnnpipe.errors import ModelError, ParityError
from cnnpipe.inference.session import open_session
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME, ModelInfo
from cnnpipe.storage import sha256_file, storage_errors, write_file, write_json
from cnnpipe.training.backend import full_float32, keras
from cnnpipe.training.datasets import PreparedDataset
from cnnpipe.training.evaluation import load_keras_model, predict_keras, predict_onnx, read_evaluation

__all__ = [
    "MODEL_FILE",
    "PARITY_FILE",
    "Parity",
    "compare_probabilities",
    "convert_model",
    "export_onnx",
    "simplify_graph",
]

logger = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"
PARITY_FILE: Final = "parity.json"
_MAX_DISAGREEMENTS_LISTED = 10

Probabilities = npt.NDArray[np.float32]  # (N, classes)


@dataclass(frozen=True)
class Parity:
    """How closely an exported model repeats the trained one on the same images."""

    num_images: int
    agreement: float
    """Share of images that get the same class, 0-1."""
    max_difference: float
    """Largest difference of any probability."""
    disagreements: tuple[str, ...]
    """The first images that get another class."""


def export_onnx(run: Path, preset: str, dataset: PreparedDataset, settings: ExportSettings) -> Parity:
    """Write `model.onnx` and `parity.json` of a trained and evaluated run.

    The file gets its final name only after onnx's checker has passed it and the whole test split has gone through
    both models: a file of that name can be relied on.

    Args:
        run: holds `model.keras` and `metrics.json`.
        preset: recorded in the metadata.
        dataset: what the run was trained on.
    Raises:
        ParityError: the two models disagree by more than the settings allow.
        ModelError: the run has no trained model, or the conversion gave no valid ONNX file.
        StorageError: the files cannot be written.
    """
    model = load_keras_model(run / "model.keras")
    info = ModelInfo(
        cnnpipe_version=__version__,
        name=run.parent.parent.name,
        run_id=run.name,
        preset=preset,
        class_names=dataset.class_names,
        image_size=dataset.image_size,
        dataset_fingerprint=dataset.fingerprint,
        test_accuracy=read_evaluation(run).accuracy,
        training_statistics=dataset.statistics,
    )
    graph = convert_model(model, dataset.image_size, settings.opset)
    onnx.helper.set_model_props(graph, info.to_metadata())
    graph.producer_name, graph.producer_version = "cnnpipe", __version__
    graph.doc_string = "Input: uint8 (batch, height, width, 3) RGB. Output: probabilities of metadata `class_names`."
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the exported graph is not valid ONNX: {' '.join(str(error).split())[:200]}") from error
    images = dataset.images("test")
    with write_file(run / MODEL_FILE) as temporary:
        with storage_errors(run / MODEL_FILE):
            onnx.save(graph, temporary)
        exported = predict_onnx(open_session(temporary, "cpu"), images)
        with full_float32():
            trained = predict_keras(model, images)
        parity = compare_probabilities(trained, exported, dataset.paths("test"))
        _require_parity(parity, settings)
    write_json(run / PARITY_FILE, {"fp32": asdict(parity), "sha256": sha256_file(run / MODEL_FILE)})
    logger.info(
        "exported %s: %d nodes, same class on %.4f of %d test images, largest difference %.1e",
        *(run / MODEL_FILE, len(graph.graph.node), parity.agreement, parity.num_images, parity.max_difference),
    )
    return parity


def compare_probabilities(reference: Probabilities, exported: Probabilities, paths: list[str]) -> Parity:
    """Compare two models' probabilities for the same images.

    Args:
        reference: (N, classes), of the trained model.
        exported: (N, classes), of the exported one.
        paths: the images' names, in the same order.
    """
    differs = np.flatnonzero(reference.argmax(axis=1) != exported.argmax(axis=1))
    return Parity(
        num_images=len(reference),
        agreement=1.0 - len(differs) / len(reference),
        max_difference=float(np.abs(reference - exported).max()),
        disagreements=tuple(paths[index] for index in differs[:_MAX_DISAGREEMENTS_LISTED]),
    )


def _require_parity(parity: Parity, settings: ExportSettings) -> None:
    # `not <=` rather than `>`: a NaN must fail too.
    if parity.agreement < settings.min_agreement or not parity.max_difference <= settings.max_difference:
        examples = f", first at {', '.join(parity.disagreements[:3])}" if parity.disagreements else ""
        raise ParityError(
            f"the ONNX model gives the trained model's class for {parity.agreement:.2%} of {parity.num_images} test "
            f"images (at least {settings.min_agreement:.2%}) and differs by {parity.max_difference:.1e} "
            f"(at most {settings.max_difference:.1e}){examples}; it was not kept"
        )


def convert_model(model: keras.Model, image_size: tuple[int, int], opset: int) -> onnx.ModelProto:
    """Convert a network of `models.build_model` to ONNX, without metadata.

    By a function with an explicit signature: `tf2onnx.convert.from_keras` fails on Keras 3.

    Args:
        image_size: (height, width) of its input.
        opset: version of the ONNX operator set.
    Raises:
        ModelError: Keras does not run on TensorFlow, from which alone can be converted.
    """
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"ONNX export needs the tensorflow backend, received {keras.backend.backend()!r}; "
            "unset KERAS_BACKEND and export the run again"
        )
    import tensorflow as tf
    import tf2onnx

    signature = (tf.TensorSpec((None, *image_size, 3), tf.uint8, name=INPUT_NAME),)

    @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
    def infer(images: Any) -> dict[str, Any]:
        return {OUTPUT_NAME: model(images, training=False)}

    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    graph, _ = tf2onnx.convert.from_function(infer, input_signature=signature, opset=opset)
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return simplify_graph(graph)


def simplify_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without what the conversion leaves over; what it computes stays the same.

    - a Reshape to a shape computed at run time, of which only the batch is unknown, gets a constant shape;
    - `x + 0` goes (Keras' Rescaling adds its offset even where it is 0);
    - nodes and constants that nothing uses any more go.
    """
    # With data propagation, because the shapes sought are themselves computed by nodes.
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] not in constants:
            sizes = [dim.dim_value for dim in shapes.get(node.output[0], ())]
            if sizes and all(sizes[1:]):
                name = f"{node.output[0]}/shape"
                graph.initializer.append(numpy_helper.from_array(np.array([-1, *sizes[1:]], np.int64), name))
                node.input[1] = name
    _bypass_nodes(graph, lambda node: _adds_zero(node, constants))
    _remove_unused(graph)
    del graph.value_info[:]
    return model


def _adds_zero(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Add" or node.input[1] not in constants:
        return False
    addend = numpy_helper.to_array(constants[node.input[1]])
    return addend.size == 1 and not addend.any()


def _bypass_nodes(graph: onnx.GraphProto, passes_through: Callable[[onnx.NodeProto], bool]) -> None:
    """Let the users of each such node's output read its first input instead."""
    outputs = {value.name for value in graph.output}
    replaced: dict[str, str] = {}
    for node in graph.node:  # topological order: an input has been replaced before it is read
        for index, name in enumerate(node.input):
            node.input[index] = replaced.get(name, name)
        if passes_through(node) and node.output[0] not in outputs:
            replaced[node.output[0]] = node.input[0]


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and constants from which no output follows."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, content in ((graph.node, kept[::-1]), (graph.initializer, tensors)):
        copies = [type(item).FromString(item.SerializeToString()) for item in content]
        del field[:]
        field.extend(copies)
