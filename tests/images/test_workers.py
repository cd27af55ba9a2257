"""Files are read, hashed and decoded by worker processes: in order, bounded in time, and no file is ever lost."""

from __future__ import annotations

import hashlib
import io
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

from cnnpipe.errors import CnnpipeError, ImageError
from cnnpipe.images.decode import RGBImage, decode_image
from cnnpipe.images.workers import MAX_WORKER_BYTES, DecodedChunk, DecodedFile, DecoderPool, decode_files

pytestmark = pytest.mark.timeout(120)

SIZE = (6, 8)

# Decoders; worker processes import them from here by name.


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


def report_memory_limit(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    import resource

    raise ImageError("unsupported", str(resource.getrlimit(resource.RLIMIT_AS)[0]))


def refuse_to_decode(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    raise AssertionError("was decoded")


def run_out_of_memory(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    raise MemoryError


def decode_slowly(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    time.sleep(0.05)
    return decode_image(data, image_size)


def write_pictures(folder: Path, number: int) -> list[str]:
    names = [f"{index:03}.png" for index in range(number)]
    for index, name in enumerate(names):
        Image.new("RGB", SIZE[::-1], (index % 256, 0, 0)).save(folder / name)
    return names


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(chunks: list[DecodedChunk]) -> list[DecodedFile]:
    return [file for chunk in chunks for file in chunk.files]


# --- in one process


def test_files_are_read_hashed_and_decoded_in_their_order(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6)
    (tmp_path / names[2]).write_bytes(b"not an image")
    (tmp_path / names[3]).unlink()
    (tmp_path / names[5]).write_bytes(b"")
    chunk = decode_files(tmp_path, names, SIZE)
    assert [file.path for file in chunk.files] == chunk.paths == names
    assert [file.has_image for file in chunk.files] == [True, True, False, False, True, False]
    assert [file.error_kind for file in chunk.files] == ["", "", "not_an_image", "not_found", "", "empty"]
    assert chunk.sha256 == [digest(tmp_path / name) if name not in (names[3], names[5]) else "" for name in names]
    assert chunk.images[:, 0, 0, 0].tolist() == [0, 1, 4]
    assert chunk.seconds > 0


def test_file_with_its_known_digest_is_not_decoded_and_any_other_is(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 4)
    known = ["", "0" * 64, digest(tmp_path / names[2]), digest(tmp_path / names[2])]
    chunk = decode_files(tmp_path, names, SIZE, known_digests=known)
    assert [file.unchanged for file in chunk.files] == [False, False, True, False]
    assert chunk.images[:, 0, 0, 0].tolist() == [0, 1, 3]
    unchanged = decode_files(tmp_path, names[2:3], SIZE, refuse_to_decode, known[2:3])
    assert unchanged.files == (DecodedFile(names[2], known[2], unchanged=True),)
    assert unchanged.images.shape == (0, *SIZE, 3)


def test_unreadable_file_is_an_error_and_not_unchanged_whatever_was_known(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    chunk = decode_files(tmp_path, ["empty.png", "gone.png"], SIZE, known_digests=["", ""])
    assert [(file.error_kind, file.unchanged) for file in chunk.files] == [("empty", False), ("not_found", False)]


def test_no_file_is_begun_after_the_time(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6)
    chunk = decode_files(tmp_path, names, SIZE, decode_slowly, max_seconds=0.01)
    assert chunk.paths == names[:1]
    assert len(chunk.images) == 1
    assert len(decode_files(tmp_path, names, SIZE, max_seconds=60.0).files) == 6


def test_file_that_takes_all_memory_is_too_large(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 1)
    (file,) = decode_files(tmp_path, names, SIZE, run_out_of_memory).files
    assert file == DecodedFile(names[0], digest(tmp_path / names[0]), "too_large", file.error)
    assert file.error.startswith("not enough memory")


def test_bug_in_a_decoder_names_the_file(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"the decoder failed on 000\.png: AssertionError\('was decoded'\)"):
        decode_files(tmp_path, names, SIZE, refuse_to_decode)
    with (
        DecoderPool(1, refuse_to_decode) as pool,
        pytest.raises(
            RuntimeError, match=r"(?s)a bug in the decoder, from a worker process.*the decoder failed on 000"
        ),
    ):
        list(pool.decode(tmp_path, iter(names), SIZE))


# --- in worker processes


def test_file_that_never_ends_is_a_timeout_and_the_others_are_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_pictures(tmp_path, 20)
    (tmp_path / names[5]).write_bytes(b"FOREVER")
    with (
        caplog.at_level(logging.WARNING, logger="cnnpipe"),
        DecoderPool(2, decode_as_told, seconds_per_file=1.0) as pool,
    ):
        files = files_of(list(pool.decode(tmp_path, iter(names), SIZE)))
    assert [file.path for file in files] == names
    errors = [file for file in files if not file.has_image]
    message = "the decoder took too long, more than 1 seconds"
    assert errors == [DecodedFile(names[5], digest(tmp_path / names[5]), "timeout", message)]
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


def test_worker_that_is_stopped_from_outside_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    names = write_pictures(tmp_path / "images", 10)
    monkeypatch.setenv("CNNPIPE_TEST_MARK", str(tmp_path / "mark"))
    with DecoderPool(1, stop_once, seconds_per_file=1.0) as pool:
        files = files_of(list(pool.decode(tmp_path / "images", iter(names), SIZE)))
        (worker,) = pool._alive
        os.kill(worker._process.pid, signal.SIGSTOP)  # while it is idle
        files += files_of(list(pool.decode(tmp_path / "images", iter(names), SIZE)))
    assert (tmp_path / "mark").exists()
    assert [file.path for file in files if file.has_image] == names * 2


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


def test_time_in_which_the_job_was_suspended_is_not_held_against_a_file(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index:02}.png").write_bytes(b"SLOW")
    code = _PAUSED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
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
    assert first[0] == "ready\n", stderr
    assert (first[1] + stdout).split() == ["ok"] * 10
    assert stderr == ""  # no worker was killed and replaced


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
    assert [image[0, 0, 0] for chunk in chunks for image in chunk.images] == list(range(249))
    # The worker of the chunk, and the one that is given its files one by one; the crash has ended both.
    assert len(list((tmp_path / "pids").iterdir())) == 2


def test_known_digests_are_asked_once_a_file_in_order(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 30)
    known = {name: digest(tmp_path / name) for name in names[::3]}
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


def test_known_digests_hold_for_files_that_are_tried_one_by_one(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 8)
    (tmp_path / names[3]).write_bytes(b"CRASH")
    known = digest(tmp_path / names[6])
    with DecoderPool(1, decode_as_told) as pool:
        files = files_of(list(pool.decode(tmp_path, iter(names), SIZE, lambda path: known)))
    assert [file.unchanged for file in files] == [index == 6 for index in range(8)]
    assert [file.error_kind for file in files] == ["crashed" if index == 3 else "" for index in range(8)]


def test_file_known_to_crash_the_decoder_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"CRASH")
    known: Callable[[str], str] = {"x.png": digest(tmp_path / "x.png")}.__getitem__
    with DecoderPool(1, decode_as_told) as pool:
        files = files_of(list(pool.decode(tmp_path, iter(["x.png"]), SIZE, known)))
    assert files == [DecodedFile("x.png", known("x.png"), unchanged=True)]


def test_worker_that_is_stopped_before_it_is_ready_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.images.workers._MAX_START_SECONDS", 0.5)
    names = write_pictures(tmp_path, 1)
    with DecoderPool(1, seconds_per_file=1.0) as pool:
        pool.start()
        (worker,) = pool._alive
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(CnnpipeError, match="a decoding process did not start: it took too long"):
            list(pool.decode(tmp_path, iter(names), SIZE))


@pytest.mark.skipif(sys.platform == "darwin", reason="no such limit there")
def test_worker_limits_its_own_memory_and_not_its_parents(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    names = write_pictures(tmp_path, 1)
    with DecoderPool(1, report_memory_limit) as pool:
        (chunk,) = pool.decode(tmp_path, iter(names), SIZE)
    assert chunk.files[0].error == str(MAX_WORKER_BYTES)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_worker_prints_nothing_about_damaged_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "TIFF", compression="tiff_deflate")
    damaged = file.getvalue()[:12] + b"?" + file.getvalue()[13:]
    (tmp_path / "damaged.tif").write_bytes(damaged)
    with pytest.raises(ImageError, match="decoder error"):
        decode_image(damaged, SIZE)
    assert "ZIPDecode" in capfd.readouterr().err  # so libtiff does where it may
    with DecoderPool(1) as pool:
        (chunk,) = pool.decode(tmp_path, iter(["damaged.tif"]), SIZE)
    assert chunk.files[0].error_kind == "corrupt"
    assert capfd.readouterr() == ("", "")


_WITHOUT_DESCRIPTORS = """
import os, sys
from pathlib import Path
from cnnpipe.images.workers import DecoderPool
report = os.fdopen(os.dup(1), "w", buffering=1)
for number in (0, 1, 2):
    os.close(number)
with DecoderPool(1) as pool:
    (chunk,) = pool.decode(Path(sys.argv[1]), iter([sys.argv[2]]), (6, 8))
print(chunk.files[0].has_image, file=report)
"""


def test_workers_run_where_the_standard_descriptors_are_closed(tmp_path: Path) -> None:
    (name,) = write_pictures(tmp_path, 1)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _WITHOUT_DESCRIPTORS, str(tmp_path), name]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert result.stdout == "True\n"
