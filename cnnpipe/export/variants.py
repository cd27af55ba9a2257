"""The quantised variants of an exported model: made, held against the trained one, kept only if they lose little."""

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
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from cnnpipe.errors import ModelError, ProviderError, one_line
from cnnpipe.evaluate.metrics import Parity, compare_probabilities
from cnnpipe.evaluate.predict import Probabilities, predict_onnx
from cnnpipe.export.graphs import end_in_float32, feed_pixels, fuse_dense_layers
from cnnpipe.machine import find_processor
from cnnpipe.manifest import INPUT_NAME, MODEL_FILES, ModelInfo, Precision
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import ClassifierSession, device_report, open_session
from cnnpipe.settings import ExportSettings
from cnnpipe.storage import storage_errors, write_bytes
from cnnpipe.train.networks import WHITENING_NAME

__all__ = [
    "Reference",
    "Variant",
    "convert_fp16",
    "export_variants",
    "measure_relative_speed",
    "quantize_int8",
    "sample_calibration_images",
]

logger = logging.getLogger(__name__)

_NUM_TURNS: Final = 9
_TURN_SECONDS: Final = 0.04
_ROUNDING: Final = 1e-9

Images = npt.NDArray[np.uint8]  # (N, H, W, 3) RGB

_QUANTIZED_OPERATORS: Final = ["Conv", "Gemm", "MatMul", "Relu", "MaxPool", "Reshape", "Transpose"]
"""Every other operator stays float32, the softmax first of all: of 256 steps between 0 and 1 many classes would tie."""

_LAYERS: Final = ("Conv", "Gemm", "MatMul")
_CALIBRATION_BATCH: Final = 8
"""Small, so that the layers of large images fit into memory; nothing but the highest and lowest values is kept."""

_CALIBRATION_SEED: Final = 0

