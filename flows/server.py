"""The Prefect server that the flows report to: the one that is configured, or the one of the artifacts folder.

1. `PREFECT_API_URL`, from any place that Prefect reads: that server is used, or it is an error; it is never ignored.
2. Else the server that was started for this artifacts folder before. A server of another project is left alone, because
   it may be stopped, or started with another database, in the middle of a run.
3. Else one is started on 127.0.0.1, with its SQLite file and its log in `<artifacts>/.prefect`. It outlives the
   process that started it, so that runs can be looked at, until `make stop`.

This module imports no prefect, because prefect reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from filelock import FileLock, Timeout

from cnnpipe.console import ArtifactsOption, JsonOption, command, make_app, run_app, show_result
from cnnpipe.errors import ServerError, UsageError
from cnnpipe.files import display_path
from cnnpipe.nightly import look_at_nightly, prefect_home, serve_pidfile, server_pidfile
from cnnpipe.storage import make_folder, storage_errors
from flows.launcher import HOST, QUIET, START_TIMEOUT_SECONDS, start_server
from flows.probe import answers_health, check_configured, configured_api_url

__all__ = [
    "Server",
    "app",
    "ensure_server",
    "prepare_environment",
    "running_server",
    "stop_server",
]

logger = logging.getLogger("cnnpipe.server")

STOP_TIMEOUT_SECONDS: Final = 15.0
SERVE_STOP_TIMEOUT_SECONDS: Final = 60.0  # it also ends the flow runs under way
_LOCK_TIMEOUT_SECONDS: Final = 2 * START_TIMEOUT_SECONDS
_POLL_SECONDS: Final = 0.1
_ARTIFACTS: Final = Path("artifacts")


@dataclass(frozen=True)
class Server:
    """A Prefect server that answers.

    Attributes:
        api_url: what goes into `PREFECT_API_URL`; ends in `/api`.
        ui_url: the address to open in a browser.
        started: whether the call that returned this started it.
        pid: its process if this project started it, else None.
        how_to_stop: the end of the sentence "stop the server: …".
    """

    api_url: str
    ui_url: str
    started: bool
    pid: int | None
    how_to_stop: str


def ensure_server(home: Path, *, port: int | None = None) -> Server:
    """Find or start a Prefect server, and point this process and its children at it.

    Call it before prefect is imported: prefect reads the settings of telemetry and logging at its import. The
    address is taken up even later.

    Args:
        home: folder of a server of our own, see `prefect_home`; also keeps the results of tasks.
        port: where to start a server; default: 4200, or any free port if that is taken.
    Raises:
        UsageError: the path of `home` has bytes that are not text, which Prefect cannot send to its server.
        ServerError: the configured server does not answer, or none could be started; tells what its log says.
        StorageError: `home` cannot be written.
    """
    home = home.resolve()
    if (shown := display_path(str(home))) != str(home):
        raise UsageError(f"a flow needs a folder whose path is UTF-8, received {shown}; rename it, or use `cnnpipe`")
    prepare_environment(home)
    configured = configured_api_url()
    if configured is not None:
        check_configured(*configured)
        own = running_server(home)
        server = own if own is not None and own.api_url == configured[0] else _foreign_server(configured[0])
    else:
        server = _local_server(home, port)
    _point_prefect_at(server)
    return server


def prepare_environment(home: Path) -> None:
    """Set what prefect reads from the environment when it is imported; `ensure_server` does it too.

    Raises:
        ServerError: the file of Prefect profiles cannot be read.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if configured_api_url() is None:  # a configured server may need the keys in the user's own profile
        os.environ["PREFECT_HOME"] = str(home)
    # Kept from run to run, so that a finished stage is not done again when a failed run is retried.
    os.environ.setdefault("PREFECT_RESULTS_LOCAL_STORAGE_PATH", str(home / "results"))


def running_server(home: Path) -> Server | None:
    """Return the server that this project started earlier, whether or not it answers; None if there is none."""
    record = server_pidfile(home).read()
    return None if record is None else _own_server(home, record["api_url"], record["pid"], started=False)


def stop_server(home: Path) -> list[str]:
    """Stop what this project runs in the background: `flows.serve`, then the server.

    Returns:
        One line for each process that was stopped.
    Raises:
        ServerError: a process does not end.
    """
    home = home.resolve()
    if not home.is_dir():
        return []
    stopped = []
    serve_pid = serve_pidfile(home).stop(SERVE_STOP_TIMEOUT_SECONDS)
    if serve_pid is not None:
        stopped.append(f"stopped the scheduler (process {serve_pid})")
    with _one_at_a_time(home):
        server = running_server(home)
        if server is not None and server_pidfile(home).stop(STOP_TIMEOUT_SECONDS) is not None:
            stopped.append(f"stopped the Prefect server at {server.ui_url} (process {server.pid})")
    return stopped


