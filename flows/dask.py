"""Classify on a Dask cluster: one Prefect task a shard, a bounded number of them under way.

The process of the flow lists the files and keeps the rows; workers are sent the files of a shard and return its rows.
So all machines must see the images and the model under the same paths, and nothing else. Imports neither prefect nor
Dask until it is asked to run.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Literal

from cnnpipe.classify.engine import EngineOptions, Rows, Shard, StageSeconds, classify_shards
from cnnpipe.classify.job import Job
from cnnpipe.errors import ConfigError, PredictionsError, ServerError, UsageError, one_line
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import package_versions, usable_cores
from cnnpipe.paths import escape_path
from cnnpipe.progress import ProgressCallback

if TYPE_CHECKING:  # Dask is an extra, and all of these are slow to import
    from distributed import Client, Future
    from prefect import State, Task
    from prefect_dask import DaskTaskRunner

    from cnnpipe.classify.run import Classification
    from cnnpipe.session import ClassifierSession

__all__ = ["Runner", "check_runner", "classify_on_dask", "cluster_task_runner", "run_shard"]

Runner = Literal["local", "dask"]

SECONDS_WITHOUT_WORKERS: Final = 600.0
"""Seconds that a cluster may be without workers: one that starts machines when there is work needs minutes."""

_ADDRESS: Final = re.compile(r"(tcp|tls|ws|wss)://\S+:\d{1,5}")
_LOOPBACK: Final = "127.0.0.1"
_SECONDS_TO_CONNECT: Final = 10.0

_IGNORE_INTERRUPT: Final = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Run by each worker at its start: Ctrl-C goes to all processes of a terminal, and this one ends its workers itself."""

_LOCAL_CLUSTER: Final = {
    "threads_per_worker": 1,
    "host": _LOOPBACK,
    # Any free port: Dask listens for its dashboard even where there is none.
    "dashboard_address": f"{_LOOPBACK}:0",
    "scheduler_kwargs": {"dashboard": False},
    "memory_limit": 0,  # the engine keeps its own; Dask would kill a worker by what it guesses
    "preload": _IGNORE_INTERRUPT,
    "silence_logs": logging.ERROR,
}

_SHARDS_PER_WORKER: Final = 4
"""Shards handed out at a time: enough that no worker waits, few enough that memory stays bounded."""

_MAX_FAILED_SHARDS: Final = 20
"""Failed shards after which the rest is not tried: it would fail the same way."""

_SECONDS_BETWEEN_LOOKS: Final = 5.0
"""Seconds between two looks at the workers while none of them finishes a shard."""

_logger = logging.getLogger("cnnpipe.cluster")


def check_runner(runner: Runner, scheduler: str | None) -> None:
    """Refuse a runner that cannot work, before anything is started.

    Args:
        scheduler: address of a Dask scheduler; None for a cluster on this machine.
    Raises:
        UsageError: the address is not one, or the runner does not use it.
        ConfigError: Dask is not installed.
    """
    if scheduler is not None and runner != "dask":
        raise UsageError(f"--scheduler is for --runner dask, received {scheduler!r} with --runner {runner}")
    if scheduler is not None and not _ADDRESS.fullmatch(scheduler):
        raise UsageError(
            f"--scheduler must be the address of a Dask scheduler, such as tcp://host:8786, received {scheduler!r}"
        )
    if runner == "dask" and find_spec("prefect_dask") is None:
        raise ConfigError(
            "--runner dask needs prefect-dask, which is not installed; `make setup` brings it, "
            "elsewhere: pip install 'cnnpipe[dask]'"
        )


