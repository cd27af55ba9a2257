"""The promotion gate: the floor, the comparison with the champion, and a run's completion."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnpipe.errors import RegistryError
from cnnpipe.evaluate.evaluation import LoadedRun
from cnnpipe.manifest import ModelInfo, RunManifest, read_manifest, write_manifest
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.prepare.sources import SPLITS
from cnnpipe.promote.gate import conclude_run, decide_promotion
from cnnpipe.registry import champion_run, list_runs, promote_run, promotion_history, rollback
from cnnpipe.settings import PrepareSettings, PromoteSettings, RetrainSettings, dump_toml
from cnnpipe.storage import sha256_file

RUN_FILES = {
    "config.toml", "environment.json", "history.csv", "model.keras", "training.json", "model.onnx",
    "model.int8.onnx",
    "model.fp16.onnx", "metrics.json", "parity.json",
    "classification_report.csv", "predictions_test.csv", "probabilities_test.npy", "confusion_matrix.csv",
    "accuracy.png", "loss.png", "confusion_matrix.png",
    "samples.png", "mistakes.png", "promotion.json",
}  # fmt: skip


def require(run: Path, min_accuracy: float) -> None:
    """Change the floor in a run's settings."""
    settings = RetrainSettings(promote=PromoteSettings(min_accuracy=min_accuracy))
    (run / "config.toml").write_text(dump_toml(settings))


def trained_on(dataset: PreparedDataset, seed: int = 0) -> LoadedRun:
    return LoadedRun(RetrainSettings(prepare=PrepareSettings(seed=seed)), dataset, "digits")


def candidate(run: Path, accuracy: float) -> ModelInfo:
    return read_manifest(run).model.model_copy(update={"run_id": "20990101T000000Z", "test_accuracy": accuracy})


def second_run(artifacts: Path) -> Path:
    """Copy the finished run as one that is exported but not concluded."""
    first = list_runs(artifacts, "digits")[0]
    second = first.with_name("20990101T000000Z")
    shutil.copytree(first, second)
    (second / "manifest.json").unlink()
    (second / "promotion.json").unlink()
    return second


def rewrite_model(run: Path, **changes: object) -> None:
    """Change what a run's manifest says about its model."""
    manifest = read_manifest(run)
    model = manifest.model.model_copy(update=changes)
    write_manifest(run, RunManifest.model_validate({**manifest.model_dump(), "model": model.model_dump()}))


def test_the_floor_holds_on_the_first_run_too(finished_run: Path, digits: PreparedDataset) -> None:
    below = decide_promotion(candidate(finished_run, 0.49), None, trained_on(digits))
    reached = decide_promotion(candidate(finished_run, 0.50), None, trained_on(digits))

    assert not below.promoted
    assert below.reason == "test accuracy 0.4900 is below the floor of 0.5000"
    assert reached.promoted
    assert reached.champion is None


def test_a_worse_model_never_replaces_the_champion(artifacts: Path, digits: PreparedDataset) -> None:
    champion = champion_run(artifacts, "digits")
    assert champion is not None
    accuracy = read_manifest(champion).model.test_accuracy
    one_image = 1 / digits.num_images["test"]

    worse = decide_promotion(candidate(champion, accuracy - one_image), champion, trained_on(digits))
    equal = decide_promotion(candidate(champion, accuracy), champion, trained_on(digits))

    assert not worse.promoted
    assert f"is worse than the champion's {accuracy:.4f}" in worse.reason
    assert equal.promoted
    assert equal.champion_accuracy == accuracy


def test_a_champion_measured_on_other_images_is_scored_again(artifacts: Path, digits: PreparedDataset) -> None:
    champion = champion_run(artifacts, "digits")
    assert champion is not None
    honest = read_manifest(champion).model.test_accuracy
    rewrite_model(champion, test_accuracy=0.01)  # must not count on another test split

    decision = decide_promotion(candidate(champion, 0.6), champion, trained_on(replace(digits, fingerprint="f" * 64)))

    assert decision.champion_accuracy == pytest.approx(honest)
    assert not decision.promoted


