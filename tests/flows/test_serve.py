"""The offer of `make serve`: the deployments, their schedule, its timezone and its daylight-saving nights; the file."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest
import typer
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as CronScheduleOfServer
from typer.testing import CliRunner, Result
from tzlocal import reload_localzone

from cnnpipe.console import command
from cnnpipe.errors import UsageError
from cnnpipe.settings import ClassifySettings, PrepareSettings, RetrainSettings, TrainSettings, takes_settings
from flows.classify_flow import classify
from flows.retrain_flow import retrain
from flows.serve import ScheduleSettings, ServeSettings, build_deployments, local_timezone, parse_schedule

SETTINGS: Final = ServeSettings(train=TrainSettings(epochs=3))
SCHEDULE: Final = CronSchedule(cron="30 1 * * 1-5", timezone="Europe/Rome")


def test_each_dataset_is_retrained_with_its_settings_on_its_schedule(tmp_path: Path) -> None:
    other = ServeSettings(prepare=PrepareSettings(name="other"))
    nights = [(SETTINGS, SCHEDULE), (other, CronSchedule(cron="0 2 * * *", timezone="UTC"))]
    *nightly, _ = build_deployments(nights, tmp_path / "data", tmp_path / "artifacts")
    assert [each.full_name for each in nightly] == ["retrain/digits-nightly", "retrain/other-nightly"]
    folders = {"data": str(tmp_path / "data"), "artifacts": str(tmp_path / "artifacts")}
    for deployment, (settings, expected) in zip(nightly, nights, strict=True):
        assert deployment.entrypoint == "flows/retrain_flow.py:retrain"
        (schedule,) = deployment.schedules or []
        assert schedule.schedule == expected
        parameters = deployment.parameters or {}
        assert parameters.items() >= folders.items()
        sections = {name: value for name, value in parameters.items() if name not in folders}
        assert RetrainSettings.model_validate(sections).model_dump() == settings.model_dump(exclude={"schedule"})
        retrain.validate_parameters(parameters)


@pytest.mark.skipif(sys.platform == "darwin", reason="names are text there")
def test_folders_whose_path_is_not_text_can_be_sent_to_the_server() -> None:
    folder = Path(os.fsdecode(b"/F\xe9"))
    nightly, bulk = build_deployments([(SETTINGS, SCHEDULE)], folder, folder)
    values = {**(nightly.parameters or {}), "bulk": (bulk.parameters or {})["artifacts"]}
    assert [values[name] for name in ("data", "artifacts", "bulk")] == [r"/F\xe9"] * 3


def test_nightly_never_overlaps_itself_nor_queues_up(tmp_path: Path) -> None:
    nightly, bulk = build_deployments([(SETTINGS, SCHEDULE)], tmp_path, tmp_path)
    assert nightly.concurrency_limit == 1
    assert nightly.concurrency_options is not None
    assert nightly.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.CANCEL_NEW
    assert bulk.concurrency_limit is None


def test_bulk_waits_for_an_order(tmp_path: Path) -> None:
    _, bulk = build_deployments([(SETTINGS, SCHEDULE)], tmp_path, tmp_path)
    assert (bulk.flow_name, bulk.name, bulk.entrypoint) == ("classify", "bulk", "flows/classify_flow.py:classify")
    assert not bulk.schedules
    classify.validate_parameters({**(bulk.parameters or {}), "settings": ClassifySettings(folder="photos")})


def _scheduled(cron: str, timezone: str) -> CronSchedule:
    return parse_schedule(ServeSettings(schedule=ScheduleSettings(cron=cron, timezone=timezone)))


def test_schedule_keeps_its_timezone() -> None:
    schedule = _scheduled("0 2 * * *", "Europe/Berlin")
    assert (schedule.cron, schedule.timezone) == ("0 2 * * *", "Europe/Berlin")


@pytest.mark.parametrize(
    ("cron", "spring", "autumn"),
    [("30 2 * * *", "03:30", "02:30"), ("0 2 * * *", "03:00", "02:00"), ("15 3 * * *", "03:15", "03:15")],
)
def test_a_daylight_saving_night_runs_once_whenever_the_server_plans_it(cron: str, spring: str, autumn: str) -> None:
    """In spring a time that the clock skips comes an hour later; in autumn the first of two equal times counts."""
    berlin = ZoneInfo("Europe/Berlin")
    schedule = CronScheduleOfServer(**_scheduled(cron, "Europe/Berlin").model_dump())
    for day, wanted in (("2026-03-29", spring), ("2026-10-25", autumn)):
        midnight = datetime.fromisoformat(day).replace(tzinfo=berlin).astimezone(ZoneInfo("UTC"))
        end = midnight + timedelta(hours=30)
        planned = set()
        for minutes in range(-600, 600, 10):  # the server plans every minute, and again after each start
            start = midnight + timedelta(minutes=minutes)
            dates = asyncio.run(schedule.get_dates(n=10, start=start, end=end))
            planned |= {each.astimezone(ZoneInfo("UTC")) for each in dates}
        nights = [each.astimezone(berlin) for each in sorted(planned)]
        assert [f"{each:%H:%M}" for each in nights if f"{each:%Y-%m-%d}" == day] == [wanted]


@pytest.mark.parametrize("cron", ["", "2", "0 2 * *", "61 2 * * *", "every night"])
def test_wrong_cron_is_a_usage_error(cron: str) -> None:
    with pytest.raises(UsageError, match=r"--cron must be five fields, .* received .* for digits"):
        _scheduled(cron, "UTC")


@pytest.mark.parametrize("timezone", ["Nowhere", "CEST+2", "../UTC", "/etc/localtime"])
def test_wrong_timezone_is_a_usage_error(timezone: str) -> None:
    with pytest.raises(UsageError, match=r"--timezone must be an IANA name, .* received .* for digits"):
        _scheduled("0 2 * * *", timezone)


NIGHTLY: Final = """
[nightly.flowers]
dataset = "/photos/flowers"
preset = "fast"
cron = "0 3 * * *"
split_seed = 5
[nightly.flowers.train]
epochs = 7

