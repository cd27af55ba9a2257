"""The nightly schedule as its server tells of it: the next run, and the errors in the server's log.

Asks the server's API by plain HTTP and imports no prefect, so that `cnnpipe doctor` can ask too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

from cnnpipe.files import user_path
from cnnpipe.pidfile import PidFile

__all__ = ["Nightly", "logged_errors", "look_at_nightly", "next_run", "prefect_home", "serve_pidfile", "server_log",
           "server_pidfile"]  # fmt: skip

_TIMEOUT_SECONDS: Final = 5.0
_RECORD: Final = re.compile(r"([-\d]* ?\d\d:\d\d:\d\d)\.\d+ \| ([A-Z]+) *\| (.*)")


@dataclass(frozen=True)
class Nightly:
    """State of the nightly schedule: its processes, its next run, and the last error of its server."""

    server: str | None
    """Address of the server in a browser; None if it does not run."""
    server_pid: int | None
    """Process of the server; None if it does not run, or was not started by this project."""
    healthy: bool
    """Whether the server answers."""
    scheduler_pid: int | None
    """Process of `flows.serve`; None if it does not run."""
    next_run: str | None
    """Time of the next run that the server has scheduled, such as 2026-11-27 02:00 Europe/Berlin."""
    last_error: str | None
    """Last error in the server's log, with its time where the log has one."""

    def shown(self) -> dict[str, str]:
        """Return what a person reads, by name."""
        process = "" if self.server_pid is None else f"process {self.server_pid}, "
        state = "answers" if self.healthy else "does not answer"
        return {
            "server": "not running" if self.server is None else f"{self.server}, {process}{state}",
            "scheduler": "not running" if self.scheduler_pid is None else f"process {self.scheduler_pid}",
            "next run": self.next_run or "none",
            "last error": self.last_error or "none",
        }


def prefect_home(artifacts: Path) -> Path:
    """Return the folder of the server's database, its log and results: `PREFECT_HOME`, or one in the artifacts."""
    configured = os.environ.get("PREFECT_HOME")
    return (user_path(configured) if configured else artifacts / ".prefect").resolve()


def server_pidfile(home: Path) -> PidFile:
    """Return the record of the server whose folder is `home`: its `pid` and its `api_url`."""
    return PidFile(home, "server")


def serve_pidfile(home: Path) -> PidFile:
    """Return the record of the scheduler, `flows.serve`: its `pid` and the `api_url` of the server that it uses."""
    return PidFile(home, "serve")


def server_log(home: Path) -> Path:
    """Return the path of the log of the server whose folder is `home`."""
    return home / "server.log"


def look_at_nightly(home: Path) -> Nightly:
    """Find out what runs for the nightly schedule; a server that does not answer is told, and is not an error.

    Args:
        home: folder of the server, see `prefect_home`.
    Raises:
        ServerError: a process runs, but its record is lost.
    """
    import httpx

    scheduler, server = serve_pidfile(home).read(), server_pidfile(home).read()
    api_url = None if scheduler is server is None else str((scheduler or server or {})["api_url"])
    healthy, upcoming = False, None
    if api_url is not None:
        local = httpx.URL(api_url).host in ("127.0.0.1", "localhost")  # no proxy is asked about this machine
        try:
            with httpx.Client(base_url=api_url, timeout=_TIMEOUT_SECONDS, trust_env=not local) as client:
                healthy, upcoming = True, next_run(client.request)
        except (httpx.HTTPError, ValueError):  # no answer, or not the answer of a Prefect API
            healthy = False
    errors = logged_errors(server_log(home))
    return Nightly(
        server=None if api_url is None else api_url.removesuffix("/api"),
        server_pid=server["pid"] if server is not None and server["api_url"] == api_url else None,
        healthy=healthy,
        scheduler_pid=None if scheduler is None else scheduler["pid"],
        next_run=upcoming,
        last_error=errors[-1] if errors else None,
    )


def next_run(request: Callable[..., Any]) -> str | None:
    """Return when the server has scheduled the next run of `retrain/nightly`, or None if it has not.

    Args:
        request: the method `request` of an httpx client, or of a client of Prefect, for the API of the server.
    Returns:
        A time in the timezone of the schedule, such as 2026-11-27 02:00 Europe/Berlin.
    Raises:
        httpx.HTTPError: the server does not answer, or refuses.
    """
    nightly = {"flows": {"name": {"any_": ["retrain"]}}, "deployments": {"name": {"any_": ["nightly"]}}}

    def ask(path: str, **more: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = request("POST", path, json={**nightly, **more}).raise_for_status().json()
        return found

    due = {"after_": datetime.now(UTC).isoformat()}
    scheduled = {"state": {"type": {"any_": ["SCHEDULED"]}}, "next_scheduled_start_time": due}
    runs = ask("/flow_runs/filter", flow_runs=scheduled, sort="NEXT_SCHEDULED_START_TIME_ASC", limit=1)
    if not runs:
        return None
    schedules = [each["schedule"] for found in ask("/deployments/filter") for each in found["schedules"]]
    timezone = next((schedule["timezone"] for schedule in schedules if schedule.get("timezone")), "UTC")
    start = datetime.fromisoformat(runs[0]["next_scheduled_start_time"])
    return f"{start.astimezone(ZoneInfo(timezone)):%Y-%m-%d %H:%M} {timezone}"


def logged_errors(log: Path) -> list[str]:
    """Return each error and each traceback in the log of a server as one line, with its time where the log has one."""
    found: list[list[str]] = []
    is_error = in_traceback = False
    record = ""  # what is logged just before
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        if match := _RECORD.match(line):
            record = f"{match[1]} {match[3]}"
            is_error, in_traceback = match[2] in ("ERROR", "CRITICAL"), False
            if is_error:
                found.append([record])
            continue
        if line.startswith("Traceback (most recent call last)"):
            if not is_error:
                found.append([record or "Traceback"])
            is_error = in_traceback = True
        elif in_traceback and line[:1].strip():  # the exception; of several, the last is what came of the others
            found[-1][1:] = [line]
            in_traceback = False
        record = ""
    return [": ".join(each) for each in found]
