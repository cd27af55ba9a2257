"""Decode files on several cores: in order, bounded in memory and time, and surviving a decoder that crashes.

A worker (`decoding_process.py`) takes nobody with it when it dies, is killed because a file takes too long, or is
refused more memory (`decoding.MAX_WORKER_BYTES`): its files are tried again one by one, and the one to blame is a row.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from cnnpipe.errors import CnnpipeError
from cnnpipe.files import display_path
from cnnpipe.images.decode import decode_image
from cnnpipe.images.decoding import DecodedChunk, DecodedFile, Decoder, read_only
from cnnpipe.images.decoding_process import DecodeRequest, DecodingProcess, WorkerDiedError, WorkerLateError

__all__ = ["DecoderPool"]

# A chunk is one message to a worker and back. Long enough that the message costs nothing beside the decoding, short
# enough that the last chunk of a folder of large photos does not keep one core busy while the others are done.
_CHUNK_SECONDS: Final = 0.1
_FIRST_CHUNK_FILES: Final = 8
_MAX_CHUNK_FILES: Final = 128
_MAX_CHUNK_BYTES: Final = 2**24

# A worker answers after so long with the files it got to, so that a request takes hardly longer than its last file,
# and the time limit can be that of a file: a run of slow ones is not killed.
_MAX_REPLY_SECONDS: Final = 1.0

_MAX_TICK_SECONDS: Final = 1.0
"""How often the time limit is looked at: it is kept to within two of these."""

_logger = logging.getLogger(__name__)


class DecoderPool:
    """Decodes files on several cores, and yields them in the order in which they were given.

    A thread for each worker waits on its pipe. Workers start when they are needed, so that a single image costs one.
    Use as a context manager: at the end, however it comes, every worker is gone.

    Args:
        workers: number of processes.
        decoder: importable by name in a fresh interpreter.
        seconds_per_file: a file that takes longer to read and decode becomes a row of kind `timeout`.
    """

    def __init__(self, workers: int, decoder: Decoder = decode_image, seconds_per_file: float = 60.0) -> None:
        self.workers = workers
        self._decoder = decoder
        self._seconds_per_file = seconds_per_file
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")
        self._lock = threading.Lock()
        self._idle: list[DecodingProcess] = []
        self._alive: set[DecodingProcess] = set()
        self._closed = False
        self._ended = threading.Event()
        self._clock: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, number: int = 1) -> None:
        """Start some workers in advance, to have them ready when the model is."""
        for worker in [self._take() for _ in range(min(number, self.workers))]:
            self._give_back(worker)

    def close(self) -> None:
        """End every worker and thread; what was not yet decoded is dropped."""
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in alive:
            worker.kill()
        self._threads.shutdown(wait=True)
        self._ended.set()
        if self._clock is not None:
            self._clock.join()

    def decode(
        self,
        root: Path,
        paths: Iterator[str],
        image_size: tuple[int, int],
        known_digests: Callable[[str], str] | None = None,
    ) -> Iterator[DecodedChunk]:
        """Decode files, a bounded number ahead of what is taken.

        Args:
            root: the folder that `paths` are relative to.
            paths: read only as far as needed.
            image_size: (height, width) in pixels.
            known_digests: path -> the SHA-256 with which the file need not be decoded, "" for none; asked once a file.
        Yields:
            Chunks of any length ≥ 1; their files one after the other are `paths` exactly.
        Raises:
            CnnpipeError: no worker can be started.
            RuntimeError: a bug in the decoder.
        """
        reply_seconds = min(_MAX_REPLY_SECONDS, self._seconds_per_file / 2)
        max_files = max(1, min(_MAX_CHUNK_FILES, _MAX_CHUNK_BYTES // (image_size[0] * image_size[1] * 3)))
        num_files = min(_FIRST_CHUNK_FILES, max_files)
        pending: deque[Future[DecodedChunk]] = deque()
        while True:
            while len(pending) < 2 * self.workers + 1 and (names := list(islice(paths, num_files))):
                known = tuple(map(known_digests, names)) if known_digests else ()
                request = DecodeRequest(root, names, image_size, known, reply_seconds)
                pending.append(self._threads.submit(self._decode_chunk, request))
            if not pending:
                return
            chunk = pending.popleft().result()
            num_files = round(_CHUNK_SECONDS * len(chunk.paths) / max(chunk.seconds, 1e-6))
            num_files = max(1, min(num_files, max_files))
            yield chunk

    def _decode_chunk(self, request: DecodeRequest) -> DecodedChunk:
        chunks: list[DecodedChunk] = []
        start, stop = 0, len(request.paths)
        while start < stop:
            try:
                chunks.append(self._decode_once(request.part(start)))
            except WorkerDiedError as error:
                _logger.warning("a decoding process died (%s); its %d files are tried one by one", error, stop - start)
                # The file that did it is unknown; alone, it can take only itself along.
                chunks += [self._decode_alone(request.part(index, index + 1)) for index in range(start, stop)]
                break
            start += len(chunks[-1].paths)
        if len(chunks) == 1:
            return chunks[0]
        return DecodedChunk.of(
            [file for chunk in chunks for file in chunk.files],
            np.concatenate([chunk.images for chunk in chunks]),
            sum(chunk.seconds for chunk in chunks),
        )

    def _decode_alone(self, request: DecodeRequest) -> DecodedChunk:
        """Decode one file; if that takes the worker along, it is the file's fault."""
        began = time.perf_counter()
        try:
            return self._decode_once(request)
        except WorkerLateError:
            kind, fate, detail = "timeout", "took too long", f"more than {self._seconds_per_file:g} seconds"
        except WorkerDiedError as error:
            kind, fate, detail = "crashed", "crashed", str(error)
        (path,) = request.paths
        _logger.warning("the decoder %s on %s: %s", fate, display_path(path), detail)
        sha256 = ""
        with suppress(WorkerDiedError):  # it is reading that takes so long; here it would hold up the whole job
            sha256 = self._decode_once(replace(request, decoder=read_only)).sha256[0]
        file = DecodedFile(path, sha256, kind, f"the decoder {fate}, {detail}")
        no_image = np.empty((0, *request.image_size, 3), np.uint8)
        return DecodedChunk.of((file,), no_image, time.perf_counter() - began)

    def _decode_once(self, request: DecodeRequest) -> DecodedChunk:
        worker = self._take()
        try:
            chunk = worker.decode(request, self._seconds_per_file)
        except (WorkerDiedError, CnnpipeError):
            self._remove(worker)
            if self._closed:  # killed by `close`, not by a file: nobody waits for this chunk any more
                raise CnnpipeError("decoding was stopped") from None
            raise
        if worker.late:  # its answer was on the way already
            self._remove(worker)
        else:
            self._give_back(worker)
        return chunk

    def _take(self) -> DecodingProcess:
        with self._lock:
            if self._closed:
                raise CnnpipeError("decoding was stopped")
            if self._idle:
                return self._idle.pop()
            if self._clock is None:
                self._clock = threading.Thread(target=self._count_down, name="decoder-clock", daemon=True)
                self._clock.start()
            worker = DecodingProcess(self._decoder)
            self._alive.add(worker)
            return worker

    def _give_back(self, worker: DecodingProcess) -> None:
        with self._lock:
            self._idle.append(worker)

    def _remove(self, worker: DecodingProcess) -> None:
        with self._lock:
            self._alive.discard(worker)
        worker.kill()

    def _count_down(self) -> None:
        """Count down the time of the workers until the pool is closed."""
        tick = min(_MAX_TICK_SECONDS, self._seconds_per_file / 10)
        while not self._ended.wait(tick):
            with self._lock:
                alive = list(self._alive)
            for worker in alive:
                worker.count_down(tick)
