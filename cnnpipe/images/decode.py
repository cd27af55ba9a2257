"""Read image files and decode them: the only decoder, used for training and for classifying alike.

One decoder for both is what keeps a model's accuracy: the pixels it is applied to are made exactly like the pixels
it was trained on. The rules, in order: the first frame; transparency over white; any colour mode to 8-bit RGB;
stretched (not cropped) to the model's size with an antialiasing bilinear filter; turned upright by its EXIF tag.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from cnnpipe.errors import ImageError, one_line

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

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
    "crashed": "the decoder ended its worker process",
    "timeout": "the decoder took longer than the limit",
}
"""Why a file could not be turned into pixels: kind -> meaning."""

MAX_FILE_BYTES: Final = 2**30
"""Size of the largest file that is read."""

MAX_PIXELS: Final = 178_956_970
"""Pixels of the largest image that is unpacked; twice Pillow's warning threshold, where Pillow refuses too.

Source: https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.MAX_IMAGE_PIXELS
"""

# `_check_pixels` enforces MAX_PIXELS and reports one row; Pillow's own check would also print warnings below it.
Image.MAX_IMAGE_PIXELS = None

# What Pillow's plugins raise on damaged data, found by fuzzing them; anything else is a bug and is not hidden.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, AssertionError,
                   AttributeError, RuntimeError, ArithmeticError, MemoryError, struct.error, zlib.error)  # fmt: skip

_SIGNS: Final = {
    "truncated": ("truncated", "but only got", "unexpected end", "requires a buffer of at least"),
    "too_large": ("out of memory", "too much memory", "data too large"),
    "unsupported": ("unsupported", "not supported", "cannot find loader"),
}
"""Kind of error -> parts of the messages that mean it."""

# Source: EXIF 2.32, tag 0x0112; 1 is upright, values outside 2-8 are ignored.
_UPRIGHT: Final = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip
_SIDEWAYS: Final = frozenset({5, 6, 7, 8})  # orientations that swap width and height

# Source: ITU-T T.81, table B.1. Frames: baseline, extended sequential and progressive, Huffman coded.
_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2})
_SCAN: Final = 0xDA
# Segments that Pillow's plugin skips: tables, comments, JFIF and colour profiles. Not those that may turn the image
# (APP1, EXIF), name its colours (APP14, Adobe) or be refused (APP13, Photoshop).
_PLAIN_SEGMENTS: Final = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xE2})
_MIN_APP_BYTES: Final = 16  # JFIF's segment and the head of a profile; the plugin refuses shorter ones
_frame_header = struct.Struct(">HBHHB").unpack_from  # length, bits a sample, height, width, components

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PICTURE: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
# All other chunks are metadata or later frames. Source: https://www.w3.org/TR/png-3/#11Chunks

# Pixels of a band in which a transparent image is laid over white, which saves four copies of the whole.
_BAND_PIXELS: Final = 2**20


def read_file(path: Path | str) -> bytes:
    """Read a regular file; refuse pipes, devices and whatever else could block or never end.

    Raises:
        ImageError: its kind is `not_found`, `not_a_file`, `unreadable`, `empty` or `too_large`.
    """
    try:
        # Non-blocking, so that a pipe that takes the file's place between listing and reading cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            data = _read_regular(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise ImageError("not_found", "no such file, or a broken link") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket
            raise ImageError("not_a_file", "not a regular file") from error
        raise ImageError("unreadable", error.strerror or str(error)) from error
    except ValueError as error:  # from a list of files
        raise ImageError("not_found", "a path with a NUL byte cannot be the name of a file") from error
    if not data:
        raise ImageError("empty", "the file has no bytes")
    return data


def _read_regular(descriptor: int) -> bytes:
    """Read an open regular file to its end; by plain system calls, because there may be millions of files."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        is_folder = stat.S_ISDIR(status.st_mode)
        raise ImageError("not_a_file", "a folder that cannot be walked" if is_folder else "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError("too_large", f"{status.st_size:,} bytes; at most {MAX_FILE_BYTES:,}")
    data = os.read(descriptor, status.st_size + 1)
    if len(data) == status.st_size:  # one byte less than asked for, so this is the end
        return data
    parts = [data]  # the file grows while it is read, or the read was cut short
    while len(parts[-1]) and sum(map(len, parts)) <= MAX_FILE_BYTES:
        parts.append(os.read(descriptor, 2**20))
    if parts[-1]:
        raise ImageError("too_large", f"more than {MAX_FILE_BYTES:,} bytes")
    return b"".join(parts)


def decode_image(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """Decode one image as the model expects it.

    Args:
        data: the bytes of a JPEG, PNG, BMP, GIF, WebP, TIFF or any other file that Pillow reads.
        image_size: target (height, width) in pixels.
    Returns:
        RGB array, shape (height, width, 3), uint8, 0-255; not to be written to.
    Raises:
        ImageError: they cannot be decoded; its kind is one of `ERROR_KINDS`.
    """
    height, width = image_size
    try:
        rgb = _decode_plain_jpeg(data, (width, height)) or _despite_metadata(_decode_any, data, (width, height))
        # Half the time of np.asarray(rgb), which asks the image for its array interface first.
        return np.frombuffer(rgb.tobytes(), np.uint8).reshape(height, width, 3)
    except _DECODER_ERRORS as error:
        raise _image_error(error) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) of an image as `decode_image` turns it, pixels.

    Raises:
        ImageError: its header cannot be read.
    """
    try:
        with _despite_metadata(_open, data) as image:
            return image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size
    except _DECODER_ERRORS as error:
        raise _image_error(error) from error


def highest_value(data: bytes) -> tuple[int, int]:
    """Return the highest value in an image file, and the highest that its number of bits allows.

    For 16-bit colours, and 16-bit grey with transparency, Pillow gives the high bytes alone; the first value is then
    an upper bound.

    Raises:
        ImageError: it cannot be decoded.
    """
    try:
        with _open(data) as image:
            high_bytes = ";16" in str(image.tile) and not image.mode.startswith("I")
            values = np.asarray(image if image.mode.startswith("I") else _to_rgb(image))
    except _DECODER_ERRORS as error:
        raise _image_error(error) from error
    highest = int(values.max()) << 8 | 255 if high_bytes else int(values.max())
    return highest, 65_535 if high_bytes or image.mode.startswith("I") else 255


def resize_pixels(pixels: RGBImage, image_size: tuple[int, int]) -> RGBImage:
    """Resize pixels that do not come from a file, exactly as `decode_image` would.

    Args:
        pixels: RGB array, shape (H, W, 3), uint8.
        image_size: target (height, width) in pixels.
    Returns:
        RGB array, shape (height, width, 3), uint8; `pixels` itself if it has that size already.
    """
    same = pixels.shape[:2] == image_size
    return pixels if same else np.asarray(_resize(Image.fromarray(pixels), image_size[::-1]))


def _despite_metadata(read: Callable[[bytes, *_Arguments], _Result], data: bytes, *arguments: *_Arguments) -> _Result:
    """Call `read` with a file; if that fails on a PNG file, call it again without the file's metadata.

    Pillow refuses the whole file for a damaged text, profile or date, and for text beyond its limit on memory.
    """
    try:
        return read(data, *arguments)
    except _DECODER_ERRORS:
        picture = _png_picture(data) if data.startswith(_PNG_SIGNATURE) else b""
        if b"IDAT" not in picture:
            raise
    return read(picture, *arguments)


def _png_picture(data: bytes) -> bytes:
    """Return a PNG file reduced to the chunks of its picture, and to EXIF, which may turn it, if that is undamaged."""
    chunks, at = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while (start := at + 8) <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        checksum = data[start + length : start + length + 4]
        whole_exif = kind == b"eXIf" and zlib.crc32(data[at + 4 : start + length]).to_bytes(4) == checksum
        if kind in _PNG_PICTURE or whole_exif:
            chunks.append(data[at : start + length + 4])
        at = start + length + 4
    return b"".join(chunks)


def _decode_any(data: bytes, target: tuple[int, int]) -> Image.Image:
    """Decode whatever Pillow reads to RGB of size `target` (width, height)."""
    with _open(data) as image:
        _check_pixels(*image.size)
        _check_strips(image)
        orientation = _orientation(image)
        size = target[::-1] if orientation in _SIDEWAYS else target
        if image.format == "JPEG" and _jpeg_scale(image.size, size) > 1:
            image.draft(None, (2 * size[0], 2 * size[1]))
        rgb = _resize(_to_rgb(image), size)
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _decode_plain_jpeg(data: bytes, target: tuple[int, int]) -> Image.Image | None:
    """Decode a JPEG file without EXIF or anything unusual to RGB of size `target` (width, height).

    Pillow's plugin spends more time on reading the markers in Python than its decoder on the pixels of a small image.
    Here the file goes to the decoder directly, which gives the same pixels in under half the time.

    Returns:
        The image; None for a file that is unusual or damaged, which is left to `_decode_any`.
    """
    if not (header := _plain_jpeg_header(data)):
        return None
    mode, size = header
    _check_pixels(*size)
    scale = _jpeg_scale(size, target)
    shrunk = (-(-size[0] // scale), -(-size[1] // scale))
    try:
        image = Image.frombytes(mode, shrunk, data, "jpeg", mode, "", scale, 0)
    except ValueError:
        return None
    return _resize(image if mode == "RGB" else image.convert("RGB"), target)


def _plain_jpeg_header(data: bytes) -> tuple[str, tuple[int, int]] | None:
    """Return the mode and the (width, height) of a JPEG file without EXIF or anything unusual, else None."""
    header: tuple[str, tuple[int, int]] | None = None
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    at, end = 2, len(data) - 10  # a frame's header can be read anywhere before
    while at < end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == _SCAN:
            return header
        if marker in _FRAMES and header is None:
            length, bits, height, width, components = _frame_header(data, at + 2)
            if bits != 8 or components not in (1, 3) or length != 8 + 3 * components or not (width and height):
                return None
            header = ("L" if components == 1 else "RGB", (width, height))
        elif marker not in _PLAIN_SEGMENTS or length < (_MIN_APP_BYTES if marker & 0xF0 == 0xE0 else 2):
            return None
        at += 2 + length
    return None


def _jpeg_scale(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Return the factor by which the JPEG decoder shrinks, 1, 2, 4 or 8: to twice the target or more."""
    factor = min(size[0] // (2 * target[0]), size[1] // (2 * target[1]))
    return 8 if factor >= 8 else 4 if factor >= 4 else 2 if factor >= 2 else 1


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError("too_large", f"{width}x{height} pixels; at most {MAX_PIXELS:,} in all")


def _check_strips(image: ImageFile.ImageFile) -> None:
    """Refuse a TIFF file with too few strips or tiles for its size: Pillow would leave the rest black.

    One wrong byte can claim millions of rows, which would take seconds and a gigabyte.
    """
    if image.format != "TIFF":
        return
    boxes = [tile.extents for tile in image.tile if tile.extents]
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)
    if covered < image.width * image.height:
        raise ImageError("truncated", f"has {covered:,} pixels, but says {image.width}x{image.height}")


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Stretch to (width, height); average whole blocks first if that is far smaller."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _image_error(error: Exception) -> ImageError:
    """Return a decoder's error with its kind; Pillow tells kinds of damage apart by their text only."""
    if isinstance(error, UnidentifiedImageError):
        return ImageError("not_an_image", "not an image format that can be read")
    if isinstance(error, MemoryError):
        return ImageError("too_large", "not enough memory to unpack it")
    text = str(error).lower()
    kinds = [kind for kind, signs in _SIGNS.items() if any(sign in text for sign in signs)]
    kind = "truncated" if isinstance(error, EOFError) else next(iter(kinds), "corrupt")
    return ImageError(kind, one_line(error) or type(error).__name__)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read an image's header; JPEG, the bulk of all photos, skips Pillow's trial of every format."""
    if data[4:8] == b"ftyp":
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one for each core, in each of as many worker processes
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):  # the second opens an EPS file with a preview
        # Pillow would hand it to Ghostscript, which would run a stranger's program on this machine.
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
    # Pillow scales PPM to 16 bits, whatever its maximum.
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        high_byte = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ImageError("unsupported", f"32-bit pixels (mode {mode}) have no agreed range; convert it to 8 bits")
    if image.has_transparency_data:
        return _lay_over_white(image)
    return image.convert("RGB")


def _lay_over_white(image: Image.Image) -> Image.Image:
    width, height = image.size
    image.load()
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        band = image.crop(box).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), box)
    return rgb
