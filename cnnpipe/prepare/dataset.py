"""Turn a source of images into arrays that training can map, once, with a report on what was found.

    data/prepared/<name>-<first 12 digits of the fingerprint>/
        {train,val,test}_images.npy   uint8 (N, H, W, 3) RGB
        {train,val,test}_labels.npy   int64 (N,)
        {train,val,test}_paths.json   name of each image in the source
        dataset.json                  written last: its presence means that the folder is complete

The fingerprint covers the content of the source and the settings that change an array. It is the same on every
machine, whatever the times of the files, the order of their listing and the number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from cnnpipe.errors import DatasetError
from cnnpipe.images.decode import resize_pixels
from cnnpipe.manifest import TrainingStatistics
from cnnpipe.paths import expand_path
from cnnpipe.prepare.cifar10 import CIFAR10_ARCHIVE, Archive
from cnnpipe.prepare.report import (
    DataReport,
    build_report,
    check_contrast,
    check_limits,
    compute_statistics,
)
from cnnpipe.prepare.sources import Source, SourceImages, open_source
from cnnpipe.prepare.splits import SPLITS, TEST, TRAIN, VAL, assign_splits
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import PrepareSettings
from cnnpipe.storage import make_folder, storage_errors, write_folder, write_json

__all__ = [
    "DATASET_FILE",
    "SPLITS",
    "PreparedDataset",
    "count_shared",
    "load_prepared",
    "prepare_dataset",
    "scratch_folder",
]

DATASET_FILE: Final = "dataset.json"

_FORMAT_VERSION: Final = 1
"""Part of every fingerprint; to be raised when the same source would give other arrays than before."""

_BLOCK_BYTES: Final = 2**25

_TEMPORARY_NAME: Final = re.compile(r"\.scratch\..{8}|\..+\.[0-9a-f]{16}")
"""Names that `scratch_folder` and `cnnpipe.storage.write_folder` give to folders that are being written."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset on the disk, ready to be mapped."""

    path: Path
    """Folder that holds `dataset.json`."""
    name: str
    source: str
    """Kind of source: `digits`, `cifar10` or `folder`."""
    fingerprint: str
    """SHA-256 of the source's content and the settings, 64 hexadecimal digits."""
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    """Size of the images, (height, width) in pixels."""
    num_images: dict[str, int]
    """Split -> number of images."""
    statistics: TrainingStatistics
    report: DataReport

    def images(self, split: str) -> np.memmap[Any, np.dtype[np.uint8]]:
        """Return the images of a split, (N, H, W, 3) uint8 RGB, mapped read-only."""
        return cast("np.memmap[Any, np.dtype[np.uint8]]", np.load(self._file(split, "images.npy"), mmap_mode="r"))

    def labels(self, split: str) -> npt.NDArray[np.int64]:
        """Return the labels of a split, (N,) int64, indices into `class_names`."""
        return cast("npt.NDArray[np.int64]", np.load(self._file(split, "labels.npy")))

    def paths(self, split: str) -> list[str]:
        """Return the name of each image of a split in the source."""
        return cast("list[str]", json.loads(self._file(split, "paths.json").read_bytes()))

    def _file(self, split: str, kind: str) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, received {split!r}")
        return self.path / f"{split}_{kind}"


def prepare_dataset(
    settings: PrepareSettings,
    data: Path,
    *,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    archive: Archive = CIFAR10_ARCHIVE,
    publish: Callable[[PreparedDataset], None] | None = None,
) -> PreparedDataset:
    """Prepare a dataset, or find it prepared already, and refuse it if it is too bad to learn from.

    The folder is complete even if a limit is exceeded: it holds the report with every offending path, and nothing is
    decoded again once the limit is raised. Every warning of the report is logged.

    Args:
        settings: the dataset, its splits, and the limits that it must keep.
        data: the folder with `raw/`, where downloads go, and `prepared/`.
        workers: decoding processes; default: one for each core.
        progress: called with (stage, done, total), from the calling thread.
        archive: the archive of `cifar10`.
        publish: called with the dataset before it may be refused, to show why.
    Raises:
        DatasetError: the source is missing or malformed, a limit in `settings` is exceeded, or the decoded pictures
            hardly differ; the message names the limit, what was received, and where the whole report is.
        StorageError: `data/prepared` cannot be written.
    """
    progress = progress or (lambda *_: None)
    source = open_source(settings, data / "raw", archive, workers, progress)
    prepared = data / "prepared"
    dataset = _find_prepared(source, settings, prepared) or _prepare(source, settings, prepared, progress)
    for warning in dataset.report.warnings:
        logger.warning("%s: %s", dataset.name, warning)
    if publish is not None:
        publish(dataset)
    details, train = str(dataset.path / DATASET_FILE), SPLITS[TRAIN]
    check_limits(dataset.report, settings, details)
    root = expand_path(settings.dataset)
    files = [root / path for path in dataset.paths(train)] if dataset.source == "folder" else []
    check_contrast(dataset.images(train), dataset.statistics, files, details)
    return dataset


