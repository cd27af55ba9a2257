"""Where images come from: the built-in digits, the archive of CIFAR-10, or a user's folder.

A source tells what it holds in two ways. `content()` is the digest of it all, found as cheaply as can be; `read()`
gives the images, with the same digest found on the way. Who has nothing to compare with reads at once, and everything
is read only once.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.files import display_path, read_file, user_path
from cnnpipe.images.decoding import DecodedChunk, DecodedFile, decode_files
from cnnpipe.images.selection import FileFilter
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import usable_cores
from cnnpipe.prepare.cifar10 import read_cifar10
from cnnpipe.prepare.download import Archive, fetch_archive
from cnnpipe.prepare.folders import ImageFolder, list_image_folder
from cnnpipe.prepare.report import Unreadable
from cnnpipe.prepare.splits import TEST, TRAIN
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import BUILT_IN_DATASETS, PrepareSettings
from cnnpipe.storage import storage_errors

__all__ = ["Cifar10Source", "DigitsSource", "FolderSource", "Source", "SourceImages", "open_source"]

_logger = logging.getLogger(__name__)

_CHUNK_FILES: Final = 128
_MIN_FILES_FOR_POOL: Final = 500  # fewer are decoded sooner than a second process has started


@dataclass(frozen=True)
class SourceImages:
    """All readable images of a source, N of them, in its own order."""

    content: str
    """SHA-256 of the source, as `Source.content` gives it."""
    class_names: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    """(N, H, W, 3) RGB, in the source's own size or, from a folder, in the model's."""
    labels: npt.NDArray[np.int64]
    """(N,)"""
    paths: Sequence[str]
    digests: Sequence[str]
    """SHA-256 of each image's file or, where it has none, of its pixels."""
    given: npt.NDArray[np.int8]
    """(N,) index into `SPLITS`."""
    given_splits: frozenset[int]
    """The splits that the source comes with; the others are taken out of train."""
    unreadable: tuple[Unreadable, ...] = ()
    warnings: tuple[str, ...] = ()


class Source(Protocol):
    """What every source can do."""

    kind: str

    def content(self) -> str:
        """Return the SHA-256 of everything that the prepared images are made from."""

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:
        """Read all images.

        Args:
            image_size: the model's (height, width), for sources that decode.
            scratch: a file that may be written, in a place with room for all images; it must outlive the result.
        """


def open_source(
    settings: PrepareSettings, raw: Path, archive: Archive, workers: int | None, progress: ProgressCallback
) -> Source:
    """Return the source that `settings.dataset` names.

    Raises:
        DatasetError: it is a folder that cannot be a dataset.
    """
    if settings.dataset in BUILT_IN_DATASETS and Path(settings.dataset).is_dir():
        _logger.warning(
            "%s is the built-in dataset here, not the folder of that name; for the folder give ./%s",
            settings.dataset,
            settings.dataset,
        )
    if settings.dataset == "digits":
        return DigitsSource()
    if settings.dataset == "cifar10":
        return Cifar10Source(archive, raw, progress)
    folder = list_image_folder(user_path(settings.dataset), FileFilter(settings.include, settings.exclude))
    return FolderSource(folder, workers or usable_cores(), progress)


class DigitsSource:
    """1,797 handwritten digits, 8×8 grey, that come with scikit-learn: real data without a network."""

    kind = "digits"

    def content(self) -> str:
        pixels, labels = self._load()
        return hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:  # noqa: ARG002  as the protocol has it
        pixels, labels = self._load()
        return SourceImages(
            content=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
            class_names=tuple(str(digit) for digit in range(10)),
            pixels=pixels,
            labels=labels,
            paths=[f"digits/{index:04d}" for index in range(len(labels))],
            digests=_pixel_digests(pixels),
            given=np.full(len(labels), TRAIN, np.int8),
            given_splits=frozenset(),
        )

    @staticmethod
    def _load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Source: scikit-learn's description of the dataset: grey levels are whole numbers from 0 to 16.
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        return np.repeat(grey[..., np.newaxis], 3, axis=3), digits.target.astype(np.int64)


