"""What `make serve` offers: the deployments, their schedule and its timezone."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule

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


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a system's settings, empty; and no TZ."""
    monkeypatch.delenv("TZ", raising=False)
    return tmp_path


def test_local_timezone_is_the_target_of_the_link(etc: Path) -> None:
    (etc / "localtime").symlink_to("/usr/share/zoneinfo/America/New_York")
    (etc / "timezone").write_text("Etc/UTC\n")
    assert local_timezone(etc) == "America/New_York"


def test_local_timezone_is_the_name_beside_a_copied_file(etc: Path) -> None:
    (etc / "localtime").write_bytes(b"TZif")
    (etc / "timezone").write_text("Asia/Tokyo\n")
    assert local_timezone(etc) == "Asia/Tokyo"


def test_local_timezone_is_first_what_tz_says(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", ":Europe/Paris")
    (etc / "timezone").write_text("Asia/Tokyo\n")
    assert local_timezone(etc) == "Europe/Paris"


def test_local_timezone_without_any_setting_is_utc_as_for_the_c_library(etc: Path) -> None:
    assert local_timezone(etc) == "UTC"


def test_local_timezone_that_nobody_tells_is_an_error(etc: Path) -> None:
    (etc / "localtime").write_bytes(b"TZif")
    with pytest.raises(UsageError, match=r"does not tell the name of its timezone; give --timezone"):
        local_timezone(etc)
