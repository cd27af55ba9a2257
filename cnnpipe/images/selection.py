"""Which files are wanted: by patterns, or by a list of them."""

from __future__ import annotations

import codecs
import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from cnnpipe.errors import DatasetError, one_line
from cnnpipe.files import display_path, user_path

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = ["FileFilter", "check_file_list", "no_listed_file", "read_file_list"]

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
