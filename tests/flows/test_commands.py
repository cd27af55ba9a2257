"""`python -m flows.retrain` and `python -m flows.classify` as commands, with one server: results, errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import Request, urlopen

import httpx
import pytest
from prefect.exceptions import ObjectNotFound
from servers import assert_quiet, clean_environment, free_port

from cnnpipe.errors import ServerError
from cnnpipe.nightly import server_log
from cnnpipe.prepare.dataset import PreparedDataset
from flows.commands import _lost_server
from flows.server import Server

ROOT: Final = Path(__file__).parents[2]


def _restore_sigint() -> None:
    """Undo what a shell does to the processes it starts in the background: they would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Workplace:
    """Where commands run: their artifacts, their data, and the address of their server."""

    artifacts: Path
    data: Path
    server: str

    @property
    def home(self) -> Path:
        return self.artifacts / ".prefect"

    def start(self, module: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own, with SIGINT as in the foreground of a terminal."""
        folders = {"CNNPIPE_ARTIFACTS": str(self.artifacts), "CNNPIPE_DATA": str(self.data)}
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=clean_environment(**folders, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_restore_sigint,
        )

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self.start(module, *arguments) as process:
            stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def flow_run(self, address: str) -> dict[str, Any]:
        """Return what the API tells of the run whose address in the UI a command has printed."""
        flow_run_id = address.removeprefix(f"{self.server}/runs/flow-run/")
        with urlopen(f"{self.server}/api/flow_runs/{flow_run_id}", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A server for the module, started by the command."""
    folder = tmp_path_factory.mktemp("commands")
    port = free_port()
    workplace = Workplace(folder / "artifacts", folder / "data", f"http://127.0.0.1:{port}")
    started = workplace.run("flows.server", "start", "--port", str(port))
    try:
        assert started.returncode == 0, started.stderr
        yield workplace
    finally:
        workplace.run("flows.server", "stop")
    assert_quiet(server_log(workplace.home))


@pytest.fixture(scope="module")
def retrained(place: Workplace) -> subprocess.CompletedProcess[str]:
    """A retraining of one epoch that made a champion."""
    return place.run("flows.retrain", "digits", "--epochs", "1")


def _address(stderr: str) -> str:
    (address,) = re.findall(r"^look at this run:   (\S+)$", stderr, re.MULTILINE)
    assert isinstance(address, str)
    return address


def _errors(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.lock
def test_retrain_prints_the_run_its_address_and_how_to_stop_the_server(
    place: Workplace, retrained: subprocess.CompletedProcess[str]
) -> None:
    assert (retrained.returncode, _errors(retrained.stderr)) == (0, [])
    result = dict(line.split(maxsplit=1) for line in retrained.stdout.splitlines())
    assert list(result) == ["run", "accuracy", "promoted", "reason"]
    assert (Path(result["run"]) / "manifest.json").is_file()
    address = _address(retrained.stderr)
    assert place.flow_run(address)["state_name"] == "Promoted"
    request = Request(f"{place.server}/api/automations/filter", b"{}", {"Content-Type": "application/json"})
    with urlopen(request, timeout=10) as response:
        (automation,) = json.load(response)
    assert automation["name"] == "cnnpipe: crash runs without a heartbeat"
    assert f"this run in the Prefect UI: {address}\n" in retrained.stderr
    assert re.search(r"^to stop the server: \S+ -m flows\.server stop --artifacts ", retrained.stderr, re.MULTILINE)


def test_a_failing_flow_is_one_line_and_with_json_an_object(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "only class").mkdir()
    (tmp_path / "only class" / "image.png").touch()
    result = place.run("flows.retrain", str(tmp_path), "--json")
    assert result.returncode == 1
    (error,) = _errors(result.stderr)
    assert "need at least two classes" in error
    failure = json.loads(result.stdout)
    assert (failure["status"], failure["kind"]) == ("failed", "DatasetError")
    assert error == f"error: {failure['error']}"
    assert place.flow_run(_address(result.stderr))["state_type"] == "FAILED"


@pytest.mark.lock
@pytest.mark.usefixtures("retrained")
def test_too_many_failures_are_exit_status_3_after_the_result(place: Workplace, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    result = place.run("flows.classify", str(photos), "--output", str(table), "--max-failure-rate", "0")
    assert result.returncode == 3
    (error,) = _errors(result.stderr)
    assert error.startswith("error: 1 of 13 files failed")
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert (shown["table"], shown["found"], shown["error"]) == (str(table), "13", "1")
    assert place.flow_run(_address(result.stderr))["state_type"] == "FAILED"


@pytest.mark.usefixtures("retrained")
def test_too_many_failures_as_json_have_the_whole_summary(place: Workplace, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    options = ("--output", str(table), "--max-failure-rate", "0", "--json")
    result = place.run("flows.classify", str(photos), *options)
    assert result.returncode == 3
    summary = json.loads(result.stdout.splitlines()[0])
    assert (summary.pop("status"), summary.pop("ui")) == ("too_many_failures", _address(result.stderr))
    assert summary == json.loads((tmp_path / "table.csv.summary.json").read_bytes())


def _hear(process: subprocess.Popen[str], text: str) -> str:
    """Return what a command prints on stderr until a text comes, with that line."""
    assert process.stderr is not None
    heard = ""
    while text not in heard:
        line = process.stderr.readline()
        assert line, heard
        heard += line
    return heard


def test_a_training_goes_on_without_its_server_until_ctrl_c_which_is_one_line_and_leaves_no_process(
    place: Workplace, digits: PreparedDataset
) -> None:
    impatient = {"PREFECT_CLIENT_MAX_RETRIES": "0"}  # else Prefect would wait for the server for a minute
    with place.start("flows.retrain", "digits", "--epochs", "100000", **impatient) as process:
        heard = _hear(process, "epoch 1/")
        os.kill(json.loads((place.home / "server.json").read_text())["pid"], signal.SIGKILL)
        heard += _hear(process, "the server does not take the progress of this run: ")
        restarted = place.run("flows.server", "start", "--port", place.server.rpartition(":")[2])
        assert restarted.returncode == 0, restarted.stderr
        (address,) = re.findall(r"this run in the Prefect UI: (\S+)", heard)
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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ObjectNotFound(http_exc=ValueError("404")), "does not know this run any more, and this run has ended with it"),
        (httpx.ConnectError("refused"), r"has stopped answering \(refused\), and this run has ended with it"),
    ],
)
def test_a_server_that_is_lost_between_stages_is_one_line(error: Exception, message: str) -> None:
    server = Server("http://127.0.0.1:1/api", "http://127.0.0.1:1", started=False, pid=None, how_to_stop="by hand")
    with pytest.raises(ServerError, match=rf"at http://127\.0\.0\.1:1 {message}"), _lost_server(server):
        raise error
