"""The stage `promote`: decide whether a finished run becomes the champion, and complete the run.

The rules, in order; the first that fails gives the reason:

1. The run reaches the floors, on the first night too, and keeps to the budgets; its model files are those that the
   export compared with the trained model.
2. The champion can be compared with: it solves the same problem, and enough test images are new to both.
3. It is another model than the champion.
4. No class loses recall by more than its margin and more than chance explains.
5. It is significantly more accurate than the champion on the same images; or at least as accurate, and a loss beyond
   the margin is ruled out, as only a large test split can do. Otherwise the champion stays.
6. It is not the model of a run that was rolled back from.
"""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from timeit import repeat
from typing import Final

import numpy as np
from pydantic import TypeAdapter, ValidationError
from scipy.stats import binomtest

from cnnpipe.errors import CnnpipeError, RegistryError, one_line
from cnnpipe.evaluate.evaluation import LoadedRun, load_run
from cnnpipe.evaluate.metrics import METRICS_FILE, Evaluation, read_evaluation, read_probabilities
from cnnpipe.manifest import (
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    PROMOTION_FILE,
    RunManifest,
    RunState,
    digest_file,
    digest_files,
    read_manifest,
    read_parity,
    write_manifest,
)
from cnnpipe.promote.comparison import SIGNIFICANCE, Comparison, IncomparableError, compare_runs, give_same, score_run
from cnnpipe.registry import (
    alias_lock,
    champion_run,
    promote_run,
    promotion_history,
    registry_place,
    replay_history,
)
from cnnpipe.session import open_session
from cnnpipe.settings import PromoteSettings
from cnnpipe.storage import sha256_file, write_json

logger = logging.getLogger(__name__)

STATES_IN_WORDS: Final[dict[RunState, str]] = {
    "Promoted": "promoted",
    "NotPromoted": "not promoted",
    "Unchanged": "unchanged",
    "AwaitingApproval": "waits for approval",
}


@dataclass(frozen=True)
class Check:
    """One floor or budget of a run."""

    value: float
    limit: float | None  # None if there is none
    problem: str = ""  # why the run does not pass, a sentence; empty if it passes


@dataclass(frozen=True)
class Decision:
    """Whether a run is promoted, and why."""

    promoted: bool
    reason: str  # one sentence
    run_id: str
    accuracy: float  # of the run on its test split, 0-1
    min_accuracy: float
    champion: str | None  # run id of the champion that it was compared with
    champion_accuracy: float | None  # of that champion on the images of the comparison, 0-1
    num_images: int  # in the test split
    dataset_fingerprint: str
    time: str  # UTC, ISO 8601
    state: RunState = "NotPromoted"
    checks: dict[str, Check] = field(default_factory=dict)
    comparison: Comparison | None = None  # None if the rules before it have decided

    def end_as(self, state: RunState, reason: str) -> Decision:
        """Return this decision with another state and reason."""
        return replace(self, promoted=state == "Promoted", state=state, reason=reason)


def conclude_run(
    run: Path, forced: str | None = None, approved: str | None = None, refused: str | None = None
) -> Decision:
    """Decide on an exported run, complete it, and move the champion alias if it is promoted.

    Writes `promotion.json` and, last, `manifest.json`. A complete run is decided on again only if it passed, was never
    made champion, and another champion came since. A rollback is not undone.

    Args:
        forced: a reason to promote the run whatever the rules say; decided and recorded again.
        approved: a person's reason to promote the run if it waits for approval; if there has been another champion
            since it was decided on, the rules are applied again first, and may refuse it.
        refused: a person's reason not to promote a run that waits for approval.
    Returns:
        The decision; `promoted` is whether the run is the champion now.
    Raises:
        RegistryError: the run lacks the files of an earlier stage or is in no registry, or another process holds it.
        ModelError: an exported model cannot be read.
        StorageError: the files cannot be written.
    """
    artifacts, name = registry_place(run)
    with alias_lock(artifacts, name):  # nobody else may move the alias between reading the champion and moving it
        found = None if forced is not None else _standing_decision(run, artifacts, name)
        decision = found or _decide(run, artifacts, name, forced)
        if decision.state == "AwaitingApproval":
            last = next(reversed(promotion_history(artifacts, name)), None)
            if last and last.run_id == run.name:  # promoted by force while it waited
                approved = last.reason
            if approved is not None:
                decision = decision.end_as("Promoted", f"{decision.reason}; approved: {approved}")
            elif refused is not None:
                decision = decision.end_as("NotPromoted", f"refused: {refused}")
        if decision != found:
            write_json(run / PROMOTION_FILE, asdict(decision))
        _complete_run(run, decision)
        if decision.promoted:
            promote_run(artifacts, name, run.name, decision.reason)
    logger.info("%s %s: %s", name, STATES_IN_WORDS[decision.state], decision.reason)
    return decision


