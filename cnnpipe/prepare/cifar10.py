"""Read the official archive of CIFAR-10 without trusting it.

The archive is a gzipped tar of Python 2 pickles. Nothing of it is unpacked to the disk: the members are found by
their exact names, and their pickles are read by an unpickler that knows NumPy arrays and nothing else.

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
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from cnnpipe.errors import DatasetError, DownloadError, one_line
from cnnpipe.progress import ProgressCallback
from cnnpipe.storage import make_folder, move_file, sha256_file, storage_errors, write_text

if TYPE_CHECKING:
    import httpx

__all__ = ["CIFAR10_ARCHIVE", "Archive", "Cifar10", "RetryPolicy", "fetch_archive", "read_cifar10"]

_RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
# A try that brought this much more than any before was worth it: the count of failures starts again.
_PROGRESS_BYTES: Final = 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A file on the network whose content is known beforehand."""

    url: str
    sha256: str
    """64 hexadecimal digits."""
    file_name: str
    """Its name in `data/raw`."""
    num_bytes: int


@dataclass(frozen=True)
class RetryPolicy:
    """How long to bear with a server."""

    attempts: int = 6
    """Failures in a row before giving up."""
    backoff_seconds: float = 1.0
    """Wait after the first failure; doubles with each."""
    max_wait_seconds: float = 120.0
    """Longest wait, whatever the server asks for."""
    timeout_seconds: float = 30.0
    """Longest silence of the server."""


