"""Turn a source of images into arrays that training can map, once, with a report on what was found.

    data/prepared/<name>-<first 12 digits of the fingerprint>/
        {train,val,test}_images.npy   uint8 (N, H, W, 3) RGB
        {train,val,test}_labels.npy   int64 (N,)
        {train,val,test}_paths.json   name of each image in the source
        {train,val,test}_digests.npy  uint8 (N, 16), first bytes of the SHA-256 of each image's pixels
        dataset.json                  written last: its presence means that the folder is complete

The fingerprint covers the content of the source and the settings that change an array. It is the same on every
machine, whatever the times of the files, the order of their listing and the number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from cnnpipe.errors import DatasetError, one_line
from cnnpipe.images.decode import resize_pixels
from cnnpipe.images.find import FileFilter
from cnnpipe.machine import usable_cores
from cnnpipe.manifest import TrainingStatistics, read_manifest, read_origin
from cnnpipe.paths import expand_path
from cnnpipe.prepare.cifar10 import CIFAR10_ARCHIVE, Archive, Cifar10Source
from cnnpipe.prepare.report import (
    DataReport,
    build_report,
    check_contrast,
    check_limits,
    compute_statistics,
    measure_shift,
)
from cnnpipe.prepare.sources import (
    LEFT_OUT,
    SPLITS,
    TEST,
    TRAIN,
    VAL,
    DigitsSource,
    FolderSource,
    SourceImages,
    first_few,
    hash_pixels,
    list_image_folder,
    pack_digests,
)
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import BUILT_IN_DATASETS, PrepareSettings
from cnnpipe.storage import TEMPORARY_NAME, make_folder, storage_errors, write_folder, write_json

DATASET_FILE: Final = "dataset.json"

DIGESTS_FILE: Final = "digests.npz"
"""File in a run folder with the digests of the images of each split, so that they outlive the prepared dataset."""

_FORMAT_VERSION: Final = 2
"""Part of every fingerprint; to be raised when the same source would give other arrays than before."""

_SCRATCH: Final = ".scratch."

logger = logging.getLogger(__name__)

Source = DigitsSource | Cifar10Source | FolderSource


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
        return cast("np.memmap[Any, np.dtype[np.uint8]]", np.load(self.path / f"{split}_images.npy", mmap_mode="r"))

    def labels(self, split: str) -> npt.NDArray[np.int64]:
        """Return the labels of a split, (N,) int64, indices into `class_names`."""
        return cast("npt.NDArray[np.int64]", np.load(self.path / f"{split}_labels.npy"))

    def paths(self, split: str) -> list[str]:
        """Return the name of each image of a split in the source."""
        return cast("list[str]", json.loads((self.path / f"{split}_paths.json").read_bytes()))

    def digests(self, split: str) -> npt.NDArray[np.uint8]:
        """Return the first 16 bytes of the SHA-256 of each image of a split, (N, 16); older datasets have none."""
        path = self.path / f"{split}_digests.npy"
        return np.load(path) if path.is_file() else pack_digests(hash_pixels(self.images(split)))


def prepare_dataset(
    settings: PrepareSettings,
    data: Path,
    *,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    archive: Archive = CIFAR10_ARCHIVE,
    publish: Callable[[PreparedDataset], None] | None = None,
    champion: Path | None = None,
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
        champion: run folder of the champion of that name, whose dataset this one must resemble; None compares nothing.
    Raises:
        DatasetError: the source is missing or malformed, a limit in `settings` is exceeded, or the decoded pictures
            hardly differ; the message names the limit, what was received, and where the whole report is.
        RegistryError: the champion is damaged.
        StorageError: `data/prepared` cannot be written.
    """
    progress = progress or (lambda *_: None)
    source, prepared = open_source(settings, data / "raw", archive, workers, progress), data / "prepared"
    dataset = _find_prepared(source, settings, prepared) or _prepare(source, settings, prepared, progress)
    for warning in dataset.report.warnings:
        logger.warning("%s: %s", dataset.name, warning)
    changes = [] if champion is None else _list_changes(dataset, champion, settings)
    if publish is not None:
        publish(replace(dataset, report=replace(dataset.report, warnings=(*dataset.report.warnings, *changes))))
    details, train = str(dataset.path / DATASET_FILE), SPLITS[TRAIN]
    check_limits(dataset.report, settings, details)
    files = _files(dataset.source, settings, dataset.paths(train))
    check_contrast(dataset.images(train), dataset.statistics, files, details)
    if changes:
        raise DatasetError(f"{changes[0]}; see {details}")
    return dataset


