"""List one folder in order, in bounded memory however many names it holds."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, pairwise
from typing import IO, Final

from cnnpipe.errors import StorageError
from cnnpipe.images.leftovers import OWN, UNFINISHED, is_own_folder, name_leftover

__all__ = ["FOLDER_MARK", "list_entries", "sorted_names"]

FOLDER_MARK: Final = b"\0"
"""Ends the name of a folder in a listing; it is in no name and sorts lowest, so the order stays."""

_NAMES_PER_BLOCK = 200_000
"""Held in memory at a time: some 15 MB; a folder that has more is sorted with a temporary file."""

_READ_BYTES = 2**15
"""Of each sorted block, read back at a time."""

_SEPARATOR: Final = b"/"
"""Between the names in the temporary file: the one byte that is in no name, nor the mark."""


def list_entries(folder: bytes, passed_over: Counter[str]) -> Iterator[tuple[bytes, bool]]:
    """Yield the names in a folder, in no order, and whether each is a folder; leave out what is never an input.

    A link to a folder counts as a folder. Only links are looked at one by one; for the rest the listing says enough.

    Args:
        passed_over: counts what is left out, by what to call it.
    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False  # a link in a circle, or to where we may not look
            if leftover := name_leftover(folder, name, is_folder):
                if leftover != UNFINISHED:  # often of the very job that asks
                    passed_over[leftover] += 1
            else:
                yield name, is_folder


def sorted_names(folder: bytes, passed_over: Counter[str], behind: bytes = b"", *, is_root: bool) -> Iterator[bytes]:
    """Read a folder to its end now, and return its names in bytewise order, those of folders with `FOLDER_MARK`.

    Args:
        passed_over: as in `list_entries`; a folder that cnnpipe made counts as one, and has no names.
        behind: only names that sort behind this one.
        is_root: whether a user named this folder, so that its names are wanted whoever made it.
    Raises:
        OSError: the folder cannot be listed.
        StorageError: there is no room for the temporary file of a huge folder; at once or by the iterator.
    """
    names: list[bytes] = []
    blocks: _SortedBlocks | None = None
    inside: Counter[str] = Counter()
    for name, is_folder in list_entries(folder, inside):
        if name <= behind:
            continue
        names.append(name + FOLDER_MARK if is_folder else name)
        if len(names) >= _NAMES_PER_BLOCK:
            blocks = blocks or _SortedBlocks()
            blocks.write(names)
            names.clear()
    if blocks is None and not is_root and is_own_folder(chain(names, map(os.fsencode, inside))):
        passed_over[OWN] += 1
        return iter(())
    passed_over.update(inside)
    if blocks is None:
        names.sort()
        return iter(names)
    blocks.write(names)
    return chain.from_iterable(blocks.merge())


class _SortedBlocks:
    """Names sorted block by block, in a temporary file that has no name and goes with the process or this object.

    Raises:
        StorageError: by every method, for any trouble with the file.
    """

    def __init__(self) -> None:
        self._ends = [0]
        self._file: IO[bytes] | None = None

    def __del__(self) -> None:
        # A walk may be dropped at any point, so there is no `with` that could close it.
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def write(self, names: list[bytes]) -> None:
        """Sort names in place, and add them as a block."""
        if not names:
            return
        names.sort()
        with self._opened() as file:
            file.write(_SEPARATOR.join(names) + _SEPARATOR)
            file.flush()
            self._ends.append(file.tell())

    def merge(self) -> Iterator[list[bytes]]:
        """Yield all names in order, some thousands at a time.

        Not name by name: whatever does not exceed the least of the last names read of each block is all there, and
        sorting it merges what is in order already, at the speed of C.
        """
        readers = [self._read(start, end) for start, end in pairwise(self._ends)]
        heads = [next(reader) for reader in readers]
        while heads:
            limit = min(head[-1] for head in heads)
            ready: list[bytes] = []
            for index, head in enumerate(heads):
                cut = bisect_right(head, limit)
                ready += head[:cut]
                heads[index] = head[cut:] or next(readers[index], [])
            readers = [reader for reader, head in zip(readers, heads, strict=True) if head]
            heads = [head for head in heads if head]
            ready.sort()
            yield ready

    def _read(self, start: int, end: int) -> Iterator[list[bytes]]:
        """Yield the names of one block, at least one at a time."""
        rest = b""
        for place in range(start, end, _READ_BYTES):
            with self._opened() as file:
                file.seek(place)
                rest += file.read(min(_READ_BYTES, end - place))
            *names, rest = rest.split(_SEPARATOR)
            if names:
                yield names

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - __del__ closes it
            yield self._file
        except OSError as error:
            raise StorageError(
                f"cannot sort a folder of over {_NAMES_PER_BLOCK:,} names in a temporary file: "
                f"{error.strerror or error}; free some space, or set TMPDIR to a folder that has room"
            ) from error
