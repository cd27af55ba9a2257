"""Files that systems, other programs and cnnpipe itself leave in a folder of images: never an input.

A name of a system's is enough. What cnnpipe wrote is told by more than a name, so that no user's file of the kind is
taken for it: a table by the summary beside it, a folder by the files that only such a folder has.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cnnpipe.files import display_path

__all__ = [
    "OWN",
    "REPORT_MARK",
    "SHARDS_SUFFIX",
    "SORTED_MARK",
    "SUMMARY_FILE",
    "TABLE_SUFFIXES",
    "TELLING_NAMES",
    "describe_passed_over",
    "described_table",
    "is_own_folder",
    "list_left_out",
    "name_leftover",
    "summaries_of",
    "summary_aside",
]

OWN: Final = "written by cnnpipe"
"""Name that `name_leftover` gives to everything that cnnpipe wrote."""

TABLE_SUFFIXES: Final = (".csv", ".jsonl", ".parquet")

SUMMARY_FILE: Final = "summary.json"
"""Written after the table: its presence means that the table is complete."""

SHARDS_SUFFIX: Final = b".shards"
"""Ends the name of a folder with the rows of a table that is not finished."""

SORTED_MARK: Final = ".cnnpipe-sorted"
"""File in a folder that `--sort-into` made: the images in it are second names of others."""

REPORT_MARK: Final = b'<meta name="generator" content="cnnpipe">'
"""Within the first bytes of a contact sheet."""

_HEAD_BYTES: Final = 512
_COUNTS_SHOWN: Final = 10

_FOLDERS: Final = {
    **{os.fsencode(name.lower()): name for name in (
        "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", ".@__thumb",  # Synology, QNAP
        "$RECYCLE.BIN", "System Volume Information",  # Windows
        "__MACOSX", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".Trashes", ".Trash", ".Spotlight-V100", ".fseventsd",
        ".TemporaryItems", ".DocumentRevisions-V100", "Network Trash Folder", "Temporary Items",  # macOS
        "lost+found", ".thumbnails", ".snapshot", ".zfs",  # Linux and its file systems
        ".git", ".hg", ".svn", ".ipynb_checkpoints", "__pycache__", ".picasaoriginals", ".dtrash", ".stfolder",
        ".stversions", ".dropbox.cache",
    )},
    b".prefect": OWN,
    b".compiled": OWN,
}  # fmt: skip
"""Names in lower case -> how they are shown."""

_FILES: Final = {
    **{os.fsencode(name.lower()): name for name in (
        "Thumbs.db", "Thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini",
        ".DS_Store", ".localized", "Icon\r", ".VolumeIcon.icns", ".apdisk", ".directory", ".nomedia",
        ".picasa.ini", "Picasa.ini", ".gitignore", ".gitattributes", ".gitkeep", ".dropbox", ".stignore",
    )},
    b"cifar-10-python.tar.gz": OWN,  # in data/raw
    SORTED_MARK.encode(): SORTED_MARK,
}  # fmt: skip

_PATTERNS: Final = re.compile(
    rb"(?P<system>\._.+|~\$.+|\.~lock\..+#|\.nfs[0-9a-f]{8,}|\.fuse_hidden[0-9a-f]+|\.Trash-\d+)"
    rb"|\..+\.[0-9a-f]{16}(\.[a-z]+)?|\.scratch\.\w{8}",  # temporary names of `cnnpipe.storage` and of preparing
    re.DOTALL,
)

_STREAM: Final = b":Zone.Identifier"
"""Ends the name of a file that Windows keeps with each download, where that was copied to another system."""

_ORDINARY: Final = (b".jpg", b".jpeg", b".png", b".JPG", b".JPEG", b".PNG")
"""Nearly all of millions of files end so, and need no look at the lists if they begin with a letter."""

_TOLD_BY_CONTENT: Final = (*(suffix.encode() for suffix in TABLE_SUFFIXES), SUMMARY_FILE.encode(), b".html", b".htm")

_MARKS: Final = (
    frozenset({b"dataset.json", b"train_images.npy", b"train_labels.npy"}),  # prepared
    frozenset({b"config.toml", b"environment.json"}),  # a run
    frozenset({b"promotions.jsonl", b"champion"}),  # the runs of a name
    frozenset({SORTED_MARK.encode()}),
)
"""Files that together are in no folder but one of cnnpipe's."""

