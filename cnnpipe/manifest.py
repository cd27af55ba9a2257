"""What a trained model says of itself: in the ONNX file's metadata, and in the manifest of its run folder.

The ONNX file stands alone: `ModelInfo` travels in its `metadata_props`, a key for each field; values that are not
plain text are JSON. A client in another language reads the same keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.storage import sha256_file, write_text

__all__ = [
    "INPUT_NAME",
    "MANIFEST_FILE",
    "OUTPUT_NAME",
    "FileDigest",
    "ModelInfo",
    "RunManifest",
    "TrainingStatistics",
    "digest_files",
    "read_manifest",
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
