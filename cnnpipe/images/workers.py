"""Decode files on several cores: in order, bounded in memory and time, and surviving a decoder that crashes.

`decode_files` reads, hashes and decodes. A `DecoderPool` has worker processes call it, and yields the results in order.
A worker that crashes, hangs or asks for too much memory takes nobody with it: its files are tried again one by one,
and the file to blame becomes a row with its error.

The workers are plain subprocesses that import this module, NumPy, Pillow and the decoder, and nothing else. Those of a
`ProcessPoolExecutor` import the parent's main module again, which under `python -m flows.…` is Prefect (seconds a
worker), and one that dies breaks the whole pool. A worker is there to survive crashes; it is not a security boundary,
because the parent unpickles what it sends.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, repeat
from math import inf
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import CnnpipeError, ImageError
from cnnpipe.images.decode import RGBImage, decode_image, read_file
from cnnpipe.paths import escape_path

Decoder = Callable[[bytes, tuple[int, int]], RGBImage]
"""Function from a file's bytes and (height, width) to pixels; raises ImageError. Workers import it by its name."""

MAX_WORKER_BYTES: Final = 4 * 2**30
"""Address space of a worker, where the system enforces such a limit (Linux and BSD).

Enough for every image within `MAX_PIXELS`: measured at that limit, WebP with transparency takes most (2.8 GiB), and
the file itself may add `MAX_FILE_BYTES`.
"""

_COMMAND: Final = "import sys; sys.path[:] = sys.argv[1:]; from cnnpipe.images.workers import run_worker; run_worker()"
_MAX_START_SECONDS: Final = 120.0

# A chunk is one message to a worker and back: long enough that the message costs little beside the decoding, short
# enough that the last chunk of a folder of large photos does not keep one core busy while the others are idle.
_CHUNK_SECONDS: Final = 0.1
_FIRST_CHUNK_FILES: Final = 8
_MAX_CHUNK_FILES: Final = 128
_MAX_CHUNK_BYTES: Final = 2**24

# A worker answers after this time with the files it has finished, so that the time limit can be that of one file.
_MAX_REPLY_SECONDS: Final = 1.0
_MAX_TICK_SECONDS: Final = 1.0  # between two checks of the time limit, which is kept to within two of these

_logger = logging.getLogger(__name__)


class DecodedFile(NamedTuple):
    """Outcome of one file."""

    path: str
    """Path relative to the folder, as `find_files` yields it."""
    sha256: str
    """SHA-256 of the file's bytes; empty if they could not be read."""
    error_kind: str = ""
    """One of `cnnpipe.images.decode.ERROR_KINDS`; empty if nothing went wrong."""
    error: str = ""
    """Error message, one line."""
    unchanged: bool = False
    """Whether the file has the digest that was expected, and was therefore not decoded."""

    @property
    def has_image(self) -> bool:
        """Return whether the file was decoded."""
        return not (self.error_kind or self.unchanged)


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """Consecutive files, with the pixels of those that were decoded; columns, because objects cost time per file."""

    paths: Sequence[str]
    """Paths relative to the folder."""
    sha256: Sequence[str]
    """SHA-256 of each file; empty where it could not be read."""
    others: Mapping[int, DecodedFile]
    """Index -> outcome of each file that has no image."""
    images: npt.NDArray[np.uint8]
    """Pixels of the decoded files, (N, H, W, 3) RGB."""
    seconds: float
    """Seconds spent reading, hashing and decoding."""

    @classmethod
    def of(cls, files: Sequence[DecodedFile], images: npt.NDArray[np.uint8], seconds: float) -> Self:
        """Make a chunk from the outcomes of its files."""
        others = {index: file for index, file in enumerate(files) if not file.has_image}
        return cls([file.path for file in files], [file.sha256 for file in files], others, images, seconds)

    @property
    def files(self) -> tuple[DecodedFile, ...]:
        """The outcome of each file."""
        pairs = enumerate(zip(self.paths, self.sha256, strict=True))
        return tuple(self.others.get(index) or DecodedFile(*pair) for index, pair in pairs)