TELLING_NAMES: Final = frozenset({b"lock"}).union(*_MARKS)
"""All the names that `is_own_folder` looks for."""


def name_leftover(folder: bytes, name: bytes, is_folder: bool) -> str:
    """Return what to call a file or folder that is never an input; empty for all others.

    Args:
        folder: where it lies, to look into files that may be cnnpipe's.
    """
    first = name[0] in b".~"
    if not (first or is_folder) and name.endswith(_ORDINARY):
        return ""
    if first and (match := _PATTERNS.fullmatch(name)):
        return os.fsdecode(name[:2]) + "*" if match["system"] else OWN
    if is_folder:
        return _FOLDERS.get(name.lower(), "")
    if name.endswith(_TOLD_BY_CONTENT):
        return OWN if _is_own_file(Path(os.fsdecode(folder), os.fsdecode(name))) else ""
    if name.endswith(_STREAM):
        return "*" + os.fsdecode(_STREAM)
    return _FILES.get(name.lower(), "")


def is_own_folder(folder: bytes, names: Iterable[bytes]) -> bool:
    """Return whether cnnpipe made a folder for itself: a run, a prepared dataset, unfinished rows, sorted images.

    Args:
        names: of the files in it.
    """
    there = TELLING_NAMES.intersection(names)
    return (b"lock" in there and folder.endswith(SHARDS_SUFFIX)) or any(marks <= there for marks in _MARKS)


def describe_passed_over(counts: Counter[str]) -> str:
    """Say in a line how many files and folders were passed over, and what they are called."""
    return (
        f"{counts.total():,} files and folders that systems leave or cnnpipe wrote were passed over: "
        f"{list_left_out(counts)}"
    )


def list_left_out(counts: Mapping[str, int]) -> str:
    """Return counts of what was left out as text, such as `.json (48), .csv (1)`."""
    largest = Counter(counts).most_common(_COUNTS_SHOWN)
    shown = ", ".join(f"{display_path(name.strip())} ({count:,})" for name, count in largest)
    return shown + (", …" if len(counts) > _COUNTS_SHOWN else "")


def _is_own_file(path: Path) -> bool:
    """Return whether a file is a table with its summary, a summary, or a contact sheet."""
    if path.suffix in TABLE_SUFFIXES:
        return bool(summaries_of(path))
    if path.name.endswith(SUMMARY_FILE):
        return described_table(path) is not None
    try:
        if not path.is_file():  # a pipe would never end
            return False
        with path.open("rb") as file:
            return REPORT_MARK in file.read(_HEAD_BYTES)
    except OSError:
        return False


def described_table(path: Path) -> str | None:
    """Return the name of the table, in the same folder, that a `summary.json` of ours describes; None for any other.

    A folder that was renamed or copied, or is mounted elsewhere, has the table beside the summary all the same.
    """
    try:
        if not path.is_file():  # a pipe would never end
            return None
        described = Path(json.loads(path.read_bytes())["table"])
    except (OSError, ValueError, TypeError, KeyError):  # cannot be read, or is anybody's JSON
        return None
    folder = Path(display_path(str(path.parent.absolute())))
    if described.suffix not in TABLE_SUFFIXES:
        return None
    own = os.path.realpath(described.parent) == os.path.realpath(folder) or path.with_name(described.name).is_file()
    return described.name if own else None


def summary_aside(folder: Path, table_name: str) -> Path:
    """Return where a table's summary goes when a later table in the folder takes the name `summary.json`."""
    return folder / f"{table_name}.{SUMMARY_FILE}"


def summaries_of(table: Path) -> list[Path]:
    """Return the files that hold the summary of an earlier table of this name, of which there is one at most."""
    name = display_path(table.name)
    places = (table.with_name(SUMMARY_FILE), summary_aside(table.parent, name))
    return [path for path in places if described_table(path) == name]