def _list_changes(dataset: PreparedDataset, champion: Path, settings: PrepareSettings) -> list[str]:
    """Return how a dataset differs from the champion's by more than the limits allow, one line for each limit."""
    model, train, changes = read_manifest(champion).model, SPLITS[TRAIN], []
    other_model = "or train another model with --name"
    new = [name for name in dataset.class_names if name not in model.class_names]
    gone = [name for name in model.class_names if name not in dataset.class_names]
    if settings.same_classes and (new or gone):
        parts = "; ".join(f"{what}: {first_few(names)}" for what, names in (("new", new), ("gone", gone)) if names)
        text = f"the classes are not those of the champion {model.run_id}, {parts} (same_classes)"
        changes.append(f"{text}; restore the folder, allow it with --no-same-classes, {other_model}")
    statistics = (dataset.statistics, model.training_statistics)
    if (shift := measure_shift(*statistics)) > settings.max_pixel_shift:
        means = [" ".join(f"{value:.0f}" for value in each.channel_mean) for each in statistics]
        text = f"the train images differ by {shift:.2f} from those of the champion {model.run_id}, more than"
        text += f" {settings.max_pixel_shift:.4g} (max_pixel_shift): mean RGB {means[0]}, was {means[1]}"
        with suppress(DatasetError):  # an older version trained the champion, and its dataset is gone
            known = find_shared(dataset.digests(train), *read_digests(champion).values())
            paths = [path for path, is_known in zip(dataset.paths(train), known, strict=True) if not is_known]
            text += f"; {len(paths):,} images are new: {first_few(paths)}" if paths else ""
        changes.append(f"{text}; check the images, raise the limit, {other_model}")
    return changes


def open_source(
    settings: PrepareSettings, raw: Path, archive: Archive, workers: int | None, progress: ProgressCallback
) -> Source:
    """Return the source that `settings.dataset` names.

    Raises:
        DatasetError: it is a folder that cannot be a dataset.
    """
    name = settings.dataset
    if name in BUILT_IN_DATASETS and Path(name).is_dir():
        logger.warning(
            "%s is the built-in dataset here, not the folder of that name; for the folder give ./%s", name, name
        )
    if name == "digits":
        return DigitsSource()
    if name == "cifar10":
        return Cifar10Source(archive, raw, progress)
    folder = list_image_folder(expand_path(name), FileFilter(settings.include, settings.exclude))
    return FolderSource(folder, workers or usable_cores(), progress)


def _find_prepared(source: Source, settings: PrepareSettings, prepared: Path) -> PreparedDataset | None:
    """Return the dataset if it is prepared already.

    The digest of a folder costs reading it all, so it is computed only if there is something to compare it with.
    """
    name = re.compile(re.escape(settings.resolved_name) + r"-[0-9a-f]{12}")
    if not prepared.is_dir() or not any(name.fullmatch(entry) for entry in os.listdir(prepared)):
        return None
    path = _prepared_path(prepared, settings, _fingerprint(source.kind, source.content(), settings))
    if (dataset := _load_if_complete(path)) is not None:
        logger.info("%s is prepared already: %s", dataset.name, path)
    return dataset


def _load_if_complete(path: Path) -> PreparedDataset | None:
    try:
        return load_prepared(path) if path.is_dir() else None
    except DatasetError as error:
        logger.warning("%s", error)
        return None


def _fingerprint(source: str, content: str, settings: PrepareSettings) -> str:
    """Return 64 hexadecimal digits; the name and the limits change no array and are not part of it."""
    names = ["image_size", "val_fraction", "test_fraction", "seed"]
    if settings.include or settings.exclude:  # else as before these settings existed
        names += ["include", "exclude"]
    parts = {"format": _FORMAT_VERSION, "source": source, "content": content}
    parts |= settings.model_dump(include=set(names))
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
            leave_out_copies(images.given_split, images.digests),
            val_fraction=None if VAL in images.given_splits else settings.val_fraction,
            test_fraction=None if TEST in images.given_splits else settings.test_fraction,
            seed=settings.seed,
        )
        _check_filled(splits, settings, source.kind, images)
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
                if folder.name.startswith(_SCRATCH) or TEMPORARY_NAME.fullmatch(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        with storage_errors(prepared):
            scratch = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=prepared, ignore_cleanup_errors=True)
        with scratch as path:
            yield Path(path)
    finally:
        os.close(lock)


