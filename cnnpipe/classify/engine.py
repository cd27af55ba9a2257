"""The stages of bulk classification: list -> read and decode -> batch -> run, overlapping, with bounded memory.

Listing and batching happen here, decoding in the worker processes of a `DecoderPool`, inference in threads that run a
batch each. This process handles files by the chunk, never one by one: its own work would limit a machine of many cores.
Memory does not depend on the number of files, and results do not depend on timing: a shard's files and their order
alone decide which images make a batch, so the same shard gives the same bits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import ConfigError, GpuMemoryError
from cnnpipe.images.workers import DecodedChunk, DecoderPool

if TYPE_CHECKING:  # onnxruntime is loaded by whoever opens the session
    from cnnpipe.session import ClassifierSession

__all__ = ["BatchRunner", "EngineOptions", "Rows", "Shard", "ShardRows", "StageSeconds", "check_top_k",
           "classify_shards"]  # fmt: skip

_MAX_WAITING_FILES: Final = 4096
"""Files without an image that may wait for the images before them; with more, that batch is run as it is."""

_FEW_RANKS: Final = 8
"""Up to this many ranks, repeated maxima are faster than sorting all classes."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How to classify."""

    batch_size: int | None = None
    """Images a step; None is what suits the device."""
    top_k: int = 1
    """Classes to report for each image."""
    threads: int = 1
    """Batches that run at a time, each in a thread; more than 1 is for a session of one thread on several cores."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive files whose rows are written in one transaction."""

    number: int
    paths: Sequence[str]
    """Relative to the folder; at least one."""
    ordinals: Sequence[int] = ()
    """Positions of their rows in the table; not used here."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The outcomes for consecutive files, column by column."""

    paths: Sequence[str]
    """Relative to the folder, as `find_files` gave them."""
    sha256: Sequence[str]
    """SHA-256 of each file's bytes; empty if they could not be read."""
    labels: npt.NDArray[np.int32]
    """(files, top_k) indices of the likeliest classes, the likeliest first; -1 in a row without."""
    probabilities: npt.NDArray[np.float32]
    """(files, top_k), 0-1."""
    errors: dict[int, str]
    """Index of a file that failed -> `kind: message`."""
    unchanged: Sequence[int]
    """Indices of files that have the digest of their previous row, which stays valid."""

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Self:
        """Return all rows of at least one part, one after the other."""
        starts = np.cumsum([0, *(len(part.paths) for part in parts)]).tolist()
        return cls(
            [path for part in parts for path in part.paths],
            [sha256 for part in parts for sha256 in part.sha256],
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
            {start + i: error for start, part in zip(starts, parts, strict=False) for i, error in part.errors.items()},
            [start + index for start, part in zip(starts, parts, strict=False) for index in part.unchanged],
        )

    def part(self, start: int, stop: int) -> Rows:
        """Return some of the rows."""
        return Rows(
            self.paths[start:stop],
            self.sha256[start:stop],
            self.labels[start:stop],
            self.probabilities[start:stop],
            {index - start: error for index, error in self.errors.items() if start <= index < stop},
            [index - start for index in self.unchanged if start <= index < stop],
        )


@dataclass(frozen=True, slots=True)
class ShardRows:
    """Some rows of a shard; those before them came earlier."""

    shard: Shard
    start: int
    """Index of the first file in the shard."""
    rows: Rows

    @property
    def complete(self) -> bool:
        """Whether these are the shard's last rows."""
        return self.start + len(self.rows.paths) == len(self.shard.paths)


@dataclass
class StageSeconds:
    """Seconds spent in each stage. The stages overlap, so their sum exceeds the time that has passed."""

    list: float = 0.0
    decode: float = 0.0
    """Summed over the workers."""
    inference: float = 0.0
    """Summed over the threads."""
    write: float = 0.0


