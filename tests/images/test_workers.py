"""Worker processes: bounded in time, replaced when they die, and never a file lost or taken for another."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnpipe.errors import CnnpipeError
from cnnpipe.images.decode import RGBImage, decode_image
from cnnpipe.images.workers import DecodedChunk, DecodedFile, DecoderPool

pytestmark = pytest.mark.timeout(120)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SIZE = (4, 4)

# Decoders for worker processes, which import them from here by name.


def decode_as_told(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    if notes := os.environ.get("CNNPIPE_TEST_PIDS"):
        Path(notes, str(os.getpid())).touch()
    if data.startswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"FOREVER"):
        time.sleep(600)
    if data.startswith(b"SLOW"):
        time.sleep(0.3)
        return np.zeros((*image_size, 3), np.uint8)
    return decode_image(data, image_size)


def stop_once(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    mark = Path(os.environ["CNNPIPE_TEST_MARK"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return decode_image(data, image_size)


def write_pictures(folder: Path, number: int) -> list[str]:
    names = [f"{index:03}.png" for index in range(number)]
    for index, name in enumerate(names):
        Image.new("RGB", SIZE, (index % 256, 0, 0)).save(folder / name)
    return names


def files_of(chunks: list[DecodedChunk]) -> list[DecodedFile]:
    return [file for chunk in chunks for file in chunk.files]


def test_file_that_never_ends_is_a_timeout_and_the_others_are_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_pictures(tmp_path, 20)
    (tmp_path / names[5]).write_bytes(b"FOREVER")
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, logger="cnnpipe"),
        DecoderPool(2, decode_as_told, seconds_per_file=1.0) as pool,
    ):
        files = files_of(list(pool.decode(tmp_path, iter(names), SIZE)))
    assert time.monotonic() - began < 30
    assert [file.path for file in files] == names
    errors = [file for file in files if not file.has_image]
    assert errors == [
        DecodedFile(
            names[5],
            hashlib.sha256(b"FOREVER").hexdigest(),
            "timeout",
            "the decoder took too long, more than 1 seconds",
        )
    ]
    assert f"the decoder took too long on {names[5]}: more than 1 seconds" in caplog.text


def test_limit_is_that_of_a_file_so_a_run_of_slow_ones_is_not_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{index}.png" for index in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(b"SLOW")  # 2.4 seconds together
    with (
        caplog.at_level(logging.WARNING, logger="cnnpipe"),
        DecoderPool(1, decode_as_told, seconds_per_file=1.5) as pool,
    ):
        chunks = list(pool.decode(tmp_path, iter(names), SIZE))
    assert [file.path for file in files_of(chunks) if file.has_image] == names
    assert sum(len(chunk.images) for chunk in chunks) == 8
    assert caplog.text == ""


@needs_posix
def test_worker_that_is_stopped_from_outside_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    names = write_pictures(tmp_path / "images", 10)
    monkeypatch.setenv("CNNPIPE_TEST_MARK", str(tmp_path / "mark"))
    with DecoderPool(1, stop_once, seconds_per_file=1.0) as pool:
        files = files_of(list(pool.decode(tmp_path / "images", iter(names), SIZE)))
    assert (tmp_path / "mark").exists()
    assert [file.path for file in files if file.has_image] == names


@needs_posix
def test_idle_worker_that_is_stopped_loses_no_row(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 10)
    with DecoderPool(1, seconds_per_file=1.0) as pool:
        assert len(files_of(list(pool.decode(tmp_path, iter(names), SIZE)))) == 10
        (worker,) = pool._alive
        os.kill(worker._process.pid, signal.SIGSTOP)
        files = files_of(list(pool.decode(tmp_path, iter(names), SIZE)))
    assert all(file.has_image for file in files)


_PAUSED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_workers
from cnnpipe.images.workers import DecoderPool
paths = [path.name for path in sorted(Path({folder!r}).iterdir())]
with DecoderPool(1, test_workers.decode_as_told, seconds_per_file=1.0) as pool:
    print("ready", flush=True)
    for chunk in pool.decode(Path({folder!r}), iter(paths), (4, 4)):
        print(*(file.error_kind or "ok" for file in chunk.files), flush=True)
"""


@needs_posix
def test_time_in_which_the_job_was_suspended_is_not_held_against_a_file(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index:02}.png").write_bytes(b"SLOW")
    code = _PAUSED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as job:
        assert job.stdout is not None
        first = [job.stdout.readline(), job.stdout.readline()]
        job.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        job.send_signal(signal.SIGCONT)
        stdout, stderr = job.communicate(timeout=60)
    assert first[0] == "ready\n"
    assert (first[1] + stdout).split() == ["ok"] * 10
    assert stderr == ""  # no worker was killed and replaced


@needs_posix
def test_crash_costs_few_processes_however_long_its_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "pids").mkdir()
    names = write_pictures(tmp_path / "images", 250)
    (tmp_path / "images" / names[-1]).write_bytes(b"CRASH")
    monkeypatch.setenv("CNNPIPE_TEST_PIDS", str(tmp_path / "pids"))
    with DecoderPool(1, decode_as_told) as pool:
        chunks = list(pool.decode(tmp_path / "images", iter(names), SIZE))
    files = files_of(chunks)
    assert [file.path for file in files] == names
    assert [file.error_kind for file in files] == [""] * 249 + ["crashed"]
    # The worker of the chunk, and the one that is given its files one by one; the crash has ended both.
    assert len(list((tmp_path / "pids").iterdir())) == 2


def test_known_digests_are_asked_once_a_file_in_order(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 30)
    known = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names[::3]}
    known[names[1]] = "0" * 64
    asked: list[str] = []

    def look_up(path: str) -> str:
        asked.append(path)
        return known.get(path, "")

    with DecoderPool(2) as pool:
        chunks = list(pool.decode(tmp_path, iter(names), SIZE, look_up))
    assert asked == names
    files = files_of(chunks)
    assert [file.path for file in files if file.unchanged] == names[::3]
    decoded = [int(file.path[:3]) for file in files if file.has_image]
    assert decoded == [index for index in range(30) if index % 3]
    assert [image[0, 0, 0] for chunk in chunks for image in chunk.images] == decoded


@needs_posix
def test_known_digests_hold_for_files_that_are_tried_one_by_one(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 8)
    (tmp_path / names[3]).write_bytes(b"CRASH")
    known = hashlib.sha256((tmp_path / names[6]).read_bytes()).hexdigest()
    with DecoderPool(1, decode_as_told) as pool:
        files = files_of(list(pool.decode(tmp_path, iter(names), SIZE, lambda path: known)))
    assert [file.unchanged for file in files] == [index == 6 for index in range(8)]
    assert [file.error_kind for file in files] == ["crashed" if index == 3 else "" for index in range(8)]


def test_file_known_to_crash_the_decoder_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"CRASH")
    sha256 = hashlib.sha256(b"CRASH").hexdigest()
    known: Callable[[str], str] = {"x.png": sha256}.__getitem__
    with DecoderPool(1, decode_as_told) as pool:
        files = files_of(list(pool.decode(tmp_path, iter(["x.png"]), SIZE, known)))
    assert files == [DecodedFile("x.png", sha256, unchanged=True)]


@needs_posix
def test_worker_that_is_stopped_before_it_is_ready_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.images.workers._MAX_START_SECONDS", 0.5)
    names = write_pictures(tmp_path, 1)
    with DecoderPool(1, seconds_per_file=1.0) as pool:
        pool.start()
        (worker,) = pool._alive
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(CnnpipeError, match="a decoding process did not start: it took too long"):
            list(pool.decode(tmp_path, iter(names), SIZE))
