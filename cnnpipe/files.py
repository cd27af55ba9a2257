"""What a user means by a path, and how one is shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from cnnpipe.errors import UsageError

__all__ = [
    "NO_URL",
    "display_path",
    "open_standard_descriptors",
    "source_path",
    "user_path",
]

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
