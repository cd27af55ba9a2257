"""Find the files below a folder, in one fixed order; choose among them by patterns, or take them from a list.

A folder or link that cannot be entered is yielded itself, so that nothing is skipped in silence. What
`cnnpipe.images.leftovers` recognises is skipped and counted.
"""

from __future__ import annotations

import codecs
import errno
import fnmatch
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from cnnpipe.errors import DatasetError, StorageError, one_line
from cnnpipe.images.leftovers import OWN, UNFINISHED, is_own_folder, name_leftover
from cnnpipe.paths import escape_path, expand_path

if TYPE_CHECKING:
    from io import BufferedReader

_FOLDER_MARK: Final = b"\0"
"""End of a folder's name in a listing; no name contains this byte and it sorts lowest, so the order stays."""

_MAX_NAMES_IN_MEMORY: Final = 1_000_000
"""Names of one folder that are sorted in memory, about 80 MB; more are sorted in a temporary file."""

_MAX_RECORD: Final = 2**16
"""Longest record of a list of files, in characters; a path has at most 4,096 bytes on Linux."""


def find_files(
    root: Path, *, after: str | None = None, passed_over: Counter[str] | None = None, in_order: bool = True
) -> Iterator[str]:
    """Yield every file below a folder, depth first, the names of each folder sorted bytewise.

    Links are followed. A link back to a folder that is being walked, and a folder that cannot be listed, are yielded
    themselves. A folder is read to its end before its first file is yielded; memory stays bounded, because the names
    of a huge one are sorted in a temporary file.

    Args:
        root: an existing folder.
        after: a path relative to `root`, which need not exist any more: only files that come after it in this order
            are yielded. Of what comes before it, only the folders on the way to it are listed.
        passed_over: counts the files and folders that are skipped, by what to call them.
        in_order: False yields the same files in any order, sooner.
    Yields:
        Paths relative to `root`, with `/`; undecodable bytes as surrogates (PEP 383), so `root / path` opens.
    Raises:
        DatasetError: `root` is not a folder that can be listed.
        StorageError: there is no room for the temporary file.
    """
    walk = _Walk(os.fsencode(root), Counter() if passed_over is None else passed_over, in_order)
    # A stack of folders, not recursion: trees may be deeper than Python's recursion limit.
    stack = walk.start(os.fsencode(after or "").split(b"/"))
    encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    while stack:
        folder = stack[-1]
        prefix = os.fsdecode(folder.prefix)
        for name in folder.names:
            if name[-1]:  # a file; there may be millions, so nothing more is done for it
                yield prefix + name.decode(encoding, errors)
                continue
            path = folder.prefix + name.removesuffix(_FOLDER_MARK)
            try:
                stack.append(walk.enter(path, stack))
            except OSError:
                yield os.fsdecode(path)  # reading it says what is wrong, in its own row
            else:
                break
        else:
            stack.pop()


def has_files(root: Path, number: int = 1) -> bool:
    """Return whether a folder has at least `number` files, and look no further than that takes.

    Raises:
        DatasetError: `root` is not a folder that can be listed.
    """
    return sum(1 for _ in islice(find_files(root, in_order=False), number)) == number


class _Folder(NamedTuple):
    """A folder that is being walked."""

    prefix: bytes
    """Path relative to the root, ending in `/`; empty for the root."""
    identity: tuple[int, int]
    """Device and inode: which folder it is, by whatever path."""
    names: Iterator[bytes]
    """Names that are left, those of folders with `_FOLDER_MARK`."""


