"""The Prefect server that the flows report to: the one that is configured, or the one of the artifacts folder.

1. `PREFECT_API_URL`, wherever Prefect reads it from. If nothing answers there, that is an error.
2. Else the server that was started for this artifacts folder before. A server of another project is left alone, because
   it may be stopped, or started with another database, in the middle of a run.
3. Else one is started on 127.0.0.1, with its database and its log in `<artifacts>/.prefect`. It runs until `make stop`:
   if it is killed, the commands under way, or else the next one, start it again at the same address.

What that server does is set by Prefect's own variables, in the environment or in `.env`:
`PREFECT_API_AUTH_STRING` (user:password that it demands), `PREFECT_SERVER_API_HOST` (where it listens, 127.0.0.1) and
`PREFECT_SERVER_DATABASE_CONNECTION_URL`.

This module imports no prefect, because prefect reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer
from dotenv import dotenv_values
from filelock import AcquireReturnProxy, FileLock

from cnnpipe.console import ArtifactsOption, JsonOption, command, make_app, run_app, show_result
from cnnpipe.errors import CnnpipeError, ServerError, UsageError, one_line
from cnnpipe.nightly import (
    MAX_LOG_BYTES,
    UNAUTHORIZED,
    auth_string,
    http_client,
    look_at_nightly,
    make_private_folder,
    prefect_home,
    prefect_variables,
    serve_pidfiles,
    server_log,
    server_pidfile,
)  # fmt: skip
from cnnpipe.paths import escape_path
from cnnpipe.storage import storage_errors

__all__ = ["Server", "configured_api_url", "ensure_server", "prepare_environment", "running_server", "stop_server"]

logger = logging.getLogger("cnnpipe.server")

_HOST: Final = "127.0.0.1"
_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 (compared with)
_DEFAULT_PORT: Final = 4200  # Prefect's own
_START_SECONDS: Final = 120.0  # 20 s with an empty database and 5 s after, on 2 idle cores
_START_ATTEMPTS: Final = 2  # `prefect server start` was seen to die without a word, and to come up the next time
_STOP_SECONDS: Final = 15.0
_SERVE_STOP_SECONDS: Final = 60.0  # it also ends the flow runs under way
_LOCAL_PROBE_SECONDS: Final = 5.0
_REMOTE_PROBE_SECONDS: Final = 15.0
_SECONDS_BETWEEN_LOOKS: Final = 5.0
_ARTIFACTS: Final = Path("artifacts")

_PREFECT_ENVIRONMENT: Final = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The library logs outside of runs too, for example from threads that decode images.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",  # see flows.flow_runs.crash_silent_runs
    # With pauses of 2, 4, … 64 s, 126 s in all: as long as a killed server may take to come back. Stages, which are
    # retried, wait for longer.
    "PREFECT_CLIENT_MAX_RETRIES": "6",
}
"""Environment of every Prefect process of this project: no telemetry, no advertising. The user's own values win."""

_SERVER_ENVIRONMENT: Final = {
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_CLI_COLORS": "false",
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S",  # the log is kept for longer than a day
    # Logs and artifacts of flow runs that were deleted, by the stage `clean` or in the UI, go too.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,orphans",
    # The page in the browser asks the server that it came from, by whatever name, tunnel or proxy; no other page may.
    "PREFECT_UI_API_URL": "/api",
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "none",
    # How far ahead a run is scheduled: Prefect's own 100 days would leave a yearly schedule without a next run.
    "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_SCHEDULED_TIME": "P1500D",
    # In memory, the default, leases are lost with the server, and with them the slot of every run then under way:
    # a deployment with a concurrency limit of 1 would never run again.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # After a minute, the default, a server that was down would not know that it waits for a run's heartbeat.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P1500D",
}

_HOLD_LOCK_AND_SERVE: Final = """
import runpy, sys
from filelock import FileLock
lock = FileLock(sys.argv.pop(1))
lock.acquire(timeout=5)
runpy.run_module("prefect", run_name="__main__", alter_sys=True)
"""
"""Program of the server's process: Prefect's own command, with the lock of the server's record."""


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


