"""The record of a background process, with real processes that end well, badly or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cnnpipe.errors import ServerError
from cnnpipe.pidfile import PidFile


def _hold(pidfile: PidFile, program: str) -> subprocess.Popen[str]:
    """Start a process that holds the record, and wait until it runs."""
    lock = pidfile.acquire()
    assert lock is not None
    command = [sys.executable, "-c", f"{program}; print('ready', flush=True); import time; time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=(lock,), start_new_session=True)
    os.close(lock)
    pidfile.write({"pid": process.pid})
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("program", "ended_by"),
    [("pass", signal.SIGTERM), ("import signal as s; s.signal(s.SIGTERM, s.SIG_IGN)", signal.SIGKILL)],
    ids=["asked", "killed"],
)
def test_stop_ends_a_process_even_one_that_will_not(tmp_path: Path, program: str, ended_by: int) -> None:
    pidfile = PidFile(tmp_path, "toy")
    with _hold(pidfile, program) as process:
        assert pidfile.acquire() is None
        assert pidfile.stop(0.5) == process.pid
        assert process.wait(5) == -ended_by
    assert pidfile.stop(0.5) is None


def test_record_of_a_dead_process_is_never_trusted(tmp_path: Path) -> None:
    pidfile = PidFile(tmp_path, "toy")
    with _hold(pidfile, "pass") as process:
        process.kill()
    pidfile.write({"pid": os.getpid()})  # as if the number had been given to a process that lives
    assert pidfile.read() is None
    assert pidfile.stop(0.5) is None


def test_process_without_its_record_is_an_error_that_names_the_lock(tmp_path: Path) -> None:
    pidfile = PidFile(tmp_path, "toy")
    with _hold(pidfile, "pass") as process:
        pidfile.record_path.unlink()
        with pytest.raises(ServerError, match=r"holds .*toy\.alive, but toy\.json beside it does not tell which"):
            pidfile.read()
        process.kill()
