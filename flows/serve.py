"""`make serve`: a server, the deployments `retrain/nightly` and `classify/bulk`, and the nightly schedule, in one.

Runs until Ctrl-C or `make stop`. Ctrl-C leaves the server up, so that the runs can still be looked at.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from pydantic import ValidationError

import cnnpipe
from cnnpipe.console import command
from cnnpipe.errors import DatasetError, ServerError, UsageError
from cnnpipe.files import display_path, user_path
from cnnpipe.nightly import next_run, prefect_home, serve_pidfile, server_log
from cnnpipe.options import ArtifactsOption, DataOption, takes_settings
from cnnpipe.settings import BUILT_IN_DATASETS, RetrainSettings
from cnnpipe.storage import make_folder
from flows.commands import run_command
from flows.flow_runs import close_dead_runs, unfinished_states
from flows.server import Server, ensure_server, prepare_environment

if TYPE_CHECKING:
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.deployments.runner import RunnerDeployment

__all__ = ["build_deployments", "close_left_runs", "local_timezone", "parse_schedule"]

_SECTIONS: Final = tuple(RetrainSettings.model_fields)
_SECONDS_TO_SCHEDULE: Final = 120.0  # it takes 5 s, and a minute if the server is busy

CronOption = Annotated[str, typer.Option("--cron", help="When to retrain: minute hour day month weekday.")]
TimezoneOption = Annotated[
    str | None,
    typer.Option("--timezone", help="IANA name, such as Europe/Berlin; default: this machine's.", show_default=False),
]


@command
@takes_settings(RetrainSettings, "dataset", _SECTIONS)
def _serve(
    settings: RetrainSettings,
    cron: CronOption = "0 2 * * *",
    timezone: TimezoneOption = None,
    data: DataOption = Path("data"),
    artifacts: ArtifactsOption = Path("artifacts"),
) -> None:
    """Retrain every night, and take orders for both flows, until Ctrl-C."""
    home = prefect_home(artifacts)
    make_folder(home)  # prefect warns of a folder that it cannot make, and is imported before there is a server
    prepare_environment(home)
    schedule = parse_schedule(cron, timezone or local_timezone())
    settings = _with_whole_path(settings)
    server = ensure_server(home)
    pidfile = serve_pidfile(home)
    if pidfile.acquire() is None:  # held until this process ends
        other = (pidfile.read() or {}).get("pid", "unknown")
        raise ServerError(f"process {other} serves these deployments already; end it first: {server.how_to_stop}")
    pidfile.write({"pid": os.getpid(), "api_url": server.api_url})
    close_dead_runs(home)
    deployments = build_deployments(settings, schedule, data.resolve(), artifacts.resolve())
    for line in _introduction(server, settings, schedule):
        typer.echo(line)
    log = f"at {server.ui_url}" if server.pid is None else str(server_log(home))
    _serve_until_stopped(deployments, artifacts.resolve(), log)


def _serve_until_stopped(deployments: Sequence[RunnerDeployment], artifacts: Path, log: str) -> None:
    """Print the next run as soon as the server has scheduled it, and execute runs until Ctrl-C or SIGTERM.

    Args:
        artifacts: folder of runs and champions, absolute.
        log: where the log of the server is, for the message.
    Raises:
        ServerError: the server schedules no run.
    """
    from prefect.client.orchestration import get_client
    from prefect.runner import Runner

    class Scheduler(Runner):
        """A runner that SIGTERM ends like Ctrl-C; Prefect's own handler leaves tracebacks of what it interrupts."""

        def handle_sigterm(self, *_: Any, **__: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    async def print_next_run() -> None:
        deadline = time.monotonic() + _SECONDS_TO_SCHEDULE
        with get_client(sync_client=True) as client:
            while (upcoming := await asyncio.to_thread(next_run, client.request)) is None:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"the server has scheduled no run of retrain/nightly in {_SECONDS_TO_SCHEDULE:.0f} s; "
                        f"look into its log, {log}, and check --cron"
                    )
                await asyncio.sleep(1)
        typer.echo(f"next run:    {upcoming}")

    async def run() -> None:
        scheduler = Scheduler()
        for deployment in deployments:
            await scheduler.aadd_deployment(deployment)
        await asyncio.gather(scheduler.start(), print_next_run())

    # A shell that starts us in the background has SIGINT ignored, which asyncio would respect.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    close_left_runs(artifacts, "the machine or the scheduler went down during this run")
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        typer.echo("the schedule has ended")
    finally:
        close_left_runs(artifacts, "the scheduler was stopped during this run")


