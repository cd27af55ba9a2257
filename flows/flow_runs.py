"""A flow run while it is under way: its address in the UI, its log, its progress, what it waits for, its end if its
process is killed.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, cast
from uuid import UUID

from filelock import FileLock, Timeout
from prefect import runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterEndTime
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.concurrency.sync import concurrency
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, Pause, PrefectHTTPStatusError
from prefect.input import RunInput, keyset_from_paused_state
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_UI_URL, temporary_settings
from prefect.states import Paused
from prefect.utilities.engine import propose_state_sync
from pydantic import Field

from cnnpipe.errors import one_line
from cnnpipe.machine import ask_driver
from cnnpipe.progress import ProgressCallback, StageProgress
from cnnpipe.storage import make_folder, storage_errors

__all__ = ["crash_silent_runs", "delete_old_runs", "progress_artifact", "run_url", "send_library_logs",
           "training_slot", "wait_for_approval", "wait_for_turn"]  # fmt: skip

logger = logging.getLogger("cnnpipe.runs")

SILENCE: Final = timedelta(minutes=6)
"""How long a run may send no heartbeat until it counts as crashed: twice Prefect's default interval."""

_EXPIRED_MESSAGE: Final = "The flow was paused and never resumed."
"""Message of a run that waited too long; see prefect.server.services.pause_expirations."""
# After these a run sends no heartbeat.
_LAST_STATES: Final = (*(each.title() for each in TERMINAL_STATES), "Promoted", "NotPromoted", "Unchanged",
                       "AwaitingApproval", "TimedOut", "Suspended")  # fmt: skip

_SECONDS_BETWEEN_UPDATES = 3.0
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_FOR_LAST_UPDATE = 10.0


def run_url(flow_run_id: UUID | str) -> str:
    """Return the address of a flow run in the UI; prefect's `runtime.flow_run.ui_url` is one that leads on to it."""
    return f"{PREFECT_UI_URL.value() or ''}/runs/flow-run/{flow_run_id}"


def crash_silent_runs(silence: timedelta = SILENCE) -> None:
    """Let the server mark runs of both flows as Crashed when their process is gone, by an automation in its database.

    Without it a run whose process is killed, or whose machine goes down, stays Pending or Running, and the deployment
    with its concurrency limit of 1 cancels every later one. The process of a run sends a heartbeat at its start and
    every `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` seconds. The server expects the first one after the state Pending.

    Args:
        silence: how long the server waits for a heartbeat.
    Source: https://docs.prefect.io/v3/advanced/detect-zombie-flows
    """
    heartbeat, minutes = "prefect.flow-run.heartbeat", silence / timedelta(minutes=1)
    message = f"the process of this run has sent no heartbeat for {minutes:.3g} minutes: it or its machine went down"
    _install(
        "crash runs without a heartbeat",
        ("retrain", "classify"),
        ChangeFlowRunState(state=StateType.CRASHED, message=message),
        after={"prefect.flow-run.Pending", heartbeat},
        expect={heartbeat, *(f"prefect.flow-run.{name}" for name in _LAST_STATES)},
        posture=Posture.Proactive,
        within=silence,
    )


def _end_expired_approvals() -> None:
    """Let the server end a run that nobody approved in time as NotPromoted; without this it ends it as Failed."""
    message = "nobody approved the model in time"
    _install(
        "end runs that nobody approved in time",
        ("retrain",),
        ChangeFlowRunState(state=StateType.COMPLETED, name="NotPromoted", message=message),
        resource={"prefect.state-message": _EXPIRED_MESSAGE},
        expect={"prefect.flow-run.Failed"},
        posture=Posture.Reactive,
        within=timedelta(0),
    )


def _install(
    name: str,
    flows: tuple[str, ...],
    action: ChangeFlowRunState,
    *,
    resource: dict[str, str] | None = None,
    **trigger: Any,
) -> None:
    """Create an automation for the runs of flows on the server, or update that of an earlier version."""
    of_flows = {"prefect.resource.role": "flow", "prefect.resource.name": [*flows]}
    automation = AutomationCore(
        name=f"cnnpipe: {name}",
        actions=[action],
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*", **(resource or {})}),
            match_related=ResourceSpecification(of_flows),
            for_each={"prefect.resource.id"},
            threshold=1,
            **trigger,
        ),
    )
    try:
        with get_client(sync_client=True) as client:
            found = client.read_automations_by_name(automation.name)
            if not found:
                client.create_automation(automation)
            elif found[0].trigger != automation.trigger:
                client.update_automation(found[0].id, automation)
    except PrefectHTTPStatusError as error:
        logger.warning("the server does not take the automation %r: %s", automation.name, one_line(error))


def delete_old_runs(artifacts: str, keep_days: int) -> int:
    """Delete the flow runs on an artifacts folder that ended before the last days, with their logs; return the number.

    The server deletes their artifacts within a day, if it looks for orphans as the one does that this project starts.

    Args:
        artifacts: absolute path, as the runs have it in their parameters: a server may have runs of other projects.
    """
    flows = FlowFilter(name=FlowFilterName(any_=["retrain", "classify"]))
    ended = FlowRunFilter(end_time=FlowRunFilterEndTime(before_=datetime.now(UTC) - timedelta(days=keep_days)))
    with get_client(sync_client=True) as client:
        # The latest first: those of yesterday are always among the 200 that a server returns.
        runs = client.read_flow_runs(flow_filter=flows, flow_run_filter=ended, sort=FlowRunSort.END_TIME_DESC)
        old = [run.id for run in runs if run.parameters.get("artifacts") == artifacts]
        for flow_run_id in old:
            client.delete_flow_run(flow_run_id)
    return len(old)


