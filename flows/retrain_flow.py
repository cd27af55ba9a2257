"""The flow `retrain`: prepare -> train -> evaluate -> plot -> export -> promote -> clean, one task for each stage.

A task's result is a path, stored under a key made of its inputs and the flow run: when a failed run is retried, or a
suspended one resumed, its finished stages are not repeated. Every task calls one function of cnnpipe and publishes
artifacts.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import prefect.flow_engine
from prefect import Task, flow, runtime, task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID, TASK_SOURCE
from prefect.client.schemas import State, TaskRun
from prefect.concurrency._leases import maintain_concurrency_lease
from prefect.states import Completed

from cnnpipe.errors import CnnpipeError, one_line
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
from flows.flow_runs import (
    delete_old_runs,
    progress_artifact,
    run_url,
    send_library_logs,
    training_slot,
    wait_for_approval,
    wait_for_turn,
)

__all__ = ["retrain"]

logger = logging.getLogger(f"cnnpipe.{__name__}")

DEFAULTS = RetrainSettings()

# Prefect's engine would end a run of a deployment when a server that was away has taken its slot back.
vars(prefect.flow_engine)["maintain_concurrency_lease"] = lambda lease, seconds, **_: maintain_concurrency_lease(
    lease, seconds
)

_LASTING_ERRORS: Final = (CnnpipeError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors that a repetition would meet again; others, such as a lost server or too little memory, may pass."""


def _may_pass(stage: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    if isinstance(error, _LASTING_ERRORS):
        return False
    logger.warning("%s failed with an error that may pass, and is tried again: %s", stage.name, one_line(repr(error)))
    return True


_STAGE: Final[dict[str, Any]] = {
    "cache_policy": INPUTS + TASK_SOURCE + RUN_ID,
    "persist_result": True,
    # With three times 126 s of the client's own, see flows.server, a server may be away for ten minutes.
    "retries": 2,
    "retry_delay_seconds": [60, 300],
    "retry_condition_fn": _may_pass,
}


_PAST: Final = {
    "Promoted": "was promoted",
    "NotPromoted": "was refused",
    "Unchanged": "equals the champion",
    "AwaitingApproval": "awaits approval",
}


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
    force: bool = False,
    data: str = "data",
    artifacts: str = "artifacts",
) -> State[dict[str, Any]]:
    """Train a CNN, check it, export it to ONNX, and make it the champion if it passes the gate.

    Args:
        force: train even if neither the images nor the settings have changed since the newest run.
        data: folder of raw and prepared datasets.
        artifacts: folder of runs and champions.
    Returns:
        A Completed state named `Promoted`, `NotPromoted`, `Unchanged` or, without a deployment, `AwaitingApproval`,
        with the decision as its data. A deployment's run is suspended while it awaits approval.
    """
    send_library_logs()
    logger.info("this run in the Prefect UI: %s", run_url(runtime.flow_run.id))
    settings = RetrainSettings(
        prepare=prepare, train=train, evaluate=evaluate, export=export, promote=promote, clean=clean
    )
    run: str | None = None
    try:
        prepared = prepare_dataset(prepare, data, artifacts)
        with wait_for_turn(expand_path(artifacts), prepare.resolved_name):
            repeated = None if force else find_repeated_run(settings, prepared, artifacts)
            if (run := repeated) is None:
                run = train_model(settings, prepared, artifacts)
                evaluate_model(run)
                plot_training(run)
                export_model(run)
            decision = promote_model(run)
    except Exception:  # nights that fail must not fill the disk either
        clean_folders(clean, prepare.resolved_name, run, data, artifacts, return_state=True)
        raise
    cleaned = clean_folders(clean, prepare.resolved_name, run, data, artifacts, return_state=True)
    if repeated is not None:
        reason = f"nothing changed since {decision['run_id']}, which {_PAST[decision['state']]}: {decision['reason']}"
        decision |= {"state": "Unchanged", "reason": f"{reason}; --force trains all the same"}
        logger.info(decision["reason"])
    elif decision["state"] == "AwaitingApproval":
        if runtime.deployment.id is None:  # nobody could start this run again
            command = f"cnnpipe models promote {prepare.resolved_name}/{decision['run_id']}"
            decision["reason"] += f"; to approve it: {command}"
        else:
            answer = wait_for_approval(run, decision["reason"], promote.approval_hours)
            decision |= answer_approval(run, answer.approve == "yes", answer.reason)
    message = decision["reason"]
    if not cleaned.is_completed():  # it is red in the UI, and the night ends as it was decided
        message += f"; the stage clean failed: {cleaned.message}"
        logger.warning(message)
    return Completed(name=decision["state"], message=message, data={"run": escape_path(run), **decision})


@task(name="prepare", **_STAGE)
def prepare_dataset(prepare: PrepareSettings, data: str, artifacts: str) -> str:
    """Decode the dataset, or find it decoded before; return its folder."""
    from cnnpipe.prepare import dataset

    champion = champion_run(expand_path(artifacts), prepare.resolved_name)
    with progress_artifact("prepare-progress") as progress:
        prepared = dataset.prepare_dataset(
            prepare, expand_path(data), progress=progress, publish=publish_dataset, champion=champion
        )
    return str(prepared.path)


@task(name="compare", **_STAGE)
def find_repeated_run(settings: RetrainSettings, prepared: str, artifacts: str) -> str | None:
    """Return the run that training would only repeat, or None; a task, because a retried run must not find itself."""
    from cnnpipe.train import stage

    run = stage.find_repeated_run(settings, Path(prepared), expand_path(artifacts))
    return None if run is None else str(run)


@task(name="train", **_STAGE)
def train_model(settings: RetrainSettings, prepared: str, artifacts: str) -> str:
    """Train a network when the machine is free for it; return the run folder."""
    from cnnpipe.train.stage import train_run

    with progress_artifact("training-progress") as progress, training_slot(settings.train.device):
        result = train_run(settings, Path(prepared), expand_path(artifacts), progress)
    return str(result.run)


@task(name="evaluate", **_STAGE)
def evaluate_model(run: str) -> float:
    """Score the best weights on the test split; return the accuracy."""
    from cnnpipe.evaluate.evaluation import evaluate_run

    evaluation = evaluate_run(Path(run))
    publish_metrics(evaluation)
    return evaluation.accuracy


@task(name="plot", **_STAGE)
def plot_training(run: str) -> list[str]:
    """Draw the plots and show them in the UI; return their paths."""
    from cnnpipe.plot.plots import plot_run

    plots = plot_run(Path(run))
    publish_plots(Path(run))
    return [str(path) for path in plots]


@task(name="export", **_STAGE)
def export_model(run: str) -> float:
    """Write the ONNX model and compare it with the trained one; return the fraction of equal classes."""
    from cnnpipe.export.onnx import export_run

    return export_run(Path(run)).agreement


@task(name="promote", **_STAGE)
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


@task(name="approve", **_STAGE)
def answer_approval(run: str, approved: bool, reason: str) -> dict[str, Any]:
    """Make a run the champion, or refuse it, as a person has answered; return the decision."""
    from cnnpipe.promote.gate import conclude_run

    answer = "approved" if approved else "refused"
    decision = conclude_run(Path(run), **{answer: reason or f"{answer} by a person"})
    publish_decision(Path(run), decision)
    return asdict(decision)
