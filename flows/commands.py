"""`python -m flows.retrain` and `python -m flows.classify`: options, a server, the flow, its address in the UI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cnnpipe.config import ClassifySettings, RetrainSettings
from cnnpipe.console import JsonOption, command, field_lines, print_note, show_result
from cnnpipe.options import ArtifactsOption, DataOption, takes_settings
from flows.server import Server, ensure_server, prefect_home

if TYPE_CHECKING:
    from prefect.client.schemas import State

__all__ = ["run_classify", "run_retrain"]


def run_retrain() -> None:
    """Run the command of `flows.retrain`."""
    _run(_retrain)


def run_classify() -> None:
    """Run the command of `flows.classify`."""
    _run(_classify)


def _run(function: Any) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    app()


@command
@takes_settings(RetrainSettings, "dataset", ("prepare", "train", "evaluate", "export", "promote"))
def _retrain(
    settings: RetrainSettings,
    data: DataOption = Path("data"),
    artifacts: ArtifactsOption = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """Train a CNN, check it, export it to ONNX and promote it if it passes, as the Prefect flow `retrain`."""
    server = _ensure_server(artifacts)
    from prefect import tags

    from flows.retrain import retrain

    with tags("retrain", settings.prepare.resolved_name):
        state = retrain(
            **{name: getattr(settings, name) for name in RetrainSettings.model_fields},
            data=str(data),
            artifacts=str(artifacts),
            return_state=True,
        )
    _show_run(state, server, ("run", "accuracy", "promoted", "reason"), as_json=as_json)


@command
@takes_settings(ClassifySettings, "folder")
def _classify(
    settings: ClassifySettings, artifacts: ArtifactsOption = Path("artifacts"), as_json: JsonOption = False
) -> None:
    """Classify every file of a folder, one row each, as the Prefect flow `classify`."""
    server = _ensure_server(artifacts)
    from prefect import tags

    from flows.classify import classify

    with tags("classify"):
        state = classify(settings, artifacts=str(artifacts), return_state=True)
    shown = ("table", "found", "ok", "error", "error_kinds", "images_per_second", "device", "slowest_stage")
    _show_run(state, server, shown, as_json=as_json)


def _ensure_server(artifacts: Path) -> Server:
    """Find or start the server, and keep Prefect's own lines and tracebacks off the terminal unless debugging.

    They stay in the run's log in the UI; on the terminal the library's log and one line for an error take their place.
    """
    if "CNNPIPE_DEBUG" not in os.environ:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    return ensure_server(prefect_home(artifacts))


def _show_run(state: State[Any], server: Server, shown: tuple[str, ...], *, as_json: bool) -> None:
    """Print the result of a flow run, of it `shown` for a person, and where to look at it; raise what it raised."""
    address = f"{server.ui_url}/runs/flow-run/{state.state_details.flow_run_id}"
    print_note(f"look at this run:   {address}")
    print_note(f"to stop the server: {server.how_to_stop}")
    result = state.result()  # raises the error of a run that failed
    show_result({**result, "ui": address}, field_lines({name: result[name] for name in shown}), as_json=as_json)
