"""Measure a process from outside: its time, and the memory of it and of all the processes that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from cnnpipe.errors import CnnpipeError

__all__ = ["PeakMemory", "ProcessRun", "run_process"]

_INTERVAL_SECONDS: Final = 0.05


@dataclass
class PeakMemory:
    """The most memory seen in use at one moment, bytes of resident memory."""

    parent: int = 0
    """Memory of the process itself, by the kernel's own count."""
    children: int = 0
    """Memory of all its child processes together."""
    total: int = 0
    """Memory of the process and its children together."""


@dataclass(frozen=True)
class ProcessRun:
    """One process from its start to its end."""

    report: dict[str, Any]
    """The JSON object on the last line of its standard output."""
    seconds: float
    """Seconds of the whole process, interpreter and imports included."""
    peak: PeakMemory


def run_process(command: Sequence[str]) -> ProcessRun:
    """Run a command to its end and measure it.

    Memory is sampled every 0.05 s. Pages that processes share count once for each of them, so a program of several
    processes looks larger than it is.

    Raises:
        CnnpipeError: the command failed, with the last line that it printed; or this system has no /proc.
    """
    if not Path("/proc/self/status").is_file():
        raise CnnpipeError("the benchmarks measure memory in /proc, which this system lacks; run them on Linux")
    with tempfile.TemporaryFile("w+") as messages:
        began = perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True) as process:
            try:
                with _sampled_memory(process.pid) as peak:
                    output, _ = process.communicate()
            except BaseException:
                process.kill()
                raise
        seconds = perf_counter() - began
        lines = output.splitlines()
        if process.returncode or not lines:
            messages.seek(0)
            last = " ".join((messages.read().splitlines() or lines or ["it printed nothing"])[-1].split())
            raise CnnpipeError(f"{' '.join(command)} ended with status {process.returncode}: {last}")
    return ProcessRun(json.loads(lines[-1]), seconds, peak)


@contextmanager
def _sampled_memory(pid: int) -> Iterator[PeakMemory]:
    """Sample the memory of a process and its children in a thread, as long as the block lasts."""
    peak, stopped, ours, others = PeakMemory(), threading.Event(), {pid}, set[int]()

    def sample_until_stopped() -> None:
        while not stopped.wait(_INTERVAL_SECONDS):
            _sample(pid, ours, others, peak)

    thread = threading.Thread(target=sample_until_stopped, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stopped.set()
        thread.join()


def _sample(parent: int, ours: set[int], others: set[int], peak: PeakMemory) -> None:
    """Look at each process of `ours` and at new ones; psutil would look at all on the machine, 10 ms each time."""
    resident: dict[int, int] = {}
    # In the order of their numbers: a parent comes before the children that it has started since the last look.
    for pid in sorted({int(name) for name in os.listdir("/proc") if name.isdecimal()} - others):
        with suppress(OSError):  # it has just ended
            started_by, size = _read_stat(pid)
            if pid in ours or started_by in ours:
                ours.add(pid)
                resident[pid] = size
            else:
                others.add(pid)
    with suppress(OSError):
        peak.parent = max(peak.parent, _read_peak(parent))
    total = sum(resident.values())
    peak.children = max(peak.children, total - resident.get(parent, 0))
    peak.total = max(peak.total, total, peak.parent)


def _read_stat(pid: int) -> tuple[int, int]:
    """Return a process's parent and its resident set size in bytes.

    Source: proc_pid_stat(5); the name in parentheses may hold anything, so fields are counted from its end.
    """
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _read_peak(pid: int) -> int:
    """Return the most resident memory that a process has had, in bytes; 0 when it is about to end.

    `ru_maxrss` would begin at the size of the process that started it.

    Source: proc_pid_status(5), VmHWM.
    """
    for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
