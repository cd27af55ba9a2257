"""Sorting files into class folders: where they go, what is never touched, and names that a stranger chose."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnpipe.classify.sort_into import SortedFiles, check_target, label_folder, path_in_folder, sort_files
from cnnpipe.classify.table import Prediction
from cnnpipe.errors import PredictionsError, StorageError
from cnnpipe.images.find import find_files
from cnnpipe.paths import escape_path, unescape_path

HOSTILE_LABELS = ("../../out", "..", ".", "", "/etc", "a/b", "a\\b", "nul\0", ".hidden", "_uncertain", "_Uncertain",
                  "end.", "a_b", "100%", "\ud800", "猫", "قطة", "x" * 300, "猫" * 200)  # fmt: skip


def ok(path: str, label: str = "cat", probability: float = 0.9) -> Prediction:
    return Prediction(path, "ok", (label,), (probability,), "", "", "a" * 64, "tiny/1")


def failed(path: str) -> Prediction:
    return Prediction(path, "error", (), (), "truncated", "ends too early", "", "tiny/1")


def sort(rows: list[Prediction], root: Path, target: Path, min_probability: float = 0.0) -> SortedFiles:
    return sort_files(iter(rows), root, target, min_probability)


def content(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder by its path."""
    return {path: (folder / path).read_text() for path in find_files(folder)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of four files that hold their own names."""
    folder = tmp_path / "photos"
    for path in ("a.jpg", "b.jpg", "trip/a.jpg", "trip/deep/c.jpg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    return folder


@pytest.fixture(params=["links", "copies"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to give a file a second name; without hard links, as on another disk."""
    if request.param == "copies":
        forbid_links(monkeypatch, errno.EXDEV)
    return str(request.param)


def forbid_links(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)


def test_files_go_to_the_folder_of_their_class_below_their_own_path(root: Path, tmp_path: Path, way: str) -> None:
    rows = [ok("a.jpg"), ok("b.jpg", "dog"), ok("trip/a.jpg"), ok("trip/deep/c.jpg", "dog")]

    result = sort(rows, root, tmp_path / "sorted")

    assert content(tmp_path / "sorted") == {
        "cat/a.jpg": "a.jpg",
        "cat/trip/a.jpg": "trip/a.jpg",
        "dog/b.jpg": "b.jpg",
        "dog/trip/deep/c.jpg": "trip/deep/c.jpg",
    }
    assert (result.linked, result.copied) == ((4, 0) if way == "links" else (0, 4))


def test_links_are_the_same_file_and_copies_have_its_date(root: Path, tmp_path: Path, way: str) -> None:
    os.utime(root / "a.jpg", (1e9, 1e9))

    sort([ok("a.jpg")], root, tmp_path / "sorted")

    assert (tmp_path / "sorted/cat/a.jpg").samefile(root / "a.jpg") == (way == "links")
    assert (tmp_path / "sorted/cat/a.jpg").stat().st_mtime == 1e9


def test_files_below_the_least_probability_go_to_uncertain(root: Path, tmp_path: Path) -> None:
    result = sort([ok("a.jpg", probability=0.59), ok("b.jpg", probability=0.6)], root, tmp_path / "sorted", 0.6)

    assert set(content(tmp_path / "sorted")) == {"_uncertain/a.jpg", "cat/b.jpg"}
    assert (result.linked, result.uncertain) == (2, 1)


def test_a_probability_is_compared_as_the_float32_that_the_model_gave(root: Path, tmp_path: Path) -> None:
    from_parquet = float(np.float32(0.9))
    assert from_parquet < 0.9

    result = sort([ok("a.jpg", probability=from_parquet)], root, tmp_path / "sorted", 0.9)

    assert result.uncertain == 0


def test_every_row_is_counted_once(root: Path, tmp_path: Path) -> None:
    rows = [ok("a.jpg"), ok("a.jpg"), failed("b.jpg"), ok("gone.jpg"), ok("trip/a.jpg", probability=0.1)]

    result = sort(rows, root, tmp_path / "sorted", 0.5)

    assert result == SortedFiles(2, 0, already_there=1, left_out=1, failed=1, uncertain=1, renamed=0)


def test_sorting_again_changes_nothing(root: Path, tmp_path: Path, way: str) -> None:
    rows = [ok("a.jpg"), ok("b.jpg", probability=0.1), ok("trip/a.jpg")]
    sort(rows, root, tmp_path / "sorted", 0.5)
    before = {path: (tmp_path / "sorted" / path).stat().st_ino for path in find_files(tmp_path / "sorted")}

    again = sort(rows, root, tmp_path / "sorted", 0.5)

    assert (again.already_there, again.linked, again.copied, again.uncertain) == (3, 0, 0, 1)
    assert {path: (tmp_path / "sorted" / path).stat().st_ino for path in find_files(tmp_path / "sorted")} == before


def test_another_file_of_the_name_stays_and_the_new_one_gets_a_number(root: Path, tmp_path: Path, way: str) -> None:
    target = tmp_path / "sorted"
    (target / "cat").mkdir(parents=True)
    (target / "cat/a.jpg").write_text("older")
    (target / "cat/a-2.jpg").mkdir()
    (target / "cat/b.jpg").symlink_to(root / "b.jpg")

    first = sort([ok("a.jpg"), ok("b.jpg")], root, target)
    second = sort([ok("a.jpg"), ok("b.jpg")], root, target)

    assert (target / "cat/a.jpg").read_text() == "older"
    assert (target / "cat/a-3.jpg").read_text() == "a.jpg"
    assert (target / "cat/b.jpg").is_symlink()
    assert (target / "cat/b-2.jpg").read_text() == "b.jpg"
    assert (first.renamed, second.renamed, second.already_there) == (2, 0, 2)


@pytest.mark.parametrize("label", HOSTILE_LABELS)
def test_no_label_leads_out_of_its_one_folder(root: Path, tmp_path: Path, label: str) -> None:
    result = sort([ok("trip/a.jpg", label)], root, tmp_path / "x/y/sorted")

    (path,) = find_files(tmp_path / "x")
    assert path.split("/")[:2] == ["y", "sorted"]
    assert path.split("/")[3:] == ["trip", "a.jpg"]
    assert path.split("/")[2].casefold() != "_uncertain"
    assert result.linked == 1


def test_no_two_labels_share_a_folder() -> None:
    assert len({label_folder(label) for label in HOSTILE_LABELS}) == len(HOSTILE_LABELS)
    assert label_folder("tabby cat") == "tabby cat"
    assert label_folder("AC/DC").startswith("AC_DC~")


@given(label=st.text(), path=st.text(min_size=1))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out_of_the_target(label: str, path: str) -> None:
    try:
        made = f"{label_folder(label)}/{path_in_folder(path)}"
    except UnicodeEncodeError:  # a lone surrogate, which no file's name has; `sort_files` counts it as failed
        return
    parts = made.removesuffix("/").split("/")  # of a path like `..`, which is not a file's, nothing is left
    assert all(part not in ("", ".", "..") for part in parts)
    assert all(len(os.fsencode(part)) <= 255 for part in parts)


@pytest.mark.parametrize(
    "path", ["{outside}/x.jpg", "../outside/x.jpg", "trip/../../outside/x.jpg", "./../outside//x.jpg"]
)
def test_a_path_from_a_list_is_found_but_its_name_stays_in_the_target(root: Path, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.jpg").write_text("x")
    before = set(content(outside))

    result = sort([ok(path.format(outside=outside))], root, tmp_path / "in/sorted")

    (name,) = content(tmp_path / "in")
    assert name.startswith("sorted/cat/")
    assert ".." not in name.split("/")
    assert result.linked == 1
    assert set(content(outside)) == before


@pytest.mark.parametrize("path", ["nul\0.jpg", "half\ud800.jpg", "n" * 300, "d/" * 3000 + "x"])
def test_a_path_that_can_be_none_is_counted_and_costs_nothing_else(root: Path, tmp_path: Path, path: str) -> None:
    result = sort([ok(path), ok("a.jpg")], root, tmp_path / "sorted")

    assert (result.failed, result.linked) == (1, 1)


def test_what_is_not_a_file_any_more_is_counted_and_the_first_are_logged(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(root / "pipe.jpg")
    (root / "nothing.jpg").symlink_to("nowhere")
    gone = [ok(f"gone{number}.jpg") for number in range(8)]

    with caplog.at_level(logging.WARNING):
        result = sort([ok("trip"), ok("pipe.jpg"), ok("nothing.jpg"), *gone, ok("a.jpg")], root, tmp_path / "sorted")

    assert (result.failed, result.linked) == (11, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "not sorted: trip: it is not a file any more",
        "not sorted: pipe.jpg: it is not a file any more",
        "not sorted: nothing.jpg: the file is gone",
        "not sorted: gone0.jpg: the file is gone",
        "not sorted: gone1.jpg: the file is gone",
        "6 more files could not be sorted",
    ]


def test_the_content_of_a_link_is_sorted_not_the_link(root: Path, tmp_path: Path, way: str) -> None:
    (root / "link.jpg").symlink_to("b.jpg")
    (root / "link to link.jpg").symlink_to("link.jpg")

    sort([ok("link.jpg"), ok("link to link.jpg")], root, tmp_path / "sorted")

    for name in ("link.jpg", "link to link.jpg"):
        assert not (tmp_path / "sorted/cat" / name).is_symlink()
        assert (tmp_path / "sorted/cat" / name).read_text() == "b.jpg"


def test_a_path_that_is_too_long_for_the_target_is_counted(root: Path, tmp_path: Path) -> None:
    path = "/".join(["d" * 100] * 36 + ["long.jpg"])
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text("long")
    target = tmp_path / ("t" * 200) / ("u" * 250)

    result = sort([ok(path), ok("a.jpg")], root, target)

    assert (result.failed, result.linked) == (1, 1)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_of_the_target_that_is_something_else_is_refused(root: Path, tmp_path: Path, kind: str) -> None:
    target, outside = tmp_path / "sorted", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    if kind == "link":
        (target / "cat").symlink_to(outside)
    else:
        (target / "cat").write_text("a file")

    with pytest.raises(StorageError, match=r"cat: it is not a folder; remove it"):
        sort([ok("a.jpg")], root, target)
    assert not list(outside.iterdir())


def test_a_full_disk_ends_the_sorting_and_leaves_no_half_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    forbid_links(monkeypatch, errno.ENOSPC)
    monkeypatch.setattr("shutil.copyfileobj", fill)

    with pytest.raises(StorageError, match=r"cannot write .*cat/a.jpg: No space left on device; free some space"):
        sort([ok("a.jpg")], root, tmp_path / "sorted")
    assert not content(tmp_path / "sorted")


def test_files_from_another_disk_are_copied(root: Path) -> None:
    disk = Path("/dev/shm")
    if not disk.is_dir() or disk.stat().st_dev == root.stat().st_dev:
        pytest.skip("no second file system here")
    target = disk / f"cnnpipe-{os.getpid()}"
    try:
        result = sort([ok("a.jpg")], root, target)
        assert result.copied == 1
        assert content(target) == {"cat/a.jpg": "a.jpg"}
    finally:
        for path in find_files(target):
            (target / path).unlink()
        (target / "cat").rmdir()
        target.rmdir()


def test_undecodable_names_are_found_by_what_the_table_shows(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    name = os.fsdecode(b"caf\xe9/\xff.jpg")
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("bytes")

    assert unescape_path(root, escape_path(name)) == root / name
    assert sort([ok(escape_path(name))], root, tmp_path / "sorted").linked == 1
    assert content(tmp_path / "sorted") == {r"cat/caf\xe9/\xff.jpg": "bytes"}


def test_a_name_of_255_undecodable_bytes_is_sorted(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff" * 251 + b".jpg")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_text("long")

    assert sort([ok(escape_path(name))], tmp_path / "photos", tmp_path / "sorted").linked == 1
    (path,) = content(tmp_path / "sorted")
    assert path.endswith(".jpg")


def test_a_name_in_letters_is_preferred_to_the_bytes_that_it_may_stand_for(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9")
    folder.mkdir()
    (folder / r"\xe9.jpg").write_text("letters")
    (folder / os.fsdecode(b"\xe8.jpg")).write_text("bytes")

    assert unescape_path(tmp_path, r"\xe9/\xe9.jpg").read_text() == "letters"
    assert unescape_path(tmp_path, r"\xe9/\xe8.jpg").read_text() == "bytes"
    assert unescape_path(tmp_path, r"\xe9/gone\xe8.jpg") == tmp_path / r"\xe9/gone\xe8.jpg"


@pytest.mark.parametrize("target", ["photos", "photos/sorted", ".", "link/sorted"])
def test_a_target_in_or_around_the_folder_is_refused(root: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(root)

    with pytest.raises(PredictionsError, match=r"one is in the other.*name a folder beside it"):
        check_target(root, tmp_path / target)
    with pytest.raises(PredictionsError, match="one is in the other"):
        sort([ok("a.jpg")], root, tmp_path / target)


def test_a_target_that_is_not_a_folder_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to("missing")

    for name in ("file", "nowhere"):
        with pytest.raises(PredictionsError, match="it is not a folder; name another"):
            check_target(root, tmp_path / name)
    check_target(root, tmp_path / "photos-sorted")


def test_rows_are_taken_one_at_a_time(root: Path, tmp_path: Path) -> None:
    def rows() -> Iterator[Prediction]:
        yield ok("a.jpg")
        assert (tmp_path / "sorted/cat/a.jpg").exists()
        yield ok("b.jpg")

    assert sort_files(rows(), root, tmp_path / "sorted", 0.0).linked == 2
