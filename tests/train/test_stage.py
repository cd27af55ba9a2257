"""The stage `train` recognises a night on which nothing changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.registry import create_run, list_runs
from cnnpipe.settings import RetrainSettings
from cnnpipe.train.stage import find_repeated_run


def changed(section: str, **values: Any) -> RetrainSettings:
    return SETTINGS.model_copy(update={section: getattr(SETTINGS, section).model_copy(update=values)})


def test_equal_images_settings_and_packages_repeat_the_newest_decided_run(
    digits: PreparedDataset, artifacts: Path
) -> None:
    (run,) = list_runs(artifacts, "digits")
    create_run(artifacts, "digits")  # not decided

    assert find_repeated_run(SETTINGS, digits.path, artifacts) == run
    assert find_repeated_run(changed("train", resume=False), digits.path, artifacts) == run
    moved = changed("prepare", dataset="/mnt/digits", name="digits")  # a table [nightly.digits] gives it the name
    assert find_repeated_run(moved, digits.path, artifacts) == run


@pytest.mark.parametrize(
    "settings",
    [
        changed("train", epochs=4),
        changed("prepare", max_imbalance=5.0),
        changed("evaluate", top_k=2),
        changed("export", int8=False),
        changed("promote", min_accuracy=0.1),
    ],
    ids=lambda settings: next(name for name, value in settings if value != getattr(SETTINGS, name)),
)
def test_a_changed_setting_is_no_repetition(
    digits: PreparedDataset, artifacts: Path, settings: RetrainSettings
) -> None:
    assert find_repeated_run(settings, digits.path, artifacts) is None


@pytest.mark.parametrize("change", ["versions", "images", "config", "no run", "newer run"])
def test_other_images_or_packages_or_a_run_that_cannot_be_read_are_no_repetition(
    digits: PreparedDataset, artifacts: Path, change: str
) -> None:
    (run,) = list_runs(artifacts, "digits")
    if change == "versions":
        environment = json.loads((run / "environment.json").read_bytes())
        environment["versions"]["cnnpipe"] = "0.0.1"
        (run / "environment.json").write_text(json.dumps(environment))
    elif change == "images":
        (run / "manifest.json").write_text((run / "manifest.json").read_text().replace(digits.fingerprint, "0" * 64))
    elif change == "config":
        (run / "config.toml").write_text("[")
    elif change == "no run":
        shutil.rmtree(run)
    else:
        newer = create_run(artifacts, "digits")
        shutil.copytree(run, newer, dirs_exist_ok=True)
        (newer / "config.toml").write_text((run / "config.toml").read_text().replace("epochs = 3", "epochs = 5"))

    assert find_repeated_run(SETTINGS, digits.path, artifacts) is None