@dataclass(frozen=True)
class _Walk:
    """Settings of a walk, and the counts of what it skips."""

    root: bytes
    passed_over: Counter[str]
    in_order: bool

    def start(self, after: list[bytes]) -> list[_Folder]:
        """Return the folders that are being walked when the walk has just passed the path with the parts `after`."""
        try:
            stack = [self.enter(b"", [], after[0])]
        except OSError as error:
            problems = {errno.ENOENT: "it does not exist", errno.ENOTDIR: "it is a file"}
            raise DatasetError(
                f"need a folder of images, received {escape_path(os.fsdecode(self.root))}: "
                f"{problems.get(error.errno or 0, error.strerror)}; check the path and its permissions"
            ) from error
        for part, next_part in pairwise([*after, b""]):
            if part in (b"", b".", b".."):  # in no path that a walk yields, and `..` would lead out of the root
                break
            try:
                stack.append(self.enter(stack[-1].prefix + part, stack, next_part))
            except OSError:
                break  # a file, gone, or a folder that is yielded itself: nothing in it comes after `after`
        return stack

    def enter(self, path: bytes, walking: list[_Folder], after: bytes = b"") -> _Folder:
        """List the names in a folder that sort after `after`; none if cnnpipe made it and it is not the root.

        Args:
            path: relative to the root, which is empty itself.
        Raises:
            OSError: it cannot be listed, or a link has led back to a folder that is being walked.
        """
        full_path = os.path.join(self.root, path)
        status = os.stat(full_path)
        identity = (status.st_dev, status.st_ino)
        if any(identity == folder.identity for folder in walking):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        skipped: Counter[str] = Counter()
        names = read_names(full_path, os.scandir(full_path), after, skipped)
        if path or self.in_order:
            first = list(islice(names, _MAX_NAMES_IN_MEMORY))
            if path and is_own_folder(chain(first, map(os.fsencode, skipped))):
                first, names, skipped = [], iter(()), Counter({OWN: 1})
            elif len(first) == _MAX_NAMES_IN_MEMORY and self.in_order:
                names, first = _sort_in_file(chain(first, names)), []
            names = chain(sorted(first), names)
        self.passed_over.update(skipped)
        return _Folder(path + b"/" if path else b"", identity, names)


def read_names(
    folder: bytes, entries: AbstractContextManager[Iterator[os.DirEntry[bytes]]], after: bytes, skipped: Counter[str]
) -> Iterator[bytes]:
    """Yield the names in a folder that sort after `after`, in no order, those of folders with a NUL at the end.

    A link to a folder counts as a folder. Only links are looked at one by one; for the rest the listing says enough.

    Args:
        entries: the listing of the folder, opened by the caller, who so has the errors of opening it.
        skipped: counts what is never an input, by what to call it.
    """
    with entries as listed:
        for entry in listed:
            name = entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False  # a link in a circle, or to where we may not look
            if leftover := name_leftover(folder, name, is_folder):
                if leftover != UNFINISHED:  # often of the very job that asks
                    skipped[leftover] += 1
            elif name > after:
                yield name + _FOLDER_MARK if is_folder else name


def _sort_in_file(names: Iterator[bytes]) -> Iterator[bytes]:
    """Sort names bytewise in a temporary file, which SQLite makes and removes; they are all read before it returns.

    Ten million names in a list would take almost a gigabyte.

    Raises:
        StorageError: there is no room for the file; at once or by the iterator.
    """
    import sqlite3

    @contextmanager
    def clear_errors() -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot sort a folder of over {_MAX_NAMES_IN_MEMORY:,} names in a temporary file: {error}; "
                "free some space, or set TMPDIR to a folder that has room"
            ) from error

    def read_back() -> Iterator[bytes]:
        with closing(database), clear_errors():
            yield from (name for (name,) in ordered)

    with clear_errors():
        database = sqlite3.connect("", check_same_thread=False)  # the walk may go on in another thread
        database.execute("CREATE TABLE names (name BLOB)")
        database.executemany("INSERT INTO names VALUES (?)", zip(names, strict=True))
        ordered = database.execute("SELECT name FROM names ORDER BY name")
    return read_back()


@dataclass(frozen=True)
class FileFilter:
    """Which files are wanted, by shell patterns: `*`, `?`, `[abc]` and `[!abc]`, as in Python's `fnmatch`.

    Case counts on every system. A pattern without `/` is compared with the file's name, one with `/` with its whole
    path relative to the folder, where `*` also matches `/`: `cats/*` is all that is below `cats`.

    Args:
        include: a file must match one of these, if there are any.
        exclude: a file must match none of these.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def admits(self, path: str) -> bool:
        """Return whether a file is wanted; `path` is relative to the folder, as `find_files` yields it."""
        excluded = self.exclude and _matches(self.exclude, path)
        return not excluded and (not self.include or _matches(self.include, path))


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    for_name, for_path = _compile(patterns)
    return bool(for_name.match(path[path.rfind("/") + 1 :]) or for_path.match(path))


@lru_cache
def _compile(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns for names and those for paths, each as one expression."""

    def unite(some: Iterable[str]) -> re.Pattern[str]:
        return re.compile("|".join(map(fnmatch.translate, some)) or "(?!)")  # which matches nothing

    return unite(each for each in patterns if "/" not in each), unite(each for each in patterns if "/" in each)


