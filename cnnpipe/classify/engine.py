"""The stages of bulk classification: list -> read and decode -> batch -> run, overlapping, with bounded memory.

Listing and batching happen here, decoding in the worker processes of a `DecoderPool`, inference in threads that run a
batch each. Memory does not depend on how many files there are, and results do not depend on the timing: a shard's files
and their order alone say which images make a batch, so the same shard gives the same bits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import ConfigError, GpuMemoryError
from cnnpipe.images.workers import DecodedFile, DecoderPool

if TYPE_CHECKING:  # onnxruntime is loaded by whoever opens the session
    from cnnpipe.session import ClassifierSession

__all__ = ["BatchRunner", "EngineOptions", "KnownRows", "Prediction", "Shard", "ShardRows", "StageSeconds",
           "check_top_k", "classify_shards"]  # fmt: skip

_MAX_WAITING_FILES: Final = 4096
"""Files without pixels that wait for the images before them; more, and their batch is run as it is. Some MB of rows."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How to classify."""

    batch_size: int | None = None
    """Images a step; None is what suits the device."""
    top_k: int = 1
    """Classes to report for each image."""
    runners: int = 1
    """Batches that are run at a time, each in a thread: for a session of one thread, and more than one core."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row of the table: what became of one file."""

    path: str
    """Relative to the folder, with `/`, as `find_files` gave it."""
    status: Literal["ok", "error"]
    labels: tuple[str, ...]
    """The likeliest first, `top_k` of them; empty for an error."""
    probabilities: tuple[float, ...]
    """0-1, beside `labels`: the shortest decimals that give the model's float32 back."""
    error_kind: str
    """One of `cnnpipe.images.decode.ERROR_KINDS`; empty if ok."""
    error: str
    """One line for a person; empty if ok."""
    sha256: str
    """Of the file's bytes; empty if they could not be read."""
    model: str
    """`<name>/<run id>`."""
    unchanged: bool = False
    """Whether the row was taken over from an earlier table; no column."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Files that follow each other, whose rows are written together."""

    number: int
    paths: Sequence[str]
    """At least one."""


@dataclass(frozen=True, slots=True)
class ShardRows:
    """Some rows of a shard, behind those that came before."""

    number: int
    """Of the shard."""
    rows: list[Prediction]
    complete: bool
    """Whether they are its last."""


class KnownRows(Protocol):
    """The rows of an earlier table, which stay true while a file's content does."""

    def digest(self, path: str) -> str:
        """Return the SHA-256 that a file had when its row was made; empty if there is no row to keep."""
        ...

    def row(self, path: str) -> Prediction:
        """Return the row of a file that has a digest."""
        ...


@dataclass
class StageSeconds:
    """Time spent in each stage. The stages overlap, so together they exceed the time that has passed."""

    list: float = 0.0
    decode: float = 0.0
    """Summed over the workers."""
    inference: float = 0.0
    """Summed over the runners."""
    write: float = 0.0


def classify_shards(
    root: Path,
    shards: Iterator[Shard],
    session: ClassifierSession,
    pool: DecoderPool,
    options: EngineOptions,
    seconds: StageSeconds,
    known: KnownRows | None = None,
) -> Iterator[ShardRows]:
    """Classify the files of shards, and yield one row for each, in their order, as soon as it is known.

    No batch spans two shards: a shard's rows are the same whatever is classified before or behind it.

    Args:
        root: the folder that the paths are relative to.
        shards: read only as far as needed.
        seconds: the stages' time is added here.
        known: rows to keep for files whose content is unchanged.
    Raises:
        ConfigError: `top_k` exceeds the number of classes.
        ModelError, ProviderError: the model or the device failed.
        CnnpipeError: no decoding process can be started.
        RuntimeError: a bug in the decoder.
    """
    check_top_k(options.top_k, session)
    open_shards = _OpenShards()
    rows = _Rows(session, options.top_k, known)
    batches = _Batches(options.batch_size or session.default_batch_size, open_shards.lengths)
    runner = BatchRunner(session.run, batches.size, fixed_shape=session.wants_fixed_batch)
    images = _WaitingImages()
    digest = known.digest if known else None
    with _Inference(runner, options.runners, len(session.info.class_names), seconds) as inference:
        for chunk in pool.decode(root, open_shards.paths(shards, seconds), session.info.image_size, digest):
            seconds.decode += chunk.seconds
            files = chunk.files
            rows.waiting.extend(files)
            images.add(chunk.images)
            for size in batches.add(files):
                inference.begin(images.take(size))
            too_many = len(rows.waiting) > 2 * _MAX_WAITING_FILES
            # One at a time: a GPU that is waited for until it has nothing left to do has a pause.
            yield from open_shards.split(rows.take(inference.take_finished(1 if too_many else 0)))
        yield from open_shards.split(rows.take(inference.take_finished(inference.num_begun)))


class _WaitingImages:
    """Images of the files that wait for their batch to end; each is copied once at most, however small the chunks."""

    def __init__(self) -> None:
        self._parts: deque[npt.NDArray[np.uint8]] = deque()

    def add(self, images: npt.NDArray[np.uint8]) -> None:
        """Append images, (N, H, W, 3); N may be 0."""
        if len(images):
            self._parts.append(images)

    def take(self, number: int) -> npt.NDArray[np.uint8]:
        """Take the first images, at least one; there must be so many."""
        taken: list[npt.NDArray[np.uint8]] = []
        while number:
            part = self._parts.popleft()
            taken.append(part[:number])
            if len(part) > number:
                self._parts.appendleft(part[number:])
            number -= len(taken[-1])
        return taken[0] if len(taken) == 1 else np.concatenate(taken)


