"""Read files, never hanging on what is not a file; what a user means by a path, and how one is shown."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from cnnpipe.errors import ImageError, UsageError

__all__ = [
    "MAX_FILE_BYTES",
    "NO_URL",
    "display_path",
    "open_standard_descriptors",
    "read_file",
    "source_path",
    "user_path",
]

MAX_FILE_BYTES: Final = 2**30

NO_URL: Final = "must be a path on this machine, not a URL"

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Start of a URL, also as pathlib writes it, with one slash; a drive of Windows has one letter."""

_UNDECODABLE_BYTE: Final = re.compile(r"\\x([89a-f][0-9a-f])")


def display_path(path: str) -> str:
    """Return a path as text that any UTF-8 file can hold: undecodable bytes become `\\xNN`."""
    if path.isascii():  # nearly all of millions
        return path
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def source_path(root: Path, shown: str) -> Path:
    """Return the path of a file that a table shows.

    A name with bytes that are no text stands there with `\\xNN` for them (`display_path`). A file that really has such
    a name in letters is preferred.

    Args:
        root: the folder that `shown` is relative to.
    Returns:
        The path as shown if there is no such file either way.
    """
    literal = root / shown
    if os.path.lexists(literal) or "\\x" not in shown:
        return literal
    found = root
    for part in shown.split("/"):  # one by one: a name in letters may lie in a folder whose name is in bytes
        exact = found / (part or "/")
        found = exact if os.path.lexists(exact) else found / _with_bytes(part)
    return found if os.path.lexists(found) else literal


def _with_bytes(shown: str) -> str:
    """Turn `\\xNN` back into the bytes that it stands for."""
    return _UNDECODABLE_BYTE.sub(lambda match: os.fsdecode(bytes([int(match[1], 16)])), shown)


def user_path(text: str | Path) -> Path:
    r"""Return the path that a user means, however it was given: argument, option, settings file or environment.

    `~` is the home folder, `~somebody` that of a user or else a plain name. `\xNN` is the byte that `display_path`
    writes so, where there is no such name in letters: parameters of a flow run and TOML hold nothing but text.

    Raises:
        UsageError: it is a URL.
    """
    if _URL.match(str(text)):
        raise UsageError(f"{NO_URL}, received {display_path(str(text))!r}")
    path = Path(os.path.expanduser(text))  # noqa: PTH111  pathlib raises RuntimeError where there is no such user
    if "\\x" not in str(path):
        return path
    return source_path(source_path(Path(), str(path.parent)), path.name)  # an output may not be there yet


def open_standard_descriptors() -> None:
    """Put the null device on descriptors 0, 1 and 2 where they are closed, so that no file is opened as one of them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


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
