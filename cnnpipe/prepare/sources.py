"""Where images come from: the built-in digits or a user's folder; the third source is in `cnnpipe.prepare.cifar10`.

A source describes its content in two ways: `content()` returns the digest of it all, as cheaply as possible; `read()`
returns the images, and the same digest with them. Without anything to compare with, a caller reads at once, so that
everything is read only once. `read()` takes the model's (height, width), for sources that decode, and the path of a
file to write pixels to, which must outlive the result.

A folder has one of two layouts: `<root>/{train,val,test}/<class>/*`, in which val and test may be missing, or
`<root>/<class>/*`. In the folder of a class a file may lie at any depth. Names that begin with a dot, those that
`cnnpipe.images.leftovers` recognises, and files whose suffix no image has are left out; warnings count them.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.images.decode import read_file
from cnnpipe.images.find import FileFilter, find_files, read_names
from cnnpipe.images.leftovers import OWN, describe_passed_over, is_own_folder, list_left_out
from cnnpipe.images.workers import DecodedChunk, DecodedFile, DecoderPool, decode_files
from cnnpipe.paths import escape_path
from cnnpipe.progress import ProgressCallback
from cnnpipe.storage import storage_errors

SPLITS: Final = ("train", "val", "test")
"""Splits of a dataset: images to learn from, to choose the checkpoint by, and to judge the model on."""

TRAIN: Final = 0
VAL: Final = 1
TEST: Final = 2
LEFT_OUT: Final = -1
"""Stands for the split of an image in none of them."""

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
"""Suffixes, in lower case, that no image has; a file of another suffix is read, and reported if it is not an image."""

_SPLIT_NAMES: Final = {
    "train": TRAIN, "training": TRAIN,
    "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL,
    "test": TEST, "testing": TEST,
}  # fmt: skip
"""Name of a folder, in lower case -> the split that it means."""

_HIDDEN: Final = ".*"  # how files and folders that begin with a dot are called in counts

_LAYOUTS: Final = "need <root>/{train,val,test}/<class>/* or <root>/<class>/*"

_CHUNK_FILES: Final = 128
_MIN_FILES_FOR_POOL: Final = 500  # fewer are decoded sooner than a second process has started


@dataclass(frozen=True)
class Unreadable:
    """A source file that is not an image, or a damaged one."""

    path: str
    kind: str
    """One of `cnnpipe.images.decode.ERROR_KINDS`."""
    message: str
    """Error message, one line."""


@dataclass(frozen=True)
class SourceImages:
    """All N readable images of a source, in its own order."""

    content: str
    """SHA-256 of the source, as its `content()` returns it."""
    class_names: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    """Pixels, (N, H, W, 3) RGB; those of a folder have the model's size, others their own."""
    labels: npt.NDArray[np.int64]
    """Index into `class_names` of each image, (N,)."""
    paths: Sequence[str]
    """Name of each image in the source."""
    digests: Sequence[str]
    """SHA-256 of each image's file or, if it has none, of its pixels; images of the same pixels have the same."""
    given_split: npt.NDArray[np.int8]
    """Index into `SPLITS` of the split that each image comes with, (N,)."""
    given_splits: frozenset[int]
    """Splits that the source comes with; the others are taken out of train."""
    unreadable: tuple[Unreadable, ...] = ()
    warnings: tuple[str, ...] = ()


class DigitsSource:
    """The 1,797 handwritten digits, 8×8 grey, that come with scikit-learn: real data without a network."""

    kind = "digits"

    def content(self) -> str:
        return self.read((8, 8), Path()).content

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:  # noqa: ARG002  as all sources
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Source: scikit-learn's description of the dataset: grey levels are whole numbers from 0 to 16.
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        pixels = np.repeat(grey[..., np.newaxis], 3, axis=3)
        labels = digits.target.astype(np.int64)
        return SourceImages(
            content=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
            class_names=tuple(str(digit) for digit in range(10)),
            pixels=pixels,
            labels=labels,
            paths=[f"digits/{index:04d}" for index in range(len(labels))],
            digests=hash_pixels(pixels),
            given_split=np.full(len(labels), TRAIN, np.int8),
            given_splits=frozenset(),
        )


def hash_pixels(pixels: npt.NDArray[np.uint8]) -> list[str]:
    """Return the SHA-256 of each image, (N, H, W, 3), as 64 hexadecimal digits."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]


def pack_digests(digests: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Return the first 16 bytes of digests in hexadecimal digits, (N, 16) uint8."""
    return np.frombuffer(bytes.fromhex("".join(digest[:32] for digest in digests)), np.uint8).reshape(-1, 16)


