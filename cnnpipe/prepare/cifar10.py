"""The source CIFAR-10: fetch the archive over a network that may fail, and read it without trusting it.

The download is resumed, retried and checked against the known SHA-256. The archive is a gzipped tar of Python 2
pickles, which are read in memory by an unpickler that knows NumPy arrays and nothing else.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from filelock import FileLock

from cnnpipe.errors import DatasetError, DownloadError, one_line
from cnnpipe.prepare.sources import TEST, TRAIN, SourceImages, hash_pixels
from cnnpipe.progress import ProgressCallback
from cnnpipe.storage import make_folder, move_file, sha256_file, storage_errors

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A file on the network whose content is known beforehand."""

    url: str
    sha256: str
    """SHA-256, 64 hexadecimal digits."""
    file_name: str
    """Name of the file in `data/raw`."""
    num_bytes: int


CIFAR10_ARCHIVE: Final = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    file_name="cifar-10-python.tar.gz",
    num_bytes=170_498_071,
)

_RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_PROGRESS_BYTES: Final = 2**20  # that must be added for the count of failures to start again

_FOLDER: Final = "cifar-10-batches-py"
_TEST_BATCH: Final = "test_batch"
_BATCHES: Final = (*(f"data_batch_{number}" for number in range(1, 6)), _TEST_BATCH)
_META: Final = "batches.meta"

# All that the pickle of a NumPy array names. NumPy 2 has moved the first function, so it is not looked up by name.
_ADMITTED: Final = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}

# What `pickle` raises on bytes that are not a pickle, or on one that misuses the three names above.
_PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError,
                  OverflowError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class RetryPolicy:
    """When to try a download again, and when to give up."""

    attempts: int = 6
    """Failures in a row before giving up."""
    backoff_seconds: float = 1.0
    """Seconds to wait after the first failure; doubles with each."""
    max_wait_seconds: float = 120.0
    """Longest wait, whatever the server asks for."""
    timeout_seconds: float = 30.0
    """Longest silence of the server."""


class _TryAgainError(Exception):
    """The server cannot answer now, but may later."""

    retry_after_seconds = 0.0


class Cifar10Source:
    """The official archive, from `data/raw` or the network, with its own split of train and test."""

    kind = "cifar10"

    def __init__(self, archive: Archive, raw: Path, progress: ProgressCallback) -> None:
        self._archive = archive
        self._raw = raw
        self._progress = progress

    def content(self) -> str:
        return self._archive.sha256  # known without the file: what is prepared outlives a tidied data/raw

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:  # noqa: ARG002  as all sources
        path = fetch_archive(self._archive, self._raw, self._progress)
        contents = _read_members(path, (*_BATCHES, _META))
        class_names = tuple(name.decode() for name in _unpickle(contents[_META], path, _META)[b"label_names"])
        batches = {name: _unpickle(contents[name], path, name) for name in _BATCHES}
        # A row of the data is the red plane, then the green, then the blue.
        planes = np.concatenate([batch[b"data"] for batch in batches.values()]).reshape(-1, 3, 32, 32)
        pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        files = [
            (name, label, file.decode())
            for name, batch in batches.items()
            for label, file in zip(batch[b"labels"], batch[b"filenames"], strict=True)
        ]
        return SourceImages(
            content=self._archive.sha256,
            class_names=class_names,
            pixels=pixels,
            labels=np.array([label for _, label, _ in files], np.int64),
            paths=[f"{name}/{class_names[label]}/{file}" for name, label, file in files],
            digests=hash_pixels(pixels),
            given_split=np.array([TEST if name == _TEST_BATCH else TRAIN for name, _, _ in files], np.int8),
            given_splits=frozenset({TRAIN, TEST}),
        )


def fetch_archive(
    archive: Archive, raw: Path, progress: ProgressCallback | None = None, policy: RetryPolicy | None = None
) -> Path:
    """Return the path of `archive` in `raw`; download it if it is not there.

    An interrupted download goes on where it stopped, in this call or the next. The digest is checked every time.

    Args:
        raw: the folder `data/raw`.
        progress: called with ("download", bytes done, bytes in all).
    Raises:
        DatasetError: the file that is there is not the archive; it is left alone, because it is the user's.
        DownloadError: the archive cannot be fetched, or what is served is something else.
        StorageError: it cannot be written.
    """
    path = raw / archive.file_name
    if not path.exists():
        lock = FileLock(make_folder(raw) / f".{archive.file_name}.lock")
        with storage_errors(raw), lock:  # two processes must not write one partial file
            if not path.exists():  # else another process has fetched it while this one waited
                _Download(archive, path, progress, policy or RetryPolicy()).run()
    received = sha256_file(path)
    if received != archive.sha256:
        raise DatasetError(
            f"{path} is not the expected archive: its SHA-256 must be {archive.sha256}, received {received}; "
            "delete it to download it again"
        )
    return path


