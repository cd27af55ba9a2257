"""Know for certain whether a background process of ours still runs, and end it.

A pid in a file proves nothing: the process may be gone and its number given to another. So the process also holds
a lock on a second file, which the system takes away the moment it ends, however it ends. No lock, no process.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnnpipe.errors import ServerError
from cnnpipe.storage import make_folder, storage_errors, write_json

__all__ = ["PidFile"]

# A look at the lock holds it for an instant; whoever wants to keep it tries again for this long.
_ACQUIRE_SECONDS = 2.0
_POLL_SECONDS = 0.05


class PidFile:
    """The record of one background process: `<name>.json` tells of it, `<name>.alive` is locked while it lives."""

    def __init__(self, folder: Path, name: str) -> None:
        self.record_path = folder / f"{name}.json"
        self.lock_path = folder / f"{name}.alive"

    def acquire(self) -> int | None:
        """Take the lock and forget the record of an earlier process.

        Returns:
            A file descriptor: the lock lasts until every process that has it open has closed it or ended.
            None if a process holds the lock.
        Raises:
            StorageError: the folder cannot be written.
        """
        make_folder(self.lock_path.parent)
        deadline = time.monotonic() + _ACQUIRE_SECONDS
        with storage_errors(self.lock_path):
            while (descriptor := _lock(self.lock_path, fcntl.LOCK_EX)) is None:
                if time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_SECONDS)
            self.record_path.unlink(missing_ok=True)
        return descriptor

    def write(self, record: dict[str, Any]) -> None:
        """Record the process that has the lock; `record` has its `pid`, and whatever its users need."""
        write_json(self.record_path, record)

    def release(self, descriptor: int) -> None:
        """Forget the record and let go of the lock: the process has done its work."""
        with suppress(OSError):  # the folder may be gone, or the disk read-only by now; the lock goes all the same
            self.record_path.unlink(missing_ok=True)
            self.lock_path.unlink(missing_ok=True)
        os.close(descriptor)

    def read_left(self) -> dict[str, Any] | None:
        """Return the record that a process has left when it was killed.

        Records are written and removed by who holds the lock only: one that is there while nobody holds it was left.

        Returns:
            None if the process runs, or has forgotten its record, or was killed before it had one.
        """
        if not self.lock_path.exists():
            return None
        with storage_errors(self.lock_path):
            descriptor = _lock(self.lock_path, fcntl.LOCK_SH)
        if descriptor is None:
            return None
        try:
            record: dict[str, Any] = json.loads(self.record_path.read_text(encoding="utf-8"))
            return {**record, "pid": int(record["pid"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        finally:
            os.close(descriptor)

    def is_running(self) -> bool:
        """Tell whether the process lives."""
        if not self.lock_path.exists():
            return False
        with storage_errors(self.lock_path):
            descriptor = _lock(self.lock_path, fcntl.LOCK_SH)
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def read(self) -> dict[str, Any] | None:
        """Return the record of the process, or None if it does not run.

        Raises:
            ServerError: it runs, but its record is lost.
        """
        if not self.is_running():
            return None
        try:
            record: dict[str, Any] = json.loads(self.record_path.read_text(encoding="utf-8"))
            return {**record, "pid": int(record["pid"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self.is_running():
                return None
            raise ServerError(
                f"a process of cnnpipe holds {self.lock_path}, but {self.record_path.name} beside it does not tell "
                "which; end the process by hand (`fuser` or `lsof` on the first file names it)"
            ) from error

    def stop(self, timeout_seconds: float) -> int | None:
        """End the process: ask it first, and after the timeout kill it with its children.

        Returns:
            The pid of the process that was ended, or None if none was running.
        Raises:
            ServerError: it cannot be ended.
        """
        record = self.read()
        if record is None:
            return None
        pid: int = record["pid"]
        for signal_number, seconds in ((signal.SIGTERM, timeout_seconds), (signal.SIGKILL, 5.0)):
            try:
                if signal_number == signal.SIGKILL and os.getpgid(pid) == pid:
                    os.killpg(pid, signal_number)
                else:
                    os.kill(pid, signal_number)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                raise ServerError(f"process {pid} belongs to another user; it can only be ended by them") from error
            if self._wait_for_end(seconds):
                self.record_path.unlink(missing_ok=True)
                return pid
        raise ServerError(f"process {pid} does not end, not even when killed; look at it with `ps -p {pid}`")

    def _wait_for_end(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True


def _lock(path: Path, kind: int) -> int | None:
    """Open and lock a file at once or not at all; returns its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
