"""Runs, the champion alias, its history, and the way back."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from cnnpipe import registry
from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.manifest import (
    MANIFEST_FILE,
    ModelInfo,
    RunManifest,
    TrainingStatistics,
    choose_model_file,
    write_manifest,
)
from cnnpipe.registry import (
    CHAMPION_FILE,
    PROMOTIONS_FILE,
    Promotion,
    champion_run,
    create_run,
    list_champions,
    list_names,
    list_runs,
    promote_run,
    promotion_history,
    replay_history,
    resolve_model,
    resolve_run,
    rollback,
)

STATISTICS = TrainingStatistics(
    num_images=1, channel_mean=(0, 0, 0), channel_std=(1, 1, 1), brightness_deciles=(0.0,) * 11, class_shares=(0.5, 0.5)
)


def _complete(artifacts: Path, run_id: str, name: str = "digits") -> Path:
    """Make a run that is complete, with an empty model."""
    run = artifacts / name / "runs" / run_id
    run.mkdir(parents=True)
    (run / "model.onnx").write_bytes(b"")
    info = ModelInfo(
        cnnpipe_version="0.1.0",
        name=name,
        run_id=run_id,
        preset="baseline",
        class_names=("0", "1"),
        image_size=(32, 32),
        dataset_fingerprint="0123",
        test_accuracy=0.9,
        training_statistics=STATISTICS,
    )
    manifest = RunManifest(
        model=info, created="", dataset={}, metrics={}, parity={}, promoted=True, promotion_reason="", files={}
    )
    write_manifest(run, manifest)
    return run


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A registry with the complete runs A, B, C and D of `digits`, none promoted."""
    folder = tmp_path / "artifacts"
    for run_id in "ABCD":
        _complete(folder, run_id)
    return folder


def resolve_model_file(model: str | None, artifacts: Path) -> Path:
    return choose_model_file(resolve_model(model, artifacts, "fp32"), "cpu", "fp32").path


def _champion(artifacts: Path) -> str | None:
    run = champion_run(artifacts, "digits")
    return run.name if run else None


def _promote(artifacts: Path, *run_ids: str) -> None:
    for run_id in run_ids:
        promote_run(artifacts, "digits", run_id, f"{run_id} is better")


def _rollback(artifacts: Path, run_id: str | None = None) -> str:
    move = rollback(artifacts, "digits", "looks wrong", run_id)
    assert _champion(artifacts) == move.run_id
    return move.run_id


def _set_alias(artifacts: Path, run_id: str) -> None:
    """Put the alias where it was before a move whose history is written already: what a crash leaves."""
    (artifacts / "digits" / CHAMPION_FILE).write_text(run_id + "\n")


def test_runs_created_in_the_same_second_are_different_and_in_order(tmp_path: Path) -> None:
    runs = [create_run(tmp_path, "digits") for _ in range(3)]
    assert all(re.fullmatch(r"\d{8}T\d{6}Z", run.name) for run in runs)
    assert len(set(runs)) == 3
    assert list_runs(tmp_path, "digits") == runs


def test_a_run_comes_after_the_newest_when_the_clock_was_set_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("20991231T235959Z", "my-copy", "99"):
        (tmp_path / "digits" / "runs" / name).mkdir(parents=True)
    runs = [create_run(tmp_path, "digits").name for _ in range(2)]
    assert runs == ["21000101T000000Z", "21000101T000001Z"]
    assert "the clock is before the newest run, 20991231T235959Z: the new run is named 21000101T000000Z" in caplog.text


def test_names_are_those_with_runs_or_a_champion(artifacts: Path) -> None:
    (artifacts / "predictions").mkdir()
    (artifacts / ".prefect" / "runs").mkdir(parents=True)
    _complete(artifacts, "A", "cifar10")
    assert list_names(artifacts) == ["cifar10", "digits"]
    assert list_names(artifacts / "none") == []
    assert list_runs(artifacts, "none") == []


def test_first_promotion_makes_a_champion(artifacts: Path) -> None:
    assert _champion(artifacts) is None
    move = promote_run(artifacts, "digits", "A", "first")
    assert (move.action, move.run_id, move.previous, move.reason) == ("promote", "A", None, "first")
    assert _champion(artifacts) == "A"
    assert (artifacts / "digits" / CHAMPION_FILE).read_text() == "A\n"
    assert promotion_history(artifacts, "digits") == [move]


