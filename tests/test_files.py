"""Every file is found, in one order, and read or refused without hanging."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.files import display_path, find_files, read_file


def test_files_come_depth_first_and_bytewise_sorted(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "B/x.png", "a.png", "a/z/deep.png", "a/y.png", "é.png", "~.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert list(find_files(tmp_path)) == [
        *("B/x.png", "a/y.png", "a/z/deep.png", "a.png", "b/10.png", "b/2.png", "~.png", "é.png"),
    ]


def test_a_tree_deeper_than_the_recursion_limit_is_walked(tmp_path: Path) -> None:
    folder = tmp_path
    depth = 150
    for _ in range(depth):
        folder = folder / "d"
        folder.mkdir()
    (folder / "leaf").touch()
    limit = sys.getrecursionlimit()
    frames = len(__import__("inspect").stack())
    sys.setrecursionlimit(frames + 100)
    try:
        assert list(find_files(tmp_path)) == ["d/" * depth + "leaf"]
    finally:
        sys.setrecursionlimit(limit)


def test_a_link_into_its_own_tree_ends_and_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert list(find_files(tmp_path)) == ["a/self", "a/up", "gone"]
    kinds = []
    for path in find_files(tmp_path):
        with pytest.raises(ImageError) as caught:
            read_file(tmp_path / path)
        kinds.append(caught.value.kind)
    assert kinds == ["unreadable", "not_a_file", "not_found"]


def test_a_linked_folder_outside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert list(find_files(tmp_path / "root")) == ["link/x.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.timeout(10)
def test_a_pipe_never_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert list(find_files(tmp_path)) == ["pipe"]
    with pytest.raises(ImageError, match="not a regular file") as caught:
        read_file(tmp_path / "pipe")
    assert caught.value.kind == "not_a_file"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_are_found_opened_and_shown(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))).write_bytes(b"content")
    (path,) = find_files(tmp_path)
    assert read_file(tmp_path / path) == b"content"
    assert display_path(path) == "caf\\xe9.png"


@pytest.mark.parametrize(
    ("name", "problem"), [("missing", "it does not exist"), ("file", "it is a file")], ids=["missing", "file"]
)
def test_a_root_that_is_no_folder_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=problem):
        list(find_files(tmp_path / name))


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError) as caught:
        read_file(tmp_path / "x.png")
    assert caught.value.kind == "empty"


def test_a_file_over_the_limit_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.files.MAX_FILE_BYTES", 10)
    (tmp_path / "x").write_bytes(bytes(11))
    with pytest.raises(ImageError, match="at most 10") as caught:
        read_file(tmp_path / "x")
    assert caught.value.kind == "too_large"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_a_file_longer_than_it_says_is_read_to_its_end() -> None:
    assert b"VmRSS" in read_file(Path("/proc/self/status"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_refused_files_leave_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ImageError, match="folder"):
            read_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
