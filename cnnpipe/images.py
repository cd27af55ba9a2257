"""Find, read and decode images: the only decoder, used for training and for classifying alike.

One decoder for both is what keeps a model's accuracy: the pixels it is applied to are made exactly as the pixels
it was trained on. The rules, in order: the first frame; transparency over white; any colour mode to 8-bit RGB;
stretched (not cropped) to the model's size with an antialiasing bilinear filter; turned upright by its EXIF tag.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from cnnpipe.errors import DatasetError, ImageError

__all__ = [
    "ERROR_KINDS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "RGBImage",
    "decode_image",
    "display_path",
    "find_files",
    "read_file",
    "resize_pixels",
]

RGBImage = npt.NDArray[np.uint8]  # (H, W, 3), red green blue, 0-255

ERROR_KINDS: Final = {
    "not_found": "the file is gone, or a symbolic link points to nothing",
    "not_a_file": "a folder, pipe, socket or device",
    "unreadable": "the operating system refused to read it",
    "empty": "zero bytes",
    "not_an_image": "no decoder knows this content",
    "truncated": "the image ends before it should",
    "corrupt": "the image's data contradict themselves",
    "unsupported": "an image, but of a kind that has no agreed conversion to 8-bit RGB",
    "too_large": f"more than {2**30:,} bytes, or more pixels than the limit",
    "crashed": "the decoder ended its process; only ever seen from a worker process",
}
"""Why a file could not be turned into pixels: kind -> meaning."""

MAX_PIXELS: Final = 178_956_970
"""Larger images are refused before they are unpacked; twice Pillow's warning threshold, where it refuses too.

Source: https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.MAX_IMAGE_PIXELS
"""

MAX_FILE_BYTES: Final = 2**30

# `_open` enforces MAX_PIXELS itself and reports one row; Pillow's own check would also print warnings below it.
Image.MAX_IMAGE_PIXELS = None

# What a decoder may raise on damaged data, seen by fuzzing Pillow's plugins; anything else is a bug and is not hidden.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError,
                   AttributeError, RuntimeError, ArithmeticError, struct.error, zlib.error)  # fmt: skip

_TRUNCATED: Final = ("truncated", "but only got", "unexpected end", "requires a buffer of at least")
_UNSUPPORTED: Final = ("unsupported", "not supported", "cannot find loader")

# Source: EXIF 2.32, tag 0x0112; 1 is upright, values outside 2-8 are ignored.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_POSTSCRIPT: Final = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # the second opens an EPS file with a preview

_SIDEWAYS: Final = frozenset({5, 6, 7, 8})  # orientations that swap width and height


def find_files(root: Path) -> Iterator[str]:
    """Yield every file below a folder, depth first, the names of each folder sorted bytewise.

    Links are followed; a link back to a folder that is being walked, and a folder that cannot be listed, are yielded
    themselves, so that nothing is passed over in silence.

    Args:
        root: an existing folder.
    Yields:
        Paths relative to `root`, with `/`; undecodable bytes as surrogates (PEP 383), so `root / path` opens.
    Raises:
        DatasetError: `root` is not a folder that can be listed.
    """
    if not root.is_dir():
        problem = "it is a file" if root.exists() else "it does not exist"
        raise DatasetError(f"need a folder of images, received {display_path(str(root))}: {problem}; check the path")
    try:
        entries = _sorted_entries(root)
    except OSError as error:
        raise DatasetError(f"cannot list {root}: {error.strerror}; check its permissions") from error
    # A stack of iterators, not recursion: trees may be deeper than Python's recursion limit.
    identity = os.stat(root)
    stack = [("", (identity.st_dev, identity.st_ino), iter(entries))]
    while stack:
        prefix, _, names = stack[-1]
        entry = next(names, None)
        if entry is None:
            stack.pop()
            continue
        path = prefix + entry.name
        try:
            if entry.is_dir():
                identity = entry.stat()
                key = (identity.st_dev, identity.st_ino)
                if all(key != walking for _, walking, _ in stack):
                    stack.append((path + "/", key, iter(_sorted_entries(Path(entry.path)))))
                    continue
        except OSError:
            pass  # yielded below: reading it says what is wrong, in its own row
        yield path


def _sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def display_path(path: str) -> str:
    """Return a path as text that any UTF-8 file can hold: undecodable bytes become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_file(path: Path) -> bytes:
    """Read a file's bytes, refusing what could hang or never end.

    Raises:
        ImageError: kinds `not_found`, `not_a_file`, `unreadable`, `empty`, `too_large`.
    """
    try:
        # Non-blocking, so that a pipe that takes the file's place between listing and reading cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            data = _read_regular(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise ImageError("not_found", "no such file, or a link to nothing") from error
    except OSError as error:
        # A socket cannot be opened at all (ENXIO); its type says more than the errno.
        regular = _is_regular(path)
        kind = "unreadable" if regular else "not_a_file"
        raise ImageError(kind, error.strerror if regular and error.strerror else "not a regular file") from error
    if not data:
        raise ImageError("empty", "the file has no bytes")
    return data


