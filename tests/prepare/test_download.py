"""The download bears with a bad network and a bad server, and lets no wrong byte through."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnpipe.errors import DatasetError, DownloadError, StorageError
from cnnpipe.prepare.cifar10 import Archive, RetryPolicy, fetch_archive

CONTENT = np.random.default_rng(0).bytes(600_000)
QUICK = RetryPolicy(attempts=4, backoff_seconds=0.01, max_wait_seconds=5.0, timeout_seconds=5.0)


@dataclass
class Reply:
    """How the server answers one request."""

    status: int = 200
    cut: int | None = None
    """Break the connection off after so many bytes of the body."""
    content: bytes = CONTENT
    ranges: bool = True
    etag: str | None = '"v1"'
    headers: dict[str, str] = field(default_factory=dict)


class FlakyServer(ThreadingHTTPServer):
    """Answers the first requests as told, all later ones well; remembers what it was asked."""

    daemon_threads = True

    def __init__(self, replies: list[Reply], then: Reply) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = replies
        self.then = then
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/archive.tar.gz"


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        reply = self.server.replies.pop(0) if self.server.replies else self.server.then
        if reply.status != 200:
            self._head(reply.status, {"Content-Length": "0", **reply.headers})
            return
        headers, start = dict(reply.headers), 0
        if reply.etag:
            headers["ETag"] = reply.etag
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        status = 200
        if wanted and reply.ranges and condition in (None, reply.etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(reply.content) - 1}/{len(reply.content)}"
        body = reply.content[start:]
        self._head(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body[: reply.cut])
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing: the tests look at `requests`."""


@contextmanager
def serving(*replies: Reply, then: Reply | None = None) -> Iterator[FlakyServer]:
    server = FlakyServer(list(replies), then or Reply())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def archive_at(url: str, content: bytes = CONTENT) -> Archive:
    return Archive(url, hashlib.sha256(content).hexdigest(), "archive.tar.gz", len(content))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.endswith(".lock")}


