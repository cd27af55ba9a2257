"""The nightly schedule from outside: the errors in a server's log, and a server that does not answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from servers import assert_quiet, free_port

from cnnpipe.nightly import logged_errors, look_at_nightly, server_pidfile

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
        (QUIET + "\n" + BARE, ["Traceback: ModuleNotFoundError: No module named 'nothing'"]),
        (
            QUIET + BARE,
            ["2026-11-26 07:06:49 prefect.server - the disk is slow: ModuleNotFoundError: No module named 'nothing'"],
        ),
        ("07:07:44.115 | CRITICAL | prefect - the end", ["07:07:44 prefect - the end"]),
    ],
    ids=["quiet", "logged", "bare", "logged as a warning", "without a date"],
)
def test_errors_in_a_log_are_one_line_each(text: str, errors: list[str], tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(text)
    assert logged_errors(log) == errors
    if errors:
        with pytest.raises(AssertionError):
            assert_quiet(log)


def test_server_that_does_not_answer_is_told_and_its_last_error_with_it(tmp_path: Path) -> None:
    pidfile = server_pidfile(tmp_path)
    lock = pidfile.acquire()
    assert lock is not None
    port = free_port()
    pidfile.write({"pid": os.getpid(), "api_url": f"http://127.0.0.1:{port}/api"})
    (tmp_path / "server.log").write_text(
        "07:07:44.115 | ERROR   | prefect - one\n07:07:45.115 | ERROR   | prefect - two\n"
    )
    assert look_at_nightly(tmp_path).shown() == {
        "server": f"http://127.0.0.1:{port}, process {os.getpid()}, does not answer",
        "scheduler": "not running",
        "next run": "none",
        "last error": "07:07:45 prefect - two",
    }
    pidfile.release(lock)
    assert look_at_nightly(tmp_path).shown()["server"] == "not running"
