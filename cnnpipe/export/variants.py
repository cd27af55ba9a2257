"""Variants of an exported model: int8 for CPUs, fp16 for CUDA. Each is kept only if it loses little accuracy.

Input and output stay as in the fp32 model; float32 weights and activations become smaller numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from cnnpipe.errors import ModelError, ProviderError, one_line
from cnnpipe.evaluate.metrics import Parity, compare_probabilities
from cnnpipe.evaluate.predict import Images, Probabilities, predict_onnx
from cnnpipe.export.graphs import end_in_float32, feed_pixels
from cnnpipe.machine import find_processor
from cnnpipe.manifest import INPUT_NAME, MODEL_FILES, ModelInfo, Precision
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import ClassifierSession, device_report, open_session
from cnnpipe.settings import ExportSettings
from cnnpipe.storage import storage_errors, write_bytes
from cnnpipe.train.networks import WHITENING_NAME

logger = logging.getLogger(__name__)

_NUM_TURNS: Final = 9
_TURN_SECONDS: Final = 0.04
_ROUNDING: Final = 1e-9

_QUANTIZED_OPERATORS: Final = ["Conv", "Gemm", "MatMul", "Relu", "MaxPool", "Reshape", "Transpose"]
"""Operators computed in int8. The softmax is not: with 256 steps between 0 and 1, many classes would tie."""

_LAYERS: Final = ("Conv", "Gemm", "MatMul")

_CALIBRATION_BATCH: Final = 8
"""Images in a batch of the calibration: small, so that the layers of large images fit into memory."""

_CALIBRATION_SEED: Final = 0

_DEFAULT_SEVERITY: Final = 2
"""Log severity of onnxruntime in a new process, which cannot be asked for: warnings.

Source: https://onnxruntime.ai/docs/api/python/api_summary.html, `set_default_logger_severity`.
"""

_ERRORS: Final = (
    *(ValueError, KeyError, RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
    *(_ort.Fail, _ort.InvalidArgument, _ort.InvalidGraph, _ort.NotImplemented, _ort.RuntimeException),
)
"""Errors that a quantiser raises for a graph that it does not support; it has no error class of its own."""


@dataclass(frozen=True)
class Reference:
    """The fp32 model that a variant is compared with."""

    model: onnx.ModelProto
    """Graph with its metadata."""
    info: ModelInfo
    session: ClassifierSession
    """Session of that model on the CPU."""
    trained: Probabilities
    """(N, classes), the trained model's probabilities for the test images."""
    accuracy: float
    """Accuracy on the test images, 0-1."""


@dataclass(frozen=True)
class Variant:
    """Result of one precision."""

    precision: Precision
    kept: bool
    reason: str
    """Why it was kept or not, half a sentence."""
    accuracy: float | None = None
    """Accuracy on the test images, 0-1; None if the variant could not be made."""
    relative_speed: float | None = None
    """Images/s as a multiple of the fp32 model's: int8 on the CPU, fp16 on CUDA; None if not measured."""
    measured_on: str = ""
    """Processor or GPU of that measurement."""
    parity: Parity | None = None
    """Comparison with the trained model."""
    sha256: str = ""
    """Digest of the file; empty if it was not kept."""

    def to_record(self) -> dict[str, Any]:
        """Return the variant's record in `parity.json`: its own figures and those of its parity side by side."""
        record = asdict(self)
        del record["precision"]
        return record | (record.pop("parity") or {})


