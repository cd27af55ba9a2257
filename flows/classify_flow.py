"""The flow `classify`: a folder of images to a table, with the summary in the UI. Loads no TensorFlow."""

from __future__ import annotations

import logging
from typing import Any

from prefect import flow, runtime, task

from cnnpipe.classify.run import open_classification
from cnnpipe.classify.summary import check_failure_rate
from cnnpipe.errors import FailureBudgetError
from cnnpipe.files import display_path, user_path
from cnnpipe.settings import ClassifySettings
from flows.artifacts import publish_classification
from flows.dask_shards import classify_on_dask
from flows.flow_runs import progress_artifact, run_url, send_library_logs
from flows.runners import Runner, check_runner

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
    folder = display_path(user_path(settings.folder).resolve().name) or "root"
    return f"{folder}-{runtime.flow_run.scheduled_start_time:%Y-%m-%d-%H%M}"


@flow(name="classify", flow_run_name=_run_name)
def classify(
    settings: ClassifySettings, artifacts: str = "artifacts", runner: Runner = "local", scheduler: str | None = None
) -> dict[str, Any]:
    """Classify every file of a folder with an exported model, one row each.

    A run that failed or was killed goes on where it stopped when it is retried.

    Args:
        settings: folder, model, output and the rest.
        artifacts: folder of runs and champions.
        runner: `local`, in the process of the flow run, or `dask`, on the workers of a Dask cluster.
        scheduler: address of the cluster's scheduler, such as tcp://host:8786; default: a cluster on this machine.
    Returns:
        The content of `summary.json`.
    Raises:
        TooManyFailuresError: more images failed than allowed; the table is complete all the same.
    """
    check_runner(runner, scheduler)
    send_library_logs()
    logger.info("this run in the Prefect UI: %s", run_url(runtime.flow_run.id))
    return classify_images(settings, artifacts, runner, scheduler)


@task(name="classify")
def classify_images(
    settings: ClassifySettings, artifacts: str, runner: Runner, scheduler: str | None
) -> dict[str, Any]:
    """Run the engine over the folder, here or in a task for each shard, and show the summary in the UI."""
    with (
        progress_artifact("classification-progress") as progress,
        open_classification(settings, user_path(artifacts)) as classification,
    ):
        if runner == "dask":
            classify_on_dask(classification, scheduler, progress)
        else:
            classification.run(progress)
        summary = classification.finish()
    publish_classification(summary)
    try:
        check_failure_rate(summary)
    except FailureBudgetError as error:
        raise TooManyFailuresError(str(error), summary.to_json()) from error
    return summary.to_json()
