"""Find the files below a folder: in one fixed order, from any place on, and in bounded memory.

What cannot be walked is yielded itself. What `cnnpipe.images.leftovers` tells of is passed over, and counted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from cnnpipe.errors import DatasetError
from cnnpipe.files import display_path
from cnnpipe.images.leftovers import TELLING_NAMES, is_own_folder
from cnnpipe.images.listing import FOLDER_MARK, list_entries, sorted_names
from cnnpipe.images.selection import FileFilter

__all__ = ["count_files", "find_files", "has_files", "require_folder"]

_Identity = tuple[int, int]
"""Device and inode: which folder it is, by whatever path."""


def find_files(root: Path, *, after: str | None = None, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Yield every file below a folder, depth first, the names of each folder sorted bytewise.

    What systems leave there and what cnnpipe wrote is passed over (`cnnpipe.images.leftovers`).

    Links are followed; a link back to a folder that is being walked, and a folder that cannot be listed, are yielded
    themselves, so that nothing is passed over in silence. A folder is read to its end before its first file comes;
    one of more than 200,000 names is put in order in a temporary file, so memory stays bounded.

    Args:
        root: an existing folder.
        after: a path relative to `root`, which need not be there any more: yield only what comes behind it in this
            order. Of what comes before, only the folders on the way to it are listed.
        passed_over: counts the files and folders that are passed over, by what to call them.
    Yields:
        Paths relative to `root`, with `/`; undecodable bytes as surrogates (PEP 383), so `root / path` opens.
    Raises:
        DatasetError: `root` is not a folder that can be listed.
        StorageError: there is no room for the temporary file.
    """
    base = os.fsencode(root)
    passed_over = Counter() if passed_over is None else passed_over
    # A stack of iterators, not recursion: trees may be deeper than Python's recursion limit.
    stack = _start_walk(root, os.fsencode(after).split(b"/") if after is not None else [], passed_over)
    encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    while stack:
        folder = stack[-1]
        prefix = os.fsdecode(folder.prefix)
        for name in folder.names:
            if name[-1]:  # no FOLDER_MARK; there may be millions, so nothing more is done for a file
                yield prefix + name.decode(encoding, errors)
                continue
            path = folder.prefix + name.removesuffix(FOLDER_MARK)
            try:
                stack.append(_enter(base, path, stack, passed_over))
            except OSError:
                yield os.fsdecode(path)  # reading it says what is wrong, in its own row
            else:
                break
        else:
            stack.pop()


def require_folder(root: Path) -> None:
    """Raise DatasetError unless `root` is a folder."""
    try:
        problem = "" if stat.S_ISDIR(os.stat(root).st_mode) else "it is a file"
    except FileNotFoundError:
        problem = "it does not exist"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise DatasetError(f"need a folder of images, received {display_path(str(root))}: {problem}; check the path")


def _not_listed(root: Path, error: OSError) -> DatasetError:
    return DatasetError(f"cannot list {display_path(str(root))}: {error.strerror}; check its permissions")


class _Folder(NamedTuple):
    """A folder that is being walked: its path relative to the root, ending in `/`, and the names that are left."""

    prefix: bytes
    identity: _Identity
    names: Iterator[bytes]


def _start_walk(root: Path, after: list[bytes], passed_over: Counter[str]) -> list[_Folder]:
    """Return the folders that are being walked when the walk has just passed the path `after`, given by its parts."""
    require_folder(root)
    base = os.fsencode(root)
    try:
        stack = [_enter(base, b"", [], passed_over, after[0] if after else b"")]
    except OSError as error:
        raise _not_listed(root, error) from error
    for part, behind in pairwise([*after, b""]):
        if part in (b"", b".", b".."):  # in no path that a walk gives, and `..` would lead out of the root
            break
        try:
            stack.append(_enter(base, stack[-1].prefix + part, stack, passed_over, behind))
        except OSError:
            break  # a file, gone, or a folder that is yielded itself: it does not come behind `after`
    return stack


def _enter(base: bytes, path: bytes, walking: list[_Folder], passed_over: Counter[str], behind: bytes = b"") -> _Folder:
    """List a folder.

    Args:
        path: relative to `base`, which is the root.
        behind: leave out the names up to this one.
    Raises:
        OSError: it cannot be listed, or a link has led back to a folder that is being walked.
    """
    place = os.path.join(base, path)
    identity = _identify(place)
    if any(identity == folder.identity for folder in walking):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    names = sorted_names(place, passed_over, behind, is_root=not path)
    return _Folder(path + b"/" if path else b"", identity, names)


def _identify(folder: bytes) -> _Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def has_files(root: Path, number: int = 1) -> bool:
    """Say whether a folder has so many files, and look no further than that takes.

    Raises:
        DatasetError: `root` is not a folder that can be listed.
    """
    require_folder(root)
    first = os.fsencode(root)
    pending, count = [first], 0
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    count += 1  # or a link to a folder, which stands for the files in it
                    if count >= number:
                        return True
        except OSError as error:
            if folder == first:
                raise _not_listed(root, error) from error
            count += 1  # a folder that cannot be listed is a row
    return count >= number


def count_files(root: Path, admitted: FileFilter | None = None) -> int:
    """Count what `find_files` yields, without putting it in order; quick, and meant for the display of progress.

    Args:
        admitted: count only what it admits.
    Returns:
        The number of files; 0 if `root` is not a folder that can be listed. Raises nothing.
    """
    base, count = os.fsencode(root), 0
    pending: list[tuple[bytes, tuple[_Identity, ...]]] = [(b"", ())]
    while pending:
        path, walking = pending.pop()
        place = os.path.join(base, path)
        try:
            identity = _identify(place)
            if identity in walking:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            files, folders = _scan(place, path + b"/" if path else b"", admitted)
        except OSError:
            count += path != b"" and (admitted is None or admitted.admits(os.fsdecode(path)))
            continue
        count += files
        within = (*walking, identity)
        pending += [(folder, within) for folder in folders]
    return count


def _scan(folder: bytes, prefix: bytes, admitted: FileFilter | None) -> tuple[int, list[bytes]]:
    """Return how many admitted files a folder holds, and the paths of the folders in it."""
    count = 0
    folders: list[bytes] = []
    telling: list[bytes] = []
    inside: Counter[str] = Counter()
    for name, is_folder in list_entries(folder, inside):
        if is_folder:
            folders.append(prefix + name)
        elif admitted is None or admitted.admits(os.fsdecode(prefix + name)):
            count += 1
        if name in TELLING_NAMES:
            telling.append(name)
    is_own = prefix and is_own_folder([*telling, *map(os.fsencode, inside)])
    return (0, []) if is_own else (count, folders)
