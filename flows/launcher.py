"""Start a Prefect server on this machine that outlives the process that starts it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from cnnpipe.errors import ServerError
from cnnpipe.nightly import server_log, server_pidfile
from cnnpipe.storage import storage_errors
from flows.probe import answers_health

__all__ = ["HOST", "QUIET", "START_TIMEOUT_SECONDS", "start_server"]

logger = logging.getLogger("cnnpipe.server")

HOST: Final = "127.0.0.1"
_DEFAULT_PORT: Final = 4200  # Prefect's own
START_TIMEOUT_SECONDS: Final = 120.0  # 20 s with an empty database and 5 s after, on 2 idle cores
_ATTEMPTS: Final = 2  # `prefect server start` was seen to die without a word, and to come up the next time
_POLL_SECONDS: Final = 0.1
_MAX_LOG_BYTES: Final = 5_000_000

QUIET: Final = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The library logs outside of runs too, for example from threads that decode images.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""Environment of every Prefect process of ours: no telemetry, no advertising, no noise. The user's own values win."""

_SERVER_SETTINGS: Final = {
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_CLI_COLORS": "false",
    "PREFECT_LOGGING_COLORS": "false",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S",  # the log is kept for longer than a day
    # How far ahead a run is scheduled: Prefect's own 100 days would leave a yearly schedule without a next run.
    "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_SCHEDULED_TIME": "P1500D",
    # In memory, the default, leases are lost with the server, and with them the slot of every run then under way:
    # a deployment with a concurrency limit of 1 would never run again.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


def _api_url_at(port: int) -> str:
    """Return the address of the API of a server on this machine."""
    return f"http://{HOST}:{port}/api"


def start_server(home: Path, port: int | None) -> tuple[str, int]:
    """Start a server and wait until it answers.

    Args:
        home: existing folder for its database, its log and its record.
        port: port to listen on; None for 4200, or any free one if that is taken.
    Returns:
        The address of its API, and its pid.
    Raises:
        ServerError: it does not come up; tells what its log says.
    """
    if port is not None and not _is_free(port):
        raise ServerError(f"port {port} on {HOST} is taken by another program; free it or choose another")
    problem = ""
    for _ in range(_ATTEMPTS):
        chosen = port or (_DEFAULT_PORT if _is_free(_DEFAULT_PORT) else _free_port())
        logger.info("starting a Prefect server on port %d; 5 s, the first time 20 s", chosen)
        process = _spawn(home, chosen)
        try:
            exit_status = _wait_until_ready(process, _api_url_at(chosen))
        except BaseException:  # also Ctrl-C: no half-started server stays behind
            process.kill()
            process.wait()
            raise
        if exit_status is None:
            return _api_url_at(chosen), process.pid
        problem = f"it ended with status {exit_status}"
    raise ServerError(f"the Prefect server did not come up: {problem}; {_log_tail(server_log(home))}")


def _spawn(home: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the server detached from this terminal, and record it."""
    pidfile = server_pidfile(home)
    lock = pidfile.acquire()
    if lock is None:
        raise ServerError(f"another process holds {pidfile.lock_path}; run `make stop` and try again")
    log = server_log(home)
    arguments = ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    try:
        with storage_errors(log):
            if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=home,  # prefect reads settings from files in its working directory
                    env=_server_environment(home, port),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
    finally:
        os.close(lock)
    pidfile.write({"pid": process.pid, "api_url": _api_url_at(port)})
    return process


def _server_environment(home: Path, port: int) -> dict[str, str]:
    """Return the environment of the server: the user's, less what belongs to clients and to runs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PREFECT_API_URL", "PREFECT_UI_URL", "PREFECT_PROFILE") and not name.startswith("PREFECT__")
    }
    if not any(name.startswith(("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")) for name in kept):
        # In its working directory, so that the path of that, which no URL of SQLAlchemy can quote, is not part of it.
        kept["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = "sqlite+aiosqlite:///prefect.db"
    own = {
        "PREFECT_HOME": str(home),
        # The page in the browser learns from these, not from the command line, where the API is.
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
    }
    return {**QUIET, **_SERVER_SETTINGS, **kept, **own}


def _wait_until_ready(process: subprocess.Popen[bytes], api_url: str) -> int | None:
    """Wait until the server answers.

    Returns:
        None when it answers, or the exit status of a server that died.
    Raises:
        ServerError: it lives but does not answer in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while process.poll() is None:
        if answers_health(api_url):
            return None
        if time.monotonic() > deadline:
            raise ServerError(
                f"the Prefect server did not answer at {api_url} within {START_TIMEOUT_SECONDS:.0f} s and was stopped; "
                "see its log in the folder .prefect of the artifacts, and try again"
            )
        time.sleep(_POLL_SECONDS)
    return process.returncode


def _log_tail(log: Path, num_lines: int = 4) -> str:
    """Return the last words of a log as part of a line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"its log {log} ends with: {' / '.join(lines[-num_lines:]) or '(nothing)'}"


def _is_free(port: int) -> bool:
    """Tell whether a server could listen on a port; one that was just left counts as free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
    return port
