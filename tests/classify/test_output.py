"""Where the table goes: never over anything that was not offered, and found again when it was broken off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cnnpipe.classify.output import check_output
from cnnpipe.errors import PredictionsError, StorageError


def test_summary_is_part_of_the_output(tmp_path: Path) -> None:
    table, summary = tmp_path / "t.csv", tmp_path / "summary.json"
    summary.write_text(json.dumps({"table": str(table)}))
    with pytest.raises(PredictionsError, match=r"summary\.json is there already; .*--overwrite"):
        check_output(table, replace=False)
    check_output(table, replace=True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '"table"',
        "{}",
        '{"mine":1}',
        '{"table": 7}',
        '{"table": "u.csv"}',
        '{"table": "/t.csv"}',
        '{"table": "/"}',
        '{"table": "summary.json"}',
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_summary_of_anything_else_is_refused(tmp_path: Path, content: str, overwrite: bool) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(PredictionsError, match=r"summary\.json is no summary of ours; choose another folder"):
        check_output(tmp_path / "t.csv", replace=overwrite)


def test_folder_called_like_the_summary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(PredictionsError, match="choose another folder for --output"):
        check_output(tmp_path / "t.csv", replace=True)


def test_output_of_an_impossible_name_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*: File name too long"):
        check_output(tmp_path / ("n" * 300 + ".csv"), replace=False)


def test_output_that_cannot_be_is_refused(tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.touch()
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(PredictionsError, match=r"there\.csv is there already; .*--overwrite"):
        check_output(there, replace=False)
    with pytest.raises(PredictionsError, match=r"must end in \.csv, \.jsonl, \.parquet, received .*t\.xlsx"):
        check_output(tmp_path / "t.xlsx", replace=False)
    with pytest.raises(PredictionsError, match="must be a file, received the folder"):
        check_output(tmp_path / "folder.csv", replace=True)
    check_output(there, replace=True)
    check_output(tmp_path / "new" / "t.csv", replace=False)
