"""The promotion gate: its rules on runs with chosen answers, a run's completion, and approval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Answers, Pool, write_run

from cnnpipe.errors import RegistryError
from cnnpipe.manifest import RunManifest, read_manifest, write_manifest
from cnnpipe.prepare.dataset import PreparedDataset, read_digests
from cnnpipe.prepare.sources import SPLITS
from cnnpipe.promote.gate import conclude_run, read_decision
from cnnpipe.registry import champion_run, list_runs, promote_run, promotion_history, rollback, summarize_runs
from cnnpipe.storage import sha256_file

RUN_FILES = {
    "config.toml", "environment.json", "digests.npz", "history.csv", "model.keras", "training.json", "model.onnx",
    "model.int8.onnx",
    "model.fp16.onnx", "metrics.json", "parity.json",
    "classification_report.csv", "predictions_test.csv", "probabilities_test.npy", "confusion_matrix.csv",
    "accuracy.png", "loss.png", "confusion_matrix.png",
    "samples.png", "mistakes.png", "promotion.json",
}  # fmt: skip

CHAMPION, CHALLENGER, THIRD = (f"2026010{day}T020000Z" for day in (1, 2, 3))
NUM_TEST = 600
TEST = np.arange(NUM_TEST)
LABELS = TEST % 10
"""Each of ten classes has 60 test images; those of class k are k, k + 10, …"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


def write_pair(
    folder: Path,
    like: PreparedDataset,
    champion: Answers,
    challenger: Answers,
    *,
    sharpness: float = 2.0,
    labels: Answers = LABELS,
    **promote: Any,
) -> Path:
    """Write and conclude a champion, and write a challenger with these answers on the test images; return it."""
    pool = Pool.make(np.concatenate([labels, labels[:20]]))
    for column, answers in enumerate((champion, challenger)):
        pool.answer(column, np.concatenate([answers, labels[:20]]))
    size = len(labels)
    dataset = pool.write(folder.parent / "tiny", like, train=range(size, size + 10), val=range(size + 10, size + 20),
                         test=range(size))  # fmt: skip
    conclude_run(write_run(folder, CHAMPION, dataset, 0), forced="the first")
    return write_run(folder, CHALLENGER, dataset, 1, sharpness, **promote)


def wrong(*indices: int, labels: Answers = LABELS) -> Answers:
    """Return answers that are right but at these images."""
    answers = labels.copy()
    answers[list(indices)] = (answers[list(indices)] + 1) % 10
    return answers


def of_class(label: int, count: int) -> list[int]:
    """Return the first images of a class."""
    return list(range(label, label + 10 * count, 10))


def test_a_significantly_better_run_is_promoted_and_the_numbers_are_kept(folder: Path, digits: PreparedDataset) -> None:
    run = write_pair(folder, digits, wrong(*range(20)), wrong(*range(18, 22)))

    decision = conclude_run(run)

    assert (decision.state, decision.promoted) == ("Promoted", True)
    assert decision.reason == (
        "test accuracy 0.9933 is better than the champion's 0.9667 on the same 600 images: "
        "18 gained, 2 lost, p = 0.0004"
    )
    assert champion_run(folder, "tiny") == run
    compared = json.loads((run / "promotion.json").read_bytes())["comparison"]
    assert (compared["num_images"], compared["num_left_out"]) == (600, 0)
    assert (compared["gained"], compared["lost"]) == (18, 2)
    assert compared["gained_paths"] == [f"image-{index}" for index in range(10)]
    assert compared["lost_paths"] == ["image-20", "image-21"]
    assert read_decision(run) == decision


def test_a_significantly_worse_run_is_refused(folder: Path, digits: PreparedDataset) -> None:
    decision = conclude_run(write_pair(folder, digits, wrong(), wrong(*range(30))))

    assert decision.state == "NotPromoted"
    assert "0.9500 is worse than the champion's 1.0000 on the same 600 images: 0 gained, 30 lost" in decision.reason


@pytest.mark.parametrize("lost", [2, 3, 6])
def test_runs_that_differ_by_noise_leave_the_champion(folder: Path, digits: PreparedDataset, lost: int) -> None:
    decision = conclude_run(write_pair(folder, digits, wrong(0, 1), wrong(*range(10, 10 + lost))))

    assert decision.state == "Unchanged"
    assert "is equal within noise to the champion's 0.9967 on the same 600 images, and the champion" in decision.reason
    assert (champion_run(folder, "tiny") or folder).name == CHAMPION
    assert [row.state for row in summarize_runs(folder)] == ["unchanged", "passed"]


