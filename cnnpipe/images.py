"""Decode images: the only decoder, used for training and for classifying alike.

One decoder for both is what keeps a model's accuracy: the pixels it is applied to are made exactly as the pixels
it was trained on. The rules, in order: the first frame; transparency over white; any colour mode to 8-bit RGB;
stretched (not cropped) to the model's size with an antialiasing bilinear filter; turned upright by its EXIF tag.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from cnnpipe.errors import ImageError

__all__ = [
    "ERROR_KINDS",
    "MAX_PIXELS",
    "RGBImage",
    "decode_image",
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
