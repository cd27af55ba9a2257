"""The classifying engine: one row for every file, in order, whatever the decoder does."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import IMAGE_SIZE, expected_probabilities, load_digits, write_digits, write_model

from cnnpipe.classify.engine import (
    BatchRunner,
    EngineOptions,
    Rows,
    Shard,
    ShardRows,
    StageSeconds,
    _likeliest,
    classify_shards,
)
from cnnpipe.errors import CnnpipeError, ConfigError, GpuMemoryError
from cnnpipe.images.decode import RGBImage, decode_image
from cnnpipe.images.find import find_files
from cnnpipe.images.workers import DecodedChunk, DecodedFile, Decoder, DecoderPool
from cnnpipe.session import ClassifierSession, open_session


@dataclass(frozen=True)
class Row:
    """One of `Rows`."""

    path: str
    sha256: str
    labels: tuple[int, ...]
    probabilities: tuple[float, ...]
    error: str
    unchanged: bool


def rows_in(rows: Rows) -> list[Row]:
    return [
        Row(
            path,
            rows.sha256[index],
            tuple(rows.labels[index].tolist()),
            tuple(rows.probabilities[index].tolist()),
            rows.errors.get(index, ""),
            index in rows.unchanged,
        )
        for index, path in enumerate(rows.paths)
    ]


# Decoders for worker processes, which import them from here by name.


def decode_or_crash(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    if data.startswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"EXIT"):
        os._exit(7)
    return decode_image(data, image_size)


def decode_after_dying_once(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    mark = Path(os.environ["CNNPIPE_TEST_MARK"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_image(data, image_size)


def decode_with_a_bug(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    raise AssertionError("not foreseen")


def decode_and_print(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    print("a library that talks")  # noqa: T201
    os.write(1, b"on the descriptor itself\n")
    return decode_image(data, image_size)


def decode_forever(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    Path(os.environ["CNNPIPE_TEST_PIDS"], str(os.getpid())).touch()
    time.sleep(600)
    return decode_image(data, image_size)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ClassifierSession:
    return open_session(write_model(tmp_path_factory.mktemp("model") / "model.onnx"), "cpu", threads=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, range(400))
    return folder


def classify(
    folder: Path,
    session: ClassifierSession,
    options: EngineOptions | None = None,
    *,
    workers: int = 2,
    decoder: Decoder = decode_image,
) -> list[Row]:
    with DecoderPool(workers, decoder) as pool:
        parts = classify_shards(folder, whole(folder), session, pool, options or EngineOptions(), StageSeconds())
        return [row for part in parts for row in rows_in(part.rows)]


def whole(folder: Path) -> Iterator[Shard]:
    """Return all files of a folder as one shard."""
    return iter([Shard(0, list(find_files(folder)))])


def is_running(pid: int) -> bool:
    try:
        # A process that nobody has waited for yet still has its number, but it is no longer running.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_rows_are_the_files_in_their_order(digits: Path, session: ClassifierSession) -> None:
    rows = classify(digits, session)
    assert [row.path for row in rows] == list(find_files(digits))
    assert all(not row.error for row in rows)
    assert [row.sha256 for row in rows] == [
        hashlib.sha256((digits / row.path).read_bytes()).hexdigest() for row in rows
    ]


def test_labels_and_probabilities_are_the_models(digits: Path, session: ClassifierSession) -> None:
    rows = classify(digits, session)
    indices = [int(Path(row.path).stem) for row in rows]
    images, labels = load_digits()
    expected = expected_probabilities(np.repeat(images[indices][..., None], 3, axis=3))
    assert [row.labels[0] for row in rows] == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose([row.probabilities[0] for row in rows], expected.max(axis=1), atol=1e-5)
    correct = sum(row.labels[0] == labels[index] for row, index in zip(rows, indices, strict=True))
    assert correct / len(rows) > 0.94


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (7, 2), (400, 2), (1000, 3)])
def test_batch_size_and_workers_change_no_label(
    digits: Path, session: ClassifierSession, batch_size: int, workers: int
) -> None:
    expected = classify(digits, session)
    rows = classify(digits, session, EngineOptions(batch_size=batch_size), workers=workers)
    assert [(row.path, row.labels) for row in rows] == [(row.path, row.labels) for row in expected]
    np.testing.assert_allclose([row.probabilities[0] for row in rows], [row.probabilities[0] for row in expected], 1e-5)


def test_results_do_not_depend_on_the_timing(digits: Path, session: ClassifierSession) -> None:
    assert classify(digits, session, workers=1) == classify(digits, session, workers=3)


@pytest.fixture
def sizes(session: ClassifierSession, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images in each batch that the session runs."""
    noted: list[int] = []
    run = session.run

    def run_and_note(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        noted.append(len(images))
        return run(images)

    monkeypatch.setattr(session, "run", run_and_note)
    return noted


def test_last_batch_may_be_padded_to_a_fixed_shape(
    digits: Path, session: ClassifierSession, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassifierSession, "wants_fixed_batch", True)
    rows = classify(digits, session, EngineOptions(batch_size=64))
    assert len(rows) == 400
    assert set(sizes) == {64}


def test_top_k_is_sorted_and_sums_to_one(digits: Path, session: ClassifierSession) -> None:
    for row in classify(digits, session, EngineOptions(top_k=10)):
        assert sorted(row.labels) == list(range(10))
        assert list(row.probabilities) == sorted(row.probabilities, reverse=True)
        assert sum(row.probabilities) == pytest.approx(1, abs=1e-5)


def test_more_classes_than_there_are_is_a_setting_error(digits: Path, session: ClassifierSession) -> None:
    with pytest.raises(ConfigError, match=r"top_k must be at most 10, .* received 11"):
        classify(digits, session, EngineOptions(top_k=11))


def test_unreadable_files_are_rows_between_the_others(tmp_path: Path, session: ClassifierSession) -> None:
    paths = write_digits(tmp_path, range(100))
    (tmp_path / "0" / "a.txt").write_text("no image")
    (tmp_path / "3" / "empty.png").touch()
    (tmp_path / "9" / "zz.png").write_bytes((tmp_path / paths[0]).read_bytes()[:60])
    rows = classify(tmp_path, session)
    assert [row.path for row in rows] == list(find_files(tmp_path))
    errors = {row.path: row for row in rows if row.error}
    assert {path: row.error.split(":")[0] for path, row in errors.items()} == {
        "0/a.txt": "not_an_image",
        "3/empty.png": "empty",
        "9/zz.png": "truncated",
    }
    assert errors["0/a.txt"].sha256 == hashlib.sha256(b"no image").hexdigest()
    assert errors["3/empty.png"].sha256 == ""
    assert all(row.labels == (-1,) for row in errors.values())


def test_folder_of_nothing_but_errors_gives_its_rows(tmp_path: Path, session: ClassifierSession) -> None:
    for number in range(300):
        (tmp_path / f"{number:03d}.jpg").write_bytes(b"no image")
    assert [row.error.split(":")[0] for row in classify(tmp_path, session)] == ["not_an_image"] * 300


def test_file_that_crashes_the_decoder_costs_one_row(
    tmp_path: Path, session: ClassifierSession, caplog: pytest.LogCaptureFixture
) -> None:
    write_digits(tmp_path, range(150))
    crashing = {"0/0000.png": b"CRASH first", "5/x.png": b"CRASH", "5/y.png": b"EXIT", "9/zz.png": b"CRASH last"}
    for path, content in crashing.items():
        (tmp_path / path).write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="cnnpipe"):
        rows = classify(tmp_path, session, decoder=decode_or_crash)
    assert [row.path for row in rows] == list(find_files(tmp_path))
    errors = {row.path: row for row in rows if row.error}
    assert set(errors) == set(crashing)
    assert {row.error.split(":")[0] for row in errors.values()} == {"crashed"}
    assert "SIGSEGV" in errors["5/x.png"].error
    assert "exit status 7" in errors["5/y.png"].error
    assert errors["5/x.png"].sha256 == hashlib.sha256(b"CRASH").hexdigest()
    assert "the decoder crashed on 5/x.png" in caplog.text


