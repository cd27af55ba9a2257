"""Where images come from: the built-in digits, the archive of CIFAR-10, or a user's folder.

A source tells what it holds in two ways. `content()` is the digest of it all, found as cheaply as can be; `read()`
gives the images, with the same digest found on the way. Who has nothing to compare with reads at once, and everything
is read only once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.files import display_path, user_path
from cnnpipe.images.decode import read_file
from cnnpipe.images.find import FileFilter, find_files
from cnnpipe.images.leftovers import OWN, describe_passed_over, is_own_folder, list_left_out, name_leftover
from cnnpipe.images.workers import DecodedChunk, DecodedFile, DecoderPool, decode_files
from cnnpipe.machine import usable_cores
from cnnpipe.prepare.cifar10 import Archive, fetch_archive, read_cifar10
from cnnpipe.prepare.report import Unreadable
from cnnpipe.prepare.splits import SPLITS, TEST, TRAIN
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import BUILT_IN_DATASETS, PrepareSettings
from cnnpipe.storage import storage_errors

__all__ = [
    "Cifar10Source",
    "DigitsSource",
    "FolderSource",
    "ImageFolder",
    "Source",
    "SourceImages",
    "list_image_folder",
    "list_scored_folder",
    "open_source",
]

_NOT_IMAGES: Final = frozenset({
    ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".rst", ".xml", ".xmp", ".aae", ".yaml", ".yml", ".toml",
    ".ini", ".cfg", ".log", ".html", ".htm", ".css", ".js", ".url", ".lnk", ".py", ".pyc", ".ipynb", ".sh", ".bat",
    ".exe", ".dll", ".so", ".tex", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".ods", ".ppt",
    ".pptx", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".iso", ".npy", ".npz", ".mat",
    ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".onnx", ".tflite", ".safetensors",
    ".tfrecord", ".parquet", ".feather", ".arrow", ".avro", ".db", ".sqlite", ".sqlite3", ".sql", ".cache",
    ".names", ".labels", ".caption", ".md5", ".sha1", ".sha256", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v",
    ".mp3", ".wav", ".flac", ".ogg", ".m4a",
})  # fmt: skip
"""Suffixes, in lower case, that no image has; a file of another suffix is read, and told if it is not an image."""

# What people call their splits -> what it is called here.
_SPLIT_NAMES: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

_HIDDEN: Final = ".*"
"""Counts what begins with a dot."""

_LAYOUTS: Final = "need <root>/{train,val,test}/<class>/* or <root>/<class>/*"


@dataclass(frozen=True)
class _LeftOut:
    """Which files are wanted, and counts of what is left out."""

    wanted: FileFilter
    passed_over: Counter[str] = field(default_factory=Counter)
    """As `find_files` counts."""
    suffixes: Counter[str] = field(default_factory=Counter)
    """Counts of the suffixes of files that are not images."""

    def warnings(self) -> list[str]:
        warnings = []
        if self.suffixes:
            number = f"{self.suffixes.total():,} files that are not images by their suffixes were left out"
            warnings.append(f"{number}: {list_left_out(self.suffixes)}")
        if self.passed_over:
            warnings.append(describe_passed_over(self.passed_over))
        return warnings


@dataclass(frozen=True)
class ImageFolder:
    """Every file of a folder that should be an image, in order: by split, class, and then `find_files`."""

    root: Path
    class_names: tuple[str, ...]
    paths: list[str]
    """Relative to `root`, with `/`; N in all."""
    labels: npt.NDArray[np.int64]
    """(N,)"""
    given: npt.NDArray[np.int8]
    """(N,) index into `SPLITS`; all train in the flat layout."""
    given_splits: frozenset[int]
    """The splits that the folder comes with."""
    warnings: tuple[str, ...]


def list_image_folder(root: Path, wanted: FileFilter | None = None) -> ImageFolder:
    """Find the classes and files of a folder in either layout.

    Args:
        wanted: only files that it admits, by their paths relative to `root`; default: all.
    Raises:
        DatasetError: it does not exist, has neither layout, fewer than two classes, a class without images, or a
            class in val or test that train lacks.
    """
    left_out = _LeftOut(wanted or FileFilter())
    folders, files = _look_into(root, left_out.passed_over)
    if not folders:
        holds = f"{len(files)} files and no folders" if files else "nothing"
        raise DatasetError(f"{root} holds {holds}; {_LAYOUTS}")
    warnings = _stray_files(root, files)
    splits = _find_splits(root, folders, warnings)
    listing: dict[int, dict[str, list[str]]] = {}
    for split, folder in splits.items():
        if folder:
            folders, files = _look_into(root / folder, left_out.passed_over)
            warnings += _stray_files(root / folder, files)
        classes = ((name, _class_files(root, folder, name, left_out)) for name in folders)
        listing[split] = {name: files for name, files in classes if files is not None}
    class_names = _check_classes(root, splits, listing)
    warnings += [*_warn_of_look_alikes(class_names), *left_out.warnings()]
    return _flatten(root, class_names, listing, frozenset(splits) if any(splits.values()) else frozenset(), warnings)


def list_scored_folder(root: Path, class_names: tuple[str, ...] | None) -> ImageFolder:
    """Find all images of a folder to score a model on: those below `test`, else of all splits, else of all classes.

    Args:
        class_names: the model's, which give the labels; None takes the folder's own.
    Raises:
        DatasetError: it does not exist, holds no images in class folders, or has a class that the model does not know.
    """
    left_out = _LeftOut(FileFilter())
    folders, files = _look_into(root, left_out.passed_over)
    known = class_names or ()
    meant = {name: _SPLIT_NAMES[name.lower()] for name in folders if name.lower() in _SPLIT_NAMES and name not in known}
    splits = [name for name in meant if _look_into(root / name, Counter())[0]]  # else it is a class
    tests = [name for name in splits if meant[name] == SPLITS[TEST]]
    warnings = _stray_files(root, files)
    listing: dict[int, dict[str, list[str]]] = {}
    for place in tests or (splits if splits == folders else [""]):
        if place:
            folders, files = _look_into(root / place, left_out.passed_over)
            warnings += _stray_files(root / place, files)
        classes = listing.setdefault(SPLITS.index(meant.get(place, SPLITS[TEST])), {})
        for name in folders:
            classes.setdefault(name, []).extend(_class_files(root, place, name, left_out) or [])
    filled = {name for classes in listing.values() for name, found in classes.items() if found}
    if not filled:
        raise DatasetError(f"{root} holds no images in class folders; need <root>/<class>/* or <root>/test/<class>/*")
    names = class_names or tuple(sorted(filled, key=os.fsencode))
    if unknown := sorted(filled - set(names)):
        raise DatasetError(
            f"{root} has folders of classes that the model does not know: {_first_few(unknown)}; it knows "
            f"{_first_few(names)}; rename or remove the others"
        )
    if missing := [name for name in names if name not in filled]:
        warnings.append(f"{root} has no images of these classes of the model: {_first_few(missing)}")
    return _flatten(root, names, listing, frozenset(), [*warnings, *left_out.warnings()])


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(map(display_path, names[:5])) + (", …" if len(names) > 5 else "")


def _look_into(folder: Path, passed_over: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the other entries in a folder, each sorted bytewise."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                leftover = name_leftover(os.fsencode(folder), os.fsencode(entry.name), entry.is_dir())
                if leftover or entry.name.startswith("."):
                    passed_over[leftover or _HIDDEN] += 1
                else:
                    (folders if entry.is_dir() else files).append(entry.name)
    except FileNotFoundError as error:
        raise DatasetError(
            f"there is no dataset {display_path(str(folder))}; need digits, cifar10 or the path of a folder of images"
        ) from error
    except NotADirectoryError as error:
        raise DatasetError(f"{display_path(str(folder))} is a file; {_LAYOUTS}") from error
    except OSError as error:
        raise DatasetError(
            f"cannot list {display_path(str(folder))}: {error.strerror}; check its permissions"
        ) from error
    return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)


def _stray_files(folder: Path, names: list[str]) -> list[str]:
    """Return a warning for files that lie beside class folders: they belong to no class."""
    if not names:
        return []
    shown = ", ".join(display_path(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
    return [f"{len(names)} files in {display_path(str(folder))} are in no class folder and were left out: {shown}"]


def _find_splits(root: Path, folders: list[str], warnings: list[str]) -> dict[int, str]:
    """Return split -> name of its folder; for the flat layout, train -> "".

    A class may well be called train (beside car and bus), so the name alone does not make a split: it must hold
    folders itself, or lie beside nothing but splits.
    """
    meant = {name: _SPLIT_NAMES[name.lower()] for name in folders if name.lower() in _SPLIT_NAMES}
    has_splits = any(_look_into(root / name, Counter())[0] for name, split in meant.items() if split == "train")
    if not has_splits and len(meant) < len(folders):
        return {TRAIN: ""}
    splits: dict[int, str] = {}
    for name, split in sorted(meant.items(), key=lambda each: SPLITS.index(each[1])):
        if (other := splits.setdefault(SPLITS.index(split), name)) != name:
            raise DatasetError(f"{root} has {other} and {name}, and both mean {split}; merge them, or rename one")
    if TRAIN not in splits:
        raise DatasetError(f"{root} has {' and '.join(meant)}, but no train; {_LAYOUTS}")
    others = [display_path(name) for name in folders if name not in meant]
    if others:
        warnings.append(f"folders beside train were left out: {', '.join(others[:3])}")
    return splits


def _class_files(root: Path, folder: str, name: str, left_out: _LeftOut) -> list[str] | None:
    """Return the files of one class, relative to `root`; None if what it holds is cnnpipe's, or not wanted."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(f"the name of the class {display_path(name)} is not UTF-8; rename the folder") from error
    prefix = f"{folder}/{name}/" if folder else f"{name}/"
    place, inside = root / prefix, Counter[str]()
    with suppress(OSError):  # `find_files` tells
        if is_own_folder(os.fsencode(place), map(os.fsencode, os.listdir(place))):
            left_out.passed_over[OWN] += 1
            return None
    files, is_wanted = [], True
    for path in find_files(place, passed_over=inside):
        suffix = PurePosixPath(path).suffix.lower()
        if path.startswith(".") or "/." in path:
            inside[_HIDDEN] += 1
        elif not left_out.wanted.admits(prefix + path):
            is_wanted = False
        elif suffix in _NOT_IMAGES:
            left_out.suffixes[suffix] += 1
        else:
            files.append(prefix + path)
    left_out.passed_over.update(inside)
    return files if files or (is_wanted and not inside[OWN]) else None


