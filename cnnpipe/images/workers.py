"""Decode files on several cores: in order, bounded in memory and time, and surviving a decoder that crashes.

A worker (`decoding_process.py`) takes nobody with it when it dies, is killed because a file takes too long, or is
refused more memory (`decoding.MAX_WORKER_BYTES`): its files are tried again one by one, and the one to blame is a row.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice, repeat
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import CnnpipeError, ImageError
from cnnpipe.files import display_path, open_standard_descriptors
from cnnpipe.images.decode import RGBImage, decode_image, read_file

__all__ = [
    "MAX_WORKER_BYTES",
    "DecodeRequest",
    "DecodedChunk",
    "DecodedFile",
    "Decoder",
    "DecoderPool",
    "DecodingProcess",
    "PackedChunk",
    "WorkerDiedError",
    "WorkerLateError",
    "decode_files",
    "read_only",
    "run_worker",
]

Decoder = Callable[[bytes, tuple[int, int]], RGBImage]
"""Bytes of a file and (height, width) -> pixels; raises ImageError. Workers import it by its name."""

PackedChunk = tuple[list[str], dict[int, tuple[str, str, bool]], npt.NDArray[np.uint8], float]
"""A `DecodedChunk` on its way between processes: digests; index -> the rest of a file without image; images; seconds.

Pickling an object for each file would cost the two processes a fifth of what decoding a small image does.
"""

MAX_WORKER_BYTES: Final = 4 * 2**30
"""Address space that a decoding process may have, where the system keeps such a limit: on Linux and BSD.

