"""Progress of a long task: a moving bar in the Prefect UI, and now and then a line in the run's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.artifacts import create_progress_artifact, update_progress_artifact

__all__ = ["progress_artifact"]

logger = logging.getLogger("cnnpipe.progress")

_SECONDS_BETWEEN_UPDATES = 3.0
_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_artifact(key: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a callback `(what, done, total)` that moves a progress artifact of the current run.

    A total of 0 means that it is not known yet. The artifact ends at 100 % when the block ends without an error.

    Args:
        key: of the artifact, lowercase letters, digits and dashes.
        unit: what is counted, such as images.
    """
    artifact = create_progress_artifact(0.0, key=key, description="starting")
    began = updated = logged = time.monotonic()
    last = ""

    def update(what: str, done: int, total: int) -> None:
        nonlocal updated, logged, last
        now = time.monotonic()
        rate = done / max(now - began, 1e-3)
        left = f", {(total - done) / rate:,.0f} s left" if total and rate else ""
        last = f"{what}: {done:,}" + (f" of {total:,}" if total else "") + f" {unit}, {rate:,.0f} {unit}/s"
        if now - updated >= _SECONDS_BETWEEN_UPDATES:
            updated = now
            update_progress_artifact(artifact, 100.0 * done / total if total else 0.0, last + left)
        if now - logged >= _SECONDS_BETWEEN_LINES:
            logged = now
            logger.info("%s%s", last, left)

    yield update
    update_progress_artifact(artifact, 100.0, last or "nothing was to be done")