def _check_classes(root: Path, folders: dict[int, str], listing: dict[int, dict[str, list[str]]]) -> tuple[str, ...]:
    """Return the class names, which are those of train; hold the other splits against them."""
    train = listing[TRAIN]
    if not train:
        raise DatasetError(f"{root / folders[TRAIN]} has no class folders with files that are wanted; {_LAYOUTS}")
    empty = [name for name, files in train.items() if not files]
    if empty:
        raise DatasetError(
            f"class {', '.join(map(repr, empty[:5]))} of {root} has no images in train; add some, or remove its folder"
        )
    if len(train) < 2:
        raise DatasetError(f"need at least two classes, received only {next(iter(train))!r} in {root}; {_LAYOUTS}")
    for split in sorted(set(listing) - {TRAIN}):
        filled = {name for name, files in listing[split].items() if files}
        if not filled:
            raise DatasetError(f"{root / folders[split]} holds no images in class folders; fill it, or remove it")
        if unknown := sorted(filled - set(train)):
            raise _unknown_class(root, folders[split], unknown[0], train)
    return tuple(train)


def _unknown_class(root: Path, folder: str, name: str, train: Iterable[str]) -> DatasetError:
    twin = next((other for other in train if _appearance(other) == _appearance(name)), None)
    if twin is None:
        return DatasetError(
            f"class {name!r} of {root} is in {folder}, but not in train; add it to train, or remove it there"
        )
    return DatasetError(
        f"class {_spell(name)} of {root} is in {folder}, but not in train, which has {_spell(twin)}; rename one of them"
    )


