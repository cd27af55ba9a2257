"""An interrupted classification is resumed: whatever the moment, the table gets the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny_models import model_info, write_digits, write_model

from cnnpipe.classify import run
from cnnpipe.classify.run import classify_folder
from cnnpipe.errors import ConfigError, DatasetError, PredictionsError, StorageError
from cnnpipe.session import ClassifierSession
from cnnpipe.settings import ClassifySettings

SHARD_SIZE = 16
NUM_FILES = 75
SUFFIXES = (".csv", ".jsonl", ".parquet")

# Kills itself at the n-th call that touches the disk; 0 prints how many there are.
DRIVER = """
import os, signal, sqlite3, sys
from pathlib import Path
from cnnpipe.settings import ClassifySettings
from cnnpipe.classify.run import classify_folder

last, touched = int(sys.argv[1]), 0

def counted(function):
    def call(*args, **options):
        global touched
        touched += 1
        if touched == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

for name in ("fsync", "replace", "link", "unlink", "rmdir", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))

class Connection(sqlite3.Connection):
    execute = counted(sqlite3.Connection.execute)
    executemany = counted(sqlite3.Connection.executemany)
    executescript = counted(sqlite3.Connection.executescript)

connect = sqlite3.connect
# The handler comes in the middle of statements: every so many steps of SQLite's machine.
def connect_counted(*args, **options):
    connection = connect(*args, **options, factory=Connection)
    connection.set_progress_handler(counted(lambda: 0), 150)
    return connection
