"""The promotion decision: whether a finished run takes the champion's place, and the completion of the run.

The rules, in order: the test accuracy reaches a floor, also on the first run; then it is not worse than the
champion's on the same test images. A champion whose figures were measured on another test split is scored anew on
this one; one that answers another question (other classes, image size or source of images), or that another split seed
may have trained on these very images, is left to a person.
"""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from cnnpipe.errors import DatasetError, RegistryError
from cnnpipe.evaluate.metrics import METRICS_FILE
from cnnpipe.evaluate.predict import describe_difference, predict_onnx
from cnnpipe.files import user_path
from cnnpipe.manifest import (
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    ModelInfo,
    RunManifest,
    digest_files,
    read_manifest,
    write_manifest,
)
from cnnpipe.prepare.dataset import SPLITS, PreparedDataset, count_shared, load_prepared
from cnnpipe.registry import alias_lock, champion_run, promote_run, promotion_history, registry_place
from cnnpipe.session import open_session
from cnnpipe.settings import RetrainSettings, dataset_location, load_toml
from cnnpipe.storage import write_json

__all__ = ["PROMOTION_FILE", "Decision", "conclude_run", "decide_promotion", "read_decision", "read_location"]

logger = logging.getLogger(__name__)

PROMOTION_FILE: Final = "promotion.json"


@dataclass(frozen=True)
class Decision:
    """Whether a run is promoted, and why."""

    promoted: bool
    reason: str
    """One sentence."""
    run_id: str
    accuracy: float
    """Of the candidate on the test split, 0-1."""
    min_accuracy: float
    champion: str | None
    """The run id of the champion it was compared with."""
    champion_accuracy: float | None
    """On the same test images."""
    num_images: int
    dataset_fingerprint: str
    time: str
    """UTC, ISO 8601."""


