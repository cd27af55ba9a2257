"""Settings become options: repeatable ones for tuples, further names for some, messages that name the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner, Result

from cnnpipe.config import Settings
from cnnpipe.console import command
from cnnpipe.options import takes_settings


class _Wanted(Settings):
    folder: str = Field(description="where")
    include: tuple[str, ...] = Field((), description="which files")
    sizes: tuple[int, ...] = Field((32, 64), description="numbers")
    image_size: tuple[int, int] = Field((32, 32), description="one pair")
    top_k: int = Field(1, ge=1, description="how many")


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
    assert "--top-k: Input should be greater than or equal to 1, received 0" in " ".join(result.stderr.split())


def test_help_tells_what_may_be_repeated_and_every_name() -> None:
    text = " ".join(_run("--help").stdout.split())
    assert "--include <str> Which files. [repeatable]" in text
    assert "Numbers. [repeatable] [default: 32, 64]" in text
    assert "One pair. [default: 32x32]" in text
    assert "--top-k, --topk" in text