def _warn_of_look_alikes(class_names: Iterable[str]) -> list[str]:
    """Return a warning for classes whose names look alike, in letters that show how they differ."""
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault(_appearance(name), []).append(_spell(name))
    alike = [" and ".join(names) for names in groups.values() if len(names) > 1]
    return [f"classes have names that look alike: {', '.join(alike)}; merge those that mean one class"] if alike else []


def _spell(name: str) -> str:
    """Return a name in ASCII, so that two that look alike do not; a second space is shown as its code."""
    return ascii(name).replace("  ", " \\x20")


def _appearance(name: str) -> str:
    """Return a name without what a reader may overlook: case, spaces at the ends, how an accent is written."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    visible = (" " if char.isspace() else char for char in plain if unicodedata.category(char) != "Cf")
    return " ".join("".join(visible).split())


def _flatten(
    root: Path,
    class_names: tuple[str, ...],
    listing: dict[int, dict[str, list[str]]],
    given_splits: frozenset[int],
    warnings: list[str],
) -> ImageFolder:
    paths: list[str] = []
    labels: list[int] = []
    given: list[int] = []
    for split, classes in listing.items():
        for label, name in enumerate(class_names):
            files = classes.get(name, [])
            paths += files
            labels += [label] * len(files)
            given += [split] * len(files)
    return ImageFolder(
        root=root,
        class_names=class_names,
        paths=paths,
        labels=np.array(labels, np.int64),
        given=np.array(given, np.int8),
        given_splits=given_splits,
        warnings=tuple(warnings),
    )


_logger = logging.getLogger(__name__)

_CHUNK_FILES: Final = 128
_MIN_FILES_FOR_POOL: Final = 500  # fewer are decoded sooner than a second process has started


@dataclass(frozen=True)
class SourceImages:
    """All readable images of a source, N of them, in its own order."""

    content: str
    """SHA-256 of the source, as `Source.content` gives it."""
    class_names: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    """(N, H, W, 3) RGB, in the source's own size or, from a folder, in the model's."""
    labels: npt.NDArray[np.int64]
    """(N,)"""
    paths: Sequence[str]
    digests: Sequence[str]
    """SHA-256 of each image's file or, where it has none, of its pixels."""
    given: npt.NDArray[np.int8]
    """(N,) index into `SPLITS`."""
    given_splits: frozenset[int]
    """The splits that the source comes with; the others are taken out of train."""
    unreadable: tuple[Unreadable, ...] = ()
    warnings: tuple[str, ...] = ()


