"""The flow `classify`: a folder of images to a table, with the summary in the UI. Loads no TensorFlow."""

from __future__ import annotations

if __name__ == "__main__":
    # The command finds or starts a server first, whose address Prefect reads when it is imported, just below.
    from flows.commands import run_classify

    run_classify()
    raise SystemExit

import logging
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task

from cnnpipe.config import ClassifySettings
from cnnpipe.errors import FailureBudgetError
from cnnpipe.inference.classify import predict_folder
from cnnpipe.inference.summary import check_failure_rate
from flows import reports
from flows.logs import send_library_logs
from flows.progress import progress_artifact
from flows.runs import recorded_run, run_url

__all__ = ["TooManyFailuresError", "classify"]

logger = logging.getLogger(f"cnnpipe.{__name__}")


class TooManyFailuresError(FailureBudgetError):
    """More images failed than allowed.

    Args:
        summary: the content of `summary.json`, as the work is done all the same.
    """

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary

    def __reduce__(self) -> tuple[type[TooManyFailuresError], tuple[str, dict[str, Any]]]:
        # The default rebuilds from `args`, which lack `summary`; Prefect pickles what a run has raised.
        return type(self), (str(self), self.summary)


def _run_name() -> str:
    """Name a run by its folder and the time it was meant to start, such as photos-2026-11-22-0200."""
    settings = ClassifySettings.model_validate(runtime.flow_run.parameters["settings"])
    folder = Path(settings.folder).expanduser().resolve().name or "root"
    return f"{folder}-{runtime.flow_run.scheduled_start_time:%Y-%m-%d-%H%M}"


@flow(name="classify", flow_run_name=_run_name)
def classify(settings: ClassifySettings, artifacts: str = "artifacts") -> dict[str, Any]:
    """Classify every file of a folder with an exported model, one row each.

    Args:
        settings: folder, model, output and the rest.
        artifacts: folder of runs and champions.
    Returns:
        The content of `summary.json`.
    Raises:
        TooManyFailuresError: more images failed than allowed; the table is complete all the same.
    """
    send_library_logs()
    logger.info("this run in the Prefect UI: %s", run_url(runtime.flow_run.id))
    with recorded_run(Path(artifacts)):
        return classify_images(settings, artifacts)


@task(name="classify")
def classify_images(settings: ClassifySettings, artifacts: str) -> dict[str, Any]:
    """Run the engine over the folder and show the summary in the UI."""
    with progress_artifact("classification-progress") as progress:
        summary = predict_folder(settings, Path(artifacts), progress=progress)
    reports.publish_classification(summary)
    try:
        check_failure_rate(summary)
    except FailureBudgetError as error:
        raise TooManyFailuresError(str(error), summary.to_json()) from error
    return summary.to_json()