def decode_files(
    root: Path,
    paths: Sequence[str],
    image_size: tuple[int, int],
    decoder: Decoder = decode_image,
    known_digests: Sequence[str] = (),
    max_seconds: float = inf,
) -> DecodedChunk:
    """Read, hash and decode files, one after the other.

    Args:
        root: the folder that `paths` are relative to.
        paths: at least one.
        image_size: (height, width) in pixels.
        known_digests: one for each path, "" for none: a file with this SHA-256 is not decoded.
        max_seconds: time after which no further file is begun: the chunk may have fewer files than `paths`.
    Raises:
        RuntimeError: `decoder` raised anything but ImageError, which is a bug in it.
    """
    began = time.perf_counter()
    images = np.empty((len(paths), *image_size, 3), np.uint8)
    digests: list[str] = []
    others: dict[int, DecodedFile] = {}
    for path, known_digest in zip(paths, known_digests or repeat(""), strict=False):
        index, sha256 = len(digests), ""
        try:
            data = read_file(os.path.join(root, path))
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 == known_digest:
                others[index] = DecodedFile(path, sha256, unchanged=True)
            else:
                images[index - len(others)] = decoder(data, image_size)
        except ImageError as error:
            others[index] = DecodedFile(path, sha256, error.kind, str(error))
        except MemoryError:
            others[index] = DecodedFile(path, sha256, "too_large", "not enough memory to read and decode it")
        except Exception as error:
            raise RuntimeError(f"the decoder failed on {escape_path(path)}: {error!r}") from error
        digests.append(sha256)
        if time.perf_counter() - began > max_seconds:
            break
    num_images = len(digests) - len(others)
    return DecodedChunk(paths[: len(digests)], digests, others, images[:num_images], time.perf_counter() - began)


def _hash_only(data: bytes, image_size: tuple[int, int]) -> RGBImage:  # noqa: ARG001
    """Refuse to decode: the decoder for files that are only to be read and hashed."""
    raise ImageError("unsupported", "not decoded: only its SHA-256 was wanted")


@dataclass(frozen=True, slots=True)
class _Request:
    """Message to a worker: the arguments of `decode_files`; no decoder means that of the pool."""

    root: Path
    paths: Sequence[str]
    image_size: tuple[int, int]
    known_digests: Sequence[str]
    max_seconds: float
    decoder: Decoder | None = None

    def part(self, start: int, stop: int | None = None) -> _Request:
        return replace(self, paths=self.paths[start:stop], known_digests=self.known_digests[start:stop])


def run_worker() -> None:
    """Answer requests from standard input on standard output until the parent closes it; then end the process.

    The first message is the decoder, answered by None. Each further one is a `_Request`, answered by a `DecodedChunk`
    without paths, which the parent has, or by the text of a traceback.
    """
    # The pipes move above the standard descriptors, so that nothing a library prints gets between the messages.
    requests, replies = (
        os.fdopen(fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 3), mode) for pipe, mode in ((0, "rb"), (1, "wb"))
    )
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    _limit_memory()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        pool_decoder = pickle.load(requests)  # noqa: S301  the parent's own bytes
        # From here on nothing is printed: libtiff has a line for each damaged file, without its name; the row says it.
        os.dup2(null, 1)
        os.dup2(null, 2)
        reply: DecodedChunk | str | None = None
        while True:
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
            request: _Request = pickle.load(requests)  # noqa: S301
            decoder = request.decoder or pool_decoder
            options = (request.image_size, decoder, request.known_digests, request.max_seconds)
            try:
                reply = replace(decode_files(request.root, request.paths, *options), paths=())
            except RuntimeError:
                reply = traceback.format_exc()
    os._exit(0)  # nothing to clean up, and a broken pipe must not be flushed again


def _limit_memory() -> None:
    """Make an allocation that goes too far fail in this process, where it costs one row and not the whole machine."""
    if sys.platform != "darwin":  # which accepts the limit and ignores it
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        limit = MAX_WORKER_BYTES if hard_limit == resource.RLIM_INFINITY else min(MAX_WORKER_BYTES, hard_limit)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))


