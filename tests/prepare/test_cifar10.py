"""The download survives a bad network and a bad server; the archive is read without trusting its pickles."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from cnnpipe.errors import DatasetError, DownloadError, StorageError
from cnnpipe.prepare.cifar10 import Archive, RetryPolicy, fetch_archive
from cnnpipe.prepare.dataset import PreparedDataset, prepare_dataset
from cnnpipe.settings import PrepareSettings

CONTENT = np.random.default_rng(0).bytes(600_000)
QUICK = RetryPolicy(attempts=4, backoff_seconds=0.01, max_wait_seconds=5.0, timeout_seconds=5.0)


@dataclass
class Reply:
    """How the server answers one request."""

    status: int = 200
    cut: int | None = None
    """Number of bytes of the body after which the connection breaks."""
    content: bytes = CONTENT
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)


class FlakyServer(ThreadingHTTPServer):
    """Answers the first requests as told and all later ones well; records the requests."""

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
        wanted = self.headers.get("Range")
        status = 200
        if wanted and reply.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers.setdefault("Content-Range", f"bytes {start}-{len(reply.content) - 1}/{len(reply.content)}")
        body = reply.content[start:]
        self._head(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body[: reply.cut])
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
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


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with serving(Reply(cut=200_000), Reply(cut=100_000)) as server:
        path = fetch_archive(archive_at(server.url), tmp_path, policy=QUICK)
    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=200000-", "bytes=300000-"]


def test_a_body_of_unknown_length_that_ends_early_is_gone_on_with(tmp_path: Path) -> None:
    with serving(Reply(cut=200_000, headers={"Content-Length": ""})) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=200000-"]


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


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(tmp_path: Path, status: int) -> None:
    with serving(Reply(status=status), Reply(status=status)) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert len(server.requests) == 3


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


def test_another_version_on_the_server_is_found_by_the_digest_and_fetched_again(tmp_path: Path) -> None:
    with serving(Reply(content=bytes(len(CONTENT)), cut=200_000)) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=200000-", None]


@pytest.mark.parametrize(
    "reply", [Reply(status=416), Reply(headers={"Content-Range": "bytes 7-9/10"})], ids=["416", "206"]
)
def test_a_server_that_lacks_the_rest_is_asked_for_everything(tmp_path: Path, reply: Reply) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(bytes(500_000))
    with serving(reply) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == ["bytes=500000-", None]


def test_a_server_is_given_the_time_that_it_asks_for_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("cnnpipe.prepare.cifar10.time.sleep", waits.append)
    busy = [Reply(status=503, headers={"Retry-After": value}) for value in ("3", "86400", "Fri, 31 Dec 1999 23:59:59")]
    with serving(*busy) as server:
        assert fetch_archive(archive_at(server.url), tmp_path, policy=QUICK).read_bytes() == CONTENT
    assert waits == [3.0, 5.0, 0.04]


# --- reading


_PythonPickler: Any = vars(pickle)["_Pickler"]  # the one written in Python, whose parts can be replaced


class Python2Pickler(_PythonPickler):  # type: ignore[misc]
    """Writes what Python 2 wrote: `bytes` and `str` alike as its byte strings, NumPy's functions where they were."""

    dispatch: ClassVar[dict[type, Any]] = dict(_PythonPickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else value
        short = len(data) < 256
        self.write(b"U" + bytes([len(data)]) + data if short else b"T" + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or value.__name__}\n".encode())
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string
    dispatch[type] = dispatch[type(len)] = dispatch[type(lambda: None)] = save_global


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


CIFAR_CLASSES = ["airplane", "automobile", "bird"]


def cifar_batch(count: int, seed: int) -> tuple[dict[str, object], npt.NDArray[np.uint8]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [index % 3 for index in range(count)]
    batch = {"data": pixels, "labels": labels, "filenames": [f"{seed}_{index}.png" for index in range(count)]}
    return batch, pixels


def cifar_members() -> dict[str, bytes]:
    batches = {f"data_batch_{number}": cifar_batch(30, number)[0] for number in range(1, 6)}
    batches["test_batch"] = cifar_batch(24, 6)[0]
    batches["batches.meta"] = {"label_names": CIFAR_CLASSES, "num_vis": 3072}
    return {f"cifar-10-batches-py/{name}": python2_pickle(batch) for name, batch in batches.items()}


def write_archive(data: Path, members: dict[str, bytes]) -> Archive:
    """Write data/raw/cifar.tar.gz and return how it is to be recognised."""
    (data / "raw").mkdir(parents=True, exist_ok=True)
    path = data / "raw" / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = path.read_bytes()
    return Archive("http://127.0.0.1:1/", hashlib.sha256(content).hexdigest(), path.name, len(content))


def prepare(data: Path, archive: Archive, **options: Any) -> PreparedDataset:
    return prepare_dataset(PrepareSettings(dataset="cifar10", **options), data, archive=archive)


def test_the_archive_of_cifar10_is_read_with_its_own_test_split(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, cifar_members())
    dataset = prepare(tmp_path, archive)
    assert dataset.class_names == tuple(CIFAR_CLASSES)
    assert dataset.num_images == {"train": 120, "val": 30, "test": 24}
    assert dataset.paths("test")[1] == "test_batch/automobile/6_1.png"
    expected = cifar_batch(24, 6)[1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(dataset.images("test"), expected)
    assert dataset.labels("test").tolist() == [0, 1, 2] * 8


def test_prepared_cifar10_outlives_its_archive(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, cifar_members())
    before = prepare(tmp_path, archive)
    shutil.rmtree(tmp_path / "raw")
    assert prepare(tmp_path, archive) == before


def test_cifar10_comes_in_the_size_asked_for(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, cifar_members())
    assert prepare(tmp_path, archive, image_size=(48, 40)).images("val").shape == (30, 48, 40, 3)


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    members = cifar_members()
    members["cifar-10-batches-py/data_batch_3"] = pickle.dumps({b"data": Malice(f"touch '{marker}'")})
    archive = write_archive(tmp_path, members)
    with pytest.raises(DatasetError, match=r"the pickle data_batch_3 is refused: it asks for (posix|nt)\.system"):
        prepare(tmp_path, archive)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.core.multiarray.scalar", "numpy.load", "os.system"])
def test_a_pickle_may_ask_for_nothing_but_arrays(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    members = cifar_members()
    members["cifar-10-batches-py/test_batch"] = f"\x80\x02c{module}\n{function}\n.".encode("latin-1")
    with pytest.raises(DatasetError, match=f"it asks for {name}"):
        prepare(tmp_path, write_archive(tmp_path, members))


def test_an_archive_that_lacks_a_batch_is_refused(tmp_path: Path) -> None:
    members = cifar_members()
    del members["cifar-10-batches-py/data_batch_5"]
    with pytest.raises(DatasetError, match="lacks cifar-10-batches-py/data_batch_5; need the python version"):
        prepare(tmp_path, write_archive(tmp_path, members))


def test_an_archive_that_is_not_a_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "cifar.tar.gz").write_bytes(b"not a tar")
    archive = Archive("http://127.0.0.1:1/", hashlib.sha256(b"not a tar").hexdigest(), "cifar.tar.gz", 9)
    with pytest.raises(DatasetError, match=r"cannot be read as a \.tar\.gz"):
        prepare(tmp_path, archive)