def test_history_says_what_moved_the_alias_oldest_first(artifacts: Path) -> None:
    _promote(artifacts, "A", "B")
    _rollback(artifacts)
    moves = [(move.action, move.run_id, move.previous) for move in promotion_history(artifacts, "digits")]
    assert moves == [("promote", "A", None), ("promote", "B", "A"), ("rollback", "A", "B")]


def test_promoting_the_champion_again_changes_nothing(artifacts: Path) -> None:
    _promote(artifacts, "A", "B", "B")
    assert len(promotion_history(artifacts, "digits")) == 2
    assert _rollback(artifacts) == "A"


def test_reason_may_hold_any_text(artifacts: Path) -> None:
    reason = "größer\nals\u2028vorher\u0085 „日本“"
    promote_run(artifacts, "digits", "A", reason)
    _promote(artifacts, "B")
    assert promotion_history(artifacts, "digits")[0].reason == reason


def test_rollback_without_an_earlier_champion_is_an_error(artifacts: Path) -> None:
    with pytest.raises(RegistryError, match="digits has no earlier champion to go back to"):
        _rollback(artifacts)
    _promote(artifacts, "A")
    with pytest.raises(RegistryError, match="digits has no earlier champion to go back to"):
        _rollback(artifacts)
    assert _champion(artifacts) == "A"


def test_rollback_again_goes_further_back(artifacts: Path) -> None:
    _promote(artifacts, "A", "B", "C")
    assert [_rollback(artifacts), _rollback(artifacts)] == ["B", "A"]
    with pytest.raises(RegistryError, match="no earlier champion"):
        _rollback(artifacts)


def test_rollback_does_not_return_to_what_was_rolled_back(artifacts: Path) -> None:
    _promote(artifacts, "A", "B")
    assert _rollback(artifacts) == "A"
    _promote(artifacts, "C")
    assert _rollback(artifacts) == "A"


def test_rolled_back_run_that_is_promoted_again_counts_again(artifacts: Path) -> None:
    _promote(artifacts, "A", "B")
    _rollback(artifacts)
    _promote(artifacts, "B", "C")
    assert [_rollback(artifacts), _rollback(artifacts)] == ["B", "A"]


def test_run_that_was_champion_twice_is_passed_twice_on_the_way_back(artifacts: Path) -> None:
    _promote(artifacts, "A", "B", "A", "C")
    assert [_rollback(artifacts) for _ in range(3)] == ["A", "B", "A"]


def test_rollback_to_a_given_run_skips_those_between(artifacts: Path) -> None:
    _promote(artifacts, "A", "B", "C", "D")
    assert _rollback(artifacts, "B") == "B"
    assert _rollback(artifacts) == "A"


def test_rollback_to_a_run_that_never_was_champion_can_be_taken_back(artifacts: Path) -> None:
    _promote(artifacts, "B", "C")
    assert _rollback(artifacts, "A") == "A"
    assert _rollback(artifacts) == "C"


@pytest.mark.parametrize(
    ("moves", "left"),
    [
        ("+A +B", set()),
        ("+A +B -A", {"B"}),
        ("+A +B +C +D -B", {"C", "D"}),
        ("+A +B -A +B", set()),
        ("+A +B -A +C -A", {"B", "C"}),
        ("+A +B -A -X", {"A", "B"}),
        ("+A +B +A -B", {"A"}),
    ],
)
def test_runs_that_were_rolled_back_from_are_known_until_they_are_champion_again(
    artifacts: Path, moves: str, left: set[str]
) -> None:
    runs = [move[1:] for move in moves.split()]
    history = [
        Promotion("", "promote" if move[0] == "+" else "rollback", run, previous, "")
        for move, run, previous in zip(moves.split(), runs, [None, *runs], strict=False)
    ]
    lines = [json.dumps(asdict(move)) + "\n" for move in history]
    (artifacts / "digits" / PROMOTIONS_FILE).write_text("".join(lines))
    assert replay_history(artifacts, "digits")[1] == left


@pytest.mark.parametrize("run_id", ["X", "", ".", "..", "../runs/A", "A/"])
def test_move_to_what_is_no_run_is_an_error(artifacts: Path, run_id: str) -> None:
    _promote(artifacts, "B")
    for move in (promote_run, rollback):
        with pytest.raises(RegistryError, match=r"there is no run .*; see `cnnpipe models list digits`"):
            move(artifacts, "digits", run_id=run_id, reason="")
    assert _champion(artifacts) == "B"
    assert len(promotion_history(artifacts, "digits")) == 1


