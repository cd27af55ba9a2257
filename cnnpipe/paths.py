"""Paths: what a user means by one, and how one is shown in messages and tables."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from cnnpipe.errors import UsageError

__all__ = ["NO_URL", "escape_path", "expand_path", "unescape_path"]

NO_URL: Final = "must be a path on this machine, not a URL"

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash, as pathlib writes it

_ESCAPED_BYTE: Final = re.compile(r"\\x([89a-f][0-9a-f])")


def escape_path(path: str) -> str:
    """Return a path as text that any UTF-8 file can hold: undecodable bytes become `\\xNN`."""
    if path.isascii():  # nearly all of millions
        return path
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def unescape_path(root: Path, shown: str) -> Path:
    """Return the path of a file from its text in a table, as `escape_path` writes it.

    A file whose name really has the characters `\\xNN` is preferred to one that has the byte.

    Args:
        root: the folder that `shown` is relative to.
    Returns:
        The path; as it is shown if there is no such file either way.
    """
    literal = root / shown
    if os.path.lexists(literal) or "\\x" not in shown:
        return literal
    found = root
    for part in shown.split("/"):  # one by one: each folder on the way may have either kind of name
        exact = found / (part or "/")
        with_bytes = _ESCAPED_BYTE.sub(lambda match: os.fsdecode(bytes([int(match[1], 16)])), part)
        found = exact if os.path.lexists(exact) else found / with_bytes
    return found if os.path.lexists(found) else literal


def expand_path(text: str | Path) -> Path:
    r"""Return the path that a user means, in an argument, an option, a settings file or the environment.

    `~` is the home folder, `~somebody` that of a user or else a plain name. `\xNN` is the byte that `escape_path`
    writes so, unless there is such a name: parameters of a flow run and TOML hold nothing but text.

    Raises:
        UsageError: it is a URL.
    """
    if _URL.match(str(text)):
        raise UsageError(f"{NO_URL}, received {escape_path(str(text))!r}")
    path = Path(os.path.expanduser(text))  # noqa: PTH111  pathlib raises RuntimeError if there is no such user
    if "\\x" not in str(path):
        return path
    return unescape_path(unescape_path(Path(), str(path.parent)), path.name)  # an output may not exist yet
