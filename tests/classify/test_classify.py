"""Classifying a folder: settings in, table and summary out."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_models import load_digits, write_digits

from cnnpipe.classify import run
from cnnpipe.classify.run import classify_folder
from cnnpipe.classify.summary import ClassificationSummary, check_failure_rate
from cnnpipe.errors import ConfigError, DatasetError, FailureBudgetError, ModelError, PredictionsError, StorageError
from cnnpipe.images.find import find_files
from cnnpipe.settings import ClassifySettings
from cnnpipe.storage import sha256_file

needs_bytes_in_names = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of 40 digits and 10 files that are no images."""
    folder = tmp_path / "images"
    write_digits(folder, range(40))
    for number in range(10):
        (folder / f"{number}.txt").write_text("no image")
    return folder


def classify(folder: Path, model: Path, artifacts: Path, **changes: Any) -> ClassificationSummary:
    values = {"folder": str(folder), "model": str(model), "max_failure_rate": 0.2, "device": "cpu"}
    summary = classify_folder(ClassifySettings.model_validate(values | changes), artifacts)
    check_failure_rate(summary)
    return summary


def read_csv(path: str | Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_one_row_for_every_file(images: Path, model: Path, tmp_path: Path) -> None:
    rows = read_csv(classify(images, model, tmp_path / "artifacts").table)
    assert [row["path"] for row in rows] == list(find_files(images))
    labels = load_digits()[1]
    classified = [row for row in rows if row["status"] == "ok"]
    correct = sum(row["label"] == f"digit {labels[int(Path(row['path']).stem)]}" for row in classified)
    assert correct >= 36
    assert len(classified) == 40


def test_default_output_is_a_new_folder_below_artifacts(images: Path, model: Path, tmp_path: Path) -> None:
    table = Path(classify(images, model, tmp_path / "artifacts").table)
    assert table.name == "predictions.csv"
    assert table.parent.parent == tmp_path / "artifacts" / "predictions"
    assert table.parent.name.startswith("images-2")
    assert sorted(path.name for path in table.parent.iterdir()) == ["predictions.csv", "predictions.csv.summary.json"]


def test_summary_says_what_was_done(images: Path, model: Path, tmp_path: Path) -> None:
    summary = classify(images, model, tmp_path, top_k=3, workers=1, batch_size=16)
    rows = read_csv(summary.table)
    assert (summary.found, summary.ok, summary.error) == (50, 40, 10)
    assert summary.failure_rate == 0.2
    assert summary.classes == Counter(row["label"] for row in rows if row["status"] == "ok")
    assert summary.error_kinds == {"not_an_image": 10}
    assert summary.first_errors[0].path == "0.txt"
    assert (summary.device, summary.provider) == ("cpu", "CPUExecutionProvider")
    assert (summary.batch_size, summary.workers, summary.top_k) == (16, 1, 3)
    assert (summary.precision, summary.precision_reason) == ("fp32", "that of the file given")
    assert "precision fp32: that of the file given" in summary.lines()
    assert (summary.model.name, summary.model.run_id) == ("tiny", "20260101T000000Z")
    assert summary.model.sha256 == sha256_file(model)
    assert {"cnnpipe", "numpy", "pillow"} <= set(summary.versions)
    assert summary.slowest_stage in ("list", "decode", "inference", "write")
    assert 0 < summary.seconds.start_up < summary.seconds.total
    assert summary.images_per_second > summary.images_per_second_with_start_up > 0
    assert summary.started <= summary.finished


def test_summary_file_is_the_summary(images: Path, model: Path, tmp_path: Path) -> None:
    summary = classify(images, model, tmp_path)
    written = json.loads(Path(f"{summary.table}.summary.json").read_text())
    assert written == json.loads(json.dumps(summary.to_json()))
    assert summary.lines()[-1] == summary.table
    assert "50 files: 40 classified, 10 failed (20.0%)" in summary.lines()


def test_three_formats_hold_the_same_table(images: Path, model: Path, tmp_path: Path) -> None:
    tables = [
        Path(classify(images, model, tmp_path, output=str(tmp_path / kind / f"t.{kind}"), top_k=2).table)
        for kind in ("csv", "jsonl", "parquet")
    ]
    from_csv = read_csv(tables[0])
    from_jsonl = [json.loads(line) for line in tables[1].read_text().splitlines()]
    from_parquet = pq.read_table(tables[2]).to_pylist()
    assert [{name: str(value or "") for name, value in row.items()} for row in from_jsonl] == from_csv
    for row, typed in zip(from_jsonl, from_parquet, strict=True):
        assert {**row, "probability": None, "probability_2": None} == {
            **typed,
            "probability": None,
            "probability_2": None,
        }
        assert row["probability"] is None or np.float32(row["probability"]) == np.float32(typed["probability"])


def test_too_many_failures_raise_after_everything_is_written(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with pytest.raises(FailureBudgetError, match=r"10 of 50 files failed, 20\.0% .* 0\.txt \(not_an_image\).*t\.csv"):
        classify(images, model, tmp_path, output=str(table), max_failure_rate=0.19)
    assert len(read_csv(table)) == 50
    assert json.loads((tmp_path / "t.csv.summary.json").read_text())["error"] == 10


def test_failure_rate_equal_to_the_limit_is_allowed(images: Path, model: Path, tmp_path: Path) -> None:
    summary = classify(images, model, tmp_path, max_failure_rate=0.2)
    with pytest.raises(FailureBudgetError):
        check_failure_rate(replace(summary, max_failure_rate=0.1999))


def test_folder_where_all_fail_is_past_any_budget_below_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").write_text("no image")
    with pytest.raises(FailureBudgetError, match="1 of 1 files failed"):
        classify(tmp_path / "images", model, tmp_path, max_failure_rate=0.99)
    assert classify(tmp_path / "images", model, tmp_path / "other", max_failure_rate=1.0).ok == 0


def test_existing_output_is_refused_before_any_work(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("precious")
    with pytest.raises(PredictionsError, match="exists; name another output"):
        classify(images, tmp_path / "no-such-model.onnx", tmp_path, output=str(table))
    assert table.read_text() == "precious"


def test_overwrite_replaces_the_table_and_its_summary(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    classify(images, model, tmp_path, output=str(table), batch_size=1)
    (images / "0.txt").unlink()
    classify(images, model, tmp_path, output=str(table), overwrite=True)
    assert len(read_csv(table)) == 49
    assert json.loads((tmp_path / "t.csv.summary.json").read_text())["found"] == 49


def test_summary_is_part_of_the_output(images: Path, model: Path, tmp_path: Path) -> None:
    summary = tmp_path / "t.csv.summary.json"
    summary.write_text('{"mine":1}')
    with pytest.raises(PredictionsError, match=r"t\.csv\.summary\.json exists; .*--overwrite"):
        classify(images, model, tmp_path, output=str(tmp_path / "t.csv"))
    assert summary.read_text() == '{"mine":1}'
    summary.unlink()
    summary.mkdir()
    with pytest.raises(PredictionsError, match=r"must be a file, received the folder .*t\.csv\.summary\.json"):
        classify(images, model, tmp_path, output=str(tmp_path / "t.csv"), overwrite=True)


def test_tables_of_one_folder_have_a_summary_each(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "summary.json").parent.mkdir()
    (out / "summary.json").write_text("mine")
    classify(images, model, tmp_path, output=str(out / "a.csv"))
    first = (out / "a.csv.summary.json").read_bytes()
    classify(images, model, tmp_path, output=str(out / "a.jsonl"))
    assert (out / "a.csv.summary.json").read_bytes() == first
    assert json.loads((out / "a.jsonl.summary.json").read_text())["table"] == str(out / "a.jsonl")
    names = ["a.csv", "a.csv.summary.json", "a.jsonl", "a.jsonl.summary.json", "summary.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "summary.json").read_text() == "mine"


@pytest.mark.parametrize("output", ["t.xlsx", "folder.csv", "n" * 300 + ".csv"])
def test_output_that_cannot_be_is_refused(images: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises((ValueError, PredictionsError, StorageError), match=r"must end in|must be a file|name too long"):
        classify(images, tmp_path / "no-such-model.onnx", tmp_path, output=str(tmp_path / output))


def test_own_summary_is_known_by_any_spelling_of_the_path(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    classify(images, model, tmp_path, output="t.csv")
    again = classify(images, model, tmp_path, output=str(tmp_path / "images" / ".." / "out" / "t.csv"), overwrite=True)
    assert again.found == 50


@needs_bytes_in_names
def test_summary_is_beside_a_table_whose_name_is_not_utf8(images: Path, model: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for overwrite in (False, True):
        classify(images, model, tmp_path, output=str(folder / "t.csv"), overwrite=overwrite)
        assert sorted(path.name for path in folder.iterdir()) == ["t.csv", "t.csv.summary.json"]


def test_output_that_another_process_is_writing_is_refused(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "t.csv"
    settings = ClassifySettings(folder=str(images), model=str(model), device="cpu", output=str(table))
    refused: list[str] = []

    def begin_another(*_: object) -> None:
        with pytest.raises(PredictionsError, match=r"another process is writing .*t\.csv; wait for it") as error:
            classify_folder(settings, tmp_path)
        refused.append(str(error.value))

    assert classify_folder(settings, tmp_path, progress=begin_another).found == 50
    assert refused
    assert sorted(path.name for path in table.parent.iterdir()) == ["t.csv", "t.csv.summary.json"]


def test_table_that_came_meanwhile_stays_until_it_may_be_replaced(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "t.csv"
    settings = ClassifySettings(folder=str(images), model=str(model), device="cpu", output=str(table))

    def write_theirs(*_: object) -> None:
        table.write_text("theirs")

    with pytest.raises(PredictionsError, match=r"t\.csv was written by another process meanwhile and stays"):
        classify_folder(settings, tmp_path, progress=write_theirs)
    assert table.read_text() == "theirs"
    summary = classify_folder(settings.model_copy(update={"overwrite": True}), tmp_path)
    assert summary.resumed == summary.found == len(read_csv(table)) == 50


def test_default_outputs_of_the_same_second_are_different_folders(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "datetime", SameSecond)
    names = {Path(classify(images, model, tmp_path).table).parent.name for _ in range(3)}
    assert names == {"images-20260102T030405Z", "images-20260102T030405Z-2", "images-20260102T030405Z-3"}


class SameSecond(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> SameSecond:
        return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)


@pytest.mark.parametrize("name", ["n" * 250, "ü" * 125])
def test_default_output_of_a_long_name_is_shortened(model: Path, tmp_path: Path, name: str) -> None:
    write_digits(tmp_path / name, [0])
    folder = Path(classify(tmp_path / name, model, tmp_path).table).parent.name
    assert folder.startswith(name[:1] * 50)
    assert len(folder.rpartition("-")[0].encode()) == 100


def test_classification_that_is_stopped_leaves_no_default_output(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    settings = ClassifySettings(folder=str(images), model=str(model), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        classify_folder(settings, tmp_path / "artifacts", progress=interrupt)
    assert list((tmp_path / "artifacts" / "predictions").iterdir()) == []


def test_error_of_the_progress_display_is_not_called_one_of_the_table(
    images: Path, model: Path, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionResetError("the terminal is gone")

    settings = ClassifySettings(folder=str(images), model=str(model), device="cpu")
    with pytest.raises(ConnectionResetError, match="the terminal is gone"):
        classify_folder(settings, tmp_path, progress=fail)


def test_own_output_in_the_folder_is_not_classified(images: Path, model: Path, tmp_path: Path) -> None:
    summary = classify(images, model, images / "zz", output=str(images / "zz" / "out" / "t.csv"))
    assert summary.found == 50
    again = classify(images, model, images / "zz", output=str(images / "zz" / "new" / "t.csv"), max_failure_rate=1)
    assert (again.found, again.passed_over) == (50, 2)  # the first table and its summary


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("missing", "it does not exist"), ("images/0.txt", "it is a file"), ("empty", "no files in .*empty")],
)
def test_folder_without_files_is_refused(images: Path, model: Path, tmp_path: Path, folder: str, problem: str) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(DatasetError, match=problem):
        classify(tmp_path / folder, model, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


def test_refused_settings_leave_nothing_behind(images: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k must be at most 10"):
        classify(images, model, tmp_path / "artifacts", top_k=11)
    with pytest.raises(ModelError, match="no model file at"):
        classify(images, tmp_path / "none.onnx", tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_clear_error(images: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        classify(images, model, tmp_path, output=str(tmp_path / "file" / "t.csv"))


def test_progress_counts_up_to_all_files(images: Path, model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = ClassifySettings(folder=str(images), model=str(model), device="cpu", max_failure_rate=0)
    classify_folder(settings, tmp_path, progress=lambda *args: seen.append(args))
    assert seen[-1][:2] == ("classify: 10 failed", 50)
    assert {total for _, _, total in seen} <= {0, 50}  # unknown until they are counted
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@needs_bytes_in_names
def test_names_of_any_bytes_get_their_row(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    [path] = write_digits(folder, [0])
    os.rename(os.fsencode(folder / path), os.path.join(os.fsencode(folder), b"a\nb\xff\r.png"))
    [row, *others] = read_csv(classify(folder, model, tmp_path).table)
    assert not others
    assert (row["path"], row["status"], row["label"]) == ("a\nb\\xff\r.png", "ok", "digit 0")
