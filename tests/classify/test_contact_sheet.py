"""The contact sheet: what it counts, which pictures it shows, and that a stranger's text stays text."""

from __future__ import annotations

import base64
import io
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tiny_models import load_digits, write_digits

from cnnpipe.classify.contact_sheet import (
    THUMBNAIL_PIXELS,
    check_report,
    round_ticks,
    shorten,
    thumbnail,
    write_report,
)
from cnnpipe.classify.sort_into import SortedFiles
from cnnpipe.classify.summary import ClassificationSummary, ModelUsed, StageReport
from cnnpipe.classify.table import Prediction
from cnnpipe.errors import AlreadyThereError, ImageError, PredictionsError
from cnnpipe.paths import escape_path

ROOT = Path(__file__).parents[2]
SQUARE = (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)


def ok(path: str, label: str = "cat", probability: float = 0.9) -> Prediction:
    return Prediction(path, "ok", (label,), (probability,), "", "", "", "tiny/1")


def failed(path: str, kind: str = "truncated", message: str = "ends too early") -> Prediction:
    return Prediction(path, "error", (), (), kind, message, "", "tiny/1")


def summarize(rows: Sequence[Prediction], folder: str = "/photos/summer", **changes: Any) -> ClassificationSummary:
    """Return the summary of a classification that gave these rows."""
    good = [row for row in rows if row.status == "ok"]
    bad = [row for row in rows if row.status == "error"]
    summary = ClassificationSummary(
        table="/tables/t.csv",
        folder=folder,
        found=len(rows),
        ok=len(good),
        error=len(bad),
        resumed=0,
        unchanged=0,
        uncertain=0,
        min_probability=0.0,
        passed_over=0,
        failure_rate=len(bad) / max(len(rows), 1),
        max_failure_rate=1.0,
        classes=dict(Counter(row.labels[0] for row in good)),
        error_kinds=dict(Counter(row.error_kind for row in bad).most_common()),
        first_errors=(),
        images_per_second=1234.5,
        images_per_second_with_start_up=1000.0,
        seconds=StageReport(12.5, 0.5, 1.0, 20.0, 3.0, 0.5),
        slowest_stage="decode",
        device="cpu",
        provider="CPUExecutionProvider",
        precision="fp32",
        precision_reason="asked for",
        batch_size=32,
        workers=2,
        threads=2,
        top_k=1,
        safe_csv=False,
        sorted_files=None,
        report=None,
        model=ModelUsed("tiny", "20260101T000000Z", "/models/tiny.onnx", "c" * 64),
        versions={"cnnpipe": "0.1.0", "pillow": "12.0"},
        started="2026-01-02T03:04:05+00:00",
        finished="2026-01-02T03:04:17+00:00",
    )
    return replace(summary, **changes)


class PageReader(HTMLParser):
    """Reads a page back: its text, its elements with their attributes, and whether every element is closed."""

    VOID = ("meta", "img", "br", "path", "rect")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.source = page
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report(
    rows: Sequence[Prediction],
    root: Path,
    folder: Path,
    min_probability: float = 0.0,
    summary: ClassificationSummary | None = None,
    **options: Any,
) -> str:
    path = folder / "report.html"
    write_report(iter(rows), root, summary or summarize(rows), path, min_probability, replace=True, **options)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty digits as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, range(40))
    return folder


@pytest.fixture(scope="module")
def rows(digits: Path) -> list[Prediction]:
    """One row for each of them, in two classes, with probabilities from 0.02 to 0.8, and three failed ones."""
    paths = sorted(path.relative_to(digits).as_posix() for path in digits.rglob("*.png"))
    good = [ok(path, "odd" if number % 4 else "even", number / 50 + 0.02) for number, path in enumerate(paths)]
    return [*good, failed("a.jpg"), failed("b.jpg"), failed("c.txt", "not_an_image", "no format")]


