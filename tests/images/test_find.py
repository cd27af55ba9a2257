"""Every file is found, in one order, from any path on, and in bounded memory; patterns and lists choose among them."""

from __future__ import annotations

import io
import os
import pickle
import resource
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnpipe.errors import DatasetError, ImageError, StorageError
from cnnpipe.images.decode import read_file
from cnnpipe.images.find import FileFilter, find_files, has_files, read_file_list
from cnnpipe.paths import escape_path


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
    assert escape_path(path) == "caf\\xe9.png"


@pytest.mark.parametrize(
    ("name", "problem"), [("missing", "it does not exist"), ("file", "it is a file")], ids=["missing", "file"]
)
def test_a_root_that_is_no_folder_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=problem):
        list(find_files(tmp_path / name))
    with pytest.raises(DatasetError, match=problem):
        has_files(tmp_path / name)


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
def _in_memory(names: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnpipe.images.find._MAX_NAMES_IN_MEMORY", names)
        yield


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@settings(max_examples=60, deadline=None)
@given(paths=st.sets(_PATHS, max_size=15), removed=_PATHS, in_memory=st.sampled_from([1, 2, 3, 1000]))
def test_a_walk_goes_on_after_any_path_whether_it_exists_or_not(paths: set[str], removed: str, in_memory: int) -> None:
    with tempfile.TemporaryDirectory() as folder, _in_memory(in_memory):
        root = Path(folder)
        _make_tree(root, paths)
        whole = list(find_files(root))
        assert whole == sorted(whole, key=_order)
        assert whole == sorted((str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()), key=_order)
        for path in (*whole, *paths, removed):
            tail = [each for each in whole if _order(each) > _order(path)]
            assert list(find_files(root, after=path)) == tail
        assert sorted(find_files(root, in_order=False), key=_order) == whole
        assert has_files(root, max(len(whole), 1)) == (len(whole) > 0)
        assert not has_files(root, len(whole) + 1)


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


def test_a_walk_goes_on_after_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "x").touch()
    assert list(find_files(tmp_path, after="a/up")) == ["a/x"]
    assert list(find_files(tmp_path, after="a/up/a/x")) == ["a/x"]


def test_folders_before_the_path_to_go_on_after_are_not_opened(tmp_path: Path) -> None:
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
def test_a_walk_never_leaves_its_folder_whatever_it_is_to_go_on_after(tmp_path: Path, path: str) -> None:
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
    monkeypatch.setenv("TMPDIR", str(room))
    names = [f"{number * 7919 % 3000:04}.png" for number in range(3000)]
    for name in names:
        (root / name).touch()
    (root / "m" / "x").touch()
    (root / ".DS_Store").touch()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    passed_over: Counter[str] = Counter()
    with _in_memory(400):
        walk = find_files(root, passed_over=passed_over)
        assert next(walk) == "0000.png"
        assert passed_over == {".DS_Store": 1}
        assert list(room.iterdir()) == []
        assert list(walk) == [*sorted(names)[1:], "m/x"]
        next(find_files(root))  # dropped half-way
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_no_room_to_sort_a_huge_folder_is_said_in_one_line(tmp_path: Path) -> None:
    for number in range(12_000):  # more than SQLite keeps in memory
        (tmp_path / f"{number:0250}").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _in_memory(50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"^cannot sort a folder of over 50 names .*; free some space"):
                list(find_files(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind here")
@pytest.mark.parametrize("look", [has_files, lambda root: list(find_files(root))])
def test_a_root_that_cannot_be_listed_is_an_error(tmp_path: Path, look: Callable[[Path], object]) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DatasetError, match=r"need a folder of images, received .*closed: Permission denied; check the"):
        look(tmp_path / "closed")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind here")
def test_a_folder_that_cannot_be_listed_is_yielded_itself(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "x").touch()
    assert list(find_files(tmp_path)) == ["closed", "x"]


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
    assert list(find_files(tmp_path, after=path)) == []
    with pytest.raises(ImageError, match="File name too long"):
        read_file(tmp_path / path)


def test_leftovers_are_not_found_and_linked_folders_are_followed(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/b/2.png", "3.jpg", "c/4.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in (".DS_Store", "@eaDir/1.jpg", "a/b/.Trash-7/2.jpg", "x.csv.job", "x.csv.job-journal"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert len(list(find_files(tmp_path))) == 6


def test_has_files_counts_what_is_found_and_not_what_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / ".DS_Store").touch()
    assert not has_files(tmp_path)
    for number in range(3):
        (tmp_path / "a" / "b" / f"{number}").touch()
    assert has_files(tmp_path)
    assert has_files(tmp_path, 3)
    assert not has_files(tmp_path, 4)


# --- patterns and lists


def _write_list(folder: Path, content: bytes) -> str:
    (folder / "list.txt").write_bytes(content)
    return str(folder / "list.txt")


@pytest.mark.parametrize(
    ("include", "exclude", "admitted"),
    [
        ((), (), ["a.jpg", "cats/b.JPG", "cats/deep/c.jpg", "dogs/.d.jpg", "dogs/e\n.jpg", "dogs/f\udcff.gif"]),
        (("*.jpg",), (), ["a.jpg", "cats/deep/c.jpg", "dogs/.d.jpg", "dogs/e\n.jpg"]),
        (("*.jpg", "*.JPG"), (".*",), ["a.jpg", "cats/b.JPG", "cats/deep/c.jpg", "dogs/e\n.jpg"]),
        (("cats/*",), (), ["cats/b.JPG", "cats/deep/c.jpg"]),
        (("*/deep/*",), (), ["cats/deep/c.jpg"]),
        ((), ("cats/*", "*.gif"), ["a.jpg", "dogs/.d.jpg", "dogs/e\n.jpg"]),
        (("?.jpg",), (), ["a.jpg", "cats/deep/c.jpg"]),
        (("[!a-c]*",), (), ["dogs/.d.jpg", "dogs/e\n.jpg", "dogs/f\udcff.gif"]),
        (("*\udcff*",), (), ["dogs/f\udcff.gif"]),
        (("cats",), (), []),
    ],
)
def test_patterns_choose_by_name_or_by_path(
    include: tuple[str, ...], exclude: tuple[str, ...], admitted: list[str]
) -> None:
    paths = ["a.jpg", "cats/b.JPG", "cats/deep/c.jpg", "dogs/.d.jpg", "dogs/e\n.jpg", "dogs/f\udcff.gif"]
    wanted = FileFilter(include, exclude)
    assert [path for path in paths if wanted.admits(path)] == admitted
    assert pickle.loads(pickle.dumps(wanted)) == wanted


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (b"", []),
        (b"a.jpg\nb/c d.jpg\n", ["a.jpg", "b/c d.jpg"]),
        (b"a.jpg\n\n\nb.jpg", ["a.jpg", "b.jpg"]),
        (b"\xef\xbb\xbfa.jpg\r\nb\r.jpg\r\n", ["a.jpg", "b\r.jpg"]),
        (b"a\n1.jpg\0b\r\0\0c.jpg\0", ["a\n1.jpg", "b\r", "c.jpg"]),
        (
            b"./a.jpg\n.//b.jpg\n././c\n./\n.\n../d\n/e//f\n.g\n",
            ["a.jpg", "b.jpg", "./c", "./", ".", "../d", "/e//f", ".g"],
        ),
        (b"caf\xe9.jpg\ncaf\xc3\xa9.jpg\n \n", ["caf\udce9.jpg", "café.jpg", " "]),
    ],
    ids=["empty", "lines", "empty-lines", "windows", "nul", "dots", "bytes"],
)
def test_a_list_is_read_record_by_record(tmp_path: Path, content: bytes, paths: list[str]) -> None:
    assert list(read_file_list(_write_list(tmp_path, content))) == paths


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str, separator: str) -> None:
    paths = [f"{number:05}/é😀" for number in range(20_000)]  # many times longer than what is read at once
    text = "".join(path + separator for path in paths)
    content = text.encode(encoding) if encoding == "utf-8-sig" else ("\ufeff" + text).encode(encoding)
    assert list(read_file_list(_write_list(tmp_path, content))) == paths


