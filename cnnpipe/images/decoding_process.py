"""One process that decodes for this one, over pipes: started, asked, watched, and killed if it must be.

A plain subprocess, not one of a `ProcessPoolExecutor`, whose children import the parent's main module again, which
under `python -m flows.…` is Prefect (seconds a worker), and one of which takes the whole pool with it when it dies.
Here it imports NumPy, Pillow and the decoder, and ends by itself when the parent is gone, because its pipe ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cnnpipe.errors import CnnpipeError
from cnnpipe.images.decoding import DecodedChunk, Decoder

__all__ = ["DecodeRequest", "DecodingProcess", "WorkerDiedError", "WorkerLateError"]

_MAX_START_SECONDS: Final = 120.0

_WORKER: Final = "import sys; sys.path[:] = sys.argv[1:]; from cnnpipe.images.decoding import run_worker; run_worker()"


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
