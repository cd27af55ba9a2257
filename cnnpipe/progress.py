"""Progress of long work: the callback that every stage reports to, and what shows it as a bar or a line of text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
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
        self._total = 0
        self.show(done, failed)
        # A daemon: nobody waits for it if the work is done first.
        threading.Thread(target=self._count, args=(count,), daemon=True).start()

    def _count(self, count: Callable[[], int]) -> None:
        self._total = count()

    def add(self, done: int, failed: int) -> None:
        """Report further finished files."""
        self.show(self._done + done, self._failed + failed)

    def show(self, done: int, failed: int) -> None:
        """Report the number of finished files since the beginning."""
        self._done, self._failed = done, failed
        self._progress(f"classify: {failed:,} failed", done, max(self._total, done) if self._total else 0)


class _CountColumn(ProgressColumn):
    """Number of images that are done, or megabytes of a download, and their total."""

    def render(self, task: Task) -> Text:
        scale, unit = _unit(task)
        total = f"/{task.total * scale:,.0f}" if task.total else ""
        return Text(f"{task.completed * scale:,.0f}{total} {unit}")


class _RateColumn(ProgressColumn):
    """Images or megabytes per second, over the last two minutes."""

    def render(self, task: Task) -> Text:
        scale, unit = _unit(task)
        rate = (task.speed or 0.0) * scale
        return Text(f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s" if rate else "")


def _unit(task: Task) -> tuple[float, str]:
    return (1e-6, "MB") if task.fields["stage"] == "download" else (1.0, "images")


class StageProgress(Progress):
    """rich's progress bar for one stage at a time, also as a line of text.

    A new stage, or a count that has become smaller, starts a new bar: rate and total belong to one stage.

    Args:
        console: terminal to draw on; None for the line of text alone.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._figures = (_CountColumn(), TaskProgressColumn("{task.percentage:.0f} %"), _RateColumn())
        super().__init__(
            *(BarColumn(), TextColumn("{task.description}", markup=False), *self._figures, TimeRemainingColumn()),
            console=console,
            transient=True,
            speed_estimate_period=_SECONDS_OF_RATE,
            get_time=time.monotonic,
            disable=console is None,
        )

    def report(self, label: str, done: int, total: int) -> None:
        """Show the state of a stage; a `ProgressCallback`."""
        stage = label.partition(":")[0]
        task = self.tasks[0] if self.tasks else None
        if task is not None and task.fields["stage"] == stage and done >= task.completed:
            self.update(task.id, description=label, completed=done, total=total or None)
            return
        if task is not None:
            self.remove_task(task.id)
        self.add_task(label, completed=done, total=total or None, stage=stage)

    def text(self) -> str:
        """Return the state as one line, with what is known of: count, total, percentage, rate, time left."""
        task = self.tasks[0]
        figures = [column.render(task).plain for column in self._figures]
        if task.time_remaining:
            figures.append(f"{TimeRemainingColumn().render(task)} left")
        return f"{task.description}: {', '.join(filter(None, figures))}"