def test_incomplete_run_cannot_be_promoted(artifacts: Path) -> None:
    (artifacts / "digits" / "runs" / "A" / MANIFEST_FILE).unlink()
    with pytest.raises(RegistryError, match="not a complete run"):
        _promote(artifacts, "A")
    assert _champion(artifacts) is None


def test_name_that_is_not_there_is_an_error_and_stays_so(artifacts: Path) -> None:
    with pytest.raises(RegistryError, match=r"there is no model 'digit' in .*, which has: digits; check the name"):
        promote_run(artifacts, "digit", "A", "")
    with pytest.raises(RegistryError, match="there is no model 'digit'"):
        rollback(artifacts, "digit", "")
    assert list_names(artifacts) == ["digits"]


def test_promotion_after_a_crash_between_history_and_alias_completes_it(artifacts: Path) -> None:
    _promote(artifacts, "A", "B")
    _set_alias(artifacts, "A")
    _promote(artifacts, "B")
    assert _champion(artifacts) == "B"
    assert [move.run_id for move in promotion_history(artifacts, "digits")] == ["A", "B"]


def test_rollback_after_a_crash_between_history_and_alias_completes_it(artifacts: Path) -> None:
    _promote(artifacts, "A", "B")
    _rollback(artifacts)
    _set_alias(artifacts, "B")
    assert _rollback(artifacts) == "A"
    assert len(promotion_history(artifacts, "digits")) == 3


def test_promotion_that_never_reached_the_alias_is_not_returned_to(artifacts: Path) -> None:
    _promote(artifacts, "A", "B", "C")
    _set_alias(artifacts, "B")
    _promote(artifacts, "D")
    assert [_rollback(artifacts), _rollback(artifacts)] == ["B", "A"]


def test_rollback_goes_from_where_the_alias_is(artifacts: Path) -> None:
    _promote(artifacts, "A", "B", "C")
    _set_alias(artifacts, "B")
    assert _rollback(artifacts) == "A"


def test_alias_to_a_run_that_is_gone_is_an_error_that_promotion_mends(artifacts: Path) -> None:
    _promote(artifacts, "A")
    _set_alias(artifacts, "X")
    with pytest.raises(RegistryError, match=r"champion names the run 'X', which is not complete"):
        champion_run(artifacts, "digits")
    with pytest.raises(RegistryError, match="names the run 'X'"):
        resolve_model_file("digits", artifacts)
    _promote(artifacts, "B")
    assert _champion(artifacts) == "B"


def test_empty_or_undecodable_alias_is_an_error(artifacts: Path) -> None:
    _set_alias(artifacts, "")
    with pytest.raises(RegistryError, match="names the run ''"):
        champion_run(artifacts, "digits")
    (artifacts / "digits" / CHAMPION_FILE).write_bytes(b"\xff")
    with pytest.raises(RegistryError, match=r"cannot be read: .*; delete it and promote a run with --force"):
        champion_run(artifacts, "digits")


@pytest.mark.parametrize("line", ["{", "[1]", '{"time": ""}', "1"])
def test_damaged_history_is_an_error_and_moves_nothing(artifacts: Path, line: str) -> None:
    _promote(artifacts, "A")
    with (artifacts / "digits" / PROMOTIONS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RegistryError, match=r"promotions\.jsonl is damaged: .*; fix or remove the line"):
        _promote(artifacts, "B")
    assert _champion(artifacts) == "A"


def _promote_in_turn(artifacts: Path, run_ids: list[str]) -> None:
    for run_id in run_ids:
        promote_run(artifacts, "digits", run_id, f"by {os.getpid()}")


def test_promotions_of_two_processes_keep_the_history_whole(artifacts: Path) -> None:
    context = multiprocessing.get_context("spawn")
    turns = (["A", "B"] * 10, ["C", "D"] * 10)
    processes = [context.Process(target=_promote_in_turn, args=(artifacts, turn)) for turn in turns]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    history = promotion_history(artifacts, "digits")
    assert len(history) == 40  # neither promotes the champion of the other, nor its own twice running
    assert [move.previous for move in history] == [None, *(move.run_id for move in history[:-1])]
    assert _champion(artifacts) == history[-1].run_id


