"""Find the files below a folder: in one fixed order, from any place on, and in bounded memory.

What cannot be walked is yielded itself. What `cnnpipe.images.leftovers` tells of is passed over, and counted.
"""

from __future__ import annotations

import codecs
import errno
import fnmatch
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from cnnpipe.errors import DatasetError, one_line
from cnnpipe.files import display_path, user_path
from cnnpipe.images.leftovers import TELLING_NAMES, is_own_folder

if TYPE_CHECKING:
    from io import BufferedReader
import tempfile
from bisect import bisect_right
from contextlib import contextmanager, suppress
from typing import IO

from cnnpipe.errors import StorageError
from cnnpipe.images.leftovers import OWN, SHARDS_SUFFIX, name_leftover

__all__ = [
    "FOLDER_MARK",
    "FileFilter",
    "check_file_list",
    "count_files",
    "find_files",
    "has_files",
    "list_entries",
    "no_listed_file",
    "read_file_list",
    "require_folder",
    "sorted_names",
]

_RECORD_BYTES: Final = 2**16
"""Of a list of files: what tells its separator, and the longest record; a path has at most 4,096 bytes on Linux."""


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


def check_file_list(source: str, root: Path) -> None:
    """Refuse a list that cannot be read or names no file that exists; take nothing from one that comes through a pipe.

    Args:
        root: the folder that its paths are relative to.
    Raises:
        DatasetError: as `read_file_list`, or none of its paths is a file.
    """
    path = user_path(source)
    if source != "-" and (path.is_dir() or not os.access(path, os.R_OK)):
        reason = "it is a folder" if path.is_dir() else "permission denied" if path.exists() else "no such file"
        raise DatasetError(f"cannot read the list of files from {display_path(source)}: {reason}; check the path")
    if source != "-" and path.is_file():
        names = read_file_list(source)
        first = next(names, None)
        if first is not None and not any(_may_be_file(root, name) for name in chain([first], names)):
            raise no_listed_file(source, root, first)


def no_listed_file(source: str, root: Path, first: str) -> DatasetError:
    """Return the error of a list of which no path is a file; `first` is one of them."""
    shown = "standard input" if source == "-" else display_path(source)
    return DatasetError(
        f"no path in the list of files from {shown} is a file in {display_path(str(root))}; one is "
        f"{one_line(repr(display_path(first)))}; check the folder, and save the list as UTF-8"
    )


def _may_be_file(root: Path, name: str) -> bool:
    # Of a list in UTF-16 without a mark, each letter is a path: `.` and `/` are folders.
    return "\0" not in name and os.path.lexists(root / name) and not (root / name).is_dir()


def read_file_list(source: str) -> Iterator[str]:
    """Yield the paths that a list names, as they come, each as it is written there but for a leading `./`.

    Records end with a newline, or a NUL if there is one in the first 64 KiB, so both `find` and `find -print0` are
    understood. A byte order mark at the start, and a carriage return at the end of a line, are not part of a path. A
    list in UTF-16, as PowerShell writes it, is known by its mark.

    Args:
        source: a text file, or `-` for standard input.
    Yields:
        Paths with undecodable bytes as surrogates (PEP 383); not looked at, and empty ones left out.
    Raises:
        DatasetError: the list cannot be read, or is not one: a record exceeds 64 KiB, or its UTF-16 is not valid.
    """
    shown = "standard input" if source == "-" else display_path(source)
    try:
        if source != "-":
            with user_path(source).open("rb") as file:
                yield from _read_records(file, shown)
        else:
            yield from _read_records(cast("BufferedReader", sys.stdin.buffer), shown)
    except OSError as error:
        raise DatasetError(f"cannot read the list of files from {shown}: {error.strerror}; check the path") from error


def _read_records(file: BufferedReader, shown: str) -> Iterator[str]:
    """Yield the paths of an open list as they come."""
    parts = _utf8_parts(file, shown)
    part = b""
    while b"\0" not in part and len(part) < _RECORD_BYTES and (more := next(parts, b"")):
        part += more
    separator = b"\0" if b"\0" in part else b"\n"
    rest = b""
    while part or rest:
        *records, rest = (rest + (part or separator)).split(separator)
        if max(map(len, (*records, rest))) > _RECORD_BYTES:
            raise DatasetError(
                f"{shown} is not a list of files: a record exceeds {_RECORD_BYTES:,} bytes; give one path a line"
            )
        for record in records:
            path = _strip(record, separator)
            if path:
                yield os.fsdecode(path)
        part = part and next(parts, b"")


def _utf8_parts(file: BufferedReader, shown: str) -> Iterator[bytes]:
    """Yield an open list without its byte order mark; `read1` hands on what has come, and waits for no more."""
    start = b""
    while len(start) < len(codecs.BOM_UTF8) and (more := file.read1(_RECORD_BYTES)):
        start += more
    parts = chain([start], iter(lambda: file.read1(_RECORD_BYTES), b""))
    if not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield from filter(None, chain([next(parts).removeprefix(codecs.BOM_UTF8)], parts))
        return
    decoder = codecs.getincrementaldecoder("utf-16")()
    try:
        yield from (text.encode() for part in parts if (text := decoder.decode(part)))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{shown} is not valid UTF-16, which its byte order mark promises: {error.reason}; save it as UTF-8"
        ) from error


