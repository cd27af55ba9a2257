"""What several test modules share: the digits prepared once, and one real run of every stage, trained for 3 epochs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cnnpipe.config import PrepareSettings, RetrainSettings, TrainSettings
from cnnpipe.training import stages
from cnnpipe.training.datasets import PreparedDataset, prepare_dataset

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
    artifacts = tmp_path_factory.mktemp("finished") / "artifacts"
    run = stages.train_run(SETTINGS, digits.path, artifacts).run
    stages.evaluate_run(run)
    stages.plot_run(run)
    stages.export_run(run)
    stages.conclude_run(run)
    return run


@pytest.fixture
def artifacts(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the artifacts with that one complete run, to change at will."""
    copy = tmp_path / "artifacts"
    shutil.copytree(finished_run.parents[2], copy)
    return copy


@pytest.fixture
def photos(tmp_path: Path, digits: PreparedDataset) -> Path:
    """Twelve test digits as PNG files in class folders, and one text file that calls itself an image."""
    labels, images = digits.labels("test"), digits.images("test")
    folder = tmp_path / "photos"
    for index in range(12):
        file = folder / digits.class_names[labels[index]] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(file)
    (folder / "zz-notes.png").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of the tests' own, with an empty database, once a session: starting it takes long."""
    from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # The library is used without a flow too once a flow has had its logger send to the server.
    quiet = temporary_settings({PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"})
    with quiet, prefect_test_harness(server_startup_timeout=120):
        yield