def _own_server(home: Path, api_url: str, pid: int, *, started: bool) -> Server:
    """Return the server of a folder, with the shortest command that stops it, to be typed where this process runs."""
    stop = shlex.join([sys.executable, "-m", "flows.server", "stop"])
    if home == (_ARTIFACTS / ".prefect").resolve() and Path("Makefile").is_file():
        stop = "make stop"
    elif home.name == ".prefect":
        stop += f" --artifacts {shlex.quote(str(home.parent))}"
    else:
        stop = f"PREFECT_HOME={shlex.quote(str(home))} {stop}"
    return Server(api_url, api_url.removesuffix("/api"), started, pid, stop)


def ensure_server(home: Path, *, port: int | None = None) -> Server:
    """Find or start a Prefect server, and point this process and its children at it.

    Call it before prefect is imported, which reads its settings of telemetry and logging then. As long as this process
    lives, a thread starts the server again if it is killed.

    Args:
        home: folder of the artifacts' own server, see `prefect_home`; also keeps the results of tasks.
        port: where to start a server; default: 4200, or any free port if that is taken.
    Raises:
        UsageError: the path of `home` has bytes that are not text, which Prefect cannot send to its server.
        ServerError: the configured server does not answer, or none could be started.
        StorageError: `home` cannot be written.
    """
    home = home.resolve()
    if (shown := escape_path(str(home))) != str(home):
        raise UsageError(f"a flow needs a folder whose path is UTF-8, received {shown}; rename it, or use `cnnpipe`")
    prepare_environment(home)
    api_url, origin = configured_api_url() or (None, "")
    if api_url is None:
        make_private_folder(home)
        with _one_at_a_time(home):
            server = running_server(home)
            if server is None or not _wait_until_healthy(server.api_url, home):
                server = _start_server(home, port)
    elif problem := _problem_at(api_url, _REMOTE_PROBE_SECONDS):
        raise ServerError(
            f"no Prefect server at {api_url}, which {origin} names: {problem}; start that server, or unset "
            "PREFECT_API_URL to have a local one started"
        )
    else:
        server = running_server(home)
        if server is None or server.api_url != api_url:
            ui_url = os.environ.get("PREFECT_UI_URL") or api_url.removesuffix("/api")
            server = Server(api_url, ui_url, False, None, how_to_stop="where it was started, which was not here")
    if server.pid is not None:
        port = urlsplit(server.api_url).port
        threading.Thread(target=_start_again_if_killed, args=(home, port), daemon=True).start()
    os.environ["PREFECT_API_URL"] = server.api_url
    for name in ("no_proxy", "NO_PROXY"):  # a proxy, where one is set, gets no requests to this machine
        hosts = [each for each in os.environ.get(name, "").split(",") if each]
        if _HOST not in hosts and "*" not in hosts:
            os.environ[name] = ",".join([*hosts, _HOST])
    if "prefect.context" in sys.modules:
        importlib.import_module("prefect.context").refresh_global_settings_context()
    return server


def prepare_environment(home: Path) -> None:
    """Set what prefect reads from the environment when it is imported; `ensure_server` does it too.

    Raises:
        ServerError: the file of Prefect profiles cannot be read.
    """
    for name, value in _PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if configured_api_url() is None:  # a configured server may need the keys in the user's own profile
        os.environ["PREFECT_HOME"] = str(home)
    if auth := auth_string():
        os.environ["PREFECT_API_AUTH_STRING"] = auth  # also for the processes of scheduled runs
    # Kept from run to run, so that a finished stage is not done again when a failed run is retried.
    os.environ.setdefault("PREFECT_RESULTS_LOCAL_STORAGE_PATH", str(home / "results"))


def running_server(home: Path) -> Server | None:
    """Return the server that this project started earlier, whether or not it answers; None if it does not run."""
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
    pids = dict.fromkeys(each.stop(_SERVE_STOP_SECONDS) for each in serve_pidfiles(home).values())
    stopped = [f"stopped the scheduler (process {pid})" for pid in pids if pid is not None]
    with _one_at_a_time(home):
        server = running_server(home)
        if server is not None and server_pidfile(home).stop(_STOP_SECONDS) is not None:
            stopped.append(f"stopped the Prefect server at {server.ui_url} (process {server.pid})")
        server_pidfile(home).record_path.unlink(missing_ok=True)  # one that was killed is not started again either
    return stopped


