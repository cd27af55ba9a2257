"""The files that hold one model: as it was trained, and the smaller numbers that make it faster on one kind of device.

    model.onnx         fp32: the reference, always there
    model.int8.onnx    for CPUs, if it was accurate enough
    model.fp16.onnx    for CUDA, if it was accurate enough
    parity.json        how each of them compares with the trained model, and how fast it is

Whoever opens a run folder gets the file that is fastest on the device, unless he asks for a precision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from cnnpipe.errors import ModelError
from cnnpipe.manifest import MANIFEST_FILE

__all__ = ["MODEL_FILES", "PARITY_FILE", "PRECISIONS", "ChosenFile", "Precision", "choose_model_file", "read_parity"]

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