class _TryAgainError(Exception):
    """The server cannot answer now, but may later."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def fetch_archive(
    archive: Archive, raw: Path, progress: ProgressCallback | None = None, policy: RetryPolicy | None = None
) -> Path:
    """Return the path of `archive` in `raw`, downloading it unless it is there.

    An interrupted download goes on where it stopped, in this call or the next. The digest is checked every time.

    Args:
        raw: the folder `data/raw`.
        progress: called with ("download", bytes done, bytes in all).
    Raises:
        DatasetError: the file that is there is not the archive; it is left alone, being the user's.
        DownloadError: it cannot be fetched, or what is served is not the archive.
        StorageError: it cannot be written.
    """
    path = raw / archive.file_name
    if not path.exists():
        make_folder(raw)
        with storage_errors(raw):
            lock = FileLock(raw / f".{archive.file_name}.lock")
            lock.acquire()  # two processes must not write one partial file
        try:
            if not path.exists():  # else the other process has fetched it while this one waited
                _Download(archive, path, progress, policy or RetryPolicy()).run()
                return path
        finally:
            lock.release()
    received = sha256_file(path)
    if received != archive.sha256:
        raise DatasetError(
            f"{path} is not the expected archive: its SHA-256 must be {archive.sha256}, received {received}; "
            "delete it to have it downloaded"
        )
    return path


class _Download:
    """One download: `<name>.part` holds what has come so far, `<name>.part.validator` which version it is part of."""

    def __init__(self, archive: Archive, path: Path, progress: ProgressCallback | None, policy: RetryPolicy) -> None:
        self._archive = archive
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._validator = path.with_name(path.name + ".part.validator")
        self._progress = progress
        self._policy = policy

    def run(self) -> None:
        """Fetch, check, and give the file its name; wrong bytes get one more chance, from zero."""
        for _ in range(2):
            self._fetch()
            with storage_errors(self._part):
                received = sha256_file(self._part)
                if received == self._archive.sha256:
                    move_file(self._part, self._path)
                    self._validator.unlink(missing_ok=True)
                    return
                logger.warning("%s: wrong SHA-256 %s, deleted", self._part, received)
                self._discard()
        raise self._failure(f"its SHA-256 must be {self._archive.sha256}, received {received}, twice")

    def _fetch(self) -> None:
        """Bring the partial file to its end, over as many connections as it takes."""
        import httpx

        failures, best = 0, 0
        timeout = httpx.Timeout(self._policy.timeout_seconds)
        with httpx.Client(follow_redirects=True, timeout=timeout) as client:
            while True:
                try:
                    self._fetch_once(client)
                    return
                except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
                    raise self._failure(one_line(error)) from error
                except (httpx.TransportError, _TryAgainError) as error:
                    if self._received() >= best + _PROGRESS_BYTES:
                        failures, best = 0, self._received()
                    failures += 1
                    reason = one_line(error) or type(error).__name__
                    if failures >= self._policy.attempts:
                        raise self._failure(f"{reason}, after {failures} attempts") from error
                    self._wait(failures, reason, error)

    def _fetch_once(self, client: httpx.Client) -> None:
        """Ask for what is missing, and append it; a server that sends all of it again starts the file anew."""
        start = self._received()
        if start >= self._archive.num_bytes:
            return  # a call that was killed had it all; the digest tells whether it is right
        with client.stream("GET", self._archive.url, headers=self._headers()) as response:
            if response.status_code == 416:
                with storage_errors(self._part):
                    self._discard()
                raise _TryAgainError("the server has nothing at that offset")
            if response.status_code in _RETRIED_STATUSES:
                raise _TryAgainError(f"HTTP status {response.status_code}", _retry_after(response))
            if response.status_code not in (200, 206):
                raise self._failure(f"HTTP status {response.status_code}")
            if response.status_code == 200:
                start = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                with storage_errors(self._part):
                    self._discard()
                raise _TryAgainError("the server sent another range than it was asked for")
            self._append(response, start)

    def _headers(self) -> dict[str, str]:
        """Ask for the rest, on condition that it is the rest of the same version."""
        headers = {"Accept-Encoding": "identity"}  # ranges and the digest are of the file, not of its transfer
        if received := self._received():
            headers["Range"] = f"bytes={received}-"
            if self._validator.is_file():
                headers["If-Range"] = self._validator.read_text(encoding="utf-8").strip()
        return headers

    def _append(self, response: httpx.Response, start: int) -> None:
        if start == 0:
            self._remember_version(response)
        with storage_errors(self._part), self._part.open("ab" if start else "wb") as file:
            done = start
            # As it comes: of blocks of a given size, httpx drops the last when the connection breaks. And raw, because
            # some servers call the gzip of a .tar.gz a content encoding.
            for block in response.iter_raw():
                file.write(block)
                done += len(block)
                if self._progress is not None:
                    self._progress("download", done, self._archive.num_bytes)
                if done > self._archive.num_bytes:
                    return  # not the archive, and perhaps endless: the digest will say so

    def _remember_version(self, response: httpx.Response) -> None:
        """Keep what names this version of the file; a weak ETag does not promise equal bytes."""
        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        with storage_errors(self._validator):
            self._validator.unlink(missing_ok=True)
        if validator:
            write_text(self._validator, validator + "\n")

    def _received(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._validator.unlink(missing_ok=True)

    def _wait(self, failures: int, reason: str, error: Exception) -> None:
        seconds = self._policy.backoff_seconds * 2 ** (failures - 1)
        if isinstance(error, _TryAgainError) and error.retry_after_seconds is not None:
            seconds = max(seconds, error.retry_after_seconds)
        seconds = min(seconds, self._policy.max_wait_seconds)
        logger.warning("download of %s: %s; trying again in %.1f s", self._archive.file_name, reason, seconds)
        time.sleep(seconds)

    def _failure(self, reason: str) -> DownloadError:
        return DownloadError(
            f"cannot download {self._archive.url}: {' '.join(reason.split())}; "
            f"try again later, or fetch it another way and put it at {self._path}"
        )


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date; None if there is none to read."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


CIFAR10_ARCHIVE: Final = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    file_name="cifar-10-python.tar.gz",
    num_bytes=170_498_071,
)

_FOLDER: Final = "cifar-10-batches-py"
_TRAIN_BATCHES: Final = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_BATCH: Final = "test_batch"
_META: Final = "batches.meta"
_MAX_MEMBER_BYTES: Final = 2**26  # a batch of 10,000 images has 31 MB

# All that the pickle of a NumPy array names; NumPy 2 has moved the first, so it is found here and not by its name.
_ADMITTED: Final = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}

# What `pickle` raises on bytes that are no pickle, or one that misuses the three names above.
_PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError,
                  OverflowError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class Cifar10:
    """The whole dataset, train batches first."""

    class_names: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    """(N, 32, 32, 3) RGB."""
    labels: npt.NDArray[np.int64]
    """(N,)"""
    paths: list[str]
    """`<batch>/<class>/<file name>` of each image."""
    is_test: npt.NDArray[np.bool_]
    """(N,)"""


def read_cifar10(path: Path) -> Cifar10:
    """Read the archive.

    Args:
        path: `cifar-10-python.tar.gz`, its digest already checked.
    Raises:
        DatasetError: it is not such an archive, holds a member that leads out of it, or a pickle that asks for more
            than an array.
    """
    members = _read_members(path, (_META, *_TRAIN_BATCHES, _TEST_BATCH))
    class_names = _class_names(_unpickle(members.pop(_META), path, _META), path)
    parts = []
    for batch in (*_TRAIN_BATCHES, _TEST_BATCH):
        parts.append(_read_batch(_unpickle(members.pop(batch), path, batch), path, batch, class_names))
    sizes = [len(paths) for _, _, paths in parts]
    return Cifar10(
        class_names=class_names,
        pixels=np.concatenate([pixels for pixels, _, _ in parts]),
        labels=np.concatenate([labels for _, labels, _ in parts]),
        paths=[name for _, _, paths in parts for name in paths],
        is_test=np.repeat([False] * len(_TRAIN_BATCHES) + [True], sizes),
    )


def _read_members(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the bytes of the members wanted, in one pass; look at every member's name on the way."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                _refuse_unsafe(member, path)
                folder, _, name = member.name.removeprefix("./").partition("/")
                if folder != _FOLDER or name not in names:
                    continue
                file = archive.extractfile(member) if member.size <= _MAX_MEMBER_BYTES else None
                if file is None:
                    raise DatasetError(
                        f"{path}: {name} is no file of at most {_MAX_MEMBER_BYTES:,} bytes; fetch it anew"
                    )
                contents[name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DatasetError(f"{path} cannot be read as a .tar.gz: {error}; delete it to have it fetched anew") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise DatasetError(f"{path} lacks {_FOLDER}/{missing[0]}; need the python version of CIFAR-10")
    return contents


def _refuse_unsafe(member: tarfile.TarInfo, path: Path) -> None:
    """Refuse an archive that would write elsewhere if someone unpacked it: it is not what it says it is."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
        raise DatasetError(
            f"{path} holds the member {member.name!r}, which leads out of the archive; "
            "it is not the official one: delete it"
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, bytes and NumPy arrays; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _unpickle(data: bytes, path: Path, name: str) -> dict[bytes, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except _PICKLE_ERRORS as error:
        raise DatasetError(f"{path}: the pickle {name} is refused: {one_line(error)}; delete the archive") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: the pickle {name} must be a dict, received {type(content).__name__}")
    return content


def _class_names(meta: dict[bytes, Any], path: Path) -> tuple[str, ...]:
    names = meta.get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DatasetError(f"{path}: {_META} has no list label_names; need the python version of CIFAR-10")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _read_batch(
    batch: dict[bytes, Any], path: Path, name: str, class_names: tuple[str, ...]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str]]:
    """Check one batch and return its pixels (N, 32, 32, 3), labels (N,) and paths."""
    data, labels, files = (batch.get(key) for key in (b"data", b"labels", b"filenames"))
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or not isinstance(labels, list)
        or not isinstance(files, list)
        or data.shape != (len(labels), 3 * 32 * 32)
        or len(files) != len(labels)
        or not all(isinstance(label, int) and 0 <= label < len(class_names) for label in labels)
        or not all(isinstance(file, bytes) for file in files)
    ):
        raise DatasetError(f"{path}: {name} is not N rows of 3,072 uint8 with N labels and N file names")
    # A row is the red plane, then the green, then the blue.
    pixels = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    paths = [
        f"{name}/{class_names[label]}/{file.decode('utf-8', 'replace')}"
        for label, file in zip(labels, files, strict=True)
    ]
    return pixels, np.array(labels, np.int64), paths