def _strip(record: bytes, separator: bytes) -> bytes:
    """Return the path that a record holds: `./a` is the row `a`, as it is when the folder itself is searched."""
    if separator == b"\n":
        record = record.removesuffix(b"\r")
    if record.startswith(b"./"):
        return record[2:].lstrip(b"/") or record  # `.//a` is no absolute path
    return record


FOLDER_MARK: Final = b"\0"
"""Ends the name of a folder in a listing; it is in no name and sorts lowest, so the order stays."""

_NAMES_PER_BLOCK = 200_000
"""Held in memory at a time: some 15 MB; a folder that has more is sorted with a temporary file."""

_READ_BYTES = 2**15
"""Of each sorted block, read back at a time."""

_SEPARATOR: Final = b"/"
"""Between the names in the temporary file: the one byte that is in no name, nor the mark."""


def list_entries(folder: bytes, passed_over: Counter[str]) -> Iterator[tuple[bytes, bool]]:
    """Yield the names in a folder, in no order, and whether each is a folder; leave out what is never an input.

    A link to a folder counts as a folder. Only links are looked at one by one; for the rest the listing says enough.

    Args:
        passed_over: counts what is left out, by what to call it.
    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False  # a link in a circle, or to where we may not look
            if leftover := name_leftover(folder, name, is_folder):
                passed_over[leftover] += 1
            else:
                yield name, is_folder


def sorted_names(folder: bytes, passed_over: Counter[str], behind: bytes = b"", *, is_root: bool) -> Iterator[bytes]:
    """Read a folder to its end now, and return its names in bytewise order, those of folders with `FOLDER_MARK`.

    Args:
        passed_over: as in `list_entries`; a folder that cnnpipe made counts as one, and has no names.
        behind: only names that sort behind this one.
        is_root: whether a user named this folder, so that its names are wanted whoever made it.
    Raises:
        OSError: the folder cannot be listed.
        StorageError: there is no room for the temporary file of a huge folder; at once or by the iterator.
    """
    names: list[bytes] = []
    blocks: _SortedBlocks | None = None
    inside: Counter[str] = Counter()
    for name, is_folder in list_entries(folder, inside):
        if name <= behind:
            continue
        names.append(name + FOLDER_MARK if is_folder else name)
        if len(names) >= _NAMES_PER_BLOCK:
            blocks = blocks or _SortedBlocks()
            blocks.write(names)
            names.clear()
    if blocks is None and not is_root and is_own_folder(folder, chain(names, map(os.fsencode, inside))):
        if not folder.endswith(SHARDS_SUFFIX):  # often of the very job that asks
            passed_over[OWN] += 1
        return iter(())
    passed_over.update(inside)
    if blocks is None:
        names.sort()
        return iter(names)
    blocks.write(names)
    return chain.from_iterable(blocks.merge())


class _SortedBlocks:
    """Names sorted block by block, in a temporary file that has no name and goes with the process or this object.

    Raises:
        StorageError: by every method, for any trouble with the file.
    """

    def __init__(self) -> None:
        self._ends = [0]
        self._file: IO[bytes] | None = None

    def __del__(self) -> None:
        # A walk may be dropped at any point, so there is no `with` that could close it.
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def write(self, names: list[bytes]) -> None:
        """Sort names in place, and add them as a block."""
        if not names:
            return
        names.sort()
        with self._opened() as file:
            file.write(_SEPARATOR.join(names) + _SEPARATOR)
            file.flush()
            self._ends.append(file.tell())

    def merge(self) -> Iterator[list[bytes]]:
        """Yield all names in order, some thousands at a time.

        Not name by name: whatever does not exceed the least of the last names read of each block is all there, and
        sorting it merges what is in order already, at the speed of C.
        """
        readers = [self._read(start, end) for start, end in pairwise(self._ends)]
        heads = [next(reader) for reader in readers]
        while heads:
            limit = min(head[-1] for head in heads)
            ready: list[bytes] = []
            for index, head in enumerate(heads):
                cut = bisect_right(head, limit)
                ready += head[:cut]
                heads[index] = head[cut:] or next(readers[index], [])
            readers = [reader for reader, head in zip(readers, heads, strict=True) if head]
            heads = [head for head in heads if head]
            ready.sort()
            yield ready

    def _read(self, start: int, end: int) -> Iterator[list[bytes]]:
        """Yield the names of one block, at least one at a time."""
        rest = b""
        for place in range(start, end, _READ_BYTES):
            with self._opened() as file:
                file.seek(place)
                rest += file.read(min(_READ_BYTES, end - place))
            *names, rest = rest.split(_SEPARATOR)
            if names:
                yield names

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - __del__ closes it
            yield self._file
        except OSError as error:
            raise StorageError(
                f"cannot sort a folder of over {_NAMES_PER_BLOCK:,} names in a temporary file: "
                f"{error.strerror or error}; free some space, or set TMPDIR to a folder that has room"
            ) from error


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
    is_own = prefix and is_own_folder(folder, [*telling, *map(os.fsencode, inside)])
    return (0, []) if is_own else (count, folders)
