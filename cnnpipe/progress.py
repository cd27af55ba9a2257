"""How far a long task is: what it calls, and that as one line of text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["FilesShown", "ProgressCallback", "StageClock", "progress_text", "stage_of"]

ProgressCallback = Callable[[str, int, int], None]
"""(what, done, total): the stage, which ends at a colon if there is one, and what to say of it; images, or bytes of a
download; the same in all, 0 as long as it is not known."""


class FilesShown:
    """Tells how many files are classified, and as soon as they are counted, of how many.

    Args:
        progress: is told.
        count: returns the number of all files; called in a thread of its own.
        done: before.
        failed: among them.
    """

    def __init__(self, progress: ProgressCallback, count: Callable[[], int], done: int, failed: int) -> None:
        self._progress = progress
        self._total = 0
        self.show(done, failed)  # from here on the rate is counted
        # A daemon: nobody waits for it if the work is done first.
        threading.Thread(target=self._count, args=(count,), daemon=True).start()

    def _count(self, count: Callable[[], int]) -> None:
        self._total = count()

    def add(self, done: int, failed: int) -> None:
        """Tell of so many more."""
        self.show(self._done + done, self._failed + failed)

    def show(self, done: int, failed: int) -> None:
        """Tell of so many in all."""
        self._done, self._failed = done, failed
        self._progress(f"classify: {failed:,} failed", done, max(self._total, done) if self._total else 0)


class StageClock:
    """The rate of the stage that a progress callback tells of, since its first call in that stage.

    What was done before that call counts in no rate: of a run that goes on, it was done in another one.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._began = 0.0
        self._before = self._done = 0

    def rate(self, what: str, done: int) -> float:
        """Return images, or bytes of a download, a second; 0 at the first call of a stage.

        Args:
            what: as the callback has it: the stage, which ends at a colon if there is one, and what to say of it.
            done: as the callback has it.
        """
        now = time.monotonic()
        if stage_of(what) != self._stage or done < self._done:  # less than before: the stage has begun again
            self._stage, self._began, self._before = stage_of(what), now, done
        self._done = done
        return (done - self._before) / (now - self._began) if now > self._began else 0.0


def progress_text(what: str, done: int, total: int, rate: float) -> str:
    """Return how far a stage is, as one line: count, rate and, where the total is known, share and time left.

    Args:
        what: the stage, which ends at a colon if there is one, and what there is to say of it.
        done: images, or bytes of a download.
        total: 0 where it is not known.
        rate: of the same a second, as `StageClock` has it; 0 where it is not known.
    """
    unit, scale = ("MB", 1e-6) if stage_of(what) == "download" else ("images", 1.0)
    known = total > 0 and done <= total  # else it was counted too early, and tells nothing
    of, share = (f"/{total * scale:,.0f}", f" ({100 * done // total} %)") if known else ("", "")
    text = f"{what}: {done * scale:,.0f}{of} {unit}{share}"
    if rate:
        rounded = f"{rate * scale:,.0f}" if rate * scale >= 10 else f"{rate * scale:.1f}"
        text += f", {rounded} {unit}/s"
        if known and total > done:
            text += f", {_duration((total - done) / rate)} left"
    return text


def stage_of(what: str) -> str:
    """Return the stage that a callback tells of."""
    return what.partition(":")[0]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