def _end_with_parent(requests: int) -> None:
    """End this process when the parent's end of the pipe closes, even in the middle of an endless image."""
    poll = select.poll()
    poll.register(requests, 0)  # reports the hang-up alone
    poll.poll()
    os._exit(1)


class _WorkerDiedError(Exception):
    """A worker ended in the middle of a chunk; the message says how."""


class _WorkerLateError(_WorkerDiedError):
    """A worker was killed because it took too long."""


class _Worker:
    """One decoding process, seen from the parent; it ends by itself when the parent is gone.

    The time limit is for the first byte of a reply. A worker that something outside stops (SIGSTOP) while it sends the
    rest, or before it has read a request of over 64 KB, is waited for: whoever stopped it can continue or kill it.
    """

    def __init__(self, decoder: Decoder) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A process group of its own: Ctrl-C reaches the parent alone, which then ends its workers.
                process_group=0,
                # NumPy's threads for linear algebra would take start-up time, and address space for each core.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise CnnpipeError(f"cannot start a decoding process: {error}; try fewer with --workers") from error
        self._requests = cast("IO[bytes]", self._process.stdin)
        self._replies = cast("IO[bytes]", self._process.stdout)
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        self._is_ready = False
        with suppress(OSError):  # a worker that has died shows it by its reply
            self._send(decoder)

    def decode(self, request: _Request, max_seconds: float) -> DecodedChunk:
        """Have the worker call `decode_files`; the chunk has the first files of the request, at least one.

        Raises:
            CnnpipeError: the worker never started.
            RuntimeError: the decoder raised anything but ImageError.
            _WorkerDiedError: it ended in the middle or, as a _WorkerLateError, took longer than `max_seconds`.
        """
        if not self._is_ready:
            try:
                self._receive(_MAX_START_SECONDS)
            except _WorkerDiedError as error:
                raise CnnpipeError(f"a decoding process did not start: {error}; see its message above") from error
            self._is_ready = True
        with suppress(OSError):  # a worker that has died shows it by its reply
            self._send(request)
        reply = self._receive(max_seconds)
        if isinstance(reply, DecodedChunk):
            return replace(reply, paths=request.paths[: len(reply.sha256)])
        raise RuntimeError(f"a bug in the decoder, from a worker process:\n{reply}")

    def _send(self, message: Decoder | _Request) -> None:
        pickle.dump(message, self._requests, protocol=pickle.HIGHEST_PROTOCOL)
        self._requests.flush()

    def _receive(self, max_seconds: float) -> Any:
        # The time is counted in ticks, not taken from a clock: when this process is suspended and continued (Ctrl-Z),
        # the time between must not count as the worker's.
        tick = min(_MAX_TICK_SECONDS, max_seconds / 10)
        try:
            while not self._poll.poll(tick * 1000):
                max_seconds -= tick
                if max_seconds < 0:
                    self.kill()
                    raise _WorkerLateError("it took too long")
            return pickle.load(self._replies)  # noqa: S301  our own worker's bytes
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:  # ValueError: closed by `kill`
            raise _WorkerDiedError(self._end()) from error

    def _end(self) -> str:
        """Return how a worker ended whose pipe has closed."""
        with suppress(subprocess.TimeoutExpired):  # the pipe closes a moment before the process has ended
            self._process.wait(timeout=5.0)
        self.kill()
        number, names = -self._process.returncode, {each.value: each.name for each in signal.Signals}
        return f"killed by {names.get(number, f'signal {number}')}" if number > 0 else f"exit status {-number}"

    def kill(self) -> None:
        """End the process at once: it holds nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with suppress(OSError):  # bytes that could not be sent to a dead process
                pipe.close()


class DecoderPool:
    """Decodes files on several cores, and yields them in the order in which they were given.

    A thread for each worker waits on its pipe. Workers start when they are needed, so that a single image costs one.
    Use as a context manager: when the block ends, for whatever reason, every worker is gone.

    Args:
        workers: number of processes.
        decoder: function that a fresh interpreter can import by its name.
        seconds_per_file: time limit; a file that takes longer to read and decode becomes a row of kind `timeout`.
    """

    def __init__(self, workers: int, decoder: Decoder = decode_image, seconds_per_file: float = 60.0) -> None:
        self.workers = workers
        self._decoder = decoder
        self._seconds_per_file = seconds_per_file
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        self._threads.shutdown(wait=False, cancel_futures=True)  # chunks that were not yet decoded are dropped
        for worker in alive:
            worker.kill()
        self._threads.shutdown(wait=True)

    def start(self, number: int = 1) -> None:
        """Start some workers in advance, so that they are ready when the model is."""
        for worker in [self._take_worker() for _ in range(min(number, self.workers))]:
            self._return_worker(worker)

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
            known_digests: path -> SHA-256 with which the file need not be decoded, "" for none; called once a file.
        Yields:
            Chunks of any length ≥ 1; their files, one after the other, are exactly `paths`.
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
                digests = tuple(map(known_digests, names)) if known_digests else ()
                request = _Request(root, names, image_size, digests, reply_seconds)
                pending.append(self._threads.submit(self._decode_chunk, request))
            if not pending:
                return
            chunk = pending.popleft().result()
            rate = len(chunk.paths) / max(chunk.seconds, 1e-6)
            num_files = max(1, min(round(_CHUNK_SECONDS * rate), max_files))
            yield chunk

    def _decode_chunk(self, request: _Request) -> DecodedChunk:
        """Decode all files of a request; one by one after a worker died, so that each takes only itself along."""
        chunks: list[DecodedChunk] = []
        while request.paths:
            try:
                chunks.append(self._decode_once(request))
            except _WorkerDiedError as error:
                number = len(request.paths)
                _logger.warning("a decoding process died (%s); its %d files are tried one by one", error, number)
                chunks += [self._decode_alone(request.part(index, index + 1)) for index in range(number)]
                break
            request = request.part(len(chunks[-1].paths))
        if len(chunks) == 1:
            return chunks[0]
        files = [file for chunk in chunks for file in chunk.files]
        images = np.concatenate([chunk.images for chunk in chunks])
        return DecodedChunk.of(files, images, sum(chunk.seconds for chunk in chunks))

    def _decode_alone(self, request: _Request) -> DecodedChunk:
        """Decode one file; if the worker dies, the file is to blame."""
        began, (path,), sha256 = time.perf_counter(), request.paths, ""
        try:
            return self._decode_once(request)
        except _WorkerLateError:
            kind, verb, detail = "timeout", "took too long", f"more than {self._seconds_per_file:g} seconds"
        except _WorkerDiedError as error:
            kind, verb, detail = "crashed", "crashed", str(error)
        _logger.warning("the decoder %s on %s: %s", verb, escape_path(path), detail)
        with suppress(_WorkerDiedError):  # even reading takes too long; in this process it would hold up the whole job
            (sha256,) = self._decode_once(replace(request, decoder=_hash_only)).sha256
        file = DecodedFile(path, sha256, kind, f"the decoder {verb}, {detail}")
        no_image = np.empty((0, *request.image_size, 3), np.uint8)
        return DecodedChunk.of([file], no_image, time.perf_counter() - began)

    def _decode_once(self, request: _Request) -> DecodedChunk:
        worker = self._take_worker()
        try:
            chunk = worker.decode(request, self._seconds_per_file)
        except (_WorkerDiedError, CnnpipeError):
            with self._lock:
                self._alive.discard(worker)
            worker.kill()
            if self._closed:  # killed by `__exit__`, not by a file: nobody waits for this chunk any more
                raise CnnpipeError("decoding was stopped") from None
            raise
        self._return_worker(worker)
        return chunk

    def _take_worker(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise CnnpipeError("decoding was stopped")
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self._decoder)
            self._alive.add(worker)
            return worker

    def _return_worker(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)
