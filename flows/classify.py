"""`python -m flows.classify`: run the flow of `flows.classify_flow` on a server where it can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnpipe.console import ArtifactsOption, JsonOption, command
from cnnpipe.paths import escape_path
from cnnpipe.settings import ClassifySettings, takes_settings
from flows.commands import run_command, run_flow
from flows.dask import Runner, check_runner

RunnerOption = Annotated[
    Runner, typer.Option("--runner", help="`local`: this process; `dask`: the workers of a Dask cluster.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Address of a Dask scheduler, such as tcp://host:8786. Default: a cluster on this machine.",
        show_default=False,
    ),
]


@command
@takes_settings(ClassifySettings, "folder")
def _classify(
    settings: ClassifySettings,
    artifacts: ArtifactsOption = Path("artifacts"),
    runner: RunnerOption = "local",
    scheduler: SchedulerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify every file of a folder, one row each, as the Prefect flow `classify`."""
    check_runner(runner, scheduler)
    folder = escape_path(str(artifacts.resolve()))
    parameters = {"settings": settings, "artifacts": folder, "runner": runner, "scheduler": scheduler}
    shown = ("table", "found", "ok", "error", "resumed", "error_kinds", "images_per_second", "device", "precision",
             "precision_reason", "slowest_stage")  # fmt: skip
    run_flow("classify", parameters, [], artifacts, shown, as_json=as_json)


if __name__ == "__main__":
    run_command(_classify)
