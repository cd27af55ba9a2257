"""The flow `classify`: a folder of images to a table, with the summary in the UI. Loads no TensorFlow."""

from __future__ import annotations

import logging
from typing import Any

from prefect import State, Task, flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun

from cnnpipe.classify.engine import Rows, StageSeconds
from cnnpipe.classify.run import open_classification
from cnnpipe.classify.summary import check_failure_rate
from cnnpipe.errors import FailureBudgetError, StorageError
from cnnpipe.paths import escape_path, expand_path
from cnnpipe.settings import ClassifySettings
from flows.artifacts import publish_classification
from flows.dask import Runner, check_runner, classify_on_dask, run_shard
from flows.flow_runs import progress_artifact, run_url, send_library_logs

__all__ = ["TooManyFailuresError", "classify", "classify_shard"]

logger = logging.getLogger(f"cnnpipe.{__name__}")


class TooManyFailuresError(FailureBudgetError):
    """More images failed than allowed.

    Args:
        summary: the content of the summary, as the work is done all the same.
    """

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary

    def __reduce__(self) -> tuple[type[TooManyFailuresError], tuple[str, dict[str, Any]]]:
        # The default rebuilds from `args`, which lack `summary`; Prefect pickles what a run has raised.
        return type(self), (str(self), self.summary)


def _run_name() -> str:
    """Name a run by its folder and its scheduled time, such as photos-2026-11-22-0200."""
    settings = ClassifySettings.model_validate(runtime.flow_run.parameters["settings"])
    folder = escape_path(expand_path(settings.folder).resolve().name) or "root"
    return f"{folder}-{runtime.flow_run.scheduled_start_time:%Y-%m-%d-%H%M}"


@flow(name="classify", flow_run_name=_run_name)
def classify(
    settings: ClassifySettings, artifacts: str = "artifacts", runner: Runner = "local", scheduler: str | None = None
) -> dict[str, Any]:
    """Classify every file of a folder with an exported model, one row each.

    A run that failed or was killed resumes where it stopped when it is retried.

    Args:
        settings: folder, model, output and the rest.
        artifacts: folder of runs and champions.
        runner: `local`, in the process of the flow run, or `dask`, on the workers of a Dask cluster.
        scheduler: address of the cluster's scheduler, such as tcp://host:8786; default: a cluster on this machine.
    Returns:
        The content of `<table>.summary.json`.
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
        open_classification(settings, expand_path(artifacts)) as classification,
    ):
        if runner == "dask":
            classify_on_dask(classification, classify_shard, scheduler, progress)
        else:
            classification.run(progress)
        summary = classification.finish()
    publish_classification(summary)
    try:
        check_failure_rate(summary)
    except FailureBudgetError as error:
        raise TooManyFailuresError(str(error), summary.to_json()) from error
    return summary.to_json()


def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether a shard failed for a reason that may pass: a disk or a network."""
    return isinstance(state.data, StorageError)


@task(
    name="classify-shard",
    task_run_name="shard-{number}",
    retries=2,
    retry_delay_seconds=[1, 10],
    retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,  # its key would be computed from thousands of paths
)
def classify_shard(job: str, number: int, files: bytes, previous_sha256: list[str]) -> tuple[Rows, StageSeconds]:
    """Do one shard in the process of a Dask worker, with all of its cores; arguments and result as of `run_shard`."""
    from distributed import get_worker

    send_library_logs()
    return run_shard(job, number, files, previous_sha256, get_worker().state.nthreads)
