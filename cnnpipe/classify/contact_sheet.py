"""Make the contact sheet of a classification: one HTML file with the counts of a table and a sample of its pictures.

The rows are read once, in any order, and memory does not grow with their number. Which pictures are shown depends on
the rows alone, so the same table gives the same page. The page is the Jinja2 template `contact_sheet.html`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import unicodedata
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, count
from operator import itemgetter
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np
from PIL import Image

from cnnpipe.classify.sort_into import uncertainty_test
from cnnpipe.classify.summary import ClassificationSummary
from cnnpipe.classify.table import Prediction
from cnnpipe.errors import PredictionsError
from cnnpipe.images.decode import ERROR_KINDS, RGBImage, decode_image, upright_size
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import usable_cores
from cnnpipe.paths import escape_path, unescape_path
from cnnpipe.storage import storage_errors, write_text

THUMBNAIL_PIXELS: Final = 96
"""Width and height of the square that a picture fits into."""

_HISTOGRAM_BINS: Final = 20
_MAX_CLASSES: Final = 100
_MOST_CONFIDENT, _LEAST_CONFIDENT, _PICTURES_PER_CLASS = 4, 4, 12
_FAILED_FILES_PER_KIND: Final = 10

_MAX_JPEG_BYTES: Final = 4096

_INVISIBLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids or a reader would not see: control characters, line separators, lone surrogates."""