@pytest.fixture(scope="module")
def page(rows: list[Prediction], digits: Path, tmp_path_factory: pytest.TempPathFactory) -> PageReader:
    """The page of these rows with a least probability of 0.5, after a run that reused and sorted files."""
    sorted_files = SortedFiles(38, 2, already_there=0, left_out=3, failed=0, uncertain=4, renamed=0)
    summary = summarize(rows, resumed=20, unchanged=0, sorted_files=sorted_files)
    folder = tmp_path_factory.mktemp("page")
    return PageReader(report(rows, digits, folder, 0.5, summary, test_accuracy=0.9765))


def test_the_page_names_folder_date_model_accuracy_device_and_versions(page: PageReader) -> None:
    for text in ("summer", "/photos/summer", "2026-01-02 03:04:17 UTC", "tiny/20260101T000000Z", "97.65% of its test",
                 "cpu in fp32, CPUExecutionProvider", "pillow 12.0", "c" * 64, "/tables/t.csv"):  # fmt: skip
        assert text in page.text, text


def test_the_page_counts_files_and_errors(page: PageReader) -> None:
    for text in ("Files found 43", "Classified 40 93.0%", "Failed 3 7.0%", "Uncertain 24 below 50%",
                 "Images per second 1,234", "odd 30 75.0%", "even 10 25.0%", "30 images, 18 uncertain",
                 "truncated 2 files the image ends before it should", "a.jpg ends too early",
                 "c.txt no format"):  # fmt: skip
        assert text in page.text, text


def test_the_page_says_what_was_reused_and_sorted(page: PageReader, tmp_path: Path) -> None:
    assert "Reused 20 rows of an interrupted run Sorted 38 linked, 2 copied, 3 left out Versions" in page.text
    plain = PageReader(report([failed("x")], tmp_path, tmp_path)).text
    assert "Reused" not in plain
    assert "Sorted" not in plain


def test_every_bin_of_the_histogram_is_counted(digits: Path, tmp_path: Path) -> None:
    rows = [ok("x.png", probability=number / 20) for number in range(21)]

    page = PageReader(report(rows, digits, tmp_path))

    for start in range(0, 95, 5):
        assert f"{start}% to {start + 5}%: 1 " in page.text
    assert "95% to 100%: 2 " in page.text


def test_pictures_are_jpeg_files_inside_the_page_in_the_order_of_probability(
    page: PageReader, rows: list[Prediction]
) -> None:
    images = page.all("img")

    assert len(images) == 12 + 10
    for image in images:
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == SQUARE
        assert image["alt"]
    titles = [figure["title"] for figure in page.all("figure")]
    probability = {row.path: row.probabilities[0] for row in rows if row.status == "ok"}
    odd = [probability[title] for title in titles[:12]]
    assert odd == sorted(odd, reverse=True)
    everything = sorted(row.probabilities[0] for row in rows if row.status == "ok" and row.labels == ("odd",))
    assert odd[:4] == everything[:-5:-1]
    assert odd[-4:] == everything[3::-1]


def test_the_same_rows_give_the_same_page_in_whatever_order_they_come(
    rows: list[Prediction], digits: Path, tmp_path: Path
) -> None:
    summary = summarize(rows)

    first = report(rows, digits, tmp_path, summary=summary)
    mixed = [*rows[39::-1], *rows[40:]]
    assert report(mixed, digits, tmp_path, summary=summary) == first


def test_pictures_in_between_are_drawn_from_all_rows(tmp_path: Path, digits: Path) -> None:
    rows = [ok(f"{number:04}.png", probability=0.5) for number in range(2000)]

    titles = [figure["title"] for figure in PageReader(report(rows, digits, tmp_path)).all("figure")]

    assert len(set(titles)) == 12
    assert len({title[0] for title in titles}) == 2  # of the first thousand and of the second


def test_a_row_that_comes_twice_is_shown_once(digits: Path, tmp_path: Path, rows: list[Prediction]) -> None:
    page = PageReader(report([rows[0]] * 5, digits, tmp_path))

    assert len(page.all("figure")) == 1


