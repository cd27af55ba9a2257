"""Files are read, or refused without hanging."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnnpipe.errors import ImageError
from cnnpipe.images.decode import read_file


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError) as caught:
        read_file(tmp_path / "x.png")
    assert caught.value.kind == "empty"


def test_a_file_over_the_limit_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.images.decode.MAX_FILE_BYTES", 10)
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