def configured_api_url() -> tuple[str, str] | None:
    """Return the address of the API that the user has configured and where it is set, or None.

    The places and their order are prefect's own: the environment; `.env`, `prefect.toml` and `pyproject.toml` in the
    working folder; the active profile. Source: docs.prefect.io, "Settings and profiles".

    Raises:
        ServerError: one of the files cannot be read.
    """

    def places() -> Iterator[tuple[str | None, str]]:
        yield os.environ.get("PREFECT_API_URL"), "PREFECT_API_URL"
        yield dotenv_values(".env").get("PREFECT_API_URL"), "PREFECT_API_URL in .env"
        yield _read_toml("prefect.toml").get("api", {}).get("url"), "the api url in prefect.toml"
        tool = _read_toml("pyproject.toml").get("tool", {})
        yield tool.get("prefect", {}).get("api", {}).get("url"), "the api url in pyproject.toml"
        home = os.environ.get("PREFECT_HOME") or "~/.prefect"
        profiles = _read_toml(os.environ.get("PREFECT_PROFILES_PATH") or f"{home}/profiles.toml")
        name = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
        url = profiles.get("profiles", {}).get(name, {}).get("PREFECT_API_URL")
        yield url, f"PREFECT_API_URL of the Prefect profile {name!r}"

    # A later place is not read if an earlier one decides.
    return next(((url.rstrip("/"), origin) for url, origin in places() if url), None)


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ServerError(f"cannot read Prefect's settings from {path}: {one_line(error)}; fix that file") from error