def classify_on_dask(
    classification: Classification, task: Task[..., Any], scheduler: str | None, progress: ProgressCallback
) -> None:
    """Do the shards of a classification that have no rows yet on a Dask cluster.

    A shard whose worker is lost is done again by another one; one that fails is left out, and the others go on.

    Args:
        task: a task around `run_shard`.
        scheduler: address of the cluster's scheduler; None starts a cluster on this machine, and ends it again.
    Raises:
        ServerError: there is no scheduler, it has no workers, or it was lost.
        PredictionsError: shards failed; the rows of the others are kept.
    """
    shards = classification.plan()  # lists files no faster than they are taken
    first = next(shards, None)
    if first is None:  # an earlier attempt came this far, and no cluster is needed
        return
    with cluster_task_runner(scheduler, task) as runner, ThreadPoolExecutor(1, "submit") as submitter:
        under_way = _ShardsUnderWay(classification, task, runner, submitter, progress)
        for shard, previous_sha256 in chain([first], shards):
            under_way.submit(shard, previous_sha256)
        under_way.finish()


def run_shard(job: str, number: int, files: bytes, previous_sha256: list[str], cores: int) -> tuple[Rows, StageSeconds]:
    """Classify one shard in this process, which keeps the model loaded for the next one.

    Args:
        job: the settings, as `Job.to_json` gives them.
        files: paths relative to the folder, each ended by NUL.
        previous_sha256: SHA-256 of each file in its previous row; empty for none.
        cores: for decoding and for the model.
    Returns:
        The rows of the shard, and the seconds of its stages.
    Raises:
        PredictionsError: this machine lacks what the job needs.
        CnnpipeError: as `classify_shards`.
    """
    settings = Job.from_json(job)
    paths = [os.fsdecode(path) for path in files.split(b"\0")[:-1]]
    digests = dict(zip(paths, previous_sha256, strict=True)) if any(previous_sha256) else None
    root, seconds = Path(settings.root), StageSeconds()
    with _one_at_a_time:
        # A machine that does not see the folder, or only where it is mounted, must not call every file unreadable.
        try:
            reason = "" if any(root.iterdir()) else "it is empty"
        except OSError as error:
            reason = one_line(error.strerror)
        if reason:
            raise PredictionsError(
                f"the images in {escape_path(settings.root)} cannot be found on {socket.gethostname()}: {reason}; "
                "all workers must see them under the same path, such as on a network file system"
            )
        if (job, cores) not in _opened:
            _opened.clear()
            _open_tools.close()
            atexit.register(_open_tools.close)
            with ExitStack() as stack:
                _opened[job, cores] = _open(settings, cores, stack)
                _open_tools.push(stack.pop_all())
        session, pool = _opened[job, cores]
        options = EngineOptions(settings.batch_size, settings.top_k, cores if session.device == "cpu" else 1)
        digest = digests.__getitem__ if digests else None
        parts = classify_shards(root, iter([Shard(number, paths)]), session, pool, options, seconds, digest)
        return Rows.join([part.rows for part in parts]), seconds


_one_at_a_time = threading.Lock()
"""Held while a shard is done: a process that is given several shards at once uses all its cores for each."""

_opened: dict[tuple[str, int], tuple[ClassifierSession, DecoderPool]] = {}
"""The model and decoding processes by job and cores: kept from one shard to the next, until another job comes."""

_open_tools = ExitStack()


def _open(job: Job, cores: int, stack: ExitStack) -> tuple[ClassifierSession, DecoderPool]:
    """Load the model and start decoding processes; raises as `run_shard`."""
    from cnnpipe.session import open_session

    host, model = socket.gethostname(), escape_path(job.model_path)
    versions = package_versions(tuple(name for name in job.versions if name != "cnnpipe"))
    for name in {**job.versions, **versions}:
        if versions.get(name) != job.versions.get(name):
            raise PredictionsError(
                f"{host} has {name} {versions.get(name, 'not at all')} where the classification was begun with "
                f"{job.versions.get(name)}, and a table cannot mix rows of two versions; install the same on all "
                "machines"
            )
    if not Path(job.model_path).exists():
        raise PredictionsError(
            f"there is no model {model} on {host}; all workers must see the images and the model under the same paths, "
            "such as on a network file system"
        )
    pool = stack.enter_context(DecoderPool(cores, seconds_per_file=job.file_timeout))
    pool.start(cores)
    session = open_session(Path(job.model_path), job.device, threads=1)
    if session.model_sha256 != job.model_sha256:
        raise PredictionsError(f"{model} on {host} is not the model that the classification was begun with")
    return session, pool