def test_move_that_waits_too_long_for_another_process_says_so(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOCK_TIMEOUT_SECONDS", 0.1)
    with FileLock(artifacts / "digits" / ".lock"), pytest.raises(RegistryError, match="another process holds"):
        _promote(artifacts, "A")


def test_run_is_found_by_name_alias_folder_and_run_id(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _promote(artifacts, "B")
    run = artifacts / "digits" / "runs" / "B"
    models = ["digits", str(artifacts / "digits" / CHAMPION_FILE), str(artifacts / "digits"), str(run), "digits/B"]
    assert [resolve_run(model, artifacts) for model in models] == [run] * 5
    assert [resolve_model_file(model, artifacts) for model in models] == [run / "model.onnx"] * 5
    monkeypatch.chdir(run)
    assert resolve_run(".", artifacts) == run
    assert resolve_run("digits/A", artifacts) == artifacts / "digits" / "runs" / "A"


def test_complete_run_is_found_wherever_it_was_copied(artifacts: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (artifacts / "digits" / "runs" / "A").rename(copy)
    assert resolve_run(str(copy), artifacts) == copy


def test_model_file_is_found_by_its_path(artifacts: Path, tmp_path: Path) -> None:
    model = tmp_path / "own.onnx"
    with pytest.raises(ModelError, match=r"no model file at .*own\.onnx; check the path"):
        resolve_model_file(str(model), artifacts)
    model.write_bytes(b"")
    assert resolve_model_file(str(model), artifacts) == model


def test_a_file_is_a_model_file_and_everything_else_a_name(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _complete(artifacts, "A", "cats.onnx")
    promote_run(artifacts, "cats.onnx", "A", "")
    (tmp_path / "cats.onnx").mkdir()  # the dataset that the name comes from
    monkeypatch.chdir(tmp_path)
    for model in ("cats.onnx", "cats.onnx/A", str(artifacts / "cats.onnx"), str(run)):
        assert resolve_model_file(model, artifacts) == run / "model.onnx"
    (tmp_path / "cats.onnx").rmdir()
    assert resolve_model_file("cats.onnx", artifacts) == run / "model.onnx"
    (tmp_path / "cats.onnx").write_bytes(b"")
    assert resolve_model_file("cats.onnx", artifacts) == Path("cats.onnx")


def test_an_alias_that_cannot_be_used_is_listed_with_its_problem(artifacts: Path) -> None:
    _promote(artifacts, "A")
    _complete(artifacts, "A", "cats")
    assert list_champions(artifacts) == ({"digits": "A"}, {})  # cats has no champion yet
    for content in (b"nonsense", b"\xff", b""):
        (artifacts / "cats" / CHAMPION_FILE).write_bytes(content)
        champions, broken = list_champions(artifacts)
        assert champions == {"digits": "A"}
        with pytest.raises(RegistryError) as caught:
            champion_run(artifacts, "cats")
        assert broken == {"cats": str(caught.value)}


def test_no_model_given_is_the_only_champion(artifacts: Path) -> None:
    with pytest.raises(ModelError, match="has no champion; train one with `make retrain`"):
        resolve_model_file(None, artifacts)
    _promote(artifacts, "A")
    assert resolve_model_file(None, artifacts) == artifacts / "digits" / "runs" / "A" / "model.onnx"
    _complete(artifacts, "A", "cifar10")
    promote_run(artifacts, "cifar10", "A", "")
    with pytest.raises(ModelError, match=r"has several champions \(cifar10, digits\); choose one with --model"):
        resolve_model_file(None, artifacts)


def test_unknown_model_lists_the_names_there_are(artifacts: Path, tmp_path: Path) -> None:
    for model in ("digit", "digits/X", "", "..", "a/../b"):
        with pytest.raises(ModelError, match=r"there is no model .*; give a name \(digits in"):
            resolve_run(model, artifacts)
    with pytest.raises(ModelError, match=r"give a name \(none in"):
        resolve_run("digits", tmp_path / "none")


def test_name_without_champion_says_how_to_get_one(artifacts: Path) -> None:
    with pytest.raises(ModelError, match=r"digits has no champion yet in .*; promote a run with `cnnpipe models"):
        resolve_run("digits", artifacts)


def test_file_that_is_no_model_is_refused(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ModelError, match=r"photo\.jpg is not a model: a model file ends in \.onnx or \.keras"):
        resolve_model_file(str(tmp_path / "photo.jpg"), artifacts)


def test_run_without_the_file_says_how_to_make_it(artifacts: Path) -> None:
    (artifacts / "digits" / "runs" / "A" / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"A has no model\.onnx; finish it with `cnnpipe export"):
        resolve_model_file("digits/A", artifacts)
