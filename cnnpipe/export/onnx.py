"""The stage `export`: Keras to ONNX, one file that needs nothing beside it, compared with the model it came from."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cnnpipe import __version__
from cnnpipe.errors import ModelError, ParityError, one_line
from cnnpipe.evaluate.evaluation import load_keras_model, load_run, predict_onnx
from cnnpipe.evaluate.metrics import Parity, compare_probabilities, read_evaluation, read_probabilities
from cnnpipe.export.graphs import simplify_graph
from cnnpipe.export.variants import Reference, export_variants
from cnnpipe.manifest import INPUT_NAME, MODEL_FILES, OUTPUT_NAME, PARITY_FILE, ModelInfo, require_unfinished
from cnnpipe.session import open_session
from cnnpipe.settings import ExportSettings
from cnnpipe.storage import sha256_file, storage_errors, write_file, write_json
from cnnpipe.train.backend import keras, select_device

logger = logging.getLogger(__name__)


def export_run(run: Path, chosen: ExportSettings | None = None) -> Parity:
    """Write `model.onnx`, its variants and, last, `parity.json` of a trained and evaluated run.

    A model file gets its name only after onnx's checker has passed it and its probabilities for the whole test split
    were compared with those of the trained model, which `cnnpipe evaluate` has written.

    Args:
        chosen: used instead of the run's own settings.
    Raises:
        ParityError: the two models disagree by more than the settings allow.
        ModelError: the run has no trained model, or the conversion gave no valid ONNX file.
        RegistryError: the run is complete, or was not evaluated.
        StorageError: the files cannot be written.
    """
    require_unfinished(run)
    loaded = load_run(run)
    dataset, settings = loaded.dataset, chosen or loaded.settings.export
    select_device(loaded.settings.train.device)
    model = load_keras_model(run / "model.keras")
    info = ModelInfo(
        cnnpipe_version=__version__,
        name=run.parent.parent.name,
        run_id=run.name,
        preset=loaded.settings.train.preset,
        class_names=dataset.class_names,
        image_size=dataset.image_size,
        dataset_fingerprint=dataset.fingerprint,
        test_accuracy=read_evaluation(run).accuracy,
        training_statistics=dataset.statistics,
    )
    trained = read_probabilities(run, dataset.num_images["test"])
    graph = _describe(convert_model(model, dataset.image_size, settings.opset), info)
    for name in (PARITY_FILE, MODEL_FILES["int8"], MODEL_FILES["fp16"]):
        with storage_errors(run / name):  # a variant must never stand beside a model that it was not made from
            (run / name).unlink(missing_ok=True)
    file = run / MODEL_FILES["fp32"]
    with write_file(file) as temporary:
        with storage_errors(file):
            onnx.save(graph, temporary)
        session = open_session(temporary, "cpu")
        exported = predict_onnx(session, dataset.images("test"))
        parity = compare_probabilities(trained, exported, dataset.paths("test"))
        _require_parity(parity, settings)
    figures = (len(graph.graph.node), parity.agreement, parity.num_images, parity.max_difference)
    text = "exported %s: %d nodes, same class on %.4f of %d test images, largest difference %.1e"
    logger.info(text, file, *figures)
    accuracy = float(np.mean(exported.argmax(axis=1) == dataset.labels("test")))
    reference = Reference(graph, info, session, trained, accuracy)
    fp32 = {"accuracy": accuracy, **asdict(parity), "sha256": sha256_file(file)}
    write_json(run / PARITY_FILE, {"fp32": fp32, **export_variants(run, reference, dataset, settings)})
    return parity


def _describe(model: onnx.ModelProto, info: ModelInfo) -> onnx.ModelProto:
    """Write the metadata into a converted model, and check that it is valid."""
    onnx.helper.set_model_props(model, info.to_metadata() | {"precision": "fp32"})
    model.producer_name, model.producer_version = "cnnpipe", __version__
    model.doc_string = "Input: uint8 (batch, height, width, 3) RGB. Output: probabilities of metadata `class_names`."
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the exported graph is not valid ONNX: {one_line(error)}; train again with another opset"
        ) from error
    return model


def _require_parity(parity: Parity, settings: ExportSettings) -> None:
    # `not <=` rather than `>`: a NaN must fail too.
    if parity.agreement < settings.min_agreement or not parity.max_difference <= settings.max_difference:
        examples = f", first at {', '.join(parity.disagreements[:3])}" if parity.disagreements else ""
        raise ParityError(
            f"the ONNX model gives the trained model's class for {parity.agreement:.2%} of {parity.num_images} test "
            f"images (at least {settings.min_agreement:.2%}) and differs by {parity.max_difference:.1e} "
            f"(at most {settings.max_difference:.1e}){examples}; it was not kept: train again, or allow more in the "
            "settings of export"
        )


def convert_model(model: keras.Model, image_size: tuple[int, int], opset: int) -> onnx.ModelProto:
    """Convert a network of `networks.build_network` to ONNX, without metadata.

    Uses a function with an explicit signature: `tf2onnx.convert.from_keras` fails on Keras 3.
    """
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
