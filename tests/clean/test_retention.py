"""The stage `clean`: what goes, what stays, and what a user sees of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from cnnpipe.clean.retention import Cleaning, clean_up, list_prepared
from cnnpipe.cli import app
from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.prepare.dataset import PreparedDataset, load_prepared
from cnnpipe.registry import Promotion, list_runs, promotion_history, resolve_run, rollback
from cnnpipe.settings import CleanSettings
from cnnpipe.storage import remove_path

DAY = 86_400.0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `artifacts` and `data`, and no home of Prefect's elsewhere."""
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    (tmp_path / "artifacts" / "cats").mkdir(parents=True)
    return tmp_path


def _age(path: Path, days: float) -> Path:
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - days * DAY,) * 2)
    return path


def _write(path: Path, text: str = "{}", days: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return _age(path, days)


def _add_run(place: Path, day: int, *files: str, days: float = 9, name: str = "cats") -> Path:
    """Make a run of that day of a month, with some files, unchanged for some days."""
    run = place / "artifacts" / name / "runs" / f"202601{day:02}T020000Z"
    for file in files:
        _write(run / file)
    return _age(run, days)


def _add_runs(place: Path, *days: int) -> None:
    for day in days:
        _add_run(place, day, "manifest.json", "model.onnx")


def _promote(place: Path, *days: int) -> None:
    """Write the history of an alias that was given to the runs of these days, and the alias."""
    ids = [f"202601{day:02}T020000Z" for day in days]
    moves = [Promotion("", "promote", new, old, "") for old, new in zip([None, *ids], ids, strict=False)]
    lines = "".join(json.dumps(asdict(move)) + "\n" for move in moves)
    _write(place / "artifacts" / "cats" / "promotions.jsonl", lines)
    _write(place / "artifacts" / "cats" / "champion", ids[-1])


def _clean(place: Path, *, run: Path | None = None, dry_run: bool = False, **settings: int) -> Cleaning:
    names, folders = ["cats"], (place / "data", place / "artifacts")
    return clean_up(CleanSettings(**settings), names, *folders, run=run, dry_run=dry_run)


def _days_left(place: Path) -> list[int]:
    return [int(run.name[6:8]) for run in list_runs(place / "artifacts", "cats") if run.name != "notes"]


def test_the_newest_runs_the_champion_and_five_champions_before_it_stay(place: Path) -> None:
    _add_runs(place, *range(1, 29))
    _promote(place, 1, 2, 3, 4, 5, 6, 7, 8)
    _write(place / "artifacts" / "cats" / "runs" / "notes" / "mine.txt", days=99)

    cleaning = _clean(place, keep_runs=3)

    assert _days_left(place) == [3, 4, 5, 6, 7, 8, 26, 27, 28]
    assert (place / "artifacts" / "cats" / "runs" / "notes" / "mine.txt").is_file()
    assert len(cleaning.removed) == 19
    assert cleaning.line().startswith("removed 19 runs 0.0 MB; in use: 9 runs 0.0 MB; ")


def test_a_champion_that_was_rolled_back_from_stays_to_be_recognised(place: Path) -> None:
    _add_runs(place, 1, 2, 3, 4)
    _promote(place, 1, 2)
    history = promotion_history(place / "artifacts", "cats")
    back = Promotion("", "rollback", "20260101T020000Z", "20260102T020000Z", "")
    lines = "".join(json.dumps(asdict(move)) + "\n" for move in [*history, back])
    _write(place / "artifacts" / "cats" / "promotions.jsonl", lines)
    _write(place / "artifacts" / "cats" / "champion", "20260101T020000Z")
    _clean(place, keep_runs=1)
    assert _days_left(place) == [1, 2, 4]


def test_a_run_under_way_stays_and_a_dead_one_goes(place: Path) -> None:
    dead = _add_run(place, 1, "training/job.json", "training/checkpoint.npz", "training/lock", "model.keras")
    failed = _add_run(place, 2, "config.toml")
    trains = _add_run(place, 3, "training/job.json", "training/lock")
    recent = _add_run(place, 4, "training/job.json", "training/lock", days=0.5)
    complete = _add_run(place, 5, "manifest.json")
    resumable = _add_run(place, 6, "training/job.json", "training/lock")
    with FileLock(trains / "training" / "lock"):
        _age(trains, 9)
        _clean(place, keep_runs=1)
    assert not dead.exists()
    assert not failed.exists()
    assert list_runs(place / "artifacts", "cats") == [trains, recent, complete, resumable]


def test_failed_trainings_do_not_take_the_place_of_trained_runs(place: Path) -> None:
    _add_runs(place, 1, 2)
    trained = _add_run(place, 3, "model.keras", "training.json")  # only the later stages failed
    for day in range(4, 9):
        _add_run(place, day, "config.toml", days=0.1)
    _clean(place, keep_runs=2)
    assert _days_left(place)[:2] == [2, 3]
    assert trained.is_dir()


def test_a_run_that_awaits_approval_stays_as_long_as_it_may_be_approved(place: Path) -> None:
    for day, changed in ((1, 2.0), (2, 4.0)):
        run = _add_run(place, day, "manifest.json")
        _write(run / "config.toml", "[promote]\napproval_hours = 72\n")
        _write(run / "promotion.json", '{"state": "AwaitingApproval"}', days=changed)
    _add_runs(place, 3, 4)
    _clean(place, keep_runs=1)
    assert _days_left(place) == [1, 4]


def test_the_run_of_the_night_stays_where_the_clock_was_set_back(place: Path) -> None:
    run = _add_run(place, 1, "manifest.json")
    _add_runs(place, 2, 3)
    _clean(place, keep_runs=1, run=run)
    assert _days_left(place) == [1, 3]


def _add_prepared(place: Path, number: int, days: float, name: str = "cats") -> Path:
    folder = place / "data" / "prepared" / f"{name}-{number:012x}"
    _write(folder / "dataset.json", "x" * 1000)
    return _age(folder, days)


def test_prepared_datasets_that_were_used_last_or_are_in_use_stay(place: Path) -> None:
    first, unused, second, needed = (_add_prepared(place, number, days) for number, days in enumerate((1, 3, 2, 4)))
    others = [_add_prepared(place, 7, 50, name) for name in ("dogs", "cats-000000000001")]
    scratch = _write(place / "data" / "prepared" / ".scratch.abcdefgh" / "pixels", days=9)
    run = _add_run(place, 1, "training/job.json", "training/lock", days=0)
    _write(run / "environment.json", json.dumps({"source": "cats", "dataset": str(needed)}))

    cleaning = _clean(place)

    assert not unused.exists()
    assert all(folder.is_dir() for folder in (first, second, needed, *others))
    assert scratch.is_file()
    assert [(entry.kind, entry.path, entry.bytes) for entry in cleaning.removed] == [
        ("prepared dataset", str(unused), 1000)
    ]


def test_a_prepared_dataset_that_is_opened_counts_as_used(digits: PreparedDataset, tmp_path: Path) -> None:
    for number in (1, 2):
        shutil.copytree(digits.path, tmp_path / "prepared" / f"digits-{number:012x}")
    _age(tmp_path / "prepared", 5)
    load_prepared(tmp_path / "prepared" / "digits-000000000001")
    assert [folder.name[-1] for folder in list_prepared(tmp_path)["digits"]] == ["1", "2"]


def test_results_of_tasks_and_interrupted_classifications_go_after_some_days(place: Path) -> None:
    home, predictions = place / "artifacts" / ".prefect", place / "artifacts" / "predictions"
    fresh, stale = (_write(home / "results" / name, days=days) for name, days in (("a", 29), ("b", 31)))
    dead = [_write(predictions / "dead" / f"predictions.csv.job{end}", days=31) for end in ("", "-journal")]
    table = [
        _write(predictions / "done" / name, days=99) for name in ("predictions.csv", "predictions.csv.summary.json")
    ]
    half = _write(predictions / "done" / ".predictions.0123456789abcdef.csv", days=99)
    runs_on = _write(predictions / "begun" / "predictions.csv.job-journal", days=31)
    _write(predictions / "begun" / "predictions.csv.job", days=0)

    cleaning = _clean(place)

    assert {entry.path for entry in cleaning.removed} == {str(path) for path in (stale, dead[0].parent, half)}
    assert not stale.exists()
    assert fresh.is_file()
    assert runs_on.is_file()
    assert all(path.is_file() for path in table)
    assert not dead[0].parent.exists()
    assert not half.exists()


def test_a_long_log_of_a_server_that_runs_on_becomes_the_previous_log(place: Path) -> None:
    log = _write(place / "artifacts" / ".prefect" / "server.log", "x" * 5_000_001)
    with log.open("ab") as server:
        _clean(place)
        server.write(b"next")
    assert log.read_text() == "next"
    assert log.with_suffix(".log.1").stat().st_size == 5_000_001


def test_what_a_killed_process_was_removing_goes_the_next_time(place: Path) -> None:
    run = _add_run(place, 1, "manifest.json")
    _add_runs(place, 2)
    run.rename(run.with_name(".20260101T020000Z.0123456789abcdef"))
    assert _days_left(place) == [2]
    _clean(place)
    assert [path.name for path in (place / "artifacts" / "cats" / "runs").iterdir()] == ["20260102T020000Z"]


def test_a_damaged_history_stops_before_anything_is_removed(place: Path) -> None:
    _add_runs(place, 1, 2, 3)
    _write(place / "artifacts" / "cats" / "promotions.jsonl", "not json\n")
    with pytest.raises(RegistryError, match=r"promotions.jsonl is damaged: .*; fix or remove the line"):
        _clean(place, keep_runs=1)
    assert _days_left(place) == [1, 2, 3]


def test_removing_what_another_process_removes_is_no_error(tmp_path: Path) -> None:
    remove_path(tmp_path / "gone")


def _prune(place: Path, *arguments: str) -> tuple[int, str]:
    folders = ["--artifacts", str(place / "artifacts"), "--data", str(place / "data")]
    result = CliRunner().invoke(app, ["models", "prune", *arguments, *folders])
    return result.exit_code, result.output


def test_prune_lists_what_would_go_and_its_dry_run_removes_nothing(place: Path) -> None:
    _add_runs(place, 1, 2)
    old = _add_prepared(place, 1, 9)
    for number in (2, 3):
        _add_prepared(place, number, 1)
    leftover = place / "artifacts" / "cats" / "runs" / ".20251231T020000Z.0123456789abcdef"
    leftover.mkdir()

    status, output = _prune(place, "--keep-runs", "1", "--dry-run")

    lines = output.splitlines()
    assert status == 0
    assert [line.split()[0] for line in lines] == ["run", "run", "prepared", "would"]
    assert lines[2] == f"prepared dataset  0.0 MB  {old}"
    assert lines[-1].startswith("would remove 2 runs 0.0 MB, 1 prepared dataset 0.0 MB; in use: 1 run 0.0 MB, ")
    assert _days_left(place) == [1, 2]
    assert leftover.is_dir()
    assert old.is_dir()

    status, output = _prune(place, "cats", "--keep-runs", "1", "--json")

    values = json.loads(output.splitlines()[-1])
    assert (status, values["status"], values["dry_run"]) == (0, "ok", False)
    assert values["freed_bytes"] == sum(entry["bytes"] for entry in values["removed"]) == 1004
    assert _days_left(place) == [2]
    assert not leftover.exists()
    assert not old.exists()


def test_prune_of_an_unknown_name_says_which_there_are(place: Path) -> None:
    _add_runs(place, 1)
    status, output = _prune(place, "dogs")
    assert status == 1
    assert "error: nothing of dogs in " in output
    assert "whose names are: cats; check the folders" in output


def test_a_command_that_meets_a_removed_run_says_so(place: Path) -> None:
    _add_runs(place, 1, 2)
    _promote(place, 1, 2)
    run = place / "artifacts" / "cats" / "runs" / "20260101T020000Z"
    shutil.rmtree(run)
    for model in (str(run), f"cats/{run.name}"):
        with pytest.raises(
            ModelError, match=r"there is no model .* any more, because old runs are removed; give a name"
        ):
            resolve_run(model, place / "artifacts")
    with pytest.raises(
        RegistryError, match=r"there is no run '20260101T020000Z' in .*, where old runs are removed; see"
    ):
        rollback(place / "artifacts", "cats", "")
