"""Make photos for the benchmark from small images: as large as a camera's, and the same bytes every time.

A camera's picture has smooth areas, edges, texture and sensor noise, and their mix decides the size of the file and the
work of its decoder. So four small images are enlarged and added, with noise of several grain sizes. The EXIF block is
like a camera's: maker, exposure, orientation, and a maker note of some kilobytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from cnnpipe.errors import CnnpipeError
from cnnpipe.images.find import find_files
from cnnpipe.storage import write_folder

__all__ = ["make_photo", "make_photos"]

_RECIPE: Final = 1
"""Version of the photos; raise it with every change to them, so that older ones are not used again."""

_QUALITIES: Final = (85, 87, 90)
_LAYERS: Final = ((1.0, 1), (0.35, 4), (0.2, 10), (0.15, 30))
"""Strength and number of repeats side by side: the whole picture, objects, and two textures."""

_NOISE: Final = ((9.0, 6), (7.0, 2), (4.5, 1))
"""Standard deviation in grey levels, and grain size in pixels."""

_PORTRAIT_EVERY: Final = 5
"""One photo in five is upright by its EXIF tag alone, as from a camera."""

_MAKER_NOTE_BYTES: Final = 4096
_PHOTOS_IN_A_FOLDER: Final = 1000


def make_photos(small: Path, cache: Path, num_photos: int, size: tuple[int, int]) -> Path:
    """Make photos from the small images below a folder, or return those made before.

    Args:
        small: a folder of images.
        cache: folder that keeps the photos, in a folder for each source, number and size.
        size: (width, height) in pixels.
    Returns:
        The folder of photos.
    Raises:
        CnnpipeError: there are no small images, or the folder cannot be written.
    """
    names = list(find_files(small))
    if not names:
        raise CnnpipeError(f"no files in {small} to make photos from; name a folder of small images")
    # Spread over the whole list, which is sorted by class; each photo uses the next few of these.
    num_sources = num_photos + len(_LAYERS) - 1
    chosen = [small / names[number * len(names) // num_sources] for number in range(num_sources)]
    digest = hashlib.sha256(repr((_RECIPE, size)).encode())
    for path in chosen:
        digest.update(path.read_bytes())
    folder = cache / f"{size[0]}x{size[1]}-{num_photos}-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with write_folder(folder) as temporary:
        for number in range(num_photos):
            roll = temporary / f"roll{number // _PHOTOS_IN_A_FOLDER:03}"
            roll.mkdir(exist_ok=True)
            make_photo(chosen[number : number + len(_LAYERS)], roll / f"IMG_{number:05}.jpg", size, number)
    return folder


def make_photo(sources: Sequence[Path], path: Path, size: tuple[int, int], number: int) -> None:
    """Write one photo.

    Args:
        sources: four small images, one for each layer.
        size: (width, height) in pixels, as the file has them, before EXIF turns it.
        number: seed of the photo; the same number and sources give the same bytes.
    """
    random = np.random.default_rng(number)
    pixels = _lay_over(sources, size)
    pixels += _noise(size, random)[..., np.newaxis]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(path, "JPEG", quality=_QUALITIES[number % len(_QUALITIES)], exif=_exif(number, random))


def _lay_over(sources: Sequence[Path], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return (height, width, 3): the first image fills the picture, the others add finer and finer detail."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.float32)
    for source, (strength, repeats) in zip(sources, _LAYERS, strict=True):
        with Image.open(source) as opened:
            small = opened.convert("RGB")
        tile = small.resize((-(-width // repeats), -(-height // repeats)), Image.Resampling.BICUBIC)
        detail = strength * np.asarray(tile, np.float32)
        if repeats > 1:
            detail = np.tile(detail - detail.mean(), (repeats, repeats, 1))
        pixels += detail[:height, :width]
    return pixels


def _noise(size: tuple[int, int], random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return (height, width): grain of several sizes."""
    width, height = size
    total = np.zeros((height, width), np.float32)
    for deviation, grain in _NOISE:
        coarse = random.standard_normal((-(-height // grain), -(-width // grain)), np.float32) * np.float32(deviation)
        total += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))
    return total


def _exif(number: int, random: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    taken = f"2024:06:{1 + number // 1440 % 28:02} {number // 60 % 24:02}:{number % 60:02}:00"
    exif[ExifTags.Base.Make] = "Bench"
    exif[ExifTags.Base.Model] = "Bench 1"
    exif[ExifTags.Base.Orientation] = 6 if number % _PORTRAIT_EVERY == 0 else 1
    exif[ExifTags.Base.DateTime] = taken
    exposure = exif.get_ifd(ExifTags.IFD.Exif)
    exposure[ExifTags.Base.ExposureTime] = 1 / 125
    exposure[ExifTags.Base.FNumber] = 2.8
    exposure[ExifTags.Base.ISOSpeedRatings] = 200
    exposure[ExifTags.Base.DateTimeOriginal] = taken
    exposure[ExifTags.Base.MakerNote] = random.bytes(_MAKER_NOTE_BYTES)
    return exif
