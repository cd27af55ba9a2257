"""Make the contact sheet of a classification: one HTML file that shows what the table says, pictures included.

The rows are read once, as they come, and memory does not depend on how many there are. Which pictures are shown
follows from the rows alone, so the same table gives the same page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from cnnpipe.classify.contact_sheet_page import HISTOGRAM_BINS, ClassSection, ErrorSection, Page, Picture, render_page
from cnnpipe.classify.sort_into import uncertainty_test
from cnnpipe.classify.summary import ClassificationSummary, FailedFile
from cnnpipe.classify.table import Prediction
from cnnpipe.errors import ImageError, PredictionsError
from cnnpipe.files import display_path, source_path
from cnnpipe.images.decode import RGBImage, decode_image, upright_size
from cnnpipe.images.decoding import DecodedFile
from cnnpipe.images.workers import DecoderPool
from cnnpipe.machine import usable_cores
from cnnpipe.storage import storage_errors, write_text

__all__ = ["THUMBNAIL_PIXELS", "check_report", "thumbnail", "write_report"]

THUMBNAIL_PIXELS: Final = 96
"""Width and height of the square that a picture fits into."""

_MAX_CLASSES: Final = 100
_SUREST, _LEAST_SURE, _PICTURES_PER_CLASS = 4, 4, 12
_FAILED_FILES_PER_KIND: Final = 10

_MAX_JPEG_BYTES: Final = 4096
"""What keeps the whole page below some 7 MB, whatever the pictures are; nearly all are smaller at the first quality."""
_JPEG_QUALITIES: Final = (82, 60, 35, 10)


def check_report(path: Path, overwrite: bool) -> None:
    """Refuse a report that cannot be written, before any work is done.

    Args:
        overwrite: whether a file of that name may be replaced.
    Raises:
        PredictionsError: it does not end in .html, is a folder, or is there already.
        StorageError: there can be no such file.
    """
    shown = display_path(str(path))
    if path.suffix.lower() not in (".html", ".htm"):
        raise PredictionsError(f"the report must end in .html, received {shown}")
    with storage_errors(path):  # such as a name that is too long
        if path.is_dir():
            raise PredictionsError(f"the report must be a file, received the folder {shown}; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise PredictionsError(f"{shown} is there already; name another report, or allow it with --overwrite")


def write_report(
    rows: Iterator[Prediction],
    root: Path,
    summary: ClassificationSummary,
    path: Path,
    min_probability: float,
    *,
    test_accuracy: float | None = None,
    replace: bool = False,
    workers: int | None = None,
) -> None:
    """Write one self-contained HTML file about a finished classification; it runs no script and loads nothing.

    Args:
        rows: of the finished table, with `path` as it is there.
        root: the folder that the paths are relative to; the pictures are read from it again.
        summary: of the same table.
        path: the .html file.
        min_probability: 0-1; images below it are shown as uncertain.
        test_accuracy: of the model, 0-1, if known.
        replace: whether a file of that name gives way.
        workers: decoding processes; default: one a core.
    Raises:
        AlreadyThereError: the file is there, and may not be replaced.
        StorageError: it cannot be written.
        CnnpipeError: no decoding process can be started.
    """
    survey = _Survey(summary, min_probability)
    for row in rows:
        survey.add(row)
    chosen = {label: sample.choose() for label, sample in survey.samples.items()}
    everything = [candidate for candidates in chosen.values() for candidate in candidates]
    pictures = iter(_make_pictures(root, everything, survey.is_uncertain, workers))
    sections = tuple(
        ClassSection(label, summary.classes[label], survey.uncertain[label], tuple(islice(pictures, len(candidates))))
        for label, candidates in chosen.items()
    )
    errors = tuple(ErrorSection(kind, count, tuple(survey.failed[kind])) for kind, count in summary.error_kinds.items())
    page = Page(
        summary, test_accuracy, min_probability, tuple(survey.histogram), survey.num_uncertain, sections, errors
    )
    write_text(path, render_page(page), replace=replace)


def thumbnail(data: bytes, image_size: tuple[int, int]) -> RGBImage:
    """Decode one image as a person looks at it: in its own proportions, centred on white.

    All else is as the model sees it: `decode_image` makes the pixels.

    Args:
        data: the bytes of an image file.
        image_size: (height, width) to fit it into, pixels.
    Returns:
        RGB array, shape (height, width, 3), uint8.
    Raises:
        ImageError: it cannot be decoded.
    """
    height, width = image_size
    try:
        image_width, image_height = upright_size(data)
    except ImageError:
        image_width = image_height = 1  # `decode_image` says what is wrong with it, if anything is
    scale = min(width / image_width, height / image_height)
    inner_height, inner_width = max(1, round(image_height * scale)), max(1, round(image_width * scale))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    square = np.full((height, width, 3), 255, np.uint8)
    square[top : top + inner_height, left : left + inner_width] = decode_image(data, (inner_height, inner_width))
    return square


@dataclass(frozen=True, order=True, slots=True)
class _Candidate:
    """A row that may be shown; the order is that of `rank`, then a fixed one that has nothing to do with the rows'."""

    rank: float
    digest: int
    path: str
    probability: float
    sha256: str


