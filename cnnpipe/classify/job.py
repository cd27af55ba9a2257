"""A classification that is under way: one SQLite file beside its table, `<table>.job`, until the table is complete.

Table `job` holds the settings, table `files` a row a file by its position in the final table. A shard is a fixed number
of consecutive files, and its rows come in one transaction: a process that is killed at any moment loses at most the
shards it had in work, and the same files give the same shards, hence the same bytes in the end.

SQLite keeps a rollback journal (`<table>.job-journal`), as a write-ahead log does not work on network file systems, and
flushes every transaction to the disk, so that a power failure costs no more than a kill: with thousands of files in a
transaction, that is cheap.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from cnnpipe.classify.engine import Shard, ShardRows
from cnnpipe.classify.summary import FailedFile
from cnnpipe.classify.table import Columns, TableFormat, read_table
from cnnpipe.errors import PredictionsError, StorageError, one_line
from cnnpipe.images.leftovers import summary_path
from cnnpipe.paths import escape_path, unescape_path
from cnnpipe.storage import make_folder, storage_errors

__all__ = ["BegunJob", "Job", "JobFile", "PreviousTable", "job_path", "open_job", "read_job"]

_APPLICATION_ID: Final = 0x636E6E70
"""Marks an SQLite file as a job of cnnpipe: "cnnp" in ASCII."""

_VERSION: Final = 1
"""Version of the tables below."""

_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
DROP TABLE IF EXISTS job; DROP TABLE IF EXISTS files; DROP TABLE IF EXISTS previous;
CREATE TABLE job (
    settings TEXT NOT NULL,                 -- JSON of `Job`
    begun TEXT NOT NULL,                    -- ISO 8601, UTC
    kept INTEGER NOT NULL DEFAULT 0,        -- rows of the previous table that --retry-failed takes over
    listed INTEGER NOT NULL DEFAULT 0,      -- 1: the last file has been found
    table_sha256 TEXT NOT NULL DEFAULT ''   -- of the final table; set just before it gets its name
);
CREATE TABLE files (
    ordinal INTEGER PRIMARY KEY,            -- position in the table
    path NOT NULL,                          -- TEXT if ASCII, else a BLOB with the bytes of the name
    sha256 TEXT,                            -- empty if the file could not be read
    label INTEGER,                          -- index of the class; NULL if the file failed or is not done
    probability REAL,
    other_ranks BLOB,                       -- int32 labels, then float32 probabilities, of ranks 2 to top_k
    error TEXT,                             -- `kind: message`
    unchanged INTEGER,                      -- 1: the row of the previous table is still true
    shard INTEGER                           -- number of its shard while the file is not done; NULL after
);
CREATE INDEX pending ON files (shard) WHERE shard IS NOT NULL;
CREATE INDEX failed ON files (ordinal) WHERE error IS NOT NULL;
CREATE TABLE previous (                     -- classified rows of the table that --incremental brings up to date
    path PRIMARY KEY,                       -- as displayed, stored as above
    sha256 TEXT, label INTEGER, probability REAL, other_ranks BLOB
) WITHOUT ROWID;
"""

_IRRELEVANT_TO_ROWS: Final = ("table", "model_path", "workers", "batch_size_asked")
"""Fields of a job that do not affect its rows."""

_ROWS_INSERTED: Final = 256
"""Rows of one INSERT statement: faster than one by one, which gives way to other threads after each."""

_ROWS_READ: Final = 16_384
"""Rows read at a time for the final table: some 10 MB, and one row group of Parquet."""

_FAILED_FILES_SHOWN: Final = 10


