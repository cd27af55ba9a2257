"""The loop of `flows.serve`: start the runs that are due, whatever happens to the server or to the clock."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterTags,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import PrefectException
from prefect.runner import Runner
from prefect.states import Cancelled

from cnnpipe.errors import CnnpipeError, one_line
from cnnpipe.nightly import server_pidfile
from flows.server import Server, ensure_server

__all__ = ["run_what_is_due"]

logger = logging.getLogger("cnnpipe.serve")

_SECONDS_OF_ABSENCE: Final = 60.0
"""Seconds since runs were looked for after which some may have been missed: the machine or the server was down."""

_STOP_SECONDS: Final = 15.0


async def run_what_is_due(
    runner: Runner, deployments: Mapping[UUID, RunnerDeployment], server: Server, home: Path
) -> None:
    """Start the runs that are due, until this task is cancelled.

    A server that does not answer is waited for. One that this project started and that is gone is started again; so it
    is after the clock was set back, because its services, the scheduler among them, would wait until the clock is
    where it was. After an absence only the newest missed run of each schedule is started.

    Args:
        deployments: what the runner executes, by the id on the server.
        home: folder of the server.
    """
    seen, warned = 0.0, False  # when runs were looked for, and whether that has failed since
    while True:
        try:
            set_back = time.time() < seen - _SECONDS_OF_ABSENCE
            if server.pid is not None and (set_back or not server_pidfile(home).is_running()):
                await asyncio.to_thread(_restart, server, home, stop=set_back)
            if set_back or time.time() > seen + _SECONDS_OF_ABSENCE:
                async with get_client() as client:
                    for identifier, deployment in deployments.items():
                        if set_back:  # its runs begin on a day that is far away now
                            await deployment.aapply()
                        await _cancel_missed(client, identifier, deployment)
            await runner._scheduled_run_poller._get_and_submit_flow_runs()
            seen, warned = time.time(), False
        except (httpx.HTTPError, PrefectException, CnnpipeError) as error:
            if not warned:
                logger.warning(
                    "the server does not take orders (%s); the schedule goes on when it does", one_line(error)
                )
            warned = True
        await asyncio.sleep(runner.query_seconds)


def _restart(server: Server, home: Path, *, stop: bool) -> None:
    """Start this project's server where it was, unless it runs; stop it first if `stop`."""
    logger.warning("%s; the server is started again", "the clock was set back" if stop else "the server has ended")
    if stop:
        server_pidfile(home).stop(_STOP_SECONDS)
    os.environ.pop("PREFECT_API_URL", None)  # else a server at that address would have to answer
    ensure_server(home, port=int(server.api_url.removesuffix("/api").rpartition(":")[2]))


async def _cancel_missed(client: PrefectClient, identifier: UUID, deployment: RunnerDeployment) -> None:
    """Cancel the missed runs of a schedule but for the newest, and give that one the parameters of today."""
    missed = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[identifier]),
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Scheduled", "Late"])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),
        tags=FlowRunFilterTags(all_=["auto-scheduled"]),
    )
    reason = "missed while nothing ran the schedule; only the newest missed run is made up for"
    newest: UUID | None = None
    while True:
        found = await client.read_flow_runs(flow_run_filter=missed, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
        for run in found:
            if newest is None:
                newest = run.id
                await client.update_flow_run(newest, parameters=deployment.parameters)
            elif run.id != newest:
                await client.set_flow_run_state(run.id, Cancelled(message=reason))
        if len(found) < 2:
            return
