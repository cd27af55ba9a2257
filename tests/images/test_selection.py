"""Patterns and lists choose the files."""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from pathlib import Path

import pytest

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.images.decode import read_file
from cnnpipe.images.find import FileFilter, read_file_list


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
    with pytest.raises(DatasetError, match=r"list\.txt is not valid UTF-16, which its byte order mark promises: "):
        list(read_file_list(_write_list(tmp_path, content)))


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_a_long_list_is_read_whole_wherever_its_parts_end(tmp_path: Path, separator: bytes) -> None:
    paths = [f"{number:05}/" + "é" * (number % 300) for number in range(2000)]
    content = b"".join(path.encode() + separator for path in paths)
    assert list(read_file_list(_write_list(tmp_path, content))) == paths


def test_a_path_with_a_nul_in_a_list_of_lines_is_the_name_of_no_file(tmp_path: Path) -> None:
    *_, path = read_file_list(_write_list(tmp_path, b"x\n" * 2**15 + b"a\0b\n"))
    with pytest.raises(ImageError, match="NUL byte") as caught:
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
    with pytest.raises(DatasetError, match=r"list\.txt is not a list of files: a record exceeds 65,536 bytes; give"):
        list(read_file_list(source))
    assert list(read_file_list(_write_list(tmp_path, b"x" * 2**16))) == ["x" * 2**16]


def test_a_list_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.txt: No such file or directory; check the path"):
        list(read_file_list(str(tmp_path / "gone.txt")))
    with pytest.raises(DatasetError, match="Is a directory"):
        list(read_file_list(str(tmp_path)))