def _problem_at(api_url: str, timeout_seconds: float) -> str | None:
    """Return why an address is not that of a Prefect API that answers, or None.

    Whether the API lets this client in is left to prefect, which has the keys and the certificates.
    """
    import httpx

    try:
        with http_client(api_url, timeout_seconds) as client:
            answer = client.get("/health", follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return None if "CERTIFICATE" in str(error) else f"no answer ({one_line(error)})"
    # Prefect Cloud asks for the key first.
    if answer.text == "true" or answer.status_code in (401, 403) or "/workspaces/" in api_url:
        return None
    return f"what answers ({answer.status_code}) is not a Prefect API; does the address end in /api?"


def _start_server(home: Path, port: int | None) -> Server:
    """Start a server that outlives this process, and wait until it answers.

    Args:
        port: port to listen on; None for that of the server before if it was killed, or 4200, or any free one.
    """
    host = prefect_variables().get("PREFECT_SERVER_API_HOST", _HOST)
    if host not in (_HOST, "localhost") and auth_string() is None:
        raise UsageError(
            f"PREFECT_SERVER_API_HOST={host} opens the server to other machines, which may start runs as this user; "
            "also set PREFECT_API_AUTH_STRING=user:password, which it then demands"
        )
    for _ in range(_START_ATTEMPTS):
        wanted = [port] if port else [_port_of_killed_server(home) or _DEFAULT_PORT, _DEFAULT_PORT, 0]
        chosen = next(filter(None, (_free_port(host, each) for each in wanted)), None)
        if chosen is None and port is None:
            raise UsageError(f"PREFECT_SERVER_API_HOST must be an IPv4 address of this machine, received {host}")
        if chosen is None:
            raise ServerError(f"port {port} on {host} is taken by another program; free it or choose another")
        logger.info("starting a Prefect server on port %d; 5 s, the first time 20 s", chosen)
        api_url = f"http://{_HOST if host == _EVERYWHERE else host}:{chosen}/api"
        process = _spawn(home, host, chosen)
        try:
            server_pidfile(home).write(process.pid, api_url)
            if _wait_until_healthy(api_url, home, process):
                return _own_server(home, api_url, process.pid, started=True)
        except BaseException:  # also Ctrl-C: no half-started server stays
            process.kill()
            process.wait()
            raise
    log = server_log(home)
    lines = filter(None, map(str.strip, log.read_text(encoding="utf-8", errors="replace").splitlines()))
    raise ServerError(
        f"the Prefect server did not come up: it ended with status {process.returncode}; "
        f"its log {log} ends with: {' / '.join([*lines][-4:]) or '(nothing)'}"
    )


def _port_of_killed_server(home: Path) -> int | None:
    """Return the port of a server that has ended without being stopped, or None; only a stop deletes its record."""
    pidfile = server_pidfile(home)
    with suppress(OSError, ValueError, KeyError):
        if not pidfile.is_running():
            return urlsplit(str(json.loads(pidfile.record_path.read_bytes())["api_url"])).port
    return None


def _start_again_if_killed(home: Path, port: int) -> None:
    """Start the server again whenever it is killed: runs under way, and the schedule, wait for it."""
    warned = False
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        try:
            if _port_of_killed_server(home) == port:
                with _one_at_a_time(home):  # of several commands, the first one starts it; a stop deletes the record
                    if _port_of_killed_server(home) == port:
                        _start_server(home, port)
        except CnnpipeError as error:
            if not warned:
                logger.warning("the Prefect server was killed and cannot be started again: %s", one_line(error))
            warned = True


def _spawn(home: Path, host: str, port: int) -> subprocess.Popen[bytes]:
    """Start a server's process, detached from this terminal, without the variables of clients and of runs."""
    client = {"PREFECT_API_URL", "PREFECT_UI_URL", "PREFECT_PROFILE", "PREFECT_SERVER_API_AUTH_STRING"}
    client |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL"}  # see flows.commands
    variables = os.environ | prefect_variables()
    user = {name: each for name, each in variables.items() if name not in client and not name.startswith("PREFECT__")}
    own = {"PREFECT_HOME": str(home)}
    if auth := auth_string():
        own["PREFECT_SERVER_API_AUTH_STRING"] = auth  # not as an argument, which every user can read
    if not any(name.startswith(("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")) for name in user):
        # Relative to the working directory, because no URL of SQLAlchemy can quote every path.
        own["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = "sqlite+aiosqlite:///prefect.db"
    log, lock = server_log(home), server_pidfile(home).lock_path
    arguments = ["-c", _HOLD_LOCK_AND_SERVE, str(lock), "server", "start", "--host", host, "--port", str(port)]
    with storage_errors(log):
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=home,  # prefect reads settings from files in its working directory
                env={**_PREFECT_ENVIRONMENT, **_SERVER_ENVIRONMENT, **user, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _wait_until_healthy(api_url: str, home: Path, process: subprocess.Popen[bytes] | None = None) -> bool:
    """Wait until the server of a folder, which may be starting or busy, answers; return False if it has ended.

    Args:
        process: its process if this process started it.
    Raises:
        ServerError: it does not answer in time, or wants another user and password.
    """
    import httpx

    deadline = time.monotonic() + _START_SECONDS
    while _problem_at(api_url, _LOCAL_PROBE_SECONDS):
        if (process.poll() is not None) if process else not server_pidfile(home).is_running():
            return False
        if time.monotonic() > deadline:
            raise ServerError(
                f"the Prefect server at {api_url} has not answered for {_START_SECONDS:.0f} s; its log is "
                f"{server_log(home)}; run `make stop` and try again"
            )
        time.sleep(0.1)
    with suppress(httpx.HTTPError), http_client(api_url, _LOCAL_PROBE_SECONDS) as client:
        if client.get("/admin/version").status_code == 401:  # `/health` is open to all
            raise ServerError(f"the Prefect server at {api_url} {UNAUTHORIZED}")
    return True


def _free_port(host: str, port: int) -> int | None:
    """Return the port, or any free one for 0; None if another program listens on it."""
    with socket.socket() as listener, suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left counts as free
        listener.bind((host, port))
        return int(listener.getsockname()[1])
    return None


def _one_at_a_time(home: Path) -> AcquireReturnProxy:
    """Let one process at a time start or stop a server; the others wait, and then find it."""
    with storage_errors(home):
        return FileLock(home / "server.lock").acquire(timeout=2 * _START_SECONDS)


app = make_app("The Prefect server of this project: started where none runs, on 127.0.0.1.")

PortOption = Annotated[int | None, typer.Option(help="Port. Default: 4200, or any free one.", min=1, max=65535)]


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
    """Stop the schedulers and the server that this project started, and nothing else."""
    stopped = stop_server(prefect_home(artifacts))
    show_result({"stopped": stopped}, stopped or ["no server of this project is running"], as_json=as_json)


@app.command()
@command
def status(artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Show what this project runs in the background, the next run, and the last error of the server."""
    home = prefect_home(artifacts)
    server, nightly = running_server(home), look_at_nightly(home)
    values: dict[str, Any] = {name: getattr(nightly, name) for name in ("schedulers", "next_runs", "last_error")}
    values["server"] = None if server is None else {**asdict(server), "healthy": nightly.healthy}
    show_result(values, [f"{name}: {text}" for name, text in nightly.shown().items()], as_json=as_json)


if __name__ == "__main__":
    run_app(app)
