"""A run folder: its files, what a model says about itself, and which model file fits a device.

    config.toml  environment.json  digests.npz                     written by train, before it begins
    history.csv  model.keras  training.json                        train
    metrics.json  predictions_test.csv  and more                   evaluate
    accuracy.png  and more                                         plot
    model.onnx                                                     export: fp32, the reference, always present
    model.int8.onnx                                                for CPUs, if it is accurate enough
    model.fp16.onnx                                                for CUDA, if it is accurate enough
    parity.json                                                    how each of them compares with model.keras
    promotion.json  manifest.json                                  promote; the manifest is last and completes the run

An ONNX file needs nothing beside it: `ModelInfo` travels in its `metadata_props`, one key for each field; values that
are not plain text are JSON. A client in another language reads the same keys.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cnnpipe.errors import ModelError, RegistryError, one_line
from cnnpipe.paths import expand_path
from cnnpipe.settings import RetrainSettings, dataset_location, load_toml
from cnnpipe.storage import sha256_file, write_text

INPUT_NAME = "images"  # ONNX input: uint8, (batch, height, width, 3), RGB
OUTPUT_NAME = "probabilities"  # ONNX output: float32, (batch, classes), each row sums to 1

MANIFEST_FILE: Final = "manifest.json"
HISTORY_FILE: Final = "history.csv"
PARITY_FILE: Final = "parity.json"
PROMOTION_FILE: Final = "promotion.json"
TRAINING_FILE: Final = "training.json"

Precision = Literal["fp32", "int8", "fp16"]  # numbers that a model file computes with
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
MODEL_FILES: Final[dict[Precision, str]] = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}

RunState = Literal["Promoted", "NotPromoted", "Unchanged", "AwaitingApproval"]
"""How a run ended: `Unchanged` is as good as the champion, which stays; `AwaitingApproval` waits for a person's yes."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingStatistics(_Record):
    """Summary of the training images, to compare later inputs with."""

    num_images: int = Field(ge=0)
    channel_mean: tuple[float, float, float]  # mean of red, green, blue over all training pixels, 0-255
    channel_std: tuple[float, float, float]  # standard deviation of red, green, blue, 0-255
    brightness_deciles: tuple[float, ...]  # the 0th, 10th, … 100th percentile of the images' mean brightness, 0-255
    class_shares: tuple[float, ...]  # fraction of the images in each class, in the order of `class_names`; sums to 1


class ModelInfo(_Record):
    """Everything a program needs to know to apply the model."""

    cnnpipe_version: str
    name: str
    run_id: str
    preset: str
    class_names: tuple[str, ...] = Field(min_length=2)
    image_size: tuple[int, int]  # (height, width) in pixels
    dataset_fingerprint: str
    test_accuracy: float = Field(ge=0.0, le=1.0)
    training_statistics: TrainingStatistics

    def to_metadata(self) -> dict[str, str]:
        """Return the ONNX `metadata_props`: text as it is, everything else as JSON."""
        fields = self.model_dump(mode="json").items()
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in fields
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> Self:
        """Read `metadata_props` of the file `path` back; raises ModelError if a key is missing or malformed."""
        fields = cls.model_fields.items()
        try:
            return cls.model_validate(
                {key: metadata[key] if field.annotation is str else json.loads(metadata[key]) for key, field in fields}
            )
        except (KeyError, ValidationError, json.JSONDecodeError) as error:
            problem = "carries no cnnpipe metadata that can be read; use one exported by `cnnpipe export`"
            raise ModelError(f"{path} is an ONNX file, but {problem}") from error


class FileDigest(_Record):
    """Size and content of one file of a run."""

    bytes: int
    sha256: str


class RunManifest(_Record):
    """Content of `manifest.json`."""

    model: ModelInfo
    created: str  # UTC, ISO 8601
    dataset: dict[str, Any]
    """Name, source, location (absolute path or built-in name; not in older runs), fingerprint, images of each split."""
    metrics: dict[str, Any]  # figures of `metrics.json` without those of single classes
    parity: dict[str, Any]
    promoted: bool
    promotion_reason: str
    state: RunState | None = None  # None in runs of version 0.1, where `promoted` says all
    files: dict[str, FileDigest]


def digest_file(file: Path) -> FileDigest:
    """Return size and SHA-256 of a file."""
    return FileDigest(bytes=file.stat().st_size, sha256=sha256_file(file))


