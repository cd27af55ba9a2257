"""Read, hash and decode files; and the loop of a process that does so for another, started by `workers.py`.

This is all that such a process imports, with NumPy, Pillow and the decoder: keep it light.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from math import inf
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import ImageError
from cnnpipe.files import display_path, open_standard_descriptors, read_file
from cnnpipe.images.decode import RGBImage, decode_image

__all__ = [
    "MAX_WORKER_BYTES",
    "DecodedChunk",
    "DecodedFile",
    "Decoder",
    "PackedChunk",
    "decode_files",
    "read_only",
    "run_worker",
]

Decoder = Callable[[bytes, tuple[int, int]], RGBImage]
"""Bytes of a file and (height, width) -> pixels; raises ImageError. Workers import it by its name."""

PackedChunk = tuple[list[str], dict[int, tuple[str, str, bool]], npt.NDArray[np.uint8], float]
"""A `DecodedChunk` on its way between processes: digests; index -> the rest of a file without image; images; seconds.

Pickling an object for each file would cost the two processes a fifth of what decoding a small image does.
"""

MAX_WORKER_BYTES: Final = 4 * 2**30
"""Address space that a decoding process may have, where the system keeps such a limit: on Linux and BSD.

Measured at `images.MAX_PIXELS`: 2.8 GiB for WebP with transparency, the hungriest, 2.4 for a 16-bit PPM, 1.8 or less
for progressive JPEG, PNG, GIF and TIFF; and `files.MAX_FILE_BYTES` may come on top. So whatever is within the limit on
pixels is decoded, and anything that would take more is refused, whatever a hostile file says.
"""


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """What became of one file."""

    path: str
    """Relative to the folder, as `find_files` gave it."""
    sha256: str
    """Of its bytes; empty if they could not be read."""
    error_kind: str = ""
    """One of `cnnpipe.images.decode.ERROR_KINDS`; empty if nothing went wrong."""
    error: str = ""
    unchanged: bool = False
    """It has the digest that was known of it, so it was not decoded."""

    @property
    def has_image(self) -> bool:
        """Whether it was decoded."""
        return not (self.error_kind or self.unchanged)


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """Consecutive files in their order, with the pixels of those that were decoded.

    Columns, because an object for each file would cost the process that takes them more than all else it does.
    """

    paths: Sequence[str]
    """Relative to the folder."""
    sha256: Sequence[str]
    """SHA-256 of each file; empty if it could not be read."""
    others: Mapping[int, DecodedFile]
    """Index -> the outcome for a file that has no image."""
    images: npt.NDArray[np.uint8]
    """(files that have an image, H, W, 3) RGB."""
    seconds: float
    """Seconds of reading, hashing and decoding, as the worker's clock saw it."""

    @classmethod
    def of(cls, files: Sequence[DecodedFile], images: npt.NDArray[np.uint8], seconds: float) -> Self:
        """Make a chunk of the outcomes for its files."""
        others = {index: file for index, file in enumerate(files) if not file.has_image}
        return cls([file.path for file in files], [file.sha256 for file in files], others, images, seconds)

    @property
    def files(self) -> tuple[DecodedFile, ...]:
        """The outcome for each file."""
        pairs = enumerate(zip(self.paths, self.sha256, strict=True))
        return tuple(self.others.get(index) or DecodedFile(*pair) for index, pair in pairs)

    def pack(self) -> PackedChunk:
        """Return what `unpack` turns into this chunk again."""
        others = {index: (file.error_kind, file.error, file.unchanged) for index, file in self.others.items()}
        return list(self.sha256), others, self.images, self.seconds

    @classmethod
    def unpack(cls, packed: PackedChunk, paths: Sequence[str]) -> Self:
        """Make a chunk that was packed; `paths` are its files', and may go on after its last one."""
        sha256, packed_others, images, seconds = packed
        others = {index: DecodedFile(paths[index], sha256[index], *rest) for index, rest in packed_others.items()}
        return cls(paths[: len(sha256)], sha256, others, images, seconds)


def decode_files(
    root: Path,
    paths: Sequence[str],
    image_size: tuple[int, int],
    decoder: Decoder = decode_image,
    known_digests: Sequence[str] = (),
    max_seconds: float = inf,
) -> DecodedChunk:
    """Read, hash and decode files, one after the other.

    Args:
        root: the folder that `paths` are relative to.
        paths: at least one.
        image_size: (height, width) in pixels.
        known_digests: beside `paths`: a file with this SHA-256 is not decoded; empty if none is known.
        max_seconds: after so long, no further file is begun: the chunk may have fewer files than `paths`.
    Raises:
        RuntimeError: `decoder` raised anything but ImageError, which is a bug in it.
    """
    began = time.perf_counter()
    images = np.empty((len(paths), *image_size, 3), np.uint8)
    files: list[DecodedFile] = []
    num_decoded = 0
    for path, known in zip(paths, known_digests or repeat(""), strict=False):
        sha256 = ""
        try:
            data = read_file(os.path.join(root, path))
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 != known:
                images[num_decoded] = decoder(data, image_size)
        except ImageError as error:
            files.append(DecodedFile(path, sha256, error.kind, str(error)))
        except MemoryError:
            files.append(DecodedFile(path, sha256, "too_large", "not enough memory to read and decode it"))
        except Exception as error:
            raise RuntimeError(f"the decoder failed on {display_path(path)}: {error!r}") from error
        else:
            files.append(DecodedFile(path, sha256, unchanged=sha256 == known))
            num_decoded += sha256 != known
        if time.perf_counter() - began > max_seconds:
            break
    return DecodedChunk.of(files, images[:num_decoded], time.perf_counter() - began)


def read_only(data: bytes, image_size: tuple[int, int]) -> RGBImage:  # noqa: ARG001
    """Be the decoder where files are to be read and hashed, and no more: all are refused."""
    raise ImageError("unsupported", "only read")


def run_worker() -> None:
    """Answer requests from standard input on standard output until the parent closes it; then end the process.

    The first message is the decoder. Each further one is a tuple of the arguments of `decode_files`, with None for the
    decoder of the first message; it is answered by a packed chunk, or the text of a traceback.
    """
    open_standard_descriptors()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # The pipes are ours alone: what a library prints must not get between the messages.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    _limit_memory()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        own_decoder = pickle.load(requests)  # noqa: S301  the parent's own bytes
        # From here on nothing is printed: libtiff has a line for each damaged file, without its name; the row says it.
        os.dup2(null, 1)
        os.dup2(null, 2)
        reply: PackedChunk | str | None = None
        while True:
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
            root, paths, image_size, decoder, *options = pickle.load(requests)  # noqa: S301
            try:
                reply = decode_files(root, paths, image_size, decoder or own_decoder, *options).pack()
            except RuntimeError:
                reply = traceback.format_exc()
    os._exit(0)  # nothing to clean up, and a broken pipe must not be flushed again


def _limit_memory() -> None:
    """Have an allocation that goes too far fail in this process, where it costs one row, not the machine its memory."""
    if sys.platform in ("win32", "darwin"):  # macOS takes the limit and ignores it
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_WORKER_BYTES if most == resource.RLIM_INFINITY else min(MAX_WORKER_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _end_with_parent(requests: int) -> None:
    """End this process when the other end of a pipe is closed, even if it is in the middle of an endless image."""
    if not hasattr(select, "poll"):  # Windows: it ends after the image
        return
    poll = select.poll()
    poll.register(requests, 0)  # no event but the hang-up
    poll.poll()
    os._exit(1)
