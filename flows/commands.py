"""`python -m flows.retrain` and `python -m flows.classify`: options, a server, the flow, its address in the UI."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnpipe.console import DEBUG_VARIABLE, JsonOption, command, field_lines, print_note, run_app, show_result
from cnnpipe.errors import FailureBudgetError, ServerError, one_line
from cnnpipe.files import display_path
from cnnpipe.nightly import prefect_home
from cnnpipe.options import ArtifactsOption, DataOption, takes_settings
from cnnpipe.settings import ClassifySettings, RetrainSettings
from flows.dask import Runner, check_runner
from flows.flow_runs import close_dead_runs, run_url
from flows.server import Server, ensure_server

if TYPE_CHECKING:
    from prefect.client.schemas import State

__all__ = ["run_classify", "run_retrain"]

RunnerOption = Annotated[
    Runner, typer.Option("--runner", help="`local`: this process; `dask`: the workers of a Dask cluster.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Address of a Dask scheduler, such as tcp://host:8786; default: a cluster on this machine.",
        show_default=False,
    ),
]


def run_retrain() -> None:
    """Run the command of `flows.retrain`."""
    _run(_retrain)


def run_classify() -> None:
    """Run the command of `flows.classify`."""
    _run(_classify)


def _run(function: Any) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    run_app(app)


@command
@takes_settings(RetrainSettings, "dataset", ("prepare", "train", "evaluate", "export", "promote"))
def _retrain(
    settings: RetrainSettings,
    data: DataOption = Path("data"),
    artifacts: ArtifactsOption = Path("artifacts"),
    as_json: JsonOption = False,
) -> None:
    """Train a CNN, check it, export it to ONNX and promote it if it passes, as the Prefect flow `retrain`."""

    def run() -> State[Any]:
        from prefect import tags

        from flows.retrain import retrain

        sections = {name: getattr(settings, name) for name in RetrainSettings.model_fields}
        with tags("retrain", settings.prepare.resolved_name):
            state: State[Any] = retrain(
                **sections, data=display_path(str(data)), artifacts=display_path(str(artifacts)), return_state=True
            )
        return state

    _run_flow(run, artifacts, ("run", "accuracy", "promoted", "reason"), as_json=as_json)


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

        from flows.classify import classify

        with tags("classify"):
            state: State[Any] = classify(
                settings, artifacts=display_path(str(artifacts)), runner=runner, scheduler=scheduler, return_state=True
            )
        return state

    shown = ("table", "found", "ok", "error", "resumed", "error_kinds", "images_per_second", "device", "precision",
             "precision_reason", "slowest_stage")  # fmt: skip
    _run_flow(run, artifacts, shown, as_json=as_json)


def _run_flow(run: Callable[[], State[Any]], artifacts: Path, shown: tuple[str, ...], *, as_json: bool) -> None:
    """Find or start a server, run a flow, and print where to look at it and what came of it.

    Args:
        run: runs the flow; imports it, too, as prefect may be imported only when there is a server.
        shown: what of the result a person sees.
    """
    home = prefect_home(artifacts)
    _quieten_prefect()
    server = ensure_server(home)
    with _lost_server(server):
        close_dead_runs(home)
        state = run()
        address = run_url(str(state.state_details.flow_run_id))
        print_note(f"look at this run:   {address}")
        print_note(f"to stop the server: {server.how_to_stop}")
        _show_result(state, address, shown, as_json=as_json)


def _quieten_prefect() -> None:
    """Keep Prefect's own lines and tracebacks off the terminal unless debugging.

    They stay in the run's log in the UI; on the terminal the library's log and one line for an error take their place.
    """
    if DEBUG_VARIABLE in os.environ:
        return
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # Threads of Prefect that send logs and events tell of a lost server too, at length.
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    logging.raiseExceptions = False  # what cannot be sent to a lost server would say so at exit


@contextmanager
def _lost_server(server: Server) -> Iterator[None]:
    """Turn the loss of the server, or of its database, into one line.

    Raises:
        ServerError: the server does not answer any more, or does not know this run any more.
    """
    import httpx
    from prefect.exceptions import ObjectNotFound

    try:
        yield
    except (httpx.TransportError, ObjectNotFound) as error:
        lost = isinstance(error, ObjectNotFound)
        problem = "does not know this run any more" if lost else f"has stopped answering ({one_line(error)})"
        raise ServerError(
            f"the Prefect server at {server.ui_url} {problem}, and with it this run has ended; "
            "what was finished is kept; run the command again, which finds or starts a server"
        ) from error


def _show_result(state: State[Any], address: str, shown: tuple[str, ...], *, as_json: bool) -> None:
    """Print the result of a flow run on stdout, or raise what it raised, after the result if there is one."""
    from flows.classify import TooManyFailuresError

    failed, status = None, "ok"
    try:
        result = state.result()
    except TooManyFailuresError as error:
        result, failed, status = error.summary, FailureBudgetError(str(error)), "too_many_failures"
    lines = field_lines({name: result[name] for name in shown})
    show_result({**result, "ui": address}, lines, as_json=as_json, status=status)
    if failed is not None:
        raise failed