def export_variants(
    run: Path, reference: Reference, dataset: PreparedDataset, settings: ExportSettings
) -> tuple[Variant, ...]:
    """Write `model.int8.onnx` and `model.fp16.onnx` to a run, each only if it is accurate enough on the test images.

    A variant that cannot be made, or fails, is not kept; the run is complete without it.

    Raises:
        StorageError: a file cannot be written.
    """

    def make_int8(folder: Path) -> onnx.ModelProto:
        images = sample_calibration_images(dataset, settings.calibration_images)
        return quantize_int8(reference.model, images, folder)

    makers: dict[Precision, Callable[[Path], onnx.ModelProto]] = {}
    if settings.int8:
        makers["int8"] = make_int8
    if settings.fp16:
        makers["fp16"] = lambda _: convert_fp16(reference.model)
    variants = []
    for precision, make in makers.items():
        with TemporaryDirectory(prefix="cnnpipe-") as folder:
            try:
                file = Path(folder) / MODEL_FILES[precision]
                variant = _judge(precision, make(Path(folder)), file, run, reference, dataset, settings)
            except ModelError as error:
                variant = Variant(precision, kept=False, reason=str(error))
        level = logging.INFO if variant.kept else logging.WARNING
        logger.log(level, "%s: %s, %s", precision, "kept" if variant.kept else "not kept", variant.reason)
        variants.append(variant)
    return tuple(variants)


def _judge(
    precision: Precision,
    model: onnx.ModelProto,
    file: Path,
    run: Path,
    reference: Reference,
    dataset: PreparedDataset,
    settings: ExportSettings,
) -> Variant:
    """Score a variant, written to a temporary `file`, and write it to the run if it is accurate enough."""
    images = dataset.images("test")
    with storage_errors(file):
        file.write_bytes(_with_metadata(model, precision, reference.info))
    session = open_session(file, "cpu")
    probabilities = predict_onnx(session, images)
    accuracy = float(np.mean(probabilities.argmax(axis=1) == dataset.labels("test")))
    parity = compare_probabilities(reference.trained, probabilities, dataset.paths("test"))
    lost = reference.accuracy - accuracy
    if lost > settings.max_accuracy_loss + _ROUNDING:
        reason = f"loses {100 * lost:.2f} points of accuracy, at most {100 * settings.max_accuracy_loss:.2f}"
        return Variant(precision, kept=False, reason=reason, accuracy=accuracy, parity=parity)
    reason = f"accuracy {accuracy:.4f} (fp32 {reference.accuracy:.4f}), "
    try:
        speed, processor = _measure(precision, file, run, session, reference, images)
        reason += f"{speed:.1f} times as fast on {processor or 'this CPU'}"
    except ProviderError as error:
        speed, processor = None, ""
        reason += f"speed not measured: {error}"
    content = _with_metadata(model, precision, reference.info.model_copy(update={"test_accuracy": accuracy}))
    write_bytes(run / file.name, content)
    return Variant(precision, True, reason, accuracy, speed, processor, parity, hashlib.sha256(content).hexdigest())


def _with_metadata(model: onnx.ModelProto, precision: Precision, info: ModelInfo) -> bytes:
    onnx.helper.set_model_props(model, info.to_metadata() | {"precision": precision})
    content: bytes = model.SerializeToString()
    return content


def _measure(
    precision: Precision, file: Path, run: Path, session: ClassifierSession, reference: Reference, images: Images
) -> tuple[float, str]:
    """Return a variant's speed as a multiple of fp32's, on its own kind of device, and the device's name.

    Raises:
        ProviderError: CUDA cannot be used here.
    """
    if precision == "int8":
        return measure_relative_speed(session, reference.session, images), find_processor().model
    report = device_report()
    if report["problem"]:
        raise ProviderError(report["problem"])
    variant, fp32 = (open_session(each, "cuda") for each in (file, run / MODEL_FILES["fp32"]))
    return measure_relative_speed(variant, fp32, images), report["gpus"][0]