def check_file_list(source: str, root: Path) -> None:
    """Refuse a list that cannot be read or names no file that exists; a list that comes through a pipe is not read.

    Args:
        source: a text file, or `-` for standard input.
        root: the folder that its paths are relative to.
    Raises:
        DatasetError: as `read_file_list`, or none of its paths is a file.
    """
    if source == "-" or (path := expand_path(source)).is_fifo() or path.is_char_device():
        return
    names = read_file_list(source)
    if (first := next(names, None)) and not any(_may_be_file(root, name) for name in chain([first], names)):
        raise no_listed_file(source, root, first)


def no_listed_file(source: str, root: Path, first: str) -> DatasetError:
    """Return the error for a list of which no path is a file; `first` is one of them."""
    return DatasetError(
        f"no path in the list of files from {_shown(source)} is a file in {escape_path(str(root))}; one is "
        f"{one_line(repr(escape_path(first)))}; check the folder, and save the list as UTF-8"
    )


def _shown(source: str) -> str:
    return "standard input" if source == "-" else escape_path(source)


def _may_be_file(root: Path, name: str) -> bool:
    # In a list in UTF-16 without a byte order mark, each letter is a path: `.` and `/` are folders.
    return "\0" not in name and os.path.lexists(root / name) and not (root / name).is_dir()


def read_file_list(source: str) -> Iterator[str]:
    """Yield the paths in a list as they come, each as it is written there without a leading `./`.

    Records end with a newline, or with a NUL if there is one in the first 65,536 characters, so that both `find` and
    `find -print0` are understood. A byte order mark at the start, and a carriage return at the end of a line, are not
    part of a path. A list in UTF-16, as PowerShell writes it, is recognised by its byte order mark.

    Args:
        source: a text file, or `-` for standard input.
    Yields:
        Paths with undecodable bytes as surrogates (PEP 383); not checked, and empty ones left out.
    Raises:
        DatasetError: the list cannot be read, a record exceeds 65,536 characters, or its UTF-16 is not valid.
    """
    shown = _shown(source)
    try:
        if source != "-":
            with expand_path(source).open("rb") as file:
                yield from _read_records(file, shown)
        else:
            yield from _read_records(cast("BufferedReader", sys.stdin.buffer), shown)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{shown} is not valid UTF-16, which its byte order mark announces: {error.reason}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise DatasetError(f"cannot read the list of files from {shown}: {error.strerror}; check the path") from error


def _read_records(file: BufferedReader, shown: str) -> Iterator[str]:
    blocks = _read_text(file)
    block = ""
    while "\0" not in block and len(block) < _MAX_RECORD and (more := next(blocks, "")):
        block += more
    separator = "\0" if "\0" in block else "\n"
    rest = ""
    for text in chain([block], blocks, [separator]):
        *records, rest = (rest + text).split(separator)
        if max(map(len, (*records, rest))) > _MAX_RECORD:
            raise DatasetError(
                f"{shown} is not a list of files: a record exceeds {_MAX_RECORD:,} characters; give one path a line"
            )
        for record in records:
            path = record.removesuffix("\r") if separator == "\n" else record
            if path.startswith("./"):  # as the row is called when the folder itself is searched
                path = path[2:].lstrip("/") or path  # `.//a` is not an absolute path
            if path:
                yield path


def _read_text(file: BufferedReader) -> Iterator[str]:
    """Yield the text of an open list, never empty; `read1` returns what has come and waits for no more."""
    start = b""
    while len(start) < len(codecs.BOM_UTF8) and (more := file.read1(_MAX_RECORD)):
        start += more
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        decoder = codecs.getincrementaldecoder("utf-16")()
    else:
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    yield from filter(None, map(decoder.decode, chain([start], iter(lambda: file.read1(_MAX_RECORD), b""))))
    yield from filter(None, [decoder.decode(b"", True)])
