"""Shared by the tests that start a server: a place for it, an environment of its own, and the look into its log."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cnnpipe.nightly import logged_errors

ROOT: Final = Path(__file__).parents[1]
LOGIN: Final = "cnnpipe:pass:word-5702"
AUTH: Final = {"PREFECT_SERVER_API_AUTH_STRING": LOGIN}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without any Prefect of the user's, nor of other tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "CNNPIPE"))}
    return {**kept, "HOME": "/nonexistent", **variables}


def assert_quiet(log: Path, *allowed: str) -> None:
    """Fail if a server has logged an error or a traceback, other than those that match a pattern given."""
    assert log.is_file()
    assert [error for error in logged_errors(log) if not any(re.fullmatch(each, error) for each in allowed)] == []
    if not allowed:  # also what `logged_errors` might not see
        assert not re.search(r"Traceback|ERROR|CRITICAL", log.read_text(encoding="utf-8", errors="replace"))


def _restore_sigint() -> None:
    """Undo what a shell does to the processes it starts in the background: they would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    login = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
    headers = {"Content-Type": "application/json", "Authorization": login}
    request = urllib.request.Request(url, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@dataclass(frozen=True)
class Place:
    """Where commands run: their artifacts, the port of their server, and more of their environment."""

    artifacts: Path
    port: int
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.artifacts / ".prefect"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start Python in a process group of its own, with SIGINT as in the foreground of a terminal."""
        folders = {"CNNPIPE_ARTIFACTS": str(self.artifacts), "CNNPIPE_DATA": str(self.artifacts.parent / "data")}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=clean_environment(**self.variables | folders | variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_restore_sigint,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **variables) as process:
            stdout, stderr = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def server(self, *arguments: str, **variables: str) -> dict[str, Any]:
        """Return the JSON answer of a command of `flows.server`."""
        result = self.run("-m", "flows.server", *arguments, "--json", **variables)
        answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        assert (result.returncode == 0) == (answer["status"] == "ok"), result.stderr
        return answer

    def server_pid(self) -> int:
        return int(json.loads((self.home / "server.json").read_text())["pid"])

    def flow_run(self, address: str) -> dict[str, Any]:
        """Return what the API tells of the run whose address in the UI a command has printed."""
        return dict(ask(f"{self.api_url}/flow_runs/{address.removeprefix(f'{self.url}/runs/flow-run/')}"))