sqlite3.connect = connect_counted
summary = classify_folder(ClassifySettings.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
print(touched, summary.found, summary.resumed)
"""


@pytest.fixture
def own_images(images: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder, to change at will."""
    return Path(shutil.copytree(images, tmp_path / "images"))


def settings_for(images: Path, model: Path, output: Path | None, **changes: Any) -> ClassifySettings:
    values = {"folder": str(images), "model": str(model), "device": "cpu", "workers": 1, "shard_size": SHARD_SIZE}
    return ClassifySettings.model_validate(values | {"output": str(output) if output else None} | changes)


class Stopped(Exception):  # noqa: N818  no error: a stand-in for whatever ends a classification
    pass


def stop_after(settings: ClassifySettings, artifacts: Path, num_files: int) -> None:
    """Classify, and stop after some files."""

    def stop(_: str, done: int, __: int) -> None:
        if done >= num_files:
            raise Stopped

    with pytest.raises(Stopped):
        classify_folder(settings, artifacts, progress=stop)


def summary_of(table: Path) -> Path:
    return table.with_name(f"{table.name}.summary.json")


def content(table: Path) -> bytes:
    assert summary_of(table).is_file()
    assert not list(table.parent.glob(f"{table.name}.job*"))
    return table.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of the tables that were made without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for suffix in SUFFIXES:
        classify_folder(settings_for(images, model, folder / suffix[1:] / f"t{suffix}"), folder)
    return {suffix: content(folder / suffix[1:] / f"t{suffix}") for suffix in SUFFIXES}


def drive(settings: ClassifySettings, artifacts: Path, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, str(kill_at), settings.model_dump_json(), str(artifacts)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def some_of(touches: int, number: int) -> list[int]:
    """Return moments for the default suite: the same number of them in each run, but others each time."""
    seed = random.randrange(10**6)
    moments = sorted(random.Random(seed).sample(range(1, touches + 1), number))
    print(f"killed at touches {moments} of {touches}, drawn with seed {seed}")  # noqa: T201  shown if it fails
    return moments


def check_kills(
    images: Path, model: Path, tmp_path: Path, expected: bytes, suffix: str, moments: Iterable[int]
) -> None:
    for moment in moments:
        table = tmp_path / f"{moment}" / f"t{suffix}"
        settings = settings_for(images, model, table)
        assert drive(settings, tmp_path, moment).returncode == -signal.SIGKILL
        complete = not list(table.parent.glob("*.job")) and summary_of(table).exists()
        again = drive(settings, tmp_path)
        assert again.returncode == 0 or (complete and "exists; name another" in again.stderr), again.stderr
        assert content(table) == expected, f"killed at touch {moment}"


def count_touches(images: Path, model: Path, tmp_path: Path, suffix: str) -> int:
    touches = int(drive(settings_for(images, model, tmp_path / f"t{suffix}"), tmp_path).stdout.split()[0])
    assert touches > 25
    return touches


def test_killed_at_some_moments_it_ends_with_the_same_bytes(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    suffix = random.choice(SUFFIXES)
    moments = some_of(count_touches(images, model, tmp_path, suffix), 4)
    check_kills(images, model, tmp_path, uninterrupted[suffix], suffix, moments)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_killed_at_every_touch_of_the_disk_it_ends_with_the_same_bytes(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes], suffix: str
) -> None:
    moments = range(1, count_touches(images, model, tmp_path, suffix) + 1)
    check_kills(images, model, tmp_path, uninterrupted[suffix], suffix, moments)


def check_kills_while_replacing(images: Path, model: Path, tmp_path: Path, mode: str, number: int | None) -> None:
    """Kill the update of a table at some moments, or at all.

    Args:
        number: of the moments.
    """
    notes = [images / f"{folder}" / "notes.txt" for folder in range(3)]
    digit = next(images.glob("0/*.png")).read_bytes()

    def make_and_fix(folder: Path) -> ClassifySettings:
        """Make a table, fix some of the files that failed, and return the settings to replace it."""
        for each in notes:
            each.write_text("no image")
        first = settings_for(images, model, folder / "t.csv", shard_size=30)
        classify_folder(first, tmp_path)
        for each in notes:
            each.write_bytes(digit)
        beside = {"report": str(folder / "report.html"), "sort_into": str(folder / "sorted")}
        return first.model_copy(update={mode: True, **beside})

    settings = make_and_fix(tmp_path / "whole")
    before = (tmp_path / "whole" / "t.csv").read_bytes()
    touches = int(drive(settings, tmp_path).stdout.split()[0])
    expected = content(tmp_path / "whole" / "t.csv")
    assert expected != before
    for moment in some_of(touches, number) if number else range(1, touches + 1):
        folder = tmp_path / f"{moment}"
        settings = make_and_fix(folder)
        assert drive(settings, tmp_path, moment).returncode == -signal.SIGKILL
        again = drive(settings, tmp_path)
        assert again.returncode == 0, f"killed at touch {moment}: {again.stderr}"
        assert content(folder / "t.csv") == expected, f"killed at touch {moment}"
        assert (folder / "report.html").is_file()


def test_killed_at_some_moments_while_a_table_is_replaced_it_ends_with_the_same_bytes(
    own_images: Path, model: Path, tmp_path: Path
) -> None:
    mode = random.choice(("retry_failed", "incremental", "overwrite"))
    check_kills_while_replacing(own_images, model, tmp_path, mode, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["retry_failed", "incremental", "overwrite"])
def test_killed_at_every_touch_of_the_disk_while_a_table_is_replaced_it_ends_with_the_same_bytes(
    own_images: Path, model: Path, tmp_path: Path, mode: str
) -> None:
    check_kills_while_replacing(own_images, model, tmp_path, mode, None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    moments = random.Random(0)
    killed = 0
    for number in range(200):
        suffix = SUFFIXES[number % len(SUFFIXES)]
        table = tmp_path / f"{number}" / f"t{suffix}"
        command = [sys.executable, "-m", "cnnpipe.cli", "classify", str(images), "--model", str(model)]
        command += ["--output", str(table), "--shard-size", "4", "--workers", "2", "--device", "cpu"]
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                _, errors = process.communicate(timeout=moments.uniform(0.2, 1.2))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                continue
            complete = summary_of(table).exists()
            assert process.returncode == 0 or (complete and b"exists; name another" in errors), errors
            break
        with_other_shards = settings_for(images, model, tmp_path / f"{number}-whole" / f"t{suffix}", shard_size=4)
        classify_folder(with_other_shards, tmp_path)
        assert content(table) == content(Path(with_other_shards.output or ""))
        if killed >= 60:
            break
    assert killed >= 60


def test_rows_of_an_interrupted_attempt_are_not_made_again(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    settings = settings_for(images, model, tmp_path / "t.csv")
    stop_after(settings, tmp_path, 3 * SHARD_SIZE)
    assert not (tmp_path / "t.csv").exists()
    summary = classify_folder(settings, tmp_path)
    assert summary.resumed >= 2 * SHARD_SIZE
    assert summary.resumed % SHARD_SIZE == 0
    assert summary.found == NUM_FILES
    assert any("from an interrupted attempt" in line for line in summary.lines())
    assert content(tmp_path / "t.csv") == uninterrupted[".csv"]


def test_without_an_output_the_same_command_goes_on_in_the_folder_it_began(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    settings = settings_for(images, model, None)
    stop_after(settings, tmp_path, 3 * SHARD_SIZE)
    [begun] = (tmp_path / "predictions").iterdir()
    summary = classify_folder(settings, tmp_path)
    assert summary.resumed > 0
    assert Path(summary.table).parent == begun
    assert content(Path(summary.table)) == uninterrupted[".csv"]
    assert Path(classify_folder(settings, tmp_path).table).parent != begun


def test_without_an_output_a_half_done_table_of_other_settings_is_mentioned_and_stays(
    images: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cnnpipe")
    stop_after(settings_for(images, model, None), tmp_path, 3 * SHARD_SIZE)
    [begun] = (tmp_path / "predictions").iterdir()
    summary = classify_folder(settings_for(images, model, None, top_k=2), tmp_path)
    assert summary.resumed == 0
    assert f"{begun.name}/predictions.csv.job holds a classification of this folder" in caplog.text
    assert "interrupted, with top_k 1, now 2" in caplog.text
    assert classify_folder(settings_for(images, model, None), tmp_path).resumed > 0


def test_other_settings_are_never_mixed_into_a_half_done_table(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    stop_after(settings_for(images, model, table), tmp_path, 3 * SHARD_SIZE)
    others: list[tuple[dict[str, Any], str]] = [
        ({"top_k": 2}, "with top_k 1; now it is 2"),
        ({"shard_size": 8}, "with shard_size 16; now it is 8"),
        ({"batch_size": 7}, "with batch_size 16; now it is 7"),
        ({"include": ["*.png"]}, r"with include \(\); now it is \('\*\.png',\)"),
        ({"safe_csv": True}, "with safe_csv False; now it is True"),
    ]
    for changes, told in others:
        with pytest.raises(PredictionsError, match=rf"t\.csv\.job holds a classification that was interrupted, {told}"):
            classify_folder(settings_for(images, model, table, **changes), tmp_path)
    assert classify_folder(settings_for(images, model, table), tmp_path).resumed > 0


@pytest.mark.parametrize("name", ["t.csv", None])
def test_a_job_keeps_the_batch_size_that_it_began_with_where_none_is_asked_for(
    images: Path, model: Path, tmp_path: Path, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(images, model, tmp_path / name if name else None)
    stop_after(settings, tmp_path, 3 * SHARD_SIZE)
    monkeypatch.setattr(ClassifierSession, "default_batch_size", 5)  # as when less memory of a GPU is free than before
    summary = classify_folder(settings, tmp_path)
    assert summary.resumed > 0
    assert summary.batch_size == SHARD_SIZE  # all that a batch of 32 can have
    assert classify_folder(settings_for(images, model, tmp_path / "new.csv"), tmp_path).batch_size == 5


def test_another_model_is_never_mixed_in_and_overwrite_starts_over(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    other = write_model(tmp_path / "other.onnx", model_info(run_id="20260202T000000Z"))
    table = tmp_path / "out" / "t.csv"
    stop_after(settings_for(images, other, table), tmp_path, 3 * SHARD_SIZE)
    with pytest.raises(PredictionsError, match="with model 'tiny/20260202T000000Z'; now it is 'tiny/20260101T000000Z'"):
        classify_folder(settings_for(images, model, table), tmp_path)
    summary = classify_folder(settings_for(images, model, table, overwrite=True), tmp_path)
    assert summary.resumed == 0
    assert content(table) == uninterrupted[".csv"]


def test_overwrite_goes_on_with_what_was_begun_in_the_same_way(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("the old one")
    settings = settings_for(images, model, table, overwrite=True)
    stop_after(settings, tmp_path, 3 * SHARD_SIZE)
    assert table.read_text() == "the old one"
    assert classify_folder(settings, tmp_path).resumed > 0
    assert content(table) == uninterrupted[".csv"]


def test_files_that_came_or_went_before_the_break_do_not_shift_the_rest(
    own_images: Path, model: Path, tmp_path: Path
) -> None:
    settings = settings_for(own_images, model, tmp_path / "t.csv")
    whole = classify_folder(settings_for(own_images, model, tmp_path / "whole" / "t.csv"), tmp_path)
    stop_after(settings, tmp_path, 3 * SHARD_SIZE)
    (own_images / "0" / "0000.png").rename(own_images / "0" / "00000.png")
    summary = classify_folder(settings, tmp_path)
    assert summary.found == whole.found
    assert content(tmp_path / "t.csv") == content(tmp_path / "whole" / "t.csv")


def test_an_interrupted_job_is_dropped_where_it_is_not_to_be_resumed(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    table = tmp_path / "t.csv"
    for half_done in ({}, {"top_k": 2}):
        stop_after(settings_for(images, model, table, **half_done), tmp_path, 3 * SHARD_SIZE)
        assert classify_folder(settings_for(images, model, table, resume=False), tmp_path).resumed == 0
        assert content(table) == uninterrupted[".csv"]
        assert not (tmp_path / "t.csv.job").exists()
        table.unlink()
        (tmp_path / "t.csv.summary.json").unlink()
    stop_after(settings_for(images, model, None), tmp_path, 3 * SHARD_SIZE)
    assert classify_folder(settings_for(images, model, None, resume=False), tmp_path).resumed == 0


def test_trying_nothing_again_and_failing_after_it_keeps_what_tells_of_the_table(
    images: Path, model: Path, tmp_path: Path
) -> None:
    good, table = Path(shutil.copytree(images, tmp_path / "good")), tmp_path / "t.csv"
    for note in good.rglob("*.txt"):
        note.unlink()
    classify_folder(settings_for(good, model, table), tmp_path)
    (tmp_path / "file").write_text("in the way")
    sorting = settings_for(good, model, table, retry_failed=True, sort_into=str(tmp_path / "file" / "sorted"))
    with pytest.raises(StorageError):
        classify_folder(sorting, tmp_path)
    assert classify_folder(settings_for(good, model, table, retry_failed=True), tmp_path).found == 70
    assert json.loads((tmp_path / "t.csv.summary.json").read_text())["ok"] == 70
    assert not (tmp_path / "t.csv.job").exists()


def test_attempt_that_did_nothing_leaves_nothing(images: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no file is left of"):
        classify_folder(settings_for(images, model, tmp_path / "t.csv", include=["*.jpg"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_list_of_files_goes_on_where_it_was(images: Path, model: Path, tmp_path: Path) -> None:
    paths = [f"{path.parent.name}/{path.name}" for path in sorted(images.rglob("*.png"), reverse=True)]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(paths))
    out = tmp_path / "out"
    settings = settings_for(images, model, out / "t.csv", files=str(listed))
    stop_after(settings, tmp_path, 3 * SHARD_SIZE)
    listed.write_text("\n".join(["4/other.png", *paths]))
    with pytest.raises(PredictionsError, match=r"the list of files has changed: number .* start over with --no-resume"):
        classify_folder(settings, tmp_path)
    afresh = settings_for(images, model, tmp_path / "afresh" / "t.csv", files=str(listed), resume=False)
    shutil.copytree(out, tmp_path / "afresh")
    assert classify_folder(afresh, tmp_path).resumed == 0
    listed.write_text("\n".join(paths))
    assert classify_folder(settings, tmp_path).resumed > 0
    assert [row.split(",")[0] for row in (out / "t.csv").read_text().splitlines()[1:]] == paths


def read_rows(table: Path) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in map(json.loads, table.read_text().splitlines())}


def test_retry_failed_does_only_the_rows_that_failed(own_images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    classify_folder(settings_for(own_images, model, table), tmp_path)
    before = read_rows(table)
    shutil.copy(next(own_images.glob("0/*.png")), own_images / "1" / "notes.txt")
    changed = next(own_images.glob("2/*.png"))
    changed.write_text("not looked at again")
    summary = classify_folder(settings_for(own_images, model, table, retry_failed=True), tmp_path)
    after = read_rows(table)
    assert list(after) == list(before)
    assert {path for path in after if after[path] != before[path]} == {"1/notes.txt"}
    assert (summary.found, summary.ok, summary.error) == (NUM_FILES, NUM_FILES - 4, 4)
    assert content(table)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_retry_failed_finds_names_that_are_not_utf8(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    [path] = write_digits(folder, [0])
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    odd.write_text("no image")
    table = tmp_path / "out" / "t.jsonl"
    classify_folder(settings_for(folder, model, table), tmp_path)
    shutil.copy(folder / path, odd)
    assert classify_folder(settings_for(folder, model, table, retry_failed=True), tmp_path).error == 0
    assert {path: row["status"] for path, row in read_rows(table).items()} == {path: "ok", "caf\\xe9.png": "ok"}


def test_retry_failed_that_is_interrupted_goes_on(own_images: Path, model: Path, tmp_path: Path) -> None:
    for number in range(3 * SHARD_SIZE):
        (own_images / f"x{number:02}.png").write_text("no image yet")
    table, whole = tmp_path / "a" / "t.csv", tmp_path / "b" / "t.csv"
    for each in (table, whole):
        classify_folder(settings_for(own_images, model, each), tmp_path)
    digit = next(own_images.glob("0/*.png")).read_bytes()
    for path in own_images.glob("x*.png"):
        path.write_bytes(digit)
    classify_folder(settings_for(own_images, model, whole, retry_failed=True), tmp_path)
    before = table.read_bytes()
    settings = settings_for(own_images, model, table, retry_failed=True)
    stop_after(settings, tmp_path, 2 * SHARD_SIZE)
    assert table.read_bytes() == before
    assert classify_folder(settings, tmp_path).resumed > 0
    assert content(table) == content(whole)


def test_retry_failed_needs_the_table_and_its_model(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "t.csv"
    with pytest.raises(PredictionsError, match=r"there is no table .*t\.csv to try again"):
        classify_folder(settings_for(images, model, table, retry_failed=True), tmp_path)
    classify_folder(settings_for(images, model, table), tmp_path)
    other = write_model(tmp_path / "other.onnx", model_info(run_id="20260202T000000Z"))
    with pytest.raises(PredictionsError, match=r"were made with the model tiny/20260101T000000Z .*--overwrite"):
        classify_folder(settings_for(images, other, table, retry_failed=True), tmp_path)
    summary_of(table).unlink()
    with pytest.raises(PredictionsError, match=r"has no t\.csv\.summary\.json beside it"):
        classify_folder(settings_for(images, model, table, retry_failed=True), tmp_path)


@pytest.mark.parametrize("changes", [{"retry_failed": True}, {"incremental": True}])
def test_bringing_up_to_date_needs_a_table(images: Path, model: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs output: name the table to update"):
        settings_for(images, model, None, **changes)


def test_incremental_classifies_what_is_new_or_changed_and_drops_what_is_gone(
    own_images: Path, model: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t.jsonl"
    incremental = settings_for(own_images, model, table, incremental=True)
    first = classify_folder(incremental, tmp_path)
    assert (first.unchanged, first.found) == (0, NUM_FILES)
    before = read_rows(table)
    zero, one = next(own_images.glob("0/*.png")), next(own_images.glob("1/*.png"))
    (own_images / "2" / "new.png").write_bytes(zero.read_bytes())
    one.write_bytes(zero.read_bytes())
    gone = next(own_images.glob("3/*.png"))
    gone.unlink()
    summary = classify_folder(incremental, tmp_path)
    assert (summary.found, summary.error) == (NUM_FILES, 5)
    assert summary.unchanged == NUM_FILES - 5 - 2
    classify_folder(settings_for(own_images, model, tmp_path / "whole" / "t.jsonl"), tmp_path)
    rows, whole = read_rows(table), read_rows(tmp_path / "whole" / "t.jsonl")
    assert [(path, row["label"]) for path, row in rows.items()] == [(path, row["label"]) for path, row in whole.items()]
    kept = set(before) - {f"1/{one.name}", f"3/{gone.name}"}
    assert all(rows[path] == before[path] for path in kept)


def test_an_update_that_found_no_file_keeps_the_table_and_is_in_nobodys_way(
    own_images: Path, model: Path, tmp_path: Path
) -> None:
    settings = settings_for(own_images, model, tmp_path / "out" / "t.csv", incremental=True)
    classify_folder(settings, tmp_path)
    before = content(tmp_path / "out" / "t.csv")
    own_images.rename(tmp_path / "away")
    listed = tmp_path / "list.txt"
    listed.write_text("")
    own_images.mkdir()
    with pytest.raises(DatasetError, match="no file is left of"):
        classify_folder(settings.model_copy(update={"files": str(listed)}), tmp_path)
    assert content(tmp_path / "out" / "t.csv") == before
    own_images.rmdir()
    (tmp_path / "away").rename(own_images)
    assert classify_folder(settings, tmp_path).unchanged == NUM_FILES - 5


def test_a_table_whose_folder_was_renamed_is_brought_up_to_date(images: Path, model: Path, tmp_path: Path) -> None:
    classify_folder(settings_for(images, model, tmp_path / "out" / "t.csv"), tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    summary = classify_folder(settings_for(images, model, tmp_path / "moved" / "t.csv", incremental=True), tmp_path)
    assert summary.unchanged == NUM_FILES - 5
    assert json.loads((tmp_path / "moved" / "t.csv.summary.json").read_text())["table"] == str(
        tmp_path / "moved" / "t.csv"
    )


def test_a_summary_that_does_not_name_the_model_is_one_of_another_version(
    images: Path, model: Path, tmp_path: Path
) -> None:
    settings = settings_for(images, model, tmp_path / "t.csv", incremental=True)
    classify_folder(settings, tmp_path)
    summary = tmp_path / "t.csv.summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "model": {"name": "tiny"}}))
    with pytest.raises(PredictionsError, match=r"the summary of .*t\.csv .*another version.*--overwrite"):
        classify_folder(settings, tmp_path)


def test_incremental_with_another_model_classifies_everything_again(
    images: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "out" / "t.csv"
    classify_folder(settings_for(images, model, table), tmp_path)
    other = write_model(tmp_path / "other.onnx", model_info(run_id="20260202T000000Z"))
    summary = classify_folder(settings_for(images, other, table, incremental=True), tmp_path)
    assert summary.unchanged == 0
    assert "every file is classified again" in caplog.text
    assert table.read_text().count("tiny/20260202T000000Z") == NUM_FILES


def test_too_many_classes_are_refused_before_anything_is_written(images: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k must be at most 10"):
        classify_folder(settings_for(images, model, tmp_path / "out" / "t.csv", top_k=11), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["retry_failed", "incremental"])
def test_interrupted_just_before_it_replaces_the_previous_table_it_goes_on(
    own_images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    table = tmp_path / "t.csv"
    classify_folder(settings_for(own_images, model, table), tmp_path)
    shutil.copyfile(next(own_images.rglob("*.png")), own_images / "0" / "notes.txt")
    settings = settings_for(own_images, model, table, **{mode: True})
    interrupt(monkeypatch, settings, tmp_path, run, "move_file")
    assert not (tmp_path / "t.csv.summary.json").exists()
    summary = classify_folder(settings, tmp_path)
    assert (summary.found, summary.error) == (NUM_FILES, 4)
    expected = tmp_path / "again" / "t.csv"
    classify_folder(settings_for(own_images, model, expected), tmp_path)
    assert content(table) == content(expected)


def test_retrying_never_starts_over_without_the_rows_that_it_keeps(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    table = tmp_path / "t.csv"
    settings = settings_for(images, model, table)
    interrupt(monkeypatch, settings, tmp_path, run, "write_summary")
    with pytest.raises(PredictionsError, match=r"t\.csv has no t\.csv\.summary\.json beside it"):
        classify_folder(settings_for(images, model, table, retry_failed=True, overwrite=True), tmp_path)
    assert classify_folder(settings, tmp_path).resumed == NUM_FILES
    assert content(table) == uninterrupted[".csv"]


def test_without_an_output_it_goes_on_although_its_report_is_there(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(images, model, None, report=str(tmp_path / "r.html"))
    interrupt(monkeypatch, settings, tmp_path, run, "write_summary")
    assert (tmp_path / "r.html").exists()
    assert classify_folder(settings, tmp_path).resumed == NUM_FILES


def interrupt(
    monkeypatch: pytest.MonkeyPatch, settings: ClassifySettings, artifacts: Path, place: Any, name: str
) -> None:
    """Classify, and stop when it comes to a function."""

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stop)
        with pytest.raises(Stopped):
            classify_folder(settings, artifacts)


def test_retry_failed_of_another_folder_is_refused(own_images: Path, images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "t.csv"
    classify_folder(settings_for(own_images, model, table), tmp_path)
    before = table.read_bytes()
    with pytest.raises(PredictionsError, match=r"were made with the folder .*--overwrite in place of --retry-failed"):
        classify_folder(settings_for(images, model, table, retry_failed=True), tmp_path)
    assert table.read_bytes() == before


def test_rows_of_another_version_are_not_dropped_unasked(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "t.csv"
    settings = settings_for(images, model, table)
    for change in ("UPDATE job SET settings = '{\"new\": 1}'", "PRAGMA user_version = 99", "DROP TABLE job"):
        stop_after(settings, tmp_path, 3 * SHARD_SIZE)
        with closing(sqlite3.connect(f"{table}.job", isolation_level=None)) as database:
            database.execute(change)
        before = Path(f"{table}.job").read_bytes()
        with pytest.raises(PredictionsError, match="a classification that another version of cnnpipe began"):
            classify_folder(settings, tmp_path)
        assert Path(f"{table}.job").read_bytes() == before
        summary = classify_folder(settings.model_copy(update={"overwrite": True}), tmp_path)
        assert (summary.found, summary.resumed) == (NUM_FILES, 0)
        table.unlink()
        summary_of(table).unlink()


@pytest.mark.parametrize(("kind", "overwrite"), [("folder", True), ("text", True), ("database", True), ("text", False)])
def test_a_job_file_that_is_something_else_is_one_clear_line_and_stays(
    images: Path, model: Path, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    job = tmp_path / "out" / "t.csv.job"
    job.parent.mkdir()
    if kind == "folder":
        job.mkdir()
    elif kind == "text":
        job.write_text("a job of somebody else" * 100)
    else:
        with closing(sqlite3.connect(job)) as database:
            database.execute("CREATE TABLE files (name)")
            database.commit()
    told = {"folder": "is a folder, not a job file", "text": "is not a job file", "database": "of another program"}
    with pytest.raises(PredictionsError, match=rf"t\.csv\.job is .*{told[kind][3:]}.*; rename or remove it"):
        classify_folder(settings_for(images, model, tmp_path / "out" / "t.csv", overwrite=overwrite), tmp_path)
    assert [path.name for path in job.parent.iterdir()] == ["t.csv.job"]
    assert job.is_dir() or job.stat().st_size > 1000


def test_a_disk_that_takes_no_more_is_one_line_and_the_rows_that_are_there_are_kept(
    images: Path, model: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    settings = settings_for(images, model, tmp_path / "t.csv", shard_size=SHARD_SIZE)
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from cnnpipe.settings import ClassifySettings; from cnnpipe.classify.run import classify_folder\n"
        "from cnnpipe.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))\n"
        "try: classify_folder(ClassifySettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "except StorageError as error: print(error)\n"
    )
    for limit in (10_000, 25_000):  # too little for the tables; and for some shards
        command = [sys.executable, "-c", program, settings.model_dump_json(), str(tmp_path), str(limit)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ended.stdout.startswith(f"cannot write {tmp_path / 't.csv.job'}: "), ended.stderr
        assert ended.stdout.count("\n") == 1
        assert "check the folder, its permissions and the disk" in ended.stdout or "free some" in ended.stdout
    assert classify_folder(settings, tmp_path).resumed > 0
    assert content(tmp_path / "t.csv") == uninterrupted[".csv"]


def test_rows_of_several_classes_survive_a_stop_in_every_format(images: Path, model: Path, tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        table, whole = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        stop_after(settings_for(images, model, table, top_k=3), tmp_path, 3 * SHARD_SIZE)
        assert classify_folder(settings_for(images, model, table, top_k=3), tmp_path).resumed > 0
        classify_folder(settings_for(images, model, whole, top_k=3), tmp_path)
        assert content(table) == content(whole)
        classify_folder(settings_for(images, model, table, top_k=3, incremental=True), tmp_path)
        assert content(table) == content(whole)
        classify_folder(settings_for(images, model, table, top_k=3, retry_failed=True), tmp_path)
        assert content(table) == content(whole)