def test_a_download_arrives_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with serving() as server:
        path = fetch_archive(archive_at(server.url), tmp_path / "raw", lambda *args: seen.append(args), QUICK)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path / "raw") == {"archive.tar.gz"}
    assert seen[-1] == ("download", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_file_put_there_by_hand_needs_no_server(tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz").write_bytes(CONTENT)
    assert fetch_archive(archive_at("http://127.0.0.1:1/"), tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_put_there_by_hand_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz").write_bytes(b"mine")
    with pytest.raises(DatasetError, match=r"SHA-256 must be [0-9a-f]{64}, received [0-9a-f]{64}; delete it"):
        fetch_archive(archive_at("http://127.0.0.1:1/"), tmp_path)
    assert (tmp_path / "archive.tar.gz").read_bytes() == b"mine"


def test_a_broken_off_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with serving(Reply(cut=200_000), Reply(cut=100_000)) as server:
        path = fetch_archive(archive_at(server.url), tmp_path, policy=QUICK)
    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=200000-", "bytes=300000-"]
    assert server.requests[1]["If-Range"] == '"v1"'


def test_the_next_call_resumes_what_a_failed_one_left(tmp_path: Path) -> None:
    once = RetryPolicy(attempts=1, timeout_seconds=5.0)
    with serving(Reply(cut=150_000)) as server:
        with pytest.raises(DownloadError, match="after 1 attempts"):
            fetch_archive(archive_at(server.url), tmp_path, policy=once)
        assert (tmp_path / "archive.tar.gz.part").stat().st_size == 150_000
        assert fetch_archive(archive_at(server.url), tmp_path, policy=once).read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=150000-"
    assert names(tmp_path) == {"archive.tar.gz"}


def test_a_whole_part_left_by_a_killed_call_needs_no_server(tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(CONTENT)
    assert fetch_archive(archive_at("http://127.0.0.1:1/"), tmp_path, policy=QUICK).read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(tmp_path: Path) -> None:
    with serving(Reply(cut=200_000), then=Reply(ranges=False)) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT


def test_another_version_on_the_server_is_not_appended(tmp_path: Path) -> None:
    old = bytes(len(CONTENT))
    with serving(Reply(content=old, cut=200_000, etag='"v0"')) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_without_a_validator_the_digest_finds_the_mixture(tmp_path: Path) -> None:
    with serving(Reply(content=bytes(len(CONTENT)), cut=200_000, etag=None), then=Reply(etag=None)) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=200000-", None]


def test_a_weak_etag_is_no_condition_but_the_date_is(tmp_path: Path) -> None:
    date = formatdate(usegmt=True)
    weak = Reply(cut=200_000, etag='W/"v1"', headers={"Last-Modified": date})
    with serving(weak) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert server.requests[1]["If-Range"] == date


def test_a_part_longer_than_the_file_on_the_server_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(bytes(500_000))
    with serving(Reply(status=416)) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert server.requests[1].get("Range") is None


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(tmp_path: Path, status: int) -> None:
    with serving(Reply(status=status), Reply(status=status)) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_honoured(tmp_path: Path, kind: str) -> None:
    # A date has whole seconds: two ahead are more than one.
    value = "1" if kind == "seconds" else formatdate(time.time() + 2, usegmt=True)
    with serving(Reply(status=503, headers={"Retry-After": value})) as server:
        began = time.monotonic()
        fetch_archive(archive_at(server.url), tmp_path, policy=QUICK)
    assert 0.9 < time.monotonic() - began < 4.0


def test_waiting_has_a_limit_whatever_the_server_asks(tmp_path: Path) -> None:
    policy = RetryPolicy(attempts=2, backoff_seconds=0.01, max_wait_seconds=0.05, timeout_seconds=5.0)
    with serving(Reply(status=503, headers={"Retry-After": "86400"})) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=policy).read_bytes() == CONTENT


def test_a_server_that_stays_down_ends_with_what_to_do(tmp_path: Path) -> None:
    expected = (
        r"HTTP status 503, after 4 attempts; try again later, or fetch it another way and put it at .*archive\.tar"
    )
    with serving(then=Reply(status=503)) as server, pytest.raises(DownloadError, match=expected):
        fetch_archive(archive_at(server.url), tmp_path, policy=QUICK)
    assert len(server.requests) == 4


def test_no_server_at_all_ends_with_what_to_do(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(DownloadError, match=r"after 4 attempts.*put it at"):
        fetch_archive(archive_at(url), tmp_path, policy=QUICK)


def test_a_missing_file_is_not_asked_for_again(tmp_path: Path) -> None:
    with serving(then=Reply(status=404)) as server, pytest.raises(DownloadError, match="HTTP status 404"):
        fetch_archive(archive_at(server.url), tmp_path, policy=QUICK)
    assert len(server.requests) == 1


def test_wrong_bytes_get_one_more_chance_from_zero(tmp_path: Path) -> None:
    with serving(Reply(content=bytes(len(CONTENT)))) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, None]


def test_wrong_bytes_twice_are_deleted_and_both_digests_named(tmp_path: Path) -> None:
    wrong = b"<html>Please log in to the wireless network</html>"
    digests = f"must be {hashlib.sha256(CONTENT).hexdigest()}, received {hashlib.sha256(wrong).hexdigest()}, twice"
    with serving(then=Reply(content=wrong)) as server, pytest.raises(DownloadError, match=digests):
        fetch_archive(archive_at(server.url), tmp_path, policy=QUICK)
    assert len(server.requests) == 2
    assert names(tmp_path) == set()


def test_an_endless_body_is_stopped_at_the_known_size(tmp_path: Path) -> None:
    seen: list[int] = []
    with serving(then=Reply(content=bytes(20_000_000))) as server, pytest.raises(DownloadError, match="SHA-256"):
        fetch_archive(archive_at(server.url), tmp_path, lambda _, done, __: seen.append(done), QUICK)
    assert max(seen) < 2 * len(CONTENT)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "raw").touch()
    with pytest.raises(StorageError, match=r"cannot write .*raw"):
        fetch_archive(archive_at("http://127.0.0.1:1/"), tmp_path / "raw", policy=QUICK)


def test_two_callers_at_once_fetch_it_once(tmp_path: Path) -> None:
    with serving() as server:
        archive = archive_at(server.url)
        threads = [threading.Thread(target=fetch_archive, args=(archive, tmp_path, None, QUICK)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.requests) == 1
    assert (tmp_path / "archive.tar.gz").read_bytes() == CONTENT