def test_worker_that_is_killed_from_outside_loses_no_row(
    tmp_path: Path, session: ClassifierSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNPIPE_TEST_MARK", str(tmp_path / "mark"))
    write_digits(tmp_path / "images", range(60))
    rows = classify(tmp_path / "images", session, decoder=decode_after_dying_once)
    assert (tmp_path / "mark").exists()
    assert len(rows) == 60
    assert not any(row.error for row in rows)


def test_bug_in_the_decoder_is_not_hidden_in_a_row(digits: Path, session: ClassifierSession) -> None:
    with pytest.raises(RuntimeError, match=r"the decoder failed on 0/0000\.png: AssertionError\('not foreseen'\)"):
        classify(digits, session, decoder=decode_with_a_bug)


def test_worker_that_cannot_start_is_an_error_not_rows(
    digits: Path, session: ClassifierSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["/nowhere"])
    with pytest.raises(CnnpipeError, match="a decoding process did not start: exit status 1"):
        classify(digits, session)


def test_decoder_that_prints_does_not_disturb(digits: Path, session: ClassifierSession) -> None:
    assert classify(digits, session, decoder=decode_and_print) == classify(digits, session)


def test_shards_are_read_only_as_far_as_needed(digits: Path, session: ClassifierSession) -> None:
    first = next(find_files(digits))
    taken = 0

    def endless() -> Iterator[Shard]:
        nonlocal taken
        for taken in count(1):
            yield Shard(taken, [first] * 100)

    with DecoderPool(2) as pool:
        parts = classify_shards(digits, endless(), session, pool, EngineOptions(), StageSeconds())
        classified = sum(len(next(parts).rows.paths) for _ in range(20))
    assert classified > 0
    assert taken * 100 <= classified + 6 * 128 + 32 + 100


def test_seconds_of_each_stage_are_counted(digits: Path, session: ClassifierSession) -> None:
    seconds = StageSeconds()
    with DecoderPool(1) as pool:
        for _ in classify_shards(digits, whole(digits), session, pool, EngineOptions(), seconds):
            pass
    assert min(seconds.list, seconds.decode, seconds.inference) > 0
    assert seconds.write == 0


def test_it_runs_in_a_thread(digits: Path, session: ClassifierSession) -> None:
    with ThreadPoolExecutor(1) as thread:
        assert len(thread.submit(classify, digits, session).result()) == 400


def test_pool_ends_its_workers_when_it_is_left_early(digits: Path) -> None:
    with DecoderPool(2) as pool:
        next(pool.decode(digits, find_files(digits), IMAGE_SIZE))
        workers = [worker._process for worker in pool._alive]
        assert workers
    assert all(process.returncode is not None for process in workers)
    with pytest.raises(CnnpipeError, match="decoding was stopped"):
        pool.start()


class FakePool(DecoderPool):
    """Gives a black image for every path that ends in .png and an error for others, in chunks of a fixed length."""

    def __init__(self, chunk_files: int) -> None:
        super().__init__(1)
        self._chunk_files = chunk_files
        self.taken = 0

    def decode(
        self,
        root: Path,
        paths: Iterator[str],
        image_size: tuple[int, int],
        known_digests: Callable[[str], str] | None = None,
    ) -> Iterator[DecodedChunk]:
        while names := list(islice(paths, self._chunk_files)):
            self.taken += len(names)
            kinds = ["" if name.endswith(".png") else "empty" for name in names]
            files = tuple(DecodedFile(name, "", kind, kind) for name, kind in zip(names, kinds, strict=True))
            yield DecodedChunk.of(files, np.zeros((kinds.count(""), *image_size, 3), np.uint8), 0.0)


def test_rows_of_failed_files_do_not_pile_up_after_a_batch_that_is_not_full(session: ClassifierSession) -> None:
    paths = [*(f"{number}.png" for number in range(5)), *(f"{number}.txt" for number in range(100_000))]
    pool, given, held = FakePool(100), 0, []
    found = classify_shards(Path(), iter([Shard(0, paths)]), session, pool, EngineOptions(64), StageSeconds())
    for part in found:
        held.append(pool.taken - given)
        given += len(part.rows.paths)
    assert given == pool.taken == 100_005
    assert max(held) <= 5 + 6 * 4096 + 100


def test_batches_end_at_the_same_files_whatever_the_chunks(session: ClassifierSession, sizes: list[int]) -> None:
    # A full batch, one of 4,096 failed files, one that ends by its 4,096th failed file, and the rest.
    kinds = ["png"] * 64 + ["txt"] * 5000 + ["png"] * 3 + ["txt"] * 4090 + ["png"] + ["txt"] * 7 + ["png"] * 2
    paths = [f"{number:05}.{kind}" for number, kind in enumerate(kinds)]
    results = []
    for chunk_files in (1, 7, 128, 20_000):
        pool = FakePool(chunk_files)
        found = classify_shards(Path(), iter([Shard(0, paths)]), session, pool, EngineOptions(64), StageSeconds())
        results.append([row for part in found for row in rows_in(part.rows)])
        assert sizes == [64, 3, 3]
        sizes.clear()
    assert [row.path for row in results[0]] == paths
    assert results[1:] == results[:1] * 3


class NumberedPool(FakePool):
    """Gives images whose first pixel is the number of their file."""

    def decode(self, *arguments: Any, **options: Any) -> Iterator[DecodedChunk]:
        for chunk in super().decode(*arguments, **options):
            numbers = [int(Path(file.path).stem) for file in chunk.files if file.has_image]
            for image, number in zip(chunk.images, numbers, strict=True):
                image[0, 0] = (*divmod(number, 256), 0)
            yield chunk


@pytest.mark.parametrize("chunk_files", [1, 7, 300])
def test_images_of_any_chunks_come_into_large_batches_whole_and_in_order(
    chunk_files: int, session: ClassifierSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[npt.NDArray[np.uint8]] = []
    run = session.run

    def run_and_keep(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        batches.append(images.copy())
        return run(images)

    monkeypatch.setattr(session, "run", run_and_keep)
    paths = [f"{number}.{'txt' if number % 5 == 3 else 'png'}" for number in range(1000)]
    shards = iter([Shard(0, paths)])
    list(classify_shards(Path(), shards, session, NumberedPool(chunk_files), EngineOptions(256), StageSeconds()))
    assert [len(batch) for batch in batches] == [256, 256, 256, 32]
    numbers = np.concatenate(batches)[:, 0, 0, :2].astype(int) @ [256, 1]
    assert numbers.tolist() == [number for number in range(1000) if number % 5 != 3]


def rows_of(parts: Iterator[ShardRows]) -> dict[int, list[Row]]:
    """Return the rows by their shard, each of which must be complete."""
    rows: dict[int, list[Row]] = {}
    complete: set[int] = set()
    for part in parts:
        assert part.shard.number not in complete
        assert part.start == len(rows.setdefault(part.shard.number, []))
        rows[part.shard.number].extend(rows_in(part.rows))
        if part.complete:
            complete.add(part.shard.number)
    assert set(rows) == complete
    return rows


def test_rows_of_a_shard_do_not_depend_on_what_is_classified_around_it(
    digits: Path, session: ClassifierSession
) -> None:
    paths = list(find_files(digits))
    shards = [Shard(number, paths[start : start + 50]) for number, start in enumerate(range(0, 400, 50))]
    options = EngineOptions(32, 3)
    with DecoderPool(2) as pool:
        together = rows_of(classify_shards(digits, iter(shards), session, pool, options, StageSeconds()))
        alone = rows_of(classify_shards(digits, iter(shards[3:4]), session, pool, options, StageSeconds()))
    assert [row.path for rows in together.values() for row in rows] == paths
    assert alone == {3: together[3]}


def test_no_batch_spans_two_shards(session: ClassifierSession, sizes: list[int]) -> None:
    shards = [Shard(0, ["a.png"] * 5 + ["b.txt"]), Shard(1, ["b.txt"]), Shard(2, ["a.png"] * 9), Shard(3, ["a.png"])]
    rows = rows_of(classify_shards(Path(), iter(shards), session, FakePool(1000), EngineOptions(8), StageSeconds()))
    assert sizes == [5, 8, 1, 1]
    assert {number: len(part) for number, part in rows.items()} == {0: 6, 1: 1, 2: 9, 3: 1}


def test_unchanged_files_are_told_and_changed_ones_get_new_rows(tmp_path: Path, session: ClassifierSession) -> None:
    paths = write_digits(tmp_path, range(20))
    made = {row.path: row for row in classify(tmp_path, session)}
    previous = {path: made[path].sha256 for path in paths[3:15]}
    (tmp_path / paths[5]).write_bytes((tmp_path / paths[0]).read_bytes())
    with DecoderPool(2) as pool:
        shards = iter([Shard(0, paths)])
        options, seconds = EngineOptions(), StageSeconds()
        parts = classify_shards(tmp_path, shards, session, pool, options, seconds, lambda path: previous.get(path, ""))
        rows = {row.path: row for part in parts for row in rows_in(part.rows)}
    assert list(rows) == paths
    assert [path for path, row in rows.items() if row.unchanged] == [*paths[3:5], *paths[6:15]]
    assert rows[paths[5]].labels == made[paths[0]].labels
    assert all(rows[path] == made[path] for path in (*paths[:3], *paths[15:]))


@pytest.mark.parametrize("top_k", [1, 3, 8, 9, 20])
def test_of_equal_probabilities_the_first_class_comes_first(top_k: int) -> None:
    probabilities = np.random.default_rng(0).integers(0, 6, (500, 20)).astype(np.float32) / np.float32(6)
    expected = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(_likeliest(probabilities, top_k), expected)


def run_with_room_for(num_images: int, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Do what a GPU does that has room for so many images at a time."""
    if len(images) > num_images:
        raise GpuMemoryError(f"the GPU has no room for a batch of {len(images)}")
    return images[:, 0, 0, :2].astype(np.float32)


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_batches_are_halved_for_good_when_the_gpu_is_full(fixed_shape: bool, caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        sizes.append(len(images))
        return run_with_room_for(30, images)

    images = np.arange(100 * 3, dtype=np.uint8).reshape(100, 1, 1, 3)
    runner = BatchRunner(run, 100, fixed_shape=fixed_shape)
    for _ in range(2):
        np.testing.assert_array_equal(runner.run(images), images[:, 0, 0, :2])
    assert runner.size == 25
    assert sizes == [100, 50, *[25] * 8]
    assert "no room for a batch of 50; going on with batches of 25" in caplog.text


def test_gpu_without_room_for_one_image_is_an_error() -> None:
    runner = BatchRunner(functools.partial(run_with_room_for, 0), 8, fixed_shape=True)
    with pytest.raises(GpuMemoryError, match="no room for a batch of 1"):
        runner.run(np.zeros((8, 4, 4, 3), np.uint8))


# No `if __name__ == "__main__"`: a worker must not import the main module of its parent again.
_STUCK = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
import test_engine
from cnnpipe.images.find import find_files
from cnnpipe.images.workers import DecoderPool
with DecoderPool(2, test_engine.decode_forever) as pool:
    for chunk in pool.decode(Path({folder!r}), find_files(Path({folder!r})), (8, 8)):
        pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_parent_leaves_no_process_behind(digits: Path, tmp_path: Path, ending: signal.Signals) -> None:
    code = _STUCK.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], folder=str(digits))
    environment = os.environ | {"CNNPIPE_TEST_PIDS": str(tmp_path)}
    # A shell has Ctrl-C ignored in what it starts in the background, as these tests may be.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        parent.send_signal(ending)
        _, stderr = parent.communicate(timeout=20)
    finally:
        parent.kill()
    assert parent.returncode != 0
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    if ending == signal.SIGINT:
        assert len(re.findall("Traceback", stderr)) == 1  # the parent's own KeyboardInterrupt, none of a worker
