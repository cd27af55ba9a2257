"""Find files, or read which there are from a list; pass over those that are not wanted; read their bytes.

All in one fixed order and in bounded memory, and never hanging on what is no file. Nothing here knows what an image
is, and nothing is passed over in silence: what cannot be walked is yielded itself.
"""

from __future__ import annotations

import codecs
import errno
import fnmatch
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.listing import FOLDER_MARK, sorted_names

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = [
    "MAX_FILE_BYTES",
    "FileFilter",
    "count_files",
    "display_path",
    "find_files",
    "read_file",
    "read_file_list",
    "require_folder",
]

MAX_FILE_BYTES: Final = 2**30

_RECORD_BYTES: Final = 2**16
"""Of a list of files: what tells its separator, and the longest record; a path has at most 4,096 bytes on Linux."""

_Identity = tuple[int, int]
"""Device and inode: which folder it is, by whatever path."""


def find_files(root: Path, *, after: str | None = None) -> Iterator[str]:
    """Yield every file below a folder, depth first, the names of each folder sorted bytewise.

    Links are followed; a link back to a folder that is being walked, and a folder that cannot be listed, are yielded
    themselves, so that nothing is passed over in silence. A folder is read to its end before its first file comes;
    one of more than 200,000 names is put in order in a temporary file, so memory stays bounded.

    Args:
        root: an existing folder.
        after: a path relative to `root`, which need not be there any more: yield only what comes behind it in this
            order. Of what comes before, only the folders on the way to it are listed.
    Yields:
        Paths relative to `root`, with `/`; undecodable bytes as surrogates (PEP 383), so `root / path` opens.
    Raises:
        DatasetError: `root` is not a folder that can be listed.
        StorageError: there is no room for the temporary file.
    """
    base = os.fsencode(root)
    # A stack of iterators, not recursion: trees may be deeper than Python's recursion limit.
    stack = _start_walk(root, os.fsencode(after).split(b"/") if after is not None else [])
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
                stack.append(_enter(base, path, stack))
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


class _Folder(NamedTuple):
    """A folder that is being walked: its path relative to the root, ending in `/`, and the names that are left."""

    prefix: bytes
    identity: _Identity
    names: Iterator[bytes]


def _start_walk(root: Path, after: list[bytes]) -> list[_Folder]:
    """Return the folders that are being walked when the walk has just passed the path `after`, given by its parts."""
    require_folder(root)
    base = os.fsencode(root)
    try:
        stack = [_enter(base, b"", [], after[0] if after else b"")]
    except OSError as error:
        shown = display_path(str(root))
        raise DatasetError(f"cannot list {shown}: {error.strerror}; check its permissions") from error
    for part, behind in pairwise([*after, b""]):
        if part in (b"", b".", b".."):  # in no path that a walk gives, and `..` would lead out of the root
            break
        try:
            stack.append(_enter(base, stack[-1].prefix + part, stack, behind))
        except OSError:
            break  # a file, gone, or a folder that is yielded itself: it does not come behind `after`
    return stack


def _enter(base: bytes, path: bytes, walking: list[_Folder], behind: bytes = b"") -> _Folder:
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
    return _Folder(path + b"/" if path else b"", identity, sorted_names(place, behind))


def _identify(folder: bytes) -> _Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


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
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False
            if is_folder:
                folders.append(prefix + entry.name)
            elif admitted is None or admitted.admits(os.fsdecode(prefix + entry.name)):
                count += 1
    return count, folders


