"""Common scripts that classify a folder without cnnpipe, each run in its own process.

`python -m benchmarks.peers NAME FOLDER MODEL OUTPUT [OPTION]` writes a CSV of path and label and prints one JSON
object on the last line. It uses nothing of cnnpipe and imports no more than such a script would.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["PEERS", "Labels"]


@dataclass(frozen=True)
class Labels:
    """The labels that a peer gives to the files."""

    paths: list[Path]
    labels: list[str]
    ready: float
    """Time at which the model was loaded, by `time.perf_counter`."""


def one_by_one(folder: Path, model: Path, _: str) -> Labels:
    """Open, resize and run each image by itself."""
    session, names, size = _open_model(model)
    ready = time.perf_counter()
    paths = _list_files(folder)
    labels = []
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB").resize(size))
        probabilities = session.run(None, {"images": image[None]})[0]
        labels.append(names[probabilities[0].argmax()])
    return Labels(paths, labels, ready)


def batched(folder: Path, model: Path, option: str) -> Labels:
    """Open, resize and run the images in batches; `option` is the batch size."""
    session, names, size = _open_model(model)
    ready = time.perf_counter()
    paths, batch_size = _list_files(folder), int(option)
    labels: list[str] = []
    for first in range(0, len(paths), batch_size):
        batch = [np.asarray(Image.open(path).convert("RGB").resize(size)) for path in paths[first : first + batch_size]]
        probabilities = session.run(None, {"images": np.stack(batch)})[0]
        labels.extend(names[index] for index in probabilities.argmax(axis=1))
    return Labels(paths, labels, ready)


def keras(folder: Path, model: Path, _: str) -> Labels:
    """Use `image_dataset_from_directory` and `predict` on the Keras model that the ONNX file was exported from."""
    library = importlib.import_module("keras")
    network = library.models.load_model(model.with_name("model.keras"))
    names = json.loads(model.with_name("manifest.json").read_text(encoding="utf-8"))["model"]["class_names"]
    ready = time.perf_counter()
    dataset = library.utils.image_dataset_from_directory(
        folder, labels=None, shuffle=False, batch_size=32, image_size=network.input_shape[1:3]
    )
    labels = [names[index] for index in network.predict(dataset, verbose=0).argmax(axis=1)]
    return Labels([Path(path) for path in dataset.file_paths], labels, ready)


class _Images:
    """A map-style dataset, as in PyTorch's documentation."""

    def __init__(self, paths: list[Path], size: tuple[int, int]) -> None:
        self._paths, self._size = paths, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        # A copy, because PyTorch warns of arrays that cannot be written to.
        return np.array(Image.open(self._paths[index]).convert("RGB").resize(self._size))


def dataloader(folder: Path, model: Path, option: str) -> Labels:
    """Feed onnxruntime from PyTorch's `DataLoader`, a worker per core; `option` is the folder that holds torch.

    Raises:
        ImportError: torch is not installed.
    """
    if option:
        sys.path.append(option)  # last, so that all other packages stay the same for every contender
    data = importlib.import_module("torch.utils.data")
    session, names, size = _open_model(model)
    ready = time.perf_counter()
    paths = _list_files(folder)
    labels: list[str] = []
    loader = data.DataLoader(_Images(paths, size), batch_size=64, num_workers=len(os.sched_getaffinity(0)))
    for images in loader:
        probabilities = session.run(None, {"images": images.numpy()})[0]
        labels.extend(names[index] for index in probabilities.argmax(axis=1))
    return Labels(paths, labels, ready)


PEERS: dict[str, Callable[[Path, Path, str], Labels]] = {
    "one_by_one": one_by_one,
    "batched": batched,
    "keras": keras,
    "dataloader": dataloader,
}
"""Name -> function of a folder, an ONNX model and an option of the peer."""


def main(name: str, folder: Path, model: Path, output: Path, option: str = "") -> None:
    """Classify a folder as that peer does; a package that cannot be imported is reported and is not a failure."""
    try:
        found = PEERS[name](folder, model, option)
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}))
        return
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for path, label in zip(found.paths, found.labels, strict=True):
            writer.writerow([path.relative_to(folder).as_posix(), label])
    print(json.dumps({"images": len(found.paths), "work_seconds": time.perf_counter() - found.ready}))


def _open_model(model: Path) -> tuple[Any, list[str], tuple[int, int]]:
    """Return session, class names and (width, height), with onnxruntime's defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    _, height, width, _ = session.get_inputs()[0].shape
    return session, names, (width, height)


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