def _files(source: str, settings: PrepareSettings, paths: Sequence[str]) -> list[Path]:
    """Return the files of images, none if they do not come from files."""
    return [expand_path(settings.dataset) / path for path in paths] if source == "folder" else []


def _check_filled(splits: npt.NDArray[np.int8], settings: PrepareSettings, source: str, images: SourceImages) -> None:
    """Refuse a dataset that has a split without images."""
    if not (empty := [name for split, name in enumerate(SPLITS) if not (splits == split).any()]):
        return
    statistics = compute_statistics(images.pixels, images.labels, len(images.class_names))
    check_contrast(images.pixels, statistics, _files(source, settings, images.paths), settings.dataset)
    text, digests = f"{settings.dataset} leaves no readable image for {empty[0]}", images.digests
    if num_left_out := int((splits == LEFT_OUT).sum()):
        text += f": {num_left_out:,} images of train and val are left out, as they are also in val or test"
    elif (num_different := len(set(digests))) < len(digests):
        text += (
            f": its {len(digests):,} images are copies of {num_different:,}, and copies stay in one split; "
            "a class needs three different images"
        )
    raise DatasetError(f"{text}; add images to its classes")


def leave_out_copies(given_split: npt.NDArray[np.int8], digests: Sequence[str]) -> npt.NDArray[np.int8]:
    """Return the given splits, (N,), without the images of train that val or test has too, and those of val in test.

    What a model is judged on stays, so that its figures can be compared with those of earlier runs.
    """
    splits, judged = given_split.copy(), set[str]()
    for split in (TEST, VAL, TRAIN):
        rows = np.flatnonzero(given_split == split).tolist()
        splits[[row for row in rows if digests[row] in judged]] = LEFT_OUT
        judged.update(digests[row] for row in rows)
    return splits


def assign_splits(
    labels: npt.NDArray[np.int64],
    digests: Sequence[str],
    given_split: npt.NDArray[np.int8],
    *,
    val_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> npt.NDArray[np.int8]:
    """Take test and val out of train, class by class, where the source does not come with them.

    Images of the same content stay in one split: a model must not be judged on what it has learned. The order in which
    the images of a class are taken follows from a hash of their content and the seed, not from a shuffled list, so a
    folder that grows every night keeps nearly all of its images in their splits. Test is taken from the front of that
    order and val after it, so that val lies between the other two: an image that changes its split as a class grows
    hardly ever moves from train to test, and last week's champion is not judged on what it has learned.

    Args:
        labels: class of each image, (N,).
        digests: digest of each image's content.
        given_split: split that each image comes with, (N,), an index into `SPLITS`.
        val_fraction: fraction of train, without test, that becomes val; None keeps the given val.
        test_fraction: fraction of train that becomes test; None keeps the given test.
        seed: determines the choice.
    Returns:
        The split of each image, (N,). A class with at least one different image for each split has one in each;
        a class with fewer stays in train.
    """
    # The same content in several classes is a mistake in the labels; it counts for the class where it is seen first.
    groups: dict[int, dict[str, list[int]]] = {}
    first_label: dict[str, int] = {}
    for index in np.flatnonzero(given_split == TRAIN).tolist():
        digest = digests[index]
        label = first_label.setdefault(digest, int(labels[index]))
        groups.setdefault(label, {}).setdefault(digest, []).append(index)
    splits = given_split.copy()
    for contents in groups.values():
        ranked = sorted(contents, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        num_test, num_val = _held_out(len(ranked), test_fraction, val_fraction)
        for position, digest in enumerate(ranked[: num_test + num_val]):
            splits[contents[digest]] = TEST if position < num_test else VAL
    return splits


def _held_out(count: int, test_fraction: float | None, val_fraction: float | None) -> tuple[int, int]:
    """Return how many of a class's `count` different images become test and val."""
    num_splits = 1 + (test_fraction is not None) + (val_fraction is not None)
    if count < num_splits:
        return 0, 0
    max_test = count - (num_splits - 1)
    num_test = 0 if test_fraction is None else min(max(round(count * test_fraction), 1), max_test)
    rest = count - num_test
    return num_test, 0 if val_fraction is None else min(max(round(rest * val_fraction), 1), rest - 1)


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
        digests = _write_images(folder / f"{name}_images.npy", images.pixels, rows, settings.image_size)
        with storage_errors(folder):
            np.save(folder / f"{name}_labels.npy", images.labels[rows])
            np.save(folder / f"{name}_digests.npy", pack_digests(digests))
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
    write_json(folder / DATASET_FILE, TypeAdapter(PreparedDataset).dump_python(dataset, mode="json", exclude={"path"}))


def _write_images(
    path: Path, pixels: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp], image_size: tuple[int, int]
) -> list[str]:
    """Write some rows of `pixels` as an .npy file, resized to `image_size`, a block at a time; return their SHA-256."""
    shape, digests = (*image_size, 3), list[str]()
    step = max(1, 2**25 // math.prod(shape))  # blocks of 32 MiB
    with storage_errors(path), path.open("wb") as file:
        # Plain writes report a full disk; writes into a mapped file would end the process with SIGBUS.
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), step):
            block = pixels[rows[start : start + step]]
            if block.shape[1:] != shape:
                block = np.stack([resize_pixels(image, image_size) for image in block])
            file.write(block.data)
            digests += hash_pixels(block)
    return digests