class Source(Protocol):
    """What every source can do."""

    kind: str

    def content(self) -> str:
        """Return the SHA-256 of everything that the prepared images are made from."""

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:
        """Read all images.

        Args:
            image_size: the model's (height, width), for sources that decode.
            scratch: a file that may be written, in a place with room for all images; it must outlive the result.
        """


def open_source(
    settings: PrepareSettings, raw: Path, archive: Archive, workers: int | None, progress: ProgressCallback
) -> Source:
    """Return the source that `settings.dataset` names.

    Raises:
        DatasetError: it is a folder that cannot be a dataset.
    """
    if settings.dataset in BUILT_IN_DATASETS and Path(settings.dataset).is_dir():
        _logger.warning(
            "%s is the built-in dataset here, not the folder of that name; for the folder give ./%s",
            settings.dataset,
            settings.dataset,
        )
    if settings.dataset == "digits":
        return DigitsSource()
    if settings.dataset == "cifar10":
        return Cifar10Source(archive, raw, progress)
    folder = list_image_folder(user_path(settings.dataset), FileFilter(settings.include, settings.exclude))
    return FolderSource(folder, workers or usable_cores(), progress)


class DigitsSource:
    """1,797 handwritten digits, 8×8 grey, that come with scikit-learn: real data without a network."""

    kind = "digits"

    def content(self) -> str:
        pixels, labels = self._load()
        return hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:  # noqa: ARG002  as the protocol has it
        pixels, labels = self._load()
        return SourceImages(
            content=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
            class_names=tuple(str(digit) for digit in range(10)),
            pixels=pixels,
            labels=labels,
            paths=[f"digits/{index:04d}" for index in range(len(labels))],
            digests=_pixel_digests(pixels),
            given=np.full(len(labels), TRAIN, np.int8),
            given_splits=frozenset(),
        )

    @staticmethod
    def _load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Source: scikit-learn's description of the dataset: grey levels are whole numbers from 0 to 16.
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        return np.repeat(grey[..., np.newaxis], 3, axis=3), digits.target.astype(np.int64)


class Cifar10Source:
    """The official archive, from `data/raw` or the network, with its own split of train and test."""

    kind = "cifar10"

    def __init__(self, archive: Archive, raw: Path, progress: ProgressCallback) -> None:
        self._archive = archive
        self._raw = raw
        self._progress = progress

    def content(self) -> str:
        return self._archive.sha256  # known without the file: what is prepared outlives a tidied data/raw

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:  # noqa: ARG002  as the protocol has it
        cifar10 = read_cifar10(fetch_archive(self._archive, self._raw, self._progress))
        return SourceImages(
            content=self._archive.sha256,
            class_names=cifar10.class_names,
            pixels=cifar10.pixels,
            labels=cifar10.labels,
            paths=cifar10.paths,
            digests=_pixel_digests(cifar10.pixels),
            given=np.where(cifar10.is_test, TEST, TRAIN).astype(np.int8),
            given_splits=frozenset({TRAIN, TEST}),
        )


