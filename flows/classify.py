"""`python -m flows.classify`: run the flow of `flows.classify_flow` on a server where it can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnpipe.console import ArtifactsOption, JsonOption, command
from cnnpipe.paths import escape_path
from cnnpipe.settings import ClassifySettings, takes_settings
from flows.commands import run_command, run_flow
from flows.dask import Runner, check_runner

if TYPE_CHECKING:
    from prefect.client.schemas import State

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

    def run() -> State[Any]:
        from prefect import tags

        from flows.classify_flow import classify

        folder = escape_path(str(artifacts.resolve()))
        with tags("classify"):
            state: State[Any] = classify(
                settings, artifacts=folder, runner=runner, scheduler=scheduler, return_state=True
            )
        return state

    shown = ("table", "found", "ok", "error", "resumed", "error_kinds", "images_per_second", "device", "precision",
             "precision_reason", "slowest_stage")  # fmt: skip
    run_flow(run, artifacts, shown, as_json=as_json)


if __name__ == "__main__":
    run_command(_classify)
