"""Variants of an exported model: int8 for CPUs, fp16 for CUDA. Each is kept only if it loses little accuracy.

Input and output stay as in the fp32 model; float32 weights and activations become smaller numbers.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from cnnpipe.errors import ModelError, one_line
from cnnpipe.evaluate.evaluation import Images, predict_onnx
from cnnpipe.evaluate.metrics import Probabilities, compare_probabilities
from cnnpipe.export.graphs import end_in_float32, feed_pixels
from cnnpipe.machine import find_processor
from cnnpipe.manifest import INPUT_NAME, MODEL_FILES, ModelInfo, Precision
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import ClassifierSession, device_report, open_session, silent_onnxruntime
from cnnpipe.settings import ExportSettings
from cnnpipe.storage import storage_errors, write_bytes
from cnnpipe.train.networks import WHITENING_NAME

logger = logging.getLogger(__name__)

_NUM_TURNS, _TURN_SECONDS = 9, 0.04
_ROUNDING: Final = 1e-9
_LAYERS: Final = ("Conv", "Gemm", "MatMul")
_QUANTIZED_OPERATORS: Final = [*_LAYERS, "Relu", "MaxPool", "Reshape", "Transpose"]
"""Operators computed in int8. The softmax is not: with 256 steps between 0 and 1, many classes would tie."""

_CALIBRATION_BATCH: Final = 8
"""Images in a batch of the calibration: small, so that the layers of large images fit into memory."""

_ERRORS: Final = (
    *(ValueError, KeyError, RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
    *(_ort.Fail, _ort.InvalidArgument, _ort.InvalidGraph, _ort.NotImplemented, _ort.RuntimeException),
)
"""Errors that a quantiser raises for a graph that it does not support; it has no error class of its own."""


@dataclass(frozen=True)
class Reference:
    """The fp32 model that a variant is compared with."""

    model: onnx.ModelProto  # with its metadata
    info: ModelInfo
    session: ClassifierSession  # of that model on the CPU
    trained: Probabilities  # (N, classes), of the trained model for the test images
    accuracy: float  # on the test images, 0-1


@dataclass
class _Variant:
    """Result of one precision: with the figures of its parity, its record in `parity.json`."""

    kept: bool = False
    reason: str = ""  # why it was kept or not, half a sentence
    accuracy: float | None = None  # accuracy on the test images, 0-1; None if the variant could not be made
    relative_speed: float | None = None  # to the fp32 model's images/s: int8 on the CPU, fp16 on CUDA, if measured
    measured_on: str = ""  # processor or GPU of that measurement
    sha256: str = ""  # digest of the file; empty if it was not kept


def export_variants(
    run: Path, reference: Reference, dataset: PreparedDataset, settings: ExportSettings
) -> dict[Precision, dict[str, Any]]:
    """Write `model.int8.onnx` and `model.fp16.onnx` to a run, each only if it is accurate enough on the test images.

    A variant that cannot be made, or fails, is not kept; the run is complete without it.

    Returns:
        The record of each in `parity.json`.
    """
    records: dict[Precision, dict[str, Any]] = {}
    wanted: dict[Precision, bool] = {"int8": settings.int8, "fp16": settings.fp16}
    for precision in (each for each in wanted if wanted[each]):
        with TemporaryDirectory(prefix="cnnpipe-") as folder:
            file = Path(folder) / MODEL_FILES[precision]
            try:
                if precision == "int8":
                    images = sample_calibration_images(dataset, settings.calibration_images)
                    model = quantize_int8(reference.model, images, file.parent)
                else:
                    model = convert_fp16(reference.model)
                record = _judge(precision, model, file, run, reference, dataset, settings.max_accuracy_loss)
            except ModelError as error:
                record = asdict(_Variant(reason=str(error)))
        level, verdict = (logging.INFO, "kept") if record["kept"] else (logging.WARNING, "not kept")
        logger.log(level, "%s: %s, %s", precision, verdict, record["reason"])
        records[precision] = record
    return records


def _judge(
    precision: Precision,
    model: onnx.ModelProto,
    file: Path,
    run: Path,
    reference: Reference,
    dataset: PreparedDataset,
    max_loss: float,
) -> dict[str, Any]:
    """Return the record of a variant, scored from a temporary `file`; write it to the run if it is accurate enough."""
    images = dataset.images("test")
    with storage_errors(file):
        file.write_bytes(_with_metadata(model, precision, reference.info))
    session = open_session(file, "cpu")
    probabilities = predict_onnx(session, images)
    parity = compare_probabilities(reference.trained, probabilities, dataset.paths("test"))
    accuracy = float(np.mean(probabilities.argmax(axis=1) == dataset.labels("test")))
    lost = reference.accuracy - accuracy
    variant = _Variant(lost <= max_loss + _ROUNDING, accuracy=accuracy)
    if not variant.kept:
        variant.reason = f"loses {100 * lost:.2f} points of accuracy, at most {100 * max_loss:.2f}"
        return asdict(variant) | asdict(parity)
    variant.reason = f"accuracy {accuracy:.4f} (fp32 {reference.accuracy:.4f}), "
    device = device_report() if precision == "fp16" else {"problem": ""}
    if device["problem"]:
        variant.reason += f"speed not measured: {device['problem']}"
    else:
        if precision == "int8":
            pair, variant.measured_on = (session, reference.session), find_processor().model
        else:
            pair = open_session(file, "cuda"), open_session(run / MODEL_FILES["fp32"], "cuda")
            variant.measured_on = device["gpus"][0]
        variant.relative_speed = measure_relative_speed(*pair, images)
        variant.reason += f"{variant.relative_speed:.1f} times as fast on {variant.measured_on or 'this CPU'}"
    content = _with_metadata(model, precision, reference.info.model_copy(update={"test_accuracy": accuracy}))
    write_bytes(run / file.name, content)
    variant.sha256 = hashlib.sha256(content).hexdigest()
    return asdict(variant) | asdict(parity)


def _with_metadata(model: onnx.ModelProto, precision: Precision, info: ModelInfo) -> bytes:
    onnx.helper.set_model_props(model, info.to_metadata() | {"precision": precision})
    return bytes(model.SerializeToString())


def measure_relative_speed(session: ClassifierSession, reference: ClassifierSession, images: Images) -> float:
    """Return a session's speed as a multiple of the reference's, in batches of its own default size.

    The two take turns, so that other work of the machine slows both, and the median of the turns counts.
    """
    size = session.default_batch_size
    batch = np.resize(images[:size], (size, *images.shape[1:]))  # repeats them if there are fewer

    def seconds(each: ClassifierSession, num_batches: int) -> float:
        return timeit(lambda: each.run(batch), number=num_batches)

    seconds(reference, 1), seconds(session, 1)  # the first run of each allocates its buffers
    num_batches = max(1, round(_TURN_SECONDS / seconds(reference, 1)))
    return statistics.median(seconds(reference, num_batches) / seconds(session, num_batches) for _ in range(_NUM_TURNS))


def sample_calibration_images(dataset: PreparedDataset, number: int) -> Images:
    """Return training images to calibrate with, always the same ones: (number or all there are, H, W, 3) uint8."""
    images = dataset.images("train")
    chosen = np.random.default_rng(0).choice(len(images), min(number, len(images)), replace=False)
    return np.asarray(images[np.sort(chosen)])


def quantize_int8(model: onnx.ModelProto, images: Images, folder: Path) -> onnx.ModelProto:
    """Return the model with 8-bit weights and activations, as float operators between Quantize and Dequantize nodes.

    Activations are unsigned, so that 0 is the lowest and a Relu costs nothing. Weights are signed, with a scale for
    each filter, and have 7 bits: no sum of two products exceeds 16 bits, so a CPU without VNNI instructions, which
    would saturate it, gives the same result as one with them. The last layer stays float32, and so does a layer that
    whitens (see `cnnpipe.train.networks`): it amplifies small differences, which 8 bits round away.

    Args:
        images: (N, H, W, 3) uint8 training images, from which the ranges of the activations are taken.
        folder: for temporary files.
    Raises:
        ModelError: the quantiser does not support this model.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
    starts = range(0, len(images), _CALIBRATION_BATCH)
    batches = ({INPUT_NAME: images[start : start + _CALIBRATION_BATCH]} for start in starts)
    with _making("int8"), storage_errors(folder):
        graph = _optimize(model, prepared)
        feed_pixels(graph)
        layers = [node for node in graph.graph.node if node.op_type in _LAYERS]
        in_float = [node for node in layers if WHITENING_NAME in node.name or node is layers[-1]]
        for index, node in enumerate(layers):
            node.name = f"layer_{index}"  # they are excluded by name
        onnx.save(graph, prepared)
        quantize_static(
            prepared,
            quantized,
            SimpleNamespace(get_next=lambda: next(batches, None)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            nodes_to_exclude=[node.name for node in in_float],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return _finish(onnx.load(quantized), model)


def _optimize(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """Return the model as onnxruntime simplifies it: a dense layer becomes one Gemm, which is rounded to int8 once.

    `quant_pre_process` would do the same, but onnxruntime 1.26 drops its result unless shapes are inferred with sympy.
    """
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(file)
    add_pre_process_metadata(optimized)  # else the quantiser advises to do this
    return optimized


def convert_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in 16-bit floats except for the softmax, which is as fast in float32, and exact."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the conversion changes its argument
    with _making("fp16"):
        blocked = [*DEFAULT_OP_BLOCK_LIST, "Softmax"]
        converted = convert_float_to_float16(copy, keep_io_types=True, op_block_list=blocked)
        end_in_float32(converted)
        return _finish(converted, model)


def _finish(made: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Give a variant the original's description, remove what it does not need, and check it."""
    del made.metadata_props[:], made.graph.value_info[:]
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    made.doc_string = original.doc_string
    domains = {node.domain for node in made.graph.node}
    used = [opset for opset in made.opset_import if opset.domain in domains]
    del made.opset_import[:]
    made.opset_import.extend(used)
    onnx.checker.check_model(made, full_check=True)
    return made


@contextmanager
def _making(precision: str) -> Iterator[None]:
    """Turn the errors of a quantiser into one line, and keep its log of its own steps from the user."""
    quantizer_logger = logging.getLogger("onnxruntime.quantization")
    level = quantizer_logger.level
    quantizer_logger.setLevel(logging.CRITICAL)
    try:
        with silent_onnxruntime():
            yield
    except _ERRORS as error:
        problem = f"this model cannot be made {precision}: {one_line(error)}"
        raise ModelError(f"{problem}; use --no-{precision}") from error
    finally:
        quantizer_logger.setLevel(level)
