"""Read the official archive of CIFAR-10 without trusting it.

The archive is a gzipped tar of Python 2 pickles. Nothing of it is unpacked to the disk: the members are found by
their exact names, and their pickles are read by an unpickler that knows NumPy arrays and nothing else.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError, one_line
from cnnpipe.prepare.download import Archive

__all__ = ["CIFAR10_ARCHIVE", "Cifar10", "read_cifar10"]

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