def test_a_file_that_is_gone_changed_or_damaged_meanwhile_is_said_and_costs_one_picture(
    digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    (good, *_) = sorted(digits.rglob("*.png"))
    folder.mkdir()
    for name in ("good.png", "changed.png"):
        (folder / name).write_bytes(good.read_bytes())
    (folder / "cut.png").write_bytes(good.read_bytes()[:60])
    rows = [ok("good.png"), ok("gone.png"), ok("cut.png"), replace(ok("changed.png"), sha256="0" * 64)]

    page = PageReader(report(rows, folder, tmp_path))

    assert len(page.all("img")) == 1
    for text in ("not found", "truncated", "changed since"):
        assert text in page.text


def test_a_file_whose_name_is_no_text_has_its_picture(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    folder.mkdir()
    (folder / name).write_bytes(next(digits.rglob("*.png")).read_bytes())

    page = PageReader(report([ok(escape_path(name))], folder, tmp_path))

    assert len(page.all("img")) == 1
    assert r"caf\xe9.png" in page.text


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\nb\x00\x1b[31m", "\u202egpj.exe", "قطة",
           "&amp;", "$folder ${path} $", "{x}", "\ud800")  # fmt: skip


def test_names_stay_text(tmp_path: Path) -> None:
    rows = [row for name in HOSTILE for row in (ok(f"{name}.png", name), failed(name, name, name))]
    summary = summarize(rows, folder=f"/x/{HOSTILE[0]}", versions={name: name for name in HOSTILE})

    page = PageReader(report(rows, tmp_path, tmp_path, summary=summary))

    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not page.all("img")
    assert not [attributes for _, attributes in page.elements if any(key.startswith("on") for key in attributes)]
    for name in HOSTILE:
        shown = re.sub(r"[\n\x00\x1b\ud800]", lambda match: match[0].encode("unicode_escape").decode(), name)
        assert page.text.count(shown) >= 7, name  # class twice, picture, kind, file, message, versions


def test_the_page_loads_nothing_and_says_so_to_the_browser(page: PageReader) -> None:
    assert page.all("meta")[2]["content"].startswith("default-src 'none'; img-src data:")
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert all(link["href"].startswith("#") for link in page.all("a"))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= ids


def test_of_many_classes_the_largest_are_shown_and_the_rest_is_counted(digits: Path, tmp_path: Path) -> None:
    rows = [ok(f"{number}.png", f"class {label}") for label in range(130) for number in range(2 if label < 90 else 1)]

    page = PageReader(report(rows, digits, tmp_path))

    assert "And 30 more classes with 30 images, which are not shown." in page.text
    assert len([each for each in page.all("section") if each.get("class") == "class"]) == 100


def test_ten_files_of_each_kind_of_error_are_shown(digits: Path, tmp_path: Path) -> None:
    rows = [failed(f"{number:02}.jpg", kind) for number in range(25) for kind in ("truncated", "corrupt")]

    page = PageReader(report(rows, digits, tmp_path))

    assert page.text.count("And 15 more; the table lists them all.") == 2
    assert page.text.count("09.jpg") == 2
    assert "10.jpg" not in page.text
    assert "No file has a label." in page.text


def test_the_page_stays_small_whatever_the_pictures_are(tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 96, 96, 3), np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")

    page = PageReader(report([ok(f"{number}.png") for number in range(12)], folder, tmp_path))

    assert len(page.all("img")) == 12
    assert all(len(image["src"]) < 4096 * 4 / 3 + 30 for image in page.all("img"))


def test_a_report_that_is_there_is_replaced_only_if_allowed(tmp_path: Path, digits: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("mine")

    with pytest.raises(AlreadyThereError, match="exists"):
        write_report(iter([failed("x")]), digits, summarize([failed("x")]), path, 0.0)
    assert path.read_text() == "mine"
    write_report(iter([failed("x")]), digits, summarize([failed("x")]), path, 0.0, replace=True)
    assert path.read_text().startswith("<!DOCTYPE html>")


def test_a_report_that_cannot_be_written_is_refused_in_advance(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "there.html").write_text("")
    with pytest.raises(PredictionsError, match=r"must be a file, received the folder"):
        check_report(tmp_path / "folder.html", overwrite=True)
    with pytest.raises(PredictionsError, match=r"exists; name another report"):
        check_report(tmp_path / "there.html", overwrite=False)
    check_report(tmp_path / "there.html", overwrite=True)
    check_report(tmp_path / "new.html", overwrite=False)


def test_rows_are_read_once_and_not_kept(tmp_path: Path, digits: Path) -> None:
    def stream() -> Iterator[Prediction]:
        for number in range(30_000):
            yield ok(f"{number}.png", f"class {number % 200}", number % 1000 / 1000)

    summary = summarize([], found=30_000, ok=30_000, classes={f"class {number}": 150 for number in range(200)})

    write_report(stream(), digits, summary, tmp_path / "r.html", 0.5)

    assert "And 100 more classes with 15,000 images" in (tmp_path / "r.html").read_text()


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return a red picture with a blue top half."""
    pixels = np.full((height, width, 3), (255, 0, 0), np.uint8)
    pixels[: height // 2] = (0, 0, 255)
    return pixels


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(400, 200), (200, 400), (16, 8), (3000, 10), (300, 300)])
def test_a_thumbnail_keeps_the_proportions_on_white(width: int, height: int) -> None:
    square = thumbnail(encoded(picture(width, height)), (96, 96))

    coloured = ~(square == 255).all(axis=2)
    inner_height, inner_width = coloured.any(axis=1).sum(), coloured.any(axis=0).sum()
    assert square.shape == (96, 96, 3)
    assert max(inner_height, inner_width) == 96
    assert inner_width == max(1, round(96 * width / max(width, height)))
    assert inner_height == max(1, round(96 * height / max(width, height)))


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("TIFF", {})])
def test_a_thumbnail_is_upright_by_its_exif_tag(form: str, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # turn clockwise to see it upright
    square = thumbnail(encoded(picture(80, 40), form, exif=exif, **options), (96, 96))

    assert (square[:, 10] > 250).all()  # white at the left: it stands
    left, right = square[48, 35].astype(int), square[48, 60].astype(int)
    assert right[2] - right[0] > 200  # the blue top has turned to the right
    assert left[0] - left[2] > 200


def test_a_thumbnail_of_an_animation_is_its_first_frame_and_of_glass_is_white() -> None:
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    buffer = io.BytesIO()
    red.save(buffer, "GIF", save_all=True, append_images=[blue])
    glass = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(glass, "PNG")

    assert tuple(thumbnail(buffer.getvalue(), (96, 96))[48, 48]) == (255, 0, 0)
    assert (thumbnail(glass.getvalue(), (96, 96)) == 255).all()


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_thumbnail_of_no_image_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        thumbnail(data, (96, 96))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_to_a_file_is_an_image_error_or_a_thumbnail() -> None:
    images, _ = load_digits()
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        data = np.frombuffer(encoded(np.stack([images[0]] * 3, axis=2), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            try:
                assert thumbnail(damaged.tobytes(), (96, 96)).shape == (96, 96, 3)
            except ImageError:
                continue


def test_a_long_name_loses_its_middle() -> None:
    assert shorten("short.jpg", 30) == "short.jpg"
    assert shorten("a" * 40 + "0001.jpg", 21) == "a" * 10 + "…" + "aa0001.jpg"
    assert shorten("猫" * 40, 21) == "猫" * 5 + "…" + "猫" * 5


@pytest.mark.parametrize("largest", [0, 1, 3, 4, 5, 9, 17, 99, 101, 12_345, 10_000_000])
def test_the_scale_is_round_and_holds_the_largest(largest: int) -> None:
    ticks = round_ticks(largest)

    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 5
    assert ticks[-1] >= largest
    assert str(ticks[1]).rstrip("0") in ("1", "2", "5")


def test_every_data_file_of_the_package_is_in_its_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    files = {
        file
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert files == {
        file for file in (ROOT / "cnnpipe").rglob("*.*") if file.is_file() and file.suffix not in (".py", ".pyc")
    }
