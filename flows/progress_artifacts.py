"""Progress of a long task: a moving bar in the Prefect UI, and now and then a line in the run's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from cnnpipe.progress import ProgressCallback, StageProgress

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["progress_artifact"]

logger = logging.getLogger("cnnpipe.progress")

_SECONDS_BETWEEN_UPDATES = 3.0
_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_artifact(key: str) -> Iterator[ProgressCallback]:
    """Give a callback `(what, done, total)` that moves a progress artifact of the current run.

    A total of 0 means that it is not known yet. The artifact ends at 100 % when the block ends without an error.

    Args:
        key: of the artifact, lowercase letters, digits and dashes.
    """
    artifact = cast("UUID", create_progress_artifact(0.0, key=key, description="starting"))
    stages = StageProgress()
    updated = logged = time.monotonic()
    last = ""

    def update(what: str, done: int, total: int) -> None:
        nonlocal updated, logged, last
        now = time.monotonic()
        stages.report(what, done, total)
        last = stages.text()
        if now - updated >= _SECONDS_BETWEEN_UPDATES:
            updated = now
            update_progress_artifact(artifact, 100.0 * min(done / total, 1.0) if total else 0.0, last)
        if now - logged >= _SECONDS_BETWEEN_LINES:
            logged = now
            logger.info(last)

    yield update
    update_progress_artifact(artifact, 100.0, last or "nothing was to be done")
