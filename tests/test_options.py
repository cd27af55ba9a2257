"""Settings become options: repeatable ones for tuples, further names for some, messages that name the plain one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner, Result

from cnnpipe.console import ArtifactsOption, command
from cnnpipe.paths import expand_path
from cnnpipe.settings import ClassifySettings, ImageSize, Settings, UserPath, dump_toml, load_toml, takes_settings


class _Wanted(Settings):
    folder: str
    """Where."""
    include: tuple[str, ...] = ()
    """Which files."""
    sizes: tuple[int, ...] = (32, 64)
    """Numbers."""
    image_size: ImageSize = (32, 32)
    """One pair."""
    top_k: int = Field(1, ge=1)
    """How
    many."""


@command
@takes_settings(_Wanted, "folder")
def _show(settings: _Wanted) -> None:
    typer.echo(settings.model_dump_json())


def _run(*arguments: object) -> Result:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(_show)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def _settings(*arguments: object) -> _Wanted:
    result = _run(*arguments)
    assert result.exit_code == 0, result.stderr
    return _Wanted.model_validate_json(result.stdout)


def test_a_tuple_of_any_length_is_an_option_that_may_be_repeated() -> None:
    settings = _settings("photos", "--include", "*.jpg", "--include", "a b/*", "--sizes", 8, "--sizes", 9)
    assert settings.include == ("*.jpg", "a b/*")
    assert settings.sizes == (8, 9)


def test_a_repeatable_option_that_is_not_given_has_its_default() -> None:
    settings = _settings("photos")
    assert (settings.include, settings.sizes) == ((), (32, 64))


def test_a_repeatable_option_replaces_what_the_settings_file_has(tmp_path: Path) -> None:
    config = tmp_path / "some.toml"
    config.write_text('include = ["*.png", "*.gif"]\n')
    assert _settings("photos", "--config", config).include == ("*.png", "*.gif")
    assert _settings("photos", "--config", config, "--include", "*.jpg").include == ("*.jpg",)


def test_a_pair_stays_one_text() -> None:
    assert _settings("photos", "--image-size", "48x64").image_size == (48, 64)


@pytest.mark.parametrize("option", ["--top-k", "--topk"])
def test_an_option_may_have_a_further_name(option: str) -> None:
    assert _settings("photos", option, 3).top_k == 3


@pytest.mark.parametrize("option", ["--top-k", "--topk"])
def test_messages_name_the_plain_form(option: str) -> None:
    result = _run("photos", option, 0)
    assert result.exit_code == 2
    assert "--top-k must be at least 1, received 0" in " ".join(result.stderr.split())


def test_help_tells_what_may_be_repeated_and_every_name() -> None:
    text = " ".join(_run("--help").stdout.split())
    assert "--include <str> Which files. [repeatable]" in text
    assert "Numbers. [repeatable] [default: 32, 64]" in text
    assert "One pair. [default: 32x32]" in text
    assert "--top-k, --topk <int> How many. [default: 1]" in text


class _Places(Settings):
    folder: UserPath = Field(min_length=1)
    output: UserPath | None = None


@command
@takes_settings(_Places, "folder")
def _show_places(settings: _Places, artifacts: ArtifactsOption = Path("artifacts")) -> None:
    for path in (expand_path(settings.folder), expand_path(settings.output or "none"), artifacts):
        typer.echo(os.fsencode(path))


def _run_places(*arguments: str, environment: dict[str, str] | None = None) -> Result:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(_show_places)
    return CliRunner().invoke(app, arguments, env=environment or {})


_WAYS = ["argument", "option", "settings file", "environment", "artifacts"]


def _give(way: str, path: str, folder: Path) -> Result:
    """Give a path to a command in one of several ways."""
    config = folder / "places.toml"
    config.write_text(f"output = '{path}'\n", "utf-8", "backslashreplace")
    return {
        "argument": lambda: _run_places(path),
        "option": lambda: _run_places("photos", f"--output={path}"),
        "settings file": lambda: _run_places("photos", "--config", str(config)),
        "environment": lambda: _run_places("photos", environment={"CNNPIPE_ARTIFACTS": path}),
        "artifacts": lambda: _run_places("photos", f"--artifacts={path}"),
    }[way]()


@pytest.mark.parametrize("way", _WAYS)
def test_a_tilde_is_the_home_however_a_path_is_given(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = _give(way, "~/My Project", tmp_path)
    assert result.exit_code == 0, result.output
    assert os.fsencode(tmp_path / "My Project") in result.stdout_bytes.split(b"\n")


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("url", ["s3://b/x.csv", "https://x.y/a", "file:///tmp/a"])
def test_a_url_is_refused_in_one_line_however_it_is_given(way: str, url: str, tmp_path: Path) -> None:
    result = _give(way, url, tmp_path)
    assert result.exit_code == (1 if way == "settings file" else 2)
    (line,) = result.stderr.splitlines()
    assert "must be a path on this machine, not a URL, received" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "places.toml"]


@pytest.mark.parametrize("way", [way for way in _WAYS if way not in ("settings file", "environment")])
def test_bytes_that_are_not_text_stay_as_they_are(way: str, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/F\xe9/x.csv")
    result = _give(way, path, tmp_path)
    assert result.exit_code == 0, result.output
    assert os.fsencode(path) in result.stdout_bytes.split(b"\n")


def test_settings_with_bytes_that_are_not_text_come_back_from_toml_and_json(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/F\xe9"))
    folder.mkdir()
    settings = ClassifySettings(folder=str(folder), output=str(folder / "new.csv"))
    (tmp_path / "c.toml").write_text(dump_toml(settings), "utf-8")
    for read in (load_toml(ClassifySettings, tmp_path / "c.toml"), type(settings).model_validate_json(
        settings.model_dump_json()
    )):  # fmt: skip
        assert expand_path(read.folder) == folder
        assert expand_path(str(read.output)) == folder / "new.csv"


def test_a_path_is_text_in_the_form_of_prefect() -> None:
    assert ClassifySettings.model_json_schema()["properties"]["folder"]["type"] == "string"
