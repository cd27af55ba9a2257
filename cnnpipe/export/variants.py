"""The quantised variants of an exported model: made, held against the trained one, kept only if they lose little."""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnx

from cnnpipe.errors import ModelError, ProviderError
from cnnpipe.evaluate.predict import Probabilities, predict_onnx
from cnnpipe.export.parity import Parity, compare_probabilities
from cnnpipe.export.quantization import Images, convert_fp16, quantize_int8, sample_calibration_images
from cnnpipe.machine import find_processor
from cnnpipe.manifest import ModelInfo
from cnnpipe.model_files import MODEL_FILES, Precision
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import ClassifierSession, device_report, open_session
from cnnpipe.settings import ExportSettings
from cnnpipe.storage import storage_errors, write_bytes

__all__ = ["Reference", "Variant", "export_variants", "measure_relative_speed"]

logger = logging.getLogger(__name__)

_NUM_TURNS: Final = 9
_TURN_SECONDS: Final = 0.04
_ROUNDING: Final = 1e-9


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