def classify_shards(
    root: Path,
    shards: Iterator[Shard],
    session: ClassifierSession,
    pool: DecoderPool,
    options: EngineOptions,
    seconds: StageSeconds,
    previous_digest: Callable[[str], str] | None = None,
) -> Iterator[ShardRows]:
    """Classify the files of shards, and yield their rows in order, as soon as they are known.

    No batch spans two shards: a shard's rows are the same whatever is classified before or after it.

    Args:
        root: the folder that the paths are relative to.
        shards: read only as far as needed.
        seconds: the stages' time is added here.
        previous_digest: path -> SHA-256 of the file in its previous row, "" for none; an unchanged file is not decoded.
    Raises:
        ConfigError: `top_k` exceeds the number of classes.
        ModelError, ProviderError: the model or the device failed.
        CnnpipeError: no decoding process can be started.
        RuntimeError: a bug in the decoder.
    """
    check_top_k(options.top_k, session)
    open_shards, files, images = _OpenShards(), _WaitingFiles(), _WaitingImages()
    batches = _Batches(options.batch_size or session.default_batch_size, open_shards.lengths)
    runner = BatchRunner(session.run, batches.size, fixed_shape=session.wants_fixed_batch)
    with _Inference(runner, options.threads, options.top_k, seconds) as inference:
        paths = open_shards.paths(shards, seconds)
        for chunk in pool.decode(root, paths, session.info.image_size, previous_digest):
            seconds.decode += chunk.seconds
            files.add(chunk)
            images.add(chunk.images)
            for size in batches.add(chunk):
                inference.begin(images.take(size))
            too_many = files.number > 2 * _MAX_WAITING_FILES
            # One at a time: a GPU that is waited for until it has nothing left to do has a pause.
            yield from open_shards.split(files.take(*inference.take_finished(1 if too_many else 0)))
        yield from open_shards.split(files.take(*inference.take_finished(inference.num_begun)))


def _likeliest(probabilities: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int32]:
    """Return the indices of the likeliest classes, (N, top_k); of equal ones, the first class comes first."""
    if top_k > _FEW_RANKS:
        return np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    left = probabilities.copy() if top_k > 1 else probabilities
    order = np.empty((len(left), top_k), np.int32)
    for rank in range(top_k):
        order[:, rank] = left.argmax(axis=1)
        if rank + 1 < top_k:
            left[np.arange(len(left)), order[:, rank]] = -1
    return order


class _WaitingImages:
    """Images of the files whose batch has not ended; each is copied at most once, however small the chunks."""

    def __init__(self) -> None:
        self._parts: deque[npt.NDArray[np.uint8]] = deque()

    def add(self, images: npt.NDArray[np.uint8]) -> None:
        """Append images, (N, H, W, 3); N may be 0."""
        if len(images):
            self._parts.append(images)

    def take(self, number: int) -> npt.NDArray[np.uint8]:
        """Take the first `number` images, at least one; there must be that many."""
        taken: list[npt.NDArray[np.uint8]] = []
        while number:
            part = self._parts.popleft()
            taken.append(part[:number])
            if len(part) > number:
                self._parts.appendleft(part[number:])
            number -= len(taken[-1])
        return taken[0] if len(taken) == 1 else np.concatenate(taken)


