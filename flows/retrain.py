"""`python -m flows.retrain`: run the flow of `flows.retrain_flow` on a server where it can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnpipe.console import ArtifactsOption, DataOption, JsonOption, command
from cnnpipe.paths import escape_path
from cnnpipe.settings import RetrainSettings, takes_settings
from flows.commands import run_command, run_flow

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
    folders = {"data": escape_path(str(data)), "artifacts": escape_path(str(artifacts.resolve()))}
    parameters = {**dict(settings), "force": force, **folders}
    shown = ("state", "run", "accuracy", "promoted", "reason")
    run_flow("retrain", parameters, [settings.prepare.resolved_name], artifacts, shown, as_json=as_json)


if __name__ == "__main__":
    run_command(_retrain)