def test_a_champion_that_may_have_learned_the_test_images_is_left_to_a_person(
    artifacts: Path, digits: PreparedDataset
) -> None:
    champion = champion_run(artifacts, "digits")
    assert champion is not None
    other = trained_on(replace(digits, fingerprint="f" * 64), seed=7)

    decision = decide_promotion(candidate(champion, 0.99), champion, other)

    assert (decision.promoted, decision.champion_accuracy) == (False, None)
    assert "may have been trained on these test images (split seed 0, here 7)" in decision.reason
    assert "--force" in decision.reason


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"class_names": (*"012345678", "neun")}, "other classes (only the champion has 9; only this run has neun)"),
        ({"class_names": tuple("9876543210")}, "other classes (the same in another order)"),
        ({"image_size": (64, 48)}, "takes images of 32x32 pixels, this run of 64x48"),
    ],
)
def test_a_champion_of_another_question_is_left_to_a_person_who_is_told_what_differs(
    artifacts: Path, digits: PreparedDataset, changes: dict[str, object], difference: str
) -> None:
    champion = champion_run(artifacts, "digits")
    assert champion is not None

    decision = decide_promotion(candidate(champion, 0.99).model_copy(update=changes), champion, trained_on(digits))

    assert not decision.promoted
    assert f"the champion {champion.name} " in decision.reason
    assert f"{difference}, so the two cannot be compared" in decision.reason
    assert f"cnnpipe models promote {artifacts}/digits/runs/20990101T000000Z --force" in decision.reason
    assert "cnnpipe train digits --name NAME" in decision.reason


def remember(run: Path, **values: str | None) -> None:
    """Change what a run's `environment.json` says; None removes it."""
    environment = json.loads((run / "environment.json").read_text()) | values
    kept = {key: value for key, value in environment.items() if value is not None}
    (run / "environment.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("champion_from", "candidate_from", "content", "compared"),
    [
        ("/acme/photos", "/zeta/photos", "others", False),
        ("digits", "/zeta/digits", "others", False),
        ("/zeta/digits", "digits", "others", False),
        (None, "/zeta/digits", "others", False),  # an older run: its settings say digits
        ("/acme/photos", "/zeta/photos", "gone", False),
        ("/acme/photos", "/acme/photos", "others", True),
        ("/acme/photos", "/moved/photos", "equal", True),
        ("/acme/photos", "/moved/photos", "grown", True),
        (None, "digits", "others", True),
    ],
)
def test_only_the_champion_of_the_same_source_is_compared_with(
    artifacts: Path,
    digits: PreparedDataset,
    tmp_path: Path,
    champion_from: str | None,
    candidate_from: str,
    content: str,
    compared: bool,
) -> None:
    run = list_runs(artifacts, "digits")[0]
    champion = Path(shutil.copytree(run, run.with_name("20000101T000000Z")))
    promote_run(artifacts, "digits", champion.name, "an older run")
    (run / "manifest.json").unlink()
    theirs = Path(shutil.copytree(digits.path, tmp_path / "theirs"))
    if content == "others":
        for split in SPLITS:
            np.save(theirs / f"{split}_images.npy", 255 - digits.images(split))
    if content == "gone":
        shutil.rmtree(theirs)
    remember(champion, source=champion_from, dataset=str(theirs))
    remember(run, source=candidate_from)
    if content != "equal":
        rewrite_model(champion, dataset_fingerprint="f" * 64)

    decision = conclude_run(run)

    assert decision.promoted is compared
    assert read_manifest(run).dataset["location"] == candidate_from
    assert champion_run(artifacts, "digits") == (run if compared else champion)
    if not compared:
        assert f"was trained on {champion_from or 'digits'}, this run on {candidate_from}" in decision.reason
        assert f"cnnpipe models promote {run} --force" in decision.reason
        assert f"cnnpipe train {candidate_from} --name NAME" in decision.reason


def test_a_complete_run_holds_every_file_and_their_digests(finished_run: Path) -> None:
    manifest = read_manifest(finished_run)

    assert set(manifest.files) == RUN_FILES
    assert {file.name for file in finished_run.iterdir()} == RUN_FILES | {"manifest.json"}
    for name, digest in manifest.files.items():
        assert digest.bytes == (finished_run / name).stat().st_size
        assert digest.sha256 == sha256_file(finished_run / name)


