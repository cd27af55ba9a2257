"""Decode files on several cores: in order, bounded in memory, and surviving a decoder that crashes.

The workers are plain subprocesses that talk over pipes, not a `ProcessPoolExecutor`. Its children import the parent's
main module again, which under `python -m flows.…` is Prefect (seconds a worker), and one dead child breaks the whole
pool. Here a worker imports NumPy, Pillow and the decoder, starts while the parent loads onnxruntime, and takes nobody
with it when it dies. It ends by itself when the parent is gone, because its pipe ends.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from cnnpipe.decoding import DecodedChunk, DecodedFile, Decoder
from cnnpipe.errors import CnnpipeError, ImageError
from cnnpipe.files import display_path, read_file
from cnnpipe.images import decode_image

__all__ = ["DecoderPool"]

# A chunk is one message to a worker and back. Long enough that the message costs nothing beside the decoding, short
# enough that the last chunk of a folder of large photos does not keep one core busy while the others are done.
_CHUNK_SECONDS: Final = 0.1
_FIRST_CHUNK_FILES: Final = 8
_MAX_CHUNK_FILES: Final = 128
_MAX_CHUNK_BYTES: Final = 2**24

_WORKER: Final = "import sys; sys.path[:] = sys.argv[1:]; from cnnpipe.decoding import run_worker; run_worker()"

_logger = logging.getLogger(__name__)


class _WorkerDiedError(Exception):
    """A worker ended in the middle of a chunk; the message says how."""


class _Worker:
    """One decoding process."""

    def __init__(self, decoder: Decoder) -> None:
        # A process group of its own: Ctrl-C in the terminal goes to the parent alone, which then ends its workers.
        group: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        greeting = pickle.dumps(decoder, protocol=pickle.HIGHEST_PROTOCOL)  # a decoder without a name fails here
        command = [sys.executable, "-c", _WORKER, *sys.path]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **group)
        except OSError as error:
            raise CnnpipeError(f"cannot start a decoding process: {error}; try fewer with --workers") from error
        self._ready = False
        with suppress(OSError):  # one that is dead already shows it when it is first asked
            self._write(greeting)

    def decode(self, root: Path, paths: Sequence[str], image_size: tuple[int, int]) -> DecodedChunk:
        """Have the worker call `decode_files`.

        Raises:
            CnnpipeError: the worker never came up.
            RuntimeError: the decoder raised anything but ImageError.
            _WorkerDiedError: the worker ended in the middle; it cannot be used again.
        """
        if not self._ready:
            try:
                self._receive()
            except _WorkerDiedError as error:
                raise CnnpipeError(f"a decoding process did not start: {error}; see its message above") from error
            self._ready = True
        try:
            self._write(pickle.dumps((root, paths, image_size), protocol=pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise _WorkerDiedError(self._end()) from error
        reply = self._receive()
        if isinstance(reply, DecodedChunk):
            return reply
        raise RuntimeError(f"a bug in the decoder, from a worker process:\n{reply}")

    def _write(self, message: bytes) -> None:
        if self._process.stdin is None:
            raise BrokenPipeError
        self._process.stdin.write(message)
        self._process.stdin.flush()

    def _receive(self) -> object:
        try:
            if self._process.stdout is None:
                raise EOFError
            return pickle.load(self._process.stdout)  # noqa: S301  our own worker's bytes
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise _WorkerDiedError(self._end()) from error

    def _end(self) -> str:
        """Wait for a worker whose pipe has ended, and return how it ended."""
        try:
            status = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return "it closed its pipe"
        if status >= 0:
            return f"exit status {status}"
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"

    def kill(self) -> None:
        """End the process at once: it holds nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what could not be sent to a dead process
                    pipe.close()


class DecoderPool:
    """Decodes files on several cores, and yields them in the order in which they were given.

    A thread for each worker waits on its pipe. Workers start when they are needed, so that a single image costs one.
    Use as a context manager: at the end, however it comes, every worker is gone.

    Args:
        workers: number of processes.
        decoder: importable by name in a fresh interpreter.
    """

    def __init__(self, workers: int, decoder: Decoder = decode_image) -> None:
        self.workers = workers
        self._decoder = decoder
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start one worker in advance, to have it ready when the model is."""
        self._give_back(self._take())

    def close(self) -> None:
        """End every worker and thread; what was not yet decoded is dropped."""
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in alive:
            worker.kill()
        self._threads.shutdown(wait=True)

    def decode(self, root: Path, paths: Iterator[str], image_size: tuple[int, int]) -> Iterator[DecodedChunk]:
        """Decode files, a bounded number ahead of what is taken.

        Args:
            root: the folder that `paths` are relative to.
            paths: read only as far as needed.
            image_size: (height, width) in pixels.
        Yields:
            Chunks of any length ≥ 1; their files one after the other are `paths` exactly.
        Raises:
            CnnpipeError: no worker can be started.
            RuntimeError: a bug in the decoder.
        """
        max_files = max(1, min(_MAX_CHUNK_FILES, _MAX_CHUNK_BYTES // (image_size[0] * image_size[1] * 3)))
        num_files = min(_FIRST_CHUNK_FILES, max_files)
        pending: deque[Future[DecodedChunk]] = deque()
        while True:
            while len(pending) < 2 * self.workers + 1 and (names := list(islice(paths, num_files))):
                pending.append(self._threads.submit(self._decode_chunk, root, names, image_size))
            if not pending:
                return
            chunk = pending.popleft().result()
            num_files = round(_CHUNK_SECONDS * len(chunk.files) / max(chunk.seconds, 1e-6))
            num_files = max(1, min(num_files, max_files))
            yield chunk

    def _decode_chunk(self, root: Path, paths: list[str], image_size: tuple[int, int]) -> DecodedChunk:
        try:
            return self._decode_once(root, paths, image_size)
        except _WorkerDiedError as error:
            _logger.warning("a decoding process died (%s); its %d files are tried one by one", error, len(paths))
        # The file that did it is unknown; alone, it can take only itself along.
        chunks = [self._decode_alone(root, path, image_size) for path in paths]
        return DecodedChunk(
            tuple(file for chunk in chunks for file in chunk.files),
            np.concatenate([chunk.images for chunk in chunks]),
            sum(chunk.seconds for chunk in chunks),
        )

    def _decode_alone(self, root: Path, path: str, image_size: tuple[int, int]) -> DecodedChunk:
        try:
            return self._decode_once(root, [path], image_size)
        except _WorkerDiedError as error:
            _logger.warning("the decoder crashed on %s: %s", display_path(path), error)
            message = f"the decoder crashed, {error}"
        sha256 = ""
        with suppress(ImageError):  # it was readable a moment ago; if it is gone now, the row has no digest
            sha256 = hashlib.sha256(read_file(root / path)).hexdigest()
        file = DecodedFile(path, sha256, "crashed", message)
        return DecodedChunk((file,), np.empty((0, *image_size, 3), np.uint8), 0.0)

    def _decode_once(self, root: Path, paths: list[str], image_size: tuple[int, int]) -> DecodedChunk:
        worker = self._take()
        try:
            chunk = worker.decode(root, paths, image_size)
        except (_WorkerDiedError, CnnpipeError):
            with self._lock:
                self._alive.discard(worker)
            worker.kill()
            if self._closed:  # killed by `close`, not by a file: nobody waits for this chunk any more
                raise CnnpipeError("decoding was stopped") from None
            raise
        self._give_back(worker)
        return chunk

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise CnnpipeError("decoding was stopped")
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self._decoder)
            self._alive.add(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)
