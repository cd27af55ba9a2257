"""The one decoder: whatever is in a file becomes RGB of the right size, or one ImageError that says why not."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from cnnpipe.errors import ImageError
from cnnpipe.images import ERROR_KINDS, MAX_PIXELS, RGBImage, decode_image, resize_pixels

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("L", "RGB", "RGBA"),
}
FORMATS_AND_MODES = [(image_format, mode) for image_format, modes in MODES.items() for mode in modes]


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def gradient(width: int, height: int) -> Image.Image:
    """A smooth picture, the same in every size: red grows to the right, green downwards."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, np.newaxis], (1, width))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=2).astype(np.uint8))


def error_of(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, (8, 8))
    assert caught.value.kind in ERROR_KINDS
    assert "\n" not in str(caught.value)
    return caught.value


def decode_or_refuse(data: bytes) -> None:
    """Any other exception than ImageError fails the test that calls this."""
    kind, shape = None, None
    try:
        shape = decode_image(data, (8, 8)).shape
    except ImageError as error:
        kind = error.kind
    assert kind in ERROR_KINDS or shape == (8, 8, 3)


def difference(one: RGBImage, other: RGBImage) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(FORMATS_AND_MODES),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    image_size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    seed=st.integers(0, 99),
)
def test_every_format_mode_and_size_becomes_rgb_of_the_model_size(
    kind: tuple[str, str], size: tuple[int, int], image_size: tuple[int, int], seed: int
) -> None:
    image_format, mode = kind
    pixels = decode_image(encode(noise(*size, mode, seed), image_format), image_size)
    assert pixels.shape == (*image_size, 3)
    assert pixels.dtype == np.uint8


def test_an_image_of_the_model_size_keeps_every_pixel() -> None:
    image = noise(32, 24)
    assert np.array_equal(decode_image(encode(image, "PNG"), (24, 32)), np.asarray(image))


def test_all_lossless_formats_decode_to_the_same_pixels() -> None:
    image = noise(50, 40)
    expected = decode_image(encode(image, "PNG"), (20, 20))
    for data in (encode(image, "BMP"), encode(image, "TIFF"), encode(image, "WEBP", lossless=True)):
        assert np.array_equal(decode_image(data, (20, 20)), expected)


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (257, 64)])
def test_a_jpeg_shrunk_by_its_own_decoder_stays_close_to_the_full_one(size: tuple[int, int]) -> None:
    data = encode(gradient(*size), "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BILINEAR)
    assert difference(decode_image(data, (32, 32)), np.asarray(full)) < 2.0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG", {"quality": 95}),
    ],
)
def test_images_are_turned_upright_by_their_exif_tag(
    image_format: str, options: dict[str, object], orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = gradient(60, 40)
    data = encode(image, image_format, exif=exif, **options)
    with Image.open(io.BytesIO(encode(image, "PNG", exif=exif))) as tagged:
        upright = ImageOps.exif_transpose(tagged)
    expected = decode_image(encode(upright, "PNG", exif=Image.Exif()), (24, 20))
    assert difference(decode_image(data, (24, 20)), expected) < (3.0 if image_format == "JPEG" else 1.0)


def test_a_damaged_exif_block_does_not_spoil_the_pixels() -> None:
    image = noise(20, 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    damaged = exif.tobytes()[:12] + b"\xff" * 9
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert decode_image(encode(image, "PNG", exif=damaged), (20, 20)).shape == (20, 20, 3)


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (40, 40), (250, 10, 10))
    pixels = decode_image(encode(red.convert("CMYK"), "JPEG", quality=95), (8, 8))
    assert difference(pixels, np.full((8, 8, 3), (250, 10, 10), np.uint8)) < 4


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(image_format: str) -> None:
    grey = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    pixels = decode_image(encode(Image.fromarray(grey), image_format), (8, 8))
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[..., np.newaxis], 3, axis=2))


def test_float_pixels_are_unsupported_because_their_range_is_unknown() -> None:
    assert error_of(encode(noise(9, 9).convert("F"), "TIFF")).kind == "unsupported"


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA"])
def test_transparency_is_white(mode: str) -> None:
    if mode == "P":
        data = encode(Image.new("P", (10, 10), 0), "PNG", transparency=0)
    else:
        data = encode(Image.new(mode, (10, 10)), "PNG")
    assert (decode_image(data, (8, 8)) == 255).all()


def test_half_transparent_black_is_grey() -> None:
    pixels = decode_image(encode(Image.new("RGBA", (10, 10), (0, 0, 0, 128)), "PNG"), (8, 8))
    assert difference(pixels, np.full((8, 8, 3), 127, np.uint8)) <= 1


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode_image(data, (8, 8)), np.full((8, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_cut_in_the_middle_is_truncated(image_format: str) -> None:
    data = encode(noise(60, 60), image_format)
    assert error_of(data[: len(data) // 2]).kind == "truncated"


@pytest.mark.parametrize(
    "data", [b"Dear Sir or Madam,\n", b"\0" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"P"]
)
def test_what_is_no_image_says_so(data: bytes) -> None:
    assert error_of(data).kind == "not_an_image"


def test_a_flipped_byte_in_a_png_is_corrupt() -> None:
    data = bytearray(encode(noise(30, 30), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert error_of(bytes(data)).kind == "corrupt"


def test_postscript_is_never_run() -> None:
    assert error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n").kind == "unsupported"


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6), 9)) + chunk(b"IEND", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize(
    "data",
    [
        png_header(100_000, 100_000),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 9**9, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["png", "bmp"],
)
def test_a_bomb_is_refused_by_its_header_before_any_memory_is_taken(data: bytes, tmp_path: Path) -> None:
    error = error_of(data)
    assert error.kind == "too_large"
    assert "pixels" in str(error)  # not "not enough memory"
    (tmp_path / "bomb").write_bytes(data)
    code = (
        "import resource, sys; from pathlib import Path; from cnnpipe.errors import ImageError\n"
        "from cnnpipe.files import read_file; from cnnpipe.images import decode_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(read_file(Path(sys.argv[1])), (8, 8))\n"
        "except ImageError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 50e6


def test_the_limit_on_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.images.MAX_PIXELS", 100)
    assert decode_image(encode(noise(10, 10), "PNG"), (8, 8)).shape == (8, 8, 3)
    assert error_of(encode(noise(10, 11), "PNG")).kind == "too_large"
    assert MAX_PIXELS > 100


VALID_FILES = [encode(noise(24, 30, mode), image_format) for image_format, mode in FORMATS_AND_MODES]
SIGNATURES = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\0\0\0\0WEBP",
    b"P6\n",
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None, max_examples=300)
@given(signature=st.sampled_from(SIGNATURES), data=st.binary(max_size=300))
def test_random_bytes_only_ever_raise_image_errors(signature: bytes, data: bytes) -> None:
    decode_or_refuse(signature + data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None, max_examples=400)
@given(
    file=st.sampled_from(VALID_FILES),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.02, 1),
)
def test_damaged_images_only_ever_raise_image_errors(file: bytes, edits: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(file[: max(1, int(len(file) * keep))])
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    decode_or_refuse(bytes(data))


@pytest.mark.parametrize("image_size", [(8, 8), (32, 32), (17, 50)])
def test_pixels_are_resized_as_if_they_had_been_a_file(image_size: tuple[int, int]) -> None:
    image = noise(32, 32)
    expected = decode_image(encode(image, "PNG"), image_size)
    assert np.array_equal(resize_pixels(np.asarray(image), image_size), expected)


def test_image_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "it ends")))
    assert (error.kind, str(error)) == ("truncated", "it ends")