class _Download:
    """One download; `<name>.part` holds what has come so far."""

    def __init__(self, archive: Archive, path: Path, progress: ProgressCallback | None, policy: RetryPolicy) -> None:
        self._archive = archive
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._progress = progress or (lambda *_: None)
        self._policy = policy

    def run(self) -> None:
        """Fetch the file, check it, and give it its name.

        The wrong bytes, such as the halves of two versions, are fetched once more from the start.
        """
        for _ in range(2):
            self._fetch()
            with storage_errors(self._part):
                received = sha256_file(self._part)
                if received == self._archive.sha256:
                    move_file(self._part, self._path)
                    return
                logger.warning("%s: wrong SHA-256 %s, deleted", self._part, received)
                self._part.unlink()
        raise self._failure(f"its SHA-256 must be {self._archive.sha256}, received {received}, twice")

    def _fetch(self) -> None:
        """Bring the partial file to its end, over as many connections as it takes."""
        import httpx

        policy, failures, best = self._policy, 0, 0
        with httpx.Client(follow_redirects=True, timeout=policy.timeout_seconds) as client:
            while (start := self._num_received()) < self._archive.num_bytes:
                try:
                    self._fetch_once(client, start)
                    return
                except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
                    raise self._failure(one_line(error)) from error
                except (httpx.TransportError, _TryAgainError) as error:
                    if (received := self._num_received()) >= best + _PROGRESS_BYTES:
                        failures, best = 0, received
                    failures += 1
                    reason = one_line(error) or type(error).__name__
                    if failures >= policy.attempts:
                        raise self._failure(f"{reason}, after {failures} attempts") from error
                    wanted = getattr(error, "retry_after_seconds", 0.0)
                    wait = min(max(policy.backoff_seconds * 2 ** (failures - 1), wanted), policy.max_wait_seconds)
                    logger.warning("download of %s: %s; trying again in %.1f s", self._path.name, reason, wait)
                    time.sleep(wait)

    def _fetch_once(self, client: httpx.Client, start: int) -> None:
        """Request what is missing, and append it; start again if the server sends everything."""
        headers = {"Accept-Encoding": "identity"}  # ranges and the digest are of the file, not of its transfer
        if start:
            headers["Range"] = f"bytes={start}-"
        with client.stream("GET", self._archive.url, headers=headers) as response, storage_errors(self._part):
            status = response.status_code
            if status in _RETRIED_STATUSES:
                failure = _TryAgainError(f"HTTP status {status}")
                if (wait := response.headers.get("Retry-After", "")).isdigit():
                    failure.retry_after_seconds = float(wait)
                raise failure
            content_range = response.headers.get("Content-Range", "")
            if status == 416 or (status == 206 and not content_range.startswith(f"bytes {start}-")):
                self._part.unlink(missing_ok=True)
                raise _TryAgainError(f"the server does not have the bytes from {start:,} on")
            if status not in (200, 206):
                raise self._failure(f"HTTP status {status}")
            done = start if status == 206 else 0
            with self._part.open("ab" if done else "wb") as file:
                # As it comes: of blocks of a given size, httpx drops the last when the connection breaks. And raw,
                # because some servers call the gzip of a .tar.gz a content encoding.
                for block in response.iter_raw():
                    file.write(block)
                    done += len(block)
                    self._progress("download", done, self._archive.num_bytes)
                    if done > self._archive.num_bytes:
                        return  # not the archive, and perhaps endless: the digest will say so
            if done < self._archive.num_bytes and "Content-Length" not in response.headers:
                raise _TryAgainError(f"the connection ended after {done:,} of {self._archive.num_bytes:,} bytes")

    def _num_received(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _failure(self, reason: str) -> DownloadError:
        return DownloadError(
            f"cannot download {self._archive.url}: {' '.join(reason.split())}; "
            f"try again later, or fetch it another way and put it at {self._path}"
        )


def _read_members(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the bytes of some files in the archive; nothing is unpacked to the disk."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.partition("/")
                if folder == _FOLDER and name in names and (file := archive.extractfile(member)):
                    contents[name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DatasetError(f"{path} cannot be read as a .tar.gz: {error}; delete it to download it again") from error
    if missing := [name for name in names if name not in contents]:
        raise DatasetError(f"{path} lacks {_FOLDER}/{missing[0]}; need the python version of CIFAR-10")
    return contents


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, bytes and NumPy arrays; refuses whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _unpickle(data: bytes, path: Path, name: str) -> dict[bytes, Any]:
    try:
        return cast("dict[bytes, Any]", _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load())
    except _PICKLE_ERRORS as error:
        reason = f"the pickle {name} is refused: {one_line(error)}"
        raise DatasetError(f"{path}: {reason}; delete it to download it again") from error