@dataclass(frozen=True)
class FileFilter:
    """Which files are wanted, by shell patterns: `*`, `?`, `[abc]` and `[!abc]`, as in Python's `fnmatch`.

    Case counts on every system. A pattern without `/` is compared with the file's name, one with `/` with its whole
    path relative to the folder, where `*` stands for any number of folders too: `cats/*` is all that is below `cats`.

    Args:
        include: a file must match one of these, if there are any.
        exclude: a file must match none of these.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    _included: _Patterns = field(init=False, repr=False, compare=False)
    _excluded: _Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_included", _compile(self.include))
        object.__setattr__(self, "_excluded", _compile(self.exclude))

    def admits(self, path: str) -> bool:
        """Return whether a file is wanted.

        Args:
            path: relative to the folder, with `/`, as `find_files` gives it.
        """
        name = path[path.rfind("/") + 1 :]
        if self.include and not self._included.match(name, path):
            return False
        return not (self.exclude and self._excluded.match(name, path))


class _Patterns(NamedTuple):
    """Patterns of names and of paths, each kind in one expression; None where there are none of a kind."""

    of_name: re.Pattern[str] | None
    of_path: re.Pattern[str] | None

    def match(self, name: str, path: str) -> bool:
        if self.of_name is not None and self.of_name.match(name):
            return True
        return self.of_path is not None and self.of_path.match(path) is not None


def _compile(patterns: Iterable[str]) -> _Patterns:
    def unite(some: list[str]) -> re.Pattern[str] | None:
        return re.compile("|".join(fnmatch.translate(pattern) for pattern in some)) if some else None

    wanted = list(patterns)
    return _Patterns(
        unite([each for each in wanted if "/" not in each]), unite([each for each in wanted if "/" in each])
    )


def read_file_list(source: str) -> Iterator[str]:
    """Yield the paths that a list names, as they come, each as it is written there but for a leading `./`.

    Records end with a newline, or a NUL if there is one in the first 64 KiB, so both `find` and `find -print0` are
    understood. In a list of lines, a carriage return at the end of one and a byte order mark are no part of a path.

    Args:
        source: a text file, or `-` for standard input.
    Yields:
        Paths with undecodable bytes as surrogates (PEP 383); not looked at, and empty ones left out.
    Raises:
        DatasetError: the list cannot be read, or is none: a record exceeds 64 KiB.
    """
    shown = "standard input" if source == "-" else display_path(source)
    try:
        if source != "-":
            with open(source, "rb") as file:
                yield from _read_records(file, shown)
        elif sys.stdin is None:
            raise DatasetError("cannot read the list of files from standard input: it is closed; give a file's name")
        else:
            yield from _read_records(cast("BufferedReader", sys.stdin.buffer), shown)
    except OSError as error:
        raise DatasetError(f"cannot read the list of files from {shown}: {error.strerror}; check the path") from error


def _read_records(file: BufferedReader, shown: str) -> Iterator[str]:
    """Yield the paths of an open list; `read1` hands on what has come, and waits for no more."""
    part = b""
    while b"\0" not in part and (more := file.read1(_RECORD_BYTES - len(part))):
        part += more
    separator = b"\0" if b"\0" in part else b"\n"
    if separator == b"\n":
        part = part.removeprefix(codecs.BOM_UTF8)
    rest = b""
    while part or rest:
        *records, rest = (rest + (part or separator)).split(separator)
        if any(len(record) > _RECORD_BYTES for record in (*records[:1], rest)):  # the others are within one part
            raise DatasetError(
                f"{shown} is no list of files: a record exceeds {_RECORD_BYTES:,} bytes; give one path a line"
            )
        for record in records:
            path = _strip(record, separator)
            if path:
                yield os.fsdecode(path)
        part = part and file.read1(_RECORD_BYTES)


def _strip(record: bytes, separator: bytes) -> bytes:
    """Return the path that a record holds: `./a` is the row `a`, as it is when the folder itself is searched."""
    if separator == b"\n":
        record = record.removesuffix(b"\r")
    if record.startswith(b"./"):
        return record[2:].lstrip(b"/") or record  # `.//a` is no absolute path
    return record


def display_path(path: str) -> str:
    """Return a path as text that any UTF-8 file can hold: undecodable bytes become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_file(path: Path | str) -> bytes:
    """Read a file's bytes, refusing what could hang or never end.

    Raises:
        ImageError: kinds `not_found`, `not_a_file`, `unreadable`, `empty`, `too_large`.
    """
    try:
        # Non-blocking, so that a pipe that takes the file's place between listing and reading cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            data = _read_regular(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise ImageError("not_found", "no such file, or a link to nothing") from error
    except OSError as error:
        # A socket cannot be opened at all (ENXIO); its type says more than the errno.
        regular = _is_regular(path)
        kind = "unreadable" if regular else "not_a_file"
        raise ImageError(kind, error.strerror if regular and error.strerror else "not a regular file") from error
    except ValueError as error:  # from a list; no system knows such a path
        raise ImageError("not_found", "a path with a NUL byte is the name of no file") from error
    if not data:
        raise ImageError("empty", "the file has no bytes")
    return data


def _read_regular(descriptor: int) -> bytes:
    """Read an open file to its end, if it is a regular one; straight system calls, for there may be millions."""
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("not_a_file", "a folder that cannot be walked")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not_a_file", "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError("too_large", f"{status.st_size:,} bytes; at most {MAX_FILE_BYTES:,}")
    data = os.read(descriptor, status.st_size + 1)
    if len(data) == status.st_size:  # one byte less than asked for: that was the end
        return data
    parts = [data]  # it grows while it is read, or the read was cut short
    received = len(data)
    while part := os.read(descriptor, 2**20):
        parts.append(part)
        received += len(part)
        if received > MAX_FILE_BYTES:
            raise ImageError("too_large", f"more than {MAX_FILE_BYTES:,} bytes")
    return b"".join(parts)


def _is_regular(path: Path | str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True  # forbidden or looping: the error that was raised says it better
