"""`make serve`: a server, a deployment `retrain/<name>-nightly` for each dataset, `classify/bulk`, and what runs them.

Runs until Ctrl-C or `make stop`. Ctrl-C leaves the server up, so that the runs can still be looked at. Several of these
processes share a server, one for each dataset or group of datasets.
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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from pydantic import Field, ValidationError
from tzlocal import get_localzone_name

import cnnpipe
from cnnpipe.console import ArtifactsOption, DataOption, command
from cnnpipe.errors import DatasetError, ServerError, UsageError
from cnnpipe.nightly import PidFile, next_runs, prefect_home, serve_pidfile, server_log
from cnnpipe.paths import escape_path, expand_path
from cnnpipe.settings import BUILT_IN_DATASETS, RetrainSettings, Settings, dataset_location, takes_settings
from cnnpipe.storage import make_folder
from flows.commands import run_command
from flows.server import Server, ensure_server, prepare_environment

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.deployments.runner import RunnerDeployment

__all__ = ["ScheduleSettings", "ServeSettings", "build_deployments", "local_timezone", "parse_schedule"]

_SECONDS_TO_SCHEDULE: Final = 120.0
"""Seconds that the server has for scheduling the first runs; it takes 5 s, or a minute if the server is busy."""


class ScheduleSettings(Settings):
    """When to retrain."""

    cron: str = "0 2 * * *"
    """When to retrain: minute hour day month weekday."""
    timezone: str | None = None
    """IANA name, such as Europe/Berlin. Default: this machine's."""


class ServeSettings(RetrainSettings):
    """A retraining and its schedule."""

    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)

    @property
    def name(self) -> str:
        """Name of the dataset, of its models and of their folder."""
        return self.prepare.resolved_name


@command
@takes_settings(ServeSettings, "dataset", tuple(ServeSettings.model_fields), tables="nightly")
def _serve(
    settings: list[ServeSettings], data: DataOption = Path("data"), artifacts: ArtifactsOption = Path("artifacts")
) -> None:
    """Retrain every night, and run what is ordered in the UI or by `prefect deployment run`, until Ctrl-C.

    For several datasets, --config names a file with a table [nightly.NAME] for each.
    """
    home, data, artifacts = prefect_home(artifacts), data.resolve(), artifacts.resolve()
    make_folder(home)  # prefect warns of a folder that it cannot make, and is imported before there is a server
    prepare_environment(home)
    nights = [(_with_absolute_dataset(each), parse_schedule(each)) for each in settings]
    server = ensure_server(home)
    records = [_lock_name(home, name, server) for name in {each.name for each in settings}]
    if len(records) < len(nights):
        raise UsageError("two of the datasets have the same name; give one of them another `name`")
    deployments = build_deployments(nights, data, artifacts)
    asyncio.run(_serve_until_stopped(nights, deployments, artifacts, server, home))
    del records  # held until here: until then each name belongs to this process


def _lock_name(home: Path, name: str, server: Server) -> PidFile:
    """Take the record of a scheduler, for as long as the object lives."""
    pidfile = serve_pidfile(home, name)
    if not pidfile.acquire():
        other = (pidfile.read() or {}).get("pid", "unknown")
        raise ServerError(f"process {other} serves retrain/{name}-nightly already; end it first: kill {other}")
    pidfile.write(os.getpid(), server.api_url)
    return pidfile


async def _serve_until_stopped(
    nights: Sequence[tuple[ServeSettings, CronSchedule]],
    built: list[RunnerDeployment],
    artifacts: Path,
    server: Server,
    home: Path,
) -> None:
    """Register the deployments, print the next run of each, then execute runs until Ctrl-C or SIGTERM."""
    from prefect.client.orchestration import get_client
    from prefect.runner import Runner

    from flows.due_runs import run_what_is_due
    from flows.flow_runs import crash_silent_runs

    # Not paused at the end, so that a run that comes due until the next start is made up for then.
    runner = Runner(pause_on_shutdown=False)
    runner._tmp_dir = home / "runner" / str(os.getpid())  # its own in /tmp belongs to the first user who serves
    async with get_client() as client:
        *nightly, bulk = built
        for each in nightly:
            _, owner = await _owner(client, each.full_name, artifacts)
            if owner:
                raise ServerError(
                    f"{each.full_name} on the server {server.ui_url} is that of {owner}; choose another --name, or end "
                    f"what serves it and delete it: {_prefect(server)} deployment delete {each.full_name}"
                )
        unnamed, owner = await _owner(client, "retrain/nightly", artifacts)
        if unnamed is not None and not owner:  # an earlier version's
            await client.delete_deployment(unnamed)
        _, bulk_owner = await _owner(client, bulk.full_name, artifacts)
        offered = nightly if bulk_owner else [*nightly, bulk]
        deployments = {await runner.aadd_deployment(each): each for each in offered}
    typer.echo("\n".join(_introduction(server, nights, bulk_owner)))
    crash_silent_runs()
    await _print_next_runs({each.name for each, _ in nights}, server, home)
    # Ctrl-C does what SIGTERM does: cancels the runs under way. A shell that starts this process in the background has
    # SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.handle_sigterm)
    # What `Runner.start` does, but for its loop, which ends this process and its runs after three minutes without an
    # answer of the server.
    async with runner, runner._loops_task_group as loops:
        loops.start_soon(run_what_is_due, runner, deployments, server, home)
    typer.echo("the schedule has ended")