def load_prepared(path: Path) -> PreparedDataset:
    """Open a prepared dataset.

    Args:
        path: the folder that holds `dataset.json`.
    Raises:
        DatasetError: it is not complete, or its arrays are not what `dataset.json` says.
    """
    try:
        fields = json.loads((path / DATASET_FILE).read_bytes())
        dataset = TypeAdapter(PreparedDataset).validate_python({**fields, "path": path})
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} is not a complete prepared dataset: it has no {DATASET_FILE}; prepare it again"
        ) from error
    except (OSError, ValueError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{path / DATASET_FILE} cannot be read: {reason}; prepare it again") from error
    for split in SPLITS:
        _check_arrays(dataset, split)
    with suppress(OSError):  # somebody else's, or on a disk that is read-only
        os.utime(path)  # the stage `clean` keeps those that were used last
    return dataset


def _check_arrays(dataset: PreparedDataset, split: str) -> None:
    """Check that the arrays of a split have the sizes that `dataset.json` says; no image is read."""
    count, digests = dataset.num_images.get(split, 0), dataset.path / f"{split}_digests.npy"
    expected = [("uint8", (count, *dataset.image_size, 3)), ("int64", (count,)), ("uint8", (count, 16))]
    try:
        arrays: list[npt.NDArray[Any]] = [dataset.images(split), dataset.labels(split)]
        arrays += [np.load(digests)] if digests.is_file() else []
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{dataset.path} is damaged: {split} cannot be mapped: {error}; prepare it again") from error
    received = [(array.dtype.name, array.shape) for array in arrays]
    if received != expected[: len(arrays)]:
        raise DatasetError(
            f"{dataset.path} is damaged: {split} must have the arrays {expected}, received {received}; prepare it again"
        )


def read_digests(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the digests of the images that a run or a prepared dataset has, to tell which images another has too.

    Args:
        folder: a run, or a prepared dataset. Older ones have no digests: those of their images are computed.
    Returns:
        Split -> first 16 bytes of the SHA-256 of each image's pixels at the prepared size, (N, 16).
    Raises:
        DatasetError: the digests are damaged, or there are neither digests nor images.
    """
    if (path := folder / DIGESTS_FILE).is_file():
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {split: file[split] for split in SPLITS}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path} is damaged: {one_line(repr(error))}; train again") from error
    prepared = read_origin(folder).prepared if (folder / "config.toml").is_file() else folder
    if prepared is None or not (prepared / DATASET_FILE).is_file():
        raise DatasetError(f"{folder} has no {DIGESTS_FILE}, and its prepared dataset is gone; train again")
    dataset = load_prepared(prepared)
    return {split: dataset.digests(split) for split in SPLITS}


def find_shared(digests: npt.NDArray[np.uint8], *others: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return for each of some digests, (N, 16), whether it is also among the others, (M, 16) each."""
    known = {digest.tobytes() for each in others for digest in each}
    return np.array([digest.tobytes() in known for digest in digests], np.bool_)