@dataclass(frozen=True)
class Job:
    """All that decides about the rows of a classification; equal jobs give equal bytes."""

    root: str
    """Absolute path of the folder."""
    table: str
    """Absolute path."""
    mode: str
    """`all`, `retry-failed` or `incremental`."""
    files: str | None
    """Source of the list of files; None for all files of the folder."""
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    previous_sha256: str
    """SHA-256 of the table that is brought up to date; empty if there is none, or none of its rows can be kept."""
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
    """Whether the user chose the batch size; if not, a job that is resumed keeps the one it began with."""

    def to_json(self) -> str:
        """Return the job as JSON, in ASCII only: names may hold bytes that are not text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the job that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "include": tuple(values["include"]), "exclude": tuple(values["exclude"])})

    @property
    def form(self) -> TableFormat:
        """How the table is written."""
        return TableFormat(Path(self.table).suffix, self.top_k, self.safe_csv)

    def differences(self, begun: Job) -> list[tuple[str, Any, Any]]:
        """Return the fields that affect rows and differ from those of a job begun before, as (name, then, now)."""
        free = _IRRELEVANT_TO_ROWS if self.batch_size_asked else (*_IRRELEVANT_TO_ROWS, "batch_size")
        both = ((name, getattr(begun, name), now) for name, now in vars(self).items() if name not in free)
        return [(name, then, now) for name, then, now in both if then != now]


@dataclass(frozen=True)
class BegunJob:
    """Content of the job file of an interrupted classification."""

    job: Job
    table_sha256: str
    """SHA-256 of the final table; empty until all rows are there."""
    begun: datetime


@dataclass(frozen=True)
class PreviousTable:
    """A finished table that is brought up to date, and how it was made."""

    path: Path
    form: TableFormat
    folder: str
    model: str
    """`<name>/<run id>`."""
    model_sha256: str

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return a table by its summary.

        Raises:
            PredictionsError: it has none, or one of another version.
        """
        shown, described = escape_path(str(path)), escape_path(summary_path(path).name)
        try:
            summary = json.loads(summary_path(path).read_bytes())
            form, model = TableFormat(path.suffix, summary["top_k"], summary["safe_csv"]), summary["model"]
            return cls(path, form, str(summary["folder"]), f"{model['name']}/{model['run_id']}", str(model["sha256"]))
        except (OSError, ValueError) as error:
            raise PredictionsError(
                f"{shown} has no {described} beside it that says how it was made; classify again with --overwrite"
            ) from error
        except (KeyError, TypeError) as error:
            raise PredictionsError(
                f"the summary of {shown} is from another version ({one_line(error)}); classify again with --overwrite"
            ) from error

    def rows(self, root: Path, shard_size: int, class_names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the rows as the table `files` holds them, up to `other_ranks`, and the shard of a file that failed.

        Raises:
            PredictionsError: the table cannot be read, or has a label that is not one of the classes.
        """
        indices, failed = {name: index for index, name in enumerate(class_names)}, count()
        for ordinal, row in enumerate(read_table(self.path, self.form)):
            path = row.path
            if row.status == "error":
                if "\\x" in path:
                    path = str(unescape_path(root, path)).removeprefix(f"{root}/")
                yield ordinal, *_stored([path]), None, None, None, None, next(failed) // shard_size
                continue
            try:
                labels = np.array([[indices[label] for label in row.labels]], np.int32)
            except KeyError as error:
                raise PredictionsError(
                    f"{escape_path(str(self.path))} has the label {error}, which is not a class of the model; "
                    "classify again with --overwrite"
                ) from error
            probabilities = np.array([row.probabilities], np.float32)
            others = _pack_ranks(labels, probabilities)[0] if len(row.labels) > 1 else None
            yield ordinal, *_stored([path]), row.sha256, int(labels[0, 0]), float(probabilities[0, 0]), others, None


def job_path(table: Path) -> Path:
    """Return the path of a table's job file."""
    return table.with_name(f"{table.name}.job")


def read_job(path: Path) -> BegunJob | None:
    """Return what a job file says; None if there is none, a process holds it, or it is of another version.

    Raises:
        StorageError: no file can have this name.
    """
    with storage_errors(path):  # such as a name that is too long
        if not path.is_file():
            return None
    with suppress(PredictionsError, StorageError), closing(_connect(path)) as database:
        return _read(database, path)
    return None


@contextmanager
def open_job(
    path: Path,
    job: Job,
    class_names: Sequence[str],
    previous: PreviousTable | None,
    *,
    start_over: bool,
    resume: bool = True,
) -> Iterator[JobFile]:
    """Begin a job, or resume it where an earlier process was interrupted; the file is locked until the block ends.

    Args:
        previous: the table whose rows a new job takes over.
        start_over: whether the rows of a job of other settings may be dropped.
        resume: whether those of the same job are kept.
    Raises:
        PredictionsError: another process holds the file, it has the rows of another job, or is something else.
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    with closing(_connect(path)) as database:
        begun = None
        if resume:
            with suppress(PredictionsError) if start_over else nullcontext():
                begun = _read(database, path, job)
        file = JobFile(path, database, job, class_names, begun)
        try:
            if begun is None:
                file.create(previous)
            yield file
        finally:
            if file.roll_back():  # nothing is worth resuming
                file.remove()


def _connect(path: Path) -> sqlite3.Connection:
    """Open a file and lock it: SQLite's own lock, which ends with the process, even if it is killed.

    Raises:
        PredictionsError: another process holds it, or it is not a job file.
        StorageError: it cannot be opened.
    """
    shown = escape_path(str(path))
    if path.is_dir():
        raise PredictionsError(f"{shown} is a folder, not a job file; rename or remove it")
    while True:
        try:
            with ExitStack() as stack:
                database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
                stack.callback(database.close)
                database.execute("PRAGMA locking_mode = EXCLUSIVE")
                database.execute("BEGIN EXCLUSIVE")
                database.execute("COMMIT")
                (application,) = database.execute("PRAGMA application_id").fetchone()
                if application != _APPLICATION_ID and database.execute("SELECT 1 FROM sqlite_master").fetchone():
                    raise PredictionsError(f"{shown} is an SQLite file of another program; rename or remove it")
                if path.exists():
                    stack.pop_all()
                    return database
            # Whoever held it has just finished, and removed it.
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:  # without its extension
                raise PredictionsError(
                    f"another process is writing {shown.removesuffix('.job')}; wait for it, or name another --output"
                ) from error
            raise _storage_error(path, error) from error
        except sqlite3.DatabaseError as error:
            raise PredictionsError(f"{shown} is not a job file of cnnpipe ({error}); rename or remove it") from error


def _read(database: sqlite3.Connection, path: Path, job: Job | None = None) -> BegunJob | None:
    """Return what a job file says; None if it is new.

    Args:
        job: what its settings must be.
    Raises:
        PredictionsError: it is of another version, or has the rows of another job.
        StorageError: it cannot be read.
    """
    shown = escape_path(str(path))
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if not version:
            return None
        if version != _VERSION:
            raise ValueError(f"version {version}")
        settings, table, begun = database.execute("SELECT settings, table_sha256, begun FROM job").fetchone()
        found = BegunJob(Job.from_json(settings), table, datetime.fromisoformat(begun))
    except (ValueError, TypeError, KeyError, sqlite3.OperationalError) as error:
        raise PredictionsError(
            f"{shown} holds a classification that another version of cnnpipe began; finish it with that version, "
            "or start over with --overwrite"
        ) from error
    except sqlite3.Error as error:
        raise _storage_error(path, error) from error
    if job is not None and (different := job.differences(found.job)):
        name, then, now = different[0]
        raise PredictionsError(
            f"{shown} holds a classification that was interrupted, with {name} {then!r}; now it is {now!r}, "
            "and a table cannot mix rows of two settings; run it again as it was, or start over with --overwrite"
        )
    return found


def _storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    remedy = (
        "free some space"
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
        else "check the folder, its permissions and the disk"
    )
    return StorageError(f"cannot write {escape_path(str(path))}: {one_line(error)}; {remedy}")


class JobFile:
    """The rows of one job, in a file that this process has locked; made by `open_job`.

    Attributes:
        path: of the file.
        job: the settings.
        begun: when an earlier process began the job; None if this one did.
        table_path: where the final table is written before it gets its name.
    """

    def __init__(
        self, path: Path, database: sqlite3.Connection, job: Job, class_names: Sequence[str], begun: BegunJob | None
    ) -> None:
        self.path = path
        self.job = replace(job, batch_size=begun.job.batch_size) if begun else job
        self.begun = begun.begun if begun else None
        self.table_path = path.with_name(f"{path.name}-table")
        self._database = database
        self._class_names = class_names

    def shards(self, find: Callable[[str | None, int], Iterator[str]]) -> Iterator[Shard]:
        """Yield the shards that have no rows yet, in order.

        Args:
            find: returns the files after the one of a path and a position; None and 0 for all files.
        """
        pending = self._fetch("SELECT DISTINCT shard FROM files WHERE shard IS NOT NULL ORDER BY shard")
        for (number,) in pending:
            query = "SELECT ordinal, path FROM files WHERE shard = ? ORDER BY ordinal"
            ordinals, paths = zip(*self._fetch(query, number), strict=True)
            yield Shard(number, [_name(path) for path in paths], ordinals)
        if self._fetch("SELECT listed FROM job")[0][0]:
            return
        last = self._fetch("SELECT ordinal, path FROM files ORDER BY ordinal DESC LIMIT 1")
        start = last[0][0] + 1 if last else 0
        found = find(_name(last[0][1]) if last else None, start)
        size = self.job.shard_size
        while names := list(islice(found, size)):
            yield Shard(-(-start // size), names, range(start, start + len(names)))
            start += len(names)

    def note(self, column: Literal["listed", "table_sha256"], value: int | str) -> None:
        """Note in the table `job` that all files are listed, or the digest of the final table; raises StorageError."""
        with self._transaction():
            self._database.execute(f"UPDATE job SET {column} = ?", (value,))  # noqa: S608

    def plan(self, shard: Shard) -> None:
        """Note the files of a shard whose rows may come after those of later shards; raises StorageError."""
        with self._transaction():
            self._insert(ordinal=shard.ordinals, path=_stored(shard.paths), shard=[shard.number] * len(shard.paths))

    def add(self, part: ShardRows) -> None:
        """Add rows; the transaction ends with the last ones of a shard.

        Raises:
            StorageError: they cannot be written.
        """
        rows, shard, start = part.rows, part.shard, part.start
        columns: dict[str, list[Any]] = {
            "path": _stored(rows.paths),
            "sha256": rows.sha256,
            "label": rows.labels[:, 0].tolist(),
            "probability": rows.probabilities[:, 0].tolist(),
        }
        if rows.labels.shape[1] > 1:
            columns["other_ranks"] = _pack_ranks(rows.labels, rows.probabilities)
        for index in rows.errors:
            for name in columns.keys() - {"path", "sha256"}:
                columns[name][index] = None
        if rows.errors:
            columns["error"] = [rows.errors.get(index) for index in range(len(rows.paths))]
        if rows.unchanged:
            columns["unchanged"] = [None] * len(rows.paths)
            names = [name for name in ("label", "probability", "other_ranks") if name in columns]
            query = f"SELECT {', '.join(names)}, 1 FROM previous WHERE path = ?"  # noqa: S608  our own names
            for index in rows.unchanged:
                [row] = self._fetch(query, *_stored([escape_path(rows.paths[index])]))
                for name, value in zip((*names, "unchanged"), row, strict=True):
                    columns[name][index] = value
        with self._transaction(commit=part.complete):
            self._insert(ordinal=shard.ordinals[start : start + len(rows.paths)], **columns)

    def previous_digest(self, path: str) -> str:
        """Return the SHA-256 that a file had when its previous row was made; empty if there is no row to keep."""
        found = self._fetch("SELECT sha256 FROM previous WHERE path = ?", *_stored([escape_path(path)]))
        return str(found[0][0]) if found else ""

    def progress(self) -> tuple[int, int, int]:
        """Return the numbers of files that are done, that failed among them, and that are planned but not done.

        Rows taken over from a previous table that is retried count in none.
        """
        query = "SELECT count(*) - count(shard) - (SELECT kept FROM job), count(error), count(shard) FROM files"
        done, failed, pending = self._fetch(query)[0]
        return done, failed, pending

    def counts(self) -> dict[str, Any]:
        """Return the counts of the rows, by their names in `ClassificationSummary`."""
        least = float(np.float32(self.job.min_probability))  # as float32, like the probabilities
        query = (
            "SELECT label, count(*), count(error), ifnull(sum(probability < ?), 0), count(unchanged) "
            "FROM files GROUP BY label ORDER BY label"
        )
        groups = self._fetch(query, least)
        found, error, uncertain, unchanged = (sum(group[index] for group in groups) for index in range(1, 5))
        kinds = (
            "SELECT substr(error, 1, instr(error, ': ') - 1), count(*) FROM files WHERE error IS NOT NULL "
            "GROUP BY 1 ORDER BY 2 DESC, min(ordinal)"
        )
        first = "SELECT path, error FROM files WHERE error IS NOT NULL ORDER BY ordinal LIMIT ?"
        failed = self._fetch(first, _FAILED_FILES_SHOWN)
        return {
            "found": found,
            "ok": found - error,
            "error": error,
            "uncertain": uncertain,
            "unchanged": unchanged,
            "classes": {self._class_names[label]: number for label, number, *_ in groups if label is not None},
            "error_kinds": dict(self._fetch(kinds)),
            "first_errors": tuple(FailedFile(escape_path(_name(path)), *text.split(": ", 1)) for path, text in failed),
        }

    def columns(self) -> Iterator[Columns]:
        """Yield all rows in order, some thousands at a time."""
        class_names = np.array([*self._class_names, None], object)
        query = (
            "SELECT path, nullif(sha256, ''), ifnull(label, -1), ifnull(probability, -1), other_ranks, error "
            "FROM files ORDER BY ordinal"
        )
        with self._errors(), closing(self._database.execute(query)) as rows:
            while group := rows.fetchmany(_ROWS_READ):
                paths, sha256, first_labels, first, others, errors = zip(*group, strict=True)
                labels, probabilities = np.array([first_labels], np.int32), np.array([first], np.float32)
                if self.job.top_k > 1:
                    other_labels, other_probabilities = _unpack_ranks(others, self.job.top_k)
                    labels = np.concatenate([labels, other_labels])
                    probabilities = np.concatenate([probabilities, other_probabilities])
                if set(map(type, paths)) != {str}:
                    paths = tuple(escape_path(_name(path)) for path in paths)
                names = [class_names[each].tolist() for each in labels]
                yield Columns(paths, names, probabilities, errors, sha256, self.job.model)

    def remove(self) -> None:
        """Remove the file: the table and its summary are complete, or there is nothing to resume.

        Raises:
            StorageError: it cannot be removed.
        """
        with self._errors():
            # Closing must not delete a journal of this name: it may be that of the process that comes next.
            self._database.execute("PRAGMA journal_mode = MEMORY")
        with storage_errors(self.path):
            for suffix in ("-table", "-journal", ""):  # the file last: without its journal it could not be read
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def create(self, previous: PreviousTable | None) -> None:
        """Write the settings and the rows of a previous table that are taken over, in one transaction."""
        job = self.job
        with self._errors():
            self._database.executescript(f"BEGIN; {_SCHEMA}")
        with self._transaction():
            row = (job.to_json(), datetime.now(UTC).isoformat(timespec="seconds"))
            self._database.execute("INSERT INTO job (settings, begun) VALUES (?, ?)", row)
            if previous is not None and job.previous_sha256:
                rows = previous.rows(Path(job.root), job.shard_size, self._class_names)
                if job.mode == "retry-failed":
                    columns = "ordinal, path, sha256, label, probability, other_ranks, shard"
                    insert = f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
                    self._database.executemany(insert, rows)
                    kept = "SELECT count(*) - count(shard) FROM files"
                    self._database.execute(f"UPDATE job SET listed = 1, kept = ({kept})")  # noqa: S608
                else:  # what failed is tried again: it may have been the disk, or the time limit
                    kept_rows = (row[1:6] for row in rows if row[3] is not None)
                    self._database.executemany("INSERT OR REPLACE INTO previous VALUES (?, ?, ?, ?, ?)", kept_rows)

    def _insert(self, **columns: Sequence[Any]) -> None:
        """Insert rows, or replace those of the same ordinals; columns that are not named are NULL."""
        names, row = ", ".join(columns), f"({', '.join('?' * len(columns))})"
        rows = zip(*columns.values(), strict=True)
        while block := list(islice(rows, _ROWS_INSERTED)):
            values = ", ".join([row] * len(block))
            statement = f"INSERT OR REPLACE INTO files ({names}) VALUES {values}"  # noqa: S608  our own names
            self._database.execute(statement, tuple(chain.from_iterable(block)))

    def _fetch(self, query: str, *parameters: Any) -> list[Any]:
        with self._errors():
            return self._database.execute(query, parameters).fetchall()

    @contextmanager
    def _transaction(self, *, commit: bool = True) -> Iterator[None]:
        """Do what the block does in the open transaction, or in a new one."""
        with self._errors():
            if not self._database.in_transaction:
                self._database.execute("BEGIN")
            yield
            if commit:
                self._database.execute("COMMIT")

    def roll_back(self) -> bool:
        """Drop the rows of a shard that is not complete, and return whether there is no row at all."""
        with suppress(sqlite3.Error):  # a disk that has just failed must not hide the error that says so
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if self._database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'files'").fetchone()[0]:
                return not self._database.execute("SELECT EXISTS (SELECT 1 FROM files)").fetchone()[0]
            return True
        return False

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn an error of SQLite into one clear line."""
        try:
            yield
        except sqlite3.Error as error:
            raise _storage_error(self.path, error) from error


def _stored(paths: Iterable[str]) -> list[str | bytes]:
    """Return paths as the database holds them."""
    return [path if path.isascii() else os.fsencode(path) for path in paths]


def _name(stored: str | bytes) -> str:
    """Return the path that `_stored` stands for, with undecodable bytes as surrogates (PEP 383)."""
    return stored if isinstance(stored, str) else os.fsdecode(stored)


def _pack_ranks(labels: npt.NDArray[np.int32], probabilities: npt.NDArray[np.float32]) -> list[bytes]:
    """Return the column `other_ranks` of (N, top_k) labels and probabilities."""
    packed = np.concatenate([labels[:, 1:], probabilities[:, 1:].view(np.int32)], axis=1)
    return [row.tobytes() for row in packed]


def _unpack_ranks(packed: Sequence[bytes | None], top_k: int) -> tuple[Any, Any]:
    """Return labels and probabilities of the ranks after the first, (ranks, rows); -1 in rows without."""
    none = np.full(2 * (top_k - 1), -1, np.int32).tobytes()
    values = np.frombuffer(b"".join(each or none for each in packed), np.int32).reshape(len(packed), -1).T
    labels, probabilities = np.split(values, 2)
    return labels, np.ascontiguousarray(probabilities).view(np.float32)
