"""A Dask cluster to run tasks on: one that is there already, or one on this machine that ends with its work."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from cnnpipe.errors import ServerError
from cnnpipe.machine import usable_cores

if TYPE_CHECKING:  # an extra, and slow to import
    from distributed import Client, LocalCluster
    from prefect_dask import DaskTaskRunner

__all__ = ["SECONDS_WITHOUT_WORKERS", "cluster_task_runner"]

SECONDS_WITHOUT_WORKERS: Final = 600.0
"""How long a cluster may be without any: one that makes its machines when there is work needs minutes for it."""

_LOOPBACK: Final = "127.0.0.1"
_SECONDS_TO_CONNECT: Final = 10.0

_IGNORE_INTERRUPT: Final = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Run by each worker at its start: Ctrl-C goes to all processes of a terminal, and this one ends its workers itself."""

_logger = logging.getLogger("cnnpipe.cluster")


@contextmanager
def cluster_task_runner(scheduler: str | None) -> Iterator[DaskTaskRunner]:
    """Give a task runner that is connected to a cluster which has a worker.

    Args:
        scheduler: address of the cluster's scheduler; None starts a cluster on this machine, one process a core.
    Raises:
        ServerError: there is none, or it has no workers that can do the work.
    """
    from prefect_dask import DaskTaskRunner

    with ExitStack() as stack:
        if scheduler is None:
            runner = DaskTaskRunner(cluster=stack.enter_context(_local_cluster()))
        else:
            _check_scheduler(scheduler)
            runner = DaskTaskRunner(address=scheduler, client_kwargs={"timeout": _SECONDS_TO_CONNECT})
        stack.enter_context(runner)
        _check_workers(runner.client, scheduler)
        yield runner


def _check_scheduler(address: str) -> None:
    """Ask who is there: Dask's own client would wait for ever for one who takes the call and says nothing.

    Raises:
        ServerError: no scheduler answers.
    """
    from distributed.core import rpc
    from distributed.security import Security

    async def ask() -> dict[str, Any]:
        security = Security().get_connection_args("client")
        async with rpc(address, timeout=_SECONDS_TO_CONNECT, connection_args=security) as scheduler:
            answer: dict[str, Any] = await scheduler.identity()
            return answer

    try:
        kind = asyncio.run(asyncio.wait_for(ask(), _SECONDS_TO_CONNECT))["type"]
        reason = "" if kind == "Scheduler" else f"a {kind} is there"
    except (OSError, TypeError) as error:  # a TimeoutError, which says nothing, or TLS without a certificate
        reason = " ".join(str(error).split()) or f"no answer in {_SECONDS_TO_CONNECT:.0f} s"
    if reason:
        raise ServerError(
            f"no Dask scheduler answers at {address}: {reason}; start one with `dask scheduler`, or leave out "
            "--scheduler for a cluster on this machine"
        )


def _check_workers(client: Client, scheduler: str | None) -> None:
    """Wait for the first worker, and see whether those that are there can do the work.

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
    # A worker that cannot load a task ends without a word. `exec`, because it has that one whatever it lacks.
    for address, problem in client.run(exec, "import flows.dask_shards", on_error="return").items():
        if problem is not None:
            raise ServerError(
                f"the Dask worker at {address} cannot load cnnpipe: {' '.join(str(problem).split())}; "
                "install the same cnnpipe, with its extra `dask`, on all machines"
            )
    cores = client.nthreads().values()
    _logger.info("Dask workers: %d, with %d cores in all", len(cores), sum(cores))


@contextmanager
def _local_cluster() -> Iterator[LocalCluster]:
    """Start a cluster that nobody else can reach, and end it with the block."""
    from distributed import LocalCluster

    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="cnnpipe-dask-"))
        yield stack.enter_context(
            LocalCluster(
                n_workers=usable_cores(),
                threads_per_worker=1,
                host=_LOOPBACK,
                # Any free port: Dask listens for its dashboard even where there is none.
                dashboard_address=f"{_LOOPBACK}:0",
                scheduler_kwargs={"dashboard": False},
                memory_limit=0,  # the engine keeps its own; Dask would kill a worker by what it guesses
                local_directory=scratch,
                preload=_IGNORE_INTERRUPT,
                silence_logs=logging.ERROR,
            )
        )
