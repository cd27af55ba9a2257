"""Progress of long work: the callback that every stage reports to."""

from __future__ import annotations

import threading
from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""`(label, done, total)`. The label is `stage` or `stage: detail`. Counts are images, bytes for the stage `download`;
the total is 0 while it is not known."""


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
