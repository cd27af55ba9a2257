"""Shared fixtures: the digits prepared once, one real run of every stage with 3 epochs, a tiny model with images, a
server, a browser.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from servers import assert_quiet
from tiny_models import write_digits, write_model

from cnnpipe.prepare.dataset import PreparedDataset, prepare_dataset
from cnnpipe.settings import PrepareSettings, RetrainSettings, TrainSettings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# As in the Makefile: without them Prefect's servers try to send telemetry, and log that they could not.
os.environ.update({"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"})

SETTINGS = RetrainSettings(prepare=PrepareSettings(), train=TrainSettings(epochs=3, seed=1))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of raw and prepared datasets."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def digits(data: Path) -> PreparedDataset:
    """The built-in dataset, prepared."""
    return prepare_dataset(SETTINGS.prepare, data)


@pytest.fixture(scope="session")
def finished_run(digits: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run, the champion of `digits`; never change it, copy it with `artifacts`."""
    # Imported here: most tests need no TensorFlow.
    from cnnpipe.evaluate.evaluation import evaluate_run
    from cnnpipe.export.onnx import export_run
    from cnnpipe.plot.plots import plot_run
    from cnnpipe.promote.gate import conclude_run
    from cnnpipe.train.stage import train_run

    artifacts = tmp_path_factory.mktemp("finished") / "artifacts"
    run = train_run(SETTINGS, digits.path, artifacts).run
    evaluate_run(run)
    plot_run(run)
    export_run(run)
    conclude_run(run)
    return run


@pytest.fixture
def artifacts(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the artifacts with that one complete run, to change at will."""
    copy = tmp_path / "artifacts"
    shutil.copytree(finished_run.parents[2], copy)
    return copy


@pytest.fixture
def photos(tmp_path: Path, digits: PreparedDataset) -> Path:
    """Twelve test digits as PNG files in class folders, and one text file with an image's suffix."""
    labels, images = digits.labels("test"), digits.images("test")
    folder = tmp_path / "photos"
    for index in range(12):
        file = folder / digits.class_names[labels[index]] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(file)
    (folder / "zz-notes.png").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of 8x8 digits; never change it."""
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 70 digits in class folders and 5 text files; never change it."""
    folder = tmp_path_factory.mktemp("images")
    write_digits(folder, range(70))
    for number in range(5):
        (folder / f"{number}" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Headless Chromium, its console and its network kept in logs."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("no Chromium here; install it (Debian, Ubuntu: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "window-size=1400,1600",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    chrome = Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server with an empty database, once a session, because starting it takes long."""
    from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # The library is used without a flow too once a flow has had its logger send to the server.
    quiet = temporary_settings({PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"})
    log = tmp_path_factory.mktemp("prefect") / "server.log"
    with quiet, ExitStack() as stack:
        with _output_to(log):
            stack.enter_context(prefect_test_harness(server_startup_timeout=120))
        yield
    assert_quiet(log)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send the output of processes that the block starts to a file."""
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with path.open("ab") as file:
        for stream, _ in kept:
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
