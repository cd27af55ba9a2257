"""The flow `retrain`: prepare -> train -> evaluate -> plot -> export -> promote -> clean, one task for each stage.

A task's result is a path, stored under a key made of its inputs and the flow run: when a failed run is retried, its
finished stages are not repeated. Every task calls one function of cnnpipe and publishes artifacts.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID, TASK_SOURCE
from prefect.client.schemas import State
from prefect.states import Completed

from cnnpipe.paths import escape_path, expand_path
from cnnpipe.registry import champion_run
from cnnpipe.settings import (
    CleanSettings,
    EvaluateSettings,
    ExportSettings,
    PrepareSettings,
    PromoteSettings,
    RetrainSettings,
    TrainSettings,
)
from flows.artifacts import publish_dataset, publish_decision, publish_metrics, publish_plots
from flows.flow_runs import delete_old_runs, progress_artifact, run_url, send_library_logs

__all__ = ["retrain"]

logger = logging.getLogger(f"cnnpipe.{__name__}")

DEFAULTS = RetrainSettings()
_ONCE_A_RUN = INPUTS + TASK_SOURCE + RUN_ID


def _run_name() -> str:
    """Name a run by its dataset and the time it was meant to start, such as digits-2026-11-22-0200."""
    settings = PrepareSettings.model_validate(runtime.flow_run.parameters.get("prepare") or {})
    return f"{settings.resolved_name}-{runtime.flow_run.scheduled_start_time:%Y-%m-%d-%H%M}"


@flow(name="retrain", flow_run_name=_run_name, persist_result=True)
def retrain(
    prepare: PrepareSettings = DEFAULTS.prepare,
    train: TrainSettings = DEFAULTS.train,
    evaluate: EvaluateSettings = DEFAULTS.evaluate,
    export: ExportSettings = DEFAULTS.export,
    promote: PromoteSettings = DEFAULTS.promote,
    clean: CleanSettings = DEFAULTS.clean,
    data: str = "data",
    artifacts: str = "artifacts",
) -> State[dict[str, Any]]:
    """Train a CNN, check it, export it to ONNX, and make it the champion if it passes the gate.

    Args:
        data: folder of raw and prepared datasets.
        artifacts: folder of runs and champions.
    Returns:
        A Completed state named `Promoted` or `NotPromoted`, with the decision as its data.
    """
    send_library_logs()
    logger.info("this run in the Prefect UI: %s", run_url(runtime.flow_run.id))
    settings = RetrainSettings(
        prepare=prepare, train=train, evaluate=evaluate, export=export, promote=promote, clean=clean
    )
    run = None
    try:
        run = train_model(settings, prepare_dataset(prepare, data, artifacts), artifacts)
        evaluate_model(run)
        plot_training(run)
        export_model(run)
        decision = promote_model(run)
    except Exception:  # nights that fail must not fill the disk either
        clean_folders(clean, prepare.resolved_name, run, data, artifacts, return_state=True)
        raise
    cleaned = clean_folders(clean, prepare.resolved_name, run, data, artifacts, return_state=True)
    name = "Promoted" if decision["promoted"] else "NotPromoted"
    message = decision["reason"]
    if not cleaned.is_completed():  # it is red in the UI, and the night ends as it was decided
        message += f"; the stage clean failed: {cleaned.message}"
        logger.warning(message)
    return Completed(name=name, message=message, data={"run": escape_path(run), **decision})


@task(name="prepare", cache_policy=_ONCE_A_RUN, persist_result=True)
def prepare_dataset(prepare: PrepareSettings, data: str, artifacts: str) -> str:
    """Decode the dataset, or find it decoded before; return its folder."""
    from cnnpipe.prepare import dataset

    champion = champion_run(expand_path(artifacts), prepare.resolved_name)
    with progress_artifact("prepare-progress") as progress:
        prepared = dataset.prepare_dataset(
            prepare, expand_path(data), progress=progress, publish=publish_dataset, champion=champion
        )
    return str(prepared.path)


@task(name="train", cache_policy=_ONCE_A_RUN, persist_result=True)
def train_model(settings: RetrainSettings, prepared: str, artifacts: str) -> str:
    """Train a network; return the run folder."""
    from cnnpipe.train.stage import train_run

    with progress_artifact("training-progress") as progress:
        result = train_run(settings, Path(prepared), expand_path(artifacts), progress)
    return str(result.run)


@task(name="evaluate", cache_policy=_ONCE_A_RUN, persist_result=True)
def evaluate_model(run: str) -> float:
    """Score the best weights on the test split; return the accuracy."""
    from cnnpipe.evaluate.evaluation import evaluate_run

    evaluation = evaluate_run(Path(run))
    publish_metrics(evaluation)
    return evaluation.accuracy


@task(name="plot", cache_policy=_ONCE_A_RUN, persist_result=True)
def plot_training(run: str) -> list[str]:
    """Draw the plots and show them in the UI; return their paths."""
    from cnnpipe.plot.plots import plot_run

    plots = plot_run(Path(run))
    publish_plots(Path(run))
    return [str(path) for path in plots]


@task(name="export", cache_policy=_ONCE_A_RUN, persist_result=True)
def export_model(run: str) -> float:
    """Write the ONNX model and compare it with the trained one; return the fraction of equal classes."""
    from cnnpipe.export.onnx import export_run

    return export_run(Path(run)).agreement


@task(name="promote", cache_policy=_ONCE_A_RUN, persist_result=True)
def promote_model(run: str) -> dict[str, Any]:
    """Complete the run, and make it the champion if it passes the gate; return the decision."""
    from cnnpipe.promote.gate import conclude_run

    decision = conclude_run(Path(run))
    publish_decision(Path(run), decision)
    return asdict(decision)


@task(name="clean", cache_policy=NO_CACHE)
def clean_folders(clean: CleanSettings, name: str, run: str | None, data: str, artifacts: str) -> str:
    """Remove what is older than the settings allow, by hand `cnnpipe models prune`; return what was removed."""
    from cnnpipe.clean.retention import clean_up

    folders = expand_path(data), expand_path(artifacts)
    line = clean_up(clean, [name], *folders, run=Path(run) if run else None).line()
    if deleted := delete_old_runs(escape_path(str(folders[1].resolve())), clean.keep_days):
        logger.info("deleted %d flow runs that ended more than %d days ago", deleted, clean.keep_days)
    logger.info(line)
    return line
