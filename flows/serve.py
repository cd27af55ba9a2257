"""`make serve`: a server, the deployments `retrain/nightly` and `classify/bulk`, and the process that runs them.

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
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from pydantic import ValidationError
from tzlocal import get_localzone_name

import cnnpipe
from cnnpipe.console import ArtifactsOption, DataOption, command
from cnnpipe.errors import DatasetError, ServerError, UsageError
from cnnpipe.nightly import next_run, prefect_home, serve_pidfile, server_log
from cnnpipe.paths import escape_path, expand_path
from cnnpipe.settings import BUILT_IN_DATASETS, RetrainSettings, takes_settings
from cnnpipe.storage import make_folder
from flows.commands import run_command
from flows.server import Server, ensure_server, prepare_environment

if TYPE_CHECKING:
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.deployments.runner import RunnerDeployment

__all__ = ["build_deployments", "local_timezone", "parse_schedule"]

_SECONDS_TO_SCHEDULE: Final = 120.0
"""Seconds that the server has for scheduling the first run; it takes 5 s, or a minute if the server is busy."""

CronOption = Annotated[str, typer.Option(help="When to retrain: minute hour day month weekday.")]
TimezoneOption = Annotated[str | None, typer.Option(help="IANA name, such as Europe/Berlin. Default: this machine's.")]


@command
@takes_settings(RetrainSettings, "dataset", tuple(RetrainSettings.model_fields))
def _serve(
    settings: RetrainSettings,
    cron: CronOption = "0 2 * * *",
    timezone: TimezoneOption = None,
    data: DataOption = Path("data"),
    artifacts: ArtifactsOption = Path("artifacts"),
) -> None:
    """Retrain every night, and run what is ordered in the UI or by `prefect deployment run`, until Ctrl-C."""
    home = prefect_home(artifacts)
    make_folder(home)  # prefect warns of a folder that it cannot make, and is imported before there is a server
    prepare_environment(home)
    schedule = parse_schedule(cron, timezone or local_timezone())
    settings = _with_absolute_dataset(settings)
    server = ensure_server(home)
    pidfile = serve_pidfile(home)
    if not pidfile.acquire():  # held until this process ends
        other = (pidfile.read() or {}).get("pid", "unknown")
        raise ServerError(f"process {other} serves these deployments already; end it first: {server.how_to_stop}")
    pidfile.write(os.getpid(), server.api_url)
    deployments = build_deployments(settings, schedule, data.resolve(), artifacts.resolve())
    typer.echo("\n".join(_introduction(server, settings, schedule)))

    from flows.flow_runs import crash_silent_runs

    crash_silent_runs()
    log = f"at {server.ui_url}" if server.pid is None else str(server_log(home))
    asyncio.run(_serve_until_stopped(deployments, log))


async def _serve_until_stopped(deployments: Iterable[RunnerDeployment], log: str) -> None:
    """Print the next run as soon as the server has scheduled it, then execute runs until Ctrl-C or SIGTERM.

    Args:
        log: where the log of the server is, for the error if it schedules no run.
    """
    from prefect.client.orchestration import get_client
    from prefect.runner import Runner

    runner = Runner()
    for deployment in deployments:
        await runner.aadd_deployment(deployment)
    deadline = time.monotonic() + _SECONDS_TO_SCHEDULE
    with get_client(sync_client=True) as client:
        while (upcoming := next_run(client.request)) is None:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server has scheduled no run of retrain/nightly in {_SECONDS_TO_SCHEDULE:.0f} s; "
                    f"look into its log, {log}, and check --cron"
                )
            await asyncio.sleep(0.5)
    typer.echo(f"next run:    {upcoming}")
    # Ctrl-C does what SIGTERM does: cancels the runs under way. A shell that starts this process in the background has
    # SIGINT ignored.
    signal.signal(signal.SIGINT, runner.handle_sigterm)
    await runner.start()
    typer.echo("the schedule has ended")


def build_deployments(
    settings: RetrainSettings, schedule: CronSchedule, data: Path, artifacts: Path
) -> tuple[RunnerDeployment, RunnerDeployment]:
    """Return the deployments `retrain/nightly`, on its schedule, and `classify/bulk`, which has none.

    One run of `retrain/nightly` at a time: one that comes due while another runs is cancelled, and so are all but one
    of those that were missed while the machine was off. See `crash_silent_runs` for a run that is killed.

    Args:
        data: folder of raw and prepared datasets, absolute.
        artifacts: folder of runs and champions, absolute.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    from flows.classify_flow import classify
    from flows.retrain_flow import retrain

    folders = {"artifacts": escape_path(str(artifacts))}
    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    # Typed as awaitable too, which they are only inside of an event loop.
    nightly = retrain.to_deployment(
        "nightly",
        schedules=[Cron(schedule.cron, timezone=schedule.timezone, slug="nightly")],
        parameters={**settings.model_dump(mode="json"), "data": escape_path(str(data)), **folders},
        concurrency_limit=one,
        tags=["retrain", settings.prepare.resolved_name],
        version=cnnpipe.__version__,
    )
    bulk = classify.to_deployment("bulk", parameters=dict(folders), tags=["classify"], version=cnnpipe.__version__)
    return cast("RunnerDeployment", nightly), cast("RunnerDeployment", bulk)


