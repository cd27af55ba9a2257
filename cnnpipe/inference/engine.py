"""The stages of bulk classification: list -> read and decode -> batch -> run, overlapping, with bounded memory.

Listing and batching happen here, decoding in the worker processes of a `DecoderPool`, inference in onnxruntime's own
threads. Memory does not depend on how many files there are, and results do not depend on the timing: the files and
their order alone say which images make a batch, so the same files give the same bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import numpy.typing as npt

from cnnpipe.decoding import DecodedFile
from cnnpipe.errors import ConfigError
from cnnpipe.workers import DecoderPool

if TYPE_CHECKING:  # onnxruntime is loaded by whoever opens the session
    from cnnpipe.inference.session import ClassifierSession

__all__ = ["EngineOptions", "Prediction", "StageSeconds", "classify_files"]

_MAX_WAITING_ERRORS: Final = 4096
"""Failed files that wait for the images before them; more, and their batch is run as it is. Some MB of rows."""


@dataclass(frozen=True)
class EngineOptions:
    """How to classify."""

    batch_size: int | None = None
    """Images a step; None is what suits the device."""
    top_k: int = 1
    """Classes to report for each image."""


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
    """One of `cnnpipe.images.ERROR_KINDS`; empty if ok."""
    error: str
    """One line for a person; empty if ok."""
    sha256: str
    """Of the file's bytes; empty if they could not be read."""
    model: str
    """`<name>/<run id>`."""


@dataclass
class StageSeconds:
    """Time spent in each stage. The stages overlap, so together they exceed the time that has passed."""

    list: float = 0.0
    decode: float = 0.0
    """Summed over the workers."""
    inference: float = 0.0
    write: float = 0.0


def classify_files(
    root: Path,
    paths: Iterator[str],
    session: ClassifierSession,
    pool: DecoderPool,
    options: EngineOptions,
    seconds: StageSeconds,
) -> Iterator[list[Prediction]]:
    """Classify files, and yield one row for each, in their order, as soon as it is known.

    Args:
        root: the folder that `paths` are relative to.
        paths: any iterator, such as `find_files(root)` or a part of it; read only as far as needed.
        seconds: the stages' time is added here.
    Yields:
        Lists of rows; all together one for each of `paths`.
    Raises:
        ConfigError: `top_k` exceeds the number of classes.
        ModelError, ProviderError: the model or the device failed.
        CnnpipeError: no decoding process can be started.
        RuntimeError: a bug in the decoder.
    """
    check_top_k(options.top_k, session)
    batches = _Batches(options.batch_size or session.default_batch_size)
    waiting: deque[DecodedFile] = deque()
    images = np.empty((0, *session.info.image_size, 3), np.uint8)  # of the files in `waiting`
    for chunk in pool.decode(root, _timed(paths, seconds), session.info.image_size):
        seconds.decode += chunk.seconds
        waiting.extend(chunk.files)
        images = np.concatenate([images, chunk.images]) if len(images) else chunk.images
        sizes = batches.add(chunk.files)
        if sizes or not len(images):
            probabilities = _run_batches(session, images, sizes, batches.size, seconds)
            images = images[len(probabilities) :]
            yield _take_rows(waiting, probabilities, session, options.top_k)
    rest = [len(images)] if len(images) else []
    probabilities = _run_batches(session, images, rest, batches.size, seconds)
    yield _take_rows(waiting, probabilities, session, options.top_k)


@dataclass
class _Batches:
    """Says where a batch ends: by counting files, never by the chunks they come in, whose lengths follow the clock."""

    size: int
    """Images of a full batch."""
    _num_images: int = 0
    _num_errors: int = 0
    """Failed files behind the first image of the open batch."""

    def add(self, files: Sequence[DecodedFile]) -> list[int]:
        """Return how many images each batch has that ends among these files."""
        ended = []
        for file in files:
            if not file.error_kind:
                self._num_images += 1
            elif self._num_images:
                self._num_errors += 1
            if self._num_images == self.size or self._num_errors > _MAX_WAITING_ERRORS:
                ended.append(self._num_images)
                self._num_images = self._num_errors = 0
        return ended


def check_top_k(top_k: int, session: ClassifierSession) -> None:
    """Refuse to report more classes than the model has.

    Raises:
        ConfigError: so.
    """
    num_classes = len(session.info.class_names)
    if top_k > num_classes:
        raise ConfigError(f"top_k must be at most {num_classes}, the classes of {session.path}, received {top_k}")


def _timed(paths: Iterator[str], seconds: StageSeconds) -> Iterator[str]:
    """Pass paths on, and add the time that listing takes."""
    while True:
        began = time.perf_counter()
        path = next(paths, None)
        seconds.list += time.perf_counter() - began
        if path is None:
            return
        yield path


def _run_batches(
    session: ClassifierSession,
    images: npt.NDArray[np.uint8],
    sizes: Sequence[int],
    batch_size: int,
    seconds: StageSeconds,
) -> npt.NDArray[np.float32]:
    """Return the probabilities of the first of (N, H, W, 3) images, (sum of sizes, classes), run batch by batch.

    Args:
        sizes: images of each batch.
        batch_size: what a smaller one is padded to where the session wants one fixed shape.
    """
    began = time.perf_counter()
    results = [np.empty((0, len(session.info.class_names)), np.float32)]
    start = 0
    for size in sizes:
        batch = images[start : start + size]
        start += size
        num_missing = batch_size - size
        if num_missing and session.wants_fixed_batch:
            padded = np.pad(batch, ((0, num_missing), (0, 0), (0, 0), (0, 0)))
            results.append(session.run(padded)[:size])
        else:
            results.append(session.run(batch))
    seconds.inference += time.perf_counter() - began
    return np.concatenate(results)


def _take_rows(
    waiting: deque[DecodedFile], probabilities: npt.NDArray[np.float32], session: ClassifierSession, top_k: int
) -> list[Prediction]:
    """Take the files off `waiting` up to the first image that has no probabilities yet, and make their rows."""
    names = np.array(session.info.class_names, object)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]  # of equal ones, the first class
    labels = map(tuple, names[order].tolist())
    # NumPy prints the shortest digits that tell a float32 from its neighbours; float() of these keeps them.
    digits = np.take_along_axis(probabilities, order, axis=1).astype("U32")
    shortest = map(tuple, digits.astype(np.float64).tolist())
    model = f"{session.info.name}/{session.info.run_id}"
    rows: list[Prediction] = []
    num_scored = 0
    while waiting and (waiting[0].error_kind or num_scored < len(probabilities)):
        file = waiting.popleft()
        if file.error_kind:
            row = Prediction(file.path, "error", (), (), file.error_kind, file.error, file.sha256, model)
        else:
            row = Prediction(file.path, "ok", next(labels), next(shortest), "", "", file.sha256, model)
            num_scored += 1
        rows.append(row)
    return rows