class FolderSource:
    """A user's folder of images, hashed and decoded on all cores."""

    kind = "folder"

    def __init__(self, folder: ImageFolder, workers: int, progress: ProgressCallback) -> None:
        self._folder = folder
        self._workers = workers
        self._progress = progress

    def content(self) -> str:
        paths = self._folder.paths
        chunks = [paths[start : start + _CHUNK_FILES] for start in range(0, len(paths), _CHUNK_FILES)]
        outcomes: list[str] = []
        # Threads: reading and hashing release the interpreter, and processes would have to be started.
        with ThreadPoolExecutor(self._workers) as threads:
            for chunk in threads.map(self._hash_files, chunks):
                outcomes += chunk
                self._progress("hash", len(outcomes), len(paths))
        return _hash_folder(paths, outcomes)

    def _hash_files(self, paths: Sequence[str]) -> list[str]:
        """Return for each file the SHA-256 of its bytes, or the kind of error for which it cannot be read."""
        outcomes = []
        for path in paths:
            try:
                outcomes.append(hashlib.sha256(read_file(self._folder.root / path)).hexdigest())
            except ImageError as error:
                outcomes.append(error.kind)
        return outcomes

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:
        folder, (files, pixel_digests) = self._folder, self._decode_to(scratch, image_size)
        images = [file for file in files if file.has_image]
        if not images:
            raise DatasetError(
                f"none of the {len(files):,} files in {folder.root} can be read as an image; "
                f"the first, {escape_path(files[0].path)}: {files[0].error}"
            )
        readable = np.array([file.has_image for file in files])
        failed = [file for file in files if not file.has_image]
        lowest: dict[str, str] = {}  # digest of pixels -> that of one of the files that have them
        for pixels, image in zip(pixel_digests, images, strict=True):
            lowest[pixels] = min(image.sha256, lowest.get(pixels, image.sha256))
        return SourceImages(
            content=_hash_folder(folder.paths, [file.sha256 or file.error_kind for file in files]),
            class_names=folder.class_names,
            pixels=np.memmap(scratch, np.uint8, "r", shape=(len(images), *image_size, 3)),
            labels=folder.labels[readable],
            paths=[escape_path(file.path) for file in images],
            digests=[lowest[pixels] for pixels in pixel_digests],
            given_split=folder.given_split[readable],
            given_splits=folder.given_splits,
            unreadable=tuple(Unreadable(escape_path(f.path), f.error_kind, escape_path(f.error)) for f in failed),
            warnings=folder.warnings,
        )

    def _decode_to(self, scratch: Path, image_size: tuple[int, int]) -> tuple[list[DecodedFile], list[str]]:
        """Decode all files, write the pixels of the images to `scratch`; return the files and the pixels' SHA-256."""
        files: list[DecodedFile] = []
        digests: list[str] = []
        # Plain writes report a full disk; writes into a mapped file would end the process with SIGBUS.
        with storage_errors(scratch), scratch.open("wb") as file, closing(self._decode_chunks(image_size)) as chunks:
            for chunk in chunks:
                file.write(chunk.images.data)
                files += chunk.files
                digests += hash_pixels(chunk.images)
                self._progress("decode", len(files), len(self._folder.paths))
        return files, digests

    def _decode_chunks(self, image_size: tuple[int, int]) -> Generator[DecodedChunk, None, None]:
        root, paths = self._folder.root, self._folder.paths
        if self._workers > 1 and len(paths) >= _MIN_FILES_FOR_POOL:
            with DecoderPool(self._workers) as pool:
                yield from pool.decode(root, iter(paths), image_size)
            return
        for start in range(0, len(paths), _CHUNK_FILES):
            yield decode_files(root, paths[start : start + _CHUNK_FILES], image_size)


def _hash_folder(paths: Sequence[str], outcomes: Sequence[str]) -> str:
    """Return a digest of a folder's paths and, for each, the file's SHA-256 or error, in whatever order they came."""
    content = hashlib.sha256()
    for path, outcome in sorted(zip(map(os.fsencode, paths), outcomes, strict=True)):
        content.update(b"%d:%b%b\n" % (len(path), path, outcome.encode()))
    return content.hexdigest()


@dataclass(frozen=True)
class ImageFolder:
    """Every file of a folder that should be an image, N in all, in order: by split, by class, and as `find_files`."""

    root: Path
    class_names: tuple[str, ...]
    paths: list[str]
    """Path of each file relative to `root`, with `/`."""
    labels: npt.NDArray[np.int64]
    """Index into `class_names` of each file, (N,)."""
    given_split: npt.NDArray[np.int8]
    """Index into `SPLITS` of each file, (N,); train for all in the flat layout."""
    given_splits: frozenset[int]
    """Splits that the folder comes with."""
    warnings: tuple[str, ...]