def test_the_first_passing_run_becomes_the_champion(finished_run: Path) -> None:
    artifacts = finished_run.parents[2]

    assert champion_run(artifacts, "digits") == finished_run
    (move,) = promotion_history(artifacts, "digits")
    assert (move.action, move.run_id, move.previous) == ("promote", finished_run.name, None)
    decision = json.loads((finished_run / "promotion.json").read_text())
    assert decision["promoted"] is True
    assert decision["reason"] == move.reason


def test_an_equal_second_run_is_promoted_and_the_history_says_so(artifacts: Path) -> None:
    run = second_run(artifacts)

    decision = conclude_run(run)

    assert decision.promoted
    assert champion_run(artifacts, "digits") == run
    assert [move.run_id for move in promotion_history(artifacts, "digits")] == [decision.champion, run.name]


def test_a_refused_run_is_complete_but_not_champion(artifacts: Path) -> None:
    champion, run = champion_run(artifacts, "digits"), second_run(artifacts)

    require(run, 1.0)
    decision = conclude_run(run)

    assert not decision.promoted
    assert not read_manifest(run).promoted
    assert champion_run(artifacts, "digits") == champion


def test_concluding_twice_keeps_the_first_decision(artifacts: Path) -> None:
    run = second_run(artifacts)
    require(run, 1.0)
    refused = conclude_run(run)

    require(run, 0.0)
    assert conclude_run(run) == refused


def test_an_interruption_before_the_alias_moved_is_made_good(artifacts: Path) -> None:
    first, run = champion_run(artifacts, "digits"), second_run(artifacts)
    conclude_run(run)
    assert first is not None
    (artifacts / "digits" / "champion").write_text(first.name + "\n")

    conclude_run(run)

    assert champion_run(artifacts, "digits") == run
    assert len(promotion_history(artifacts, "digits")) == 2


def test_concluding_again_does_not_undo_a_rollback(artifacts: Path) -> None:
    first, run = champion_run(artifacts, "digits"), second_run(artifacts)
    conclude_run(run)
    rollback(artifacts, "digits", "it was worse in production")

    decision = conclude_run(run)

    assert champion_run(artifacts, "digits") == first
    assert not decision.promoted
    assert "it was champion and was replaced" in decision.reason


def test_a_decision_that_others_overtook_is_made_again(artifacts: Path) -> None:
    first, stale = champion_run(artifacts, "digits"), second_run(artifacts)
    assert first is not None
    conclude_run(stale)
    better = stale.with_name("20990102T000000Z")
    shutil.copytree(first, better)
    # As if the process of `stale` had been killed before the alias moved, and `better` had come since.
    (artifacts / "digits" / "promotions.jsonl").unlink()
    promote_run(artifacts, "digits", better.name, "better")
    rewrite_model(better, test_accuracy=1.0, run_id=better.name)

    decision = conclude_run(stale)

    assert not decision.promoted
    assert decision.champion == better.name
    assert champion_run(artifacts, "digits") == better
    assert not read_manifest(stale).promoted


def test_a_champion_that_is_decided_on_again_is_not_called_the_first(artifacts: Path) -> None:
    run = list_runs(artifacts, "digits")[0]
    (artifacts / "digits" / "promotions.jsonl").unlink()

    assert conclude_run(run).reason.startswith("already champion: test accuracy ")


def test_a_run_is_forced_without_a_reason_too(artifacts: Path) -> None:
    run = second_run(artifacts)
    require(run, 1.0)
    assert conclude_run(run, forced="").promoted


def test_a_forced_run_is_recorded_as_such(artifacts: Path) -> None:
    run = second_run(artifacts)

    require(run, 1.0)
    decision = conclude_run(run, forced="the floor was a mistake")

    assert (decision.promoted, decision.reason) == (True, "the floor was a mistake")
    assert champion_run(artifacts, "digits") == run


def test_a_run_without_metrics_cannot_be_completed(artifacts: Path) -> None:
    run = second_run(artifacts)
    (run / "metrics.json").unlink()

    with pytest.raises(RegistryError, match=r"cannot be completed: .*evaluate and export it first"):
        conclude_run(run)
    assert not (run / "manifest.json").exists()
