"""Classify a folder: from settings to a table and its summary, resuming where an attempt was interrupted."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cnnpipe.classify.engine import EngineOptions, Rows, Shard, ShardRows, StageSeconds, check_top_k, classify_shards
from cnnpipe.classify.job import BegunJob, Job, JobFile, PreviousTable, job_path, open_job, read_job
from cnnpipe.classify.sort_into import SortedFiles, check_target, mark_target, sort_files
from cnnpipe.classify.summary import ClassificationSummary, ModelUsed, StageReport, write_summary
from cnnpipe.classify.table import read_table, write_table
from cnnpipe.errors import AlreadyThereError, DatasetError, PredictionsError
from cnnpipe.images.find import FileFilter, check_file_list, find_files, has_files, no_listed_file, read_file_list
from cnnpipe.images.leftovers import TABLE_SUFFIXES, describe_passed_over, summary_path
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import package_versions, usable_cores
from cnnpipe.paths import escape_path, expand_path
from cnnpipe.progress import FilesShown, ProgressCallback
from cnnpipe.registry import resolve_model
from cnnpipe.settings import ClassifySettings
from cnnpipe.storage import make_folder, move_file, sha256_file, storage_errors

if TYPE_CHECKING:  # loading onnxruntime takes longer than refusing a wrong path
    from cnnpipe.session import ClassifierSession

__all__ = ["Classification", "classify_folder", "open_classification"]

_VERSIONS: Final = ("onnxruntime-gpu", "onnxruntime", "pillow", "numpy", "pyarrow")

_FILES_WORTH_ALL_WORKERS: Final = 256

_PARTS_WRITTEN: Final = 16
"""Groups of rows, of a batch or a few, that are handed to the writing thread together."""

_MAX_WRITES_WAITING: Final = 4

_TABLE_NAME: Final = "predictions.csv"
_MAX_NAME_BYTES: Final = 100
"""Bytes of the input's name in the name of the output folder; file systems allow 255 in all."""

_logger = logging.getLogger(__name__)


def classify_folder(
    settings: ClassifySettings, artifacts: Path, *, progress: ProgressCallback | None = None
) -> ClassificationSummary:
    """Classify every file below a folder, and write the table and, last, its summary.

    Whether too many files failed is for the caller to judge (`summary.check_failure_rate`).

    Args:
        artifacts: where models are looked up, and where the table goes without `settings.output`.
    Raises:
        CnnpipeError: as `open_classification` and the methods of `Classification`.
    """
    with open_classification(settings, artifacts) as classification:
        classification.run(progress)
        return classification.finish()


@contextmanager
def open_classification(settings: ClassifySettings, artifacts: Path) -> Iterator[Classification]:
    """Load the model and lock the output; all that can be refused is refused here, before any work is done.

    Raises:
        DatasetError: the folder does not exist, or has no files.
        PredictionsError: the output exists, is being written by another process, or was begun with other settings.
        ModelError, RegistryError: the model does not exist.
        ConfigError: `top_k` exceeds the number of classes.
        ProviderError: the device cannot be used.
        StorageError: the output cannot be written.
    """
    started, began = datetime.now(UTC), time.perf_counter()
    root = expand_path(settings.folder)
    if not has_files(root) and not settings.files:
        raise DatasetError(f"no files in {escape_path(str(root))}; name a folder that has images in or below it")
    if settings.files is not None:
        check_file_list(settings.files, root)
    table = expand_path(settings.output).absolute() if settings.output else None
    begun = read_job(job_path(table)) if table else None
    if table is not None:
        _check_output(table, settings, begun)
    if settings.sort_into is not None:
        check_target(root, expand_path(settings.sort_into))
    model = resolve_model(settings.model, artifacts, settings.precision)
    with ExitStack() as stack:
        pool = DecoderPool(settings.workers or usable_cores(), seconds_per_file=settings.file_timeout)
        # They come up while this process loads onnxruntime; for a few files one is enough.
        many = settings.files is not None or has_files(root, _FILES_WORTH_ALL_WORKERS)
        stack.enter_context(pool).start(pool.workers if many else 1)
        from cnnpipe.session import open_session

        session = open_session(model, settings.device, threads=1, precision=settings.precision)
        check_top_k(settings.top_k, session)
        previous, previous_sha256 = _previous_table(table, settings, begun, session)
        job = _describe_job(settings, root, session, previous_sha256)
        if table is None:
            table, begun = stack.enter_context(_default_table(root, artifacts, started, job, settings.resume))
        if settings.report is not None:
            from cnnpipe.classify.contact_sheet import check_report  # only who wants a report waits for it

            # An attempt that came as far as its table may have written the report too.
            overwrite = settings.replaces_output or (begun is not None and begun.table_sha256 != "")
            check_report(expand_path(settings.report), overwrite)
        # Without its rows, trying failed files again would leave a table of nothing else.
        needed = settings.retry_failed and previous is None
        file = open_job(
            job_path(table), replace(job, table=str(table)), session.info.class_names, previous,
            start_over=settings.overwrite and not needed,
            resume=settings.resume or needed or _is_in_place(table, begun),
        )  # fmt: skip
        yield Classification(settings, session, pool, stack.enter_context(file), started, began)