def check_report(path: Path, overwrite: bool) -> None:
    """Refuse a report that cannot be written, before any work is done.

    Args:
        overwrite: whether an existing file may be replaced.
    Raises:
        PredictionsError: the path is a folder, or exists already.
        StorageError: the file system allows no such name.
    """
    shown = escape_path(str(path))
    with storage_errors(path):  # such as a name that is too long
        if path.is_dir():
            raise PredictionsError(f"the report must be a file, received the folder {shown}; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise PredictionsError(f"{shown} exists; name another report, or replace it with --overwrite")


def write_report(
    rows: Iterator[Prediction],
    root: Path,
    summary: ClassificationSummary,
    path: Path,
    min_probability: float,
    *,
    test_accuracy: float | None = None,
    replace: bool = False,
) -> None:
    """Write one HTML file about a finished classification; it runs no script and loads nothing.

    Args:
        rows: the rows of the finished table.
        root: folder that the paths in the rows are relative to; the pictures are read from it again.
        summary: the summary of the same table.
        path: the .html file.
        min_probability: 0-1; images below it are marked as uncertain.
        test_accuracy: the model's, 0-1, if known.
        replace: whether an existing file may be replaced.
    Raises:
        AlreadyThereError: the file exists and may not be replaced.
        StorageError: it cannot be written.
        CnnpipeError: no decoding process can be started.
    """
    values = _survey(rows, summary, min_probability)
    _load_thumbnails([picture for section in values["classes"] for picture in section.pictures], root)
    page = _render(
        title=PurePath(summary.folder).name or summary.folder,
        summary=summary,
        test_accuracy=test_accuracy,
        min_probability=min_probability,
        error_meanings=ERROR_KINDS,
        **values,
    )
    write_text(path, page, replace=replace)


def thumbnail(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """Decode one image for a person: `decode_image` in the image's own proportions, centred on white.

    Args:
        data: the bytes of an image file.
        image_size: (height, width) to fit it into, pixels.
    Returns:
        RGB array, shape (height, width, 3), uint8.
    Raises:
        ImageError: it cannot be decoded.
    """
    height, width = image_size
    image_width, image_height = upright_size(data)
    scale = min(width / image_width, height / image_height)
    inner_height, inner_width = max(1, round(image_height * scale)), max(1, round(image_width * scale))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    square = np.full((height, width, 3), 255, np.uint8)
    square[top : top + inner_height, left : left + inner_width] = decode_image(data, (inner_height, inner_width))
    return square


@dataclass
class _Picture:
    """One thumbnail."""

    path: str
    probability: float
    sha256: str
    """Digest of the classified file; empty if the table has none."""
    uri: str = ""
    """`data:` URI; empty if there is no picture."""
    problem: str = ""
    """Why there is no picture."""


_Ranked = tuple[float, int, _Picture]  # rank, digest of the path, picture


@dataclass
class _ClassSection:
    """One class: its counts and, from all of its rows, the most confident, the least confident and a random sample."""

    label: str
    num_images: int
    num_uncertain: int = 0
    most_confident: list[_Ranked] = field(default_factory=list)
    least_confident: list[_Ranked] = field(default_factory=list)
    random: list[_Ranked] = field(default_factory=list)

    def add(self, row: Prediction) -> None:
        """Consider a row for a picture."""
        probability = row.probabilities[0]
        content = row.path.encode("utf-8", "surrogatepass")
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        for best, size, rank in (
            (self.most_confident, _MOST_CONFIDENT, -probability),
            (self.least_confident, _LEAST_CONFIDENT, probability),
            (self.random, _PICTURES_PER_CLASS, 0.0),  # the smallest digests
        ):
            if len(best) < size or (rank, digest) < best[-1][:2]:
                insort(best, (rank, digest, _Picture(row.path, probability, row.sha256)), key=itemgetter(0, 1))
                del best[size:]

    @cached_property
    def pictures(self) -> list[_Picture]:
        """`_PICTURES_PER_CLASS` different rows, or all if there are fewer; most confident first."""
        chosen: dict[tuple[str, float], _Ranked] = {}
        for _, digest, picture in (*self.most_confident, *self.least_confident, *self.random):
            if len(chosen) < _PICTURES_PER_CLASS:
                chosen.setdefault((picture.path, picture.probability), (-picture.probability, digest, picture))
        return [picture for *_, picture in sorted(chosen.values(), key=itemgetter(0, 1))]


def _survey(rows: Iterator[Prediction], summary: ClassificationSummary, min_probability: float) -> dict[str, Any]:
    """Return the counts and samples that the page needs from the rows."""
    largest = Counter(summary.classes).most_common(_MAX_CLASSES)
    classes = {label: _ClassSection(label, num_images) for label, num_images in largest}
    histogram = [0] * _HISTOGRAM_BINS  # images by probability, in equal bins from 0 to 1
    failed_files: defaultdict[str, list[Prediction]] = defaultdict(list)  # error kind -> its first files
    is_uncertain, num_uncertain = uncertainty_test(min_probability), 0
    for row in rows:
        if row.status != "ok":
            if len(files := failed_files[row.error_kind]) < _FAILED_FILES_PER_KIND:
                files.append(row)
            continue
        probability = row.probabilities[0]
        uncertain = is_uncertain(probability)
        histogram[min(int(probability * _HISTOGRAM_BINS), _HISTOGRAM_BINS - 1)] += 1
        num_uncertain += uncertain
        if (section := classes.get(row.labels[0])) is not None:
            section.num_uncertain += uncertain
            section.add(row)
    return {
        "classes": list(classes.values()),
        "histogram": histogram,
        "failed_files": failed_files,
        "is_uncertain": is_uncertain,
        "num_uncertain": num_uncertain,
    }


def _load_thumbnails(pictures: Sequence[_Picture], root: Path) -> None:
    """Decode the pictures again, small; in processes of their own, because the files are a stranger's."""
    paths = (str(unescape_path(root, picture.path)) for picture in pictures)
    remaining = iter(pictures)
    with DecoderPool(usable_cores(), thumbnail) as pool:
        for chunk in pool.decode(Path(), paths, (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)):
            images = iter(chunk.images)
            for file, picture in zip(chunk.files, remaining, strict=False):
                if not file.has_image:
                    picture.problem = file.error_kind.replace("_", " ")
                    continue
                pixels = next(images)
                if picture.sha256 in ("", file.sha256):
                    picture.uri = _jpeg_uri(pixels)
                else:
                    picture.problem = "changed since"


def _jpeg_uri(pixels: RGBImage) -> str:
    """Return a picture as the `data:` URI of a JPEG file, at the first quality that keeps it small.

    4,096 bytes keep the whole page below about 7 MB; nearly all pictures are smaller at the first quality.
    """
    content = b""
    for quality in (82, 60, 35, 10):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
        if len(content := buffer.getvalue()) <= _MAX_JPEG_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _render(**values: Any) -> str:
    """Return the page; every text in it is escaped, because names and messages may be a stranger's."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here: decoding processes import this module too

    environment = Environment(
        loader=PackageLoader("cnnpipe.classify", "."),
        autoescape=True,
        finalize=_show_invisible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"compact": compact, "grouped": "{:,}".format, "percent": percent, "shorten": shorten}
    return environment.get_template("contact_sheet.html").render(round_ticks=round_ticks, **values)


def _show_invisible(value: Any) -> Any:
    """Write invisible characters of a text as their escapes, such as `\\n`; leave all other values as they are."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)


def shorten(name: str, max_width: int) -> str:
    """Return a name without its middle if it is wider than `max_width` letters; wide (East Asian) letters count 2."""
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name]
    if sum(widths) <= max_width:
        return name
    head = sum(total <= max_width // 2 for total in accumulate(widths))
    tail = sum(total <= (max_width - 1) // 2 for total in accumulate(reversed(widths)))
    return f"{name[:head]}…{name[len(name) - tail :]}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage that is 0% or 100% only if the fraction is exactly 0 or 1."""
    shown = f"{fraction:.1%}"
    if shown == "100.0%":
        return "100%" if fraction >= 1.0 else ">99.9%"
    return "<0.1%" if shown == "0.0%" and fraction > 0.0 else shown


def round_ticks(largest: int) -> list[int]:
    """Return 0 and up to four round multiples, the last of them at least `largest`."""
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if 4 * step >= largest)
    return list(range(0, step * max(1, -(-largest // step)) + 1, step))


def compact(number: int) -> str:
    """Return a count in few letters: 250, 2.5k, 10M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)
