"""Shared by the tests that start a server: a port, an environment of its own, and the look into its log."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from cnnpipe.nightly import logged_errors


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without any Prefect of the user's, nor of other tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "CNNPIPE"))}
    return {**kept, "HOME": "/nonexistent", **variables}


def assert_quiet(log: Path, *allowed: str) -> None:
    """Fail if a server has logged an error or a traceback, other than those that match a pattern given."""
    assert log.is_file()
    assert [error for error in logged_errors(log) if not any(re.fullmatch(each, error) for each in allowed)] == []
    if not allowed:  # also what `logged_errors` might not see
        assert not re.search(r"Traceback|ERROR|CRITICAL", log.read_text(encoding="utf-8", errors="replace"))
