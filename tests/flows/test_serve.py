"""The offer of `make serve`: the deployments, their schedule and its timezone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from tzlocal import reload_localzone

from cnnpipe.errors import UsageError
from cnnpipe.settings import ClassifySettings, RetrainSettings, TrainSettings
from flows.classify_flow import classify
from flows.retrain_flow import retrain
from flows.serve import build_deployments, local_timezone, parse_schedule

SETTINGS = RetrainSettings(train=TrainSettings(epochs=3))
SCHEDULE = CronSchedule(cron="30 1 * * 1-5", timezone="Europe/Rome")


def test_nightly_retrains_with_the_settings_on_schedule(tmp_path: Path) -> None:
    nightly, _ = build_deployments(SETTINGS, SCHEDULE, tmp_path / "data", tmp_path / "artifacts")
    assert (nightly.flow_name, nightly.name, nightly.entrypoint) == (
        "retrain",
        "nightly",
        "flows/retrain_flow.py:retrain",
    )
    (schedule,) = nightly.schedules or []
    assert schedule.schedule == SCHEDULE
    folders = {"data": str(tmp_path / "data"), "artifacts": str(tmp_path / "artifacts")}
    sections = {name: value for name, value in (nightly.parameters or {}).items() if name not in folders}
    assert RetrainSettings.model_validate(sections) == SETTINGS
    retrain.validate_parameters(nightly.parameters or {})


@pytest.mark.skipif(sys.platform == "darwin", reason="names are text there")
def test_folders_whose_path_is_not_text_can_be_sent_to_the_server() -> None:
    folder = Path(os.fsdecode(b"/F\xe9"))
    nightly, bulk = build_deployments(SETTINGS, SCHEDULE, folder, folder)
    values = {**(nightly.parameters or {}), "bulk": (bulk.parameters or {})["artifacts"]}
    assert [values[name] for name in ("data", "artifacts", "bulk")] == [r"/F\xe9"] * 3


def test_nightly_never_overlaps_itself_nor_queues_up(tmp_path: Path) -> None:
    nightly, bulk = build_deployments(SETTINGS, SCHEDULE, tmp_path, tmp_path)
    assert nightly.concurrency_limit == 1
    assert nightly.concurrency_options is not None
    assert nightly.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.CANCEL_NEW
    assert bulk.concurrency_limit is None


def test_bulk_waits_for_an_order(tmp_path: Path) -> None:
    _, bulk = build_deployments(SETTINGS, SCHEDULE, tmp_path, tmp_path)
    assert (bulk.flow_name, bulk.name, bulk.entrypoint) == ("classify", "bulk", "flows/classify_flow.py:classify")
    assert not bulk.schedules
    classify.validate_parameters({**(bulk.parameters or {}), "settings": ClassifySettings(folder="photos")})


def test_schedule_keeps_its_timezone() -> None:
    schedule = parse_schedule("0 2 * * *", "Europe/Berlin")
    assert (schedule.cron, schedule.timezone) == ("0 2 * * *", "Europe/Berlin")


@pytest.mark.parametrize("cron", ["", "2", "0 2 * *", "61 2 * * *", "every night"])
def test_wrong_cron_is_a_usage_error(cron: str) -> None:
    with pytest.raises(UsageError, match=r"--cron must be five fields, .* received "):
        parse_schedule(cron, "UTC")


@pytest.mark.parametrize("timezone", ["Nowhere", "CEST+2", "../UTC", "/etc/localtime"])
def test_wrong_timezone_is_a_usage_error(timezone: str) -> None:
    with pytest.raises(UsageError, match=r"--timezone must be an IANA name, .* received "):
        parse_schedule("0 2 * * *", timezone)


def test_local_timezone_is_what_tz_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", ":Europe/Paris")
    reload_localzone()  # it remembers the first answer
    assert local_timezone() == "Europe/Paris"
    monkeypatch.undo()
    reload_localzone()


@pytest.mark.skipif(not Path("/etc/localtime").exists(), reason="this machine has no timezone, which means UTC")
def test_local_timezone_without_a_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.serve.get_localzone_name", lambda: None)
    with pytest.raises(UsageError, match=r"does not name its timezone; give --timezone"):
        local_timezone()
