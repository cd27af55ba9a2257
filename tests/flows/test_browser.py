"""The Prefect UI in headless Chromium: a finished run and its report, as the inspector sees them.

Needs Debian's packages chromium and chromium-driver; `make test-browser`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from servers import assert_quiet, clean_environment, free_port

from cnnpipe.nightly import server_log

pytestmark = pytest.mark.browser

WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The result of a retraining by the command a user types, its server still up."""
    artifacts = tmp_path_factory.mktemp("browser") / "artifacts"

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments, "--artifacts", str(artifacts)]
        return subprocess.run(command, env=clean_environment(), stdout=subprocess.PIPE, text=True, check=True).stdout

    call("flows.server", "start", "--port", str(free_port()))
    try:
        output = call("flows.retrain", "digits", "--epochs", "2", "--data", str(artifacts.parent / "data"), "--json")
        yield json.loads(output.splitlines()[-1])
    finally:
        call("flows.server", "stop")
    assert_quiet(server_log(artifacts / ".prefect"))


def wait_for_text(browser: Chrome, *texts: str) -> None:
    def shows(chrome: Chrome) -> bool:
        page = chrome.find_element(By.TAG_NAME, "body").text
        return all(text in page for text in texts)

    WebDriverWait(browser, WAIT_SECONDS).until(shows, f"the page does not show {texts}")


def artifacts_of(run: dict[str, Any]) -> dict[str, str]:
    """Return the ids of the run's artifacts by their key, from the server's API."""
    server, _, flow_run = run["ui"].rpartition("/runs/flow-run/")
    query = json.dumps({"artifacts": {"flow_run_id": {"any_": [flow_run]}}}).encode()
    request = Request(f"{server}/api/artifacts/filter", query, {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return {each["key"]: f"{server}/artifacts/artifact/{each['id']}" for each in json.load(response)}


def pictures(browser: Chrome) -> list[tuple[str, int]]:
    """Return the description and the decoded width of each picture on the page; width 0 is a broken one."""
    found = browser.execute_script(
        "return [...document.images].filter(i => i.src.startsWith('data:')).map(i => [i.alt, i.naturalWidth])"
    )
    return [(alt, width) for alt, width in found]


def test_a_finished_run_shows_its_state_its_tasks_and_the_librarys_log(run: dict[str, Any], browser: Chrome) -> None:
    browser.get(run["ui"])

    wait_for_text(browser, "Promoted", "8 Task runs", "epoch 2/2", "319,178")


def test_the_report_shows_its_pictures(run: dict[str, Any], browser: Chrome) -> None:
    browser.get(artifacts_of(run)["training-report"])

    wait_for_text(browser, "of the test images are right")
    names = ["Accuracy by epoch", "Loss by epoch", "Sample predictions", "Mistakes"]

    def shows_all(chrome: Chrome) -> bool:
        widths = [width for _, width in pictures(chrome)]
        return len(widths) >= len(names) and all(width > 0 for width in widths)

    WebDriverWait(browser, WAIT_SECONDS).until(shows_all, "the page does not show the pictures of the report")
    assert [alt for alt, _ in pictures(browser)] == names
    assert all(width >= 400 for _, width in pictures(browser))


def test_the_decision_says_why(run: dict[str, Any], browser: Chrome) -> None:
    browser.get(artifacts_of(run)["promotion-decision"])

    wait_for_text(browser, "Promoted", "reaches the floor of 0.5000", f"{run['accuracy']:.4f}")
