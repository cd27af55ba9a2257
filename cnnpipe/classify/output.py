"""Where the table goes: what is in the way there, and a place of its own for a table that was not given one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from cnnpipe.classify.shards import Job, is_locked, shards_folder
from cnnpipe.errors import PredictionsError
from cnnpipe.files import display_path
from cnnpipe.images.leftovers import SUMMARY_FILE, TABLE_SUFFIXES, described_table, summaries_of
from cnnpipe.storage import make_folder, storage_errors

__all__ = ["check_output", "create_output_folder", "default_table"]

_logger = logging.getLogger(__name__)

_TABLE_NAME: Final = "predictions.csv"
_MAX_NAME_BYTES: Final = 100
"""Of the input's name in the name of the output folder; file systems allow 255 bytes in all."""


def check_output(path: Path, *, replace: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    The summary is part of the output: it is replaced only with the table it describes.

    Args:
        path: the table.
        replace: whether a table and its summary may be replaced.
    Raises:
        PredictionsError: its suffix is none of `TABLE_SUFFIXES`, it is a folder, it or its summary is there already,
            or the `summary.json` beside it is not ours.
        StorageError: there can be no such file.
    """
    if path.suffix not in TABLE_SUFFIXES:
        raise PredictionsError(f"the output must end in {', '.join(TABLE_SUFFIXES)}, received {path}")
    with storage_errors(path):  # such as a name that is too long
        if path.is_dir():
            raise PredictionsError(f"the output must be a file, received the folder {path}; name a file in it")
    summary = path.with_name(SUMMARY_FILE)
    if os.path.lexists(summary) and described_table(summary) is None:
        raise PredictionsError(f"{summary} is no summary of ours; choose another folder for --output")
    for file in (path, *summaries_of(path)):
        if os.path.lexists(file) and not replace:
            raise PredictionsError(f"{file} is there already; name another output, or allow it with --overwrite")


@contextmanager
def default_table(root: Path, artifacts: Path, started: datetime, job: Job, *, resume: bool = True) -> Iterator[Path]:
    """Give a table without a name a place below `artifacts/predictions`: a new one, or where the job was broken off.

    A new folder goes again if nothing came of it.

    Args:
        root: the folder that is classified.
        job: what is to be done; its `table` does not count.
        resume: whether a job that was broken off is gone on with. One whose list came from standard input never is: the
            next that comes so is another.
    Raises:
        StorageError: no folder can be created.
    """
    folders = artifacts.glob(f"predictions/*/{shards_folder(Path(_TABLE_NAME))}") if resume and job.files != "-" else ()
    for shards in sorted(folders, reverse=True):
        begun = Job.read(shards)
        if begun is None or is_locked(shards):
            continue
        different = job.differences(begun)
        if not different:
            yield shards.parent / _TABLE_NAME
            return
        if begun.root == job.root:
            _logger.info(
                "%s holds a classification of this folder that was broken off, with %s %r, now %r; it stays as it is",
                *(display_path(str(shards)), different[0], getattr(begun, different[0]), getattr(job, different[0])),
            )
    folder = create_output_folder(root, artifacts, started)
    try:
        yield folder / _TABLE_NAME
    finally:
        with suppress(OSError):  # it is not empty: the table is in it
            folder.rmdir()


def create_output_folder(root: Path, artifacts: Path, started: datetime) -> Path:
    """Create the folder that the table goes to if no output is given, named after the input and the time.

    Raises:
        StorageError: it cannot be created.
    """
    name = display_path(root.resolve().name).encode()[:_MAX_NAME_BYTES].decode("utf-8", "ignore") or "root"
    predictions = make_folder(artifacts / "predictions")
    wanted = f"{name}-{started:%Y%m%dT%H%M%SZ}"
    folder, number = predictions / wanted, 1
    while True:
        with storage_errors(folder):
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another classification of this second
                number += 1
                folder = predictions / f"{wanted}-{number}"
