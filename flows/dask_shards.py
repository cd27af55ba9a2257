"""Classify on a Dask cluster: one Prefect task a shard, a bounded number of them under way.

The process of the flow lists the files and writes down which of them make a shard; workers read that, and leave the
rows beside it. So all machines must see the images, the model and the output under the same paths.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from prefect import task

from cnnpipe.classify.job_files import JobFiles
from cnnpipe.classify.running import run_planned_shard
from cnnpipe.errors import PredictionsError, ServerError, StorageError
from cnnpipe.progress import FilesShown, ProgressCallback
from flows.cluster import SECONDS_WITHOUT_WORKERS, cluster_task_runner
from flows.flow_runs import send_library_logs

if TYPE_CHECKING:  # Dask is an extra
    from distributed import Future
    from prefect import State, Task
    from prefect.client.schemas.objects import TaskRun
    from prefect_dask import DaskTaskRunner

    from cnnpipe.classify.run import Classification

__all__ = ["classify_on_dask", "classify_shard"]

_SHARDS_PER_WORKER: Final = 4
"""Handed out at a time: enough that no worker waits, few enough that memory does not grow with the number of files."""

_MAX_FAILED_SHARDS: Final = 20
"""So many are no accident, and the rest would go the same way."""

_SECONDS_BETWEEN_LOOKS: Final = 5.0
"""At whether there still are workers, while none of them finishes a shard."""

_logger = logging.getLogger("cnnpipe.cluster")


def classify_on_dask(classification: Classification, scheduler: str | None, progress: ProgressCallback) -> None:
    """Do the shards of a classification that have no rows yet on a Dask cluster.

    A shard whose worker is lost is done again by another one; one that fails is left out, and the others go on.

    Args:
        scheduler: address of the cluster's scheduler; None starts a cluster on this machine, and ends it again.
    Raises:
        ServerError: there is no scheduler, it has no workers, or it was lost.
        PredictionsError: shards failed; what the others have made is kept.
    """
    shards = classification.shards
    done, _ = shards.done()
    shown = FilesShown(progress, JobFiles(shards.job, None).count, done.found, done.error)
    numbers = classification.plan()  # lists files no faster than they are taken
    first = next(numbers, None)
    if first is None:  # an earlier attempt came so far, and no cluster is needed
        return
    with cluster_task_runner(scheduler) as runner, ThreadPoolExecutor(1, thread_name_prefix="submit") as submitter:
        under_way = _ShardsUnderWay(runner, submitter, shards.path, shown)
        for number in chain([first], numbers):
            under_way.submit(number)
        under_way.finish()
    done, _ = shards.done()  # whoever made them
    shown.show(done.found, done.error)


def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether a shard failed by something that may be better in a moment: a disk or a network."""
    return isinstance(state.data, StorageError)


@task(
    name="classify-shard",
    task_run_name="shard-{number}",
    retries=2,
    retry_delay_seconds=[1, 10],
    retry_condition_fn=_may_pass,
)
def classify_shard(shards: str, number: int) -> tuple[int, int]:
    """Do one shard in the process of a worker, with all of its cores.

    Args:
        shards: the folder of shards.
    Returns:
        How many files were classified, those that failed among them, and how many failed.
    """
    from distributed import get_worker

    send_library_logs()
    counts = run_planned_shard(Path(shards), number, get_worker().state.nthreads)
    return counts.found, counts.error


class _ShardsUnderWay:
    """The shards that workers have been given and have not finished."""

    def __init__(self, runner: DaskTaskRunner, submitter: Executor, path: Path, shown: FilesShown) -> None:
        self._runner = runner
        self._submitter = submitter
        self._path = path
        self._shown = shown
        self._workers: set[str] = set()
        self._futures: dict[str, tuple[int, Future]] = {}
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._num_handed_out = 0
        self._failed: dict[int, str] = {}

    def submit(self, number: int) -> None:
        """Hand a shard to a worker, as soon as there are few enough under way; raises as `classify_on_dask`."""
        while len(self._futures) >= _SHARDS_PER_WORKER * max(1, self._count_workers()):
            self._take_one()
        parameters = {"shards": str(self._path), "number": number}
        # In a thread: here, Ctrl-C would be raised inside of pydantic's serializer, which makes another error of it.
        submit = partial(copy_context().run, self._runner.submit, classify_shard, parameters)
        future = self._submitter.submit(submit).result().wrapped_future
        self._futures[future.key] = (number, future)
        self._num_handed_out += 1
        future.add_done_callback(self._ended.put)

    def finish(self) -> None:
        """Wait for all of them; raises as `classify_on_dask`."""
        while self._futures:
            self._take_one()
        if self._failed:
            raise self._failure()

    def _take_one(self) -> None:
        number, future = self._futures.pop(self._wait_for_one().key)
        error = future.exception()  # of Dask, such as of a shard that took several workers along
        if future.cancelled():
            raise _lost_scheduler()
        outcome = error or _fetch_state(future).result(raise_on_failure=False)
        if isinstance(outcome, tuple):
            self._shown.add(*outcome)
            return
        self._failed[number] = _reason(outcome)
        _logger.error("shard %d failed: %s", number, self._failed[number])
        if len(self._failed) >= _MAX_FAILED_SHARDS:
            raise self._failure()

    def _wait_for_one(self) -> Future:
        """Return the next shard that has ended, and see to it meanwhile that there is somebody to end one."""
        seen = time.monotonic()
        while True:
            if self._count_workers():
                seen = time.monotonic()
            elif time.monotonic() - seen > SECONDS_WITHOUT_WORKERS:
                raise ServerError(
                    f"the Dask cluster has had no workers for {SECONDS_WITHOUT_WORKERS:.0f} s; "
                    "what was finished is kept: start some and run it again"
                )
            try:
                return self._ended.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except Empty:
                continue

    def _count_workers(self) -> int:
        """Return how many there are, and tell of those that have gone."""
        client = self._runner.client
        try:
            workers = set(client.nthreads()) if client.status == "running" else None
        except OSError:
            workers = None
        if workers is None:
            raise _lost_scheduler()
        for address in self._workers - workers:
            _logger.warning("the worker at %s has gone; what it had begun is done again", address)
        if self._workers and not workers:
            _logger.warning("the Dask cluster has no workers any more; waiting for one")
        self._workers = workers
        return len(workers)

    def _failure(self) -> PredictionsError:
        first = min(self._failed)
        return PredictionsError(
            f"{len(self._failed):,} of {self._num_handed_out:,} shards failed, number {first} because: "
            f"{self._failed[first]}; the others are kept: mend that and run it again, which does what is missing"
        )


def _fetch_state(future: Future) -> State[Any]:
    """Return what Prefect says of a shard that ended well; the scheduler may be lost before it is here."""
    try:
        state: State[Any] = future.result()
    except OSError as error:
        raise _lost_scheduler() from error
    return state


def _reason(error: BaseException) -> str:
    """Return why a shard failed, on one line."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return f"every worker that tried it died, the last one at {error.last_worker.address}"
    return " ".join(str(error).split()) or type(error).__name__


def _lost_scheduler() -> ServerError:
    return ServerError("the Dask scheduler was lost in the middle; what was finished is kept: run it again")
