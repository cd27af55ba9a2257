"""`cnnpipe classify` as a user types it: which files, how the table comes, what lies beside it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_digits

Completed = subprocess.CompletedProcess[str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of 30 digits, two of them once more in a folder of their own, and a text file."""
    folder = tmp_path / "images"
    paths = write_digits(folder, range(30))
    (folder / "thumbs" / "small").mkdir(parents=True)
    for path in paths[:2]:
        (folder / "thumbs" / "small" / Path(path).name).write_bytes((folder / path).read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cnnpipe.cli", "classify", *map(str, arguments), "--device", "cpu"]


def classify(*arguments: object, stdin: bytes = b"", cwd: Path | None = None) -> Completed:
    ended = subprocess.run(
        command(*arguments), input=stdin, capture_output=True, timeout=120, cwd=cwd, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return Completed(ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def summary_beside(table: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(table.with_name(f"{table.name}.summary.json").read_text())
    return content


def test_patterns_choose_the_files(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "t.csv"
    ended = classify(images, "--model", model, "--output", table, "--include", "*.png", "--exclude", "thumbs/*")
    assert ended.returncode == 0, ended.stderr
    assert len(read_csv(table)) == 30
    only = classify(images, "--model", model, "--output", tmp_path / "b.csv", "--include", "000[0-4].png")
    assert only.returncode == 0, only.stderr
    names = [Path(row["path"]).name for row in read_csv(tmp_path / "b.csv")]
    assert sorted(set(names)) == ["0000.png", "0001.png", "0002.png", "0003.png", "0004.png"]


def test_patterns_that_leave_nothing_are_told(images: Path, model: Path, tmp_path: Path) -> None:
    ended = classify(images, "--model", model, "--output", tmp_path / "t.csv", "--include", "*.heic")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: no file is left of ")
    assert not (tmp_path / "t.csv").exists()
    assert not (tmp_path / "t.csv.job").exists()


@pytest.mark.parametrize("separator", [b"\n", b"\0"], ids=["newline", "NUL"])
def test_list_of_files_comes_from_standard_input(images: Path, model: Path, tmp_path: Path, separator: bytes) -> None:
    paths = [b"./thumbs/small/0000.png", b"notes.txt", b"gone.png"]
    table = tmp_path / "t.csv"
    ended = classify(
        "--files", "-", "--model", model, "--output", table, "--max-failure-rate", "1",
        stdin=separator.join(paths) + separator, cwd=images,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [(row["path"], row["status"], row["error"].split(":")[0]) for row in read_csv(table)] == [
        ("thumbs/small/0000.png", "ok", ""),
        ("notes.txt", "error", "not_an_image"),
        ("gone.png", "error", "not_found"),
    ]


def test_list_of_files_comes_from_a_text_file_in_its_order(images: Path, model: Path, tmp_path: Path) -> None:
    paths = sorted((str(path.relative_to(images)) for path in images.rglob("*.png")), reverse=True)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in paths))
    table = tmp_path / "t.csv"
    ended = classify(images, "--files", listed, "--model", model, "--output", table)
    assert ended.returncode == 0, ended.stderr
    assert [row["path"] for row in read_csv(table)] == paths


@pytest.mark.parametrize("how", ["utf-16", "utf-16-le without a mark", "other folder", "standard input"])
def test_a_list_of_which_nothing_exists_replaces_no_table(how: str, images: Path, model: Path, tmp_path: Path) -> None:
    table, listed = tmp_path / "t.csv", tmp_path / "list.txt"
    listed.write_text("thumbs/small/0000.png\r\nnotes.txt\r\n", "utf-16" if how == "utf-16" else "utf-8")
    arguments = (images, "--model", model, "--output", table, "--max-failure-rate", 1, "--overwrite", "--files")
    assert classify(*arguments, listed).returncode == 0
    good = table.read_bytes(), summary_beside(table)
    assert [row["status"] for row in read_csv(table)] == ["ok", "error"]
    content = "a.png\nb.png\n".encode("utf-16-le" if how.startswith("utf-16-le") else "utf-8")
    listed.write_bytes(content)
    ended = classify(*arguments, "-", stdin=content) if how == "standard input" else classify(*arguments, listed)
    assert ended.returncode == 1
    assert "error: no path in the list of files from " in ended.stderr.splitlines()[-1]
    assert (table.read_bytes(), summary_beside(table)) == good
    assert not (tmp_path / "t.csv.job").exists()


def test_missing_list_and_missing_folder_are_one_line(images: Path, model: Path, tmp_path: Path) -> None:
    ended = classify(images, "--files", tmp_path / "none.txt", "--model", model, "--output", tmp_path / "t.csv")
    assert (ended.returncode, "none.txt" in ended.stderr.splitlines()[-1]) == (1, True)
    nothing = classify("--model", model)
    assert nothing.returncode == 2
    assert "Traceback" not in nothing.stderr


def test_topk_is_spelled_either_way(images: Path, model: Path, tmp_path: Path) -> None:
    for option in ("--topk", "--top-k"):
        table = tmp_path / f"{option}.csv"
        assert classify(images, "--model", model, "--output", table, option, 3).returncode == 0
        assert list(read_csv(table)[0])[2:8] == [
            "label", "probability", "label_2", "probability_2", "label_3", "probability_3",
        ]  # fmt: skip


def test_uncertain_images_are_counted_and_sorted_apart(images: Path, model: Path, tmp_path: Path) -> None:
    table, target = tmp_path / "t.csv", tmp_path / "sorted"
    ended = classify(images, "--model", model, "--output", table, "--min-probability", 0.98, "--sort-into", target)
    assert ended.returncode == 0, ended.stderr
    rows = [row for row in read_csv(table) if row["status"] == "ok"]
    uncertain = {row["path"] for row in rows if float(row["probability"]) < 0.98}
    assert 0 < len(uncertain) < len(rows)
    assert summary_beside(table)["uncertain"] == len(uncertain)
    assert {str(path.relative_to(target / "_uncertain")) for path in target.glob("_uncertain/**/*.png")} == uncertain
    for row in rows:
        if row["path"] not in uncertain:
            assert (target / row["label"] / row["path"]).samefile(images / row["path"])
    assert f"uncertain: {len(uncertain)} with a probability below 0.98" in ended.stdout
    assert "sorted: linked 32, uncertain" in ended.stdout


def test_sorting_into_the_folder_itself_is_refused(images: Path, model: Path, tmp_path: Path) -> None:
    ended = classify(images, "--model", model, "--output", tmp_path / "t.csv", "--sort-into", images / "sorted")
    assert ended.returncode == 1
    assert "name a folder beside it" in ended.stderr
    assert not (tmp_path / "t.csv").exists()


def test_report_is_one_page_that_names_every_class_and_error(images: Path, model: Path, tmp_path: Path) -> None:
    table, page = tmp_path / "t.csv", tmp_path / "report.html"
    ended = classify(images, "--model", model, "--output", table, "--report", page)
    assert ended.returncode == 0, ended.stderr
    text = page.read_text()
    assert all(row["label"] in text for row in read_csv(table))
    assert "not_an_image" in text
    assert "notes.txt" in text
    assert text.count("data:image/") >= 10
    assert summary_beside(table)["report"] == str(page)


def test_what_cnnpipe_wrote_into_the_folder_is_no_row_the_next_time(images: Path, model: Path) -> None:
    (images / "mine.csv").write_text("a,b\n")
    (images / "mine.html").write_text("<!DOCTYPE html>")
    (images / "summary.json").write_text("{}")
    (images / "print.job").write_text("mine too")
    (images / "other.csv.job").write_text("an unfinished table of another folder, say")
    expected = {"mine.csv", "mine.html", "notes.txt", "summary.json", "print.job"}
    outputs = ("out/t.parquet", "a.jsonl", "b.csv", "b.csv")
    for number, output in enumerate(outputs):
        table = images / output
        ended = classify(
            images, "--model", model, "--output", table, "--report", images / "report.html", "--overwrite",
            "--sort-into", images.parent / "sorted", "--max-failure-rate", 0.2,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        summary = summary_beside(table)
        assert (summary["ok"], summary["error"]) == (32, len(expected))
        assert ("passed over" in ended.stderr) == (number > 0)
    assert {row["path"] for row in read_csv(images / "b.csv") if row["status"] == "error"} == expected
    above = images.parent
    ended = classify(above, "--model", model, "--artifacts", above / "artifacts", "--max-failure-rate", 1, "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["ok"] == 32
    named = classify(above / "sorted", "--model", model, "--output", above / "n.csv")
    assert named.returncode == 0, named.stderr
    assert summary_beside(above / "n.csv")["ok"] == 32


def test_what_systems_leave_is_passed_over_and_counted_once(images: Path, model: Path, tmp_path: Path) -> None:
    left = (
        *(".DS_Store", "a/Thumbs.db", "a/b/desktop.ini", "a/Desktop.INI"),
        *("@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir/2.png", "#recycle/1.png"),
        *("$RECYCLE.BIN/S-1-5/$R1.png", "System Volume Information/x", "a/1.png:Zone.Identifier"),
        *("__MACOSX/a/._1.png", "a/._1.png", ".Trashes/501/1.png", ".Spotlight-V100/x/y"),
        *("lost+found/x", ".Trash-1000/files/1.png", ".thumbnails/1.png", ".nfs000000000123"),
        *(".git/objects/aa/b", "a/.ipynb_checkpoints/1.png", "a/~$report.docx", "a/.x.0123456789abcdef.csv"),
    )
    (images / "notes.txt").unlink()
    for path in left:
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        (images / path).write_bytes(b"left")
    (images / ".mine.png").write_bytes((images / "thumbs/small/0000.png").read_bytes())
    ended = classify(images, "--model", model, "--output", tmp_path / "t.csv", "--max-failure-rate", 0)
    assert ended.returncode == 0, ended.stderr
    assert len(read_csv(tmp_path / "t.csv")) == 33
    assert summary_beside(tmp_path / "t.csv")["passed_over"] == len(left)
    warning = f"{len(left)} files and folders that systems leave or cnnpipe wrote were passed over: "
    assert len([line for line in ended.stderr.splitlines() if warning in line]) == 1


def test_a_list_that_is_not_there_is_told_before_the_model_is_loaded(images: Path, tmp_path: Path) -> None:
    ended = classify(images, "--model", tmp_path / "none.onnx", "--files", tmp_path / "list.txt")
    assert ended.returncode == 1
    assert (
        f"cannot read the list of files from {tmp_path / 'list.txt'}: No such file or directory; check the path"
        in ended.stderr
    )


def test_overwrite_replaces_the_table_that_a_link_points_to(images: Path, model: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "real.csv", tmp_path / "latest.csv"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    assert classify(images, "--model", model, "--output", link).returncode == 1
    assert target.read_text() == "old"
    for _ in range(2):
        ended = classify(images, "--model", model, "--output", link, "--overwrite")
        assert ended.returncode == 0, ended.stderr
        assert link.is_symlink()
        assert len(read_csv(target)) == 33
    assert list(target.parent.iterdir()) == [target]


def test_safe_csv_disarms_formulas(images: Path, model: Path, tmp_path: Path) -> None:
    (images / "=HYPERLINK(1).png").write_bytes((images / "thumbs/small/0000.png").read_bytes())
    table = tmp_path / "t.csv"
    assert classify(images, "--model", model, "--output", table, "--safe-csv").returncode == 0
    assert "'=HYPERLINK(1).png" in [row["path"] for row in read_csv(table)]
    assert table.read_bytes().startswith(b"\xef\xbb\xbfpath,")
    ended = classify(images, "--model", model, "--output", table, "--safe-csv", "--incremental", "--json")
    assert json.loads(ended.stdout.splitlines()[-1])["unchanged"] == 33
    assert table.read_bytes().count(b"\xef\xbb\xbf") == 1
    refused = classify(images, "--model", model, "--output", tmp_path / "t.jsonl", "--safe-csv")
    assert refused.returncode == 2
    assert "safe_csv needs a table that ends in .csv" in refused.stderr


def test_failed_rows_are_tried_again_on_demand(images: Path, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    assert classify(images, "--model", model, "--output", table).returncode == 0
    (images / "notes.txt").write_bytes((images / "thumbs/small/0000.png").read_bytes())
    ended = classify(images, "--model", model, "--output", table, "--retry-failed", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["error"] == 0
    assert {row["status"] for row in read_csv(table)} == {"ok"}


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ended_in_the_middle_it_says_so_and_goes_on_when_run_again(
    model: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    folder, table = tmp_path / "images", tmp_path / "out" / "t.csv"
    [path] = write_digits(folder, [0])
    for number in range(6000):
        os.link(folder / path, folder / f"{number:05}.png")
    arguments = (folder, "--model", model, "--output", table, "--shard-size", 64)
    # A shell has Ctrl-C ignored in what it starts in the background, as these tests may be.
    begun = subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    job = tmp_path / "out" / "t.csv.job"
    end = time.monotonic() + 60
    while not job.exists() or job.stat().st_size < 100_000:  # some shards
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    begun.send_signal(signal.SIGSTOP)
    busy = classify(*arguments)
    assert busy.returncode == 1
    assert "another process is writing" in busy.stderr
    begun.send_signal(ending)
    begun.send_signal(signal.SIGCONT)
    _, stderr = begun.communicate(timeout=60)
    assert begun.returncode == 128 + ending
    assert "Traceback" not in stderr
    ended = classify(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert "resumed: " in ended.stdout
    assert len(read_csv(table)) == 6001
    assert sorted(path.name for path in table.parent.iterdir()) == ["t.csv", "t.csv.summary.json"]
