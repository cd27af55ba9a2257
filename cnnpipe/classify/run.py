"""Classify a folder: from settings to a table and its summary, going on where an earlier attempt was broken off."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cnnpipe.classify.earlier import EarlierTable, KeptRows, kept_rows, replace_failed
from cnnpipe.classify.engine import check_top_k
from cnnpipe.classify.job_files import JobFiles
from cnnpipe.classify.output import check_output, default_table
from cnnpipe.classify.running import run_shards
from cnnpipe.classify.shards import FinishedTable, Job, ShardFolder, finished_job, remove_leftovers, shards_folder
from cnnpipe.classify.sort_into import SortedFiles, check_target, mark_target, sort_files
from cnnpipe.classify.summary import (
    ClassificationSummary,
    ModelUsed,
    RowCounts,
    StageReport,
    check_failure_rate,
    remove_summaries,
    write_summary,
)
from cnnpipe.classify.table import join_tables, read_table
from cnnpipe.errors import DatasetError, PredictionsError
from cnnpipe.files import display_path, user_path
from cnnpipe.images.find import check_file_list, has_files, no_listed_file
from cnnpipe.images.leftovers import describe_passed_over
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import package_versions, usable_cores
from cnnpipe.progress import FilesShown, ProgressCallback
from cnnpipe.registry import resolve_model
from cnnpipe.settings import ClassifySettings
from cnnpipe.storage import sha256_file

if TYPE_CHECKING:  # loading onnxruntime takes longer than refusing a wrong path
    from cnnpipe.session import ClassifierSession

__all__ = ["Classification", "classify_folder", "open_classification", "predict_folder"]

_VERSIONS: Final = ("onnxruntime-gpu", "onnxruntime", "pillow", "numpy", "pyarrow")

_FILES_WORTH_ALL_WORKERS: Final = 256

_STAGES: Final = ("list", "decode", "inference", "write")

_logger = logging.getLogger(__name__)


def classify_folder(
    settings: ClassifySettings, artifacts: Path, *, progress: ProgressCallback | None = None
) -> ClassificationSummary:
    """Classify every file below a folder, write the table and, last, `summary.json` beside it.

    Args:
        artifacts: where models are looked up, and where the table goes without `settings.output`.
    Raises:
        FailureBudgetError: more files failed than allowed; table and summary are complete all the same.
        CnnpipeError: as `open_classification` and the methods of `Classification`.
    """
    summary = predict_folder(settings, artifacts, progress=progress)
    check_failure_rate(summary)
    return summary


def predict_folder(
    settings: ClassifySettings, artifacts: Path, *, progress: ProgressCallback | None = None
) -> ClassificationSummary:
    """Do what `classify_folder` does, and leave the failure rate to the caller to judge."""
    with open_classification(settings, artifacts) as classification:
        classification.run(progress)
        return classification.finish()


@contextmanager
def open_classification(settings: ClassifySettings, artifacts: Path) -> Iterator[Classification]:
    """Load the model and take the output: all that can be refused is refused here, before any work is done.

    Raises:
        DatasetError: there is no such folder, or no file in it.
        PredictionsError: the output is there already, is being written by another process, or was begun with other
            settings.
        ModelError, RegistryError: there is no such model.
        ConfigError: `top_k` exceeds the number of classes.
        ProviderError: the device cannot be used.
        StorageError: the output cannot be written.
    """
    started, began = datetime.now(UTC), time.perf_counter()
    root = user_path(settings.folder)
    if not has_files(root) and not settings.files:
        raise DatasetError(f"no files in {display_path(str(root))}; name a folder that has images in or below it")
    if settings.files is not None:
        check_file_list(settings.files, root)
    wanted = user_path(settings.output).absolute() if settings.output else None
    earlier, earlier_sha256 = _check_table(wanted, settings) if wanted else (None, "")
    if settings.sort_into is not None:
        check_target(root, user_path(settings.sort_into))
    model = resolve_model(settings.model, artifacts, settings.precision)
    with ExitStack() as stack:
        pool = DecoderPool(settings.workers or usable_cores(), seconds_per_file=settings.file_timeout)
        # They come up while this process loads onnxruntime; for a few files one is enough.
        many = settings.files is not None or has_files(root, _FILES_WORTH_ALL_WORKERS)
        stack.enter_context(pool).start(pool.workers if many else 1)
        session = _open(model, settings)
        check_top_k(settings.top_k, session)
        known = _keep_rows(earlier, session, settings, stack)
        if settings.incremental and earlier is not None and known is None:
            earlier_sha256 = ""
        job = _describe_job(settings, root, wanted, session, earlier_sha256)
        table = wanted or stack.enter_context(default_table(root, artifacts, started, job, resume=settings.resume))
        if settings.report is not None:
            from cnnpipe.classify.contact_sheet import check_report  # only who wants a report waits for it

            begun = finished_job(table) is not None  # the attempt that is gone on with may have written it
            check_report(user_path(settings.report), settings.replaces_output or begun)
        folder, job = shards_folder(table), replace(job, table=str(table))
        # Trying again needs the rows that stay; without them it would leave a table of nothing.
        needed = settings.retry_failed and earlier is None
        start_over = settings.overwrite and not needed
        resume = settings.resume or needed or finished_job(table) is not None  # that lacks nothing but its summary
        shards = stack.enter_context(ShardFolder.open(folder, job, start_over=start_over, resume=resume))
        yield Classification(settings, session, pool, shards, earlier, known, _Clock(started, began))


def _check_table(table: Path, settings: ClassifySettings) -> tuple[EarlierTable | None, str]:
    """Refuse an output that is in the way; return the table to bring up to date, if that is wanted, and its digest."""
    remove_leftovers(shards_folder(table))
    finished = finished_job(table)
    if finished is not None:  # it still lacks its summary: in nobody's way, and nothing to bring up to date
        return None, finished.earlier_sha256
    check_output(table, replace=settings.replaces_output)
    if not table.exists():
        if settings.retry_failed:
            raise PredictionsError(f"there is no table {table} to try again; leave out --retry-failed")
        return None, ""
    if settings.retry_failed or settings.incremental:
        return EarlierTable(table), sha256_file(table)
    return None, ""


def _keep_rows(
    earlier: EarlierTable | None, session: ClassifierSession, settings: ClassifySettings, stack: ExitStack
) -> KeptRows | None:
    """Return the rows of an earlier table that need not be made again, if it is to be brought up to date by content."""
    if earlier is None:
        return None
    difference = earlier.difference(session.model_sha256, user_path(settings.folder), settings)
    if not difference:
        return stack.enter_context(kept_rows(earlier)) if settings.incremental else None
    if settings.retry_failed:
        raise PredictionsError(
            f"the rows of {earlier.path} were made with {difference}, and one table is never made with two; "
            "classify all files anew, with --overwrite in place of --retry-failed"
        )
    _logger.warning("every file is classified anew: %s was made with %s", earlier.path, difference)
    return None


def _open(model: Path, settings: ClassifySettings) -> ClassifierSession:
    from cnnpipe.session import open_session

    return open_session(model, settings.device, threads=1, precision=settings.precision)


def _describe_job(
    settings: ClassifySettings, root: Path, table: Path | None, session: ClassifierSession, earlier_sha256: str
) -> Job:
    mode = "retry-failed" if settings.retry_failed else "incremental" if settings.incremental else "all"
    return Job(
        root=str(root.absolute()),
        table=str(table or ""),
        mode=mode,
        files=settings.files,
        include=settings.include,
        exclude=settings.exclude,
        earlier_sha256="" if mode == "all" else earlier_sha256,
        model=f"{session.info.name}/{session.info.run_id}",
        model_path=str(session.path.absolute()),
        model_sha256=session.model_sha256,
        precision=session.precision,
        device=session.device,
        # No batch spans two shards, and one that is not full costs a GPU as much as one that is.
        batch_size=settings.batch_size or min(session.default_batch_size, settings.shard_size),
        batch_size_asked=settings.batch_size is not None,
        top_k=settings.top_k,
        shard_size=settings.shard_size,
        safe_csv=settings.safe_csv,
        min_probability=settings.min_probability,
        file_timeout=settings.file_timeout,
        workers=settings.workers or usable_cores(),
        versions=package_versions(_VERSIONS),
    )


@dataclass
class _Clock:
    """When an attempt began, and how long it took to be ready."""

    started: datetime
    began: float
    start_up: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began


class Classification:
    """A classification that is ready to go; made by `open_classification`.

    `run` does the work in this process. `plan` hands it out instead, a shard at a time, to `run_planned_shard` in
    others. `finish` makes the table of what they have left.
    """

    def __init__(
        self,
        settings: ClassifySettings,
        session: ClassifierSession,
        pool: DecoderPool,
        shards: ShardFolder,
        earlier: EarlierTable | None,
        known: KeptRows | None,
        clock: _Clock,
    ) -> None:
        self.shards = shards
        self._settings = settings
        self._session = session
        self._pool = pool
        self._earlier = earlier
        self._known = known
        self._report = user_path(settings.report).absolute() if settings.report else None
        self._files = JobFiles(shards.job, earlier, self._report)
        self._clock = clock
        self._clock.start_up = clock.seconds
        self._resumed, self._resumed_seconds = shards.done()
        if self._resumed.found:
            _logger.info(
                "going on in %s: %d files are done, begun %s; --no-resume starts over",
                *(display_path(str(shards.path)), self._resumed.found, f"{shards.begun:%Y-%m-%d %H:%M}"),
            )

    def run(self, progress: ProgressCallback | None = None) -> None:
        """Classify all files that have no row yet.

        Raises:
            CnnpipeError: as `run_shards`.
        """
        if self.shards.finished() is not None:
            return
        shown = FilesShown(progress, self._files.count, self._resumed.found, self._resumed.error) if progress else None

        def tell(counts: RowCounts) -> None:
            if shown is not None:
                shown.add(counts.found, counts.error)

        shards = self.shards.shards(self._files.behind)
        run_shards(self.shards, shards, self._session, self._pool, usable_cores(), self._known, tell)

    def plan(self) -> Iterator[int]:
        """Yield the numbers of the shards that have no rows yet, each written down for another process.

        Raises:
            StorageError: it cannot be written.
        """
        if self.shards.finished() is not None:
            return
        for shard in self.shards.shards(self._files.behind):
            self.shards.plan(shard)
            yield shard.number

    def finish(self) -> ClassificationSummary:
        """Make one table of the shards, and what else was asked for; the summary last.

        Raises:
            DatasetError: there was no file at all, or none of those in a list exists.
            PredictionsError: the name of the table or of the summary was taken meanwhile.
            StorageError: something cannot be written.
        """
        settings, job = self._settings, self.shards.job
        finished = self.shards.finished() or self.shards.join(self._join)
        if passed_over := self._files.passed_over:
            _logger.warning("%s", describe_passed_over(passed_over))
        if not finished.files and not settings.retry_failed:
            self.shards.remove()
            raise DatasetError(f"no file is left of {_described(settings)}; check the patterns and the list")
        kinds = finished.counts.error_kinds
        if settings.files and kinds["not_found"] + kinds["not_a_file"] == finished.files:  # a pipe's are known only now
            self.shards.remove()
            raise no_listed_file(settings.files, Path(job.root), finished.counts.first_errors[0].path)
        table = Path(job.table)
        replaces = settings.replaces_output or finished_job(table) is not None
        if replaces:
            remove_summaries(table)
        self.shards.put_in_place(finished, replace=settings.replaces_output)
        summary = self._summarize(finished, self._sort())
        if self._report is not None:
            self._write_report(summary, self._report, replace=replaces)
        _logger.info("summary: %s", write_summary(summary, table))
        self.shards.remove()
        return summary

    def _join(self, parts: list[Path], table: Path) -> RowCounts:
        job = self.shards.job
        if self._earlier is not None and self._settings.retry_failed:
            return replace_failed(self._earlier, parts, table, job.form, job.min_probability)
        join_tables(parts, table, job.form)
        counts, _ = self.shards.done()
        return counts

    def _sort(self) -> SortedFiles | None:
        settings, job = self._settings, self.shards.job
        if settings.sort_into is None:
            return None
        rows, target = read_table(Path(job.table), job.form), user_path(settings.sort_into)
        mark_target(target)
        return sort_files(rows, Path(job.root), target, settings.min_probability)

    def _write_report(self, summary: ClassificationSummary, path: Path, *, replace: bool) -> None:
        from cnnpipe.classify.contact_sheet import write_report

        job, accuracy = self.shards.job, self._session.info.test_accuracy
        rows = read_table(Path(job.table), job.form)
        write_report(rows, Path(job.root), summary, path, job.min_probability, test_accuracy=accuracy, replace=replace)

    def _summarize(self, finished: FinishedTable, sorted_files: SortedFiles | None) -> ClassificationSummary:
        settings, session, job, counts = self._settings, self._session, self.shards.job, finished.counts
        made, spent = self.shards.done()
        seconds = {stage: spent.get(stage, 0.0) - self._resumed_seconds.get(stage, 0.0) for stage in _STAGES}
        num_new = made.found - self._resumed.found
        total = self._clock.seconds
        threads = usable_cores() if session.device == "cpu" else 1
        shares = {"decode": self._pool.workers, "inference": threads}
        elapsed = {stage: spent / shares.get(stage, 1) for stage, spent in seconds.items()}
        info = session.info
        return ClassificationSummary(
            table=display_path(job.table),
            folder=display_path(job.root),
            found=counts.found,
            ok=counts.ok,
            error=counts.error,
            resumed=self._resumed.found,
            unchanged=counts.unchanged,
            uncertain=counts.uncertain,
            min_probability=job.min_probability,
            passed_over=self._files.passed_over.total(),
            failure_rate=counts.error / max(counts.found, 1),
            max_failure_rate=settings.max_failure_rate,
            classes={name: counts.labels[name] for name in info.class_names if counts.labels[name]},
            error_kinds=dict(counts.error_kinds.most_common()),
            first_errors=tuple(counts.first_errors),
            images_per_second=num_new / max(total - self._clock.start_up, 1e-9),
            images_per_second_with_start_up=num_new / total,
            seconds=StageReport(total=total, start_up=self._clock.start_up, **seconds),
            slowest_stage=max(elapsed, key=lambda stage: elapsed[stage]),
            device=session.device,
            provider=session.provider,
            precision=job.precision,
            precision_reason=session.precision_reason,
            batch_size=job.batch_size,
            workers=self._pool.workers,
            threads=threads,
            top_k=job.top_k,
            safe_csv=job.safe_csv,
            sorted_files=sorted_files,
            report=display_path(str(self._report)) if self._report else None,
            model=ModelUsed(info.name, info.run_id, display_path(job.model_path), session.model_sha256),
            versions=package_versions(_VERSIONS),
            started=self._clock.started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _described(settings: ClassifySettings) -> str:
    return f"the list {settings.files}" if settings.files else display_path(settings.folder)
