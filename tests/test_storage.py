"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from cnnpipe.errors import AlreadyThereError, StorageError
from cnnpipe.storage import (
    make_folder,
    sha256_file,
    storage_errors,
    write_bytes,
    write_file,
    write_folder,
    write_json,
    write_text,
)


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file system one without hard links, such as exFAT."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest) -> None:
    """Run a test twice: on a file system with hard links, and on one without."""
    if request.param == "no links":
        request.getfixturevalue("without_links")


def test_written_file_is_all_that_is_left_in_the_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "table.csv", "größe\n")
    assert (tmp_path / "new" / "table.csv").read_bytes() == "größe\n".encode()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["table.csv"]


def test_temporary_file_keeps_the_suffix(tmp_path: Path) -> None:
    with write_file(tmp_path / "model.keras") as temporary:
        assert temporary.suffix == ".keras"
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")


def test_exception_while_writing_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with suppress(KeyboardInterrupt), write_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_error_of_the_block_is_passed_on_as_it_is(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    with pytest.raises(FileNotFoundError, match="the dataset"), write(tmp_path / "table"):
        raise FileNotFoundError("the dataset is gone")
    assert list(tmp_path.iterdir()) == []


def test_file_that_may_not_be_replaced_stays(tmp_path: Path, links: None) -> None:
    path = tmp_path / "table.csv"
    write_text(path, "first", replace=False)
    with pytest.raises(AlreadyThereError, match=r"table\.csv exists; choose another name or remove it"):
        write_text(path, "second", replace=False)
    assert path.read_text() == "first"
    assert path.stat().st_nlink == 1
    assert list(tmp_path.iterdir()) == [path]


def test_of_many_writers_that_may_not_replace_exactly_one_wins(tmp_path: Path, links: None) -> None:
    path, contents = tmp_path / "table.csv", [str(number) * 10_000 for number in range(8)]

    def write(content: str) -> bool:
        try:
            write_text(path, content, replace=False)
        except AlreadyThereError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, contents))
    assert won.count(True) == 1
    assert path.read_text() == contents[won.index(True)]
    assert list(tmp_path.iterdir()) == [path]


def test_link_to_nothing_is_not_replaced_either(tmp_path: Path, links: None) -> None:
    (tmp_path / "table.csv").symlink_to(tmp_path / "nothing")
    with pytest.raises(AlreadyThereError):
        write_text(tmp_path / "table.csv", "x", replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_placeholder_goes_when_the_file_cannot_take_its_place(
    tmp_path: Path, without_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        write_text(tmp_path / "table.csv", "x", replace=False)
    assert list(tmp_path.iterdir()) == []


def test_reader_beside_a_writer_never_sees_half_a_file(tmp_path: Path) -> None:
    path, contents = tmp_path / "shared", {b"a" * 50_000, b"b" * 100_000}
    write_bytes(path, b"a" * 50_000)
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in contents:
            write_bytes(path, content)
    done.set()
    reader.join()
    assert seen <= contents


def test_json_with_nan_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == '{\n  "loss": 0.5\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_folder_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(StorageError, match=r"cannot write .*file.*; check the folder, its permissions and the disk"):
        write_text(tmp_path / "file" / "below.txt", "x")
    with pytest.raises(StorageError, match="cannot write"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(StorageError, match="cannot write"), write_folder(tmp_path / "file" / "folder"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_says_to_free_space(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"cannot write .*: No space left on device; free some space"),
        storage_errors(tmp_path / "x"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_disk_that_takes_no_more_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_text(path, "old")
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from cnnpipe.errors import StorageError; from cnnpipe.storage import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(Path(sys.argv[1]), bytes(5000))\n"
        "except StorageError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "cannot write" in shown.stdout
    assert "File too large" in shown.stdout
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_message_of_several_lines_becomes_one() -> None:
    with pytest.raises(StorageError) as caught, storage_errors(Path("model.keras")):
        raise OSError("unable to create file\n  (errno = 28)\n")
    assert str(caught.value).splitlines() == [str(caught.value)]


def test_long_names_of_any_script_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("🦊" * 60 + ".jsonl")  # 246 bytes of the 255 that a name may have
    write_text(path, "x")
    assert path.read_text() == "x"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with write_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "prepared" / "digits-0123"
    with write_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "images.npy").write_bytes(b"x")
        assert not path.exists()
    assert (path / "deep" / "images.npy").read_bytes() == b"x"
    assert list(path.parent.iterdir()) == [path]


def test_exception_while_filling_a_folder_leaves_nothing(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), write_folder(tmp_path / "prepared") as temporary:
        (temporary / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folder_that_another_process_finished_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "prepared"
    with write_folder(path) as temporary:
        (temporary / "origin").write_text("second")
        path.mkdir()
        (path / "origin").write_text("first")
    assert (path / "origin").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "prepared").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"), write_folder(tmp_path / "prepared"):
        pass
    assert (tmp_path / "prepared").read_text() == "a file"

    (tmp_path / "table.csv").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*table\.csv: Is a directory"):
        write_text(tmp_path / "table.csv", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", "table.csv"]


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture(params=["same file system", "other file system"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder to point links to."""
    if request.param == "same file system":
        (tmp_path / "elsewhere").mkdir()
        yield tmp_path / "elsewhere"
        return
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("there", [True, False])
def test_what_a_symbolic_link_points_to_is_replaced_and_the_links_stay(
    there: bool, elsewhere: Path, tmp_path: Path
) -> None:
    target, second, link = elsewhere / "real.txt", tmp_path / "second.txt", tmp_path / "link.txt"
    if there:
        target.write_text("old")
    second.symlink_to(target)
    link.symlink_to(second)
    write_text(link, "new")
    assert link.is_symlink()
    assert second.is_symlink()
    assert not target.is_symlink()
    assert target.read_text() == "new"
    assert [path for path in (*tmp_path.iterdir(), *elsewhere.iterdir()) if path.name.startswith(".")] == []
