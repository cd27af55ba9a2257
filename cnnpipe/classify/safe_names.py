"""Make names that a stranger chose harmless, before files are written under them.

A label comes from a model and a path from a list, and either may hold `..`, a `/` in front, or what no file system
takes. What is made of them names something below the folder it is put in, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

__all__ = ["UNCERTAIN_FOLDER", "harmless_path", "label_folder", "numbered_path"]

UNCERTAIN_FOLDER: Final = "_uncertain"
"""Holds the files whose likeliest class is not likely enough; no label has this folder."""

_MAX_NAME_BYTES: Final = 255
_MAX_SUFFIX_BYTES: Final = 32
"""A longer ending is part of the name, not a file's kind."""

# In a label: separators, what Windows' file systems refuse, control characters, half characters, a dot that hides the
# folder, an end that Windows drops; and what would be read as one of our escapes, so that no two labels share a folder.
_ODD_IN_LABEL: Final = re.compile('[/\\\\<>:"|?*\x00-\x1f\x7f\ud800-\udfff]|^\\.|[. ]$|%(?=[0-9A-Fa-f]{2})')

# A path that is absolute, or has a part that is empty, `.` or `..`.
_ODD_PATH: Final = re.compile(r"(?:^|/)\.{0,2}(?:/|$)")
_SEPARATORS_IN_PART: Final = re.compile(r"[\\:]")  # on Windows; elsewhere these are letters like any other


@lru_cache(maxsize=4096)
def label_folder(label: str) -> str:
    """Return a label as the name of one folder: odd characters as `%NN`, so that no two labels share a folder."""
    name = _ODD_IN_LABEL.sub(_percent, label) or "%empty"
    if name.casefold() == UNCERTAIN_FOLDER:
        name = f"%5F{name[1:]}"
    return _shorten(name)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def harmless_path(path: str) -> str:
    """Return a path that stays where it is put: as it is, but for a leading `/`, `..`, and parts that are too long."""
    if len(path) * 4 <= _MAX_NAME_BYTES and os.name != "nt" and not _ODD_PATH.search(path):
        return path  # nearly all
    parts = ["%2F"] if path.startswith("/") else []
    for part in path.split("/"):
        if part == "..":
            parts.append("%2E%2E")
        elif part not in ("", "."):
            parts.append(_shorten(_SEPARATORS_IN_PART.sub(_percent, part) if os.name == "nt" else part))
    return "/".join(parts) or "%empty"


def _shorten(name: str) -> str:
    """Return a name that a file system takes; of one that is too long, the beginning, a digest and the suffix."""
    content = os.fsencode(name)
    if len(content) <= _MAX_NAME_BYTES:
        return name
    return _with_mark(name, f"~{hashlib.sha256(content).hexdigest()[:16]}")


def numbered_path(path: str, number: int) -> str:
    """Return `folder/name-2.jpg` of `folder/name.jpg`."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{_with_mark(name, f'-{number}')}"


def _with_mark(name: str, mark: str) -> str:
    """Put a mark between name and suffix, and cut the name's end off where they would be too long together."""
    stem, suffix = Path(name).stem, Path(name).suffix
    if len(os.fsencode(suffix)) > _MAX_SUFFIX_BYTES:
        stem, suffix = name, ""
    ending = mark + suffix
    kept = os.fsencode(stem)[: _MAX_NAME_BYTES - len(os.fsencode(ending))]
    return kept.decode("utf-8", "ignore") + ending
