"""Whatever lies in a folder is one row of the right kind: nothing hangs, crashes, eats the memory or is lost."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from cnnpipe.images.decode import RGBImage, decode_image, upright_size
from cnnpipe.images.find import find_files
from cnnpipe.images.workers import DecodedFile, Decoder, DecoderPool
from cnnpipe.paths import escape_path

pytestmark = pytest.mark.timeout(120)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, or has names other systems refuse")

SIZE = (24, 30)
"""(height, width) that the files are decoded to, and that most of them have: every pixel counts."""


def decode_or_misbehave(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """The decoder of some tests, which worker processes import from here by its name."""
    if data.startswith(b"SEGFAULT"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"MEMORY"):
        eaten = []
        while True:
            eaten.append(np.empty(2**28, np.uint8))  # never touched, so that this machine keeps its own
    return decode_image(data, image_size)


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in (*chunks, (b"IEND", b"")))


def png_header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


@cache
def zeros(num_bytes: int) -> bytes:
    """Compress zeros, a thousand to one."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(num_bytes >> 20)) + packer.flush()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def webp_claiming(width: int, height: int) -> bytes:
    """A lossless WebP file whose header claims another size."""
    data = bytearray(encode(picture(), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") & ~0xFFFFFFF
    data[at : at + 4] = (bits | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(data)


def tiff_claiming(width: int, height: int, **options: object) -> bytes:
    data = encode(picture(), "TIFF", **options)
    for tag, number, claimed in ((256, SIZE[1], width), (257, SIZE[0], height)):
        for kind in (3, 4):  # 16 or 32 bits
            data = data.replace(struct.pack("<HHII", tag, kind, 1, number), struct.pack("<HHII", tag, 4, 1, claimed))
    return data


def jpeg_claiming(width: int, height: int) -> bytes:
    return encode(picture(), "JPEG").replace(struct.pack(">HH", *SIZE), struct.pack(">HH", height, width), 1)


PIXELS = (b"IDAT", zlib.compress(bytes(9 * 28)))
"""Pixels of a PNG file of 9x9, as a chunk."""

OK = "ok"
IMAGES = {
    # name -> content, and what becomes of it: "ok" or the kind of the error
    "empty.jpg": (b"", "empty"),
    "text.png": (b"Dear Sir or Madam,\n", "not_an_image"),
    "zeros.png": (bytes(5000), "not_an_image"),
    "page.pdf": (encode(picture(), "PDF"), "not_an_image"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not_an_image"),
    "drawing.eps": (encode(picture(), "EPS"), "unsupported"),
    "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "not_an_image"),
    "page.html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
    "archive.zip": (b"PK\x03\x04" + bytes(100), "not_an_image"),
    "cut.jpg": (encode(picture(), "JPEG")[:-200], "truncated"),
    "cut.png": (encode(picture(), "PNG")[:-200], "truncated"),
    "cut.webp": (encode(picture(), "WEBP")[:-200], "corrupt"),
    "cut.gif": (encode(picture(), "GIF")[:-200], "truncated"),
    "cut.tif": (encode(picture(), "TIFF", compression="tiff_lzw")[:-200], "not_an_image"),
    "cut.avif": (encode(picture(), "AVIF")[:-200], "truncated"),
    "cut_to_its_signature.png": (b"\x89PNG\r\n\x1a\n", "not_an_image"),
    "flipped_byte.png": (encode(picture(), "PNG")[:300] + b"?" + encode(picture(), "PNG")[301:], "corrupt"),
    "png_called.jpg": (encode(picture(), "PNG"), OK),
    "jpeg_called.png": (encode(picture(), "JPEG"), OK),
    "no_extension": (encode(picture(), "PNG"), OK),
    "trailing_junk.png": (encode(picture(), "PNG") + b"junk" * 99, OK),
    "cmyk.jpg": (encode(picture(mode="CMYK"), "JPEG"), OK),
    "float.tif": (encode(picture(mode="F"), "TIFF"), "unsupported"),
    "palette.png": (encode(picture(mode="P"), "PNG"), OK),
    "bilevel.tif": (encode(picture(mode="1"), "TIFF", compression="group4"), OK),
    "16_bit.png": (encode(picture(mode="I;16"), "PNG"), OK),
    "transparent.png": (encode(picture(mode="RGBA"), "PNG"), OK),
    "oriented.jpg": (encode(picture(), "JPEG", exif=exif(6)), OK),
    "photo.avif": (encode(picture(), "AVIF"), OK),
    "photo.jp2": (encode(picture(), "JPEG2000"), OK),
    "photo.ico": (encode(picture(), "ICO"), OK),
    # Bombs: a few bytes that unpack to gigabytes, or say so.
    "header.png": (png(png_header(100_000, 100_000), (b"IDAT", zeros(2**24))), "too_large"),
    "header_2.png": (png(png_header(2**31 - 1, 2**31 - 1), (b"IDAT", b"")), "too_large"),
    "header.jpg": (jpeg_claiming(65_000, 65_000), "too_large"),
    "header.gif": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encode(picture(), "GIF")[10:], "too_large"),
    "header.webp": (webp_claiming(16_384, 16_384), "too_large"),
    "header.tif": (tiff_claiming(100_000, 100_000, compression="tiff_deflate"), "too_large"),
    "header.ppm": (b"P6 99999 99999 255\n", "too_large"),
    "header.bmp": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 9**9, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "too_large",
    ),
    "rows.tif": (tiff_claiming(SIZE[1], 5_000_000), "truncated"),
    "just_within.jpg": (jpeg_claiming(13_000, 13_000), OK),  # the JPEG decoder fills up what is missing
    "pixels.png": (png(png_header(9, 9), (b"IDAT", zeros(2**26))), OK),
    "text_chunk.png": (png(png_header(9, 9), (b"zTXt", b"Comment\0\0" + zeros(2**26)), PIXELS), OK),
    "text_chunks.png": (png(png_header(9, 9), *[(b"zTXt", b"Comment\0\0" + zeros(2**20))] * 80, PIXELS), OK),
    "profile_chunk.png": (png(png_header(9, 9), (b"iCCP", b"ICC\0\0" + zeros(2**26)), PIXELS), OK),
    "text_and_pixels.png": (
        png(png_header(60_000, 60_000), (b"zTXt", b"Comment\0\0" + zeros(2**26)), PIXELS),
        "too_large",
    ),
    "text_and_no_picture.png": (png(png_header(9, 9), (b"zTXt", b"Comment\0\0" + zeros(2**26))), "too_large"),
    "text_cut.png": (png(png_header(9, 9), (b"tEXt", b"Comment\0hello"))[:50], "truncated"),
}


def decode_all(
    root: Path,
    paths: Iterable[str] | None = None,
    decoder: Decoder = decode_image,
    look: Callable[[DecoderPool], None] = lambda pool: None,
) -> tuple[dict[str, DecodedFile], dict[str, RGBImage]]:
    """Return what became of each file of a folder, and the pixels of those that have any."""
    paths = list(find_files(root) if paths is None else paths)
    with DecoderPool(2, decoder) as pool:
        chunks = list(pool.decode(root, iter(paths), SIZE))
        look(pool)
    files = [file for chunk in chunks for file in chunk.files]
    assert [file.path for file in files] == paths
    assert all(file.error and "\n" not in file.error for file in files if file.error_kind)
    images = [image for chunk in chunks for image in chunk.images]
    decoded = [file.path for file in files if file.has_image]
    return {file.path: file for file in files}, dict(zip(decoded, images, strict=True))


def memory_of_workers(pool: DecoderPool) -> int:
    """Return the most that a worker of the pool ever had in memory, in bytes."""
    statuses = [Path(f"/proc/{worker._process.pid}/status").read_text() for worker in pool._alive]
    return max(int(text.partition("VmHWM:")[2].split()[0]) * 1024 for text in statuses)


def test_hostile_content_is_one_row_of_its_kind(tmp_path: Path) -> None:
    for name, (content, _) in IMAGES.items():
        (tmp_path / name).write_bytes(content)
    used: list[int] = []

    def look(pool: DecoderPool) -> None:
        if sys.platform == "linux":
            used.append(memory_of_workers(pool))

    rows, _ = decode_all(tmp_path, look=look)
    expected = {name: kind for name, (_, kind) in IMAGES.items()}
    assert {name: row.error_kind or OK for name, row in rows.items()} == expected
    for name, row in rows.items():
        assert row.sha256 == (hashlib.sha256(IMAGES[name][0]).hexdigest() if IMAGES[name][0] else "")
    assert max(used, default=0) < 200e6  # bytes in memory; the bombs would take gigabytes


def with_chunk(kind: bytes, content: bytes, *, damaged: bool = False, at_end: bool = False) -> bytes:
    """A PNG file of `picture()` with one more chunk, after its header or its pixels."""
    data, chunk = encode(picture(), "PNG"), png((kind, content))[8:-12]
    position = -12 if at_end else 33
    return data[:position] + (chunk[:-4] + b"oops" if damaged else chunk) + data[position:]


SIDE_CHUNKS = {
    "text of 2.5 MB": with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_500_000))),
    "text of 2.5 MB after the pixels": with_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_500_000)), at_end=True),
    "international text of 2.5 MB": with_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 2_500_000)),
    "profile of 1.1 MB": with_chunk(b"iCCP", b"ICC\0\0" + zlib.compress(bytes(1_100_000))),
    "profile packed in an unknown way": with_chunk(b"iCCP", b"ICC\0\7"),
    "profile with nothing in it": with_chunk(b"iCCP", b""),
    "text, damaged": with_chunk(b"tEXt", b"Comment\0hello", damaged=True),
    "EXIF, damaged": with_chunk(b"eXIf", exif(6).tobytes()[6:], damaged=True),
    "date, damaged": with_chunk(b"tIME", bytes(7), damaged=True),
    "resolution, too short": with_chunk(b"pHYs", b"\0"),
    "animation, too short": with_chunk(b"acTL", b"\0"),
}


