"""The server, the commands that run a flow on it, and the schedule: real processes, with one server for all of them.

It demands a password, so that every test shows that what it uses knows it.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from unittest import mock
from zoneinfo import ZoneInfo

import httpx
import psutil
import pytest
from prefect.context import refresh_global_settings_context
from prefect.exceptions import ObjectNotFound
from servers import AUTH, LOGIN, ROOT, Place, ask, assert_quiet, clean_environment, free_port, wait_for

from cnnpipe.errors import ServerError, UsageError
from cnnpipe.nightly import logged_errors, look_at_nightly, server_log, server_pidfile
from flows.commands import _lost_server
from flows.server import Server, _port_of_killed_server, configured_api_url, ensure_server, stop_server

LOCKED: Final = r".* Encountered error during state validation: .*database is locked"
"""Line that a busy server with SQLite logs; the client repeats the request. Source: Prefect's issue 18934."""

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

LATER_STARTS: Final = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from flows.server import ensure_server

home, other = map(Path, sys.argv[1:])
found = ensure_server(home)  # from here on it is configured, too
print(json.dumps([asdict(each) for each in (found, ensure_server(home), ensure_server(other))]))
"""


@pytest.fixture(scope="module")
def starts() -> list[dict[str, Any]]:
    """Answers of the two commands that started the server of `place`."""
    return []


@pytest.fixture(scope="module")
def place(
    request: pytest.FixtureRequest, starts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """One server for the module, started by two processes at once."""
    place = Place(tmp_path_factory.mktemp("server") / "My%20 a?b#c é", free_port(), AUTH)  # all that a URL quotes
    processes = [place.start("-m", "flows.server", "start", "--json", "--port", str(place.port)) for _ in range(2)]
    try:
        starts += [json.loads(process.communicate(timeout=200)[0]) for process in processes]
        yield place
    finally:
        place.run("-m", "flows.server", "stop")
        is_slow = any(item.get_closest_marker("slow") for item in request.session.items)
    assert_quiet(server_log(place.home), NO_DATE, *([LOCKED] if is_slow else []))
    assert [each for each in place.artifacts.rglob("*") if each.is_file() and LOGIN.encode() in each.read_bytes()] == []


@pytest.fixture(autouse=True)
def _login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process into the server, too."""
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", LOGIN)


@pytest.fixture
def _clean_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ, clean_environment(), clear=True):
        yield


def test_two_starts_at_once_make_one_server(place: Place, starts: list[dict[str, Any]]) -> None:
    assert sorted(answer["started"] for answer in starts) == [False, True]
    assert {answer["api_url"] for answer in starts} == {place.api_url}
    assert len({answer["pid"] for answer in starts}) == 1


def test_later_start_uses_the_running_server_configured_or_not(
    place: Place, starts: list[dict[str, Any]], tmp_path: Path
) -> None:
    result = place.run("-c", LATER_STARTS, str(place.home), str(tmp_path / ".prefect"))
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    own = (place.api_url, False, starts[0]["pid"])
    assert [(each["api_url"], each["started"], each["pid"]) for each in answers] == [own, own, (*own[:2], None)]


def test_server_keeps_everything_in_its_folder_and_sends_no_telemetry(place: Place) -> None:
    settings = ask(f"{place.api_url}/admin/settings")
    assert settings["home"] == str(place.home)
    assert settings["server"]["analytics_enabled"] is False
    assert (place.home / "prefect.db").is_file()
    assert ask(f"{place.url}/ui-settings")["api_url"] == "/api", "the page asks its own server"


