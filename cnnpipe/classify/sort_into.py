"""Sort classified files into a folder per class, as hard links where the file system allows, else as copies.

    <target>/<label>/<path as in the table>        _uncertain/ instead of <label>/ below the least probability

Labels come from a model and paths from a table, and either may be a stranger's: whatever they hold, nothing is written
outside the target. Nothing is overwritten: a file that has the name already stays, and the new one gets a number.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import logging
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np

from cnnpipe.classify.table import Prediction
from cnnpipe.errors import AlreadyThereError, PredictionsError, StorageError, one_line
from cnnpipe.images.leftovers import SORTED_MARK
from cnnpipe.paths import escape_path, unescape_path
from cnnpipe.storage import make_folder, storage_errors, write_file

UNCERTAIN_FOLDER: Final = "_uncertain"
"""Folder of the files below the least probability; no label has this folder."""

_MAX_NAME_BYTES: Final = 255
_MAX_PROBLEMS_LOGGED: Final = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SortedFiles:
    """Counts of a sorting; `linked + copied + already_there + left_out + failed` is the number of rows."""

    linked: int
    copied: int
    already_there: int
    """Files that the target has already, by this name and with this content, as after an earlier sorting."""
    left_out: int
    """Rows without a label; their errors are in the table."""
    failed: int
    """Files that are gone, cannot be read, or whose name is too long for the target; the first are in the log."""
    uncertain: int
    """Files in `_uncertain`; they are counted above too."""
    renamed: int
    """Linked or copied files that got a number because another file has their name; they are counted above too."""


class _UnsortableFileError(Exception):
    """One file cannot be sorted; the message says why."""


def check_target(root: Path, target: Path) -> None:
    """Refuse a folder that cannot take the sorted files, before any work is done.

    Args:
        root: the folder that was classified.
    Raises:
        PredictionsError: the target is a file, or one of the two folders is in the other.
    """
    shown = escape_path(str(target))
    if os.path.lexists(target) and not target.is_dir():
        raise PredictionsError(f"cannot sort into {shown}: it is not a folder; name another")
    real_root, real_target = Path(os.path.realpath(root)), Path(os.path.realpath(target))
    if real_target.is_relative_to(real_root) or real_root.is_relative_to(real_target):
        raise PredictionsError(
            f"cannot sort {escape_path(str(root))} into {shown}: one is in the other, and the sorted files would be "
            "classified next time; name a folder beside it"
        )


def sort_files(rows: Iterator[Prediction], root: Path, target: Path, min_probability: float) -> SortedFiles:
    """Link or copy every classified file into the folder of its most likely class.

    A copy keeps the original's date. Files that an earlier sorting put into the target stay, and the same rows again
    change nothing.

    Args:
        rows: the rows of a finished table.
        root: the folder that the paths in the rows are relative to.
        min_probability: 0-1; files below it go to `_uncertain`.
    Raises:
        PredictionsError: as `check_target`.
        StorageError: the target cannot be written, or has a link or a file where a folder is needed.
    """
    check_target(root, target)
    make_folder(target)
    is_uncertain = uncertainty_test(min_probability)
    make_class_folder = lru_cache(16_384)(_make_class_folder)  # asking twice costs as much as a link
    counts: Counter[str] = Counter()
    for row in rows:
        if row.status != "ok":
            counts["left_out"] += 1
            continue
        uncertain = is_uncertain(row.probabilities[0])
        folder = UNCERTAIN_FOLDER if uncertain else label_folder(row.labels[0])
        try:
            source = _find_source(root, row.path)
            name = f"{folder}/{path_in_folder(row.path)}"
            counts.update(_sort_file(*source, name, str(target), make_class_folder))
            counts["uncertain"] += uncertain
        except _UnsortableFileError as error:
            counts["failed"] += 1
            if counts["failed"] <= _MAX_PROBLEMS_LOGGED:
                _logger.warning("not sorted: %s: %s", row.path.encode("utf-8", "backslashreplace").decode(), error)
    if (num_more := counts["failed"] - _MAX_PROBLEMS_LOGGED) > 0:
        _logger.warning("%d more files could not be sorted", num_more)
    return SortedFiles(**{field.name: counts[field.name] for field in fields(SortedFiles)})


def mark_target(target: Path) -> None:
    """Put `SORTED_MARK` into an empty or new target, so that classifying a folder above it skips the second names.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(target)
    with storage_errors(target):
        if not any(target.iterdir()):
            (target / SORTED_MARK).touch()


def uncertainty_test(min_probability: float) -> Callable[[float], bool]:
    """Return a function that tells whether a probability from a table is below the least one.

    Both are compared as float32: a text table holds the shortest decimals of one, Parquet the number itself.
    """
    least = np.float32(min_probability)
    return lambda probability: bool(np.float32(probability) < least)