def digest_files(folder: Path) -> dict[str, FileDigest]:
    """Return size and SHA-256 of every file of a run folder except the manifest, by its name."""
    return {
        file.name: digest_file(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST_FILE and not file.name.startswith(".")
    }


def write_manifest(run: Path, manifest: RunManifest) -> None:
    """Write the manifest, which completes the run."""
    write_text(run / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(run: Path) -> RunManifest:
    """Read a run's manifest; raises RegistryError if it is missing (the run is not complete) or damaged."""
    path = run / MANIFEST_FILE
    try:
        return RunManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RegistryError(f"{run} is not a complete run: it has no {MANIFEST_FILE}; train again") from error
    except (OSError, ValidationError) as error:
        raise RegistryError(f"{path} cannot be read: {str(error).splitlines()[0]}; train again") from error


def require_unfinished(run: Path) -> None:
    """Raise RegistryError if a run is complete: its manifest holds the digests of its files."""
    if (run / MANIFEST_FILE).is_file():
        raise RegistryError(f"{run} is complete, and its files never change; train again for another run")


@dataclass(frozen=True)
class Origin:
    """Dataset that a run was trained on."""

    location: str  # source of the images: the absolute path of a folder, or the name of a built-in dataset
    prepared: Path | None  # folder of the prepared dataset; None if the run does not record it


def read_origin(run: Path) -> Origin:
    """Read from `environment.json` what a run was trained on; if it is damaged or too old, from its settings."""
    location = prepared = None
    with suppress(OSError, ValueError, AttributeError):
        environment = json.loads((run / "environment.json").read_bytes())
        location, prepared = environment.get("source"), environment.get("dataset")
    if location is None:
        location = dataset_location(load_toml(RetrainSettings, run / "config.toml").prepare.dataset)
    return Origin(location, expand_path(prepared) if prepared else None)


def read_history(run: Path) -> dict[str, list[float]]:
    """Read `history.csv`: each column's values, one for each epoch; raises RegistryError if it is not whole."""
    path = run / HISTORY_FILE
    columns = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "seconds")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        history = {column: [float(row[column]) for row in rows] for column in columns}
    except FileNotFoundError as error:
        raise RegistryError(f"{run} has no {path.name}; train again") from error
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise RegistryError(f"{path} is damaged: {one_line(repr(error))}; train again") from error
    if not rows:
        raise RegistryError(f"{path} has no epochs; train again")
    return history


def best_epoch(val_accuracy: Sequence[float], val_loss: Sequence[float]) -> int:
    """Return the index of the epoch whose weights are saved, 0 for the first.

    It has the highest validation accuracy; of equal ones the lowest loss decides, then the first epoch.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in val_loss]
    return max(range(len(losses)), key=lambda epoch: (val_accuracy[epoch], -losses[epoch]))


@dataclass(frozen=True)
class ChosenFile:
    """Model file to open."""

    path: Path
    reason: str  # why its precision, in a few words


def choose_model_file(
    model: Path, device: Literal["cpu", "cuda"], precision: Precision | Literal["auto"]
) -> ChosenFile:
    """Return the model file to open.

    Args:
        model: a run folder, or an .onnx file, which is taken as it is.
        precision: `auto` is int8 on the CPU and fp16 on CUDA if the run has it and it was measured to be faster on such
            a device, otherwise fp32.
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
    remedy = "train it again" if (model / MANIFEST_FILE).is_file() else f"make it with `cnnpipe export {model}`"
    raise ModelError(f"the run {model} has no {chosen} model ({reason}), only {there}; use one of these, or {remedy}")


def _fastest(run: Path, device: Literal["cpu", "cuda"]) -> tuple[Precision, str]:
    """Return the precision that was measured to be the fastest on such a device, and the reason."""
    precision: Precision = "fp16" if device == "cuda" else "int8"
    record = read_parity(run).get(precision, {}) if (run / MODEL_FILES[precision]).is_file() else {}
    if not record.get("kept"):
        return "fp32", f"there is no {precision} model"
    speed = record.get("relative_speed")
    if speed is None:
        return "fp32", f"the gain of {precision} was not measured on a {'GPU' if device == 'cuda' else 'CPU'}"
    processor = f" on {record['measured_on']}" if record.get("measured_on") else ""
    reason = f"{precision} was {speed:.2f} times as fast as fp32{processor} at export"
    return precision if speed > 1.0 else "fp32", reason


def read_parity(run: Path) -> dict[Precision, dict[str, Any]]:
    """Return the record of each precision in a run's `parity.json`, none without it; ModelError if it is damaged."""
    path = run / PARITY_FILE
    try:
        parity = json.loads(path.read_bytes()) if path.is_file() else {}
        return {each: dict(parity[each]) for each in PRECISIONS if parity.get(each) is not None}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = f"{path} must hold an object for each precision, received {one_line(repr(error))}"
        raise ModelError(f"{problem}; name a model file of the run instead") from error
