"""The programs that classify the same folder: the command of each, and how to read what it prints."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cnnpipe.errors import CnnpipeError
from cnnpipe.manifest import MANIFEST_FILE, choose_model_file
from cnnpipe.registry import resolve_model

__all__ = ["CNNPIPE", "INT8", "KERAS", "LOOPS", "Contender", "Models", "find_models", "line_up", "read_labels"]

CNNPIPE: Final = "cnnpipe classify"
INT8: Final = "cnnpipe classify --precision int8"
KERAS: Final = "Keras image_dataset_from_directory + predict"
LOOPS: Final = ("batched loop, 32", "batched loop, 64")
"""Batched loops; the faster one is what everything else is compared with."""


@dataclass(frozen=True)
class Models:
    """The files of one trained model."""

    onnx: Path
    int8: Path | None
    keras: Path | None
    image_size: tuple[int, int]
    """(height, width) in pixels."""


@dataclass(frozen=True)
class Contender:
    """A program that classifies a folder into a CSV with the columns path and label, and prints a JSON object last."""

    name: str
    arguments: tuple[str, ...]
    """Arguments after `python -m`; `{folder}` and `{output}` are filled in."""
    exact: bool = True
    """Whether it has the precision and decoder of `CNNPIPE`, so the same labels where nothing is resized."""

    def command(self, folder: Path, output: Path) -> list[str]:
        """Return the command that classifies `folder` into `output`."""
        values = {"{folder}": str(folder), "{output}": str(output)}
        return [sys.executable, "-m", *(values.get(each, each) for each in self.arguments)]

    def work(self, report: dict[str, Any]) -> tuple[int, float]:
        """Return from its report the number of images, and the seconds since the model was loaded."""
        if self.arguments[0] == "benchmarks.peers":
            return report["images"], report["work_seconds"]
        return report["found"], report["seconds"]["total"] - report["seconds"]["start_up"]


def find_models(model: str | None, artifacts: Path) -> Models:
    """Find the .onnx file that a user means, and if it belongs to a complete run, the other files of that model.

    Raises:
        CnnpipeError: there is no such model.
    """
    from cnnpipe.session import open_session

    onnx = choose_model_file(resolve_model(model, artifacts, "fp32"), "cpu", "fp32").path.absolute()
    in_run = onnx.name == "model.onnx" and onnx.with_name(MANIFEST_FILE).is_file()
    int8, keras = (path if in_run and path.is_file() else None for path in _other_forms(onnx))
    return Models(onnx, int8, keras, open_session(onnx, "cpu", threads=1).info.image_size)


def line_up(models: Models, torch: Path | None = None) -> tuple[list[Contender], list[str]]:
    """Return the contenders that these models allow, and a line for each that is left out.

    Args:
        torch: a folder that holds PyTorch, where it is not installed.
    """
    contenders, missing = [_cnnpipe(CNNPIPE, models, "fp32")], []
    if models.int8 is not None:
        contenders.append(_cnnpipe(INT8, models, "int8"))
    else:
        missing.append(f"{INT8}: left out, {models.onnx.name} is not in a complete run with a model.int8.onnx")
    contenders.append(_peer("one by one", "one_by_one", models))
    contenders += [_peer(name, "batched", models, name.rpartition(" ")[2]) for name in LOOPS]
    if models.keras is not None:
        # TensorFlow decodes JPEG with a faster, less exact transform, so its pixels differ a little.
        contenders.append(_peer(KERAS, "keras", models, exact=False))
    else:
        missing.append(f"{KERAS}: left out, {models.onnx.name} is not in a complete run with a model.keras")
    contenders.append(_peer("PyTorch DataLoader, 64", "dataloader", models, str(torch or "")))
    return contenders, missing


def read_labels(table: Path) -> dict[str, str]:
    """Return the label of every path in a contender's CSV.

    Raises:
        CnnpipeError: a path has none.
    """
    with table.open(newline="", encoding="utf-8") as file:
        labels = {row["path"]: row["label"] for row in csv.DictReader(file)}
    without = [path for path, label in labels.items() if not label]
    if without:
        raise CnnpipeError(f"{without[0]} and {len(without) - 1} more have no label; use images that can be read")
    return labels


def _other_forms(onnx: Path) -> tuple[Path, Path]:
    return onnx.with_name("model.int8.onnx"), onnx.with_name("model.keras")


def _cnnpipe(name: str, models: Models, precision: str) -> Contender:
    chosen: Sequence[str] = ("--model", str(models.onnx))
    if models.int8 is not None:
        chosen = ("--model", str(models.onnx.parent), "--precision", precision)
    arguments = ("cnnpipe.cli", "classify", "{folder}", "--output", "{output}", "--device", "cpu", "--json", *chosen)
    return Contender(name, arguments, exact=precision == "fp32")


def _peer(name: str, peer: str, models: Models, option: str = "", *, exact: bool = True) -> Contender:
    return Contender(name, ("benchmarks.peers", peer, "{folder}", str(models.onnx), "{output}", option), exact)