@dataclass
class _Sample:
    """Of one class, the surest rows, the least sure, and some taken evenly, however many pass and in whatever order."""

    surest: list[_Candidate] = field(default_factory=list)
    least_sure: list[_Candidate] = field(default_factory=list)
    even: list[_Candidate] = field(default_factory=list)

    def add(self, row: Prediction) -> None:
        """Consider a row."""
        probability = row.probabilities[0]
        content = row.path.encode("utf-8", "surrogatepass")
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        for kept, size, rank in (
            (self.surest, _SUREST, -probability),
            (self.least_sure, _LEAST_SURE, probability),
            (self.even, _PICTURES_PER_CLASS, 0.0),  # the smallest digests: as good as drawn by lot
        ):
            if len(kept) < size or (rank, digest) < (kept[-1].rank, kept[-1].digest):
                insort(kept, _Candidate(rank, digest, row.path, probability, row.sha256))
                del kept[size:]

    def choose(self) -> list[_Candidate]:
        """Return `_PICTURES_PER_CLASS` rows, or all if there are fewer, the surest first."""
        chosen: dict[tuple[str, float], _Candidate] = {}
        for each in (*self.surest, *self.least_sure, *self.even):
            if len(chosen) < _PICTURES_PER_CLASS:
                chosen.setdefault((each.path, each.probability), each)
        return sorted(chosen.values(), key=lambda each: (-each.probability, each.digest, each.path))


class _Survey:
    """What a page needs of the rows, collected while they pass."""

    def __init__(self, summary: ClassificationSummary, min_probability: float) -> None:
        largest = Counter(summary.classes).most_common(_MAX_CLASSES)
        self.samples = {label: _Sample() for label, _ in largest}
        self.histogram = [0] * HISTOGRAM_BINS
        self.uncertain: Counter[str] = Counter()
        """By label, of those that are shown."""
        self.num_uncertain = 0
        self.failed: defaultdict[str, list[FailedFile]] = defaultdict(list)
        """The first of each kind."""
        self.is_uncertain = uncertainty_test(min_probability)

    def add(self, row: Prediction) -> None:
        """Take note of one row."""
        if row.status != "ok":
            failed = self.failed[row.error_kind]
            if len(failed) < _FAILED_FILES_PER_KIND:
                failed.append(FailedFile(row.path, row.error_kind, row.error))
            return
        label, probability = row.labels[0], row.probabilities[0]
        self.histogram[min(int(probability * HISTOGRAM_BINS), HISTOGRAM_BINS - 1)] += 1
        sample = self.samples.get(label)
        if self.is_uncertain(probability):
            self.num_uncertain += 1
            if sample is not None:
                self.uncertain[label] += 1
        if sample is not None:
            sample.add(row)


def _make_pictures(
    root: Path, chosen: Sequence[_Candidate], is_uncertain: Callable[[float], bool], workers: int | None
) -> list[Picture]:
    """Decode the chosen files again, small, in processes of their own: they are still a stranger's."""
    sources: dict[_Candidate, tuple[str, str]] = {}  # the picture, or why there is none
    there = {each: path for each in chosen if os.path.lexists(path := str(source_path(root, each.path)))}
    found = iter(there)
    with DecoderPool(workers or usable_cores(), thumbnail) as pool:
        for chunk in pool.decode(Path(), iter(there.values()), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)):
            images = iter(chunk.images)
            for file, row in zip(chunk.files, found, strict=False):
                uri = "" if file.error_kind else _encode(next(images))
                problem = _problem(file, row)
                sources[row] = ("" if problem else uri, problem)
    gone = ("", "not found")
    return [
        Picture(row.path, row.probability, is_uncertain(row.probability), *sources.get(row, gone)) for row in chosen
    ]


def _problem(file: DecodedFile, row: _Candidate) -> str:
    """Return why a file has no picture now, though it had a label; empty if it has one."""
    if file.error_kind:
        return file.error_kind.replace("_", " ")
    return "changed since" if row.sha256 not in ("", file.sha256) else ""


def _encode(pixels: RGBImage) -> str:
    """Return a picture as a `data:` URI of a JPEG file of at most `_MAX_JPEG_BYTES`, if the lowest quality gives it."""
    content = b""
    for quality in _JPEG_QUALITIES:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
        content = buffer.getvalue()
        if len(content) <= _MAX_JPEG_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
