"""The one decoder: whatever is in a file becomes RGB of the right size, or one ImageError that says why not."""

from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from cnnpipe.errors import ImageError
from cnnpipe.images.decode import ERROR_KINDS, MAX_PIXELS, RGBImage, decode_image, read_file, resize_pixels

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


@settings(deadline=None, max_examples=100)
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


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """Put a segment after the first two bytes of a JPEG file."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def plain_jpegs() -> dict[str, bytes]:
    """Files that are nothing but a picture, of every kind that cameras and programs write."""
    files: dict[str, bytes] = {}
    for width, height in [(1, 1), (7, 5), (32, 32), (129, 65), (260, 300), (1030, 770)]:
        for mode in ("RGB", "L"):
            image = gradient(width, height).convert(mode)
            for subsampling in ("4:4:4", "4:2:2", "4:2:0") if mode == "RGB" else ("",):
                options: dict[str, object] = {"subsampling": subsampling} if subsampling else {}
                for progressive in (False, True):
                    name = f"{width}x{height} {mode} {subsampling} {'progressive' if progressive else 'baseline'}"
                    files[name] = encode(image, "JPEG", progressive=progressive, **options)
    image = noise(50, 40)
    files["restart markers"] = encode(image, "JPEG", restart_marker_blocks=1)
    files["optimized"] = encode(image, "JPEG", optimize=True, quality=30)
    files["comment"] = encode(image, "JPEG", comment=b"a comment")
    files["two comments"] = with_segment(files["comment"], 0xFE, b"")
    files["profile"] = encode(image, "JPEG", icc_profile=bytes(1000))
    files["tables of 16 bits"] = encode(image, "JPEG", qtables=[[300] * 64, [400] * 64])
    files["two pictures"] = encode(image, "MPO", save_all=True, append_images=[noise(50, 40, seed=1)])
    files["no JFIF"] = encode(image, "JPEG")[:2] + encode(image, "JPEG")[20:]
    files["junk after the end"] = files["comment"] + b"\xff\xd8junk"
    files["junk before the end"] = files["comment"][:-2] + b"\0\0junk" + files["comment"][-2:]
    return files


def odd_jpegs() -> dict[str, bytes]:
    """Files that Pillow's plugin must see: it turns them, reads their colours otherwise, or refuses them."""
    image = noise(50, 40)
    plain = encode(image, "JPEG")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = Image.Exif()
    upright[ExifTags.Base.Make] = "a camera"
    files = {
        "EXIF, to be turned": encode(image, "JPEG", exif=exif),
        "EXIF, large": encode(gradient(1030, 770), "JPEG", exif=exif),
        "EXIF, upright": encode(image, "JPEG", exif=upright),
        "EXIF after the frame": b"",
        "XMP": with_segment(plain, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
        "Adobe RGB": encode(image, "JPEG", keep_rgb=True),
        "Adobe YCbCr": with_segment(plain, 0xEE, b"Adobe\0\x64\0\0\0\0\x01"),
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "fill bytes": plain[:2] + b"\xff\xff" + plain[2:],
        "junk between segments": plain[:20] + b"junk" + plain[20:],
        "JFIF cut short": b"\xff\xd8\xff\xe0\0\x07JFIF\0" + plain[20:],
        "Photoshop, damaged": with_segment(plain, 0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04"),
        "cut in the header": plain[:100],
        "cut in the pixels": plain[:-300],
        "cut before its end": plain[:-2],
        "without pixels": plain[: plain.index(b"\xff\xda")] + b"\xff\xd9",
        "no height": plain.replace(struct.pack(">HH", 40, 50), struct.pack(">HH", 0, 50), 1),
        "twelve bits": plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c", 1),
        "two components": plain.replace(b"\0\x28\0\x32\x03", b"\0\x28\0\x32\x02", 1),
        "nothing but the start": b"\xff\xd8\xff",
    }
    segment = b"\xff\xe1" + struct.pack(">H", len(exif.tobytes()) + 2) + exif.tobytes()
    scan = plain.index(b"\xff\xda")
    files["EXIF after the frame"] = plain[:scan] + segment + plain[scan:]
    return files


def decode_by_the_rules(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """Decode a JPEG file as the docstring of `cnnpipe.images.decode` says, by Pillow's front door and NumPy."""
    height, width = image_size
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation >= 5:
            width, height = height, width
        if image.width >= 4 * width and image.height >= 4 * height:
            image.draft(None, (2 * width, 2 * height))
        rgb = image.convert("RGB")
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        pixels = np.asarray(rgb)
    return np.rot90(pixels, 3) if orientation == 6 else pixels


PLAIN_JPEGS = plain_jpegs()
ODD_JPEGS = odd_jpegs()


@pytest.mark.parametrize("image_size", [(32, 32), (8, 8), (40, 50), (24, 60)], ids=str)
def test_a_jpeg_is_decoded_by_the_rules_whichever_way_it_takes(image_size: tuple[int, int]) -> None:
    num_equal = 0
    for name, data in (PLAIN_JPEGS | ODD_JPEGS).items():
        try:
            expected = decode_by_the_rules(data, image_size)
        except (OSError, SyntaxError):
            error_of(data)
        else:
            assert np.array_equal(decode_image(data, image_size), expected), name
            num_equal += 1
    assert num_equal > len(PLAIN_JPEGS) + 8


class AskedPluginError(Exception):
    """Pillow's plugin was asked, which no decoder error stands for."""


def test_plain_jpegs_and_no_others_go_straight_to_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes) -> None:
        raise AskedPluginError

    monkeypatch.setattr("cnnpipe.images.decode._open", refuse)
    for data in PLAIN_JPEGS.values():
        assert decode_image(data, (8, 8)).shape == (8, 8, 3)
    for name, data in ODD_JPEGS.items():
        with pytest.raises(AskedPluginError):
            pytest.fail(f"{name}: {decode_image(data, (8, 8)).shape}")


def pixels_or_error(data: bytes) -> bytes | tuple[str, str]:
    try:
        return decode_image(data, (16, 16)).tobytes()
    except ImageError as error:
        return error.kind, str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's, on a damaged EXIF block
@settings(deadline=None, max_examples=200)
@given(
    file=st.sampled_from([data for name, data in (PLAIN_JPEGS | ODD_JPEGS).items() if len(data) < 10_000]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    keep=st.one_of(st.just(1.0), st.floats(0.5, 1)),
)
def test_a_damaged_jpeg_gives_the_same_pixels_or_error_both_ways(
    file: bytes, edits: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(file[: int(len(file) * keep)])
    for position, value in edits:
        data[int(position * (len(data) - 1))] = value
    result = pixels_or_error(bytes(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnpipe.images.decode._decode_plain_jpeg", lambda data, target: None)
        assert pixels_or_error(bytes(data)) == result


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(image_format: str) -> None:
    grey = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    pixels = decode_image(encode(Image.fromarray(grey), image_format), (8, 8))
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[..., np.newaxis], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_does_not_depend_on_the_bands_it_is_worked_off_in(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(40, 37, mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(noise(40, 37, "L", seed=1))
    data = encode(image, "PNG", **({"transparency": 7} if mode == "P" else {}))
    if mode == "RGB":
        data = encode(image, "PNG", transparency=image.getpixel((3, 3)))
    with Image.open(io.BytesIO(data)) as opened:
        rgba = opened.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert np.array_equal(decode_image(data, (37, 40)), np.asarray(expected))
    monkeypatch.setattr("cnnpipe.images.decode._BAND_PIXELS", 100)
    assert np.array_equal(decode_image(data, (37, 40)), np.asarray(expected))


def test_a_tiff_without_the_rows_that_it_claims_is_refused_at_once() -> None:
    data = encode(noise(24, 30), "TIFF")
    height = struct.pack("<HHII", 257, 4, 1, 30)
    assert data.count(height) == 1
    error = error_of(data.replace(height, struct.pack("<HHII", 257, 4, 1, 7_000_000)))
    assert error.kind == "truncated"
    assert str(error) == "has 720 pixels, but says 24x7000000"


def test_the_limit_on_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.images.decode.MAX_PIXELS", 100)
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
@settings(deadline=None, max_examples=150)
@given(signature=st.sampled_from(SIGNATURES), data=st.binary(max_size=300))
def test_random_bytes_only_ever_raise_image_errors(signature: bytes, data: bytes) -> None:
    decode_or_refuse(signature + data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None, max_examples=200)
@given(
    file=st.sampled_from(VALID_FILES),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.02, 1),
)
def test_damaged_images_only_ever_raise_image_errors(file: bytes, edits: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(file[: max(1, int(len(file) * keep))])
    for position, value in edits:
        data[int(position * (len(data) - 1))] = value
    decode_or_refuse(bytes(data))


def test_a_png_file_without_its_palette_is_an_image_error() -> None:
    data = encode(noise(24, 30, "P"), "PNG")
    without_palette = data[:33] + data[data.index(b"IDAT") - 4 :]  # Pillow asserts that there is one
    assert error_of(without_palette).kind == "corrupt"


@pytest.mark.parametrize("image_size", [(8, 8), (32, 32), (17, 50)])
def test_pixels_are_resized_as_if_they_had_been_a_file(image_size: tuple[int, int]) -> None:
    image = noise(32, 32)
    expected = decode_image(encode(image, "PNG"), image_size)
    assert np.array_equal(resize_pixels(np.asarray(image), image_size), expected)


def test_image_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "it ends")))
    assert (error.kind, str(error)) == ("truncated", "it ends")


# --- reading files


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError) as caught:
        read_file(tmp_path / "x.png")
    assert caught.value.kind == "empty"


def test_a_file_over_the_limit_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnpipe.images.decode.MAX_FILE_BYTES", 10)
    (tmp_path / "x").write_bytes(bytes(11))
    with pytest.raises(ImageError, match="at most 10") as caught:
        read_file(tmp_path / "x")
    assert caught.value.kind == "too_large"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_a_file_longer_than_it_says_is_read_to_its_end() -> None:
    assert b"VmRSS" in read_file(Path("/proc/self/status"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_refused_files_leave_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ImageError, match="folder"):
            read_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