[nightly.digits]
"""


def _read(file: Path, text: str, *options: str) -> tuple[list[Any], Result]:
    """Return the settings that a command like `flows.serve` takes from a file, and how it ends."""
    taken: list[Any] = []

    def keep(settings: list[ServeSettings]) -> None:
        taken.extend(settings)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command(takes_settings(ServeSettings, "dataset", tuple(ServeSettings.model_fields), "nightly")(keep)))
    file.write_text(text)
    return taken, CliRunner().invoke(app, ["--config", str(file), *options])


def test_one_file_has_a_table_for_each_dataset_with_options_and_sections_that_options_override(tmp_path: Path) -> None:
    (flowers, digits), result = _read(tmp_path / "nightly.toml", NIGHTLY, "--patience", "2")
    assert result.exit_code == 0, result.stderr
    assert (flowers.name, flowers.prepare.dataset, flowers.prepare.seed) == ("flowers", "/photos/flowers", 5)
    assert (flowers.train.preset, flowers.train.epochs, flowers.train.patience) == ("fast", 7, 2)
    assert flowers.schedule.cron == "0 3 * * *"
    expected = ServeSettings(prepare=PrepareSettings(name="digits"), train=TrainSettings(patience=2))
    assert digits == expected


def test_a_file_of_one_retraining_is_still_that(tmp_path: Path) -> None:
    (settings,), _ = _read(tmp_path / "config.toml", "[train]\nepochs = 7\n[schedule]\ncron = '0 3 * * *'")
    assert (settings.name, settings.train.epochs, settings.schedule.cron) == ("digits", 7, "0 3 * * *")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "[nightly.x]\nepochs = 0",
            [],
            r"train\.epochs must be at least 1, received 0, in \[nightly\.x\] of \S+\.toml",
        ),
        ("[nightly.x]\nepoch = 1", [], r"no setting is called epoch; .*, in \[nightly\.x\] of "),
        ("[nightly.x]\ntrain = 1", [], r"train must be a table of settings, received 1, in \[nightly\.x\] of "),
        (
            "[nightly]\nepochs = 1",
            [],
            r"nightly\.toml must have a table \[nightly\.NAME\] for each dataset, and nothing",
        ),
        (
            "[nightly.x]\n[train]\nepochs = 1",
            [],
            r"must have a table \[nightly\.NAME\] for each dataset, and nothing else",
        ),
        ("[nightly.x]", ["digits"], r"DATASET is for one dataset; leave it out, \S+ has them in \[nightly\.NAME\]"),
        ("[nightly.x]", ["--name", "y"], r"--name is for one dataset; leave it out"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_table(
    text: str, options: list[str], message: str, tmp_path: Path
) -> None:
    taken, result = _read(tmp_path / "nightly.toml", text, *options)
    assert taken == []
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert re.search(message, line), line


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
