"""Sort classified files into a folder for each class, by hard links where the file system allows, else by copies.

    <target>/<label>/<path as in the table>        _uncertain/ instead of <label>/ below the least probability

Labels come from a stranger's model and paths from a stranger's list, so both are made harmless first: whatever they
hold, nothing is written outside the target. Nothing is ever overwritten either: the same file is found to be there
already, another one of the same name stays, and the new one gets a number.
"""

from __future__ import annotations

import errno
import filecmp
import logging
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cnnpipe.classify.safe_names import UNCERTAIN_FOLDER, harmless_path, label_folder, numbered_path
from cnnpipe.classify.table import Prediction
from cnnpipe.errors import AlreadyThereError, PredictionsError, StorageError
from cnnpipe.files import display_path, source_path
from cnnpipe.images.leftovers import SORTED_MARK
from cnnpipe.storage import make_folder, storage_errors, write_file

__all__ = ["SortedFiles", "check_target", "mark_target", "sort_files", "uncertainty_test"]

_MAX_KNOWN_FOLDERS: Final = 16_384
_PROBLEMS_LOGGED: Final = 5

# Ways to say that there can be no hard link: another disk, none on this one, somebody else's file, too many already.
_NO_HARD_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EINVAL,
                                  errno.ENOTSUP, errno.EOPNOTSUPP})  # fmt: skip

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SortedFiles:
    """What became of the rows: `linked + copied + already_there + left_out + failed` are all of them."""

    linked: int
    copied: int
    already_there: int
    """The same file or the same content has that name, as after an earlier sorting."""
    left_out: int
    """Rows without a label; their errors are in the table."""
    failed: int
    """Files that are gone or cannot be read any more, or whose name is too long for the target; see the log."""
    uncertain: int
    """Of those that are there now, how many are in `_uncertain`."""
    renamed: int
    """Of the linked and copied, how many got a number, because another file had the name."""


class _UnusableSourceError(Exception):
    """The file of a row cannot be sorted; the message says why."""


def check_target(root: Path, target: Path) -> None:
    """Refuse a folder that cannot take the sorted files, before any work is done.

    Args:
        root: the folder that was classified.
    Raises:
        PredictionsError: the target is a file, or one of the two folders is in the other.
    """
    if os.path.lexists(target) and not target.is_dir():
        raise PredictionsError(f"cannot sort into {display_path(str(target))}: it is no folder; name another")
    base, own = Path(os.path.realpath(root)), Path(os.path.realpath(target))
    if own.is_relative_to(base) or base.is_relative_to(own):
        raise PredictionsError(
            f"cannot sort {display_path(str(root))} into {display_path(str(target))}: one is in the other, and the "
            "sorted files would be classified next time; name a folder beside it"
        )


def sort_files(rows: Iterator[Prediction], root: Path, target: Path, min_probability: float) -> SortedFiles:
    """Give every classified file a name in the folder of its likeliest class.

    A hard link is the same file under a second name: who edits one edits both. A copy is a file of its own, with the
    original's date. What an earlier sorting put into the target stays, and the same rows again change nothing.

    Args:
        rows: of a finished table, with `path` as it is there.
        root: the folder that the paths are relative to.
        min_probability: 0-1; files below it go to `_uncertain`.
    Raises:
        PredictionsError: as `check_target`.
        StorageError: the target cannot be written, or has a link or a file where a folder must be.
    """
    check_target(root, target)
    sorter = _Sorter(root, make_folder(target), uncertainty_test(min_probability))
    for row in rows:
        sorter.add(row)
    return sorter.result()


