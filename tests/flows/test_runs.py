"""Flow runs that nobody executes any more are closed, and no others; under a real Prefect server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.states import Completed, Pending, Running

from cnnpipe.pidfile import PidFile
from flows.flow_runs import close_dead_runs, recorded_run
from flows.serve import close_left_runs

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


@flow(name="classify")
def left() -> None:
    """A run that is not executed here, only made on the server."""


def create_run(client: SyncPrefectClient, **options: Any) -> UUID:
    return client.create_flow_run(left, state=Running(), **options).id


def state_name(client: SyncPrefectClient, identifier: UUID) -> str | None:
    return client.read_flow_run(identifier).state_name


def write_record(home: Path, identifier: UUID, host: str = "") -> int:
    """Record a run as its process does; returns the lock, which is to be closed."""
    pidfile = PidFile(home / "runs", str(identifier))
    lock = pidfile.acquire()
    assert lock is not None
    pidfile.write({"pid": 1, "host": host or socket.gethostname()})
    return lock


def test_only_runs_whose_process_is_gone_are_closed(client: SyncPrefectClient, tmp_path: Path) -> None:
    alive, killed, elsewhere = (create_run(client) for _ in range(3))
    finished = client.create_flow_run(left, state=Completed()).id
    lock = write_record(tmp_path, alive)
    for identifier in (killed, finished, UUID(int=1)):  # the last is none that this server knows
        os.close(write_record(tmp_path, identifier))
    os.close(write_record(tmp_path, elsewhere, host="another-machine"))

    assert close_dead_runs(tmp_path) == [killed]
    os.close(lock)

    assert [state_name(client, each) for each in (alive, killed, elsewhere, finished)] == [
        "Running",
        "Crashed",
        "Running",
        "Completed",
    ]
    kept = {file.stem for file in (tmp_path / "runs").iterdir()}
    assert kept == {str(alive), str(elsewhere), str(UUID(int=1))}


def test_a_run_is_recorded_only_while_it_is_executed(tmp_path: Path) -> None:
    @flow
    def look() -> list[str]:
        with recorded_run(tmp_path):
            return [file.suffix for file in sorted((tmp_path / ".prefect" / "runs").iterdir())]

    assert look() == [".alive", ".json"]
    assert list((tmp_path / ".prefect" / "runs").iterdir()) == []


def test_artifacts_that_cannot_be_written_do_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "artifacts").touch()

    @flow
    def work() -> str:
        with recorded_run(tmp_path / "artifacts"):
            return "done"

    assert work() == "done"
    assert "no record of this run: cannot write" in caplog.text


def test_a_scheduler_closes_the_left_runs_of_its_own_artifacts_only(client: SyncPrefectClient, tmp_path: Path) -> None:
    deployment = client.create_deployment(client.create_flow(left), "bulk")
    own, other = (
        client.create_flow_run_from_deployment(deployment, parameters={"artifacts": str(artifacts)}, state=Pending()).id
        for artifacts in (tmp_path, tmp_path / "other")
    )
    by_hand = create_run(client, parameters={"artifacts": str(tmp_path)})

    assert close_left_runs(tmp_path, "gone") == 1

    assert [state_name(client, each) for each in (own, other, by_hand)] == ["Crashed", "Pending", "Running"]
