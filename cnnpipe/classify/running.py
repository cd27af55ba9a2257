"""Run shards: classify their files and put the rows into the folder of shards, in this process or in another."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cnnpipe.classify.earlier import EarlierTable, KeptRows, kept_rows
from cnnpipe.classify.engine import EngineOptions, Shard, StageSeconds, classify_shards
from cnnpipe.classify.shards import Job, ShardFolder
from cnnpipe.classify.summary import RowCounts
from cnnpipe.classify.table import open_table
from cnnpipe.errors import PredictionsError
from cnnpipe.files import display_path
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import package_versions
from cnnpipe.storage import sha256_file

if TYPE_CHECKING:  # loaded by whoever opens the session
    from cnnpipe.session import ClassifierSession

__all__ = ["run_planned_shard", "run_shards"]


def run_shards(
    folder: ShardFolder,
    shards: Iterator[Shard],
    session: ClassifierSession,
    pool: DecoderPool,
    cores: int,
    known: KeptRows | None = None,
    report: Callable[[RowCounts], None] | None = None,
) -> None:
    """Classify shards one behind the other, and complete each as soon as its last row is there.

    A shard is flushed to the disk in a thread of its own while the next one is under way.

    Args:
        session: of one thread, if it runs on the CPU.
        cores: to use.
        known: rows to keep for files whose content is unchanged.
        report: told the counts of every few rows, in order.
    Raises:
        CnnpipeError: as `classify_shards`.
        StorageError: rows cannot be written.
    """
    job, seconds = folder.job, StageSeconds()
    options = EngineOptions(job.batch_size, job.top_k, cores if session.device == "cpu" else 1)
    found = classify_shards(Path(job.root), shards, session, pool, options, seconds, known)
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as flusher:
        flushed: Future[None] | None = None
        spent = asdict(seconds)  # until the end of the shard before
        for number, parts in groupby(found, key=attrgetter("number")):
            counts, last = RowCounts(), ""
            with ExitStack() as stack:
                table = stack.enter_context(open_table(folder.rows_path(number), job.form, part=True))
                for part in parts:
                    began = time.perf_counter()
                    table.write(part.rows)
                    seconds.write += time.perf_counter() - began
                    new = RowCounts()
                    new.add(part.rows, job.min_probability)
                    counts.merge(new)
                    last = part.rows[-1].path
                    if report is not None:
                        report(new)
                if flushed is not None:
                    flushed.result()
                own = {stage: value - spent[stage] for stage, value in asdict(seconds).items()}
                spent = asdict(seconds)
                complete = functools.partial(folder.complete, number, last, counts, own)
                flushed = flusher.submit(_flush, stack.pop_all(), complete)
        if flushed is not None:
            flushed.result()


def _flush(table: ExitStack, complete: Callable[[], None]) -> None:
    """Close a shard's rows, and say then that they are complete."""
    table.close()
    complete()


def run_planned_shard(path: Path, number: int, cores: int = 1) -> RowCounts:
    """Do one shard of a job that another process holds; the model stays loaded in this process for the next one.

    Args:
        path: the folder of shards.
        number: of a shard that was planned.
        cores: to use for decoding and for the model.
    Returns:
        The counts of its rows; nothing if they are there already, from a process that was taken for dead.
    Raises:
        PredictionsError: the job is gone, has another model now, or this machine lacks what it needs.
        CnnpipeError: as `run_shards`.
    """
    job = Job.read(path)
    if job is None:
        raise PredictionsError(f"there is no classification in {path} on {socket.gethostname()}: {_SAME_PATHS}")
    folder, counts = ShardFolder(path, job), RowCounts()
    with _one_at_a_time:
        if not folder.is_complete(number):
            _check_images(Path(job.root))
            session, pool, known = _tools.open(job, cores)
            run_shards(folder, iter([folder.planned(number)]), session, pool, cores, known, counts.merge)
    return counts


_SAME_PATHS: Final = (
    "it was given up, or this machine does not see it; all workers must see the images, the model and the output "
    "under the same paths, such as on a network file system"
)

_one_at_a_time = threading.Lock()
"""A process that is given several shards at once does them one by one: each uses all the cores it was told."""


def _check_images(root: Path) -> None:
    """Refuse to call every file unreadable on a machine that does not see the folder, or sees where it is mounted."""
    try:
        with os.scandir(root) as entries:
            reason = "" if any(entries) else "it is empty"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise PredictionsError(
            f"the images in {display_path(str(root))} cannot be found on {socket.gethostname()}: {reason}; "
            "all workers must see them under the same path, such as on a network file system"
        )


class _Tools:
    """What a job needs in this process, kept from one shard to the next; another job's takes its place."""

    def __init__(self) -> None:
        self._key: tuple[Job, int] | None = None
        self._stack = ExitStack()
        self._opened: tuple[ClassifierSession, DecoderPool, KeptRows | None] | None = None

    def open(self, job: Job, cores: int) -> tuple[ClassifierSession, DecoderPool, KeptRows | None]:
        """Load the model, start decoding processes, and index the rows to keep; raises as `run_planned_shard`."""
        if self._opened is None or self._key != (job, cores):
            self.close()
            atexit.unregister(self.close)
            atexit.register(self.close)
            with ExitStack() as stack:
                self._opened, self._key = _open_tools(job, cores, stack), (job, cores)
                self._stack = stack.pop_all()
        return self._opened

    def close(self) -> None:
        self._opened = None
        self._stack.close()


_tools = _Tools()


def _open_tools(job: Job, cores: int, stack: ExitStack) -> tuple[ClassifierSession, DecoderPool, KeptRows | None]:
    from cnnpipe.session import open_session

    versions = package_versions(tuple(name for name in job.versions if name != "cnnpipe"))
    if versions != job.versions:
        name = next(name for name in {**job.versions, **versions} if versions.get(name) != job.versions.get(name))
        raise PredictionsError(
            f"{socket.gethostname()} has {name} {versions.get(name, 'not at all')} where the classification was begun "
            f"with {job.versions.get(name)}, and one table is never made with two; install the same on all machines"
        )
    pool = stack.enter_context(DecoderPool(cores, seconds_per_file=job.file_timeout))
    pool.start(cores)
    session = open_session(Path(job.model_path), job.device, threads=1)
    if session.model_sha256 != job.model_sha256:
        raise PredictionsError(
            f"{job.model_path} on {socket.gethostname()} is not the model that the classification was begun with"
        )
    if not job.keeps_rows:
        return session, pool, None
    earlier = EarlierTable(Path(job.table))
    if sha256_file(earlier.path) != job.earlier_sha256:
        raise PredictionsError(f"{job.table} has changed since its classification began; start over with --overwrite")
    return session, pool, stack.enter_context(kept_rows(earlier))
