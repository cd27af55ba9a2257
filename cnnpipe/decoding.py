"""Read, hash and decode files; and the loop of a process that does so for another, started by `workers.py`.

This is all that such a process imports, with NumPy, Pillow and the decoder: keep it light.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import select
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import ImageError
from cnnpipe.files import display_path, read_file
from cnnpipe.images import RGBImage, decode_image

__all__ = ["DecodedChunk", "DecodedFile", "Decoder", "decode_files", "run_worker"]

Decoder = Callable[[bytes, tuple[int, int]], RGBImage]
"""Bytes of a file and (height, width) -> pixels; raises ImageError. Workers import it by its name."""


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """What became of one file."""

    path: str
    """Relative to the folder, as `find_files` gave it."""
    sha256: str
    """Of its bytes; empty if they could not be read."""
    error_kind: str = ""
    """Empty if it was decoded, else one of `cnnpipe.images.ERROR_KINDS`."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """A run of files in their order, with the pixels of those that were decoded."""

    files: tuple[DecodedFile, ...]
    images: npt.NDArray[np.uint8]
    """(files without error, H, W, 3) RGB."""
    seconds: float
    """Reading, hashing and decoding, as the worker's clock saw it."""


def decode_files(
    root: Path, paths: Sequence[str], image_size: tuple[int, int], decoder: Decoder = decode_image
) -> DecodedChunk:
    """Read, hash and decode files, one after the other.

    Args:
        root: the folder that `paths` are relative to.
        image_size: (height, width) in pixels.
    Raises:
        RuntimeError: `decoder` raised anything but ImageError, which is a bug in it.
    """
    began = time.perf_counter()
    images = np.empty((len(paths), *image_size, 3), np.uint8)
    files: list[DecodedFile] = []
    num_decoded = 0
    for path in paths:
        sha256 = ""
        try:
            data = read_file(root / path)
            sha256 = hashlib.sha256(data).hexdigest()
            images[num_decoded] = decoder(data, image_size)
        except ImageError as error:
            files.append(DecodedFile(path, sha256, error.kind, str(error)))
        except Exception as error:
            raise RuntimeError(f"the decoder failed on {display_path(path)}: {error!r}") from error
        else:
            files.append(DecodedFile(path, sha256))
            num_decoded += 1
    return DecodedChunk(tuple(files), images[:num_decoded], time.perf_counter() - began)


def run_worker() -> None:
    """Answer requests from standard input on standard output until the parent closes it; then end the process."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # The pipes are ours alone: what a library prints must not get between the messages.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        decoder = pickle.load(requests)  # noqa: S301  the parent's own bytes
        reply: DecodedChunk | str = ""
        while True:
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
            root, paths, image_size = pickle.load(requests)  # noqa: S301
            try:
                reply = decode_files(root, paths, image_size, decoder)
            except RuntimeError:
                reply = traceback.format_exc()
    os._exit(0)  # nothing to clean up, and a broken pipe must not be flushed again


def _end_with_parent(requests: int) -> None:
    """End this process when the other end of a pipe is closed, even if it is in the middle of an endless image."""
    if not hasattr(select, "poll"):  # Windows: it ends after the image
        return
    poll = select.poll()
    poll.register(requests, 0)  # no event but the hang-up
    poll.poll()
    os._exit(1)
