"""The stage `promote`: decide whether a finished run becomes the champion, and complete the run.

The rules, in order: the test accuracy reaches a floor, on the first run too; then it is at least the champion's on the
same test images. A champion that was measured on another test split is scored again on this one. One that solves
another problem (other classes, image size or source of images), or that was split with another seed and so may have
been trained on these very images, is left to a person.
"""

from __future__ import annotations

import json
import logging
import shlex
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from cnnpipe.errors import DatasetError, RegistryError, one_line
from cnnpipe.evaluate.evaluation import LoadedRun, describe_difference, load_run, predict_onnx
from cnnpipe.evaluate.metrics import METRICS_FILE
from cnnpipe.manifest import (
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    ModelInfo,
    RunManifest,
    digest_files,
    read_manifest,
    read_origin,
    write_manifest,
)
from cnnpipe.prepare.dataset import PreparedDataset, count_shared, load_prepared
from cnnpipe.prepare.sources import SPLITS
from cnnpipe.registry import alias_lock, champion_run, promote_run, promotion_history, registry_place
from cnnpipe.session import open_session
from cnnpipe.settings import RetrainSettings, load_toml
from cnnpipe.storage import write_json

logger = logging.getLogger(__name__)

PROMOTION_FILE: Final = "promotion.json"


@dataclass(frozen=True)
class Decision:
    """Whether a run is promoted, and why."""

    promoted: bool
    reason: str  # one sentence
    run_id: str
    accuracy: float  # of the run on the test split, 0-1
    min_accuracy: float
    champion: str | None  # run id of the champion that it was compared with
    champion_accuracy: float | None  # of that champion on the same images, 0-1
    num_images: int
    dataset_fingerprint: str
    time: str  # UTC, ISO 8601
    state: str = "NotPromoted"


def approve_run(run: Path, reason: str) -> Decision:
    """Make a run that awaits approval the champion."""
    return conclude_run(run, forced=reason)


def conclude_run(run: Path, forced: str | None = None) -> Decision:
    """Decide on an exported run, complete it, and move the champion alias if it is promoted.

    Writes `promotion.json` and, last, `manifest.json`. A complete run keeps its decision, but is decided on again if an
    interruption kept the alias from moving and there has been another champion since. A later rollback is not undone.

    Args:
        forced: a reason to promote the run whatever the rules say; decided and recorded again.
    Returns:
        The decision; `promoted` is whether the run is the champion now.
    Raises:
        RegistryError: the run lacks the files of an earlier stage or is in no registry, or another process holds it.
        ModelError: the exported model cannot be read.
        StorageError: the files cannot be written.
    """
    artifacts, name = registry_place(run)
    with alias_lock(artifacts, name):  # nobody else may move the alias between reading the champion and moving it
        decision = None if forced is not None else _standing_decision(run, artifacts, name)
        if decision is None:
            loaded = load_run(run)
            info = open_session(run / MODEL_FILES["fp32"], "cpu").info
            if forced is None:
                decision = decide_promotion(info, champion_run(artifacts, name), loaded)
                manual = loaded.settings.promote.promotion == "manual"
                if decision.promoted:
                    decision = replace(
                        decision, promoted=not manual, state="AwaitingApproval" if manual else "Promoted"
                    )
            else:
                decision = decide_promotion(info, None, loaded)
                decision = replace(decision, promoted=True, reason=forced, state="Promoted")
            write_json(run / PROMOTION_FILE, asdict(decision))
            _complete_run(run, info, decision, loaded)
        if decision.promoted:
            promote_run(artifacts, name, run.name, decision.reason)
    logger.info("%s %s: %s", name, "promoted" if decision.promoted else "not promoted", decision.reason)
    return decision


