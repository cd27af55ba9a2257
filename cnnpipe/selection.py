"""Which files are wanted: by patterns, or by a list of them."""

from __future__ import annotations

import codecs
import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from cnnpipe.errors import DatasetError
from cnnpipe.files import display_path, user_path

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = ["FileFilter", "check_file_list", "read_file_list"]

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


def check_file_list(source: str) -> None:
    """Refuse a list that is not there or may not be read, and take nothing from one that comes through a pipe.

    Raises:
        DatasetError: as `read_file_list`.
    """
    path = user_path(source)
    if source != "-" and (path.is_dir() or not os.access(path, os.R_OK)):
        reason = "it is a folder" if path.is_dir() else "permission denied" if path.exists() else "no such file"
        raise DatasetError(f"cannot read the list of files from {display_path(source)}: {reason}; check the path")


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
            with user_path(source).open("rb") as file:
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