@pytest.mark.parametrize("name", SIDE_CHUNKS)
def test_a_large_or_damaged_side_chunk_costs_a_png_file_its_metadata_not_its_picture(name: str) -> None:
    assert np.array_equal(decode_image(SIDE_CHUNKS[name], SIZE), np.asarray(picture()))
    assert upright_size(SIDE_CHUNKS[name]) == SIZE[::-1]


def test_a_png_file_with_a_damaged_chunk_is_still_turned_upright_and_laid_over_white() -> None:
    image = Image.fromarray(np.dstack([np.asarray(picture()), np.full(SIZE, 128, np.uint8)]), "RGBA").convert("P")
    whole = encode(image, "PNG", exif=exif(6), transparency=bytes(range(256)))
    damaged = whole[:33] + with_chunk(b"tEXt", b"a\0b", damaged=True)[33:48] + whole[33:]
    assert np.array_equal(decode_image(damaged, SIZE), decode_image(whole, SIZE))
    assert upright_size(damaged) == SIZE


FIRST_FRAMES: dict[str, tuple[bytes, Image.Image]] = {
    # name -> content, and the picture that it is to give, exactly
    **{
        f"animated.{image_format}": (
            encode(picture(mode=mode), image_format, save_all=True, append_images=[picture(1), picture(2)], **options),
            picture(mode=mode).convert("RGB"),
        )
        for image_format, mode, options in [
            ("gif", "L", {}),
            ("webp", "RGB", {"lossless": True}),
            ("png", "RGB", {}),
        ]
    },
    "pages.tiff": (
        encode(picture(), "TIFF", save_all=True, append_images=[picture(1), picture(2)], compression="tiff_lzw"),
        picture(),
    ),
    "palette.png": (encode(picture(mode="P"), "PNG"), picture(mode="P").convert("RGB")),
    "16_bit.png": (
        encode(Image.fromarray(np.asarray(picture(mode="L")).astype(np.uint16) * 257), "PNG"),
        picture(mode="L").convert("RGB"),
    ),
    "transparent.png": (encode(Image.new("RGBA", SIZE[::-1]), "PNG"), Image.new("RGB", SIZE[::-1], "white")),
    "oriented.png": (
        encode(picture().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6)),
        picture(),
    ),
    "cmyk.tif": (encode(picture(mode="CMYK"), "TIFF"), picture(mode="CMYK").convert("RGB")),
}