def test_a_large_test_split_lets_an_equal_model_through_but_never_a_less_accurate_one(
    folder: Path, digits: PreparedDataset
) -> None:
    labels = np.arange(2000) % 10
    equal = write_pair(folder, digits, wrong(0, labels=labels), wrong(1, labels=labels), labels=labels)
    assert "is as good as the champion's 0.9995" in (decision := conclude_run(equal)).reason
    assert "the difference is at least -0.0018, and may be -0.0050" in decision.reason
    assert decision.promoted
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / "tiny")
    worse = write_pair(folder, digits, wrong(labels=labels), wrong(1, labels=labels), labels=labels)
    assert conclude_run(worse).state == "Unchanged"


def test_a_class_that_loses_more_than_its_margin_refuses_a_run_that_is_better_on_the_whole(
    folder: Path, digits: PreparedDataset
) -> None:
    run = write_pair(folder, digits, wrong(*range(0, 300, 10), *range(1, 300, 10)), wrong(*of_class(7, 12)))

    decision = conclude_run(run)

    assert decision.state == "NotPromoted"
    assert decision.reason.startswith("the recall of class digit 7 falls from 1.0000 to 0.8000 on 60 images, more than")
    assert decision.comparison is not None
    assert decision.comparison.p_value < 0.05
    assert (decision.comparison.gained, decision.comparison.lost) == (60, 12)


def test_a_class_may_lose_what_chance_explains_or_the_margin_allows(folder: Path, digits: PreparedDataset) -> None:
    better = [*range(0, 300, 10), *range(1, 300, 10)]
    assert conclude_run(write_pair(folder, digits, wrong(*better), wrong(*of_class(7, 4)))).promoted
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / "tiny")
    allowed = write_pair(folder, digits, wrong(*better), wrong(*of_class(7, 12)), max_class_drop=0.2)
    assert conclude_run(allowed).promoted


def test_the_same_weights_are_never_a_new_champion(folder: Path, digits: PreparedDataset) -> None:
    run = write_pair(folder, digits, wrong(3), wrong(3))

    decision = conclude_run(run)

    assert decision.state == "Unchanged"
    assert decision.reason == f"it is the same model as the champion {CHAMPION}"
    assert len(promotion_history(folder, "tiny")) == 1


def test_a_model_that_always_gives_the_largest_class_is_never_champion(folder: Path, digits: PreparedDataset) -> None:
    labels = np.array([0] * 570 + [1] * 30)
    always, honest = np.zeros_like(labels), np.where(np.arange(600) % 40 == 39, 1 - labels, labels)
    pool = Pool.make(np.concatenate([labels, labels[-20:]]), ("cat", "dog"))
    pool.answer(0, np.concatenate([always, labels[-20:]]))
    pool.answer(1, np.concatenate([honest, labels[-20:]]))
    dataset = pool.write(folder.parent / "tiny", digits, train=range(600, 610), val=range(610, 620), test=TEST)

    refused = conclude_run(write_run(folder, CHAMPION, dataset, 0))
    promoted = conclude_run(write_run(folder, CHALLENGER, dataset, 1))

    assert refused.accuracy == 0.95
    assert refused.reason == (
        "test accuracy 0.9500 is not significantly above 0.9500, that of always giving the largest class "
        "(p = 0.5484, 600 images)"
    )
    assert refused.checks["macro recall of one class"].problem
    assert promoted.reason.startswith("first champion: test accuracy 0.9750 reaches the floor of 0.5000")


@pytest.mark.parametrize(
    ("promote", "problem"),
    [
        ({"min_accuracy": 0.995}, "test accuracy 0.9900 is below the floor of 0.9950"),
        ({"min_macro_recall": 0.995}, "macro recall 0.9900 is below the floor of 0.9950"),
        ({"max_megabytes": 0.001}, "the largest model file has 0.00"),
        ({"max_milliseconds": 1e-6}, "an image takes "),
        ({"max_megabytes": 1.0, "max_milliseconds": 1000.0, "min_macro_recall": 0.99}, ""),
    ],
)
def test_floors_and_budgets_hold_on_the_first_night_too(
    folder: Path, digits: PreparedDataset, promote: dict[str, Any], problem: str
) -> None:
    run = write_pair(folder, digits, wrong(), wrong(*range(6)), **promote)
    (folder / "tiny" / "champion").unlink()
    (folder / "tiny" / "promotions.jsonl").unlink()

    decision = conclude_run(run)

    assert decision.promoted is not bool(problem)
    assert decision.reason.startswith(problem or "first champion: ")


