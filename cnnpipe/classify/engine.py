"""The stages of bulk classification: list -> read and decode -> batch -> run, overlapping, with bounded memory.

Listing and batching happen here, decoding in the worker processes of a `DecoderPool`, inference in threads that run a
batch each. This process handles files by the chunk, never one by one: its own work would limit a machine of many cores.
Memory does not depend on the number of files, and results do not depend on timing: a shard's files and their order
alone decide which images make a batch, so the same shard gives the same bits.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, repeat
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

_MAX_FILES_WITHOUT_IMAGE: Final = 4096
"""Files without an image that may stand in a batch; with them its rows are made, however few images it has."""

_BATCHES_BEGUN: Final = 4
"""Batches for each thread that may have begun: enough that no thread waits."""

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
    """Batches that run at a time, each in a thread. With a session of one thread, one for each core is faster than
    one batch on all cores: no core waits at every layer for another that is decoding at that moment."""


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

    paths: list[str]
    """Relative to the folder, as `find_files` gave them."""
    sha256: list[str]
    """SHA-256 of each file's bytes; empty if they could not be read."""
    errors: dict[int, str]
    """Index of a file that failed -> `kind: message`."""
    unchanged: list[int]
    """Indices of files that have the digest of their previous row, which stays valid."""
    labels: npt.NDArray[np.int32]
    """(files, top_k) indices of the likeliest classes, the likeliest first; -1 in a row without."""
    probabilities: npt.NDArray[np.float32]
    """(files, top_k), 0-1; 0 in a row without."""

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Self:
        """Return all rows of at least one part, one after the other."""
        labels, probabilities = ([getattr(part, name) for part in parts] for name in ("labels", "probabilities"))
        rows = cls([], [], {}, [], np.concatenate(labels), np.concatenate(probabilities))
        for part in parts:
            start = len(rows.paths)
            rows.paths.extend(part.paths)
            rows.sha256.extend(part.sha256)
            rows.errors.update({start + index: error for index, error in part.errors.items()})
            rows.unchanged.extend(start + index for index in part.unchanged)
        return rows


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
    size = options.batch_size or session.default_batch_size
    runner = BatchRunner(session.run, size, fixed_shape=session.wants_fixed_batch)
    open_shards: deque[Shard] = deque()
    chunks = pool.decode(root, _open_paths(shards, open_shards, seconds), session.info.image_size, previous_digest)
    begun: deque[tuple[_Batch, Future[tuple[Rows, float]]]] = deque()
    threads = ThreadPoolExecutor(options.threads, thread_name_prefix="inference")
    try:
        # One at a time: a GPU that is waited for until it has nothing left to do has a pause.
        for batch in chain(_make_batches(chunks, open_shards, size, seconds), repeat(None)):
            if batch is not None:
                begun.append((batch, threads.submit(batch.classify, runner, options.top_k)))
            elif not begun:
                return
            while begun and (batch is None or begun[0][1].done() or len(begun) > _BATCHES_BEGUN * options.threads):
                first, future = begun.popleft()
                rows, spent = future.result()
                seconds.inference += spent
                yield ShardRows(first.shard, first.start, rows)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _open_paths(shards: Iterator[Shard], open_shards: deque[Shard], seconds: StageSeconds) -> Iterator[str]:
    """Yield the paths of shards, and note the shards that were begun."""
    while True:
        began = time.perf_counter()
        shard = next(shards, None)
        seconds.list += time.perf_counter() - began
        if shard is None:
            return
        open_shards.append(shard)
        yield from shard.paths


@dataclass(slots=True)
class _Batch:
    """Decoded files, of one shard, whose images are run together; maybe none of them is an image."""

    shard: Shard
    start: int
    """Index of the first file in the shard."""
    paths: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    unchanged: list[int] = field(default_factory=list)
    images: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    num_images: int = 0

    @property
    def num_others(self) -> int:
        """Files without an image."""
        return len(self.paths) - self.num_images

    def classify(self, runner: BatchRunner, top_k: int) -> tuple[Rows, float]:
        """Return the rows, and the seconds that this took."""
        began = time.perf_counter()
        num_files = len(self.paths)
        labels, probabilities = np.full((num_files, top_k), -1, np.int32), np.zeros((num_files, top_k), np.float32)
        if self.images:
            found = runner.run(self.images[0] if len(self.images) == 1 else np.concatenate(self.images))
            has_image = np.ones(num_files, bool)
            has_image[[*self.errors, *self.unchanged]] = False
            labels[has_image] = likeliest = _likeliest(found, top_k)
            probabilities[has_image] = np.take_along_axis(found, likeliest, axis=1)
        rows = Rows(self.paths, self.sha256, self.errors, self.unchanged, labels, probabilities)
        return rows, time.perf_counter() - began


def _make_batches(
    chunks: Iterator[DecodedChunk], open_shards: deque[Shard], size: int, seconds: StageSeconds
) -> Iterator[_Batch]:
    """Cut the stream of decoded files where a batch is full, a shard ends, or too many files have no image.

    Files are counted, never chunks, whose lengths depend on the clock.
    """
    batch: _Batch | None = None
    for chunk in chunks:
        seconds.decode += chunk.seconds
        others = sorted(chunk.others)
        images = np.delete(np.arange(len(chunk.paths)), others).tolist() if others else range(len(chunk.paths))
        start = start_image = start_other = 0
        while start < len(chunk.paths):
            batch = batch or _Batch(open_shards[0], 0)
            stop_image = start_image + size - batch.num_images
            stop_other = start_other + _MAX_FILES_WITHOUT_IMAGE - batch.num_others
            stop = min(
                len(chunk.paths),
                start + len(batch.shard.paths) - batch.start - len(batch.paths),
                *(index + 1 for index in (*images[stop_image - 1 : stop_image], *others[stop_other - 1 : stop_other])),
            )
            stop_image, stop_other = bisect_left(images, stop), bisect_left(others, stop)
            for index in others[start_other:stop_other]:
                file, row = chunk.others[index], len(batch.paths) + index - start
                if file.unchanged:
                    batch.unchanged.append(row)
                else:
                    batch.errors[row] = f"{file.error_kind}: {file.error}"
            batch.paths += chunk.paths[start:stop]
            batch.sha256 += chunk.sha256[start:stop]
            if stop_image > start_image:
                batch.images.append(chunk.images[start_image:stop_image])
                batch.num_images += stop_image - start_image
            start, start_image, start_other = stop, stop_image, stop_other
            end = batch.start + len(batch.paths)
            if shard_ended := end == len(batch.shard.paths):
                open_shards.popleft()
            if shard_ended or batch.num_images == size or batch.num_others == _MAX_FILES_WITHOUT_IMAGE:
                yield batch
                batch = None if shard_ended else _Batch(batch.shard, end)


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


def check_top_k(top_k: int, session: ClassifierSession) -> None:
    """Refuse to report more classes than the model has.

    Raises:
        ConfigError: it does.
    """
    num_classes = len(session.info.class_names)
    if top_k > num_classes:
        raise ConfigError(f"top_k must be at most {num_classes}, the classes of {session.path}, received {top_k}")
