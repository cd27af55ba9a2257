"""Files are read, hashed and decoded one after the other; what a worker process sends back is the same."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnpipe.errors import ImageError
from cnnpipe.images.decode import RGBImage, decode_image
from cnnpipe.images.workers import MAX_WORKER_BYTES, DecodedChunk, DecodedFile, DecoderPool, decode_files

SIZE = (6, 8)


def decode_and_tell_the_limit(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """A decoder for a worker process, which imports it from here by its name."""
    import resource

    raise ImageError("unsupported", str(resource.getrlimit(resource.RLIMIT_AS)[0]))


def refuse_to_decode(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    raise AssertionError("was decoded")


def run_out_of_memory(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    raise MemoryError


def write_pictures(folder: Path, number: int) -> list[str]:
    names = [f"{index:02}.png" for index in range(number)]
    for index, name in enumerate(names):
        Image.new("RGB", SIZE[::-1], (index, 2 * index, 255 - index)).save(folder / name)
    return names


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_are_read_hashed_and_decoded_in_their_order(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 5)
    (tmp_path / names[2]).write_bytes(b"no image")
    (tmp_path / names[3]).unlink()
    chunk = decode_files(tmp_path, names, SIZE)
    assert [file.path for file in chunk.files] == names
    assert [file.has_image for file in chunk.files] == [True, True, False, False, True]
    assert [file.error_kind for file in chunk.files] == ["", "", "not_an_image", "not_found", ""]
    assert [file.sha256 for file in chunk.files] == [
        digest(tmp_path / name) if name != names[3] else "" for name in names
    ]
    assert chunk.images[:, 0, 0, 0].tolist() == [0, 1, 4]
    assert chunk.seconds > 0


def test_file_with_its_known_digest_is_not_decoded(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 2)
    known = [digest(tmp_path / name) for name in names]
    chunk = decode_files(tmp_path, names, SIZE, refuse_to_decode, known)
    assert chunk.files == tuple(
        DecodedFile(name, sha256, unchanged=True) for name, sha256 in zip(names, known, strict=True)
    )
    assert not any(file.has_image for file in chunk.files)
    assert chunk.images.shape == (0, *SIZE, 3)


def test_file_with_another_digest_or_none_is_decoded(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 4)
    known = ["", "0" * 64, digest(tmp_path / names[2]), digest(tmp_path / names[2])]
    chunk = decode_files(tmp_path, names, SIZE, known_digests=known)
    assert [file.unchanged for file in chunk.files] == [False, False, True, False]
    assert chunk.images[:, 0, 0, 0].tolist() == [0, 1, 3]


def test_unreadable_file_is_an_error_and_not_unchanged_whatever_was_known(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    chunk = decode_files(tmp_path, ["empty.png", "gone.png"], SIZE, known_digests=["", ""])
    assert [(file.error_kind, file.unchanged) for file in chunk.files] == [("empty", False), ("not_found", False)]


def test_no_file_is_begun_after_the_time(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6)

    def decode_slowly(data: bytes, image_size: tuple[int, int]) -> RGBImage:
        time.sleep(0.05)
        return decode_image(data, image_size)

    chunk = decode_files(tmp_path, names, SIZE, decode_slowly, max_seconds=0.01)
    assert [file.path for file in chunk.files] == names[:1]
    assert len(chunk.images) == 1
    assert len(decode_files(tmp_path, names, SIZE, max_seconds=60.0).files) == 6


def test_file_that_takes_all_memory_is_too_large(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 1)
    (file,) = decode_files(tmp_path, names, SIZE, run_out_of_memory).files
    assert file == DecodedFile(names[0], digest(tmp_path / names[0]), "too_large", file.error)
    assert file.error.startswith("not enough memory")


def test_bug_in_a_decoder_names_the_file(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"the decoder failed on 00\.png: AssertionError\('was decoded'\)"):
        decode_files(tmp_path, names, SIZE, refuse_to_decode)


def test_packed_chunk_is_unpacked_as_it_was(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 4)
    (tmp_path / names[1]).write_bytes(b"")
    chunk = decode_files(tmp_path, names, SIZE, known_digests=["", "", digest(tmp_path / names[2]), ""])
    packed = pickle.loads(pickle.dumps(chunk.pack()))
    again = DecodedChunk.unpack(packed, [*names, "not reached.png"])
    assert again.files == chunk.files
    assert np.array_equal(again.images, chunk.images)
    assert again.seconds == chunk.seconds


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="no such limit there")
def test_worker_limits_its_own_memory_and_not_its_parents(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    names = write_pictures(tmp_path, 1)
    with DecoderPool(1, decode_and_tell_the_limit) as pool:
        (chunk,) = pool.decode(tmp_path, iter(names), SIZE)
    assert chunk.files[0].error == str(MAX_WORKER_BYTES)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_worker_prints_nothing_about_damaged_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "TIFF", compression="tiff_deflate")
    damaged = file.getvalue()[:12] + b"?" + file.getvalue()[13:]
    (tmp_path / "damaged.tif").write_bytes(damaged)
    with pytest.raises(ImageError, match="decoder error"):
        decode_image(damaged, SIZE)
    assert "ZIPDecode" in capfd.readouterr().err  # so libtiff does where it may
    with DecoderPool(1) as pool:
        (chunk,) = pool.decode(tmp_path, iter(["damaged.tif"]), SIZE)
    assert chunk.files[0].error_kind == "corrupt"
    assert capfd.readouterr() == ("", "")
