"""Fetch one large file over a network that may fail: retried, resumed, and checked before anyone looks inside."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from filelock import FileLock

from cnnpipe.errors import DatasetError, DownloadError, one_line
from cnnpipe.progress import ProgressCallback
from cnnpipe.storage import make_folder, move_file, sha256_file, storage_errors, write_text

if TYPE_CHECKING:
    import httpx

__all__ = ["Archive", "RetryPolicy", "fetch_archive"]

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