def send_library_logs() -> None:
    """Let records of `cnnpipe.*`, from INFO on, appear in the log of the run that makes them.

    The first line of every flow. Prefect's own setting for it, PREFECT_LOGGING_EXTRA_LOGGERS, would have to be in the
    environment of each worker, and lets only warnings through (Prefect 3.8): the logger keeps the root's level.
    """
    library = logging.getLogger("cnnpipe")
    if library.getEffectiveLevel() > logging.INFO:
        library.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in library.handlers):
        library.addHandler(APILogHandler())


@contextmanager
def progress_artifact(key: str) -> Iterator[ProgressCallback]:
    """Give a callback `(label, done, total)` that moves a progress artifact of the current run, and writes to its log.

    A total of 0 means that it is not known yet. The artifact ends at 100 % when the block ends without an error. The
    latest progress is sent from a thread of its own: a slow or lost server neither delays the work nor ends it.

    Args:
        key: of the artifact, lowercase letters, digits and dashes.
    """
    latest = (0.0, "starting")  # percent, and what the artifact says
    logged = time.monotonic()
    stages, finished = StageProgress(), threading.Event()

    def update(label: str, done: int, total: int) -> None:
        nonlocal latest, logged
        stages.report(label, done, total)
        latest = (100.0 * min(done / total, 1.0) if total else 0.0, stages.text())
        if time.monotonic() - logged >= _SECONDS_BETWEEN_LINES:
            logged = time.monotonic()
            logger.info(latest[1])

    def send() -> None:
        artifact: UUID | None = None
        sent: tuple[float, str] | None = None
        warned = last = False
        while not last:
            last = finished.is_set()  # read first: what is sent after it is the latest for good
            percent, text = progress = latest
            try:
                if artifact is None:
                    artifact = cast("UUID", create_progress_artifact(percent, key=key, description=text))
                elif progress != sent:
                    update_progress_artifact(artifact, percent, text)
                sent = progress
            except Exception as error:  # noqa: BLE001 (whatever the client raises: the work goes on)
                if not warned:
                    logger.warning("the server does not take the progress of this run: %s", one_line(error))
                warned = True
            finished.wait(_SECONDS_BETWEEN_UPDATES)

    # With the context of the run, which has the address of the server; the next update is sent soon enough.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        sender = threading.Thread(target=contextvars.copy_context().run, args=(send,), daemon=True)
    sender.start()
    try:
        yield update
        latest = (100.0, "nothing was to be done" if latest == (0.0, "starting") else latest[1])
    finally:
        finished.set()
        sender.join(_SECONDS_FOR_LAST_UPDATE)


@contextmanager
def wait_for_turn(artifacts: Path, name: str) -> Iterator[None]:
    """Let one retraining of a name go on at a time, whoever started it; the others wait.

    Args:
        artifacts: folder of runs and champions.
    Raises:
        StorageError: the lock cannot be made.
    """
    lock = FileLock(make_folder(artifacts / name) / ".retraining")
    with storage_errors(artifacts / name):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("another retraining of %s is under way; waiting until it ends", name)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def training_slot(device: str) -> Iterator[None]:
    """Hold a slot of the machine's concurrency limit, `gpu` or `training`, made for one at a time if it is missing.

    A server that goes away meanwhile neither ends the work nor fails it. The server frees the slot of a process that
    was killed after two minutes.

    Args:
        device: the setting `train.device`.
    """
    name = "gpu" if device != "cpu" and ask_driver().gpus else "training"
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
            if limit.active_slots >= limit.limit:
                logger.info("other trainings have the machine; waiting for a slot of the limit %s", name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # by another run, meanwhile
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    slot = ExitStack()
    slot.enter_context(concurrency(name, strict=True, lease_duration=120, raise_on_lease_renewal_failure=False))
    try:
        yield
    finally:
        try:
            slot.close()
        except Exception as error:  # noqa: BLE001 (whatever the client raises: the work is done)
            logger.warning("the slot of the limit %s was not given back: %s; it expires", name, one_line(error))


class Approval(RunInput):
    """Form in the UI of a run that awaits approval."""

    approve: Literal["yes", "no"] = Field(description="Make this model the champion?")
    reason: str = Field("", description="Goes into the history of promotions.")


def wait_for_approval(run: str, verdict: str, hours: float) -> Approval:
    """Suspend the current flow run until a person answers in the UI; return the answer when it is resumed.

    As `prefect.flow_runs.suspend_flow_run`, but the state has the name AwaitingApproval. No process waits: the flow
    starts again from its top, and takes the results of its finished tasks from the storage.

    Args:
        run: folder of the run to approve.
        verdict: sentence of the gate about it.
        hours: after which the server gives up waiting; see `_end_expired_approvals`.
    Raises:
        Pause: which ends this process's part of the flow run.
    """
    state: State[Any] = Paused(
        name="AwaitingApproval",
        message=f"{verdict}; resume this run within {hours:g} hours to approve or refuse it",
        reschedule=True,
        timeout_seconds=round(3600 * hours),
        pause_key="approval",
    )
    keys = keyset_from_paused_state(state)
    state.state_details.run_input_keyset = {str(key): value for key, value in keys.items()}
    _end_expired_approvals()
    with get_client(sync_client=True) as client:
        answer = propose_state_sync(client, state, flow_run_id=UUID(runtime.flow_run.id))
    if answer.is_running():  # a key pauses a run only once: it was resumed
        return cast("Approval", Approval.load(keys))  # typed as awaitable too
    Approval.with_initial_data(description=f"`{run}`: {verdict}.").save(keys)
    raise Pause(state=answer)