def _standing_decision(run: Path, artifacts: Path, name: str) -> Decision | None:
    """Return the decision on a complete run, or None if there is none that still holds."""
    if not (run / MANIFEST_FILE).is_file():
        return None
    path = run / PROMOTION_FILE
    try:
        decision = Decision(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(f"{path} cannot be read: {one_line(error)}; promote the run with --force") from error
    history = [move.run_id for move in promotion_history(artifacts, name)]
    if not decision.promoted or history[-1:] == [run.name]:
        return decision
    if run.name in history:
        reason = "it was champion and was replaced; to make it champion again: cnnpipe models promote --force"
        return replace(decision, promoted=False, reason=reason)
    champion = champion_run(artifacts, name)
    return decision if (champion.name if champion else None) == decision.champion else None


def decide_promotion(info: ModelInfo, champion: Path | None, candidate: LoadedRun) -> Decision:
    """Apply the rules to a candidate, the exported model `info`, on the test split of its dataset.

    Args:
        champion: the champion's run folder, or None before the first promotion.
    """
    dataset = candidate.dataset
    accuracy, min_accuracy = info.test_accuracy, candidate.settings.promote.min_accuracy
    champion_accuracy = None
    if accuracy < min_accuracy:
        promoted, reason = False, f"test accuracy {accuracy:.4f} is below the floor of {min_accuracy:.4f}"
    elif champion is None or champion.name == info.run_id:
        rank = "first champion" if champion is None else "already champion"
        promoted, reason = True, f"{rank}: test accuracy {accuracy:.4f} reaches the floor of {min_accuracy:.4f}"
    elif (difference := _find_difference(champion, info, candidate)) is not None:
        promoted = False
        reason = (
            f"the champion {champion.name} {difference}, so the two cannot be compared; "
            f"to replace it: cnnpipe models promote {shlex.quote(str(champion.with_name(info.run_id)))} --force; "
            f"to keep both: cnnpipe train {shlex.quote(candidate.location)} --name NAME"
        )
    else:
        champion_accuracy = _accuracy_on(champion, dataset)
        promoted = accuracy >= champion_accuracy
        verdict = "is not worse than" if promoted else "is worse than"
        reason = f"test accuracy {accuracy:.4f} {verdict} the champion's {champion_accuracy:.4f} on the same images"
    return Decision(
        promoted=promoted,
        reason=reason,
        run_id=info.run_id,
        accuracy=accuracy,
        min_accuracy=min_accuracy,
        champion=champion.name if champion else None,
        champion_accuracy=champion_accuracy,
        num_images=dataset.num_images["test"],
        dataset_fingerprint=dataset.fingerprint,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _find_difference(champion: Path, info: ModelInfo, candidate: LoadedRun) -> str | None:
    """Return why the champion cannot be compared fairly on the candidate's test split, or None if it can."""
    theirs = read_manifest(champion).model
    if theirs.class_names != info.class_names:
        owners = ("only the champion", "only this run")
        return f"has other classes ({describe_difference(theirs.class_names, info.class_names, owners)})"
    if theirs.image_size != info.image_size:
        return "takes images of {}x{} pixels, this run of {}x{}".format(*theirs.image_size, *info.image_size)
    if theirs.dataset_fingerprint == candidate.dataset.fingerprint:
        return None
    origin = read_origin(champion)
    if origin.location != candidate.location and not _shares_images(origin.prepared, candidate.dataset):
        return f"was trained on {origin.location}, this run on {candidate.location}, which has other images"
    seed = load_toml(RetrainSettings, champion / "config.toml").prepare.seed
    own = candidate.settings.prepare.seed
    return None if seed == own else f"may have been trained on these test images (split seed {seed}, here {own})"


def _shares_images(prepared: Path | None, dataset: PreparedDataset) -> bool:
    """Return whether most test images of a prepared dataset are in another too: then its folder was only moved."""
    with suppress(DatasetError):  # it is gone
        if prepared is not None:
            tested = load_prepared(prepared).images("test")
            return 2 * count_shared(tested, dataset, SPLITS) > len(tested)
    return False


def _accuracy_on(champion: Path, dataset: PreparedDataset) -> float:
    theirs = read_manifest(champion).model
    if theirs.dataset_fingerprint == dataset.fingerprint:
        return theirs.test_accuracy
    logger.info("the test split has changed since the champion %s was measured: scoring it again", champion.name)
    predicted = predict_onnx(open_session(champion / MODEL_FILES["fp32"], "cpu"), dataset.images("test")).argmax(axis=1)
    return float(np.mean(predicted == dataset.labels("test")))


def _complete_run(run: Path, info: ModelInfo, decision: Decision, loaded: LoadedRun) -> None:
    """Write the manifest, the last file of a run."""
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
        promoted=decision.promoted,
        promotion_reason=decision.reason,
        files=digest_files(run),
    )
    write_manifest(run, manifest)