def _check_output(table: Path, settings: ClassifySettings, begun: BegunJob | None) -> None:
    """Refuse an output that cannot be written or may not be replaced.

    Args:
        begun: the job of that name that was interrupted; the table may be its own.
    Raises:
        PredictionsError: the table is a folder or of an unknown suffix, or it or its summary exists.
        StorageError: no file can have this name.
    """
    if table.suffix not in TABLE_SUFFIXES:
        raise PredictionsError(f"the output must end in {', '.join(TABLE_SUFFIXES)}, received {table}")
    for path in (table, summary_path(table)):
        with storage_errors(path):  # such as a name that is too long
            if path.is_dir():
                raise PredictionsError(f"the output must be a file, received the folder {path}; name a file in it")
        if os.path.lexists(path) and not settings.replaces_output and not _is_in_place(table, begun):
            raise PredictionsError(f"{path} exists; name another output, or replace it with --overwrite")
    if settings.retry_failed and not table.exists():
        raise PredictionsError(f"there is no table {table} to try again; leave out --retry-failed")


def _is_in_place(table: Path, begun: BegunJob | None) -> bool:
    """Return whether an interrupted job had its table in place, and lacks only what comes after."""
    return begun is not None and table.is_file() and begun.table_sha256 == sha256_file(table)


def _previous_table(
    table: Path | None, settings: ClassifySettings, begun: BegunJob | None, session: ClassifierSession
) -> tuple[PreviousTable | None, str]:
    """Return the table that a new job brings up to date, and the digest of the one that the job belongs to.

    Args:
        begun: an interrupted job; it has taken the rows over already.
    Raises:
        PredictionsError: nobody knows how the table was made, or its rows cannot be kept beside new ones.
    """
    if table is None or not table.exists() or not (settings.retry_failed or settings.incremental):
        return None, ""
    digest = sha256_file(table)
    if begun is not None and begun.job.mode != "all":
        resumable = settings.resume and begun.job.previous_sha256 in ("", digest)
        if resumable or begun.table_sha256 == digest:
            return None, begun.job.previous_sha256
    previous = PreviousTable.open(table)
    folder = escape_path(str(expand_path(settings.folder).absolute()))
    model = f"{session.info.name}/{session.info.run_id} ({session.model_sha256[:12]}…)"
    compared = (
        ("the folder", previous.folder, folder if settings.retry_failed else previous.folder),
        ("the model", f"{previous.model} ({previous.model_sha256[:12]}…)", model),
        ("top_k", previous.form.top_k, settings.top_k),
        ("safe_csv", previous.form.safe_csv, settings.safe_csv),
    )
    different = [f"{name} {then} (now {now})" for name, then, now in compared if then != now]
    if not different:
        return previous, digest
    if settings.retry_failed:
        raise PredictionsError(
            f"the rows of {table} were made with {different[0]}, and a table cannot mix rows of two models or "
            "settings; classify all files again, with --overwrite in place of --retry-failed"
        )
    _logger.warning("every file is classified again: %s was made with %s", table, different[0])
    return None, ""


