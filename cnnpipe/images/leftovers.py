"""Files that systems, other programs and cnnpipe itself leave in a folder of images: never an input.

A name of a system's is enough. What cnnpipe wrote is told by more than a name, so that no user's file of the kind is
taken for it: a table by the summary beside it, a folder by the files that only such a folder has.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cnnpipe.paths import escape_path

OWN: Final = "written by cnnpipe"
"""Name that `name_leftover` gives to everything that cnnpipe wrote."""

UNFINISHED: Final = "unfinished table"
"""Name that `name_leftover` gives to a `JOB_FILE`, which is not counted."""

TABLE_SUFFIXES: Final = (".csv", ".jsonl", ".parquet")

SUMMARY_SUFFIX: Final = ".summary.json"
"""Ends the name of the file beside a table that is written after it: its presence means that the table is complete."""

JOB_FILE: Final = re.compile(rb".+\.(csv|jsonl|parquet)\.job(-journal|-table)?", re.DOTALL)
"""Names of the files of a classification that is under way (`cnnpipe.classify.job`), often of the very one that looks.

They are told by their names alone, and never opened: closing a file ends the locks that this process has on it.
"""

SORTED_MARK: Final = ".cnnpipe-sorted"
"""File in a folder that `--sort-into` made: the images in it are second names of others."""

REPORT_MARK: Final = b'<meta name="generator" content="cnnpipe">'
"""Text within the first 512 bytes of a contact sheet."""

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

_ORDINARY: Final = (b".jpg", b".jpeg", b".png", b".JPG", b".JPEG", b".PNG")
"""Nearly all of millions of files end so, and need no look at the lists if they begin with a letter."""

_TOLD_BY_CONTENT: Final = (*(suffix.encode() for suffix in TABLE_SUFFIXES), SUMMARY_SUFFIX.encode(), b".html", b".htm")

_MARKS: Final = (
    frozenset({b"dataset.json", b"train_images.npy", b"train_labels.npy"}),  # prepared
    frozenset({b"config.toml", b"environment.json"}),  # a run
    frozenset({b"promotions.jsonl", b"champion"}),  # the runs of a name
    frozenset({SORTED_MARK.encode()}),
)
"""Files that together are in no folder but one of cnnpipe's."""

_ALL_MARKS: Final = frozenset[bytes]().union(*_MARKS)


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
    if JOB_FILE.fullmatch(name):
        return UNFINISHED
    if name.endswith(_TOLD_BY_CONTENT):
        return OWN if _is_own_file(Path(os.fsdecode(folder), os.fsdecode(name))) else ""
    if name.endswith(b":Zone.Identifier"):  # Windows keeps one with each download, and other systems show it
        return "*:Zone.Identifier"
    return _FILES.get(name.lower(), "")


def is_own_folder(names: Iterable[bytes]) -> bool:
    """Return whether cnnpipe made a folder for itself, by the names in it: a run, a prepared dataset, sorted images."""
    there = _ALL_MARKS.intersection(names)
    return any(marks <= there for marks in _MARKS)


def describe_passed_over(counts: Counter[str]) -> str:
    """Say in a line how many files and folders were passed over, and what they are called."""
    number = f"{counts.total():,} files and folders that systems leave or cnnpipe wrote were passed over"
    return f"{number}: {list_left_out(counts)}"


def list_left_out(counts: Counter[str]) -> str:
    """Return the ten largest counts of what was left out as text, such as `.json (48), .csv (1)`."""
    shown = ", ".join(f"{escape_path(name.strip())} ({count:,})" for name, count in counts.most_common(10))
    return shown + (", …" if len(counts) > 10 else "")


def summary_path(table: Path) -> Path:
    """Return the path of a table's summary."""
    return table.with_name(table.name + SUMMARY_SUFFIX)


def _is_own_file(path: Path) -> bool:
    """Return whether a file is a table with its summary, a summary, or a contact sheet."""
    if path.suffix in TABLE_SUFFIXES:
        path = summary_path(path)
    try:
        if not path.is_file():  # a pipe would never end
            return False
        if not path.name.endswith(SUMMARY_SUFFIX):
            with path.open("rb") as file:
                return REPORT_MARK in file.read(512)
        table = Path(json.loads(path.read_bytes())["table"])
    except (OSError, ValueError, TypeError, KeyError):  # cannot be read, or is anybody's JSON
        return False
    # By name only: a folder that was renamed or copied, or is mounted elsewhere, holds the same table.
    return table.suffix in TABLE_SUFFIXES and table.name == escape_path(path.name.removesuffix(SUMMARY_SUFFIX))