def _read_regular(descriptor: int) -> bytes:
    """Read an open file to its end, if it is a regular one; straight system calls, for there may be millions."""
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("not_a_file", "a folder that cannot be walked")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not_a_file", "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError("too_large", f"{status.st_size:,} bytes; at most {MAX_FILE_BYTES:,}")
    data = os.read(descriptor, status.st_size + 1)
    if len(data) == status.st_size:  # one byte less than asked for: that was the end
        return data
    parts = [data]  # it grows while it is read, or the read was cut short
    received = len(data)
    while part := os.read(descriptor, 2**20):
        parts.append(part)
        received += len(part)
        if received > MAX_FILE_BYTES:
            raise ImageError("too_large", f"more than {MAX_FILE_BYTES:,} bytes")
    return b"".join(parts)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True  # forbidden or looping: the error that was raised says it better


def decode_image(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """Decode one image as the model expects it.

    Args:
        data: the bytes of a JPEG, PNG, BMP, GIF, WebP, TIFF or any other file that Pillow reads.
        image_size: target (height, width) in pixels.
    Returns:
        RGB array, shape (height, width, 3), uint8, 0-255.
    Raises:
        ImageError: it cannot be decoded; `kind` is one of `ERROR_KINDS`.
    """
    height, width = image_size
    try:
        with _open(data) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("too_large", f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} in all")
            orientation = _orientation(image)
            size = (height, width) if orientation in _SIDEWAYS else (width, height)
            if image.format == "JPEG" and image.width >= 4 * size[0] and image.height >= 4 * size[1]:
                # Lets the JPEG decoder itself shrink by 2, 4 or 8, keeping at least twice the target for the filter.
                image.draft(None, (2 * size[0], 2 * size[1]))
            rgb = _to_rgb(image)
            rgb = _resize(rgb, size)
            if orientation in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[orientation])
            return np.asarray(rgb)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", "no image format that can be read") from error
    except MemoryError as error:
        raise ImageError("too_large", "not enough memory to unpack it") from error
    except _DECODER_ERRORS as error:
        raise ImageError(_error_kind(error), _one_line(error)) from error


def resize_pixels(pixels: RGBImage, image_size: tuple[int, int]) -> RGBImage:
    """Bring pixels that never were a file to the model's size, exactly as `decode_image` would.

    Args:
        pixels: RGB array, shape (H, W, 3), uint8.
        image_size: target (height, width) in pixels.
    Returns:
        RGB array, shape (height, width, 3), uint8; `pixels` itself where it has that size already.
    """
    height, width = image_size
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(_resize(Image.fromarray(pixels), (width, height)))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Stretch to (width, height) with the one filter; averages whole blocks first where that is far smaller."""
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _error_kind(error: Exception) -> str:
    """Sort what a decoder said; Pillow tells kinds of damage apart by their text only."""
    text = str(error).lower()
    if isinstance(error, EOFError) or any(sign in text for sign in _TRUNCATED):
        return "truncated"
    return "unsupported" if any(sign in text for sign in _UNSUPPORTED) else "corrupt"


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read an image's header; JPEG, the bulk of all photos, skips Pillow's trial of every format."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    if data.startswith(_POSTSCRIPT):
        # Pillow would hand it to Ghostscript: a stranger's program, run on this machine.
        raise ImageError("unsupported", "PostScript is a program, which is not run; convert it to PNG")
    return Image.open(io.BytesIO(data))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1-8; 1 where there is none or it cannot be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF itself, while it loads the pixels
    if "exif" not in image.info and image.format in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        return 1  # by far the most common; parsing EXIF costs as much as decoding a small image
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODER_ERRORS:
        return 1  # a damaged tag says nothing about the pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB, 8 bits a channel."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if mode.startswith("I;16"):
        high_byte = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if mode == "I" and image.format == "PPM":  # Pillow scales these to 16 bits, whatever their maximum
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ImageError("unsupported", f"32-bit pixels (mode {mode}) have no agreed range; convert it to 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    """Return an exception's text as one short line."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
