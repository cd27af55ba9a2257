"""The loop of `flows.serve`: start the runs that are due, whatever happens to the server or to the clock."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import PrefectException
from prefect.runner import Runner
from prefect.states import Cancelled, Crashed

from cnnpipe.errors import CnnpipeError, one_line
from cnnpipe.nightly import server_pidfile
from flows import flow_runs
from flows.server import Server

__all__ = ["run_what_is_due"]

logger = logging.getLogger("cnnpipe.serve")

_SECONDS_BETWEEN_CHECKS: Final = 60.0
"""Seconds until it is looked again for runs that were missed or never started; a clock may be set back by as many."""


async def run_what_is_due(
    runner: Runner, deployments: Mapping[UUID, RunnerDeployment], server: Server, home: Path
) -> None:
    """Start the runs that are due, until this task is cancelled.

    A server that does not answer is waited for. This project's own is started again after the clock was set back,
    because its services, the scheduler among them, would wait until the clock is where it was. Of the missed runs of a
    schedule only the newest is started.

    Args:
        deployments: what the runner executes, by the id on the server.
        home: folder of the server.
    """
    checked, own = 0.0, None  # when the last check was, and the record of this project's server then
    outdated = warned = False  # whether the runs begin on a day that is far away now; whether there was trouble since
    while True:
        try:
            if time.time() < checked - _SECONDS_BETWEEN_CHECKS:
                if own is not None and server_pidfile(home).read() == own:  # else another scheduler has done it
                    logger.warning("the clock was set back; the server is started again")
                    with suppress(ProcessLookupError):  # its record stays, so a thread of `ensure_server` starts it
                        os.kill(own["pid"], signal.SIGTERM)
                checked, outdated = 0.0, True
            if time.time() > checked + _SECONDS_BETWEEN_CHECKS:
                async with get_client() as client:
                    for identifier, deployment in deployments.items():
                        if outdated:
                            await deployment.aapply()
                        await _cancel_missed(client, identifier, deployment)
                        await _crash_unstarted(client, identifier)
                own = None if server.pid is None else server_pidfile(home).read()
                checked, outdated = time.time(), False
            await runner._scheduled_run_poller._get_and_submit_flow_runs()  # one turn of the loop of `Runner.start`
            warned = False
        except (httpx.HTTPError, PrefectException, CnnpipeError) as error:
            if not warned:
                logger.warning(
                    "the server does not take orders (%s); the schedule goes on when it does", one_line(error)
                )
            warned = True
        await asyncio.sleep(runner.query_seconds)


async def _find_runs(client: PrefectClient, deployment: UUID, **wanted: Any) -> list[dict[str, Any]]:
    """Return the runs of a deployment that pass a filter of Prefect's API, the latest first."""
    body = {"flow_runs": {"deployment_id": {"any_": [str(deployment)]}, **wanted}, "sort": "EXPECTED_START_TIME_DESC"}
    return list((await client.request("POST", "/flow_runs/filter", json=body)).json())


async def _cancel_missed(client: PrefectClient, identifier: UUID, deployment: RunnerDeployment) -> None:
    """Cancel the missed runs of a schedule but for the newest, and give that one the parameters of today."""
    missed = {
        "state": {"name": {"any_": ["Scheduled", "Late"]}},
        "next_scheduled_start_time": {"before_": datetime.now(UTC).isoformat()},
        "tags": {"all_": ["auto-scheduled"]},
    }
    reason = "missed while nothing ran the schedule; only the newest missed run is made up for"
    for number, run in enumerate(await _find_runs(client, identifier, **missed)):
        if number == 0:
            await client.update_flow_run(UUID(run["id"]), parameters=deployment.parameters)
        else:
            await client.set_flow_run_state(UUID(run["id"]), Cancelled(message=reason))


async def _crash_unstarted(client: PrefectClient, identifier: UUID) -> None:
    """Mark runs as Crashed whose process went before its first heartbeat, which `crash_silent_runs` is late for.

    The server keeps the event of their state Pending back for the event of their state Scheduled, which it has not
    emitted for the runs of a schedule: for 15 minutes, or, if it is started again, for ever.
    """
    for run in await _find_runs(client, identifier, state={"type": {"any_": ["PENDING", "RUNNING"]}}):
        if datetime.fromisoformat(run["state"]["timestamp"]) > datetime.now(UTC) - flow_runs.SILENCE:
            continue
        resource = {"id": [f"prefect.flow-run.{run['id']}"]}
        beats = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, "any_resource": resource}, "limit": 1}
        seen = (await client.request("POST", "/events/filter", json=beats)).json()["events"]
        if run["state_type"] == "PENDING" or not seen:
            await client.set_flow_run_state(
                UUID(run["id"]), Crashed(message="the process of this run has never started")
            )