def _find_prepared(source: Source, settings: PrepareSettings, prepared: Path) -> PreparedDataset | None:
    """Return the dataset if it is prepared already.

    The digest of a folder costs reading it all, so it is computed only if there is something to compare it with.
    """
    name = re.compile(re.escape(settings.resolved_name) + r"-[0-9a-f]{12}")
    if not prepared.is_dir() or not any(name.fullmatch(folder.name) for folder in prepared.iterdir()):
        return None
    fingerprint = _fingerprint(source.kind, source.content(), settings)
    path = _prepared_path(prepared, settings, fingerprint)
    if (dataset := _load_if_complete(path)) is not None:
        logger.info("%s is prepared already: %s", dataset.name, path)
    return dataset


def _load_if_complete(path: Path) -> PreparedDataset | None:
    if not path.is_dir():
        return None
    try:
        return load_prepared(path)
    except DatasetError as error:
        logger.warning("%s", error)
        return None


def _fingerprint(source: str, content: str, settings: PrepareSettings) -> str:
    """Return 64 hexadecimal digits; the name and the limits change no array and are not part of it."""
    parts = {
        "format": _FORMAT_VERSION,
        "source": source,
        "content": content,
        "image_size": list(settings.image_size),
        "val_fraction": settings.val_fraction,
        "test_fraction": settings.test_fraction,
        "seed": settings.seed,
    }
    if settings.include or settings.exclude:  # else as before these settings existed
        parts |= {"include": list(settings.include), "exclude": list(settings.exclude)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _prepared_path(prepared: Path, settings: PrepareSettings, fingerprint: str) -> Path:
    return prepared / f"{settings.resolved_name}-{fingerprint[:12]}"


def _prepare(source: Source, settings: PrepareSettings, prepared: Path, progress: ProgressCallback) -> PreparedDataset:
    """Read the source, split it, and write the folder."""
    with scratch_folder(prepared) as folder:
        images = source.read(settings.image_size, folder / "pixels")
        splits = assign_splits(
            images.labels,
            images.digests,
            images.given_split,
            val_fraction=None if VAL in images.given_splits else settings.val_fraction,
            test_fraction=None if TEST in images.given_splits else settings.test_fraction,
            seed=settings.seed,
        )
        for split, name in enumerate(SPLITS):
            if not (splits == split).any():
                raise DatasetError(_nothing_left_for(name, settings.dataset, images))
        fingerprint = _fingerprint(source.kind, images.content, settings)
        path = _prepared_path(prepared, settings, fingerprint)
        with storage_errors(path):
            if path.is_dir() and _load_if_complete(path) is None:
                shutil.rmtree(path)
        with write_folder(path) as temporary:
            _write_dataset(temporary, images, splits, source.kind, fingerprint, settings, progress)
    return load_prepared(path)


@contextmanager
def scratch_folder(prepared: Path) -> Iterator[Path]:
    """Give a hidden folder in `data/prepared` for decoded images, and remove it at the end.

    Every process that writes there holds a shared lock on `data/prepared`. One that gets an exclusive lock first is the
    only one, and removes what killed processes have left.

    Raises:
        StorageError: it cannot be made.
    """
    make_folder(prepared)
    with storage_errors(prepared):
        lock = os.open(prepared, os.O_RDONLY)
    try:
        with suppress(OSError):  # others are at work, or the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in prepared.iterdir():
                if _TEMPORARY_NAME.fullmatch(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        with storage_errors(prepared):
            scratch = tempfile.TemporaryDirectory(prefix=".scratch.", dir=prepared, ignore_cleanup_errors=True)
        with scratch as path:
            yield Path(path)
    finally:
        os.close(lock)


def _nothing_left_for(split: str, dataset: str, images: SourceImages) -> str:
    num_different = len(set(images.digests))
    text = f"{dataset} leaves no readable image for {split}"
    if num_different < len(images.digests):
        text += (
            f": its {len(images.digests):,} images are copies of {num_different:,}, and copies stay in one split; "
            "a class needs three different images"
        )
    return f"{text}; add images to its classes"


def _write_dataset(
    folder: Path,
    images: SourceImages,
    splits: npt.NDArray[np.int8],
    source: str,
    fingerprint: str,
    settings: PrepareSettings,
    progress: ProgressCallback,
) -> None:
    """Write the arrays of every split, then `dataset.json`."""
    done = 0
    for split, name in enumerate(SPLITS):
        rows = np.flatnonzero(splits == split)
        _write_images(folder / f"{name}_images.npy", images.pixels, rows, settings.image_size)
        with storage_errors(folder):
            np.save(folder / f"{name}_labels.npy", images.labels[rows])
        write_json(folder / f"{name}_paths.json", [images.paths[row] for row in rows.tolist()])
        done += len(rows)
        progress("write", done, len(splits))
    train = np.load(folder / f"{SPLITS[TRAIN]}_images.npy", mmap_mode="r")
    dataset = PreparedDataset(
        path=folder,
        name=settings.resolved_name,
        source=source,
        fingerprint=fingerprint,
        class_names=images.class_names,
        image_size=settings.image_size,
        num_images={name: int((splits == split).sum()) for split, name in enumerate(SPLITS)},
        statistics=compute_statistics(train, images.labels[splits == TRAIN], len(images.class_names)),
        report=build_report(images, splits),
    )
    write_json(folder / DATASET_FILE, _adapter().dump_python(dataset, mode="json", exclude={"path"}))


def _write_images(
    path: Path, pixels: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp], image_size: tuple[int, int]
) -> None:
    """Write some rows of `pixels` as an .npy file, resized to `image_size`, a block at a time."""
    shape = (*image_size, 3)
    step = max(1, _BLOCK_BYTES // (image_size[0] * image_size[1] * 3))
    with storage_errors(path), path.open("wb") as file:
        # Plain writes report a full disk; writes into a mapped file would end the process with SIGBUS.
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), step):
            block = pixels[rows[start : start + step]]
            if block.shape[1:] != shape:
                block = np.stack([resize_pixels(image, image_size) for image in block])
            file.write(block.data)