def parse_schedule(cron: str, timezone: str) -> CronSchedule:
    """Check when to retrain.

    Raises:
        UsageError: the schedule or the timezone is not valid.
    """
    from prefect.client.schemas.schedules import CronSchedule

    try:
        ZoneInfo(timezone)
        return CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        wanted = f"--cron must be five fields, minute hour day month weekday, such as '0 2 * * *', received {cron!r}"
        raise UsageError(wanted) from error
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        wanted = f"--timezone must be an IANA name, such as Europe/Berlin or UTC, received {timezone!r}"
        raise UsageError(wanted) from error


def local_timezone() -> str:
    """Return the IANA name of this machine's timezone.

    Raises:
        UsageError: the machine does not name it.
    """
    with suppress(ZoneInfoNotFoundError):  # its settings contradict each other
        if name := get_localzone_name():
            return name
    if not Path("/etc/localtime").exists():
        return "UTC"  # what the C library takes where nothing is set
    raise UsageError("this machine does not name its timezone; give --timezone, such as Europe/Berlin")


def _with_absolute_dataset(settings: RetrainSettings) -> RetrainSettings:
    """Return the settings with the dataset's absolute path; fail now rather than at night if there is none."""
    if settings.prepare.dataset in BUILT_IN_DATASETS:
        return settings
    folder = expand_path(settings.prepare.dataset).resolve()
    if not folder.is_dir():
        raise DatasetError(f"no folder of images at {folder}; check the path, or name a built-in dataset")
    prepare = settings.prepare.model_copy(update={"dataset": str(folder)})
    return settings.model_copy(update={"prepare": prepare})


def _introduction(server: Server, settings: RetrainSettings, schedule: CronSchedule) -> list[str]:
    """Return the lines that are printed first."""
    prefect = Path(sys.executable).parent / "prefect"
    shown = os.path.relpath(prefect) if prefect.is_relative_to(Path.cwd()) else str(prefect)
    run = f"PREFECT_API_URL={server.api_url} {shlex.quote(shown)} deployment run"
    nightly = f"{settings.prepare.resolved_name}, preset {settings.train.preset}, {schedule.cron!r} {schedule.timezone}"
    order = {"folder": "/path/to/photos"}
    return [
        f"Prefect UI:  {server.ui_url}",
        f"nightly:     {nightly}",
        f"retrain now: {run} retrain/nightly",
        f"classify:    {run} classify/bulk --param settings={shlex.quote(json.dumps(order))}",
        f"Ctrl-C ends the schedule; the server stays up; stop the server: {server.how_to_stop}",
    ]


if __name__ == "__main__":
    run_command(_serve)