def mark_target(target: Path) -> None:
    """Put `SORTED_MARK` into a target that holds nothing yet, so that no folder above it counts the same images twice.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(target)
    with storage_errors(target):
        if not any(target.iterdir()):
            (target / SORTED_MARK).touch()


def uncertainty_test(min_probability: float) -> Callable[[float], bool]:
    """Return a function that says whether a probability in a table is below the least one.

    Both are compared as float32, which is what the model gave: a table in text holds its shortest decimals, another
    the number itself, and both must give the same answer.
    """
    least = np.float32(min_probability)
    return lambda probability: bool(np.float32(probability) < least)


class _Sorter:
    """Puts files into the target, and counts what became of them."""

    def __init__(self, root: Path, target: Path, is_uncertain: Callable[[float], bool]) -> None:
        self._root, self._target = str(root), str(target)
        self._is_uncertain = is_uncertain
        self._folders = _Folders(self._target)
        self._counts: Counter[str] = Counter()

    def add(self, row: Prediction) -> None:
        """Put the file of one row where it belongs.

        Raises:
            StorageError: that cannot be written.
        """
        if row.status != "ok":
            self._counts["left_out"] += 1
            return
        uncertain = self._is_uncertain(row.probabilities[0])
        folder = UNCERTAIN_FOLDER if uncertain else label_folder(row.labels[0])
        try:
            self._counts[self._put(row.path, folder)] += 1
        except _UnusableSourceError as error:
            self._log_problem(row.path, str(error))
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self._log_problem(row.path, "its name is too long for the target")
                return
            with storage_errors(Path(display_path(f"{self._target}/{folder}/{row.path}"))):
                raise
        else:
            self._counts["uncertain"] += uncertain

    def result(self) -> SortedFiles:
        """Return the counts; says in the log what was not said there yet."""
        if (unsaid := self._counts["failed"] - _PROBLEMS_LOGGED) > 0:
            _logger.warning("%d more files could not be sorted", unsaid)
        names = SortedFiles.__dataclass_fields__
        return SortedFiles(**{name: self._counts[name] for name in names})

    def _put(self, shown: str, folder: str) -> str:
        """Link or copy one file, and return which count it belongs to."""
        source, status = _find_source(self._root, shown)
        path = f"{folder}/{harmless_path(shown)}"
        self._folders.make(path.rpartition("/")[0])
        wanted = destination = f"{self._target}/{path}"
        number = 1
        while True:
            try:
                outcome = _link_or_copy(source, status, destination)
            except FileExistsError:
                if _is_same_file(source, status, destination):
                    return "already_there"
                number += 1
                destination = numbered_path(wanted, number)
            else:
                self._counts["renamed"] += number > 1
                return outcome

    def _log_problem(self, shown: str, problem: str) -> None:
        self._counts["failed"] += 1
        if self._counts["failed"] <= _PROBLEMS_LOGGED:
            readable = shown.encode("utf-8", "backslashreplace").decode()
            _logger.warning("not sorted: %s: %s", readable, problem)


class _Folders:
    """Makes folders in the target, and remembers a bounded number of them, because asking costs as much as linking."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._known: set[str] = set()

    def make(self, path: str) -> None:
        """Create a folder and its parents where they are missing.

        Raises:
            StorageError: something else has the name; a link might lead out of the target.
            OSError: it cannot be created.
        """
        if path in self._known:
            return
        if len(self._known) >= _MAX_KNOWN_FOLDERS:
            self._known.clear()
        for end in [*(match.start() for match in re.finditer("/", path)), len(path)]:
            if (part := path[:end]) not in self._known:
                self._make_one(f"{self._target}/{part}")
                self._known.add(part)

    @staticmethod
    def _make_one(folder: str) -> None:
        try:
            Path(folder).mkdir()
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise StorageError(
                    f"cannot sort into {display_path(folder)}: it is no folder; remove it or sort into another folder"
                ) from None


def _find_source(root: str, shown: str) -> tuple[str, os.stat_result]:
    """Return the path of a row's file, links resolved, and its status.

    Raises:
        _UnusableSourceError: it is gone, or no file any more.
    """
    try:
        source = os.path.join(root, shown)
        try:
            status = os.lstat(source)
        except OSError:
            source = str(source_path(Path(root), shown))
            status = os.lstat(source)
        if stat.S_ISLNK(status.st_mode):
            source = os.path.realpath(source)  # a link to a link to the content would break with the first of them
            status = os.stat(source)
    except FileNotFoundError as error:
        raise _UnusableSourceError("the file is gone") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a character
        raise _UnusableSourceError(" ".join(str(getattr(error, "strerror", None) or error).split())) from error
    if not stat.S_ISREG(status.st_mode):
        raise _UnusableSourceError("it is not a file any more")
    return source, status


def _link_or_copy(source: str, status: os.stat_result, destination: str) -> str:
    """Make a hard link, or a copy where there can be none, and return which.

    Raises:
        FileExistsError: something has the name.
        _UnusableSourceError: the source cannot be read.
        StorageError, OSError: the destination cannot be written.
    """
    try:
        os.link(source, destination)
        return "linked"
    except FileNotFoundError as error:
        if not os.path.lexists(source):
            raise _UnusableSourceError("the file is gone") from error
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
    if os.path.lexists(destination):
        raise FileExistsError
    _copy(source, status, Path(destination))
    return "copied"


def _copy(source: str, status: os.stat_result, destination: Path) -> None:
    """Copy content and date, whole or not at all; raises as `_link_or_copy`."""
    try:
        content = Path(source).open("rb")  # noqa: SIM115  closed below; here, what is refused is the source's fault
    except OSError as error:
        raise _UnusableSourceError(error.strerror or "it cannot be read") from error
    try:
        with content, write_file(destination, replace=False) as temporary, storage_errors(destination):
            with temporary.open("wb") as file:
                shutil.copyfileobj(content, file, 2**20)
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
    except AlreadyThereError as error:
        raise FileExistsError from error


def _is_same_file(source: str, status: os.stat_result, destination: str) -> bool:
    """Tell whether a name in the target is the source itself or a copy of it; a link is neither."""
    there = os.lstat(destination)
    if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
        return True
    if not stat.S_ISREG(there.st_mode) or there.st_size != status.st_size:
        return False
    try:
        return filecmp.cmp(source, destination, shallow=False)
    except OSError as error:
        raise _UnusableSourceError(f"cannot be compared with the file of its name: {error.strerror}") from error