def list_image_folder(root: Path, wanted: FileFilter | None = None) -> ImageFolder:
    """Find the classes and files of a folder in either layout.

    Args:
        wanted: lists only files that it admits, by their paths relative to `root`; default: all.
    Raises:
        DatasetError: the folder does not exist, has neither layout, fewer than two classes, a class without images, or
            a class in val or test that train lacks.
    """
    listing = _Listing(root, wanted or FileFilter())
    folders = listing.class_folders("")
    if not folders:
        raise DatasetError(f"{root} holds no folders of images; {_LAYOUTS}")
    splits = _find_splits(root, folders)
    if not splits:
        listing.add_split(TRAIN, "", folders)
    elif others := [name for name in folders if name not in splits.values()]:
        listing.warnings.append(f"folders beside train were left out: {first_few(others)}")
    for split, folder in splits.items():
        listing.add_split(split, folder, listing.class_folders(folder))
    class_names = _check_classes(root, splits, listing.files)
    listing.warnings += _warn_of_look_alikes(class_names)
    return listing.finish(class_names, frozenset(splits))


def list_scored_folder(root: Path, class_names: tuple[str, ...] | None) -> ImageFolder:
    """Find all images of a folder to score a model on: those in `test`, else in all splits, else in all classes.

    Args:
        class_names: the model's, which determine the labels; None takes the folder's own.
    Raises:
        DatasetError: the folder does not exist, holds no images in class folders, or has a class that the model lacks.
    """
    listing = _Listing(root, FileFilter())
    folders = listing.class_folders("")
    splits = {
        name: _SPLIT_NAMES[name.lower()]
        for name in folders
        if name.lower() in _SPLIT_NAMES and name not in (class_names or ()) and _list_names(root / name, Counter())[0]
    }
    tests = [name for name, split in splits.items() if split == TEST]
    for name in tests or (splits if list(splits) == folders else []):
        listing.add_split(splits[name], name, listing.class_folders(name))
    if not listing.files:
        listing.add_split(TEST, "", folders)
    filled = {name for classes in listing.files.values() for name, found in classes.items() if found}
    if not filled:
        raise DatasetError(f"{root} holds no images in class folders; need <root>/<class>/* or <root>/test/<class>/*")
    names = class_names or tuple(sorted(filled, key=os.fsencode))
    if unknown := sorted(filled - set(names)):
        raise DatasetError(
            f"{root} has folders of classes that the model does not have: {first_few(unknown, 5)}; it has "
            f"{first_few(names, 5)}; rename or remove the others"
        )
    if missing := [name for name in names if name not in filled]:
        listing.warnings.append(f"{root} has no images of these classes of the model: {first_few(missing, 5)}")
    return listing.finish(names, frozenset())


def first_few(items: Sequence[str], number: int = 3) -> str:
    """Return the first items of a list as text."""
    return ", ".join(map(escape_path, items[:number])) + (", …" if len(items) > number else "")


class _Listing:
    """The files of a folder, and what is to be said about it."""

    def __init__(self, root: Path, wanted: FileFilter) -> None:
        self._root = root
        self._wanted = wanted
        self._passed_over: Counter[str] = Counter()
        self._suffixes: Counter[str] = Counter()
        self.files: dict[int, dict[str, list[str]]] = {}
        """Split -> class -> paths relative to the root."""
        self.warnings: list[str] = []

    def class_folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder; warn of the files that lie beside them."""
        folders, files = _list_names(self._root / folder, self._passed_over)
        if files:
            where = escape_path(str(self._root / folder))
            self.warnings.append(
                f"{len(files)} files in {where} are in no class folder and were left out: {first_few(files)}"
            )
        return folders

    def add_split(self, split: int, folder: str, classes: Iterable[str]) -> None:
        """List the files of the classes in a folder; leave out a class that is cnnpipe's own or has no wanted file."""
        paths = self.files.setdefault(split, {})
        for name in classes:
            if (found := self._list_class(f"{folder}/{name}" if folder else name)) is not None:
                paths[name] = paths.get(name, []) + found

    def _list_class(self, folder: str) -> list[str] | None:
        """Return the files of a class, relative to the root; None if the class is to be left out."""
        try:
            folder.encode()
        except UnicodeEncodeError as error:
            name = escape_path(PurePosixPath(folder).name)
            raise DatasetError(f"the name of the class {name} is not UTF-8; rename the folder") from error
        files, all_wanted, passed_over = [], True, Counter[str]()
        with suppress(OSError):  # `find_files` reports it
            if is_own_folder(map(os.fsencode, os.listdir(self._root / folder))):
                self._passed_over[OWN] += 1
                return None
        for file in find_files(self._root / folder, passed_over=passed_over):
            suffix = PurePosixPath(file).suffix.lower()
            if file.startswith(".") or "/." in file:
                passed_over[_HIDDEN] += 1
            elif not self._wanted.admits(f"{folder}/{file}"):
                all_wanted = False
            elif suffix in _NOT_IMAGES:
                self._suffixes[suffix] += 1
            else:
                files.append(f"{folder}/{file}")
        self._passed_over.update(passed_over)
        return files if files or (all_wanted and not passed_over[OWN]) else None

    def finish(self, class_names: tuple[str, ...], given_splits: frozenset[int]) -> ImageFolder:
        """Return the listed files."""
        if self._suffixes:
            number = f"{self._suffixes.total():,} files that are not images by their suffixes were left out"
            self.warnings.append(f"{number}: {list_left_out(self._suffixes)}")
        if self._passed_over:
            self.warnings.append(describe_passed_over(self._passed_over))
        groups = [
            (split, label, classes.get(name, []))
            for split, classes in self.files.items()
            for label, name in enumerate(class_names)
        ]
        sizes = [len(paths) for _, _, paths in groups]
        return ImageFolder(
            root=self._root,
            class_names=class_names,
            paths=[path for _, _, paths in groups for path in paths],
            labels=np.repeat(np.array([label for _, label, _ in groups], np.int64), sizes),
            given_split=np.repeat(np.array([split for split, _, _ in groups], np.int8), sizes),
            given_splits=given_splits,
            warnings=tuple(self.warnings),
        )


