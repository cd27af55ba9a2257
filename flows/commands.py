"""Shared code of the commands `flows.retrain` and `flows.classify`: find a server, run the flow, show its result.

Prefect is imported only when there is a server, because it reads the server's address and its other settings then.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cnnpipe.console import DEBUG_VARIABLE, field_lines, make_app, print_note, run_app, show_result
from cnnpipe.errors import CnnpipeError, FailureBudgetError, ServerError, one_line
from cnnpipe.nightly import UNAUTHORIZED, prefect_home
from flows.server import Server, ensure_server

if TYPE_CHECKING:
    from prefect.client.schemas import State

__all__ = ["run_command", "run_flow"]


def run_command(function: Callable[..., None]) -> None:
    """Run a command as the whole of a command line."""
    app = make_app()
    app.command()(function)
    run_app(app)


def run_flow(
    name: str, parameters: dict[str, Any], tags: list[str], artifacts: Path, shown: tuple[str, ...], *, as_json: bool
) -> None:
    """Find or start a server, run a flow, and print its address in the UI and its result.

    Args:
        name: `retrain` or `classify`.
        artifacts: folder of runs and champions.
        shown: fields of the result to print for a person.
    """
    if DEBUG_VARIABLE not in os.environ:
        # Prefect's own log stays off the terminal; it is in the run's log in the UI. The threads that send logs and
        # events would print tracebacks, also at exit, when the server is lost.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
        logging.raiseExceptions = False
    server = ensure_server(prefect_home(artifacts))
    with _lost_server(server):
        from prefect.client.orchestration import get_client
        from prefect.flow_engine import run_flow_sync

        from flows.flow_runs import crash_silent_runs, run_url

        crash_silent_runs()
        flow = getattr(importlib.import_module(f"flows.{name}_flow"), name)
        # Not by `prefect.tags`: tasks with tags ask the server for slots, and are not retried if it is away then.
        with get_client(sync_client=True) as client:
            values = flow.serialize_parameters(parameters)
            flow_run = client.create_flow_run(flow, parameters=values, tags=[name, *tags])
        state = cast("State[Any]", run_flow_sync(flow, flow_run, parameters, return_type="state"))
        address = run_url(str(state.state_details.flow_run_id))
        print_note(f"look at this run:   {address}")
        print_note(f"to stop the server: {server.how_to_stop}")
        _show_result(state, address, shown, as_json=as_json)


@contextmanager
def _lost_server(server: Server) -> Iterator[None]:
    """Turn the loss of the server, or of its database, into one line, as a ServerError."""
    import httpx
    from prefect.context import refresh_global_settings_context
    from prefect.exceptions import ObjectNotFound

    try:
        yield
    except CnnpipeError:
        raise
    except Exception as error:
        # Prefect raises some losses as errors of its own, such as a concurrency slot that it could not acquire.
        losses = (httpx.HTTPError, ObjectNotFound)
        lost = next((each for each in (error, error.__cause__, error.__context__) if isinstance(each, losses)), None)
        if lost is None:
            raise
        unknown = isinstance(lost, ObjectNotFound)
        problem = "does not know this run any more" if unknown else f"has stopped answering ({one_line(lost)})"
        if isinstance(lost, httpx.HTTPStatusError) and not unknown:
            status = f"answers {lost.response.status_code} {lost.response.reason_phrase}; its log says why"
            problem = UNAUTHORIZED if lost.response.status_code == 401 else status
        # What is still to be sent, logs and events, is tried once more, not for minutes, before this process ends.
        os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "0"
        refresh_global_settings_context()
        raise ServerError(
            f"the Prefect server at {server.ui_url} {problem}, and this run has ended with it; "
            "finished work is kept; run the command again, which finds or starts a server"
        ) from error


def _show_result(state: State[Any], address: str, shown: tuple[str, ...], *, as_json: bool) -> None:
    """Print the result of a flow run on stdout; raise what it raised, after the result if there is one."""
    from flows.classify_flow import TooManyFailuresError

    failed, status = None, "ok"
    try:
        result = state.result()
    except TooManyFailuresError as error:
        result, failed, status = error.summary, FailureBudgetError(str(error)), "too_many_failures"
    lines = field_lines({name: result[name] for name in shown})
    show_result({**result, "ui": address}, lines, as_json=as_json, status=status)
    if failed is not None:
        raise failed