class _ShardsUnderWay:
    """The shards that were handed to workers and have not ended."""

    def __init__(
        self,
        classification: Classification,
        task: Task[..., Any],
        runner: DaskTaskRunner,
        submitter: Executor,
        progress: ProgressCallback,
    ) -> None:
        self._classification = classification
        self._task = task
        self._runner = runner
        self._submitter = submitter
        self._shown = classification.show(progress)
        self._workers: set[str] = set()
        self._futures: dict[str, tuple[Shard, Future]] = {}
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._num_handed_out = 0
        self._failed: dict[int, str] = {}

    def submit(self, shard: Shard, previous_sha256: list[str]) -> None:
        """Hand a shard to a worker, as soon as few enough are under way; raises as `classify_on_dask`."""
        while len(self._futures) >= _SHARDS_PER_WORKER * max(1, self._count_workers()):
            self._take_one()
        parameters = {
            "job": self._classification.job.to_json(),
            "number": shard.number,
            "files": b"".join(os.fsencode(path) + b"\0" for path in shard.paths),
            "previous_sha256": previous_sha256,
        }
        # In a thread: here, Ctrl-C would be raised inside of pydantic's serializer, which makes another error of it.
        submit = partial(copy_context().run, self._runner.submit, self._task, parameters)
        future = self._submitter.submit(submit).result().wrapped_future
        self._futures[future.key] = (shard, future)
        self._num_handed_out += 1
        future.add_done_callback(self._ended.put)

    def finish(self) -> None:
        """Wait for all of them; raises as `classify_on_dask`."""
        while self._futures:
            self._take_one()
        self._check_failed(1)

    def _take_one(self) -> None:
        """Wait for the next shard that ends, and keep its rows or the reason why it failed."""
        shard, future = self._futures.pop(self._wait_for_one().key)
        error = future.exception()  # of Dask, such as of a shard that took several workers along
        if future.cancelled():
            raise _lost_scheduler()
        outcome = error or _fetch_state(future).result(raise_on_failure=False)
        if isinstance(outcome, tuple):
            rows, seconds = outcome
            self._classification.add(shard, rows, seconds)
            if self._shown is not None:
                self._shown.add(len(rows.paths), len(rows.errors))
            return
        self._failed[shard.number] = one_line(outcome, 400) or type(outcome).__name__
        _logger.error("shard %d failed: %s", shard.number, self._failed[shard.number])
        self._check_failed(_MAX_FAILED_SHARDS)

    def _wait_for_one(self) -> Future:
        """Return the next shard that has ended; meanwhile, watch that there are workers."""
        seen = time.monotonic()
        while True:
            if self._count_workers():
                seen = time.monotonic()
            elif time.monotonic() - seen > SECONDS_WITHOUT_WORKERS:
                raise ServerError(
                    f"the Dask cluster has had no workers for {SECONDS_WITHOUT_WORKERS:.0f} s; "
                    "finished rows are kept: start workers and run it again"
                )
            with suppress(Empty):
                return self._ended.get(timeout=_SECONDS_BETWEEN_LOOKS)

    def _count_workers(self) -> int:
        """Return the number of workers, and log those that were lost."""
        try:
            if self._runner.client.status != "running":
                raise _lost_scheduler()
            workers = set(self._runner.client.nthreads())
        except OSError as error:
            raise _lost_scheduler() from error
        for address in self._workers - workers:
            _logger.warning("the worker at %s has gone; what it had begun is done again", address)
        if self._workers and not workers:
            _logger.warning("the Dask cluster has no workers any more; waiting for one")
        self._workers = workers
        return len(workers)

    def _check_failed(self, too_many: int) -> None:
        if len(self._failed) >= too_many:
            first = min(self._failed)
            raise PredictionsError(
                f"{len(self._failed):,} of {self._num_handed_out:,} shards failed, number {first} because: "
                f"{self._failed[first]}; finished rows are kept: fix that and run it again, which does what is missing"
            )


