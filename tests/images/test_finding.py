"""Every file is found, in one order, from any place on, and in bounded memory."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnpipe.errors import DatasetError, ImageError, StorageError
from cnnpipe.files import display_path, read_file
from cnnpipe.images.find import count_files, find_files, has_files, require_folder
from cnnpipe.images.selection import FileFilter


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
    with pytest.raises(DatasetError, match=problem):
        require_folder(tmp_path / name)
    assert count_files(tmp_path / name) == 0


_PARTS = st.sampled_from(["a", "a.", "a-b", "b", "B", "\n", "é", "\udcff", "\ue000", "zz"])
_PATHS = st.lists(_PARTS, min_size=1, max_size=4).map("/".join)


def _order(path: str) -> list[bytes]:
    return os.fsencode(path).split(b"/")


def _make_tree(root: Path, paths: set[str]) -> None:
    for path in sorted(paths):
        file = root / path
        if any((root / above).is_file() for above in Path(path).parents) or file.exists():
            continue  # a name is a file's or a folder's
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@contextmanager
def _blocks_of(names: int, read_bytes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnpipe.images.listing._NAMES_PER_BLOCK", names)
        patch.setattr("cnnpipe.images.listing._READ_BYTES", read_bytes)
        yield


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@settings(max_examples=60, deadline=None)
@given(paths=st.sets(_PATHS, max_size=15), removed=_PATHS, block=st.sampled_from([1, 2, 3, 1000]))
def test_a_walk_goes_on_behind_any_path_whether_it_is_there_or_not(paths: set[str], removed: str, block: int) -> None:
    with tempfile.TemporaryDirectory() as folder, _blocks_of(block, read_bytes=4):
        root = Path(folder)
        _make_tree(root, paths)
        whole = list(find_files(root))
        assert whole == sorted(whole, key=_order)
        assert whole == sorted((str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()), key=_order)
        for path in (*whole, *paths, removed):
            tail = [each for each in whole if _order(each) > _order(path)]
            assert list(find_files(root, after=path)) == tail
        assert count_files(root) == len(whole)


def test_a_walk_goes_on_though_the_file_became_a_folder_or_the_folder_a_file(tmp_path: Path) -> None:
    for name in ("a/1", "b/1", "b/2", "c/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").touch()
    assert list(find_files(tmp_path, after="a/1")) == ["b/1", "b/2", "c/1"]
    (tmp_path / "b/1").unlink()
    (tmp_path / "b/1").mkdir()
    (tmp_path / "b/1/new").touch()
    assert list(find_files(tmp_path, after="b/1")) == ["b/1/new", "b/2", "c/1"]


def test_a_walk_goes_on_behind_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "x").touch()
    assert list(find_files(tmp_path, after="a/up")) == ["a/x"]
    assert list(find_files(tmp_path, after="a/up/a/x")) == ["a/x"]
    assert count_files(tmp_path) == 2


def test_folders_before_the_path_to_go_on_behind_are_not_opened(tmp_path: Path) -> None:
    for name in ("a/1", "b/c/1", "b/d/1", "b/d/2", "e/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "os.scandir":
            opened.append(os.path.relpath(os.fsdecode(arguments[0]), tmp_path))  # type: ignore[arg-type]

    sys.addaudithook(watch)  # cannot be taken away again, only made to do nothing
    try:
        assert list(find_files(tmp_path, after="b/d/1")) == ["b/d/2", "e/1"]
    finally:
        watching = False
    assert {".", "b", "b/d", "e"} <= set(opened)
    assert not {"a", "b/c"} & set(opened)


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "", "/", "./a"])
def test_a_walk_never_leaves_its_folder_whatever_it_is_to_go_on_behind(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside").touch()
    (tmp_path / "zz").touch()
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "x").touch()
    assert list(find_files(tmp_path / "root", after=path)) in (["a/x"], [])


def test_a_huge_folder_is_sorted_in_a_file_that_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, room = tmp_path / "root", tmp_path / "room"
    (root / "m").mkdir(parents=True)
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    names = [f"{number * 7919 % 3000:04}.png" for number in range(3000)]
    for name in names:
        (root / name).touch()
    (root / "m" / "x").touch()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with _blocks_of(400, read_bytes=1000):
        walk = find_files(root)
        assert next(walk) == "0000.png"
        assert list(room.iterdir()) == []
        assert list(walk) == [*sorted(names)[1:], "m/x"]
        next(find_files(root))  # dropped half-way
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_of_common_size_is_sorted_without_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert list(find_files(tmp_path)) == ["x"]


def test_no_room_to_sort_a_huge_folder_is_said_in_one_line(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:0200}").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _blocks_of(50, read_bytes=1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"^cannot sort .* File too large; free some space, or set TMPDIR"):
                list(find_files(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind here")
@pytest.mark.parametrize("look", [has_files, lambda root: list(find_files(root))])
def test_a_root_that_cannot_be_listed_is_an_error(tmp_path: Path, look: Callable[[Path], object]) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DatasetError, match=r"cannot list .*closed: Permission denied; check its permissions"):
        look(tmp_path / "closed")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_folder_that_cannot_be_listed_is_yielded_and_counted_itself(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "x").touch()
    assert list(find_files(tmp_path)) == ["closed", "x"]
    assert count_files(tmp_path) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits")
def test_folders_whose_paths_no_system_call_takes_are_yielded_themselves(tmp_path: Path) -> None:
    name, depth = "d" * 250, 18
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=folder)
        inner = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    (path,) = find_files(tmp_path)
    assert 0 < path.count(name) < depth
    assert count_files(tmp_path) == 1
    assert list(find_files(tmp_path, after=path)) == []
    with pytest.raises(ImageError, match="File name too long"):
        read_file(tmp_path / path)


def test_counting_agrees_with_finding_and_with_the_filter(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/b/2.png", "3.jpg", "c/4.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in (".DS_Store", "@eaDir/1.jpg", "a/b/.Trash-7/2.jpg", "x.csv.job", "x.csv.job-journal"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert count_files(tmp_path) == len(list(find_files(tmp_path))) == 6
    assert count_files(tmp_path, FileFilter(("*.jpg",))) == 3


def test_a_folder_is_looked_at_only_until_it_has_so_many_files(tmp_path: Path) -> None:
    assert not has_files(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not has_files(tmp_path)
    for number in range(3):
        (tmp_path / "a" / "b" / f"{number}").touch()
    assert has_files(tmp_path)
    assert has_files(tmp_path, 3)
    assert not has_files(tmp_path, 4)
    with pytest.raises(DatasetError, match="it does not exist"):
        has_files(tmp_path / "none")
