"""Faults of the server while a training goes on: the run ends well or in one line, and the next one works."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import pytest
from servers import Place, ask, assert_quiet, free_port, wait_for

from cnnpipe.nightly import server_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_POSTGRES: Final = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name), default=None)
_AS_NOBODY: Final = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A server with an empty database."""
    place = Place(tmp_path / "artifacts", free_port())
    assert place.server("start", "--port", str(place.port))["started"]
    yield place
    place.run("-m", "flows.server", "stop")


class Training:
    """A retraining of digits by the command a user types, in its first epoch."""

    def __init__(self, place: Place, epochs: int = 10, **variables: str) -> None:
        self.process = place.start("-m", "flows.retrain", "digits", "--epochs", str(epochs), "--json", **variables)
        self.heard = ""
        self.hear(f"epoch 1/{epochs}")

    def hear(self, text: str) -> str:
        """Wait until the command has printed a text on stderr, and return all that it has printed there."""
        assert self.process.stderr is not None
        while text not in self.heard:
            line = self.process.stderr.readline()
            assert line, self.heard
            self.heard += line
        return self.heard

    def end(self) -> dict[str, object]:
        """Return the JSON result of the command, whose exit status must agree with it."""
        stdout, stderr = self.process.communicate(timeout=600)
        self.heard += stderr
        result = dict(json.loads(stdout.splitlines()[-1]))
        assert (self.process.returncode == 0) == (result["status"] == "ok"), self.heard
        assert "Traceback" not in self.heard
        return result


def _states(place: Place) -> list[str]:
    return [each["state_name"] for each in ask(f"{place.api_url}/flow_runs/filter", {"sort": "START_TIME_ASC"})]


def _assert_next_run_works(place: Place) -> None:
    """Run once more and check that the server's database is whole."""
    result = place.run("-m", "flows.retrain", "digits", "--epochs", "1", "--json")
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    with closing(sqlite3.connect(place.home / "prefect.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_killed_server_comes_back_by_itself_and_the_run_ends_as_promoted(place: Place) -> None:
    training, killed = Training(place), place.server_pid()
    os.kill(killed, signal.SIGKILL)
    assert training.end()["promoted"] is True
    assert place.server_pid() != killed
    assert _states(place) == ["Promoted"]
    _assert_next_run_works(place)


def test_server_killed_while_idle_is_started_at_the_same_address_by_the_next_command(place: Place) -> None:
    os.kill(place.server_pid(), signal.SIGKILL)
    wait_for(lambda: place.server("status")["server"] is None)
    _assert_next_run_works(place)
    assert _states(place) == ["Promoted"]


def test_server_that_hangs_for_20_seconds_delays_a_run_at_most(place: Place) -> None:
    training, server = Training(place), place.server_pid()
    os.kill(server, signal.SIGSTOP)
    try:
        assert "does not answer" in place.run("-m", "flows.server", "status").stdout
        time.sleep(20)
    finally:
        os.kill(server, signal.SIGCONT)
    assert training.end()["promoted"] is True
    assert _states(place) == ["Promoted"]
    _assert_next_run_works(place)


def test_database_that_is_locked_for_a_minute_delays_a_run_at_most(place: Place) -> None:
    training = Training(place, epochs=3)
    with closing(sqlite3.connect(place.home / "prefect.db", timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(60)
        database.execute("ROLLBACK")
    assert training.end()["promoted"] is True
    assert _states(place) == ["Promoted"]
    _assert_next_run_works(place)


def test_server_that_is_away_for_longer_than_a_request_waits_is_waited_for_by_the_stage(place: Place) -> None:
    training = Training(place, PREFECT_CLIENT_MAX_RETRIES="1")
    place.server("stop")
    heard = training.hear("evaluate failed with an error that may pass, and is tried again: ConnectError")
    assert "the server does not take the progress of this run" in heard
    place.server("start", "--port", str(place.port))
    assert training.end()["promoted"] is True
    assert _states(place) == ["Promoted"]


def test_server_that_cannot_come_back_ends_the_run_with_one_line_and_the_next_run_works(place: Place) -> None:
    place.run("-m", "flows.retrain", "digits", "--epochs", "1")
    champion = (place.artifacts / "digits" / "champion").read_text()
    training = Training(place, epochs=3, PREFECT_CLIENT_MAX_RETRIES="1")
    place.server("stop")  # on purpose: nobody starts it again
    result = training.end()
    assert re.search(r"has stopped answering .*; finished work is kept; run the command again", str(result["error"]))
    assert (place.artifacts / "digits" / "champion").read_text() == champion
    _assert_next_run_works(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_full_disk_of_the_server_ends_in_one_line_and_the_next_run_works_with_space(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount a disk")
    place = Place(tmp_path / "artifacts", free_port(), {"PREFECT_HOME": str(disk)})
    try:
        place.run("-m", "flows.retrain", "digits", "--epochs", "1")
        champion = (place.artifacts / "digits" / "champion").read_text()
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        with place.start("-m", "flows.retrain", "digits", "--epochs", "2", PREFECT_CLIENT_MAX_RETRIES="1") as process:
            _, stderr = process.communicate(timeout=850)  # stages are tried again for minutes
        assert "Traceback" not in stderr
        assert process.returncode == 1
        assert len([line for line in stderr.splitlines() if line.startswith("error: ")]) == 1
        assert (place.artifacts / "digits" / "champion").read_text() == champion

        (disk / "ballast").unlink()
        again = place.run("-m", "flows.retrain", "digits", "--epochs", "2")
        assert again.returncode == 0, again.stderr
    finally:
        place.run("-m", "flows.server", "stop")
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL server on a socket."""
    if _POSTGRES is None:
        pytest.skip("no PostgreSQL here; install it (Debian, Ubuntu: apt-get install postgresql)")
    folder = Path("/tmp") / f"cnnpipe-postgres-{os.getpid()}"
    folder.mkdir(mode=0o700)
    if _AS_NOBODY:
        os.chown(folder, 65534, 65534)

    def call(program: str, *arguments: str) -> None:
        command = [*_AS_NOBODY, str(_POSTGRES / program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)

    try:
        call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "cnnpipe", "-E", "UTF8", "--no-sync", "--no-locale")
        options = f"-c listen_addresses= -c fsync=off -k {folder}"
        call("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", "-o", options, "start")
        call("createdb", "-h", str(folder), "-U", "cnnpipe", "prefect")
        yield f"postgresql+asyncpg://cnnpipe@/prefect?host={folder}"
    finally:
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def test_retrain_and_schedule_work_with_postgresql_instead_of_sqlite(postgres: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "artifacts", free_port(), {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres})
    try:
        assert place.server("start", "--port", str(place.port))["started"]
        retrained = place.run("-m", "flows.retrain", "digits", "--epochs", "1")
        assert retrained.returncode == 0, retrained.stderr
        options = ("--cron", "* * * * *", "--timezone", "UTC", "--epochs", "1")
        with place.start("-m", "flows.serve", "digits", *options) as serving:
            query = {"flow_runs": {"start_time": {"is_null_": False}}, "sort": "START_TIME_ASC"}

            def ended() -> list[tuple[bool, str]]:
                runs = ask(f"{place.api_url}/flow_runs/filter", query)
                return [(each["auto_scheduled"], each["state_type"]) for each in runs]

            wait_for(lambda: (True, "COMPLETED") in ended(), 300)
            serving.terminate()
            serving.communicate(timeout=100)
        assert ended()[0] == (False, "COMPLETED")
        assert not (place.home / "prefect.db").exists()
    finally:
        place.run("-m", "flows.server", "stop")
    assert_quiet(server_log(place.home))