def test_server_lets_in_only_who_knows_its_password_and_keeps_it_secret(
    place: Place, starts: list[dict[str, Any]]
) -> None:
    wrong = {"PREFECT_API_AUTH_STRING": "cnnpipe:guessed"}
    assert httpx.get(f"{place.api_url}/admin/settings", trust_env=False).status_code == 401
    assert "wants the user and password" in place.run("-m", "flows.server", "status", **wrong).stdout
    assert "wants the user and password" in place.run("-m", "cnnpipe.cli", "doctor", **wrong).stdout
    refused = place.run("-m", "flows.retrain", **wrong)
    (error,) = _errors(refused.stderr)
    assert re.search(r"at http://\S+/api wants the user and password .*; set PREFECT_API_AUTH_STRING=", error)
    assert refused.returncode == 1

    process = psutil.Process(starts[0]["pid"])
    assert LOGIN not in " ".join(process.cmdline())
    assert [each.laddr.ip for each in process.net_connections() if each.status == "LISTEN"] == ["127.0.0.1"]
    assert stat.S_IMODE(place.home.stat().st_mode) == 0o700


def test_server_takes_no_requests_from_pages_of_other_origins(place: Place) -> None:
    asked = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{place.api_url}/flows/", headers=asked, trust_env=False).status_code == 400


