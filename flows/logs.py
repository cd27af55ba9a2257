"""Send what the library logs to the run's log in the Prefect UI."""

from __future__ import annotations

import logging

from prefect.logging.handlers import APILogHandler

__all__ = ["send_library_logs"]


def send_library_logs() -> None:
    """Let records of `cnnpipe.*`, from INFO on, appear in the log of the run that makes them.

    The first line of every flow. Prefect's own setting for it, PREFECT_LOGGING_EXTRA_LOGGERS, would have to be in the
    environment of each worker, and lets only warnings through (Prefect 3.8): the logger keeps the root's level.
    """
    logger = logging.getLogger("cnnpipe")
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
        logger.addHandler(APILogHandler())