@pytest.mark.parametrize("change", ["other bytes", "no record", "gone"])
def test_a_model_file_that_export_did_not_compare_is_refused(
    folder: Path, digits: PreparedDataset, change: str
) -> None:
    run = write_pair(folder, digits, wrong(*range(20)), wrong())
    parity = json.loads((run / "parity.json").read_bytes())
    shutil.copy(run / "model.onnx", run / "model.int8.onnx")
    record = {"kept": True, "sha256": sha256_file(run / "model.int8.onnx"), "reason": "", "relative_speed": None}
    if change != "no record":
        (run / "parity.json").write_text(json.dumps({**parity, "int8": record}))
    if change == "other bytes":
        (run / "model.int8.onnx").write_bytes(b"other")
    if change == "gone":
        (run / "model.int8.onnx").unlink()

    decision = conclude_run(run)

    assert decision.state == "NotPromoted"
    assert decision.reason == "model.int8.onnx is not what was compared with the trained model; train again"


def write_moved_pair(folder: Path, like: PreparedDataset, num_learned: int) -> tuple[Path, PreparedDataset]:
    """Write a champion that has learned the first test images of a challenger, and wrong answers on all others.

    The challenger is right everywhere but at those first images.
    """
    pool = Pool.make(np.concatenate([LABELS, LABELS]))
    pool.answer(0, np.where(np.arange(1200) < num_learned, pool.labels, pool.wrong_at(*range(1200))))
    pool.answer(1, pool.wrong_at(*range(num_learned)))
    theirs = pool.write(folder.parent / "theirs", like, train=[*range(num_learned), 1199], val=[1198],
                        test=range(600, 800))  # fmt: skip
    own = pool.write(folder.parent / "own", like, train=range(900, 910), val=range(910, 920), test=TEST)
    conclude_run(write_run(folder, CHAMPION, theirs, 0), forced="the first")
    return write_run(folder, CHALLENGER, own, 1, min_accuracy=0.1), theirs


def test_images_that_the_champion_has_learned_from_do_not_count(folder: Path, digits: PreparedDataset) -> None:
    run, _ = write_moved_pair(folder, digits, num_learned=300)

    decision = conclude_run(run)

    assert decision.promoted, decision.reason
    assert decision.comparison is not None
    assert (decision.comparison.num_images, decision.comparison.num_left_out) == (300, 300)
    assert (decision.comparison.accuracy, decision.comparison.champion_accuracy) == (1.0, 0.0)
    assert "on the same 300 images (300 that one of the two has learned from are left out)" in decision.reason


def test_a_champion_that_has_learned_nearly_all_test_images_is_left_to_a_person(
    folder: Path, digits: PreparedDataset
) -> None:
    run, _ = write_moved_pair(folder, digits, num_learned=501)

    decision = conclude_run(run)

    assert (decision.state, decision.comparison) == ("NotPromoted", None)
    assert "only 99 of the 600 test images are new to it and to this run, so the two cannot be" in decision.reason
    assert f"cnnpipe models promote {run} --force" in decision.reason
    assert "cnnpipe train digits --name NAME" in decision.reason


def test_a_champion_whose_images_are_not_known_any_more_is_left_to_a_person_unless_the_run_keeps_digests(
    folder: Path, digits: PreparedDataset
) -> None:
    run, theirs = write_moved_pair(folder, digits, num_learned=300)
    digests = read_digests(theirs.path)
    shutil.rmtree(theirs.path)
    copy = Path(shutil.copytree(run, run.with_name(THIRD)))

    refused = conclude_run(run)
    np.savez(folder / "tiny" / "runs" / CHAMPION / "digests.npz", allow_pickle=False, **digests)
    promoted = conclude_run(copy)

    assert "has no digests of its images, and its prepared dataset is gone" in refused.reason
    assert promoted.promoted