@lru_cache(maxsize=4096)
def label_folder(label: str) -> str:
    """Return the name of a label's folder: the label itself, or if no folder can be called so, a similar name.

    The similar name ends with a digest of the label, so that no two labels share a folder.
    """
    # Unusable are `/`, control characters, lone surrogates, and a dot that would hide the folder.
    name = re.sub("[/\x00-\x1f\x7f\ud800-\udfff]|^\\.", "_", label)
    if name != label or not name or name.casefold() == UNCERTAIN_FOLDER:
        name += _digest_mark(label)
    return _shorten(name)


def path_in_folder(path: str) -> str:
    """Return the path that a file gets in its class folder: that in the table, without a leading `/` and any `..`."""
    return "/".join(_shorten(part) for part in path.split("/") if part not in ("", ".", ".."))


def _find_source(root: Path, shown: str) -> tuple[str, os.stat_result]:
    """Return the path of a row's file, with links resolved, and its status."""
    try:
        path = os.path.join(root, shown)
        if not os.path.lexists(path):
            path = str(unescape_path(root, shown))
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)  # a hard link to a symbolic link would break with what that points to
            status = os.stat(path)
    except FileNotFoundError as error:
        raise _UnsortableFileError("the file is gone") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        raise _UnsortableFileError(one_line(getattr(error, "strerror", None) or error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise _UnsortableFileError("it is not a file any more")
    return path, status


def _make_class_folder(target: str, path: str) -> None:
    """Create a folder of the target and the folders above it; refuse links, which might lead out of the target."""
    folder = Path(target)
    for part in path.split("/"):
        folder /= part
        try:
            folder.mkdir()
        except FileExistsError:
            if folder.is_symlink() or not folder.is_dir():
                shown = escape_path(str(folder))
                message = f"cannot sort into {shown}: it is not a folder; remove it, or sort into another folder"
                raise StorageError(message) from None


def _sort_file(
    source: str, status: os.stat_result, name: str, target: str, make_class_folder: Callable[[str, str], None]
) -> list[str]:
    """Give a file a name in the target, or that with a number if another file has it; return the counts that grow."""
    try:
        make_class_folder(target, name.rpartition("/")[0])
        for number in count(1):
            destination = f"{target}/{name if number == 1 else _with_mark(name, f'-{number}')}"
            try:
                outcome = _link_or_copy(source, status, Path(destination))
            except (FileExistsError, AlreadyThereError):
                if _is_same_file(source, status, destination):
                    return ["already_there"]
            else:
                return [outcome] if number == 1 else [outcome, "renamed"]
        raise AssertionError  # the numbers do not end
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _UnsortableFileError("its name is too long for the target") from error
        with storage_errors(Path(escape_path(f"{target}/{name}"))):
            raise


def _link_or_copy(source: str, status: os.stat_result, destination: Path) -> str:
    """Make a hard link, or where that is impossible a copy with the source's date, and return which."""
    try:
        os.link(source, destination)
        return "linked"
    except OSError as error:
        # File systems report in many ways that there are no hard links; any other problem stops the copy too.
        if error.errno in (errno.EEXIST, errno.ENAMETOOLONG):
            raise
        if os.path.lexists(destination):
            raise FileExistsError from error
    try:
        content = Path(source).open("rb")  # noqa: SIM115  closed below; only a failure to open is the source's
    except OSError as error:
        raise _UnsortableFileError(error.strerror or "it cannot be read") from error
    with content, write_file(destination, replace=False) as temporary, storage_errors(destination):
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file, 2**20)
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
    return "copied"


def _is_same_file(source: str, status: os.stat_result, destination: str) -> bool:
    """Return whether a name in the target is the source itself or a copy of it, so that sorting again adds nothing."""
    there = os.lstat(destination)
    if os.path.samestat(there, status):
        return True
    if not stat.S_ISREG(there.st_mode) or there.st_size != status.st_size:
        return False
    try:
        return filecmp.cmp(source, destination, shallow=False)
    except OSError as error:
        raise _UnsortableFileError(f"cannot be compared with the file of its name: {error.strerror}") from error


def _shorten(name: str) -> str:
    """Return a name that a file system takes: of one that is too long, the beginning, a digest and the suffix."""
    return name if len(os.fsencode(name)) <= _MAX_NAME_BYTES else _with_mark(name, _digest_mark(name))


def _digest_mark(name: str) -> str:
    return f"~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _with_mark(path: str, mark: str) -> str:
    """Return `folder/name-2.jpg` for `folder/name.jpg` and `-2`; cuts the name where it would be too long."""
    folder, slash, name = path.rpartition("/")
    stem, suffix = Path(name).stem, Path(name).suffix
    ending = (mark + suffix)[: _MAX_NAME_BYTES // 4]  # a letter has up to 4 bytes
    room = _MAX_NAME_BYTES - len(os.fsencode(ending))
    return f"{folder}{slash}{os.fsencode(stem)[:room].decode('utf-8', 'ignore')}{ending}"