class Cifar10Source:
    """The official archive, from `data/raw` or the network, with its own split of train and test."""

    kind = "cifar10"

    def __init__(self, archive: Archive, raw: Path, progress: ProgressCallback) -> None:
        self._archive = archive
        self._raw = raw
        self._progress = progress

    def content(self) -> str:
        return self._archive.sha256  # known without the file: what is prepared outlives a tidied data/raw

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:  # noqa: ARG002  as the protocol has it
        cifar10 = read_cifar10(fetch_archive(self._archive, self._raw, self._progress))
        return SourceImages(
            content=self._archive.sha256,
            class_names=cifar10.class_names,
            pixels=cifar10.pixels,
            labels=cifar10.labels,
            paths=cifar10.paths,
            digests=_pixel_digests(cifar10.pixels),
            given=np.where(cifar10.is_test, TEST, TRAIN).astype(np.int8),
            given_splits=frozenset({TRAIN, TEST}),
        )


def _pixel_digests(pixels: npt.NDArray[np.uint8]) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]


class FolderSource:
    """A user's folder of images, hashed and decoded on all cores."""

    kind = "folder"

    def __init__(self, folder: ImageFolder, workers: int, progress: ProgressCallback) -> None:
        self._folder = folder
        self._workers = workers
        self._progress = progress

    def content(self) -> str:
        paths, done = self._folder.paths, 0
        chunks = [paths[start : start + _CHUNK_FILES] for start in range(0, len(paths), _CHUNK_FILES)]
        entries: list[tuple[str, str]] = []
        # Threads: reading and hashing let go of the interpreter, and processes would have to be started.
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                for chunk in threads.map(self._hash_files, chunks):
                    entries += chunk
                    done += len(chunk)
                    self._progress("hash", done, len(paths))
            except BaseException:  # such as Ctrl-C: the rest need not be read before it takes effect
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return _folder_content(entries)

    def _hash_files(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        entries = []
        for path in paths:
            try:
                digest = hashlib.sha256(read_file(self._folder.root / path)).hexdigest()
            except ImageError as error:
                digest = error.kind
            entries.append((path, digest))
        return entries

    def read(self, image_size: tuple[int, int], scratch: Path) -> SourceImages:
        files = self._decode_to(scratch, image_size)
        readable = np.array([not file.error_kind for file in files], np.bool_)
        if not readable.any():
            raise DatasetError(
                f"none of the {len(files):,} files in {self._folder.root} can be read as an image; "
                f"the first, {display_path(files[0].path)}: {files[0].error}"
            )
        return SourceImages(
            content=_folder_content([(file.path, file.sha256 or file.error_kind) for file in files]),
            class_names=self._folder.class_names,
            pixels=np.memmap(scratch, np.uint8, "r", shape=(int(readable.sum()), *image_size, 3)),
            labels=self._folder.labels[readable],
            paths=[display_path(file.path) for file in files if not file.error_kind],
            digests=[file.sha256 for file in files if not file.error_kind],
            given=self._folder.given[readable],
            given_splits=self._folder.given_splits,
            unreadable=tuple(
                Unreadable(display_path(file.path), file.error_kind, display_path(file.error))
                for file in files
                if file.error_kind
            ),
            warnings=self._folder.warnings,
        )

    def _decode_to(self, scratch: Path, image_size: tuple[int, int]) -> list[DecodedFile]:
        """Decode all files, write the pixels of those that can be decoded to `scratch`, one after the other."""
        files: list[DecodedFile] = []
        # Plain writes report a full disk; into a mapped file they would end the process with SIGBUS.
        with storage_errors(scratch):
            file = scratch.open("wb")
        with file, closing(self._decode_chunks(image_size)) as chunks:
            for chunk in chunks:
                with storage_errors(scratch):
                    file.write(chunk.images.tobytes())
                    file.flush()  # here, so that a full disk is not told at closing
                files += chunk.files
                self._progress("decode", len(files), len(self._folder.paths))
        return files

    def _decode_chunks(self, image_size: tuple[int, int]) -> Generator[DecodedChunk, None, None]:
        root, paths = self._folder.root, self._folder.paths
        if self._workers > 1 and len(paths) >= _MIN_FILES_FOR_POOL:
            with DecoderPool(self._workers) as pool:
                yield from pool.decode(root, iter(paths), image_size)
            return
        for start in range(0, len(paths), _CHUNK_FILES):
            yield decode_files(root, paths[start : start + _CHUNK_FILES], image_size)


def _folder_content(entries: Sequence[tuple[str, str]]) -> str:
    """Digest a folder: paths and what they hold, whatever the order in which they were listed or read.

    Args:
        entries: relative path, and SHA-256 of the bytes or why they could not be read.
    """
    content = hashlib.sha256()
    for path, digest in sorted((os.fsencode(path), digest) for path, digest in entries):
        content.update(b"%d:%b%b\n" % (len(path), path, digest.encode()))
    return content.hexdigest()