def read_decision(run: Path) -> Decision:
    """Read `promotion.json`, also one without a state, of an earlier version; RegistryError if it cannot be read."""
    path = run / PROMOTION_FILE
    try:
        decision = TypeAdapter(Decision).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise RegistryError(f"{path} cannot be read: {one_line(problem)}; promote the run with --force") from error
    return decision.end_as("Promoted", decision.reason) if decision.promoted else decision


def _standing_decision(run: Path, artifacts: Path, name: str) -> Decision | None:
    """Return the decision on a complete run, or None if there is none that still holds."""
    if not (run / MANIFEST_FILE).is_file():
        return None
    decision = read_decision(run)
    history = [move.run_id for move in promotion_history(artifacts, name)]
    if decision.state in ("NotPromoted", "Unchanged") or history[-1:] == [run.name]:
        return decision
    if run.name in history:
        reason = "it was champion and was replaced; to make it champion again: cnnpipe models promote --force"
        return decision.end_as("NotPromoted", reason)
    champion = champion_run(artifacts, name)
    return decision if (champion.name if champion else None) == decision.champion else None


def _decide(run: Path, artifacts: Path, name: str, forced: str | None) -> Decision:
    """Apply the rules to an exported run, on the test split of its dataset."""
    loaded, evaluation, comparison = load_run(run), read_evaluation(run), None
    limits, champion = loaded.settings.promote, None if forced is not None else champion_run(artifacts, name)
    checks = _check_run(run, evaluation, loaded)
    state: RunState = "NotPromoted"
    if forced is not None:
        state, reason = "Promoted", forced
    elif problem := next((check.problem for check in checks.values() if check.problem), ""):
        reason = problem
    elif champion is None or champion.name == run.name:
        rank = "first champion" if champion is None else "already champion"
        state = "Promoted"
        reason = f"{rank}: test accuracy {evaluation.accuracy:.4f} reaches the floor of {limits.min_accuracy:.4f}"
    else:
        try:
            comparison = compare_runs(champion, run, loaded)
            state, reason = _judge(comparison, champion.name, limits)
        except IncomparableError as error:
            reason = (
                f"the champion {error}, so the two cannot be compared; "
                f"to replace it: cnnpipe models promote {shlex.quote(str(run))} --force; "
                f"to keep both: cnnpipe train {shlex.quote(loaded.location)} --name NAME"
            )
    if state == "Promoted" and forced is None:
        if twin := _find_twin(run, artifacts, name, loaded):
            state, reason = "NotPromoted", f"it is the same model as {twin}, which was rolled back from"
        elif limits.promotion == "manual":
            state = "AwaitingApproval"
    return Decision(
        promoted=state == "Promoted",
        reason=reason,
        run_id=run.name,
        accuracy=evaluation.accuracy,
        min_accuracy=limits.min_accuracy,
        champion=champion.name if champion else None,
        champion_accuracy=comparison.champion_accuracy if comparison else None,
        num_images=evaluation.num_images,
        dataset_fingerprint=loaded.dataset.fingerprint,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        state=state,
        checks=checks,
        comparison=comparison,
    )


def _find_twin(run: Path, artifacts: Path, name: str, loaded: LoadedRun) -> str | None:
    """Return the id of a run that was rolled back from and gives the same probabilities, or None."""
    own = read_probabilities(run, loaded.dataset.num_images["test"])
    for run_id in sorted(replay_history(artifacts, name)[1] - {run.name}):
        try:
            if give_same(own, score_run(artifacts / name / "runs" / run_id, loaded), loaded):
                return run_id
        except CnnpipeError as error:  # it was removed, is damaged, or takes images of another size
            logger.info("not compared with %s, which was rolled back from: %s", run_id, error)
    return None


def _check_run(run: Path, evaluation: Evaluation, loaded: LoadedRun) -> dict[str, Check]:
    """Return the floors and budgets by name, in the order of the rules."""
    limits, accuracy, recall = loaded.settings.promote, evaluation.accuracy, evaluation.average("recall")
    checks: dict[str, Check] = {}

    def check(name: str, value: float, limit: float | None, passed: bool, problem: str) -> None:
        checks[name] = Check(value, limit, "" if passed else problem.format(value, limit))

    def check_floor(name: str, value: float, floor: float) -> None:
        check(name.removeprefix("test "), value, floor, value >= floor, name + " {:.4f} is below the floor of {:.4f}")

    check_floor("test accuracy", accuracy, limits.min_accuracy)
    largest = max(each.support for each in evaluation.per_class) / evaluation.num_images
    chance = float(binomtest(evaluation.num_correct, evaluation.num_images, largest, "greater").pvalue)
    problem = "test accuracy {:.4f} is not significantly above {:.4f}, that of always giving the largest class "
    problem += f"(p = {chance:.4f}, {evaluation.num_images:,} images)"
    check("accuracy of the largest class", accuracy, largest, chance < SIGNIFICANCE, problem)
    constant = 1 / len(evaluation.per_class)
    problem = "macro recall {:.4f} is not above {:.4f}, that of always giving one class"
    check("macro recall of one class", recall, constant, recall > constant, problem)
    if limits.min_macro_recall is not None:
        check_floor("macro recall", recall, limits.min_macro_recall)
    files = [run / name for name in MODEL_FILES.values() if (run / name).is_file()]
    compared = {MODEL_FILES[each]: record.get("sha256") for each, record in read_parity(run).items()}
    changed = [file.name for file in files if sha256_file(file) != compared.pop(file.name, None)]
    changed += [name for name, digest in compared.items() if digest]  # a file that is gone; none was kept without one
    problem = f"{', '.join(changed)} is not what was compared with the trained model; train again"
    check("changed model files", len(changed), 0, not changed, problem)
    size, budget = max((file.stat().st_size / 1e6 for file in files), default=0.0), limits.max_megabytes
    problem = "the largest model file has {:.3g} megabytes, more than the budget of {:g}"
    check("megabytes", size, budget, budget is None or size <= budget, problem)
    if (budget := limits.max_milliseconds) is not None:
        time = _measure_milliseconds(run, loaded)
        check("milliseconds", time, budget, time <= budget, "an image takes {:.3g} ms, more than the budget of {:g} ms")
    return checks


