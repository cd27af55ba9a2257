"""Measure a process from outside: its time, and the memory of it and of all the processes that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cnnpipe.errors import CnnpipeError

__all__ = ["ProcessRun", "run_process"]

_PROC: Final = Path("/proc")
_INTERVAL_SECONDS: Final = 0.05


@dataclass(frozen=True)
class ProcessRun:
    """One process from its start to its end, as seen from outside."""

    report: dict[str, Any]
    """The JSON object on the last line of its standard output."""
    seconds: float
    """Of the whole process, interpreter and imports included."""
    peak_bytes: int
    """Most memory of all its processes at one moment: the sum of their resident set sizes."""
    own_peak_bytes: int
    """Most memory of the process itself."""
    children_peak_bytes: int
    """Most memory of its child processes at one moment, all together."""


def run_process(command: Sequence[str]) -> ProcessRun:
    """Run a command to its end and measure it.

    Memory is sampled every 0.05 s. Pages that processes share count once for each of them, so a program of several
    processes looks larger than it is. The peak of the process itself is the kernel's own count, as of the last sample;
    not `ru_maxrss`, which begins at the size of the process that started it.

    Raises:
        CnnpipeError: the command failed, with the last line that it printed; or this system has no /proc.
    """
    if not (_PROC / "self" / "status").is_file():
        raise CnnpipeError("the benchmarks measure memory in /proc, which this system lacks; run them on Linux")
    with tempfile.TemporaryFile("w+") as messages:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True) as process:
            sampler = _Sampler(process.pid)
            try:
                assert process.stdout is not None
                with sampler:
                    output = process.stdout.read()
                    status = process.wait()
            except BaseException:
                process.kill()
                raise
        seconds = time.perf_counter() - began
        lines = output.splitlines()
        if status or not lines:
            messages.seek(0)
            last = " ".join((messages.read().splitlines() or lines or ["it printed nothing"])[-1].split())
            raise CnnpipeError(f"{' '.join(command)} ended with status {status}: {last}")
    return ProcessRun(
        report=json.loads(lines[-1]),
        seconds=seconds,
        peak_bytes=sampler.peak_bytes,
        own_peak_bytes=sampler.own_peak_bytes,
        children_peak_bytes=sampler.children_peak_bytes,
    )


@dataclass
class _Sampler:
    """Looks at a process and its children every now and then, in a thread, while the block lasts."""

    pid: int
    peak_bytes: int = 0
    own_peak_bytes: int = 0
    children_peak_bytes: int = 0
    _ours: set[int] = field(default_factory=set)
    _others: set[int] = field(default_factory=set)
    """Processes that are none of ours, so that each is looked at once only: sampling must cost nothing."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        self._ours.add(self.pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        own = children = 0
        # In the order of their numbers: a parent comes before the children that it has started since the last look.
        for pid in sorted(int(name) for name in os.listdir(_PROC) if name.isdecimal()):
            if pid in self._others:
                continue
            with suppress(OSError):  # it has just ended
                parent, resident = _read_stat(pid)
                if pid not in self._ours and parent not in self._ours:
                    self._others.add(pid)
                    continue
                self._ours.add(pid)
                own, children = (resident, children) if pid == self.pid else (own, children + resident)
        with suppress(OSError):
            self.own_peak_bytes = max(self.own_peak_bytes, _read_peak(self.pid))
        self.peak_bytes = max(self.peak_bytes, own + children, self.own_peak_bytes)
        self.children_peak_bytes = max(self.children_peak_bytes, children)


def _read_stat(pid: int) -> tuple[int, int]:
    """Return a process's parent and its resident set size in bytes.

    Source: proc_pid_stat(5); the name in parentheses may hold anything, so fields are counted from its end.
    """
    fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _read_peak(pid: int) -> int:
    """Return the largest resident set size that a process has had, in bytes; 0 when it is about to end.

    Source: proc_pid_status(5), VmHWM.
    """
    for line in (_PROC / str(pid) / "status").read_bytes().splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
