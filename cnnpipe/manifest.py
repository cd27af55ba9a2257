"""What a trained model says of itself: in the ONNX file's metadata, and in the manifest of its run folder.

The ONNX file stands alone: `ModelInfo` travels in its `metadata_props`, a key for each field; values that are not
plain text are JSON. A client in another language reads the same keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.storage import sha256_file, write_text

__all__ = [
    "INPUT_NAME",
    "MANIFEST_FILE",
    "MODEL_FILES",
    "OUTPUT_NAME",
    "PARITY_FILE",
    "PRECISIONS",
    "ChosenFile",
    "FileDigest",
    "ModelInfo",
    "Precision",
    "RunManifest",
    "TrainingStatistics",
    "choose_model_file",
    "digest_files",
    "read_manifest",
    "read_parity",
    "write_manifest",
]

INPUT_NAME = "images"
"""ONNX input: uint8, (batch, height, width, 3), RGB."""

OUTPUT_NAME = "probabilities"
"""ONNX output: float32, (batch, classes), each row sums to 1."""

MANIFEST_FILE = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingStatistics(_Record):
    """What the training images looked like, to compare later inputs with."""

    num_images: int = Field(ge=0)
    channel_mean: tuple[float, float, float]
    """Mean of red, green, blue over all training pixels, 0-255."""
    channel_std: tuple[float, float, float]
    brightness_deciles: tuple[float, ...]
    """The 0th, 10th, … 100th percentile of the images' mean brightness, 0-255."""
    class_shares: tuple[float, ...]
    """Share of each class, in the order of `class_names`; sums to 1."""


class ModelInfo(_Record):
    """What anyone who applies the model must know."""

    cnnpipe_version: str
    name: str
    run_id: str
    preset: str
    class_names: tuple[str, ...] = Field(min_length=2)
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    dataset_fingerprint: str
    test_accuracy: float = Field(ge=0.0, le=1.0)
    training_statistics: TrainingStatistics

    def to_metadata(self) -> dict[str, str]:
        """Return the ONNX `metadata_props`: text as it is, everything else as JSON."""
        fields = self.model_dump(mode="json")
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in fields.items()
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> Self:
        """Read `metadata_props` back.

        Args:
            path: the model's file, for the message.
        Raises:
            ModelError: the metadata are missing or not ours.
        """
        try:
            return cls.model_validate(
                {
                    name: metadata[name] if field.annotation is str else json.loads(metadata[name])
                    for name, field in cls.model_fields.items()
                    if name in metadata
                }
            )
        except (ValidationError, json.JSONDecodeError) as error:
            raise ModelError(
                f"{path} is an ONNX file, but carries no cnnpipe metadata that can be read; "
                "use one exported by `cnnpipe export`"
            ) from error


class FileDigest(_Record):
    """Size and content of one file of a run."""

    bytes: int
    sha256: str


class RunManifest(_Record):
    """The last file written to a run folder: its presence means that the run is complete."""

    model: ModelInfo
    created: str
    """UTC, ISO 8601."""
    dataset: dict[str, Any]
    """Name, source, location (absolute path or built-in name; not in older runs), fingerprint, images of each split."""
    metrics: dict[str, Any]
    """The content of `metrics.json` without the per-class figures."""
    parity: dict[str, Any]
    promoted: bool
    promotion_reason: str
    files: dict[str, FileDigest]


def digest_files(folder: Path) -> dict[str, FileDigest]:
    """Return size and SHA-256 of every file of a run folder but the manifest, by its name."""
    return {
        file.name: FileDigest(bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST_FILE and not file.name.startswith(".")
    }


def write_manifest(run: Path, manifest: RunManifest) -> None:
    """Write the manifest, which completes the run."""
    write_text(run / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(run: Path) -> RunManifest:
    """Read a run's manifest.

    Raises:
        RegistryError: there is none (the run is not complete), or it is damaged.
    """
    path = run / MANIFEST_FILE
    try:
        return RunManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RegistryError(f"{run} is not a complete run: it has no {MANIFEST_FILE}; train again") from error
    except (OSError, ValidationError) as error:
        raise RegistryError(f"{path} cannot be read: {str(error).splitlines()[0]}; train again") from error


Precision = Literal["fp32", "int8", "fp16"]
"""The numbers that a model file computes with."""

PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)

MODEL_FILES: Final[dict[Precision, str]] = {
    "fp32": "model.onnx",
    "int8": "model.int8.onnx",
    "fp16": "model.fp16.onnx",
}
"""The file of each precision in a run folder."""

PARITY_FILE: Final = "parity.json"


@dataclass(frozen=True)
class ChosenFile:
    """Which file to open."""

    path: Path
    reason: str
    """Why its precision, in a few words."""


def choose_model_file(
    model: Path, device: Literal["cpu", "cuda"], precision: Precision | Literal["auto"]
) -> ChosenFile:
    """Return the file to open.

    Args:
        model: a run folder, or an .onnx file, which is taken as it is.
        device: where it will run; only `auto` minds it.
        precision: `auto` is int8 on the CPU and fp16 on CUDA, if it was kept and measured faster on such a device, and
            else fp32.
    Raises:
        ModelError: the run has no such file, or its `parity.json` is damaged.
    """
    if not model.is_dir():
        return ChosenFile(model, "that of the file given" if precision == "auto" else "asked for")
    chosen, reason = _fastest(model, device) if precision == "auto" else (precision, "asked for")
    file = model / MODEL_FILES[chosen]
    if file.is_file():
        return ChosenFile(file, reason)
    if chosen == "fp32":
        raise ModelError(f"the run {model} has no {file.name}; finish it with `cnnpipe export {model}`")
    there = ", ".join(each for each, name in MODEL_FILES.items() if (model / name).is_file()) or "none"
    record = read_parity(model).get(chosen, {})
    reason = f"not kept, {record['reason']}" if record.get("reason") else "it was not exported"
    # The files of a complete run stay as they are.
    remedy = "train it again" if (model / MANIFEST_FILE).is_file() else f"make it with `cnnpipe export {model}`"
    raise ModelError(f"the run {model} has no {chosen} model ({reason}), only {there}; use one of these, or {remedy}")


def _fastest(run: Path, device: Literal["cpu", "cuda"]) -> tuple[Precision, str]:
    """Return the precision that was seen to be the fastest on such a device, and how it was seen."""
    precision: Precision = "fp16" if device == "cuda" else "int8"
    record = read_parity(run).get(precision, {}) if (run / MODEL_FILES[precision]).is_file() else {}
    if not record.get("kept"):
        return "fp32", f"there is no {precision} model"
    speed = record.get("relative_speed")
    if speed is None:
        return "fp32", f"the gain of {precision} was not measured on a {'GPU' if device == 'cuda' else 'CPU'}"
    place = f" on {record['measured_on']}" if record.get("measured_on") else ""
    seen = f"{precision} was {speed:.2f} times as fast as fp32{place} at export"
    return precision if speed > 1.0 else "fp32", seen


def read_parity(run: Path) -> dict[Precision, dict[str, Any]]:
    """Return what a run's `parity.json` says of each precision that was tried; nothing without the file.

    Raises:
        ModelError: it is damaged.
    """
    path = run / PARITY_FILE
    try:
        parity = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; give a model file of the run in its place") from error
    if not isinstance(parity, dict) or not all(isinstance(parity.get(each, {}), dict) for each in PRECISIONS):
        raise ModelError(f"{path} must hold an object for each precision; give a model file of the run in its place")
    return {each: parity[each] for each in PRECISIONS if each in parity}
