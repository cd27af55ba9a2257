"""A flow run is closed if its process is killed, and goes on if its progress cannot be sent; with a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Pending, Running

from flows import flow_runs
from flows.flow_runs import crash_silent_runs, progress_artifact

pytestmark = pytest.mark.usefixtures("prefect_server")

ENDLESS_RUN: Final = """
import time
from prefect import flow, runtime

@flow(name="retrain")
def retrain():
    print(runtime.flow_run.id, flush=True)
    time.sleep(3600)

retrain()
"""


@flow(name="retrain")
def promoted() -> str:
    return "done"


@flow(name="classify")
def classify() -> None:
    pass


@flow(name="somebody else's")
def foreign() -> None:
    pass


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def test_a_run_whose_process_is_killed_crashes_and_no_other_one_does() -> None:
    crash_silent_runs(timedelta(seconds=10))  # Prefect takes no less
    with get_client(sync_client=True) as client:
        pending = client.create_flow_run(classify, state=Pending()).id
        other = client.create_flow_run(foreign, state=Pending()).id
        finished = client.create_flow_run(promoted, state=Pending()).id
        client.set_flow_run_state(finished, Running())
        client.set_flow_run_state(finished, Completed(name="Promoted"))

        def has_heartbeat(run: UUID) -> bool:
            wanted = {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "any_resource": {"id": [f"prefect.flow-run.{run}"]},
            }
            return bool(client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"])

        environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""}
        command = [sys.executable, "-c", ENDLESS_RUN]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            killed = UUID(process.stdout.readline().strip())
            _wait_for(lambda: has_heartbeat(killed))
            assert client.read_flow_run(killed).state_name == "Running"
            process.kill()

        _wait_for(lambda: all(client.read_flow_run(each).state_name == "Crashed" for each in (killed, pending)))
        states = [client.read_flow_run(each).state_name for each in (other, finished)]
        # One that goes on, because it was the server that was away, still ends in its own state.
        client.set_flow_run_state(pending, Completed(name="Promoted"))
        assert client.read_flow_run(pending).state_name == "Promoted"
    assert states == ["Pending", "Promoted"]


def test_progress_that_cannot_be_sent_ends_no_work_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flow_runs, "_SECONDS_BETWEEN_UPDATES", 0.05)
    attempts = threading.Semaphore(0)

    def lose(*_: object) -> None:
        attempts.release()
        raise OSError("no route to the server")

    monkeypatch.setattr(flow_runs, "update_progress_artifact", lose)

    @flow
    def work() -> str:
        with progress_artifact("work-progress") as update:
            for done in range(3):
                update("train", done, 10)
                assert attempts.acquire(timeout=30)
        return "done"

    assert work() == "done"
    assert caplog.text.count("the server does not take the progress of this run: no route to the server") == 1