@pytest.mark.usefixtures("_clean_environment")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PREFECT_SERVER_API_HOST": "0.0.0.0"}, r"=0\.0\.0\.0 opens the server .*; also set PREFECT_API_AUTH_STRING="),
        (
            {"PREFECT_SERVER_API_HOST": "192.0.2.1", "PREFECT_API_AUTH_STRING": "me:secret"},
            r"must be an IPv4 address of this machine, received 192\.0\.2\.1",
        ),
        ({"PREFECT_SERVER_API_AUTH_STRING": "secret"}, r"PREFECT_API_AUTH_STRING must be user:password, in ASCII; "),
        ({"PREFECT_API_AUTH_STRING": "me:gehëim"}, r"PREFECT_API_AUTH_STRING must be user:password, in ASCII; "),
    ],
)
def test_settings_that_make_no_safe_server_are_an_error(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    os.environ.update(settings)
    with pytest.raises(UsageError, match=message):
        ensure_server(tmp_path)
    assert not server_log(tmp_path).exists()


@pytest.mark.usefixtures("_clean_environment")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_server_in_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(ServerError, match="belongs to user 65534, and a server is used only by its own user; run as"):
        ensure_server(tmp_path)


@pytest.mark.usefixtures("_clean_environment")
def test_server_of_another_project_is_left_alone(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=rf"port {place.port} on 127\.0\.0\.1 is taken by another program"):
        ensure_server(tmp_path, port=place.port)
    assert stop_server(tmp_path) == []
    assert ask(f"{place.api_url}/health") is True


def test_flow_run_has_its_logs_events_and_artifacts_and_ends_quietly(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(TOY_FLOW)
    result = place.run(str(script), str(place.home), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Error" not in result.stderr

    (run,) = ask(f"{place.api_url}/flow_runs/filter", {"flows": {"name": {"any_": ["toy"]}}})
    assert run["state_type"] == "COMPLETED"
    of_run = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    assert [each["key"] for each in ask(f"{place.api_url}/artifacts/filter", of_run)] == ["toy-report"]

    logs = ask(f"{place.api_url}/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    library = {each["message"]: each["task_run_id"] is not None for each in logs if each["name"].startswith("cnnpipe")}
    assert library == {"in flow": False, "in task 0": True, "in task 1": True, "in task 2": True, "last words": False}

    def counted() -> dict[str, int]:
        by_run = {"any_resource": {"id": [f"prefect.flow-run.{run['id']}"]}}
        events = ask(f"{place.api_url}/events/filter", {"filter": by_run, "limit": 50})["events"]
        names = [event["event"].removeprefix("prefect.") for event in events]
        return {name: names.count(name) for name in ("flow-run.Completed", "task-run.Completed", "artifact.created")}

    # The server writes events in batches, every five seconds.
    wait_for(lambda: counted() == {"flow-run.Completed": 1, "task-run.Completed": 3, "artifact.created": 1})


@pytest.fixture(scope="module")
def retrained(place: Place) -> subprocess.CompletedProcess[str]:
    """A retraining of one epoch that made a champion."""
    return place.run("-m", "flows.retrain", "digits", "--epochs", "1")


def _address(stderr: str) -> str:
    (address,) = re.findall(r"^look at this run:   (\S+)$", stderr, re.MULTILINE)
    return str(address)


def _errors(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.lock
def test_retrain_prints_the_run_its_address_and_how_to_stop_the_server(
    place: Place, retrained: subprocess.CompletedProcess[str]
) -> None:
    assert (retrained.returncode, _errors(retrained.stderr)) == (0, [])
    result = dict(line.split(maxsplit=1) for line in retrained.stdout.splitlines())
    assert list(result) == ["state", "run", "accuracy", "promoted", "reason"]
    assert (Path(result["run"]) / "manifest.json").is_file()
    address = _address(retrained.stderr)
    assert place.flow_run(address)["state_name"] == "Promoted"
    (automation,) = ask(f"{place.api_url}/automations/filter", {})
    assert automation["name"] == "cnnpipe: crash runs without a heartbeat"
    assert f"this run in the Prefect UI: {address}\n" in retrained.stderr
    assert re.search(r"^to stop the server: \S+ -m flows\.server stop --artifacts ", retrained.stderr, re.MULTILINE)


def test_a_failing_flow_is_one_line_and_with_json_an_object(place: Place, tmp_path: Path) -> None:
    (tmp_path / "only class").mkdir()
    (tmp_path / "only class" / "image.png").touch()
    result = place.run("-m", "flows.retrain", str(tmp_path), "--json")
    assert result.returncode == 1
    (error,) = _errors(result.stderr)
    assert "need at least two classes" in error
    failure = json.loads(result.stdout)
    assert (failure["status"], failure["kind"]) == ("failed", "DatasetError")
    assert error == f"error: {failure['error']}"
    assert place.flow_run(_address(result.stderr))["state_type"] == "FAILED"


@pytest.mark.lock
@pytest.mark.usefixtures("retrained")
def test_too_many_failures_are_exit_status_3_after_the_result(place: Place, photos: Path, tmp_path: Path) -> None:
    options = ("--output", str(tmp_path / "table.csv"), "--max-failure-rate", "0", "--json")
    result = place.run("-m", "flows.classify", str(photos), *options)
    assert result.returncode == 3
    (error,) = _errors(result.stderr)
    assert error.startswith("error: 1 of 13 files failed")
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert (summary.pop("status"), summary.pop("ui")) == ("too_many_failures", _address(result.stderr))
    assert summary == json.loads((tmp_path / "table.csv.summary.json").read_bytes())
    assert place.flow_run(_address(result.stderr))["state_type"] == "FAILED"


def _hear(process: subprocess.Popen[str], text: str) -> str:
    """Return what a command prints on stderr until a text comes, with that line."""
    assert process.stderr is not None
    heard = ""
    while text not in heard:
        line = process.stderr.readline()
        assert line, heard
        heard += line
    return heard


@pytest.mark.usefixtures("retrained")
def test_a_killed_server_comes_back_during_a_training_which_ctrl_c_ends_with_one_line_and_no_process(
    place: Place,
) -> None:
    with place.start("-m", "flows.retrain", "digits", "--epochs", "100000") as process:
        heard = _hear(process, "epoch 1/")
        os.kill(place.server_pid(), signal.SIGKILL)
        heard += _hear(process, f"starting a Prefect server on port {place.port}")
        (address,) = re.findall(r"this run in the Prefect UI: (\S+)", heard)
        wait_for(lambda: place.server("status")["server"]["healthy"])
        _hear(process, "epoch ")
        assert place.flow_run(address)["state_name"] == "Running"

        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    ended = [line for line in stderr.splitlines() if not line.startswith("epoch ")]
    assert ended == ["interrupted; finished work is kept"]
    assert stdout == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert place.flow_run(address)["state_type"] in ("CRASHED", "CANCELLED")


def test_schedule_without_a_date_ends_serve_with_one_line_and_its_error_is_shown(place: Place) -> None:
    impatient = "import flows.serve as s; s._SECONDS_TO_SCHEDULE = 8; s.run_command(s._serve)"
    result = place.run("-c", impatient, "--name", "often", "--cron", "0 2 30 2 *")
    assert result.returncode == 1
    (error,) = _errors(result.stderr)
    log = re.escape(str(server_log(place.home)))
    assert re.match(rf"error: the server has scheduled no run .* in 8 s; look into its log, {log}, ", error)

    *_, logged = logged_errors(server_log(place.home))
    assert re.fullmatch(NO_DATE, logged)
    assert look_at_nightly(place.home).last_error == logged


@dataclass(frozen=True)
class Serving:
    """A process of `flows.serve` for the digits by another name, with trainings of one epoch, and what it prints."""

    process: subprocess.Popen[bytes]
    printed: Path

    def output(self) -> str:
        return self.printed.read_text()

    def next_run(self) -> str:
        """Return what is printed as the next run, as soon as it is."""
        wait_for(lambda: "next run:" in self.output() or self.process.poll() is not None)
        (found,) = re.findall(r"^next run:    (.*)$", self.output(), re.MULTILINE)
        return str(found)


@contextmanager
def _serving(place: Place, name: str, cron: str, *, program: str = "", **variables: str) -> Iterator[Serving]:
    """Start `flows.serve`, or a program that does; end it with the block."""
    printed = place.artifacts.parent / f"{name}.output"
    command = [sys.executable, *(("-c", program) if program else ("-m", "flows.serve"))]
    settings = ["digits", "--name", name, "--epochs", "1", "--cron", cron, "--timezone", "Europe/Rome"]
    folders = ["--artifacts", str(place.artifacts), "--data", str(place.artifacts.parent / "data")]
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [*command, *settings, *folders],
            cwd=ROOT,
            env=clean_environment(**AUTH, **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Serving(process, printed)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _runs(place: Place, name: str) -> list[dict[str, Any]]:
    """Return all runs of a schedule, the earliest first."""
    own = {"deployments": {"name": {"any_": [f"{name}-nightly"]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return list(ask(f"{place.api_url}/flow_runs/filter", own))


def _order(place: Place, deployment: str, **body: Any) -> dict[str, Any]:
    """Make a deployment of an empty flow on the server, or find it, and return what the server tells of it."""
    flow, name = deployment.split("/")
    flow_id = ask(f"{place.api_url}/flows/", {"name": flow})["id"]
    return dict(ask(f"{place.api_url}/deployments/", {"name": name, "flow_id": flow_id, **body}))


SHORT_SILENCE: Final = """
from datetime import timedelta
import flows.flow_runs
import flows.serve
crash, flows.flow_runs.SILENCE = flows.flow_runs.crash_silent_runs, timedelta(seconds=45)
flows.flow_runs.crash_silent_runs = lambda: crash(flows.flow_runs.SILENCE)
flows.serve.run_command(flows.serve._serve)
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_scheduler_killed_with_its_run_wedges_no_schedule(place: Place, state: str) -> None:
    name, patient = f"killed-{state.lower()}", {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}  # Prefect takes no less

    def states() -> dict[str, str]:
        return {run["id"]: run["state_type"] for run in _runs(place, name)}

    with _serving(place, name, "* * * * *", program=SHORT_SILENCE, **patient) as serving:
        wait_for(lambda: state in states().values(), 120)
        processes = psutil.Process(serving.process.pid).children(recursive=True)
        serving.process.kill()
        for process in processes:
            process.kill()
    (killed,) = (run for run, each in states().items() if each in ("PENDING", "RUNNING"))
    with _serving(place, name, "* * * * *", program=SHORT_SILENCE, **patient):
        wait_for(lambda: states()[killed] == "CRASHED", 150)
        wait_for(lambda: "COMPLETED" in states().values(), 240)
        (crashed,) = (run for run in _runs(place, name) if run["id"] == killed)
        assert re.search("has never started|has sent no heartbeat", crashed["state"]["message"])
    deployment = _runs(place, name)[0]["deployment_id"]
    limits = ask(f"{place.api_url}/v2/concurrency_limits/filter", {"offset": 0})
    (slots,) = (each["active_slots"] for each in limits if each["name"] == f"deployment:{deployment}")
    assert slots == 0


@pytest.mark.slow
def test_only_the_newest_missed_run_is_made_up_for_with_the_settings_of_today(place: Place) -> None:
    name = "missed"
    parameters = {"artifacts": str(place.artifacts)}
    code = {"path": ".", "entrypoint": "flows/retrain_flow.py:retrain"}
    deployment = _order(place, f"retrain/{name}-nightly", parameters=parameters, **code)["id"]
    now = datetime.now(UTC)
    for hours in (24, 72, 48):
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": f"{now - timedelta(hours=hours)}"}}
        body = {"state": state, "tags": ["auto-scheduled"], "parameters": {"artifacts": "/gone"}}
        ask(f"{place.api_url}/deployments/{deployment}/create_flow_run", body)

    with _serving(place, name, "0 0 1 1 *"):
        wait_for(lambda: _runs(place, name)[2]["state_type"] == "COMPLETED", 240)
        *older, newest = _runs(place, name)[:3]
        assert [each["state_name"] for each in older] == ["Cancelled"] * 2
        assert {each["state"]["message"].partition(";")[0] for each in older} == {
            "missed while nothing ran the schedule"
        }
        assert newest["parameters"]["artifacts"] == str(place.artifacts)
        assert len(list((place.artifacts / name / "runs").iterdir())) == 1


CLOCK_AHEAD: Final = """
import os, time
import flows.serve
real = time.time
time.time = lambda: real() + (0 if os.path.exists(os.environ["SET_BACK"]) else 400 * 24 * 3600)
flows.serve.run_command(flows.serve._serve)
"""


@pytest.mark.slow
def test_two_schedulers_start_their_server_again_once_if_it_is_killed_or_the_clock_is_set_back(
    place: Place, tmp_path: Path
) -> None:
    def new_server() -> int:
        """Wait for another process of the server, and return its id."""
        wait_for(lambda: (_server_pid(place) not in (None, server)) and look_at_nightly(place.home).healthy, 120)
        return int(_server_pid(place) or 0)

    set_back = tmp_path / "set back"
    server = _server_pid(place)
    with (
        _serving(place, "clock", "0 0 1 1 *", program=CLOCK_AHEAD, SET_BACK=str(set_back)) as serving,
        _serving(place, "second", "0 0 1 1 *", program=CLOCK_AHEAD, SET_BACK=str(set_back)) as second,
    ):
        announced = serving.next_run()
        second.next_run()
        time.sleep(20)  # it has looked for runs, and knows the time
        set_back.touch()
        server = new_server()
        time.sleep(15)  # longer than between two looks for runs
        assert _server_pid(place) == server
        os.kill(server, signal.SIGKILL)
        server = new_server()
        wait_for(lambda: f"clock, {look_at_nightly(place.home).next_runs.get('clock')}" == announced)
        assert "the clock was set back; the server is started again" in serving.output() + second.output()
        assert f"starting a Prefect server on port {place.port}" in serving.output() + second.output()
        time.sleep(15)
        assert _server_pid(place) == server
    assert serving.process.returncode == 0


def _server_pid(place: Place) -> int | None:
    record = server_pidfile(place.home).read()
    return None if record is None else int(record["pid"])


@pytest.fixture(scope="module")
def serving(place: Place) -> Iterator[Serving]:
    """A training every minute; the clock goes on while other tests run."""
    _order(place, "retrain/nightly", parameters={"artifacts": str(place.artifacts)})  # an earlier version's
    _order(place, "classify/bulk", parameters={"artifacts": str(place.artifacts.parent / "gone")})
    with _serving(place, "often", "* * * * *") as often:
        yield often


def test_serve_offers_its_deployments_and_prints_the_run_that_is_scheduled(place: Place, serving: Serving) -> None:
    announced = serving.next_run()
    introduction = serving.output().partition("\nnext run:")[0].splitlines()
    assert introduction[0].startswith("Prefect UI:  ")
    assert introduction[-1].startswith("Ctrl-C ends the schedule; ")
    assert f"PREFECT_API_URL={place.api_url}" in serving.output()
    deployments = {each["name"]: each for each in ask(f"{place.api_url}/deployments/filter", {})}
    assert {"often-nightly", "bulk"} <= set(deployments)  # slow tests leave others
    assert "nightly" not in deployments
    assert {each["parameters"]["artifacts"] for each in deployments.values()} == {str(place.artifacts)}
    status = place.server("status")
    assert status["server"]["healthy"] is True
    assert status["schedulers"] == {"often": serving.process.pid}
    doctor = json.loads(place.run("-m", "cnnpipe.cli", "doctor", "--json").stdout)["nightly"]
    assert re.fullmatch(NO_DATE, doctor["last_error"])
    next_runs = [announced, f"often, {status['next_runs']['often']}", f"often, {doctor['next_runs']['often']}"]
    assert next_runs == sorted(next_runs)
    assert all(re.fullmatch(r"often, \d{4}-\d\d-\d\d \d\d:\d\d Europe/Rome", each) for each in next_runs)


def test_a_name_is_served_once_and_from_one_folder(place: Place, serving: Serving, tmp_path: Path) -> None:
    serving.next_run()
    second = place.run("-m", "flows.serve", "--name", "often")
    assert second.returncode == 1
    assert _errors(second.stderr) == [
        f"error: process {serving.process.pid} serves retrain/often-nightly already; end it first: "
        f"kill {serving.process.pid}"
    ]
    elsewhere = ("--artifacts", str(tmp_path / "elsewhere"))
    other = place.run("-m", "flows.serve", "--name", "often", *elsewhere, PREFECT_API_URL=place.api_url)
    assert other.returncode == 1
    (error,) = _errors(other.stderr)
    assert f"retrain/often-nightly on the server {place.url} is that of the artifacts folder {place.artifacts}" in error
    assert re.search(rf"PREFECT_API_URL={place.api_url} \S+/prefect deployment delete retrain/often-nightly$", error)
    (deployment,) = ask(f"{place.api_url}/deployments/filter", {"deployments": {"name": {"any_": ["often-nightly"]}}})
    assert deployment["parameters"]["artifacts"] == str(place.artifacts)


def test_a_second_dataset_shares_the_server_and_stopping_it_leaves_the_first_alone(
    place: Place, serving: Serving
) -> None:
    serving.next_run()
    with _serving(place, "yearly", "0 0 1 1 *") as yearly:
        announced = yearly.next_run()
        assert place.server("status")["schedulers"] == {"often": serving.process.pid, "yearly": yearly.process.pid}
    assert yearly.process.returncode == 0
    assert "Traceback" not in yearly.output()
    deployments = ask(f"{place.api_url}/deployments/filter", {})
    paused = {each["name"]: each["paused"] for each in deployments}
    assert paused.keys() >= {"often-nightly", "yearly-nightly", "bulk"}
    assert not any(paused.values())
    shown = look_at_nightly(place.home).shown()
    assert shown["scheduler"] == f"often, process {serving.process.pid}"
    assert shown["next run"].endswith(f"; {announced} (its scheduler does not run here)")


@pytest.mark.lock
def test_run_comes_due_by_the_clock_and_leaves_its_artifacts(place: Place, serving: Serving) -> None:
    _, day, minute, timezone = serving.next_run().split()
    due = datetime.fromisoformat(f"{day} {minute}").replace(tzinfo=ZoneInfo(timezone))

    def run() -> dict[str, Any]:
        runs = _runs(place, "often")
        return next(each for each in runs if datetime.fromisoformat(each["expected_start_time"]) == due)

    assert run()["auto_scheduled"] is True
    wait_for(lambda: run()["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING"), 180)
    assert run()["state_name"] == "Promoted", serving.output()
    of_run = {"flow_runs": {"id": {"any_": [run()["id"]]}}}
    keys = {each["key"] for each in ask(f"{place.api_url}/artifacts/filter", of_run)}
    assert {"training-report", "confusion-matrix", "metrics", "promotion-decision"} <= keys
    assert (place.artifacts / "often" / "champion").is_file()
    wait_for(lambda: "Finished in state Promoted(" in serving.output())


def test_stop_ends_serve_and_the_server(place: Place, serving: Serving) -> None:
    stopped = place.server("stop")["stopped"]
    assert serving.process.wait(timeout=30) == 0
    assert serving.output().endswith("the schedule has ended\n")
    assert "Traceback" not in serving.output()
    assert [line.partition(" (")[0] for line in stopped] == [
        "stopped the scheduler",
        f"stopped the Prefect server at {place.url}",
    ]
    assert stop_server(place.home) == []
    status = place.server("status")
    assert (status["server"], status["schedulers"], status["next_runs"]) == (None, {}, {})


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of a web server that is not Prefect."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoPrefect)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
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


@pytest.mark.usefixtures("_clean_environment")
@pytest.mark.parametrize(
    ("api_url", "message"),
    [
        ("http://127.0.0.1:1/api", r"no Prefect server at http://127\.0\.0\.1:1/api, which PREFECT_API_URL names: no "),
        ("127.0.0.1:4200/api", r"is missing an 'http://' or 'https://' protocol"),
        ("http://127.0.0.1:{port}", r"what answers \(200\) is not a Prefect API; does the address end in /api\?"),
    ],
)
def test_configured_address_without_prefect_is_an_error(
    api_url: str, message: str, web_server: int, tmp_path: Path
) -> None:
    os.environ["PREFECT_API_URL"] = api_url.format(port=web_server)
    with pytest.raises(ServerError, match=message):
        ensure_server(tmp_path / ".prefect")
    assert not (tmp_path / ".prefect").exists()


def test_server_that_does_not_come_up_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "__init__.py").touch()
    (tmp_path / "prefect" / "__main__.py").write_text("raise SystemExit('starting\\n\\nthe database is damaged')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    place = Place(tmp_path / "artifacts", free_port())
    answer = place.server("start", "--port", str(place.port), PYTHONPATH=path)
    log = re.escape(str(server_log(place.home)))
    ending = "starting / the database is damaged"
    assert re.search(rf"did not come up: it ended with status 1; its log {log} ends with: .*{ending}$", answer["error"])
    assert look_at_nightly(place.home).shown()["server"] == "not running"


def test_a_killed_server_is_not_started_again_after_a_stop(tmp_path: Path) -> None:
    port = free_port()
    server_pidfile(tmp_path).write(os.getpid(), f"http://127.0.0.1:{port}/api")
    assert _port_of_killed_server(tmp_path) == port
    assert stop_server(tmp_path) == []
    assert _port_of_killed_server(tmp_path) is None


@pytest.mark.usefixtures("_clean_environment")
@pytest.mark.skipif(sys.platform == "darwin", reason="names are text there")
def test_a_folder_whose_path_is_not_text_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a flow needs a folder whose path is UTF-8, received "):
        ensure_server(Path(os.fsdecode(os.fsencode(tmp_path) + b"/F\xe9")))
    assert list(tmp_path.iterdir()) == []


def test_server_module_loads_no_prefect() -> None:
    code = "import sys, flows.server, flows.commands, flows.serve; print('prefect' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ObjectNotFound(http_exc=ValueError("404")), "does not know this run any more, and this run has ended with it"),
        (httpx.ConnectError("refused"), r"has stopped answering \(refused\), and this run has ended with it"),
    ],
)
def test_a_server_that_is_lost_between_stages_is_one_line_and_not_waited_for_at_the_end(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "6")
    server = Server("http://127.0.0.1:1/api", "http://127.0.0.1:1", started=False, pid=None, how_to_stop="by hand")
    with pytest.raises(ServerError, match=rf"at http://127\.0\.0\.1:1 {message}"), _lost_server(server):
        raise error
    assert os.environ["PREFECT_CLIENT_MAX_RETRIES"] == "0"  # settings of other tests may lie over those of this one
    monkeypatch.undo()
    refresh_global_settings_context()


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
