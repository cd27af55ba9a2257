"""`python -m flows.retrain`: run the flow of `flows.retrain_flow` on a server where it can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnpipe.console import ArtifactsOption, DataOption, JsonOption, command
from cnnpipe.paths import escape_path
from cnnpipe.settings import RetrainSettings, takes_settings
from flows.commands import run_command, run_flow

if TYPE_CHECKING:
    from prefect.client.schemas import State


ForceOption = Annotated[
    bool, typer.Option("--force", help="Train even if neither images nor settings have changed since the newest run.")
]


@command
@takes_settings(RetrainSettings, "dataset", tuple(RetrainSettings.model_fields))
def _retrain(
    settings: RetrainSettings,
    force: ForceOption = False,
    data: DataOption = Path("data"),
    artifacts: ArtifactsOption = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """Train a CNN, check it, export it to ONNX and promote it if it passes, as the Prefect flow `retrain`."""

    def run() -> State[Any]:
        from prefect import tags

        from flows.retrain_flow import retrain

        folders = {"data": escape_path(str(data)), "artifacts": escape_path(str(artifacts.resolve()))}
        with tags("retrain", settings.prepare.resolved_name):
            state: State[Any] = retrain(**dict(settings), force=force, **folders, return_state=True)
        return state

    run_flow(run, artifacts, ("state", "run", "accuracy", "promoted", "reason"), as_json=as_json)


if __name__ == "__main__":
    run_command(_retrain)