def _local_server(home: Path, port: int | None) -> Server:
    make_folder(home)
    with _one_at_a_time(home):
        own = running_server(home)
        if own is not None and _wait_until_healthy(own, home):
            return own
        return _own_server(home, *start_server(home, port), started=True)


def _wait_until_healthy(server: Server, home: Path) -> bool:
    """Wait for a server that runs, but may be starting or busy; returns whether it still runs.

    Raises:
        ServerError: it runs on without answering.
    """
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not answers_health(server.api_url):
        if not server_pidfile(home).is_running():
            return False
        if time.monotonic() > deadline:
            raise ServerError(
                f"the Prefect server of this project, process {server.pid} at {server.ui_url}, does not answer; "
                "run `make stop` and try again"
            )
        time.sleep(_POLL_SECONDS)
    return True


def _point_prefect_at(server: Server) -> None:
    """Give prefect the server's address, for this process and for the flow runs it starts."""
    os.environ["PREFECT_API_URL"] = server.api_url
    _bypass_proxy()
    if "prefect.context" in sys.modules:
        importlib.import_module("prefect.context").refresh_global_settings_context()


def _bypass_proxy() -> None:
    """Keep a proxy, where one is set, from getting the requests to this machine."""
    if not any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        return
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [each for each in os.environ.get(name, "").split(",") if each]
        if HOST not in hosts and "*" not in hosts:
            os.environ[name] = ",".join([*hosts, HOST])


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Let one process at a time start or stop a server; the others wait, and then find it."""
    lock = FileLock(home / "server.lock")
    with storage_errors(home):
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS)
        except Timeout as error:  # inside, because it is an OSError too
            raise ServerError(
                f"another process has been starting a Prefect server for minutes; end what holds {lock.lock_file}"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _own_server(home: Path, api_url: str, pid: int, *, started: bool) -> Server:
    return Server(api_url, _ui_url(api_url), started, pid, _stop_command(home))


def _stop_command(home: Path) -> str:
    """Return the shortest command that stops the server of a folder, to be typed where this process runs."""
    if home == (_ARTIFACTS / ".prefect").resolve() and Path("Makefile").is_file():
        return "make stop"
    command_line = shlex.join([sys.executable, "-m", "flows.server", "stop"])
    if home.name == ".prefect":
        return f"{command_line} --artifacts {shlex.quote(str(home.parent))}"
    return f"PREFECT_HOME={shlex.quote(str(home))} {command_line}"


def _foreign_server(api_url: str) -> Server:
    ui_url = os.environ.get("PREFECT_UI_URL") or _ui_url(api_url)
    return Server(api_url, ui_url, started=False, pid=None, how_to_stop="where it was started; it is not ours")


def _ui_url(api_url: str) -> str:
    return api_url.removesuffix("/api")


app = make_app("The Prefect server of this project: started where none runs, on 127.0.0.1.")

PortOption = Annotated[int | None, typer.Option(help="Port; default: 4200, or any free one.", min=1, max=65535)]


@app.command()
@command
def start(artifacts: ArtifactsOption = _ARTIFACTS, port: PortOption = None, as_json: JsonOption = False) -> None:
    """Start the server, unless one is configured or runs already."""
    server = ensure_server(prefect_home(artifacts), port=port)
    lines = [f"Prefect server: {server.ui_url}", f"stop the server: {server.how_to_stop}"]
    show_result(asdict(server), lines, as_json=as_json)


@app.command()
@command
def stop(artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Stop the scheduler and the server that this project started, and nothing else."""
    stopped = stop_server(prefect_home(artifacts))
    show_result({"stopped": stopped}, stopped or ["no server of this project is running"], as_json=as_json)


@app.command()
@command
def status(artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Tell what this project runs in the background, the next run, and the last error of the server."""
    home = prefect_home(artifacts)
    server, nightly = running_server(home), look_at_nightly(home)
    values = {
        "server": None if server is None else {**asdict(server), "healthy": nightly.healthy},
        **{name: getattr(nightly, name) for name in ("scheduler_pid", "next_run", "last_error")},
    }
    show_result(values, [f"{name}: {text}" for name, text in nightly.shown().items()], as_json=as_json)


if __name__ == "__main__":
    run_app(app)
