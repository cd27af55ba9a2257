"""List a user's folder of images, class by class, and say clearly what is wrong with it.

Two layouts: `<root>/{train,val,test}/<class>/*`, of which val and test may be missing, and `<root>/<class>/*`.
Below its class a file may lie in any subfolder. Names that begin with a dot and those that `cnnpipe.images.leftovers`
knows are skipped, and files that are not images by their suffixes are left out; warnings count both.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError
from cnnpipe.files import display_path
from cnnpipe.images.find import find_files
from cnnpipe.images.leftovers import OWN, describe_passed_over, is_own_folder, list_left_out, name_leftover
from cnnpipe.images.selection import FileFilter
from cnnpipe.prepare.splits import SPLITS, TEST, TRAIN

__all__ = ["ImageFolder", "list_image_folder", "list_scored_folder"]

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
        if is_own_folder(map(os.fsencode, os.listdir(place))):
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
