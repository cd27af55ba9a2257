"""The nightly schedule from outside: the record of a process, the errors in a log, a server that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import assert_quiet, free_port

from cnnpipe.errors import ServerError
from cnnpipe.nightly import PidFile, logged_errors, look_at_nightly, serve_pidfile, serve_pidfiles, server_pidfile

URL = "http://127.0.0.1:4200/api"

QUIET = """
Check out the dashboard at http://127.0.0.1:4200

INFO:     Started server process [4242]
2026-11-26 07:06:48.104 | INFO    | uvicorn.error - Uvicorn running on http://127.0.0.1:4200
2026-11-26 07:06:49.104 | WARNING | prefect.server - the disk is slow
"""

LOGGED = """\
2026-11-26 07:07:44.115 | ERROR   | prefect.server.services.scheduler - Error scheduling a deployment.
Traceback (most recent call last):
  File "scheduler.py", line 1, in insert
    raise KeyError("id")
KeyError: 'id'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "scheduler.py", line 2, in insert
    await session.execute(statement)
sqlalchemy.exc.InvalidRequestError: bulk statements
(Background on this error at: the handbook)
"""

BARE = """\
Traceback (most recent call last):
  File "server.py", line 1, in <module>
    import nothing
ModuleNotFoundError: No module named 'nothing'
"""


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (QUIET, []),
        (
            QUIET + LOGGED,
            [
                "2026-11-26 07:07:44 prefect.server.services.scheduler - Error scheduling a deployment.: "
                "sqlalchemy.exc.InvalidRequestError: bulk statements"
            ],
        ),
        (f"ERROR:    {BARE}", ["Traceback: ModuleNotFoundError: No module named 'nothing'"]),
        (QUIET + "\n" + BARE, ["Traceback: ModuleNotFoundError: No module named 'nothing'"]),
        (
            QUIET + BARE,
            ["2026-11-26 07:06:49 prefect.server - the disk is slow: ModuleNotFoundError: No module named 'nothing'"],
        ),
        ("07:07:44.115 | CRITICAL | prefect - the end", ["07:07:44 prefect - the end"]),
    ],
    ids=["quiet", "logged", "of uvicorn", "bare", "logged as a warning", "without a date"],
)
def test_errors_in_a_log_are_one_line_each(text: str, errors: list[str], tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(text)
    assert logged_errors(log) == errors
    if errors:
        with pytest.raises(AssertionError):
            assert_quiet(log)


def test_server_that_does_not_answer_is_shown_with_its_last_error(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text(
        "07:07:44.115 | ERROR   | prefect - one\n07:07:45.115 | ERROR   | prefect - two\n"
    )
    url = f"http://127.0.0.1:{free_port()}"
    with _holder(server_pidfile(tmp_path), f"{url}/api") as process:
        assert look_at_nightly(tmp_path).shown() == {
            "server": f"{url}, process {process.pid}, does not answer",
            "scheduler": "not running",
            "next run": "none",
            "last error": "07:07:45 prefect - two",
        }
    assert look_at_nightly(tmp_path).shown()["server"] == "not running"


@contextmanager
def _holder(pidfile: PidFile, url: str = URL, program: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the record, and wait until it runs; kill it with the block."""
    code = (
        f"{program}; import sys, time; from pathlib import Path; from cnnpipe.nightly import PidFile; "
        "pidfile = PidFile(Path(sys.argv[1]), sys.argv[2]); print(pidfile.acquire(), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(pidfile.lock_path.parent), pidfile.lock_path.stem]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            pidfile.write(process.pid, url)
            yield process
        finally:
            process.kill()


def test_a_scheduler_of_each_name_is_shown_and_found_and_the_server_is_none(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    with _holder(server_pidfile(tmp_path), url), _holder(serve_pidfile(tmp_path, "a.b"), url) as one:
        with _holder(serve_pidfile(tmp_path, "c"), url) as two:
            assert look_at_nightly(tmp_path).shown()["scheduler"] == f"a.b, process {one.pid}; c, process {two.pid}"
        assert look_at_nightly(tmp_path).schedulers == {"a.b": one.pid}
        with _holder(PidFile(tmp_path, "serve"), url):  # an earlier version's
            assert list(serve_pidfiles(tmp_path)) == ["serve", "a.b", "c"]


@pytest.mark.parametrize(
    ("program", "ended_by"),
    [("pass", signal.SIGTERM), ("import signal as s; s.signal(s.SIGTERM, s.SIG_IGN)", signal.SIGKILL)],
    ids=["asked", "killed"],
)
def test_stop_ends_a_process_even_one_that_will_not(tmp_path: Path, program: str, ended_by: int) -> None:
    pidfile = PidFile(tmp_path, "toy")
    with _holder(pidfile, program=program) as process:
        assert pidfile.read() == {"pid": process.pid, "api_url": URL}
        assert pidfile.stop(0.5) == process.pid
        assert process.wait(5) == -ended_by
    assert pidfile.stop(0.5) is None


def test_record_of_a_dead_process_is_never_trusted(tmp_path: Path) -> None:
    pidfile = PidFile(tmp_path, "toy")
    with _holder(pidfile) as process:
        process.kill()
    pidfile.write(os.getpid(), URL)  # as if the number had been given to a process that lives
    assert pidfile.read() is None
    assert pidfile.stop(0.5) is None


def test_a_held_lock_file_is_never_replaced_by_another_one(tmp_path: Path) -> None:
    """Deleting the file would let a process that had opened it before hold a lock that nobody sees."""
    pidfile = PidFile(tmp_path, "toy")
    with _holder(pidfile):
        pass
    locked = pidfile.lock_path.stat().st_ino
    with _holder(PidFile(tmp_path, "toy")):
        assert not pidfile.acquire()
        assert pidfile.stop(0.5) is not None
    assert pidfile.lock_path.stat().st_ino == locked


def test_process_without_its_record_is_an_error_that_names_the_lock(tmp_path: Path) -> None:
    pidfile = PidFile(tmp_path, "toy")
    with _holder(pidfile):
        pidfile.record_path.unlink()
        with pytest.raises(ServerError, match=r"holds .*toy\.alive, but toy\.json beside it does not say which"):
            pidfile.read()
