"""The server: found or started, by real processes with folders and a port of their own; and what is served on it."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest
from servers import assert_quiet, clean_environment, free_port

from cnnpipe.errors import ServerError
from cnnpipe.nightly import logged_errors, server_log
from flows.server import configured_api_url

ROOT: Final = Path(__file__).parents[2]
NIGHTLY: Final = {"deployments": {"name": {"any_": ["nightly"]}}}

NO_DATE: Final = (
    r"[-\d]{10} [:\d]{8} prefect\.server\.services\.scheduler - Error scheduling deployment UUID\('[-\da-f]+'\)\.: "
    r"\S+\.CroniterBadDateError: failed to find next date"
)
"""The error of a server that is given a schedule without a date, as one test does."""

TOY_FLOW: Final = """
import logging, sys
from pathlib import Path
from flows.server import ensure_server

ensure_server(Path(sys.argv[1]))
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from flows.flow_runs import send_library_logs

library = logging.getLogger("cnnpipe.train.fit")

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


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = clean_environment(**variables)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def _server(action: str, artifacts: Path, *options: str, **variables: str) -> dict[str, Any]:
    result = _run("-m", "flows.server", action, "--artifacts", str(artifacts), "--json", *options, **variables)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert (result.returncode == 0) == (answer["status"] == "ok"), result.stderr
    return answer


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
    def data(self) -> Path:
        return self.artifacts.parent / "data"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """One server for the module, started by two processes at once."""
    artifacts = tmp_path_factory.mktemp("server") / "My%20 a?b#c é"  # all that a URL quotes
    port = free_port()
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
        subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        answers = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
        yield Started(artifacts, port, answers)
    finally:
        _run("-m", "flows.server", "stop", "--artifacts", str(artifacts))
    assert_quiet(server_log(artifacts / ".prefect"), NO_DATE)


def test_two_starts_at_once_make_one_server(started: Started) -> None:
    assert sorted(answer["started"] for answer in started.answers) == [False, True]
    assert {answer["api_url"] for answer in started.answers} == {started.api_url}
    assert len({answer["pid"] for answer in started.answers}) == 1


def test_schedule_without_a_date_ends_serve_with_one_line_and_its_error_is_shown(started: Started) -> None:
    impatient = "import flows.serve; flows.serve._SECONDS_TO_SCHEDULE = 8; flows.serve.main()"
    folders = ("--artifacts", str(started.artifacts), "--data", str(started.data))
    result = _run("-c", impatient, "--cron", "0 2 30 2 *", *folders)
    assert result.returncode == 1
    log = re.escape(str(server_log(started.home)))
    assert re.search(
        rf"^error: the server has scheduled no run .* in 8 s; look into its log, {log}, ", result.stderr, re.M
    )
    assert "Traceback" not in result.stderr

    (error,) = logged_errors(server_log(started.home))
    assert re.fullmatch(NO_DATE, error)
    assert _server("status", started.artifacts)["last_error"] == error
    doctor = _run("-m", "cnnpipe.cli", "doctor", "--artifacts", str(started.artifacts))
    assert re.search(rf"^nightly\.last error +{re.escape(error)}$", doctor.stdout, re.MULTILINE)


@dataclass(frozen=True)
class Serving:
    process: subprocess.Popen[bytes]
    printed: Path

    def output(self) -> str:
        return self.printed.read_text()

    def next_run(self) -> str:
        """Return what is printed as the next run, as soon as it is."""
        _wait_for(lambda: "next run:" in self.output(), 60)
        (found,) = re.findall(r"^next run:    (.*)$", self.output(), re.MULTILINE)
        return str(found)


@pytest.fixture(scope="module")
def serving(started: Started, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Start `flows.serve` with a short training every minute; the clock goes on while other tests run."""
    printed = tmp_path_factory.mktemp("serve") / "output"
    command = [sys.executable, "-m", "flows.serve", "digits", "--epochs", "1", "--cron", "* * * * *"]
    folders = ["--artifacts", str(started.artifacts), "--data", str(started.data), "--timezone", "Europe/Rome"]
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [*command, *folders], cwd=ROOT, env=clean_environment(), stdout=output, stderr=subprocess.STDOUT
        )
    yield Serving(process, printed)
    process.terminate()
    process.wait(timeout=60)


def test_serve_offers_both_deployments_and_prints_the_run_that_is_scheduled(started: Started, serving: Serving) -> None:
    announced = serving.next_run()
    introduction = serving.output().partition("\nnext run:")[0].splitlines()
    assert introduction[0].startswith("Prefect UI:  ")
    assert introduction[-1].startswith("Ctrl-C ends the schedule; ")
    assert f"PREFECT_API_URL={started.api_url}" in serving.output()
    paused = {each["name"]: each["paused"] for each in _ask(f"{started.api_url}/deployments/filter", {})}
    assert paused == {"nightly": False, "bulk": False}
    next_runs = [_server("status", started.artifacts)["next_run"]]
    doctor = _run("-m", "cnnpipe.cli", "doctor", "--artifacts", str(started.artifacts), "--json")
    next_runs.append(json.loads(doctor.stdout)["nightly"]["next_run"])
    assert [announced, *next_runs] == sorted([announced, *next_runs])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d Europe/Rome", each) for each in next_runs)


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


def test_server_of_another_project_is_left_alone(started: Started, tmp_path: Path) -> None:
    answer = _server("start", tmp_path / "other", "--port", str(started.port))
    assert answer["error"].startswith(f"port {started.port} on 127.0.0.1 is taken by another program")
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
        by_run = {"any_resource": {"id": [f"prefect.flow-run.{run['id']}"]}}
        events = _ask(f"{started.api_url}/events/filter", {"filter": by_run, "limit": 50})["events"]
        names = [event["event"].removeprefix("prefect.") for event in events]
        return {name: names.count(name) for name in ("flow-run.Completed", "task-run.Completed", "artifact.created")}

    # The server writes events in batches, every five seconds.
    _wait_for(lambda: counted() == {"flow-run.Completed": 1, "task-run.Completed": 3, "artifact.created": 1})


def test_second_serve_is_an_error(started: Started, serving: Serving) -> None:
    serving.next_run()
    second = _run("-m", "flows.serve", "--artifacts", str(started.artifacts))
    assert second.returncode == 1
    assert re.search(rf"process {serving.process.pid} serves these deployments already; end it first: ", second.stderr)


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of a web server that is not Prefect."""
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
        ("127.0.0.1:4200/api", r"is missing an 'http://' or 'https://' protocol"),
    ],
)
def test_configured_server_that_does_not_answer_is_an_error(api_url: str, message: str, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, PREFECT_API_URL=api_url)
    assert answer["kind"] == "ServerError"
    assert re.search(message, answer["error"])
    assert not (tmp_path / ".prefect").exists()