Measured at `images.MAX_PIXELS`: 2.8 GiB for WebP with transparency, the hungriest, 2.4 for a 16-bit PPM, 1.8 or less
for progressive JPEG, PNG, GIF and TIFF; and `files.MAX_FILE_BYTES` may come on top. So whatever is within the limit on
pixels is decoded, and anything that would take more is refused, whatever a hostile file says.
"""


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """What became of one file."""

    path: str
    """Relative to the folder, as `find_files` gave it."""
    sha256: str
    """Of its bytes; empty if they could not be read."""
    error_kind: str = ""
    """One of `cnnpipe.images.decode.ERROR_KINDS`; empty if nothing went wrong."""
    error: str = ""
    unchanged: bool = False
    """It has the digest that was known of it, so it was not decoded."""

    @property
    def has_image(self) -> bool:
        """Whether it was decoded."""
        return not (self.error_kind or self.unchanged)


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """A run of files in their order, with the pixels of those that were decoded."""

    files: tuple[DecodedFile, ...]
    images: npt.NDArray[np.uint8]
    """(files that have an image, H, W, 3) RGB."""
    seconds: float
    """Reading, hashing and decoding, as the worker's clock saw it."""

    def pack(self) -> PackedChunk:
        """Return what `unpack` makes this chunk of again."""
        others = {
            index: (file.error_kind, file.error, file.unchanged)
            for index, file in enumerate(self.files)
            if not file.has_image
        }
        return [file.sha256 for file in self.files], others, self.images, self.seconds

    @classmethod
    def unpack(cls, packed: PackedChunk, paths: Sequence[str]) -> Self:
        """Make a chunk that was packed; `paths` are its files', and may go on behind its last one."""
        digests, others, images, seconds = packed
        files = [DecodedFile(path, sha256) for path, sha256 in zip(paths, digests, strict=False)]
        for index, (error_kind, error, unchanged) in others.items():
            files[index] = DecodedFile(paths[index], digests[index], error_kind, error, unchanged)
        return cls(tuple(files), images, seconds)


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
        known_digests: beside `paths`: a file with this SHA-256 is not decoded; empty if none is known.
        max_seconds: after so long, no further file is begun: the chunk may have fewer files than `paths`.
    Raises:
        RuntimeError: `decoder` raised anything but ImageError, which is a bug in it.
    """
    began = time.perf_counter()
    images = np.empty((len(paths), *image_size, 3), np.uint8)
    files: list[DecodedFile] = []
    num_decoded = 0
    for path, known in zip(paths, known_digests or repeat(""), strict=False):
        sha256 = ""
        try:
            data = read_file(os.path.join(root, path))
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 != known:
                images[num_decoded] = decoder(data, image_size)
        except ImageError as error:
            files.append(DecodedFile(path, sha256, error.kind, str(error)))
        except MemoryError:
            files.append(DecodedFile(path, sha256, "too_large", "not enough memory to read and decode it"))
        except Exception as error:
            raise RuntimeError(f"the decoder failed on {display_path(path)}: {error!r}") from error
        else:
            files.append(DecodedFile(path, sha256, unchanged=sha256 == known))
            num_decoded += sha256 != known
        if time.perf_counter() - began > max_seconds:
            break
    return DecodedChunk(tuple(files), images[:num_decoded], time.perf_counter() - began)


def read_only(data: bytes, image_size: tuple[int, int]) -> RGBImage:  # noqa: ARG001
    """Be the decoder where files are to be read and hashed, and no more: all are refused."""
    raise ImageError("unsupported", "only read")


def run_worker() -> None:
    """Answer requests from standard input on standard output until the parent closes it; then end the process.

    The first message is the decoder. Each further one is a tuple of the arguments of `decode_files`, with None for the
    decoder of the first message; it is answered by a packed chunk, or the text of a traceback.
    """
    open_standard_descriptors()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # The pipes are ours alone: what a library prints must not get between the messages.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    _limit_memory()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        own_decoder = pickle.load(requests)  # noqa: S301  the parent's own bytes
        # From here on nothing is printed: libtiff has a line for each damaged file, without its name; the row says it.
        os.dup2(null, 1)
        os.dup2(null, 2)
        reply: PackedChunk | str | None = None
        while True:
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
            root, paths, image_size, decoder, *options = pickle.load(requests)  # noqa: S301
            try:
                reply = decode_files(root, paths, image_size, decoder or own_decoder, *options).pack()
            except RuntimeError:
                reply = traceback.format_exc()
    os._exit(0)  # nothing to clean up, and a broken pipe must not be flushed again


def _limit_memory() -> None:
    """Have an allocation that goes too far fail in this process, where it costs one row, not the machine its memory."""
    if sys.platform in ("win32", "darwin"):  # macOS takes the limit and ignores it
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_WORKER_BYTES if most == resource.RLIM_INFINITY else min(MAX_WORKER_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _end_with_parent(requests: int) -> None:
    """End this process when the other end of a pipe is closed, even if it is in the middle of an endless image."""
    if not hasattr(select, "poll"):  # Windows: it ends after the image
        return
    poll = select.poll()
    poll.register(requests, 0)  # no event but the hang-up
    poll.poll()
    os._exit(1)


_MAX_START_SECONDS: Final = 120.0

_WORKER: Final = "import sys; sys.path[:] = sys.argv[1:]; from cnnpipe.images.workers import run_worker; run_worker()"


class WorkerDiedError(Exception):
    """A worker ended in the middle of a chunk; the message says how."""


class WorkerLateError(WorkerDiedError):
    """A worker was killed because it took too long."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What a worker is to decode: the arguments of `decode_files`."""

    root: Path
    paths: Sequence[str]
    image_size: tuple[int, int]
    known_digests: Sequence[str]
    max_seconds: float
    decoder: Decoder | None = None
    """None is the pool's; the worker has that already."""

    def part(self, start: int, stop: int | None = None) -> DecodeRequest:
        """Return the request for some of the files."""
        return replace(self, paths=self.paths[start:stop], known_digests=self.known_digests[start:stop])

    def message(self) -> bytes:
        """Return the request as `run_worker` takes it."""
        content = (self.root, self.paths, self.image_size, self.decoder, self.known_digests, self.max_seconds)
        return pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)