async def _print_next_runs(names: set[str], server: Server, home: Path) -> None:
    """Print the next run of each schedule as soon as the server has scheduled them all."""
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + _SECONDS_TO_SCHEDULE
    with get_client(sync_client=True) as client:
        while missing := names - (upcoming := next_runs(client.request)).keys():
            if time.monotonic() > deadline:
                log = f"at {server.ui_url}" if server.pid is None else str(server_log(home))
                raise ServerError(
                    f"the server has scheduled no run of retrain/{min(missing)}-nightly in {_SECONDS_TO_SCHEDULE:.0f} "
                    f"s; look into its log, {log}, and check --cron"
                )
            await asyncio.sleep(0.5)
    typer.echo("\n".join(f"next run:    {name}, {upcoming[name]}" for name in sorted(names)))


def build_deployments(
    nights: Sequence[tuple[ServeSettings, CronSchedule]], data: Path, artifacts: Path
) -> list[RunnerDeployment]:
    """Return a deployment `retrain/<name>-nightly` for each schedule, and `classify/bulk`, which has none, as the last.

    One run of a schedule at a time: one that comes due while another runs is cancelled. See `crash_silent_runs` for a
    run that is killed.

    Args:
        nights: what to retrain, and when.
        data: folder of raw and prepared datasets, absolute.
        artifacts: folder of runs and champions, absolute.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    from flows.classify_flow import classify
    from flows.retrain_flow import retrain

    folders = {"data": escape_path(str(data)), "artifacts": escape_path(str(artifacts))}
    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    version = cnnpipe.__version__
    deployments = [
        retrain.to_deployment(
            f"{settings.name}-nightly",
            schedules=[Cron(schedule.cron, timezone=schedule.timezone, slug="nightly")],
            parameters=settings.model_dump(mode="json", exclude={"schedule"}) | folders,
            concurrency_limit=one,
            tags=["retrain", settings.name],
            version=version,
        )
        for settings, schedule in nights
    ]
    bulk = classify.to_deployment(
        "bulk", parameters={"artifacts": folders["artifacts"]}, tags=["classify"], version=version
    )
    # Typed as awaitable too, which they are only inside of an event loop.
    return cast("list[RunnerDeployment]", [*deployments, bulk])


async def _owner(client: PrefectClient, deployment: str, artifacts: Path) -> tuple[UUID | None, str]:
    """Return the id of a deployment on the server, if there is one, and whose it is; empty if it is of these artifacts.

    It is also ours to take if its artifacts folder is gone and nothing polls it.
    """
    from prefect.client.schemas.objects import DeploymentStatus
    from prefect.exceptions import ObjectNotFound

    try:
        found = await client.read_deployment_by_name(deployment)
    except ObjectNotFound:
        return None, ""
    if found.work_pool_name is not None:
        return found.id, f"the workers of the pool {found.work_pool_name}"
    folder = expand_path(str(found.parameters.get("artifacts", "artifacts"))).resolve()
    abandoned = not folder.is_dir() and found.status != DeploymentStatus.READY
    return found.id, "" if folder == artifacts or abandoned else f"the artifacts folder {folder}"


def parse_schedule(settings: ServeSettings) -> CronSchedule:
    """Return when to retrain.

    Raises:
        UsageError: the schedule or the timezone is not valid.
    """
    from prefect.client.schemas.schedules import CronSchedule

    cron, timezone = settings.schedule.cron, settings.schedule.timezone or local_timezone()
    try:
        ZoneInfo(timezone)
        return CronSchedule(cron=cron, timezone=timezone)
    except (ValidationError, ZoneInfoNotFoundError, ValueError, OSError) as error:
        wanted = f"--timezone must be an IANA name, such as Europe/Berlin or UTC, received {timezone!r}"
        if isinstance(error, ValidationError):
            wanted = (
                f"--cron must be five fields, minute hour day month weekday, such as '0 2 * * *', received {cron!r}"
            )
        raise UsageError(f"{wanted} for {settings.name}") from error


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


def _with_absolute_dataset(settings: ServeSettings) -> ServeSettings:
    """Return the settings with the dataset's absolute path; fail now rather than at night if there is none."""
    dataset = settings.prepare.dataset
    if dataset not in BUILT_IN_DATASETS and not expand_path(dataset).is_dir():
        where = dataset_location(dataset)
        raise DatasetError(f"no folder of images at {where}; check the path, or name a built-in dataset")
    prepare = settings.prepare.model_copy(update={"dataset": dataset_location(dataset)})
    return settings.model_copy(update={"prepare": prepare})


def _introduction(server: Server, nights: Sequence[tuple[ServeSettings, CronSchedule]], bulk_owner: str) -> list[str]:
    """Return the lines that are printed first."""
    run = f"{_prefect(server)} deployment run"
    order = shlex.quote(json.dumps({"folder": "/path/to/photos"}))
    bulk = f"classify/bulk on this server is that of {bulk_owner}; here: python -m flows.classify FOLDER"
    return [
        f"Prefect UI:  {server.ui_url}",
        *(
            f"nightly:     {each.name}, preset {each.train.preset}, {when.cron!r} {when.timezone}"
            for each, when in nights
        ),
        f"retrain now: {run} retrain/{nights[0][0].name}-nightly",
        f"classify:    {bulk if bulk_owner else f'{run} classify/bulk --param settings={order}'}",
        f"Ctrl-C ends the schedule; the server stays up; stop the server: {server.how_to_stop}",
    ]


def _prefect(server: Server) -> str:
    """Return the start of a command line of Prefect for this server."""
    prefect = Path(sys.executable).parent / "prefect"
    shown = os.path.relpath(prefect) if prefect.is_relative_to(Path.cwd()) else str(prefect)
    return f"PREFECT_API_URL={server.api_url} {shlex.quote(shown)}"


if __name__ == "__main__":
    run_command(_serve)
