"""A flow run: its address in the UI, and the record that tells whether a process still executes it.

A run whose process is killed, or whose machine goes down, stays "Running" in the UI, as the server cannot know better.
So each run keeps a record in `<home>/runs` while it is executed, with a lock that ends with the process: the next
command that finds a record without its lock closes that run.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from cnnpipe.errors import StorageError
from cnnpipe.nightly import prefect_home
from cnnpipe.pidfile import PidFile

if TYPE_CHECKING:
    from prefect.client.schemas.objects import StateType

__all__ = ["close_dead_runs", "recorded_run", "run_url", "unfinished_states"]

logger = logging.getLogger("cnnpipe.runs")

_FOLDER: Final = "runs"


def run_url(flow_run_id: UUID | str) -> str:
    """Return the address of a flow run in the UI of the server that prefect uses; by the route that the UI itself has.

    Prefect's own `runtime.flow_run.ui_url` takes an older route, which the UI leads on from.
    """
    from prefect.settings import PREFECT_UI_URL

    return f"{PREFECT_UI_URL.value() or ''}/runs/flow-run/{flow_run_id}"


@contextmanager
def recorded_run(artifacts: Path) -> Iterator[None]:
    """Record, for the length of the block, that this process executes the current flow run.

    Where the record cannot be written, as by a classification with read-only artifacts, a warning takes its place.
    """
    from prefect import runtime

    pidfile = PidFile(prefect_home(artifacts) / _FOLDER, str(runtime.flow_run.id))
    lock = None
    try:
        lock = pidfile.acquire()
        if lock is not None:
            pidfile.write({"pid": os.getpid(), "host": socket.gethostname()})
    except StorageError as error:
        logger.warning("no record of this run: %s; if it is killed, it stays Running in the UI", error)
    try:
        yield
    finally:
        if lock is not None:
            pidfile.release(lock)


def close_dead_runs(home: Path) -> list[UUID]:
    """Mark the runs whose process on this machine is gone as crashed; returns which.

    Call it with prefect pointed at the server, see `ensure_server`. Runs of another machine that shares the folder
    are left alone, and so are those of which the server knows nothing: they are another server's.

    Args:
        home: the folder of the server, see `prefect_home`.
    """
    left = {UUID(file.stem): pidfile for file, pidfile in _left_records(home / _FOLDER)}
    if not left:
        return []
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    closed = []
    with get_client(sync_client=True) as client:
        for flow_run_id, pidfile in left.items():
            try:
                state = client.read_flow_run(flow_run_id).state
            except ObjectNotFound:
                continue
            if state is not None and state.type in unfinished_states():
                client.set_flow_run_state(flow_run_id, Crashed(message="the process of this run was killed"))
                closed.append(flow_run_id)
            pidfile.record_path.unlink(missing_ok=True)
            pidfile.lock_path.unlink(missing_ok=True)
    return closed


def _left_records(folder: Path) -> Iterator[tuple[Path, PidFile]]:
    for file in sorted(folder.glob("*.json")):
        pidfile = PidFile(folder, file.stem)
        record = pidfile.read_left()
        if record is not None and record.get("host") == socket.gethostname():
            yield file, pidfile


def unfinished_states() -> list[StateType]:
    """Return the types of state of a run that somebody should be executing."""
    from prefect.client.schemas.objects import StateType

    return [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