class DecodingProcess:
    """One decoding process."""

    def __init__(self, decoder: Decoder) -> None:
        # A process group of its own: Ctrl-C in the terminal goes to the parent alone, which then ends its workers.
        options: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        # NumPy's threads for linear algebra would take start-up time, and address space for each core.
        options["env"] = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        greeting = pickle.dumps(decoder, protocol=pickle.HIGHEST_PROTOCOL)  # a decoder without a name fails here
        command = [sys.executable, "-c", _WORKER, *sys.path]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        except OSError as error:
            raise CnnpipeError(f"cannot start a decoding process: {error}; try fewer with --workers") from error
        self._ready = False
        self._lock = threading.Lock()
        self._seconds_left: float | None = None
        self.late = False
        """It took longer than it was given, and has been killed."""
        with suppress(OSError):  # one that is dead already shows it when it is first asked
            self._write(greeting)

    def decode(self, request: DecodeRequest, max_seconds: float) -> DecodedChunk:
        """Have the worker call `decode_files`.

        Returns:
            The chunk of the first files of the request, at least one.
        Raises:
            CnnpipeError: the worker never came up.
            RuntimeError: the decoder raised anything but ImageError.
            WorkerLateError: the worker took longer than `max_seconds`; it cannot be used again.
            WorkerDiedError: the worker ended in the middle; likewise.
        """
        if not self._ready:
            try:
                with self._limit(_MAX_START_SECONDS):
                    self._receive()
            except WorkerDiedError as error:
                raise CnnpipeError(f"a decoding process did not start: {error}; see its message above") from error
            self._ready = True
        with self._limit(max_seconds):
            try:
                self._write(request.message())
            except OSError as error:
                raise self._ended() from error
            reply = self._receive()
        if isinstance(reply, tuple):
            return DecodedChunk.unpack(reply, request.paths)
        raise RuntimeError(f"a bug in the decoder, from a worker process:\n{reply}")

    @contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """Have `count_down` kill the process if what is done under this takes longer."""
        with self._lock:
            self._seconds_left = seconds
        try:
            yield
        finally:
            with self._lock:
                self._seconds_left = None

    def count_down(self, seconds: float) -> None:
        """Note that time has passed, and kill the process if it was given no more; called from a thread of the pool's.

        Called regularly, rather than once at a point in time: a parent that was stopped and goes on (Ctrl-Z) must
        not take the time in between for the worker's.
        """
        with self._lock:
            if self._seconds_left is None or self.late:
                return
            if self._seconds_left < 0:
                self.late = True
                self._process.kill()
            self._seconds_left -= seconds

    def _write(self, message: bytes) -> None:
        if self._process.stdin is None:
            raise BrokenPipeError
        self._process.stdin.write(message)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        try:
            if self._process.stdout is None:
                raise EOFError
            return pickle.load(self._process.stdout)  # noqa: S301  our own worker's bytes
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._ended() from error

    def _ended(self) -> WorkerDiedError:
        """Return the error of a worker whose pipe has ended."""
        how = self._wait()
        with self._lock:
            return WorkerLateError("it took too long") if self.late else WorkerDiedError(how)

    def _wait(self) -> str:
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
            num_files = round(_CHUNK_SECONDS * len(chunk.files) / max(chunk.seconds, 1e-6))
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
            start += len(chunks[-1].files)
        if len(chunks) == 1:
            return chunks[0]
        return DecodedChunk(
            tuple(file for chunk in chunks for file in chunk.files),
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
            sha256 = self._decode_once(replace(request, decoder=read_only)).files[0].sha256
        file = DecodedFile(path, sha256, kind, f"the decoder {fate}, {detail}")
        no_image = np.empty((0, *request.image_size, 3), np.uint8)
        return DecodedChunk((file,), no_image, time.perf_counter() - began)

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