def test_of_several_pictures_in_a_file_the_first_counts_and_upright_in_its_colours(tmp_path: Path) -> None:
    for name, (content, _) in FIRST_FRAMES.items():
        (tmp_path / name).write_bytes(content)
    _, pixels = decode_all(tmp_path)
    for name, (_, expected) in FIRST_FRAMES.items():
        assert np.array_equal(pixels[name], np.asarray(expected)), name


def test_first_picture_of_an_mpo_file_counts(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (60, 48), "red"), Image.new("RGB", (60, 48), "blue")
    (tmp_path / "two.jpg").write_bytes(encode(red, "MPO", save_all=True, append_images=[blue]))
    _, pixels = decode_all(tmp_path)
    assert np.abs(pixels["two.jpg"].astype(int) - (255, 0, 0)).max() <= 3


def test_inverted_cmyk_of_adobe_is_not_a_negative(tmp_path: Path) -> None:
    # Pillow writes CMYK as Adobe does, inverted, and says so in the file.
    red = Image.new("RGB", (40, 40), (250, 10, 10)).convert("CMYK")
    (tmp_path / "adobe.jpg").write_bytes(encode(red, "JPEG", quality=95))
    assert b"Adobe" in (tmp_path / "adobe.jpg").read_bytes()
    _, pixels = decode_all(tmp_path)
    assert np.abs(pixels["adobe.jpg"].astype(int) - (250, 10, 10)).max() <= 6