def _measure_milliseconds(run: Path, loaded: LoadedRun) -> float:
    """Return the time of an image in the session and the batches of `cnnpipe classify`, without decoding."""
    session = open_session(run)
    size, images = session.default_batch_size, loaded.dataset.images("test")
    batch = np.resize(images[:size], (size, *images.shape[1:]))  # repeats them if there are fewer
    session.run(batch)  # the first run allocates its buffers
    return 1000 * min(repeat(lambda: session.run(batch), number=1, repeat=7)) / size  # other work only adds


def _judge(compared: Comparison, champion: str, limits: PromoteSettings) -> tuple[RunState, str]:
    """Return the state of a run that passes its checks, and why, in comparison with the champion."""
    worst, margin = compared.worst_class, limits.max_accuracy_drop
    accuracies = f"test accuracy {compared.accuracy:.4f} {{}} the champion's {compared.champion_accuracy:.4f}"
    on = f"on the same {compared.num_images:,} images"
    if compared.num_left_out:
        on += f" ({compared.num_left_out:,} that one of the two has learned from are left out)"
    numbers = f"{compared.gained:,} gained, {compared.lost:,} lost, p = {compared.p_value:.4f}"
    if compared.same_model:
        return "Unchanged", f"it is the same model as the champion {champion}"
    if worst.drop > limits.max_class_drop and worst.p_value < worst.max_p_value:
        fell = f"from {worst.champion_recall:.4f} to {worst.recall:.4f} on {worst.num_images:,} images"
        limit = f"more than {limits.max_class_drop:.4f} and more than by chance (p = {worst.p_value:.4f})"
        return "NotPromoted", f"the recall of class {worst.name} falls {fell}, {limit}"
    if compared.p_value < SIGNIFICANCE:
        better = compared.gained > compared.lost
        verdict = accuracies.format("is better than" if better else "is worse than")
        return "Promoted" if better else "NotPromoted", f"{verdict} {on}: {numbers}"
    bound = f"with 95 % confidence the difference is at least {compared.lower_bound:+.4f}"
    if compared.gained >= compared.lost and compared.lower_bound >= -margin:
        return "Promoted", f"{accuracies.format('is as good as')} {on}: {numbers}; {bound}, and may be {-margin:+.4f}"
    equal = accuracies.format("is equal within noise to")
    return "Unchanged", f"{equal} {on}, and the champion stays: {numbers}; {bound}"


def _complete_run(run: Path, decision: Decision) -> None:
    """Write the manifest, the last file of a run, unless it holds this decision already."""
    digest = digest_file(run / PROMOTION_FILE)
    decided = {"promoted": decision.promoted, "promotion_reason": decision.reason, "state": decision.state}
    if (run / MANIFEST_FILE).is_file():
        manifest = read_manifest(run)
        if manifest.files.get(PROMOTION_FILE) != digest:
            files = {**manifest.files, PROMOTION_FILE: digest}
            write_manifest(run, manifest.model_copy(update={**decided, "files": files}))
        return
    loaded, info = load_run(run), open_session(run / MODEL_FILES["fp32"], "cpu").info
    try:
        metrics, parity = (json.loads((run / name).read_bytes()) for name in (METRICS_FILE, PARITY_FILE))
    except (OSError, ValueError) as error:
        raise RegistryError(f"{run} cannot be completed: {error}; evaluate and export it first") from error
    dataset = {key: getattr(loaded.dataset, key) for key in ("name", "source", "fingerprint", "num_images")}
    manifest = RunManifest(
        model=info,
        created=decision.time,
        dataset={**dataset, "location": loaded.location},
        metrics={key: value for key, value in metrics.items() if isinstance(value, int | float)},
        parity=parity,
        files=digest_files(run),
        **decided,
    )
    write_manifest(run, manifest)
