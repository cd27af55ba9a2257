"""List a user's folder of images, class by class, and say clearly what is wrong with it.

Two layouts: `<root>/{train,val,test}/<class>/*`, of which val and test may be missing, and `<root>/<class>/*`.
Below its class a file may lie in any subfolder. What begins with a dot, and the litter of file browsers, is not there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError
from cnnpipe.files import display_path
from cnnpipe.finding import find_files
from cnnpipe.training.splits import SPLITS, TEST, TRAIN

__all__ = ["ImageFolder", "list_image_folder", "list_scored_folder"]

_LITTER: Final = frozenset({"thumbs.db", "desktop.ini"})

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

_LAYOUTS: Final = "need <root>/{train,val,test}/<class>/* or <root>/<class>/*"


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


def list_image_folder(root: Path) -> ImageFolder:
    """Find the classes and files of a folder in either layout.

    Raises:
        DatasetError: it does not exist, has neither layout, fewer than two classes, a class without images, or a
            class in val or test that train lacks.
    """
    folders, files = _look_into(root)
    if not folders:
        holds = f"{len(files)} files and no folders" if files else "nothing"
        raise DatasetError(f"{root} holds {holds}; {_LAYOUTS}")
    warnings = _stray_files(root, files)
    splits = _find_splits(root, folders, warnings)
    listing: dict[int, dict[str, list[str]]] = {}
    for split, folder in splits.items():
        if folder:
            folders, files = _look_into(root / folder)
            warnings += _stray_files(root / folder, files)
        listing[split] = {name: _class_files(root, folder, name) for name in folders}
    class_names = _check_classes(root, listing, warnings)
    return _flatten(root, class_names, listing, frozenset(splits) if any(splits.values()) else frozenset(), warnings)


def list_scored_folder(root: Path, class_names: tuple[str, ...] | None) -> ImageFolder:
    """Find all images of a folder to score a model on: those below `test`, else of all splits, else of all classes.

    Args:
        class_names: the model's, which give the labels; None takes the folder's own.
    Raises:
        DatasetError: it does not exist, holds no images in class folders, or has a class that the model does not know.
    """
    folders, files = _look_into(root)
    splits = [name for name in folders if name in SPLITS and name not in (class_names or ())]
    splits = [name for name in splits if _look_into(root / name)[0]]  # else it is a class
    places = [SPLITS[TEST]] if SPLITS[TEST] in splits else splits if splits == folders else []
    warnings = _stray_files(root, files)
    listing: dict[int, dict[str, list[str]]] = {}
    for place in places or [""]:
        if place:
            folders, files = _look_into(root / place)
            warnings += _stray_files(root / place, files)
        listing[SPLITS.index(place or SPLITS[TEST])] = {name: _class_files(root, place, name) for name in folders}
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
    return _flatten(root, names, listing, frozenset(), warnings)


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(map(display_path, names[:5])) + (", …" if len(names) > 5 else "")


def _look_into(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the other entries in a folder, each sorted bytewise."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not _is_hidden(entry.name)]
            folders = [entry.name for entry in visible if entry.is_dir()]
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
    known = set(folders)
    files = [entry.name for entry in visible if entry.name not in known]
    return sorted(folders, key=os.fsencode), sorted(files, key=os.fsencode)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


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
    has_splits = any(_look_into(root / name)[0] for name, split in meant.items() if split == "train")
    if not has_splits and len(meant) < len(folders):
        return {TRAIN: ""}
    for name, split in meant.items():
        if name != split:
            raise DatasetError(
                f"{root} has a folder {name}: splits are called train, val and test; rename it to {split}"
            )
    if "train" not in meant:
        raise DatasetError(f"{root} has {' and '.join(meant)}, but no train; {_LAYOUTS}")
    others = [display_path(name) for name in folders if name not in meant]
    if others:
        warnings.append(f"folders beside train were left out: {', '.join(others[:3])}")
    return {SPLITS.index(name): name for name in SPLITS if name in meant}


def _class_files(root: Path, folder: str, name: str) -> list[str]:
    """Return the files of one class, relative to `root`."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(f"the name of the class {display_path(name)} is not UTF-8; rename the folder") from error
    prefix = f"{folder}/{name}/" if folder else f"{name}/"
    return [prefix + path for path in find_files(root / prefix) if not any(map(_is_hidden, path.split("/")))]


def _check_classes(root: Path, listing: dict[int, dict[str, list[str]]], warnings: list[str]) -> tuple[str, ...]:
    """Return the class names, which are those of train; hold the other splits against them."""
    train = listing[TRAIN]
    if not train:
        raise DatasetError(f"{root}/train has no class folders; {_LAYOUTS}")
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
            raise DatasetError(f"{root}/{SPLITS[split]} holds no images in class folders; fill it, or remove it")
        if unknown := sorted(filled - set(train)):
            raise DatasetError(
                f"class {unknown[0]!r} of {root} is in {SPLITS[split]}, but not in train; "
                "add it to train, or remove it there"
            )
        if missing := [name for name in train if name not in filled]:
            warnings.append(f"{SPLITS[split]} has no images of {len(missing)} classes: {', '.join(missing[:5])}")
    return tuple(train)


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