_Results = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Class indices and probabilities of images, (N, top_k) each."""


class _Inference:
    """Runs batches in threads, a few ahead of what is taken, and gives their results in order.

    Args:
        threads: one for each core, with a session of one thread, is faster than one batch on all cores: no core waits
            at every layer for another that is decoding at that moment.
    """

    def __init__(self, runner: BatchRunner, threads: int, top_k: int, seconds: StageSeconds) -> None:
        self._runner = runner
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="inference")
        self._max_begun = 4 * threads
        self._begun: deque[Future[tuple[_Results, float]]] = deque()
        self._top_k = top_k
        self._none = np.empty((0, top_k), np.int32), np.empty((0, top_k), np.float32)
        self._seconds = seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def begin(self, images: npt.NDArray[np.uint8]) -> None:
        """Run a batch as soon as a thread is free."""
        self._begun.append(self._threads.submit(self._run, images))

    def _run(self, images: npt.NDArray[np.uint8]) -> tuple[_Results, float]:
        began = time.perf_counter()
        probabilities = self._runner.run(images)
        labels = _likeliest(probabilities, self._top_k)
        results = labels, np.take_along_axis(probabilities, labels, axis=1)
        return results, time.perf_counter() - began

    @property
    def num_begun(self) -> int:
        """Batches whose results were not taken yet."""
        return len(self._begun)

    def take_finished(self, num_awaited: int) -> _Results:
        """Return the results of the first batches that have ended; wait if too many have not.

        Args:
            num_awaited: batches to wait for in any case.
        """
        taken = [self._none]
        while self._begun and (
            len(taken) <= num_awaited or self._begun[0].done() or len(self._begun) > self._max_begun
        ):
            results, seconds = self._begun.popleft().result()
            self._seconds.inference += seconds
            taken.append(results)
        if len(taken) <= 2:
            return taken[-1]
        return np.concatenate([labels for labels, _ in taken]), np.concatenate([each for _, each in taken])


class _OpenShards:
    """Hands out the paths of shards, and assigns rows to them."""

    def __init__(self) -> None:
        self.lengths: deque[int] = deque()
        """Numbers of files of the shards that were begun, for whoever counts files after the decoder."""
        self._open: deque[tuple[Shard, int]] = deque()  # index of the next row

    def paths(self, shards: Iterator[Shard], seconds: StageSeconds) -> Iterator[str]:
        while True:
            began = time.perf_counter()
            shard = next(shards, None)
            seconds.list += time.perf_counter() - began
            if shard is None:
                return
            self.lengths.append(len(shard.paths))
            self._open.append((shard, 0))
            yield from shard.paths

    def split(self, rows: Rows) -> Iterator[ShardRows]:
        done = 0
        while done < len(rows.paths):
            shard, start = self._open.popleft()
            stop = done + min(len(shard.paths) - start, len(rows.paths) - done)
            part = ShardRows(shard, start, rows if stop - done == len(rows.paths) else rows.part(done, stop))
            if not part.complete:
                self._open.appendleft((shard, start + stop - done))
            done = stop
            yield part


class _Batches:
    """Decides where a batch ends: by counting files, never by chunks, whose lengths depend on the clock."""

    def __init__(self, size: int, lengths: deque[int]) -> None:
        self.size = size
        """Images of a full batch."""
        self._lengths = lengths
        self._num_left = 0
        """Files of the shard that are still to come."""
        self._num_images = 0
        self._num_waiting = 0
        """Files without an image after the first image of the open batch."""

    def add(self, chunk: DecodedChunk) -> list[int]:
        """Return the number of images of each batch that ends in this chunk."""
        ended = []
        for has_image, length in _runs(len(chunk.paths), sorted(chunk.others)):
            while length:
                if not self._num_left:
                    self._num_left = self._lengths.popleft()
                step = min(length, self._num_left)
                if has_image:
                    step = min(step, self.size - self._num_images)
                    self._num_images += step
                elif self._num_images:
                    step = min(step, _MAX_WAITING_FILES + 1 - self._num_waiting)
                    self._num_waiting += step
                length -= step
                self._num_left -= step
                full = self._num_images == self.size or self._num_waiting > _MAX_WAITING_FILES
                if self._num_images and (full or not self._num_left):
                    ended.append(self._num_images)
                    self._num_images = self._num_waiting = 0
        return ended


def _runs(num_files: int, without_image: Sequence[int]) -> Iterator[tuple[bool, int]]:
    """Yield runs of files with an image (True) and without, and their lengths."""
    start = 0
    for index in without_image:
        if index > start:
            yield True, index - start
        yield False, 1
        start = index + 1
    if num_files > start:
        yield True, num_files - start


class BatchRunner:
    """Runs batches, and halves their size for good when the GPU has no room for them.

    Args:
        run: (N, H, W, 3) uint8 -> (N, classes) float32; raises GpuMemoryError.
        size: images of a full batch.
        fixed_shape: whether a smaller batch is padded to the full one.
    """

    def __init__(
        self, run: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]], size: int, *, fixed_shape: bool
    ) -> None:
        self._run = run
        self.size = size
        self._fixed_shape = fixed_shape

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the probabilities of at least one and at most a full batch of images.

        Raises:
            GpuMemoryError: there is not even room for one image.
        """
        while True:
            try:
                parts = range(0, len(images), self.size)
                return np.concatenate([self._run_part(images[start : start + self.size]) for start in parts])
            except GpuMemoryError as error:
                if self.size == 1:
                    raise
                self.size = (self.size + 1) // 2
                _logger.warning("%s; going on with batches of %d", error, self.size)

    def _run_part(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        num_missing = self.size - len(images)
        if not (num_missing and self._fixed_shape):
            return self._run(images)
        return self._run(np.pad(images, ((0, num_missing), (0, 0), (0, 0), (0, 0))))[: len(images)]


class _WaitingFiles:
    """Decoded files that have no rows yet."""

    def __init__(self) -> None:
        self.number = 0
        """Files that wait."""
        self._chunks: deque[tuple[DecodedChunk, npt.NDArray[np.intp]]] = deque()  # with the indices of its images
        self._start = self._num_images = 0
        """Files and images of the first chunk that have been taken."""

    def add(self, chunk: DecodedChunk) -> None:
        """Append the files of a chunk."""
        indices = np.delete(np.arange(len(chunk.paths)), sorted(chunk.others))
        self._chunks.append((chunk, indices))
        self.number += len(chunk.paths)

    def take(self, labels: npt.NDArray[np.int32], probabilities: npt.NDArray[np.float32]) -> Rows:
        """Take the files up to the first image that has no result yet, and return their rows.

        Args:
            labels, probabilities: (N, top_k), of the first N images that wait.
        """
        paths: list[str] = []
        sha256: list[str] = []
        errors: dict[int, str] = {}
        unchanged: list[int] = []
        positions = [np.empty(0, np.intp)]
        num_left = len(labels)
        while self._chunks:
            chunk, images = self._chunks[0]
            start, last = self._start, self._num_images + num_left
            stop = int(images[last]) if last < len(images) else len(chunk.paths)
            offset = len(paths) - start
            taken = images[self._num_images : last] + offset
            paths += chunk.paths[start:stop]
            sha256 += chunk.sha256[start:stop]
            for index, other in chunk.others.items():
                if start <= index < stop and other.unchanged:
                    unchanged.append(index + offset)
                elif start <= index < stop:
                    errors[index + offset] = f"{other.error_kind}: {other.error}"
            positions.append(taken)
            num_left -= len(taken)
            if stop < len(chunk.paths):
                self._start, self._num_images = stop, last
                break
            self._chunks.popleft()
            self._start = self._num_images = 0
        self.number -= len(paths)
        if len(paths) > len(labels):
            labels, probabilities = _spread(np.concatenate(positions), len(paths), labels, probabilities)
        return Rows(paths, sha256, labels, probabilities, errors, unchanged)


def _spread(
    positions: npt.NDArray[np.intp],
    num_rows: int,
    labels: npt.NDArray[np.int32],
    probabilities: npt.NDArray[np.float32],
) -> _Results:
    """Put the results of images into rows for all files."""
    all_labels = np.full((num_rows, labels.shape[1]), -1, np.int32)
    all_probabilities = np.zeros((num_rows, labels.shape[1]), np.float32)
    all_labels[positions], all_probabilities[positions] = labels, probabilities
    return all_labels, all_probabilities


def check_top_k(top_k: int, session: ClassifierSession) -> None:
    """Refuse to report more classes than the model has.

    Raises:
        ConfigError: it does.
    """
    num_classes = len(session.info.class_names)
    if top_k > num_classes:
        raise ConfigError(f"top_k must be at most {num_classes}, the classes of {session.path}, received {top_k}")