class _Inference:
    """Runs batches in threads of its own, a few ahead of what is taken, and gives their results in order.

    Args:
        runners: threads. One for each core, with a session of one thread, is faster than one batch on all cores: none
            waits at every layer for another that is decoding just then.
    """

    def __init__(self, runner: BatchRunner, runners: int, num_classes: int, seconds: StageSeconds) -> None:
        self._runner = runner
        self._threads = ThreadPoolExecutor(runners, thread_name_prefix="inference")
        self._max_begun = 4 * runners
        self._begun: deque[Future[tuple[npt.NDArray[np.float32], float]]] = deque()
        self._none = np.empty((0, num_classes), np.float32)
        self._seconds = seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def begin(self, images: npt.NDArray[np.uint8]) -> None:
        """Run a batch as soon as a thread is free."""
        self._begun.append(self._threads.submit(self._run, images))

    def _run(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], float]:
        began = time.perf_counter()
        return self._runner.run(images), time.perf_counter() - began

    @property
    def num_begun(self) -> int:
        """Batches whose probabilities were not taken yet."""
        return len(self._begun)

    def take_finished(self, num_awaited: int) -> npt.NDArray[np.float32]:
        """Return the probabilities of the first batches, as far as they are there; wait for them if too many are not.

        Args:
            num_awaited: batches to wait for in any case.
        """
        results = [self._none]
        while self._begun and (
            len(results) <= num_awaited or self._begun[0].done() or len(self._begun) > self._max_begun
        ):
            probabilities, seconds = self._begun.popleft().result()
            self._seconds.inference += seconds
            results.append(probabilities)
        return np.concatenate(results)


class _OpenShards:
    """Hands out the paths of shards, and knows again to which of them a row belongs."""

    def __init__(self) -> None:
        self.lengths: deque[int] = deque()
        """Files of the shards that were begun, for whoever counts files behind the decoder."""
        self._open: deque[tuple[int, int]] = deque()  # number, rows to come

    def paths(self, shards: Iterator[Shard], seconds: StageSeconds) -> Iterator[str]:
        while True:
            began = time.perf_counter()
            shard = next(shards, None)
            seconds.list += time.perf_counter() - began
            if shard is None:
                return
            self.lengths.append(len(shard.paths))
            self._open.append((shard.number, len(shard.paths)))
            yield from shard.paths

    def split(self, rows: list[Prediction]) -> Iterator[ShardRows]:
        while rows:
            number, left = self._open.popleft()
            part, rows = rows[:left], rows[left:]
            if left > len(part):
                self._open.appendleft((number, left - len(part)))
            yield ShardRows(number, part, left == len(part))


class _Batches:
    """Says where a batch ends: by counting files, never by the chunks they come in, whose lengths follow the clock."""

    def __init__(self, size: int, lengths: deque[int]) -> None:
        self.size = size
        """Images of a full batch."""
        self._lengths = lengths
        self._num_left = 0
        """Files of the shard that are still to come."""
        self._num_images = 0
        self._num_waiting = 0
        """Files without pixels behind the first image of the open batch."""

    def add(self, files: Sequence[DecodedFile]) -> list[int]:
        """Return how many images each batch has that ends among these files."""
        ended = []
        for file in files:
            if not self._num_left:
                self._num_left = self._lengths.popleft()
            self._num_left -= 1
            if file.has_image:
                self._num_images += 1
            elif self._num_images:
                self._num_waiting += 1
            full = self._num_images == self.size or self._num_waiting > _MAX_WAITING_FILES
            if self._num_images and (full or not self._num_left):
                ended.append(self._num_images)
                self._num_images = self._num_waiting = 0
        return ended


class BatchRunner:
    """Runs batches, and halves them for good when the GPU has no room for more.

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
            GpuMemoryError: there is no room even for one image.
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


class _Rows:
    """Makes the rows of decoded files, in their order, from the probabilities of those that have pixels."""

    def __init__(self, session: ClassifierSession, top_k: int, known: KnownRows | None) -> None:
        self.waiting: deque[DecodedFile] = deque()
        self._names = np.array(session.info.class_names, object)
        self._model = f"{session.info.name}/{session.info.run_id}"
        self._top_k = top_k
        self._known = known

    def take(self, probabilities: npt.NDArray[np.float32]) -> list[Prediction]:
        """Take the files off `waiting` up to the first image that has no probabilities yet, and return their rows.

        Args:
            probabilities: (N, classes), of the first N images that wait.
        """
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : self._top_k]  # of equal ones, the first class
        labels = map(tuple, self._names[order].tolist())
        # NumPy prints the shortest digits that tell a float32 from its neighbours; float() of these keeps them.
        digits = np.take_along_axis(probabilities, order, axis=1).astype("U32")
        shortest = map(tuple, digits.astype(np.float64).tolist())
        rows: list[Prediction] = []
        num_left = len(probabilities)
        while self.waiting:
            file = self.waiting[0]
            if file.error_kind:
                row = Prediction(file.path, "error", (), (), file.error_kind, file.error, file.sha256, self._model)
            elif file.unchanged and self._known:
                row = self._known.row(file.path)
            elif num_left:
                num_left -= 1
                row = Prediction(file.path, "ok", next(labels), next(shortest), "", "", file.sha256, self._model)
            else:
                break
            self.waiting.popleft()
            rows.append(row)
        return rows


def check_top_k(top_k: int, session: ClassifierSession) -> None:
    """Refuse to report more classes than the model has.

    Raises:
        ConfigError: so.
    """
    num_classes = len(session.info.class_names)
    if top_k > num_classes:
        raise ConfigError(f"top_k must be at most {num_classes}, the classes of {session.path}, received {top_k}")