_ERRORS: Final = (
    *(ValueError, KeyError, RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
    *(_ort.Fail, _ort.InvalidArgument, _ort.InvalidGraph, _ort.NotImplemented, _ort.RuntimeException),
)
"""What a quantiser raises about a graph that it does not know; its own classes of error there are none."""


@dataclass(frozen=True)
class Reference:
    """What a variant is held against."""

    model: onnx.ModelProto
    """In fp32, with its metadata."""
    info: ModelInfo
    session: ClassifierSession
    """Of that model, on the CPU."""
    trained: Probabilities
    """(N, classes), what the trained model says of the test images."""
    accuracy: float
    """Of the fp32 model on the test images, 0-1."""


@dataclass(frozen=True)
class Variant:
    """What came of one precision."""

    precision: Precision
    kept: bool
    reason: str
    """Why it was kept or not, half a sentence."""
    accuracy: float | None = None
    """On the test images, 0-1; None if it could not be made."""
    relative_speed: float | None = None
    """Images a second, as a multiple of the fp32 model's: of int8 on the CPU, of fp16 on CUDA; None if not measured."""
    measured_on: str = ""
    """Processor or GPU of that measurement."""
    parity: Parity | None = None
    """Held against the trained model."""
    sha256: str = ""
    """Of the file; empty if it was not kept."""

    def to_record(self) -> dict[str, Any]:
        """Return the variant as `parity.json` has it under its precision: the figures of its parity among its own."""
        record = asdict(self)
        del record["precision"]
        return record | (record.pop("parity") or {})


def export_variants(
    run: Path, reference: Reference, dataset: PreparedDataset, settings: ExportSettings
) -> tuple[Variant, ...]:
    """Write `model.int8.onnx` and `model.fp16.onnx` to a run, each only if it is accurate enough on the test images.

    A variant that cannot be made, or fails, is not kept: the fp32 model does without it.

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
                variant = _export(run, precision, make(Path(folder)), Path(folder), reference, dataset, settings)
            except ModelError as error:
                variant = Variant(precision, kept=False, reason=str(error))
        level = logging.INFO if variant.kept else logging.WARNING
        logger.log(level, "%s: %s, %s", precision, "kept" if variant.kept else "not kept", variant.reason)
        variants.append(variant)
    return tuple(variants)


def _export(
    run: Path,
    precision: Precision,
    model: onnx.ModelProto,
    folder: Path,
    reference: Reference,
    dataset: PreparedDataset,
    settings: ExportSettings,
) -> Variant:
    """Judge a variant, and give it its file in the run if it is kept."""
    candidate, images = folder / MODEL_FILES[precision], dataset.images("test")
    with storage_errors(candidate):
        candidate.write_bytes(_with_metadata(model, precision, reference.info))
    session = open_session(candidate, "cpu")
    probabilities = predict_onnx(session, images)
    accuracy = float(np.mean(probabilities.argmax(axis=1) == dataset.labels("test")))
    parity = compare_probabilities(reference.trained, probabilities, dataset.paths("test"))
    lost = reference.accuracy - accuracy
    if lost > settings.max_accuracy_loss + _ROUNDING:
        reason = f"loses {100 * lost:.2f} points of accuracy, at most {100 * settings.max_accuracy_loss:.2f}"
        return Variant(precision, kept=False, reason=reason, accuracy=accuracy, parity=parity)
    reason = f"accuracy {accuracy:.4f} (fp32 {reference.accuracy:.4f}), "
    try:
        speed, place = _measure(precision, candidate, run, session, reference, images)
        reason += f"{speed:.1f} times as fast on {place or 'this CPU'}"
    except ProviderError as error:
        speed, place = None, ""
        reason += f"speed not measured: {error}"
    content = _with_metadata(model, precision, reference.info.model_copy(update={"test_accuracy": accuracy}))
    write_bytes(run / candidate.name, content)
    return Variant(precision, True, reason, accuracy, speed, place, parity, hashlib.sha256(content).hexdigest())


def _measure(
    precision: Precision, candidate: Path, run: Path, session: ClassifierSession, reference: Reference, images: Images
) -> tuple[float, str]:
    """Return how many times as fast as fp32 a variant is on its own kind of device, and the device's name.

    Raises:
        ProviderError: CUDA cannot be used here.
    """
    if precision == "int8":
        return measure_relative_speed(session, reference.session, images), find_processor().model
    report = device_report()
    if report["problem"]:
        raise ProviderError(report["problem"])
    variant, fp32 = (open_session(file, "cuda") for file in (candidate, run / MODEL_FILES["fp32"]))
    return measure_relative_speed(variant, fp32, images), report["gpus"][0]


def _with_metadata(model: onnx.ModelProto, precision: Precision, info: ModelInfo) -> bytes:
    onnx.helper.set_model_props(model, info.to_metadata() | {"precision": precision})
    content: bytes = model.SerializeToString()
    return content


def measure_relative_speed(session: ClassifierSession, reference: ClassifierSession, images: Images) -> float:
    """Return how many times as fast as the reference a session is, in batches of its own default size.

    The two take turns, so that what else the machine does meets both, and the median of the turns counts.

    Args:
        images: (N, H, W, 3) uint8, at least one.
    """
    size = session.default_batch_size
    batch = np.resize(images[:size], (size, *images.shape[1:]))  # repeats them where there are fewer

    def seconds(each: ClassifierSession, num_batches: int) -> float:
        began = time.perf_counter()
        for _ in range(num_batches):
            each.run(batch)
        return time.perf_counter() - began

    seconds(reference, 1), seconds(session, 1)  # the first one of each makes its buffers
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

    Activations are unsigned, so that 0 is the lowest and a Relu costs nothing; weights are signed, with a scale for
    each filter, and of 7 bits: then no sum of two products passes 16 bits, and a CPU without VNNI instructions, where
    such sums would be cut off, gives the same result as one with them. The last layer stays float32, and so does one
    that whitens, see `cnnpipe.train.networks`: it makes much of small differences, which 8 bits round away.

    Args:
        model: as exported, in fp32.
        images: (N, H, W, 3) uint8 training images, from which the ranges of the activations are taken.
        folder: for temporary files.
    Raises:
        ModelError: the quantiser cannot do this model.
        StorageError: the temporary files cannot be written.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported, prepared, quantized = (folder / f"{name}.onnx" for name in ("exported", "prepared", "quantized"))
    with _model_errors("int8"), storage_errors(folder), _quiet():
        onnx.save(model, exported)
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared)
        feed_pixels(graph)
        fuse_dense_layers(graph)
        kept = _name_layers(graph.graph)
        onnx.save(graph, prepared)
        quantize_static(
            prepared,
            quantized,
            _calibration_reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            nodes_to_exclude=kept,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return _finish(onnx.load(quantized), model)


def _name_layers(graph: onnx.GraphProto) -> list[str]:
    """Give every layer a name of its own, and return the names of those that stay float32."""
    layers = [node for node in graph.node if node.op_type in _LAYERS]
    kept = [node for node in layers if WHITENING_NAME in node.name or node is layers[-1]]
    for index, node in enumerate(layers):
        node.name = f"layer_{index}"
    return [node.name for node in kept]


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
    """Return the model in 16-bit floats but for the softmax, which is as quick in float32 and exact.

    Raises:
        ModelError: the model cannot be converted.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the conversion changes what it is given
    with _model_errors("fp16"):
        converted = convert_float_to_float16(
            copy, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"]
        )
        end_in_float32(converted)
        return _finish(converted, model)


def _finish(made: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model the original's description, check it, and take out what it does not need."""
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
        raise ModelError(f"no {precision} model can be made of this one: {one_line(error)}; leave it out") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the quantiser says of its own steps from the log; what it fails with is raised."""
    logger = logging.getLogger("onnxruntime.quantization")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(3)
        logger.setLevel(level)