def _describe_job(settings: ClassifySettings, root: Path, session: ClassifierSession, previous_sha256: str) -> Job:
    same = ("files", "include", "exclude", "top_k", "shard_size", "safe_csv", "min_probability", "file_timeout")
    return Job(
        **{name: getattr(settings, name) for name in same},
        root=str(root.absolute()),
        table="",
        mode="retry-failed" if settings.retry_failed else "incremental" if settings.incremental else "all",
        previous_sha256=previous_sha256,
        model=f"{session.info.name}/{session.info.run_id}",
        model_path=str(session.path.absolute()),
        model_sha256=session.model_sha256,
        precision=session.precision,
        device=session.device,
        # No batch spans two shards, and one that is not full costs a GPU as much as one that is.
        batch_size=settings.batch_size or min(session.default_batch_size, settings.shard_size),
        batch_size_asked=settings.batch_size is not None,
        workers=settings.workers or usable_cores(),
        versions=package_versions(_VERSIONS),
    )


@contextmanager
def _default_table(
    root: Path, artifacts: Path, started: datetime, job: Job, resume: bool
) -> Iterator[tuple[Path, BegunJob | None]]:
    """Choose where a table without a name goes, in `artifacts/predictions`: to a new folder, or to that of its job.

    A new folder is removed if nothing came of it.

    Args:
        resume: whether an interrupted job is resumed. One whose list came from standard input never is: the next that
            comes so is another list.
    Raises:
        StorageError: no folder can be created.
    """
    files = artifacts.glob(f"predictions/*/{job_path(Path(_TABLE_NAME))}") if resume and job.files != "-" else ()
    for path in sorted(files, reverse=True):
        begun = read_job(path)
        if begun is None:
            continue
        different = job.differences(begun.job)
        if not different:
            yield path.with_name(_TABLE_NAME), begun
            return
        if begun.job.root == job.root:
            _logger.info(
                "%s holds a classification of this folder that was interrupted, with %s %r, now %r; it stays as it is",
                *(escape_path(str(path)), *different[0]),
            )
    name = escape_path(root.resolve().name).encode()[:_MAX_NAME_BYTES].decode("utf-8", "ignore") or "root"
    wanted = make_folder(artifacts / "predictions") / f"{name}-{started:%Y%m%dT%H%M%SZ}"
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with storage_errors(folder), suppress(FileExistsError):  # another one began in the same second
            folder.mkdir()
            break
    try:
        yield folder / _TABLE_NAME, None
    finally:
        with suppress(OSError):  # it is not empty: the table is in it
            folder.rmdir()


