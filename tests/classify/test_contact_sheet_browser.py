"""The contact sheet in headless Chromium, wide and narrow: every picture shows, nothing overflows, nothing is loaded.

Needs Debian's packages chromium and chromium-driver; `make test-browser`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from test_contact_sheet import summarize

from cnnpipe.classify.contact_sheet import write_report
from cnnpipe.classify.table import Prediction

pytestmark = pytest.mark.browser

LABELS = ("cat", "猫", "قطة برتقالية", "<script>document.title='run'</script>", "two words " * 12, "x" * 150,
          "日本語のとても長いクラス名" * 6)  # fmt: skip
NAMES = ("{}.png", "{} a name of many words that goes on for very long.png", "{}" + "x" * 180 + ".png", "{}猫.png",
         "{}صورة قطة جميلة جدا في الحديقة.png", "{}<b onclick=x>&amp;'.png")  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on 210 pictures in 35 classes and 30 failed files, with names of every length and direction."""
    root = tmp_path_factory.mktemp("photos")
    rows = []
    for number in range(210):
        path = NAMES[number % len(NAMES)].format(number)
        Image.new("RGB", (30 + number, 60), (number, 255 - number, 90)).save(root / path)
        label = f"class {number % 35}" if number % 35 >= len(LABELS) else LABELS[number % 35]
        rows.append(Prediction(path, "ok", (label,), ((number + 1) / 210,), "", "", "", "tiny/1"))
    for number in range(30):
        path = "folder/" * number + NAMES[number % len(NAMES)].format(number)
        rows.append(Prediction(path, "error", (), (), ("truncated", "corrupt")[number % 2], "said why", "", "tiny/1"))
    written = root.with_name("report") / "report.html"
    summary = summarize(
        rows, str(root), table="/tables/" + "long folder/" * 20 + "table.csv", images_per_second=1_234_567.8
    )
    write_report(iter(rows), root, summary, written, 0.35, test_accuracy=0.9)
    return written


@pytest.fixture(params=[(1200, "light"), (700, "dark"), (400, "light")], ids=str)
def page(request: pytest.FixtureRequest, browser: Chrome, report: Path) -> Chrome:
    """The page in a window of some width."""
    width, scheme = request.param
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    log(browser, "performance")  # what came before is not this page's
    browser.get(report.as_uri())
    return browser


def ask(browser: Chrome, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def log(browser: Chrome, kind: str) -> list[dict[str, Any]]:
    """Return what the browser has noted since it was last asked."""
    return list(browser.get_log(kind))  # type: ignore[no-untyped-call]


def test_every_picture_shows_and_has_a_description(page: Chrome) -> None:
    pictures = ask(page, "[...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.height, i.alt])")

    assert len(pictures) == 210
    for complete, natural_width, width, height, alt in pictures:
        assert complete
        assert natural_width == 96
        assert width == height >= 60
        assert alt


def test_nothing_overflows_the_page_or_its_box(page: Chrome) -> None:
    assert ask(page, "document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = "[...document.querySelectorAll('h1,h2,h3,p,dd,dt,td,th,figure,figcaption,.card,.class,.error')]"
    assert ask(page, f"{boxes}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML)") == []
    outside = """[...document.querySelectorAll('svg text')].filter(e => {
        const text = e.getBoundingClientRect(), box = e.ownerSVGElement.getBoundingClientRect()
        return text.left < box.left || text.right > box.right || text.top < box.top || text.bottom > box.bottom
    }).map(e => e.textContent)"""
    assert ask(page, outside) == []


def test_no_request_leaves_the_file_and_no_script_runs(page: Chrome, report: Path) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in log(page, "performance")]
    requests = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    assert report.as_uri() in requests
    assert [url[:80] for url in requests if url != report.as_uri() and not url.startswith("data:image/jpeg")] == []
    assert page.title.endswith("contact sheet")
    assert log(page, "browser") == []  # what the page's own rules refused would be told there


def test_text_is_readable_against_its_background(page: Chrome) -> None:
    contrast = """(() => {
        const rgb = text => text.match(/[\\d.]+/g).map(Number)
        const light = c => rgb(c).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
        const behind = e => {
            for (; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor
                if ((rgb(colour)[3] ?? 1) === 1) return colour
            }
        }
        return [...document.querySelectorAll('h1,h3,p,dt,dd,small,th,td,b,bdi,.flag')].map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x)
            return (a + 0.05) / (b + 0.05)
        })
    })()"""
    assert min(ask(page, contrast)) >= 4.5  # WCAG 2.1, 1.4.3


def test_the_links_lead_to_their_sections(page: Chrome) -> None:
    page.find_element(By.LINK_TEXT, "Errors").click()

    assert ask(page, "document.querySelector(':target').querySelector('h2').textContent") == "Errors"
