"""The rows of a classification that is under way, in shards beside its table: killed at any moment, it goes on.

    photos.csv.shards/          gone when photos.csv and its summary are complete
        job.json                what is done here; written first
        lock                    held by the process that does it
        000000-<job>.csv        the rows of a shard; the job's digest is in the name
        000000-<job>.json       their counts and the last file; written after them: its presence means they are complete
        000001-<job>.files      the files of a shard that was handed to another process, each ended by NUL
        listing.json            how many shards and files there are; written when the last file was found
        table.csv               all rows, on their way to the table's own place
        finished.json           their digest and counts: which of two files of the table's name is this one

Shards are a fixed number of files in the order in which they were found, so the same files give the same shards, and
the same bytes in the end, however often the work is broken off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

from filelock import FileLock, Timeout

from cnnpipe.classify.engine import Shard
from cnnpipe.classify.summary import RowCounts
from cnnpipe.classify.table import TableFormat
from cnnpipe.errors import AlreadyThereError, PredictionsError, StorageError
from cnnpipe.files import display_path
from cnnpipe.storage import make_folder, move_file, sha256_file, storage_errors, write_bytes, write_text

__all__ = ["FinishedTable", "Job", "ShardFolder", "finished_job", "is_locked", "remove_leftovers", "shards_folder"]

_JOB_FILE: Final = "job.json"
_LISTING_FILE: Final = "listing.json"
_FINISHED_FILE: Final = "finished.json"
_LOCK_FILE: Final = "lock"

_HALF_WRITTEN: Final = re.compile(r"\..+\.[0-9a-f]{16}\.[a-z]+")
"""Temporary names of `cnnpipe.storage`."""

_OURS: Final = re.compile(rf"(\d{{6,}}-[0-9a-f]{{8}}|job|listing|finished|table)\.[a-z]+|{_HALF_WRITTEN.pattern}")

_HOW: Final = ("table", "model_path", "workers", "batch_size_asked")
"""Fields of a job that have no say in its rows."""


@dataclass(frozen=True)
class Job:
    """What is classified, and all that decides how the rows come out; equal jobs give equal bytes."""

    root: str
    """Absolute path of the folder."""
    table: str
    """Absolute path."""
    mode: str
    """`all`, `retry-failed` or `incremental`."""
    files: str | None
    """Where the list of files comes from, if not from the folder."""
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    earlier_sha256: str
    """Of the table that is brought up to date; empty if there is none, or none of its rows can be kept."""
    model: str
    """`<name>/<run id>`."""
    model_path: str
    model_sha256: str
    precision: str
    device: str
    """`cpu` or `cuda:N`, as really used."""
    batch_size: int
    top_k: int
    shard_size: int
    """Files in a shard."""
    safe_csv: bool
    min_probability: float
    file_timeout: float
    """Seconds that decoding one file may take."""
    workers: int
    versions: dict[str, str]
    batch_size_asked: bool = False
    """Whether it was asked for; else a job that is gone on with keeps the one that it began with."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what is done in a folder, or None if it is nothing of ours."""
        try:
            values = json.loads((folder / _JOB_FILE).read_bytes())
            return cls(**{**values, "include": tuple(values["include"]), "exclude": tuple(values["exclude"])})
        except (OSError, ValueError, TypeError, KeyError):  # not there, or anybody's JSON
            return None

    @property
    def form(self) -> TableFormat:
        """How the table is written."""
        return TableFormat(Path(self.table).suffix, self.top_k, self.safe_csv)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of an earlier table are kept for files whose content is unchanged."""
        return self.mode == "incremental" and bool(self.earlier_sha256)

    @cached_property
    def digest(self) -> str:
        """Of all that decides over rows: tells its files from those that a worker of a job given up may still write."""
        deciding = {name: value for name, value in asdict(self).items() if name not in _HOW}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]

    def differences(self, begun: Job) -> list[str]:
        """Return the names of the fields that decide over rows and are not as they were in a job begun earlier."""
        free = _HOW if self.batch_size_asked else (*_HOW, "batch_size")
        names = (field.name for field in fields(self) if field.name not in free)
        return [name for name in names if getattr(self, name) != getattr(begun, name)]


@dataclass(frozen=True)
class FinishedTable:
    """The table with all rows."""

    sha256: str
    files: int
    counts: RowCounts


def shards_folder(table: Path) -> Path:
    """Return the folder of a table's shards."""
    return table.with_name(f"{table.name}.shards")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock, which ends with the process, even if it is killed."""
    while True:
        make_folder(folder)
        lock = FileLock(folder / _LOCK_FILE)
        with storage_errors(folder):
            try:
                lock.acquire(blocking=False)
            except Timeout as error:  # inside, because it is an OSError too
                raise PredictionsError(
                    f"another process is writing {folder.with_suffix('')}; wait for it, or name another --output"
                ) from error
            except FileNotFoundError:  # whoever held it has just finished, and removed the folder
                continue
        if (folder / _LOCK_FILE).exists():  # else we hold the lock of a folder that is gone
            break
        lock.release()
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process is at work in a folder of shards."""
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except OSError:  # held, which is a Timeout, or it cannot be ours
        return True
    lock.release()
    return False