def _fetch_state(future: Future) -> State[Any]:
    """Return the Prefect state of a shard that has ended; the scheduler may be lost before it arrives."""
    try:
        state: State[Any] = future.result()
    except OSError as error:
        raise _lost_scheduler() from error
    return state


def _lost_scheduler() -> ServerError:
    return ServerError("the connection to the Dask scheduler was lost; finished rows are kept: run it again")


@contextmanager
def cluster_task_runner(scheduler: str | None, task: Task[..., Any]) -> Iterator[DaskTaskRunner]:
    """Connect a task runner to a cluster that has at least one worker.

    Args:
        task: what the workers will run; they must be able to import its module.
        scheduler: address of the cluster's scheduler; None starts a cluster on this machine, one process a core.
    Raises:
        ServerError: there is none, or it has no workers that can do the work.
    """
    from prefect_dask import DaskTaskRunner

    with ExitStack() as stack:
        if scheduler is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="cnnpipe-dask-"))
            own = {"n_workers": usable_cores(), "local_directory": scratch, **_LOCAL_CLUSTER}
            runner = DaskTaskRunner(cluster_kwargs=own)
        else:
            _check_scheduler(scheduler)
            runner = DaskTaskRunner(address=scheduler, client_kwargs={"timeout": _SECONDS_TO_CONNECT})
        _check_workers(stack.enter_context(runner).client, scheduler, task)
        yield runner


def _check_scheduler(address: str) -> None:
    """Ask who answers: Dask's own client would wait for ever for a server that accepts and says nothing.

    Raises:
        ServerError: no scheduler answers.
    """
    from distributed.core import rpc
    from distributed.security import Security

    async def ask() -> str:
        security = Security().get_connection_args("client")
        async with asyncio.timeout(_SECONDS_TO_CONNECT), rpc(address, connection_args=security) as scheduler:
            return str((await scheduler.identity())["type"])

    try:
        kind = asyncio.run(ask())
        reason = "" if kind == "Scheduler" else f"a {kind} is there"
    except (OSError, TypeError) as error:  # a TimeoutError, which says nothing, or TLS without a certificate
        reason = " ".join(str(error).split()) or f"no answer in {_SECONDS_TO_CONNECT:.0f} s"
    if reason:
        raise ServerError(
            f"no Dask scheduler answers at {address}: {reason}; start one with `dask scheduler`, or leave out "
            "--scheduler for a cluster on this machine"
        )


def _check_workers(client: Client, scheduler: str | None, task: Task[..., Any]) -> None:
    """Wait for the first worker, and check that all that are there can do the work.

    Raises:
        ServerError: none comes, or one lacks what it needs.
    """
    if not client.nthreads():
        _logger.warning("the Dask cluster has no workers yet; waiting for the first one")
    try:
        client.wait_for_workers(1, timeout=SECONDS_WITHOUT_WORKERS)
    except TimeoutError as error:
        raise ServerError(
            f"the Dask cluster has had no workers for {SECONDS_WITHOUT_WORKERS:.0f} s; "
            f"start some with `dask worker {scheduler}`"
        ) from error
    # A worker that cannot load a task ends without a message. `exec`, because every worker has that one.
    for address, problem in client.run(exec, f"import {task.__module__}", on_error="return").items():
        if problem is not None:
            raise ServerError(
                f"the Dask worker at {address} cannot load cnnpipe: {' '.join(str(problem).split())}; "
                "install the same cnnpipe, with its extra `dask`, on all machines"
            )
    cores = client.nthreads().values()
    _logger.info("Dask workers: %d, with %d cores in all", len(cores), sum(cores))
