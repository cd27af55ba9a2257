"""The server: found or started, by real processes with folders and a port of their own; and what is served on it."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from cnnpipe.errors import ServerError
from flows.probe import configured_api_url

ROOT: Final = Path(__file__).parent.parent

TOY_FLOW: Final = """
import logging, sys
from pathlib import Path
from flows.server import ensure_server

ensure_server(Path(sys.argv[1]))
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from flows.logs import send_library_logs

library = logging.getLogger("cnnpipe.training.fit")

@task
def work(number):
    library.info("in task %d", number)

@flow(name="toy")
def toy():
    send_library_logs()
    library.info("in flow")
    for number in range(3):
        work(number)
    create_markdown_artifact("# report", key="toy-report")
    library.info("last words")

toy()
"""


def _environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without any Prefect of the user's, nor of other tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "CNNPIPE"))}
    return {**kept, "HOME": "/nonexistent", **variables}


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = _environment(**variables)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def _server(action: str, artifacts: Path, *options: str, **variables: str) -> dict[str, Any]:
    result = _run("-m", "flows.server", action, "--artifacts", str(artifacts), "--json", *options, **variables)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert (result.returncode == 0) == (answer["status"] == "ok"), result.stderr
    return answer


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@dataclass(frozen=True)
class Started:
    artifacts: Path
    port: int
    answers: list[dict[str, Any]]

    @property
    def home(self) -> Path:
        return self.artifacts / ".prefect"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """One server for the module, started by two processes at once."""
    artifacts, port = tmp_path_factory.mktemp("server") / "My%20 a?b#c é", _free_port()  # all that a URL quotes
    command = [
        sys.executable,
        "-m",
        "flows.server",
        "start",
        "--json",
        "--port",
        str(port),
        "--artifacts",
        str(artifacts),
    ]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        answers = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
        yield Started(artifacts, port, answers)
    finally:
        _run("-m", "flows.server", "stop", "--artifacts", str(artifacts))


def test_two_starts_at_once_make_one_server(started: Started) -> None:
    assert sorted(answer["started"] for answer in started.answers) == [False, True]
    assert {answer["api_url"] for answer in started.answers} == {started.api_url}
    assert len({answer["pid"] for answer in started.answers}) == 1


def test_later_start_uses_the_running_server(started: Started) -> None:
    again = _server("start", started.artifacts)
    assert (again["api_url"], again["started"]) == (started.api_url, False)
    assert _server("status", started.artifacts)["server"]["healthy"] is True


def test_page_asks_the_api_of_its_own_server(started: Started) -> None:
    assert _ask(f"http://127.0.0.1:{started.port}/ui-settings")["api_url"] == started.api_url


def test_server_keeps_everything_in_its_folder_and_sends_no_telemetry(started: Started) -> None:
    settings = _ask(f"{started.api_url}/admin/settings")
    assert settings["home"] == str(started.home)
    assert settings["server"]["analytics_enabled"] is False
    assert (started.home / "prefect.db").is_file()


def test_server_of_another_project_is_used_but_not_stopped(started: Started, tmp_path: Path) -> None:
    answer = _server("start", tmp_path / "other", "--port", str(started.port))
    assert (answer["api_url"], answer["started"], answer["pid"]) == (started.api_url, False, None)
    assert _server("stop", tmp_path / "other")["stopped"] == []
    assert _ask(f"{started.api_url}/health") is True


def test_configured_server_is_used(started: Started, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, PREFECT_API_URL=started.api_url)
    assert (answer["api_url"], answer["started"], answer["pid"]) == (started.api_url, False, None)


def test_own_server_is_known_when_it_is_configured_too(started: Started) -> None:
    answer = _server("start", started.artifacts, PREFECT_API_URL=started.api_url)
    assert answer["pid"] == started.answers[0]["pid"]


def test_flow_run_has_its_logs_events_and_artifacts_and_ends_quietly(started: Started, tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(TOY_FLOW)
    result = _run(str(script), str(started.home), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Error" not in result.stderr

    (run,) = _ask(f"{started.api_url}/flow_runs/filter", {"flows": {"name": {"any_": ["toy"]}}})
    assert run["state_type"] == "COMPLETED"
    of_run = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    assert [each["key"] for each in _ask(f"{started.api_url}/artifacts/filter", of_run)] == ["toy-report"]

    logs = _ask(f"{started.api_url}/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    library = {each["message"]: each["task_run_id"] is not None for each in logs if each["name"].startswith("cnnpipe")}
    assert library == {"in flow": False, "in task 0": True, "in task 1": True, "in task 2": True, "last words": False}

    def counted() -> dict[str, int]:
        events = _ask(f"{started.api_url}/events/filter", {"limit": 50})["events"]
        names = [event["event"].removeprefix("prefect.") for event in events]
        return {name: names.count(name) for name in ("flow-run.Completed", "task-run.Completed", "artifact.created")}

    # The server writes events in batches, every five seconds.
    _wait_for(lambda: counted() == {"flow-run.Completed": 1, "task-run.Completed": 3, "artifact.created": 1})


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of a web server that is no Prefect."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoPrefect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


class _NoPrefect(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>a page</html>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name that the base class gives it)
        pass


@pytest.mark.parametrize(
    ("api_url", "message"),
    [
        ("http://127.0.0.1:1/api", r"no Prefect server at http://127\.0\.0\.1:1/api, which PREFECT_API_URL names: no "),
        ("127.0.0.1:4200/api", r"it must begin with http:// or https://"),
    ],
)
def test_configured_server_that_does_not_answer_is_an_error(api_url: str, message: str, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, PREFECT_API_URL=api_url)
    assert answer["kind"] == "ServerError"
    assert re.search(message, answer["error"])
    assert not (tmp_path / ".prefect").exists()


def test_configured_address_without_prefect_is_an_error(web_server: int, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, PREFECT_API_URL=f"http://127.0.0.1:{web_server}")
    assert re.search(r"it is no Prefect API; does the address end in /api\?", answer["error"])


def test_taken_port_is_an_error(web_server: int, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, "--port", str(web_server))
    assert re.search(rf"port {web_server} on 127\.0\.0\.1 is taken by another program", answer["error"])


def test_server_that_does_not_come_up_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    home = tmp_path / ".prefect"
    home.mkdir()
    (home / "prefect.db").write_text("this is no database")
    answer = _server("start", tmp_path, "--port", str(_free_port()))
    assert re.search(r"did not come up: it ended with status \d+; its log .*server\.log ends with: ", answer["error"])
    assert "\n" not in answer["error"]
    assert _server("status", tmp_path)["server"] is None


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_a_folder_whose_path_is_not_text_is_refused_before_anything_starts(tmp_path: Path) -> None:
    answer = _server("start", Path(os.fsdecode(os.fsencode(tmp_path) + b"/F\xe9")))
    assert "a flow needs a folder whose path is UTF-8, received " in answer["error"]
    assert list(tmp_path.iterdir()) == []


def test_server_module_loads_no_prefect() -> None:
    result = _run("-c", "import sys, flows.server, flows.commands, flows.serve; print('prefect' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_active_profile_counts_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert configured_api_url() is None
    profiles = tmp_path / "profiles.toml"
    profiles.write_text('active = "team"\n[profiles.team]\nPREFECT_API_URL = "https://prefect.example/api/"\n')
    assert configured_api_url() == ("https://prefect.example/api", "PREFECT_API_URL of the Prefect profile 'team'")
    profiles.write_text("active = team")
    with pytest.raises(ServerError, match=r"cannot read Prefect's profiles from .*mend or remove that file"):
        configured_api_url()


def test_serve_offers_both_deployments_until_stop_ends_it_and_the_server(started: Started) -> None:
    command = [sys.executable, "-m", "flows.serve", "--artifacts", str(started.artifacts), "--timezone", "Europe/Rome"]
    with subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as serve:

        def paused() -> dict[str, bool]:
            found = _ask(f"{started.api_url}/deployments/filter", {})
            return {each["name"]: each["paused"] for each in found}

        _wait_for(lambda: paused() == {"nightly": False, "bulk": False}, 60)
        second = _run(*command[1:])
        assert second.returncode == 1
        assert re.search(rf"process {serve.pid} serves these deployments already; end it first: ", second.stderr)

        stopped = _server("stop", started.artifacts)["stopped"]
        output = serve.communicate(timeout=30)[0]
    assert serve.returncode == 0
    assert f"PREFECT_API_URL={started.api_url}" in output
    assert "Traceback" not in output
    assert [line.partition(" (")[0] for line in stopped] == [
        "stopped the scheduler",
        f"stopped the Prefect server at http://127.0.0.1:{started.port}",
    ]
    assert _server("stop", started.artifacts)["stopped"] == []
    assert _server("status", started.artifacts) == {"status": "ok", "server": None, "scheduler_pid": None}