def finished_job(table: Path) -> Job | None:
    """Return the job that had all its rows when it was broken off, but not all was done.

    Its table has the name already, or is about to take it from the earlier one that it brings up to date, whose summary
    may be gone by then.
    """
    folder = shards_folder(table)
    job = Job.read(folder)
    finished = _read_json(folder / _FINISHED_FILE) if job else None
    if job is None or finished is None or not table.is_file():
        return None
    there = sha256_file(table)
    brings_up_to_date = job.mode != "all" and job.earlier_sha256 in ("", there)
    joined = brings_up_to_date and (folder / f"table{table.suffix}").is_file()
    return job if joined or there == finished["sha256"] else None


def remove_leftovers(folder: Path) -> None:
    """Remove what is left of a job whose table and summary were complete when it was broken off."""
    if folder.is_dir() and not (folder / _JOB_FILE).exists() and not is_locked(folder):
        _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Remove the folder with our files; if others have put something into it, it stays."""
    with suppress(OSError, StorageError):
        _remove_files(folder, _OURS)
        (folder / _LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()


class ShardFolder:
    """The shards of one job, in a folder whose lock this process holds; made by `ShardFolder.open`."""

    def __init__(self, path: Path, job: Job) -> None:
        self.path = path
        self.job = job

    @classmethod
    @contextmanager
    def open(cls, path: Path, job: Job, *, start_over: bool, resume: bool = True) -> Iterator[Self]:
        """Begin a job, or go on with it where an earlier process was broken off.

        Args:
            start_over: whether the rows of another job may be dropped.
            resume: whether those of the same job are gone on with, not dropped.
        Raises:
            PredictionsError: another process is at it, or the folder holds the rows of another job.
            StorageError: it cannot be written.
        """
        with _locked(path):
            begun = Job.read(path)
            if begun is None and (path / _JOB_FILE).exists() and resume and not start_over:
                raise PredictionsError(
                    f"{display_path(str(path))} holds a classification that another version broke off; "
                    "finish it with that, or start over with --overwrite"
                )
            if begun is not None and (different := job.differences(begun)):
                if resume and not start_over:
                    raise _other_job(path, job, begun, different[0])
                begun = None
            if begun is None or not resume:
                _remove_files(path, _OURS)
                _write_json(path / _JOB_FILE, asdict(job))
            else:
                job = replace(job, batch_size=begun.batch_size)
                _remove_files(path, _HALF_WRITTEN)
            try:
                yield cls(path, job)
            finally:
                # All done, or nothing worth going on with; it says what was done where only the summary is missing.
                if not any(path.glob("[0-9]*.json")) and finished_job(Path(job.table)) is None:
                    _remove_folder(path)

    @property
    def begun(self) -> datetime:
        """When the job was begun, in the time of this place; it must not be done yet."""
        return datetime.fromtimestamp((self.path / _JOB_FILE).stat().st_mtime).astimezone()

    def rows_path(self, number: int) -> Path:
        """Return where the rows of a shard are."""
        return self._file(number, self.job.form.suffix)

    def _file(self, number: int, suffix: str) -> Path:
        return self.path / f"{number:06}-{self.job.digest}{suffix}"

    def is_complete(self, number: int) -> bool:
        """Return whether the rows of a shard are all there."""
        return self._marker(number).exists()

    def _marker(self, number: int) -> Path:
        return self._file(number, ".json")

    def _plan(self, number: int) -> Path:
        return self._file(number, ".files")

    def shards(self, find: Callable[[str | None, int], Iterator[str]]) -> Iterator[Shard]:
        """Yield the shards whose rows are not there yet, in their order, and note where the last one ends.

        Args:
            find: returns the files behind a given one, which is so many-th; None and 0 for all of them.
        """
        number, last, num_files = 0, None, 0
        while True:  # those that an earlier process came to
            if (marker := _read_json(self._marker(number))) is not None:
                last, num_files = marker["last"], num_files + marker["files"]
            elif self._plan(number).exists():
                shard = self.planned(number)
                last, num_files = shard.paths[-1], num_files + len(shard.paths)
                yield shard
            else:
                break
            number += 1
        paths = find(last, num_files)
        while names := tuple(islice(paths, self.job.shard_size)):
            yield Shard(number, names)
            number, num_files = number + 1, num_files + len(names)
        _write_json(self.path / _LISTING_FILE, {"shards": number, "files": num_files})

    def plan(self, shard: Shard) -> None:
        """Write down which files a shard has, for another process; the rows may follow in any order then.

        Raises:
            StorageError: it cannot be written.
        """
        content = b"".join(os.fsencode(path) + b"\0" for path in shard.paths)
        write_bytes(self._plan(shard.number), content)

    def planned(self, number: int) -> Shard:
        """Return a shard that was written down."""
        names = self._plan(number).read_bytes().split(b"\0")[:-1]
        return Shard(number, tuple(map(os.fsdecode, names)))

    def complete(self, number: int, last: str, counts: RowCounts, seconds: dict[str, float]) -> None:
        """Say that the rows of a shard are all there.

        Args:
            last: its last file.
            seconds: spent in each stage.
        Raises:
            StorageError: it cannot be written.
        """
        marker = {"last": last, "files": counts.found, "counts": counts.to_json(), "seconds": seconds}
        _write_json(self._marker(number), marker)

    def done(self) -> tuple[RowCounts, dict[str, float]]:
        """Return the counts and the stages' seconds of all shards that are complete."""
        counts, seconds = RowCounts(), Counter[str]()
        for path in sorted(self.path.glob(f"[0-9]*-{self.job.digest}.json")):
            marker = json.loads(path.read_bytes())
            counts.merge(RowCounts.from_json(marker["counts"]))
            seconds.update(marker["seconds"])
        return counts, dict(seconds)

    def join(self, write: Callable[[list[Path], Path], RowCounts]) -> FinishedTable:
        """Make one table of the shards and note its digest; it is not in its place yet.

        Args:
            write: writes the table from the parts, and returns what it counts.
        Raises:
            StorageError: it cannot be written.
        """
        listing = _read_json(self.path / _LISTING_FILE)
        if listing is None:
            raise RuntimeError(f"{self.path} is to be joined before all files were found: a bug of ours")
        made, _ = self.done()
        if made.found != listing["files"]:
            raise RuntimeError(f"{self.path} has {made.found} rows of {listing['files']} files: a bug of ours")
        parts = [self.rows_path(number) for number in range(listing["shards"])]
        counts = write(parts, self._table)
        finished = FinishedTable(sha256_file(self._table), listing["files"], counts)
        _write_json(
            self.path / _FINISHED_FILE,
            {"sha256": finished.sha256, "files": finished.files, "counts": counts.to_json()},
        )
        return finished

    def finished(self) -> FinishedTable | None:
        """Return the table if an earlier process came so far as to join it, and it is still there."""
        values = _read_json(self.path / _FINISHED_FILE)
        if values is None:
            return None
        finished = FinishedTable(values["sha256"], values["files"], RowCounts.from_json(values["counts"]))
        return finished if self._table.exists() or self._is_in_place(finished) else None

    def put_in_place(self, finished: FinishedTable, *, replace: bool) -> None:
        """Give the table its name; it may have it already, from a process that was broken off behind that.

        Raises:
            PredictionsError: the name was taken meanwhile.
            StorageError: it cannot be written.
        """
        if self._is_in_place(finished):
            return
        table = Path(self.job.table)
        try:
            move_file(self._table, table, replace=replace)
        except AlreadyThereError as error:
            raise PredictionsError(
                f"{display_path(str(table))} was written by another process meanwhile and stays; "
                "run again with --overwrite to replace it: nothing has to be classified again"
            ) from error

    def remove(self) -> None:
        """Remove all of it: the table and its summary are complete.

        Raises:
            StorageError: it cannot be removed.
        """
        _remove_files(self.path, _OURS)

    @property
    def _table(self) -> Path:
        return self.path / f"table{self.job.form.suffix}"

    def _is_in_place(self, finished: FinishedTable) -> bool:
        table = Path(self.job.table)
        return table.is_file() and sha256_file(table) == finished.sha256


def _other_job(path: Path, job: Job, begun: Job, name: str) -> PredictionsError:
    """Say which setting is not the one that the rows were made with."""
    there, now = getattr(begun, name), getattr(job, name)
    return PredictionsError(
        f"{display_path(str(path))} holds a classification that was broken off, with {name} {there!r}; now it is "
        f"{now!r}, and one table is never made with two; run it again as it was, or start over with --overwrite"
    )


def _remove_files(folder: Path, pattern: re.Pattern[str]) -> None:
    """Remove our files from the folder, never anybody else's.

    What they are goes first, so that what is left when this is broken off is never taken for a job.
    """
    with storage_errors(folder):
        names = [file.name for file in folder.iterdir() if pattern.fullmatch(file.name)]
        for name in sorted(names, key=lambda name: name != _JOB_FILE):
            (folder / name).unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    """Write JSON in ASCII only: names of files may hold bytes that are no text, which UTF-8 cannot take."""
    write_text(path, json.dumps(value) + "\n")


def _read_json(path: Path) -> Any | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
