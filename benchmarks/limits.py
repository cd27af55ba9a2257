"""The limits of the machine: decoding alone and inference alone, each with all cores.

`python -m benchmarks.limits FOLDER MODEL…` prints one JSON object on the last line. Decoding is reading, hashing and
decoding by cnnpipe's own code in processes that return nothing, so no engine around it can be faster. Inference is the
best of several batch sizes on arrays in memory, in one session on all cores or one session per core.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from threading import Barrier
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.images.find import find_files
from cnnpipe.images.workers import DecoderPool, decode_files
from cnnpipe.machine import usable_cores

__all__ = ["InferenceLimit", "both_per_second", "measure_decoding", "measure_inference", "measure_pool"]

_BATCH_SIZES: Final = (8, 16, 32, 64, 128, 256)
_MAX_IMAGES: Final = 2048
_WARM_UP_FILES: Final = 8

_Run = Callable[[npt.NDArray[np.uint8]], object]


@dataclass(frozen=True)
class InferenceLimit:
    """The fastest way found to run a model on images in memory."""

    images_per_second: float
    batch_size: int
    sessions: int
    """1 session with a thread per core, or one session of one thread per core."""


def both_per_second(decoded: float, inferred: float) -> float:
    """Return images/s of decoding and inference on the same cores, from the images/s of each alone on all of them."""
    return 1 / (1 / decoded + 1 / inferred)


def measure_decoding(root: Path, image_size: tuple[int, int], workers: int) -> float:
    """Return files/s that `workers` processes list, read, hash and decode, keeping nothing."""
    context = multiprocessing.get_context("spawn")
    all_up = context.Barrier(workers + 1)
    # Small chunks, so that the last one does not keep one core busy while the others are done.
    num_files = max(1, min(64, sum(1 for _ in find_files(root)) // (16 * workers)))
    with context.Pool(workers, initializer=_warm_up, initargs=(all_up, root, image_size)) as pool:
        all_up.wait()
        began = time.perf_counter()
        chunks = ((root, names, image_size) for names in _chunks(find_files(root), num_files))
        total = sum(pool.imap_unordered(_decode, chunks))
        return total / (time.perf_counter() - began)


def measure_pool(root: Path, image_size: tuple[int, int], workers: int) -> float:
    """Return files/s that a `DecoderPool` with running workers delivers to this process."""
    with DecoderPool(workers) as pool:
        for _ in pool.decode(root, islice(find_files(root), 2 * _WARM_UP_FILES * workers), image_size):
            pass  # enough files to start every worker
        began = time.perf_counter()
        total = sum(len(chunk.files) for chunk in pool.decode(root, find_files(root), image_size))
        return total / (time.perf_counter() - began)


def measure_inference(model: Path, images: npt.NDArray[np.uint8], cores: int, seconds: float = 0.3) -> InferenceLimit:
    """Try every batch size in one session and in one session per core, for `seconds` each, and return the fastest.

    Args:
        images: (N, H, W, 3) uint8, at least 1.
    """
    tried = []
    for sessions in dict.fromkeys((1, cores)):
        runs = [_open_run(model, cores // sessions) for _ in range(sessions)]
        for batch_size in _BATCH_SIZES:
            tried.append(InferenceLimit(_rate(runs, images, batch_size, seconds), batch_size, sessions))
    return max(tried, key=lambda limit: limit.images_per_second)


def _rate(runs: Sequence[_Run], images: npt.NDArray[np.uint8], batch_size: int, seconds: float) -> float:
    """Return images/s of several sessions, each in its own thread."""
    repeated = np.resize(images, (max(len(images), batch_size), *images.shape[1:]))
    batches = [repeated[first : first + batch_size] for first in range(0, len(repeated) - batch_size + 1, batch_size)]

    def run_until(run: _Run) -> int:
        run(batches[0])  # the first batch of a shape plans the memory
        all_ready.wait()
        done, number, end = 0, 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            run(batches[number % len(batches)])
            done, number = done + batch_size, number + 1
        return done

    all_ready = Barrier(len(runs) + 1)
    with ThreadPoolExecutor(len(runs)) as threads:
        futures = [threads.submit(run_until, run) for run in runs]
        all_ready.wait()
        began = time.perf_counter()
        total = sum(future.result() for future in futures)
        return total / (time.perf_counter() - began)


def _open_run(model: Path, threads: int) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _image_size(model: Path) -> tuple[int, int]:
    from cnnpipe.session import open_session

    return open_session(model, "cpu", threads=1).info.image_size


def _chunks(paths: Iterator[str], num_files: int) -> Iterator[list[str]]:
    while names := list(islice(paths, num_files)):
        yield names


def _warm_up(all_up: Any, root: Path, image_size: tuple[int, int]) -> None:
    """Decode a few files, so that everything is loaded, and wait for the other processes."""
    decode_files(root, list(islice(find_files(root), _WARM_UP_FILES)), image_size)
    all_up.wait()


def _decode(chunk: tuple[Path, list[str], tuple[int, int]]) -> int:
    return len(decode_files(*chunk).files)


def main(folder: Path, models: Sequence[Path]) -> None:
    """Measure decoding the files of a folder and running each of the models, on all cores."""
    cores, image_size = usable_cores(), _image_size(models[0])
    images = decode_files(folder, list(islice(find_files(folder), _MAX_IMAGES)), image_size).images
    report = {
        "decode": measure_decoding(folder, image_size, cores),
        "pool": measure_pool(folder, image_size, cores),
        "inference": [asdict(measure_inference(model, images, cores)) for model in models],
        "cores": cores,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(model) for model in sys.argv[2:]])
