"""Files and folders that are written whole or not at all.

A reader sees either the old content or the new one, never half of it: the content goes to a temporary name in the same
folder, is flushed to the disk, and gets the final name in one step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from cnnpipe.errors import AlreadyThereError, StorageError, one_line

TEMPORARY_NAME: Final = re.compile(r"\..+\.[0-9a-f]{16}(\.[a-z0-9]+)?", re.DOTALL)
"""Names that this module gives to what it has not finished writing or removing."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into one clear line.

    Raises:
        StorageError: for any OSError inside the block; says how to fix it.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check the folder, its permissions and the disk"
        raise StorageError(f"cannot write {path}: {one_line(error.strerror or error)}; {remedy}") from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents if they are missing, and return it.

    Raises:
        StorageError: it cannot be created.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def write_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on any error it is removed.

    The temporary name has the same suffix, because Keras and Pillow choose the format by it. Errors of the block are
    passed on unchanged: wrap what it writes in `storage_errors`.

    Args:
        replace: whether an existing file may be replaced.
    Raises:
        AlreadyThereError: the file exists and may not be replaced.
        StorageError: the folder or the file cannot be written.
    """
    make_folder(path.parent)
    temporary = _temporary_name(path, path.suffix)
    try:
        with storage_errors(path):
            temporary.touch(exist_ok=False)
        yield temporary
        move_file(temporary, path, replace=replace)
    finally:
        with suppress(OSError):  # a disk that has just failed must not hide the error that says so
            temporary.unlink(missing_ok=True)


def move_file(source: Path, path: Path, *, replace: bool = True) -> None:
    """Flush a complete file to the disk and rename it to `path`, in a folder on the same file system.

    Args:
        replace: whether an existing file, or what a symbolic link points to, may be replaced. If not, the old name may
            remain beside the new one.
    Raises:
        AlreadyThereError: the file exists and may not be replaced.
        StorageError: it cannot be moved.
    """
    with storage_errors(path):
        _sync(source)
        if replace:
            path = Path(os.path.realpath(path))
            try:
                os.replace(source, path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with write_file(path) as temporary:  # a link led to another file system
                    shutil.copyfile(source, temporary)
                source.unlink()
        else:
            _take_free_name(source, path)
        _sync(path.parent)


def _take_free_name(source: Path, path: Path) -> None:
    """Rename a file to a name that must be free, with no moment in which another process could take that name."""
    try:
        os.link(source, path)
    except OSError:  # the name is taken, or the file system has no hard links: then an empty file reserves the name
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise AlreadyThereError(f"{path} exists; choose another name or remove it") from error
        try:
            os.replace(source, path)
        except OSError:
            path.unlink(missing_ok=True)
            raise


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`, on any error it is removed.

    If another process creates `path` in the meantime, that folder stays and this one is dropped: the names of such
    folders have a fingerprint of their content. Errors of the block are passed on as by `write_file`.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_folder(path.parent)
    temporary = _temporary_name(path)
    try:
        with storage_errors(path):
            temporary.mkdir()
        yield temporary
        with storage_errors(path):
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


def remove_path(path: Path) -> None:
    """Remove a file or folder, which first gets a hidden name, so that nobody sees half of it; raises StorageError."""
    hidden = _temporary_name(path)
    with storage_errors(path), suppress(FileNotFoundError):  # another process removes it too
        os.rename(path, hidden)
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()


def write_bytes(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write `content` to `path`; raises as `write_file`."""
    with write_file(path, replace=replace) as temporary, storage_errors(path):
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Write `text` to `path` as UTF-8; raises as `write_file`."""
    write_bytes(path, text.encode("utf-8"), replace=replace)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; raises as `write_file`, and ValueError for NaN or infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a rename never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path, suffix: str = "") -> Path:
    # At most 16 letters of the name, which may be 64 bytes of UTF-8: a name has at most 255.
    return path.with_name(f".{path.stem[:16]}.{secrets.token_hex(8)}{suffix}")
