"""Write files whole or not at all, and tell what is in them.

A reader of any file of cnnpipe sees either the old content or the new, never half of it: the content goes to
a temporary name in the same folder, is flushed to the disk, and takes the final name by `os.replace`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cnnpipe.errors import StorageError

__all__ = [
    "make_folder",
    "sha256_file",
    "storage_errors",
    "write_bytes",
    "write_file",
    "write_folder",
    "write_json",
    "write_text",
]


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into one clear line.

    Raises:
        StorageError: for any OSError inside the block; says what to mend.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check the folder, its permissions and the disk"
        reason = " ".join(str(error.strerror or error).split())
        raise StorageError(f"cannot write {path}: {reason}; {remedy}") from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents where they are missing, and return it.

    Raises:
        StorageError: it cannot be created.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on any error it is removed.

    The temporary name keeps the suffix, because Keras and Pillow choose the format by it.

    Raises:
        StorageError: the folder or the file cannot be written.
    """
    make_folder(path.parent)
    temporary = _temporary_name(path)
    try:
        with storage_errors(path):
            # 0o666 and not mkstemp's 0o600: the umask decides, so a result is as readable as any file of the user's.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # a disk that has just failed must not hide the error that says so
            temporary.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`, on any error it is removed.

    If another process has put `path` there meanwhile, that one stays and this one is dropped: the names of such
    folders carry a fingerprint of their content.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_folder(path.parent)
    temporary = _temporary_name(path)
    try:
        with storage_errors(path):
            temporary.mkdir()
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _sync(file)
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.is_dir():
                    raise
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with write_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a rename never outlives its content."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    """Return a free hidden name beside `path`; only a few letters of its own, as 16 may be 64 bytes of UTF-8."""
    return path.with_name(f".{path.stem[:16]}.{secrets.token_hex(8)}{path.suffix}")