def load_prepared(path: Path) -> PreparedDataset:
    """Open a prepared dataset.

    Args:
        path: the folder that holds `dataset.json`.
    Raises:
        DatasetError: it is not complete, or its arrays are not what `dataset.json` says.
    """
    try:
        fields = json.loads((path / DATASET_FILE).read_bytes())
        dataset = _adapter().validate_python({**fields, "path": path})
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} is not a complete prepared dataset: it has no {DATASET_FILE}; prepare it again"
        ) from error
    except (OSError, ValueError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{path / DATASET_FILE} cannot be read: {reason}; prepare it again") from error
    for split in SPLITS:
        _check_arrays(dataset, split)
    return dataset


def count_shared(images: npt.NDArray[np.uint8], dataset: PreparedDataset, splits: Sequence[str]) -> int:
    """Return how many of some images, (N, H, W, 3), are also in these splits of a dataset, pixel by pixel."""
    digests = {hashlib.sha256(image).digest() for split in splits for image in dataset.images(split)}
    return sum(hashlib.sha256(image).digest() in digests for image in images)


def _check_arrays(dataset: PreparedDataset, split: str) -> None:
    """Check that the arrays of a split have the sizes that `dataset.json` says; only their headers are read."""
    count = dataset.num_images.get(split, 0)
    try:
        images, labels = dataset.images(split), dataset.labels(split)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{dataset.path} is damaged: {split} cannot be mapped: {error}; prepare it again") from error
    expected = (count, *dataset.image_size, 3)
    if images.dtype != np.uint8 or images.shape != expected or labels.dtype != np.int64 or labels.shape != (count,):
        raise DatasetError(
            f"{dataset.path} is damaged: {split} must be uint8 {expected}, received {images.dtype} {images.shape}; "
            "prepare it again"
        )


def _adapter() -> TypeAdapter[PreparedDataset]:
    return TypeAdapter(PreparedDataset)