@pytest.mark.parametrize("content", ["a\n".encode("utf-16") + b"b", b"\xff\xfe\x00\xd8a\x00\n\x00"])
def test_what_is_not_utf16_in_spite_of_its_mark_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DatasetError, match=r"list\.txt is not valid UTF-16, which its byte order mark announces: "):
        list(read_file_list(_write_list(tmp_path, content)))


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_a_long_list_is_read_whole_wherever_its_parts_end(tmp_path: Path, separator: bytes) -> None:
    paths = [f"{number:05}/" + "é" * (number % 300) for number in range(2000)]
    content = b"".join(path.encode() + separator for path in paths)
    assert list(read_file_list(_write_list(tmp_path, content))) == paths


def test_a_path_with_a_nul_in_a_list_of_lines_is_not_the_name_of_a_file(tmp_path: Path) -> None:
    *_, path = read_file_list(_write_list(tmp_path, b"x\n" * 2**15 + b"a\0b\n"))
    with pytest.raises(ImageError, match="a NUL byte cannot be the name of a file") as caught:
        read_file(tmp_path / path)
    assert caught.value.kind == "not_found"


def test_a_list_comes_from_standard_input_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", buffering=0) as target:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
        target.write(b"first\0")
        paths = read_file_list("-")
        assert next(paths) == "first"

        def write_more() -> None:
            target.write(b"second\0thi")
            target.write(b"rd")
            target.close()

        writer = threading.Thread(target=write_more)
        writer.start()
        assert list(paths) == ["second", "third"]
        writer.join()


@pytest.mark.parametrize("size", [2**16 + 1, 2**20])
@pytest.mark.parametrize("start", [b"", b"a.jpg\n", b"a.jpg\n" * 20_000])
def test_what_has_no_end_of_line_is_no_list(tmp_path: Path, size: int, start: bytes) -> None:
    source = _write_list(tmp_path, start + b"x" * size + b"\n")
    with pytest.raises(DatasetError, match=r"list\.txt is not a list of files: a record exceeds 65,536 characters"):
        list(read_file_list(source))
    assert list(read_file_list(_write_list(tmp_path, b"x" * 2**16))) == ["x" * 2**16]


def test_a_list_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.txt: No such file or directory; check the path"):
        list(read_file_list(str(tmp_path / "gone.txt")))
    with pytest.raises(DatasetError, match="Is a directory"):
        list(read_file_list(str(tmp_path)))