def rewrite_model(run: Path, **changes: object) -> None:
    """Change what a run's manifest says about its model."""
    manifest = read_manifest(run)
    model = manifest.model.model_copy(update=changes)
    write_manifest(run, RunManifest.model_validate({**manifest.model_dump(), "model": model.model_dump()}))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"class_names": (*(f"digit {n}" for n in range(9)), "neun")},
            "classes (only the champion has neun; only this",
        ),
        ({"class_names": tuple(f"digit {n}" for n in range(9, -1, -1))}, "other classes (the same in another order)"),
        ({"image_size": (64, 48)}, "takes images of 64x48 pixels, this run of 8x8"),
    ],
)
def test_a_champion_of_another_question_is_left_to_a_person_who_is_told_what_differs(
    folder: Path, digits: PreparedDataset, changes: dict[str, object], difference: str
) -> None:
    run = write_pair(folder, digits, wrong(*range(20)), wrong())
    rewrite_model(folder / "tiny" / "runs" / CHAMPION, **changes)

    decision = conclude_run(run)

    assert decision.state == "NotPromoted"
    assert f"the champion {CHAMPION} " in decision.reason
    assert difference in decision.reason
    assert f"cnnpipe models promote {run} --force" in decision.reason


def better(folder: Path, digits: PreparedDataset, **promote: Any) -> Path:
    return write_pair(folder, digits, wrong(*range(20)), wrong(), **promote)


def test_a_run_that_passes_waits_for_approval_if_asked_to_and_is_promoted_by_it(
    folder: Path, digits: PreparedDataset
) -> None:
    run = better(folder, digits, promotion="manual")

    waiting = conclude_run(run)

    assert (waiting.state, waiting.promoted) == ("AwaitingApproval", False)
    assert (champion_run(folder, "tiny") or folder).name == CHAMPION
    assert [row.state for row in summarize_runs(folder)] == ["awaiting", "passed"]
    assert conclude_run(run) == waiting  # only a person ends it
    shutil.rmtree(folder.parent / "tiny")  # by then the dataset may have been removed
    approved = conclude_run(run, approved="seen by Ada")
    assert (approved.state, approved.reason) == ("Promoted", f"{waiting.reason}; approved: seen by Ada")
    assert champion_run(folder, "tiny") == run
    assert read_decision(run) == approved
    manifest = read_manifest(run)
    assert (manifest.promoted, manifest.state) == (True, "Promoted")
    assert manifest.files["promotion.json"].sha256 == sha256_file(run / "promotion.json")
    assert conclude_run(run) == approved


def test_approval_of_a_run_that_another_champion_has_overtaken_decides_again(
    folder: Path, digits: PreparedDataset
) -> None:
    run = better(folder, digits, promotion="manual")
    conclude_run(run)
    other = Path(shutil.copytree(run, run.with_name(THIRD)))
    promote_run(folder, "tiny", other.name, "by hand")

    decision = conclude_run(run, approved="late")

    assert (decision.state, decision.reason) == ("Unchanged", f"it is the same model as the champion {THIRD}")
    assert champion_run(folder, "tiny") == other
    assert read_manifest(run).state == "Unchanged"


def test_a_run_that_was_promoted_by_force_while_it_waited_is_not_refused_any_more(
    folder: Path, digits: PreparedDataset
) -> None:
    run = better(folder, digits, promotion="manual")
    waiting = conclude_run(run)
    promote_run(folder, "tiny", run.name, "by hand")

    decision = conclude_run(run, refused="nobody answered")

    assert (decision.state, decision.reason) == ("Promoted", f"{waiting.reason}; approved: by hand")
    assert champion_run(folder, "tiny") == run
    assert read_manifest(run).state == "Promoted"


def test_a_refused_run_is_not_approved(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits, promotion="manual", min_accuracy=1.0, max_megabytes=0.001)
    assert conclude_run(run, approved="please").state == "NotPromoted"
    assert conclude_run(run, approved="please").state == "NotPromoted"


def test_the_night_after_a_rollback_does_not_undo_it(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits)
    conclude_run(run)
    rollback(folder, "tiny", "it was worse in production")
    next_night = Path(shutil.copytree(run, run.with_name(THIRD)))
    for name in ("manifest.json", "promotion.json"):
        (next_night / name).unlink()

    decision = conclude_run(next_night)

    assert decision.state == "NotPromoted"
    assert decision.reason == f"it is the same model as {CHALLENGER}, which was rolled back from"
    assert (champion_run(folder, "tiny") or folder).name == CHAMPION
    promote_run(folder, "tiny", run.name, "it was right after all")
    rollback(folder, "tiny", "back", CHAMPION)
    assert conclude_run(next_night) == decision