class Classification:
    """A classification that is ready to go; made by `open_classification`.

    `run` does the work in this process. To do it in others, `plan` gives shards to hand out, and `add` takes their
    rows. `finish` makes the table.

    Attributes:
        job: the settings that decide about the rows.
    """

    def __init__(
        self,
        settings: ClassifySettings,
        session: ClassifierSession,
        pool: DecoderPool,
        file: JobFile,
        started: datetime,
        began: float,
    ) -> None:
        self.job = file.job
        self._settings = settings
        self._session = session
        self._pool = pool
        self._threads = usable_cores() if session.device == "cpu" else 1
        self._file = file
        self._report = expand_path(settings.report).absolute() if settings.report else None
        self._seconds = StageSeconds()
        self._passed_over: Counter[str] = Counter()
        self._started = started
        self._began = began
        self._start_up = time.perf_counter() - began
        self._resumed, self._resumed_failed, self._pending = file.progress()
        if self._resumed and file.begun is not None:
            _logger.info(
                "resuming %s: %d files are done, begun %s; --no-resume starts over",
                *(escape_path(str(file.path)), self._resumed, f"{file.begun.astimezone():%Y-%m-%d %H:%M}"),
            )

    def run(self, progress: ProgressCallback | None = None) -> None:
        """Classify all files that have no row yet.

        Raises:
            CnnpipeError: as `classify_shards`.
            StorageError: rows cannot be written.
        """
        job, session, shown = self.job, self._session, self.show(progress)
        options = EngineOptions(job.batch_size, job.top_k, self._threads)
        digest = self._file.previous_digest if job.mode == "incremental" and job.previous_sha256 else None
        shards = self._file.shards(self._find)
        found = classify_shards(Path(job.root), shards, session, self._pool, options, self._seconds, digest)
        # Flushing a shard to the disk takes its time: in a thread, while the next one is under way.
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            unwritten: deque[Future[None]] = deque()
            parts: list[ShardRows] = []
            for part in found:
                parts.append(part)
                if part.complete or len(parts) >= _PARTS_WRITTEN:
                    unwritten.append(writer.submit(self._write, parts))
                    parts = []
                while unwritten and (unwritten[0].done() or len(unwritten) > _MAX_WRITES_WAITING):
                    unwritten.popleft().result()
                if shown is not None:
                    shown.add(len(part.rows.paths), len(part.rows.errors))
            for future in unwritten:
                future.result()
        self._file.note("listed", 1)

    def plan(self) -> Iterator[tuple[Shard, list[str]]]:
        """Yield the shards that have no rows yet, to be done in other processes and added in any order.

        Yields:
            A shard, and the SHA-256 that each of its files had in its previous row (empty where there is none).
        Raises:
            StorageError: they cannot be noted.
        """
        for shard in self._file.shards(self._find):
            self._file.plan(shard)
            yield shard, [self._file.previous_digest(path) for path in shard.paths]
        self._file.note("listed", 1)

    def add(self, shard: Shard, rows: Rows, seconds: StageSeconds) -> None:
        """Add the rows of a whole shard that another process has made.

        Args:
            seconds: that its stages took.
        Raises:
            StorageError: they cannot be written.
        """
        for stage, spent in asdict(seconds).items():
            setattr(self._seconds, stage, getattr(self._seconds, stage) + spent)
        self._write([ShardRows(shard, 0, rows)])

    def _write(self, parts: list[ShardRows]) -> None:
        began = time.perf_counter()
        for part in parts:
            self._file.add(part)
        self._seconds.write += time.perf_counter() - began

    def show(self, progress: ProgressCallback | None) -> FilesShown | None:
        """Return what tells a callback how many files are done, and of how many."""
        return FilesShown(progress, self._count_files, self._resumed, self._resumed_failed) if progress else None

    def finish(self) -> ClassificationSummary:
        """Make the table of all rows, and what else was asked for; the summary last.

        Raises:
            DatasetError: there was no file at all, or none of those in a list exists.
            PredictionsError: another process has written a table of that name meanwhile.
            StorageError: something cannot be written.
        """
        settings, job, counts = self._settings, self.job, self._file.counts()
        found, kinds, root, table = counts["found"], counts["error_kinds"], Path(self.job.root), Path(self.job.table)
        if self._passed_over:
            _logger.warning("%s", describe_passed_over(self._passed_over))
        if not found and not settings.retry_failed:
            described = f"the list {settings.files}" if settings.files else escape_path(settings.folder)
            raise DatasetError(f"no file is left of {described}; check the patterns and the list")
        # Paths that come through a pipe are known only now.
        if settings.files and kinds.get("not_found", 0) + kinds.get("not_a_file", 0) == found:
            self._file.remove()
            raise no_listed_file(settings.files, root, counts["first_errors"][0].path)
        self._make_table()
        sorted_files = None
        if settings.sort_into is not None:
            rows, target = read_table(table, job.form), expand_path(settings.sort_into)
            mark_target(target)
            sorted_files = sort_files(rows, root, target, settings.min_probability)
        summary = self._summarize(counts, sorted_files)
        if self._report is not None:
            from cnnpipe.classify.contact_sheet import write_report

            rows, accuracy = read_table(table, job.form), self._session.info.test_accuracy
            write_report(
                rows, root, summary, self._report, job.min_probability, test_accuracy=accuracy,
                replace=settings.replaces_output or self._file.begun is not None,
            )  # fmt: skip
        write_summary(summary, table)
        self._file.remove()
        return summary

    def _make_table(self) -> None:
        """Write the table and put it in place; its digest is noted before, so that a job that is resumed knows it."""
        table, unfinished = Path(self.job.table), self._file.table_path
        write_table(unfinished, self.job.form, self._file.columns())
        digest = sha256_file(unfinished)
        replaces = self._settings.replaces_output or (table.is_file() and sha256_file(table) == digest)
        self._file.note("table_sha256", digest)
        if replaces:  # a summary must never stand beside a table that it does not describe
            with storage_errors(summary_path(table)):
                summary_path(table).unlink(missing_ok=True)
        try:
            move_file(unfinished, table, replace=replaces)
        except AlreadyThereError as error:
            raise PredictionsError(
                f"{escape_path(str(table))} was written by another process meanwhile and stays; "
                "run again with --overwrite to replace it: nothing has to be classified again"
            ) from error

    def _find(self, last: str | None, number: int, passed_over: Counter[str] | None = None) -> Iterator[str]:
        """Yield the files after the `number`-th, which is `last`; all of them after None and 0.

        Raises:
            DatasetError: the folder or the list cannot be read.
            PredictionsError: the list is another one than before.
        """
        job = self.job
        wanted = FileFilter(job.include, job.exclude)
        if job.files is not None:
            return _skip(filter(wanted.admits, read_file_list(job.files)), last, number)
        counted = self._passed_over if passed_over is None else passed_over
        found = find_files(Path(job.root), after=last, passed_over=counted)
        if job.include or job.exclude:
            found = filter(wanted.admits, found)
        return _without_own(found, Path(job.root), [Path(job.table), *([self._report] if self._report else [])])

    def _count_files(self) -> int:
        """Return the number of files, to show progress; 0 where it is not known without reading a list."""
        if self.job.mode == "retry-failed":
            return self._resumed + self._pending
        return 0 if self.job.files is not None else sum(1 for _ in self._find(None, 0, Counter()))

    def _summarize(self, counts: dict[str, Any], sorted_files: SortedFiles | None) -> ClassificationSummary:
        settings, session, job, info = self._settings, self._session, self.job, self._session.info
        seconds, total = asdict(self._seconds), time.perf_counter() - self._began
        num_new = self._file.progress()[0] - self._resumed
        same = ("min_probability", "precision", "batch_size", "top_k", "safe_csv")
        parallel = {"decode": self._pool.workers, "inference": self._threads}
        return ClassificationSummary(
            **counts,
            **{name: getattr(job, name) for name in same},
            table=escape_path(job.table),
            folder=escape_path(job.root),
            resumed=self._resumed,
            passed_over=self._passed_over.total(),
            failure_rate=counts["error"] / max(counts["found"], 1),
            max_failure_rate=settings.max_failure_rate,
            images_per_second=num_new / max(total - self._start_up, 1e-9),
            images_per_second_with_start_up=num_new / total,
            seconds=StageReport(total=total, start_up=self._start_up, **seconds),
            slowest_stage=max(seconds, key=lambda stage: seconds[stage] / parallel.get(stage, 1)),
            device=session.device,
            provider=session.provider,
            precision_reason=session.precision_reason,
            workers=self._pool.workers,
            threads=self._threads,
            sorted_files=sorted_files,
            report=escape_path(str(self._report)) if self._report else None,
            model=ModelUsed(info.name, info.run_id, escape_path(job.model_path), session.model_sha256),
            versions=package_versions(_VERSIONS),
            started=self._started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _skip(paths: Iterator[str], last: str | None, number: int) -> Iterator[str]:
    """Yield what a list has after its `number`-th path, which must be `last`.

    Raises:
        PredictionsError: the list is another one.
    """
    if number:
        reached = next(islice(paths, number - 1, None), None)
        if reached != last:
            raise PredictionsError(
                f"the list of files has changed: number {number:,} was {last!r} and is {reached!r}; "
                "give the same list to resume, or start over with --no-resume"
            )
    yield from paths


def _without_own(paths: Iterator[str], root: Path, files: list[Path]) -> Iterator[str]:
    """Leave out the files that this job will replace, which may not be recognisable as cnnpipe's."""
    base, own = Path(os.path.realpath(root)), set()
    for file in (*files, Path(os.path.realpath(files[0]))):
        path = Path(os.path.realpath(file.parent)) / file.name
        if path.is_relative_to(base):
            own.add(path.relative_to(base).as_posix())
    return (path for path in paths if path not in own) if own else paths