def decide_promotion(
    info: ModelInfo,
    champion: Path | None,
    dataset: PreparedDataset,
    settings: RetrainSettings,
    location: str | None = None,
) -> Decision:
    """Apply the rules to a candidate.

    Args:
        info: of the candidate's exported model, measured on `dataset`.
        champion: the champion's run folder, or None before the first promotion.
        dataset: whose test split decides.
        settings: of the candidate's retraining.
        location: where the candidate's images come from, as `config.dataset_location` says; None is what it says here.
    """
    location = location or dataset_location(settings.prepare.dataset)
    accuracy, champion_accuracy, min_accuracy = info.test_accuracy, None, settings.promote.min_accuracy
    if accuracy < min_accuracy:
        promoted, reason = False, f"test accuracy {accuracy:.4f} is below the floor of {min_accuracy:.4f}"
    elif champion is None or champion.name == info.run_id:
        promoted, reason = True, f"first champion: test accuracy {accuracy:.4f} reaches the floor of {min_accuracy:.4f}"
    else:
        if (difference := _incomparable(champion, info, dataset, settings, location)) is not None:
            promoted = False
            reason = (
                f"the champion {champion.name} {difference}, so the two cannot be compared; "
                f"to replace it: cnnpipe models promote {shlex.quote(str(champion.with_name(info.run_id)))} --force; "
                f"to keep both: cnnpipe train {shlex.quote(location)} --name NAME"
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


def _incomparable(
    champion: Path, info: ModelInfo, dataset: PreparedDataset, settings: RetrainSettings, location: str
) -> str | None:
    """Return what keeps the champion from a fair comparison on the dataset's test split; None if nothing does."""
    theirs = read_manifest(champion).model
    if theirs.class_names != info.class_names:
        owners = ("only the champion", "only this run")
        return f"has other classes ({describe_difference(theirs.class_names, info.class_names, owners)})"
    if theirs.image_size != info.image_size:
        sizes = (f"{height}x{width}" for height, width in (theirs.image_size, info.image_size))
        return "takes images of {} pixels, this run of {}".format(*sizes)
    if theirs.dataset_fingerprint == dataset.fingerprint:
        return None
    if (source := read_location(champion)) != location and not _shares_images(champion, dataset):
        return f"was trained on {source}, this run on {location}, which has other images"
    seed, own = load_toml(RetrainSettings, champion / "config.toml").prepare.seed, settings.prepare.seed
    return None if seed == own else f"may have been trained on these test images (split seed {seed}, here {own})"


def _read_environment(run: Path) -> dict[str, Any]:
    """Return what is in a run's `environment.json`; nothing where it cannot be read."""
    try:
        environment = json.loads((run / "environment.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return environment if isinstance(environment, dict) else {}


def read_location(run: Path) -> str:
    """Return where a run's images came from; of an older run, which does not record it, what its settings say here."""
    source: str | None = _read_environment(run).get("source")
    return source or dataset_location(load_toml(RetrainSettings, run / "config.toml").prepare.dataset)


def _shares_images(champion: Path, dataset: PreparedDataset) -> bool:
    """Whether most images that the champion was tested on are in the dataset too: then its folder was only moved."""
    try:
        tested = load_prepared(user_path(_read_environment(champion)["dataset"])).images("test")
    except (KeyError, TypeError, DatasetError):  # nothing is left to compare with
        return False
    return 2 * count_shared(tested, dataset, SPLITS) > len(tested)


def _accuracy_on(champion: Path, dataset: PreparedDataset) -> float:
    """Return the champion's accuracy on the dataset's test split."""
    theirs = read_manifest(champion).model
    if theirs.dataset_fingerprint == dataset.fingerprint:
        return theirs.test_accuracy
    logger.info("the test split has changed since the champion %s was measured: scoring it anew", champion.name)
    predicted = predict_onnx(open_session(champion / MODEL_FILES["fp32"], "cpu"), dataset.images("test")).argmax(axis=1)
    return float(np.mean(predicted == dataset.labels("test")))


def conclude_run(run: Path, dataset: PreparedDataset, settings: RetrainSettings, forced: str | None = None) -> Decision:
    """Decide on an exported run, complete it, and move the champion alias if it is promoted.

    Writes `promotion.json` and, last, `manifest.json`. A complete run keeps the decision it has, with two
    exceptions: it is decided anew if an interruption kept the alias from moving and there is another champion since;
    and a rollback that came after it is not undone.

    Args:
        settings: of the run's retraining.
        forced: a reason to promote the run whatever the rules say; decided and recorded anew.
    Returns:
        The decision; `promoted` says whether the run is the champion now.
    Raises:
        RegistryError: the run lacks the files of an earlier stage or lies in no registry, or another process holds it.
        ModelError: the exported model cannot be read.
        StorageError: the files cannot be written.
    """
    artifacts, name = registry_place(run)
    with alias_lock(artifacts, name):  # between reading the champion and moving the alias nobody else may move it
        decision = None if forced is not None else _standing_decision(run, artifacts, name)
        if decision is None:
            info = open_session(run / MODEL_FILES["fp32"], "cpu").info
            champion = None if forced is not None else champion_run(artifacts, name)
            decision = decide_promotion(info, champion, dataset, settings, read_location(run))
            if forced is not None:
                decision = replace(decision, promoted=True, reason=forced)
            write_json(run / PROMOTION_FILE, asdict(decision))
            _complete_run(run, info, decision, dataset)
        if decision.promoted:
            promote_run(artifacts, name, run.name, decision.reason)
    logger.info("%s %s: %s", name, "promoted" if decision.promoted else "not promoted", decision.reason)
    return decision


def _standing_decision(run: Path, artifacts: Path, name: str) -> Decision | None:
    """Return what was decided on a complete run before, or None if there is nothing that still holds."""
    if not (run / MANIFEST_FILE).is_file():
        return None
    decision = read_decision(run)
    history = [move.run_id for move in promotion_history(artifacts, name)]
    if not decision.promoted or history[-1:] == [run.name]:
        return decision
    if run.name in history:
        reason = "it was champion and was stepped back from; to take it again: cnnpipe models promote --force"
        return replace(decision, promoted=False, reason=reason)
    champion = champion_run(artifacts, name)
    return decision if (champion.name if champion else None) == decision.champion else None


def read_decision(run: Path) -> Decision:
    """Read a run's `promotion.json`.

    Raises:
        RegistryError: there is none, or it is damaged.
    """
    path = run / PROMOTION_FILE
    try:
        return Decision(**json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise RegistryError(f"no {PROMOTION_FILE} in {run}: conclude it with `cnnpipe models promote`") from error
    except (ValueError, TypeError) as error:
        raise RegistryError(f"{path} is damaged: {error}; promote the run with --force, or another") from error


def _complete_run(run: Path, info: ModelInfo, decision: Decision, dataset: PreparedDataset) -> None:
    """Write the manifest, the last file of a run."""
    try:
        metrics = json.loads((run / METRICS_FILE).read_bytes())
        parity = json.loads((run / PARITY_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise RegistryError(f"{run} cannot be completed: {error}; evaluate and export it first") from error
    plain = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    manifest = RunManifest(
        model=info,
        created=decision.time,
        dataset={
            "name": dataset.name,
            "source": dataset.source,
            "location": read_location(run),
            "fingerprint": dataset.fingerprint,
            "num_images": dataset.num_images,
        },
        metrics=plain,
        parity=parity,
        promoted=decision.promoted,
        promotion_reason=decision.reason,
        files=digest_files(run),
    )
    write_manifest(run, manifest)
