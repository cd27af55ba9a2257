"""The nightly schedule seen from outside: its processes, its next run, and the errors in its server's log.

Asks the server's API by plain HTTP and imports no prefect, so that `cnnpipe doctor` can ask too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from filelock import FileLock, Timeout

from cnnpipe.errors import ServerError, UsageError, one_line
from cnnpipe.paths import expand_path
from cnnpipe.storage import make_folder, storage_errors, write_json

if TYPE_CHECKING:
    import httpx

__all__ = ["MAX_LOG_BYTES", "UNAUTHORIZED", "Nightly", "PidFile", "auth_string", "http_client", "logged_errors",
           "look_at_nightly", "make_private_folder", "next_runs", "prefect_home", "prefect_variables", "serve_pidfile",
           "serve_pidfiles", "server_log", "server_pidfile"]  # fmt: skip

MAX_LOG_BYTES: Final = 5_000_000
"""Size from which the log of a server becomes the previous log: at its next start, or in the stage `clean`."""

_TIMEOUT_SECONDS: Final = 5.0
_LOCK_SECONDS: Final = 2.0  # whoever asks whether a process lives holds its lock for an instant
_KILL_SECONDS: Final = 5.0
UNAUTHORIZED: Final = (
    "wants the user and password that it was started with; set PREFECT_API_AUTH_STRING=user:password, also in .env"
)
_RECORD: Final = re.compile(r"([-\d]* ?\d\d:\d\d:\d\d)\.\d+ \| ([A-Z]+) *\| (.*)")


class PidFile:
    """Record of one background process: `<name>.json` describes it, `<name>.alive` is locked while it lives.

    A pid alone proves nothing: the process may be gone and its number given to another one, or it runs in another
    container or on another machine that shares the folder. The system takes the lock away when the process ends,
    however it ends. The lock file itself is never deleted: a process that waits for a deleted file locks another one.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.record_path = folder / f"{name}.json"
        self.lock_path = folder / f"{name}.alive"
        self._lock = FileLock(self.lock_path)

    def acquire(self) -> bool:
        """Take the lock until this process ends or this object goes, and delete the record of an earlier process.

        Returns:
            False if another process holds the lock.
        Raises:
            StorageError: the folder cannot be written.
        """
        make_folder(self.lock_path.parent)
        if taken := self._lock_within(_LOCK_SECONDS):
            self.record_path.unlink(missing_ok=True)
        return taken

    def write(self, pid: int, api_url: str) -> None:
        """Record the process that holds the lock, and the API of the Prefect server that it is or uses."""
        write_json(self.record_path, {"pid": pid, "api_url": api_url})

    def is_running(self) -> bool:
        """Return whether the process lives.

        Raises:
            StorageError: the folder is another user's.
        """
        with storage_errors(self.lock_path):
            if not self.lock_path.exists():
                return False
        if free := self._lock_within(0):
            self._lock.release()
        return not free

    def read(self) -> dict[str, Any] | None:
        """Return the record of the process, or None if it does not run.

        Raises:
            ServerError: it runs, but its record is lost.
        """
        if not self.is_running():
            return None
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
            return {"pid": int(record["pid"]), "api_url": str(record["api_url"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self.is_running():  # it has just ended
                return None
            raise ServerError(
                f"a process of cnnpipe holds {self.lock_path}, but {self.record_path.name} beside it does not say "
                "which; end the process by hand (`fuser` or `lsof` on the first file names it)"
            ) from error

    def stop(self, timeout_seconds: float) -> int | None:
        """End the process: ask it first, and after the timeout kill it with its children.

        Returns:
            The pid of the process that was ended, or None if none was running.
        Raises:
            ServerError: it cannot be ended.
        """
        import psutil

        record = self.read()
        if record is None:
            return None
        pid: int = record["pid"]
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(pid)
            process.terminate()
            if not self._lock_within(timeout_seconds):
                for each in (*process.children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
        if not (self._lock.is_locked or self._lock_within(_KILL_SECONDS)):
            raise ServerError(f"process {pid} cannot be ended; `ps -fp {pid}` shows it and its user, who can end it")
        self.record_path.unlink(missing_ok=True)
        self._lock.release()
        return pid

    def _lock_within(self, seconds: float) -> bool:
        """Take the lock; return False if another process holds it all the time."""
        with storage_errors(self.lock_path):
            try:
                self._lock.acquire(timeout=seconds)
            except Timeout:  # inside, because it is an OSError too
                return False
        return True


@dataclass(frozen=True)
class Nightly:
    """State of the nightly schedule.

    Attributes:
        server: its address in a browser; None if it does not run.
        server_pid: its process; None if it does not run, or was not started by this project.
        healthy: whether the server answers.
        schedulers: process of `flows.serve` for each model that this artifacts folder retrains, by the model's name.
        next_runs: time of the next run that the server has scheduled, by name, such as 2026-11-27 02:00 Europe/Berlin.
        last_error: last error in the server's log, with its time where the log has one.
        problem: what the server does if it is not healthy.
    """

    server: str | None
    server_pid: int | None
    healthy: bool
    schedulers: dict[str, int]
    next_runs: dict[str, str]
    last_error: str | None
    problem: str = "does not answer"

    def shown(self) -> dict[str, str]:
        """Return the state as text for a person, by name."""
        process = "" if self.server_pid is None else f"process {self.server_pid}, "
        state = "answers" if self.healthy else self.problem
        running = (f"{name}, process {pid}" for name, pid in self.schedulers.items())
        due = (
            f"{name}, {start}" + ("" if name in self.schedulers else " (its scheduler does not run here)")
            for name, start in self.next_runs.items()
        )
        return {
            "server": "not running" if self.server is None else f"{self.server}, {process}{state}",
            "scheduler": "; ".join(running) or "not running",
            "next run": "; ".join(due) or "none",
            "last error": self.last_error or "none",
        }


def prefect_home(artifacts: Path) -> Path:
    """Return the folder of the server's database, its log and results: `PREFECT_HOME`, or one in the artifacts."""
    configured = os.environ.get("PREFECT_HOME")
    return (expand_path(configured) if configured else artifacts / ".prefect").resolve()


def make_private_folder(home: Path) -> None:
    """Create the folder of a server if it is missing, and let only this user look into it.

    Raises:
        ServerError: another user owns it, who could have put another server there.
        StorageError: it cannot be created.
    """
    make_folder(home)
    with storage_errors(home):
        if (owner := home.stat().st_uid) != os.geteuid():
            raise ServerError(
                f"{home} belongs to user {owner}, and a server is used only by its own user; run as that user, choose "
                "other --artifacts, or set PREFECT_API_URL to use a server of somebody else"
            )
        home.chmod(0o700)


def server_pidfile(home: Path) -> PidFile:
    """Return the record of the server whose folder is `home`."""
    return PidFile(home, "server")


def serve_pidfile(home: Path, name: str) -> PidFile:
    """Return the record of the scheduler, `flows.serve`, of the model `name`."""
    return PidFile(home, f"serve-{name}")


def serve_pidfiles(home: Path) -> dict[str, PidFile]:
    """Return the records of all schedulers that ever ran, by the model's name."""
    stems = sorted(path.stem for path in home.glob("serve[-.]*alive"))  # `serve` is an earlier version's
    return {stem.removeprefix("serve-"): PidFile(home, stem) for stem in stems}


def server_log(home: Path) -> Path:
    """Return the path of the log of the server whose folder is `home`."""
    return home / "server.log"


def look_at_nightly(home: Path) -> Nightly:
    """Return the state of the nightly schedule; a server that does not answer is part of it, not an error.

    Args:
        home: folder of the server, see `prefect_home`.
    Raises:
        ServerError: a process runs, but its record is lost.
    """
    import httpx

    schedulers = {name: record for name, pidfile in serve_pidfiles(home).items() if (record := pidfile.read())}
    server = server_pidfile(home).read()
    api_url = next(iter(schedulers.values()), server or {}).get("api_url")
    healthy, upcoming, problem = False, {}, Nightly.problem
    if api_url is not None:
        try:
            with http_client(api_url, _TIMEOUT_SECONDS) as client:
                healthy, upcoming = True, next_runs(client.request)
        except httpx.HTTPStatusError as error:
            problem = UNAUTHORIZED if error.response.status_code == 401 else one_line(error)
        except (httpx.HTTPError, ValueError):  # no answer, or not that of a Prefect API
            pass
    return Nightly(
        server=None if api_url is None else api_url.removesuffix("/api"),
        server_pid=server["pid"] if server is not None and server["api_url"] == api_url else None,
        healthy=healthy,
        schedulers={name: record["pid"] for name, record in schedulers.items()},
        next_runs=upcoming,
        last_error=next(reversed(logged_errors(server_log(home))), None),
        problem=problem,
    )


def prefect_variables() -> dict[str, str]:
    """Return Prefect's variables that are set in the environment or else in `.env` in the working folder."""
    from dotenv import dotenv_values

    values = {**dotenv_values(".env"), **os.environ}
    return {name: value for name, value in values.items() if name.startswith("PREFECT_") and value}


def auth_string() -> str | None:
    """Return the user and the password for the Prefect server, `user:password`, or None if it needs none.

    Raises:
        UsageError: it is not user:password, or has characters that the server cannot compare.
    """
    variables = prefect_variables()
    found = variables.get("PREFECT_API_AUTH_STRING") or variables.get("PREFECT_SERVER_API_AUTH_STRING")
    if found and not (":" in found and found.isascii()):
        raise UsageError("PREFECT_API_AUTH_STRING must be user:password, in ASCII; received something else")
    return found


def http_client(api_url: str, timeout_seconds: float) -> httpx.Client:
    """Return a client for a Prefect API that logs in, and asks no proxy about this machine.

    Raises:
        httpx.InvalidURL: it is not an address.
        UsageError: the user and the password are not valid, see `auth_string`.
    """
    import httpx

    local = httpx.URL(api_url).host in ("127.0.0.1", "localhost")
    user, colon, password = (auth_string() or "").partition(":")
    auth = (user, password) if colon else None
    return httpx.Client(base_url=api_url, timeout=timeout_seconds, trust_env=not local, auth=auth)


def next_runs(request: Callable[..., Any]) -> dict[str, str]:
    """Return when the server has scheduled the next run of each deployment `retrain/<name>-nightly`.

    Args:
        request: the method `request` of an httpx client, or of a client of Prefect, for the API of the server.
    Returns:
        A time in the timezone of the schedule, such as 2026-11-27 02:00 Europe/Berlin, by name.
    Raises:
        httpx.HTTPError: the server does not answer, or refuses.
    """

    def ask(path: str, **body: Any) -> Any:
        return request("POST", path, json=body).raise_for_status().json()

    found = {}
    for deployment in ask("/deployments/filter", flows={"name": {"any_": ["retrain"]}}, sort="NAME_ASC"):
        due = {"after_": datetime.now(UTC).isoformat()}
        scheduled = {"state": {"type": {"any_": ["SCHEDULED"]}}, "next_scheduled_start_time": due}
        filters = {"flow_runs": scheduled, "deployments": {"id": {"any_": [deployment["id"]]}}}
        runs = ask("/flow_runs/filter", **filters, sort="NEXT_SCHEDULED_START_TIME_ASC", limit=1)
        if runs and deployment["name"].endswith("-nightly"):
            timezones = (each["schedule"].get("timezone") for each in deployment["schedules"])
            timezone = next(filter(None, timezones), "UTC")
            start = datetime.fromisoformat(runs[0]["next_scheduled_start_time"]).astimezone(ZoneInfo(timezone))
            found[deployment["name"].removesuffix("-nightly")] = f"{start:%Y-%m-%d %H:%M} {timezone}"
    return found


def logged_errors(log: Path) -> list[str]:
    """Return each error and each traceback in the log of a server as one line, with its time where the log has one."""
    found: list[list[str]] = []
    is_error = in_traceback = False
    record = ""  # the line before, if it was a record
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        if match := _RECORD.match(line):
            record = f"{match[1]} {match[3]}"
            is_error, in_traceback = match[2] in ("ERROR", "CRITICAL"), False
            found += [[record]] if is_error else []
            continue
        if line.removeprefix("ERROR:    ").startswith("Traceback (most recent call last)"):  # uvicorn's have the prefix
            found += [] if is_error else [[record or "Traceback"]]
            is_error = in_traceback = True
        elif in_traceback and line[:1].strip():  # the exception; the last of a chain replaces the others
            found[-1][1:] = [line]
            in_traceback = False
        record = ""
    return [": ".join(each) for each in found]