def _pixel_digests(pixels: npt.NDArray[np.uint8]) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]


class FolderSource:
    """A user's folder of images, hashed and decoded on all cores."""

    kind = "folder"

    def __init__(self, folder: ImageFolder, workers: int, progress: ProgressCallback) -> None:
        self._folder = folder
        self._workers = workers
        self._progress = progress

    def content(self) -> str:
        paths, done = self._folder.paths, 0
        chunks = [paths[start : start + _CHUNK_FILES] for start in range(0, len(paths), _CHUNK_FILES)]
        entries: list[tuple[str, str]] = []
        # Threads: reading and hashing let go of the interpreter, and processes would have to be started.
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                for chunk in threads.map(self._hash_files, chunks):
                    entries += chunk
                    done += len(chunk)
                    self._progress("hash", done, len(paths))
            except BaseException:  # such as Ctrl-C: the rest need not be read before it takes effect
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return _folder_content(entries)

    def _hash_files(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        entries = []
        for path in paths:
            try:
                digest = hashlib.sha256(read_file(self._folder.root / path)).hexdigest()
            except ImageError as error:
                digest = error.kind
            entries.append((path, digest))
        return entries

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:
        files = self._decode_to(scratch, image_size)
        readable = np.array([not file.error_kind for file in files], np.bool_)
        if not readable.any():
            raise DatasetError(
                f"none of the {len(files):,} files in {self._folder.root} can be read as an image; "
                f"the first, {display_path(files[0].path)}: {files[0].error}"
            )
        return SourceImages(
            content=_folder_content([(file.path, file.sha256 or file.error_kind) for file in files]),
            class_names=self._folder.class_names,
            pixels=np.memmap(scratch, np.uint8, "r", shape=(int(readable.sum()), *image_size, 3)),
            labels=self._folder.labels[readable],
            paths=[display_path(file.path) for file in files if not file.error_kind],
            digests=[file.sha256 for file in files if not file.error_kind],
            given=self._folder.given[readable],
            given_splits=self._folder.given_splits,
            unreadable=tuple(
                Unreadable(display_path(file.path), file.error_kind, display_path(file.error))
                for file in files
                if file.error_kind
            ),
            warnings=self._folder.warnings,
        )

    def _decode_to(self, scratch: Path, image_size: tuple[int, int]) -> list[DecodedFile]:
        """Decode all files, write the pixels of those that can be decoded to `scratch`, one after the other."""
        files: list[DecodedFile] = []
        # Plain writes report a full disk; into a mapped file they would end the process with SIGBUS.
        with storage_errors(scratch):
            file = scratch.open("wb")
        with file, closing(self._decode_chunks(image_size)) as chunks:
            for chunk in chunks:
                with storage_errors(scratch):
                    file.write(chunk.images.tobytes())
                    file.flush()  # here, so that a full disk is not told at closing
                files += chunk.files
                self._progress("decode", len(files), len(self._folder.paths))
        return files

    def _decode_chunks(self, image_size: tuple[int, int]) -> Generator[DecodedChunk, None, None]:
        root, paths = self._folder.root, self._folder.paths
        if self._workers > 1 and len(paths) >= _MIN_FILES_FOR_POOL:
            with DecoderPool(self._workers) as pool:
                yield from pool.decode(root, iter(paths), image_size)
            return
        for start in range(0, len(paths), _CHUNK_FILES):
            yield decode_files(root, paths[start : start + _CHUNK_FILES], image_size)


def _folder_content(entries: Sequence[tuple[str, str]]) -> str:
    """Digest a folder: paths and what they hold, whatever the order in which they were listed or read.

    Args:
        entries: relative path, and SHA-256 of the bytes or why they could not be read.
    """
    content = hashlib.sha256()
    for path, digest in sorted((os.fsencode(path), digest) for path, digest in entries):
        content.update(b"%d:%b%b\n" % (len(path), path, digest.encode()))
    return content.hexdigest()