def test_what_is_not_a_regular_file_is_a_row_and_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    links = {
        "zero.jpg": "/dev/zero",
        "full.jpg": "/dev/full",
        "gone.jpg": "nowhere",
        "myself.jpg": "myself.jpg",
        "one.jpg": "other.jpg",
        "other.jpg": "one.jpg",
        "up": "..",
    }
    for name, target in links.items():
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(target)
    rows, _ = decode_all(tmp_path)
    assert {path: row.error_kind for path, row in rows.items()} == {
        "links/full.jpg": "not_a_file",
        "links/gone.jpg": "not_found",
        "links/myself.jpg": "unreadable",
        "links/one.jpg": "unreadable",
        "links/other.jpg": "unreadable",
        "links/up": "not_a_file",
        "links/zero.jpg": "not_a_file",
        "pipe.jpg": "not_a_file",
        "socket.jpg": "not_a_file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encode(picture(), "PNG"))
    (tmp_path / "secret.png").chmod(0)
    rows, _ = decode_all(tmp_path)
    assert rows["secret.png"].error_kind == "unreadable"
    assert rows["secret.png"].error == "Permission denied"


def test_paths_that_the_system_refuses_are_rows(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(encode(picture(), "PNG"))
    paths = ["file.png/inner.png", "deep/" * 2000 + "x.png", "x" * 300 + ".png", "vanished.png", "file.png"]
    rows, _ = decode_all(tmp_path, paths)
    assert [row.error_kind for row in rows.values()] == ["unreadable", "unreadable", "unreadable", "not_found", ""]
    assert rows[paths[1]].error == "File name too long"


def test_file_that_vanishes_before_it_is_read_is_a_row(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.png").write_bytes(encode(picture(number), "PNG"))
    paths = list(find_files(tmp_path))
    for path in paths[1::2]:
        (tmp_path / path).unlink()
    rows, pixels = decode_all(tmp_path, paths)
    assert [row.error_kind for row in rows.values()] == ["", "not_found"] * 20
    assert list(pixels) == paths[::2]


def test_file_that_grows_while_it_is_read_is_read_once_and_whole(tmp_path: Path) -> None:
    content = encode(picture(), "PNG")
    growing = tmp_path / "growing.png"
    growing.write_bytes(content)
    stop = threading.Event()

    def grow() -> None:
        with growing.open("ab", buffering=0) as file:
            while not stop.wait(0.001):
                file.write(bytes(4096))

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        with DecoderPool(2) as pool:
            chunks = list(pool.decode(tmp_path, iter(["growing.png"] * 100), SIZE))
    finally:
        stop.set()
        writer.join()
    files = [file for chunk in chunks for file in chunk.files]
    assert len(files) == 100
    assert all(file.has_image for file in files)
    assert len({file.sha256 for file in files}) > 1  # it did grow


@needs_linux
def test_every_name_that_the_system_allows_is_decoded(tmp_path: Path) -> None:
    names = [
        *(b"new\nline.png", b"tab\tand\rreturn.png", b"caf\xe9.png", b"\xff\xfe.png", b"'quoted\".png", b"=1+1.png"),
        *(b"-rf.png", b"~.png", b" .png", b"\xe2\x80\xae.png", b"back\\slash.png", b"x" * 251 + b".png"),
    ]
    deep = b"/".join([b"d" * 50] * 60) + b"/deep.png"
    root = os.fsencode(tmp_path)
    (tmp_path / os.fsdecode(deep)).parent.mkdir(parents=True)
    for name in [*names, deep]:
        Path(os.fsdecode(os.path.join(root, name))).write_bytes(encode(picture(), "PNG"))
    rows, pixels = decode_all(tmp_path)
    assert {os.fsencode(path) for path in pixels} == {*names, deep}
    for path in rows:
        escape_path(path).encode()  # what the table shows is UTF-8, whatever the name is


def test_decoder_that_crashes_or_eats_memory_costs_its_row_only(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(encode(picture(number), "PNG"))
    bad = {"03.png": b"SEGFAULT", "22.png": b"SEGFAULT again"}
    if sys.platform != "darwin":  # which has no limit on memory
        bad["29.png"] = b"MEMORY"
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    rows, pixels = decode_all(tmp_path, decoder=decode_or_misbehave)
    errors = {path: (row.error_kind, row.error) for path, row in rows.items() if row.error_kind}
    expected = {
        "03.png": ("crashed", "the decoder crashed, killed by SIGSEGV"),
        "22.png": ("crashed", "the decoder crashed, killed by SIGSEGV"),
        "29.png": ("too_large", "not enough memory to read and decode it"),
    }
    assert errors == {path: expected[path] for path in bad}
    assert {path: rows[path].sha256 for path in bad} == {
        path: hashlib.sha256(content).hexdigest() for path, content in bad.items()
    }
    assert all(np.array_equal(image, np.asarray(picture(int(path[:2])))) for path, image in pixels.items())