def close_left_runs(artifacts: Path, reason: str) -> int:
    """Mark the runs of both deployments that nobody executes any more as crashed; returns how many.

    Prefect's runner kills the runs under way when it ends, and leaves them "Running" for ever. Only for a process that
    holds the record of the scheduler of these artifacts: no other one executes such runs.

    Args:
        artifacts: folder of runs and champions, absolute. Runs with another one are another scheduler's, which may
            be on another machine with the same server.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.states import Crashed

    unfinished = FlowRunFilterStateType(any_=unfinished_states())
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain", "classify"])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["nightly", "bulk"])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished)),
        )
        runs = [
            run
            for run in found
            if run.work_pool_name is None  # others are a worker's
            and run.parameters.get("artifacts") == str(artifacts)
        ]
        for run in runs:
            client.set_flow_run_state(run.id, Crashed(message=reason))
    return len(runs)


def build_deployments(
    settings: RetrainSettings, schedule: CronSchedule, data: Path, artifacts: Path
) -> tuple[RunnerDeployment, RunnerDeployment]:
    """Return the deployments `retrain/nightly`, on its schedule, and `classify/bulk`, which waits for orders.

    A night's run that comes due while the one before still runs, or several that were missed while the machine was
    off, are cancelled for the one that runs. Should that one be killed, its place is free again after five minutes.

    Args:
        data: folder of raw and prepared datasets, absolute.
        artifacts: folder of runs and champions, absolute.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    from flows.classify_flow import classify
    from flows.retrain_flow import retrain

    folders = {"artifacts": str(artifacts)}
    nightly = retrain.to_deployment(
        "nightly",
        schedules=[Cron(schedule.cron, timezone=schedule.timezone, slug="nightly")],
        parameters={**settings.model_dump(mode="json"), "data": display_path(str(data)), **folders},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        tags=["retrain", settings.prepare.resolved_name],
        version=cnnpipe.__version__,
    )
    bulk = classify.to_deployment("bulk", parameters=dict(folders), tags=["classify"], version=cnnpipe.__version__)
    # Typed as awaitable too, which they are only inside of an event loop.
    return cast("RunnerDeployment", nightly), cast("RunnerDeployment", bulk)


def parse_schedule(cron: str, timezone: str) -> CronSchedule:
    """Check when to retrain.

    Raises:
        UsageError: the schedule or the timezone is not valid.
    """
    from prefect.client.schemas.schedules import CronSchedule

    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"--timezone must be an IANA name, such as Europe/Berlin or UTC, received {timezone!r}"
        ) from error
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        raise UsageError(
            f"--cron must be five fields, minute hour day month weekday, such as '0 2 * * *', received {cron!r}"
        ) from error


def local_timezone(etc: Path = Path("/etc")) -> str:
    """Return the IANA name of this machine's timezone.

    Args:
        etc: folder of the system's settings.
    Raises:
        UsageError: the machine does not tell it.
    """
    name = os.environ.get("TZ", "").removeprefix(":")
    link = etc / "localtime"
    if not name and link.is_symlink():
        name = os.path.realpath(link).partition("/zoneinfo/")[2]
    if not name and (etc / "timezone").is_file():
        name = (etc / "timezone").read_text(encoding="utf-8").strip()
    if not name and not link.exists():
        name = "UTC"  # what the C library takes where nothing is set
    if not name:
        raise UsageError("this machine does not tell the name of its timezone; give --timezone, such as Europe/Berlin")
    return name


def _with_whole_path(settings: RetrainSettings) -> RetrainSettings:
    """Make the path of a dataset absolute, and find out now, not at night, that it is wrong."""
    if settings.prepare.dataset in BUILT_IN_DATASETS:
        return settings
    folder = user_path(settings.prepare.dataset).resolve()
    if not folder.is_dir():
        raise DatasetError(f"no folder of images at {folder}; check the path, or name a built-in dataset")
    prepare = settings.prepare.model_copy(update={"dataset": str(folder)})
    return settings.model_copy(update={"prepare": prepare})


def _introduction(server: Server, settings: RetrainSettings, schedule: CronSchedule) -> list[str]:
    run = f"PREFECT_API_URL={server.api_url} {shlex.quote(_prefect_command())} deployment run"
    nightly = f"{settings.prepare.resolved_name}, preset {settings.train.preset}, {schedule.cron!r} {schedule.timezone}"
    order = {"folder": "/path/to/photos"}
    return [
        f"Prefect UI:  {server.ui_url}",
        f"nightly:     {nightly}",
        f"retrain now: {run} retrain/nightly",
        f"classify:    {run} classify/bulk --param settings={shlex.quote(json.dumps(order))}",
        f"Ctrl-C ends the schedule; the server stays up; stop the server: {server.how_to_stop}",
    ]


def _prefect_command() -> str:
    """Return the path of the `prefect` command of this environment, as short as it can be typed here."""
    path = Path(sys.executable).parent / "prefect"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> None:
    """Run the command of `flows.serve`."""
    run_command(_serve)


if __name__ == "__main__":
    main()
