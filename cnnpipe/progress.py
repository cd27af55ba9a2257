"""Progress of long work: the callback that every stage reports to, and what shows it as a bar or a line of text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

ProgressCallback = Callable[[str, int, int], None]
"""`(label, done, total)`. The label is `stage` or `stage: detail`. Counts are images, bytes for the stage `download`;
the total is 0 while it is not known."""

_SECONDS_OF_RATE: Final = 120.0


class FilesShown:
    """Reports how many files are classified and, once they are counted, of how many.

    Args:
        progress: callback to report to.
        count: returns the number of all files; called in a thread of its own.
        done: files that were finished before.
        failed: how many of those failed.
    """

    def __init__(self, progress: ProgressCallback, count: Callable[[], int], done: int, failed: int) -> None:
        self._progress = progress
        self._done = self._failed = self._total = 0
        self.add(done, failed)
        threading.Thread(target=self._count, args=(count,), daemon=True).start()  # nobody waits for a daemon

    def _count(self, count: Callable[[], int]) -> None:
        self._total = count()

    def add(self, done: int, failed: int) -> None:
        """Report further finished files."""
        self._done += done
        self._failed += failed
        total = max(self._total, self._done) if self._total else 0
        self._progress(f"classify: {self._failed:,} failed", self._done, total)


def _figures(task: Task) -> list[str]:
    """Return count and total, percentage, and rate over the last two minutes, as far as they are known."""
    scale, unit = (1e-6, "MB") if task.fields["stage"] == "download" else (1.0, "images")
    rate = (task.speed or 0.0) * scale
    return [
        f"{task.completed * scale:,.0f}{f'/{task.total * scale:,.0f}' if task.total else ''} {unit}",
        *([f"{task.percentage:.0f} %"] if task.total else []),
        *([f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s"] if rate else []),
    ]


class _FiguresColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(" ".join(_figures(task)))


class StageProgress(Progress):
    """rich's progress bar for one stage at a time, also as a line of text.

    A new stage, or a count that has become smaller, starts a new bar: rate and total belong to one stage.

    Args:
        console: terminal to draw on; None for the line of text alone.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(
            *(BarColumn(), TextColumn("{task.description}", markup=False), _FiguresColumn(), TimeRemainingColumn()),
            console=console,
            transient=True,
            speed_estimate_period=_SECONDS_OF_RATE,
            get_time=time.monotonic,
            disable=console is None,
        )

    def report(self, label: str, done: int, total: int) -> None:
        """Show the state of a stage; a `ProgressCallback`."""
        stage = label.partition(":")[0]
        for task in self.tasks:  # at most one
            if task.fields["stage"] == stage and done >= task.completed:
                self.update(task.id, description=label, completed=done, total=total or None)
                return
            self.remove_task(task.id)
        self.add_task(label, completed=done, total=total or None, stage=stage)

    def text(self) -> str:
        """Return the state as one line, with what is known of: count, total, percentage, rate, time left."""
        task = self.tasks[0]
        left = [f"{TimeRemainingColumn().render(task)} left"] if task.time_remaining else []
        return f"{task.description}: {', '.join([*_figures(task), *left])}"