def test_configured_address_without_prefect_is_an_error(web_server: int, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, PREFECT_API_URL=f"http://127.0.0.1:{web_server}")
    assert re.search(r"what answers \(200\) is not a Prefect API; does the address end in /api\?", answer["error"])


def test_taken_port_is_an_error(web_server: int, tmp_path: Path) -> None:
    answer = _server("start", tmp_path, "--port", str(web_server))
    assert re.search(rf"port {web_server} on 127\.0\.0\.1 is taken by another program", answer["error"])


def test_server_that_does_not_come_up_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    home = tmp_path / ".prefect"
    home.mkdir()
    (home / "prefect.db").write_text("this is no database")
    answer = _server("start", tmp_path, "--port", str(free_port()))
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


@pytest.mark.parametrize(
    ("file", "text", "origin"),
    [
        (".env", "PREFECT_API_URL=https://prefect.example/api/", "PREFECT_API_URL in .env"),
        ("prefect.toml", '[api]\nurl = "https://prefect.example/api/"', "the api url in prefect.toml"),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "https://prefect.example/api"', "the api url in pyproject.toml"),
        (
            "home/profiles.toml",
            'active = "team"\n[profiles.team]\nPREFECT_API_URL = "https://prefect.example/api/"\n',
            "PREFECT_API_URL of the Prefect profile 'team'",
        ),
    ],
)
def test_every_place_that_prefect_reads_counts_as_configured(
    file: str, text: str, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", "home")
    (tmp_path / "home").mkdir()
    assert configured_api_url() is None
    (tmp_path / file).write_text(text)
    assert configured_api_url() == ("https://prefect.example/api", origin)
    monkeypatch.setenv("PREFECT_API_URL", "http://here/api")
    assert configured_api_url() == ("http://here/api", "PREFECT_API_URL")


def test_settings_of_prefect_that_cannot_be_read_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "prefect.toml").write_text("api = [")
    with pytest.raises(ServerError, match=r"cannot read Prefect's settings from prefect\.toml: .*; fix that file"):
        configured_api_url()


@pytest.mark.lock
def test_run_comes_due_by_the_clock_and_leaves_its_artifacts(started: Started, serving: Serving) -> None:
    day, minute, timezone = serving.next_run().split()
    due = datetime.fromisoformat(f"{day} {minute}").replace(tzinfo=ZoneInfo(timezone))

    def run() -> dict[str, Any]:
        runs = _ask(f"{started.api_url}/flow_runs/filter", NIGHTLY)
        (found,) = (each for each in runs if datetime.fromisoformat(each["expected_start_time"]) == due)
        return dict(found)

    assert run()["auto_scheduled"] is True
    _wait_for(lambda: run()["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING"), 180)
    assert run()["state_name"] == "Promoted", serving.output()
    of_run = {"flow_runs": {"id": {"any_": [run()["id"]]}}}
    keys = {each["key"] for each in _ask(f"{started.api_url}/artifacts/filter", of_run)}
    assert {"training-report", "confusion-matrix", "metrics", "promotion-decision"} <= keys
    assert (started.artifacts / "digits" / "champion").is_file()
    _wait_for(lambda: "Finished in state Promoted(" in serving.output())


def test_stop_ends_serve_and_the_server(started: Started, serving: Serving) -> None:
    stopped = _server("stop", started.artifacts)["stopped"]
    assert serving.process.wait(timeout=30) == 0
    assert serving.output().endswith("the schedule has ended\n")
    assert "Traceback" not in serving.output()
    assert [line.partition(" (")[0] for line in stopped] == [
        "stopped the scheduler",
        f"stopped the Prefect server at http://127.0.0.1:{started.port}",
    ]
    assert _server("stop", started.artifacts)["stopped"] == []
    status = _server("status", started.artifacts)
    assert (status["server"], status["scheduler_pid"], status["next_run"]) == (None, None, None)
    shown = _run("-m", "cnnpipe.cli", "doctor", "--artifacts", str(started.artifacts))
    assert re.search(r"^nightly\.server +not running$", shown.stdout, re.MULTILINE)