def _list_names(folder: Path, passed_over: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the other entries in a folder, each sorted bytewise."""
    shown = escape_path(str(folder))
    try:
        names = sorted(read_names(os.fsencode(folder), os.scandir(os.fsencode(folder)), b"", passed_over))
    except FileNotFoundError as error:
        raise DatasetError(f"there is no dataset {shown}; need digits, cifar10 or the path of a folder") from error
    except OSError as error:
        raise DatasetError(f"cannot list {shown}: {error.strerror}; {_LAYOUTS}") from error
    passed_over.update(_HIDDEN for name in names if name.startswith(b"."))
    visible = [os.fsdecode(name) for name in names if not name.startswith(b".")]
    return (
        [name.removesuffix("\0") for name in visible if name.endswith("\0")],
        [name for name in visible if not name.endswith("\0")],
    )


def _find_splits(root: Path, folders: list[str]) -> dict[int, str]:
    """Return split -> name of its folder; empty for the flat layout.

    A class may well be called train (beside car and bus), so the name alone does not make a split: it must hold
    folders itself, or lie beside nothing but splits.
    """
    named = {name: _SPLIT_NAMES[name.lower()] for name in folders if name.lower() in _SPLIT_NAMES}
    has_splits = any(_list_names(root / name, Counter())[0] for name, split in named.items() if split == TRAIN)
    if not has_splits and len(named) < len(folders):
        return {}
    splits: dict[int, str] = {}
    for name, split in sorted(named.items(), key=lambda item: item[1]):
        if (other := splits.setdefault(split, name)) != name:
            raise DatasetError(f"{root} has {other} and {name}, both mean {SPLITS[split]}; merge or rename them")
    if TRAIN not in splits:
        raise DatasetError(f"{root} has {' and '.join(named)}, but no train; {_LAYOUTS}")
    return splits


def _check_classes(root: Path, folders: dict[int, str], files: dict[int, dict[str, list[str]]]) -> tuple[str, ...]:
    """Return the class names, which are those of train; check that the other splits have no others."""
    train = files[TRAIN]
    if not train:
        where = root / folders.get(TRAIN, "")
        raise DatasetError(f"{where} has no class folders with files that are wanted; {_LAYOUTS}")
    if empty := [name for name, found in train.items() if not found]:
        raise DatasetError(
            f"class {', '.join(map(repr, empty[:5]))} of {root} has no images in train; add some, or remove its folder"
        )
    if len(train) < 2:
        raise DatasetError(f"need at least two classes, received only {next(iter(train))!r} in {root}; {_LAYOUTS}")
    for split in sorted(set(files) - {TRAIN}):
        filled = {name for name, found in files[split].items() if found}
        if not filled:
            raise DatasetError(f"{root / folders[split]} holds no images in class folders; fill it, or remove it")
        if name := min(filled - set(train), default=None):
            similar = sorted(train, key=lambda other: _appearance(other) != _appearance(name))
            raise DatasetError(
                f"class {_spell(name)} of {root} is in {folders[split]}, but not in train, which has "
                f"{first_few([_spell(other) for other in similar])}; add it to train, or rename or remove it"
            )
    return tuple(train)


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