def test_a_run_of_version_0_1_is_read_and_compared_with(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits)
    old = folder / "tiny" / "runs" / CHAMPION
    new_fields = ("state", "checks", "comparison")
    for name in ("promotion.json", "manifest.json"):
        values = json.loads((old / name).read_bytes())
        (old / name).write_text(json.dumps({key: value for key, value in values.items() if key not in new_fields}))

    assert read_decision(old).state == "Promoted"
    assert [row.state for row in summarize_runs(folder)] == ["incomplete", "passed"]
    assert conclude_run(old).promoted
    assert conclude_run(run).promoted


@pytest.mark.parametrize(("content", "problem"), [("{", "Invalid JSON"), ('{"promoted": true}', "Field required")])
def test_a_decision_that_cannot_be_read_is_one_line(
    folder: Path, digits: PreparedDataset, content: str, problem: str
) -> None:
    run = better(folder, digits)
    conclude_run(run)
    (run / "promotion.json").write_text(content)

    with pytest.raises(RegistryError, match=rf"promotion\.json cannot be read: {problem}[^\n]*; promote the run with"):
        conclude_run(run, approved="yes")


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
            (theirs / f"{split}_digests.npy").unlink()
        (champion / "digests.npz").unlink()
    if content == "gone":
        (champion / "digests.npz").unlink()
        shutil.rmtree(theirs)
    remember(champion, source=champion_from, dataset=str(theirs))
    remember(run, source=candidate_from)
    if content != "equal":
        rewrite_model(champion, dataset_fingerprint="f" * 64)

    decision = conclude_run(run)

    assert (decision.comparison is not None) is compared
    assert decision.state == ("Unchanged" if compared else "NotPromoted")
    assert read_manifest(run).dataset["location"] == candidate_from
    assert champion_run(artifacts, "digits") == champion
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


def test_concluding_twice_keeps_the_first_decision(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits, max_megabytes=0.001)
    refused = conclude_run(run)

    (run / "config.toml").write_text("")
    assert conclude_run(run) == refused


def test_an_interruption_before_the_alias_moved_is_made_good(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits)
    conclude_run(run)
    (folder / "tiny" / "champion").write_text(CHAMPION + "\n")

    conclude_run(run)

    assert champion_run(folder, "tiny") == run
    assert len(promotion_history(folder, "tiny")) == 2


def test_concluding_again_does_not_undo_a_rollback(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits)
    conclude_run(run)
    rollback(folder, "tiny", "it was worse in production")

    decision = conclude_run(run)

    assert (champion_run(folder, "tiny") or folder).name == CHAMPION
    assert not decision.promoted
    assert "it was champion and was replaced" in decision.reason


def test_a_decision_that_others_overtook_is_made_again(folder: Path, digits: PreparedDataset) -> None:
    stale = better(folder, digits)
    conclude_run(stale)
    other = Path(shutil.copytree(stale, stale.with_name(THIRD)))
    # As if the process of `stale` had been killed before the alias moved, and `other` had come since.
    (folder / "tiny" / "promotions.jsonl").unlink()
    promote_run(folder, "tiny", other.name, "better")

    decision = conclude_run(stale)

    assert (decision.state, decision.champion) == ("Unchanged", other.name)
    assert champion_run(folder, "tiny") == other
    assert not read_manifest(stale).promoted


def test_a_champion_that_is_decided_on_again_is_not_called_the_first(artifacts: Path) -> None:
    run = list_runs(artifacts, "digits")[0]
    (artifacts / "digits" / "promotions.jsonl").unlink()

    assert conclude_run(run).reason.startswith("already champion: test accuracy ")


def test_a_forced_run_is_recorded_as_such_without_a_reason_too(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits, max_megabytes=0.001)

    decision = conclude_run(run, forced="")

    assert (decision.promoted, decision.state, decision.reason) == (True, "Promoted", "")
    assert champion_run(folder, "tiny") == run


def test_a_run_without_metrics_cannot_be_completed(folder: Path, digits: PreparedDataset) -> None:
    run = better(folder, digits)
    (run / "metrics.json").unlink()

    with pytest.raises(RegistryError, match=r"has no metrics\.json: evaluate it with `cnnpipe evaluate"):
        conclude_run(run)
    assert not (run / "manifest.json").exists()