def measure_relative_speed(session: ClassifierSession, reference: ClassifierSession, images: Images) -> float:
    """Return a session's speed as a multiple of the reference's, in batches of its own default size.

    The two take turns, so that other work of the machine slows both, and the median of the turns counts.

    Args:
        images: (N, H, W, 3) uint8, at least one.
    """
    size = session.default_batch_size
    batch = np.resize(images[:size], (size, *images.shape[1:]))  # repeats them if there are fewer

    def seconds(each: ClassifierSession, num_batches: int) -> float:
        began = time.perf_counter()
        for _ in range(num_batches):
            each.run(batch)
        return time.perf_counter() - began

    seconds(reference, 1), seconds(session, 1)  # the first run of each allocates its buffers
    num_batches = max(1, round(_TURN_SECONDS / seconds(reference, 1)))
    return statistics.median(seconds(reference, num_batches) / seconds(session, num_batches) for _ in range(_NUM_TURNS))


def sample_calibration_images(dataset: PreparedDataset, number: int) -> Images:
    """Return training images to calibrate with, always the same ones: (number or all there are, H, W, 3) uint8."""
    images = dataset.images("train")
    random = np.random.default_rng(_CALIBRATION_SEED)
    chosen = random.choice(len(images), min(number, len(images)), replace=False)
    return np.asarray(images[np.sort(chosen)])


def quantize_int8(model: onnx.ModelProto, images: Images, folder: Path) -> onnx.ModelProto:
    """Return the model with 8-bit weights and activations, as float operators between Quantize and Dequantize nodes.

    Activations are unsigned, so that 0 is the lowest and a Relu costs nothing. Weights are signed, with a scale for
    each filter, and have 7 bits: no sum of two products exceeds 16 bits, so a CPU without VNNI instructions, which
    would saturate it, gives the same result as one with them. The last layer stays float32, and so does a layer that
    whitens (see `cnnpipe.train.networks`): it amplifies small differences, which 8 bits round away.

    Args:
        model: as exported, in fp32.
        images: (N, H, W, 3) uint8 training images, from which the ranges of the activations are taken.
        folder: for temporary files.
    Raises:
        ModelError: the quantiser does not support this model.
        StorageError: the temporary files cannot be written.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
    with _model_errors("int8"), storage_errors(folder), _quiet():
        graph = _optimize(model, prepared)
        feed_pixels(graph)
        float_layers = _name_layers(graph.graph)
        onnx.save(graph, prepared)
        quantize_static(
            prepared,
            quantized,
            _calibration_reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            nodes_to_exclude=float_layers,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return _finish(onnx.load(quantized), model)


def _optimize(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """Return the model as onnxruntime simplifies it: a dense layer becomes one Gemm, which is rounded to int8 once.

    `quant_pre_process` would do the same, but onnxruntime 1.26 drops its result unless shapes are inferred with sympy.

    Args:
        file: temporary file.
    """
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(file)
    add_pre_process_metadata(optimized)  # else the quantiser advises to do this
    return optimized


def _name_layers(graph: onnx.GraphProto) -> list[str]:
    """Give every layer a name of its own, and return the names of those that stay float32."""
    layers = [node for node in graph.node if node.op_type in _LAYERS]
    in_float = [node for node in layers if WHITENING_NAME in node.name or node is layers[-1]]
    for index, node in enumerate(layers):
        node.name = f"layer_{index}"
    return [node.name for node in in_float]


def _calibration_reader(images: Images) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._starts = iter(range(0, len(images), _CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Images] | None:
            start = next(self._starts, None)
            return None if start is None else {INPUT_NAME: images[start : start + _CALIBRATION_BATCH]}

    return Reader()


def convert_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in 16-bit floats except for the softmax, which is as fast in float32, and exact.

    Raises:
        ModelError: the model cannot be converted.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the conversion changes its argument
    with _model_errors("fp16"):
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


@contextlib.contextmanager
def _model_errors(precision: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise ModelError(f"this model cannot be made {precision}: {one_line(error)}; leave {precision} out") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's log of its own steps from the user; errors are raised."""
    quantizer_logger = logging.getLogger("onnxruntime.quantization")
    level = quantizer_logger.level
    quantizer_logger.setLevel(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_DEFAULT_SEVERITY)
        quantizer_logger.setLevel(level)
