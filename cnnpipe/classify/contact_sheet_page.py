"""Write the contact sheet as HTML; `contact_sheet.py` finds what is on it, `contact_sheet.html` is the empty page.

Every text may be a stranger's: it is escaped, and stands in an element of its own so that its direction changes
nothing around it. The page forbids scripts and any loading to itself, too.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import count
from pathlib import PurePath
from string import Template
from typing import Final

from cnnpipe.classify.summary import ClassificationSummary, FailedFile
from cnnpipe.images.decode import ERROR_KINDS

__all__ = ["HISTOGRAM_BINS", "ClassSection", "ErrorSection", "Page", "Picture", "render_page"]

HISTOGRAM_BINS: Final = 20
"""Equal bins of the probability, 0-1."""

_TEMPLATE: Final = "contact_sheet.html"
_CLASSES_OF_ONE_COLUMN: Final = 5
_MAX_HEADING_WIDTH, _MAX_LABEL_WIDTH, _MAX_CAPTION_WIDTH = 80, 40, 30  # letters; a Chinese one counts twice

# What HTML does not allow or would swallow: control characters, line separators, half characters.
_INVISIBLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")

# Of the histogram, in units of its own: 460 x 242 with this area for the bars.
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 436, 30, 196


@dataclass(frozen=True)
class Picture:
    """One thumbnail."""

    path: str
    probability: float
    uncertain: bool
    source: str
    """`data:` URI; empty if there is none."""
    problem: str
    """Why there is none."""


@dataclass(frozen=True)
class ClassSection:
    """One class with its pictures, the surest first."""

    label: str
    num_images: int
    num_uncertain: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ErrorSection:
    """One kind of error with the first files that have it."""

    kind: str
    num_files: int
    files: tuple[FailedFile, ...]


@dataclass(frozen=True)
class Page:
    """Everything that the page says."""

    summary: ClassificationSummary
    test_accuracy: float | None
    min_probability: float
    histogram: tuple[int, ...]
    """Images in each of `HISTOGRAM_BINS`."""
    num_uncertain: int
    classes: tuple[ClassSection, ...]
    """The largest first; the rest of `summary.classes` is only counted."""
    errors: tuple[ErrorSection, ...]
    """The most frequent first."""


def render_page(page: Page) -> str:
    """Return the HTML document."""
    template = resources.files("cnnpipe.classify").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    summary = page.summary
    return Template(template).substitute(
        folder=_text(_shorten(PurePath(summary.folder).name or summary.folder, _MAX_HEADING_WIDTH)),
        path=_text(summary.folder),
        finished=_text(summary.finished.replace("T", " ").replace("+00:00", " UTC")),
        tiles=_tiles(page),
        facts=_facts(page),
        histogram=_histogram(page.histogram, page.min_probability),
        histogram_table=_histogram_table(page.histogram),
        class_tables=_class_tables(page),
        sections="\n".join(_class_section(number, section, page) for number, section in enumerate(page.classes))
        or '<p class="note">No file has a label.</p>',
        errors="\n".join(map(_error_section, page.errors)) or '<p class="note">Every file was classified.</p>',
    )


def _text(value: str) -> str:
    """Return text for HTML, also inside quotes; what could not be seen is written as its number."""
    return html.escape(_INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value))


def _shorten(name: str, max_width: int) -> str:
    """Return a name with its middle left out, if it is wider than so many letters; the end has the number."""
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name]
    if sum(widths) <= max_width:
        return name
    head, tail = _num_letters(widths, max_width // 2), _num_letters(widths[::-1], (max_width - 1) // 2)
    return f"{name[:head]}…{name[len(name) - tail :]}"


def _num_letters(widths: Sequence[int], max_width: int) -> int:
    """Return how many letters from the first fit."""
    used = 0
    for number, width in enumerate(widths):
        used += width
        if used > max_width:
            return number
    return len(widths)


def _percent(share: float) -> str:
    """Return a share as text, never 100 % of what is less, nor 0 % of what is more."""
    shown = f"{share:.1%}"
    if shown == "100.0%":
        return "100%" if share >= 1.0 else ">99.9%"
    return "<0.1%" if shown == "0.0%" and share > 0.0 else shown


def _tiles(page: Page) -> str:
    summary = page.summary
    below = f"below {100 * page.min_probability:.4g}%" if page.min_probability else "no least probability set"
    tiles = (
        ("Files found", f"{summary.found:,}", ""),
        ("Classified", f"{summary.ok:,}", _percent(summary.ok / max(summary.found, 1))),
        ("Failed", f"{summary.error:,}", _percent(summary.failure_rate)),
        ("Uncertain", f"{page.num_uncertain:,}", below),
        ("Images a second", f"{summary.images_per_second:,.0f}", f"on {summary.device}"),
    )
    return "\n".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{_text(note)}</small></dd></div>" for name, value, note in tiles
    )


def _facts(page: Page) -> str:
    summary = page.summary
    accuracy = "not known" if page.test_accuracy is None else f"{page.test_accuracy:.2%} of its test images"
    taken_over = {"of an attempt that was broken off": summary.resumed, "of the earlier table": summary.unchanged}
    sorted_files = asdict(summary.sorted_files) if summary.sorted_files else {}
    sorted_files.pop("uncertain", None)  # these are among the others, and have a tile
    facts = (
        ("Model", f"{summary.model.name}/{summary.model.run_id}"),
        ("Model accuracy", accuracy),
        ("Model SHA-256", summary.model.sha256),
        ("Device", f"{summary.device} in {summary.precision}, {summary.provider}"),
        ("Time", f"{summary.seconds.total:,.1f} s with {summary.seconds.start_up:.1f} s of start-up; "
                 f"slowest stage: {summary.slowest_stage}"),
        ("Table", summary.table),
        ("Not made now", ", ".join(f"{count:,} rows {how}" for how, count in taken_over.items() if count)),
        ("Sorted", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted_files.items() if count)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())),
    )  # fmt: skip
    return "\n".join(f"<div><dt>{name}</dt><dd><bdi>{_text(value)}</bdi></dd></div>" for name, value in facts if value)


def _histogram(counts: Sequence[int], min_probability: float) -> str:
    """Return the histogram as SVG; its colours are the page's."""
    ticks = _ticks(max(counts))
    height, width = (_BOTTOM - _TOP) / ticks[-1], (_RIGHT - _LEFT) / len(counts)
    parts = [
        f'<path class="rule" d="M{_LEFT} {y:.1f}H{_RIGHT}"/><text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">'
        f"{_compact(tick)}</text>"
        for tick, y in ((tick, _BOTTOM - tick * height) for tick in ticks)
    ]
    if min_probability:
        x = _LEFT + min_probability * (_RIGHT - _LEFT)
        parts.append(f'<rect class="below" x="{_LEFT}" y="{_TOP}" width="{x - _LEFT:.1f}" height="{_BOTTOM - _TOP}"/>')
    for number, images in enumerate(counts):
        bar = max(images * height, 1.0 if images else 0.0)  # a single image of a million is still there
        name = f"{number / len(counts):.0%} to {(number + 1) / len(counts):.0%}: {images:,}"
        parts.append(f'<rect class="bar" x="{_LEFT + number * width + 1:.1f}" y="{_BOTTOM - bar:.1f}" '
                     f'width="{width - 2:.1f}" height="{bar:.1f}"><title>{name}</title></rect>')  # fmt: skip
    if min_probability:  # over the bars
        side = "end" if min_probability > 0.5 else "start"
        parts.append(f'<path class="threshold" d="M{x:.1f} {_TOP - 6}V{_BOTTOM}"/>'
                     f'<text class="threshold {side}" x="{x:.1f}" y="{_TOP - 10}">'
                     f"least: {100 * min_probability:.4g}%</text>")  # fmt: skip
    parts += [f'<text class="middle" x="{_LEFT + share * (_RIGHT - _LEFT):.1f}" y="{_BOTTOM + 16}">{share:.0%}</text>'
              for share in (0.0, 0.25, 0.5, 0.75, 1.0)]  # fmt: skip
    parts.append(f'<text class="middle" x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 36}">'
                 "probability of the likeliest class</text>")  # fmt: skip
    label = f"Histogram of {sum(counts):,} probabilities; the figures are in the table below"
    return f'<svg viewBox="0 0 460 242" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _ticks(largest: int) -> list[int]:
    """Return 0 and up to four round numbers above, the last of them at least `largest`."""
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if 4 * step >= largest)
    return list(range(0, step * max(1, -(-largest // step)) + 1, step))


def _compact(number: int) -> str:
    """Return a count in few letters: 250, 2.5k, 10M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def _histogram_table(counts: Sequence[int]) -> str:
    total = max(sum(counts), 1)
    return "\n".join(
        f'<tr><th scope="row">{number / len(counts):.0%}–{(number + 1) / len(counts):.0%}</th>'
        f"<td>{images:,}</td><td>{_percent(images / total)}</td></tr>"
        for number, images in enumerate(counts)
    )


def _class_tables(page: Page) -> str:
    """Return the bars, in two columns if they are many, and how many classes are left out."""
    half = -(-len(page.classes) // 2) if len(page.classes) > _CLASSES_OF_ONE_COLUMN else len(page.classes)
    numbered = list(enumerate(page.classes))
    tables = [_class_table(part, page) for part in (numbered[:half], numbered[half:]) if part]
    others = len(page.summary.classes) - len(page.classes)
    if not others:
        return f'<div class="columns">{"".join(tables)}</div>'
    rest = page.summary.ok - sum(section.num_images for section in page.classes)
    note = f'<p class="note">And {others:,} more classes with {rest:,} images, which are not shown.</p>'
    return f'<div class="columns">{"".join(tables)}</div>{note}'


def _class_table(sections: Iterable[tuple[int, ClassSection]], page: Page) -> str:
    largest = max(section.num_images for section in page.classes)
    rows = [
        f'<tr><th scope="row"><a href="#class-{number}" title="{_text(section.label)}"><bdi>'
        f"{_text(_shorten(section.label, _MAX_LABEL_WIDTH))}</bdi></a></th>"
        f'<td class="bar"><span style="width:{100 * section.num_images / largest:.2f}%"></span></td>'
        f"<td>{section.num_images:,}</td><td>{_percent(section.num_images / page.summary.ok)}</td></tr>"
        for number, section in sections
    ]
    head = ('<tr><th scope="col">Class</th><th scope="col"><span class="unseen">Bar</span></th>'
            '<th scope="col">Images</th><th scope="col">Share</th></tr>')  # fmt: skip
    return f'<table class="classes"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _class_section(number: int, section: ClassSection, page: Page) -> str:
    size = f"{section.num_images:,} image{'s' * (section.num_images != 1)}"
    uncertain = f", {section.num_uncertain:,} uncertain" if page.min_probability else ""
    figures = "".join(_figure(picture) for picture in section.pictures)
    return (
        f'<section class="class" id="class-{number}"><h3 title="{_text(section.label)}"><bdi>'
        f"{_text(_shorten(section.label, _MAX_HEADING_WIDTH))}</bdi> <small>{size}{uncertain}</small></h3>"
        f'<div class="pictures">{figures}</div></section>'
    )


def _figure(picture: Picture) -> str:
    name = _text(_shorten(picture.path.rpartition("/")[2], _MAX_CAPTION_WIDTH))
    flag = '<span class="flag">uncertain</span>' if picture.uncertain else ""
    if picture.source:
        shown = f'<img src="{picture.source}" alt="{name}" width="96" height="96">'
    else:
        shown = f'<div class="missing">{_text(picture.problem)}</div>'
    return (
        f'<figure title="{_text(picture.path)}">{shown}<figcaption><b>{_percent(picture.probability)}</b>{flag}'
        f"<bdi>{name}</bdi></figcaption></figure>"
    )


def _error_section(section: ErrorSection) -> str:
    rows = [
        f'<tr><th scope="row"><bdi>{_text(file.path)}</bdi></th><td>{_text(file.message)}</td></tr>'
        for file in section.files
    ]
    more = section.num_files - len(section.files)
    note = f'<p class="note">And {more:,} more; the table has them all.</p>' if more > 0 else ""
    size = f"{section.num_files:,} file{'s' * (section.num_files != 1)}"
    meaning = ERROR_KINDS.get(section.kind, "")
    return (
        f'<section class="error"><h3>{_text(section.kind)} <small>{size}</small></h3><p class="note">'
        f'{_text(meaning)}</p><table class="errors"><thead><tr><th scope="col">File</th><th scope="col">Message</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}</section>"
    )
