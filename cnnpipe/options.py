"""Settings as command-line options: one option for every field of a pydantic model, with its description as help.

So the command line, the Prefect form and `config.toml` offer the same settings, and none of them can lag behind.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic.fields import FieldInfo

from cnnpipe.console import set_signature
from cnnpipe.errors import UsageError
from cnnpipe.settings import COMMAND_LINE, Settings, read_toml, validate_settings

__all__ = ["ArtifactsOption", "DataOption", "takes_settings"]

ArtifactsOption = Annotated[
    Path, typer.Option("--artifacts", envvar="CNNPIPE_ARTIFACTS", help="Folder of runs and champions.")
]
DataOption = Annotated[Path, typer.Option("--data", envvar="CNNPIPE_DATA", help="Folder of raw and prepared datasets.")]

_RENAMED: Final = {("prepare", "seed"): "split_seed"}
"""Options whose plain names would be taken twice."""

_ALIASES: Final = {"top_k": ("--topk",)}
"""Further ways to write an option; help shows them, messages name the plain one."""


def takes_settings(
    model: type[Settings], argument: str, sections: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command's first parameter `settings` be filled from options, over the values of a `--config` file.

    Args:
        model: what `settings` is.
        argument: the field that is the command's one positional argument.
        sections: the fields of `model` that are settings themselves and are offered; none for a flat model.
    """
    fields = _fields(model, sections)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            config: Path | None = values.pop("config")
            given = {place: (_option(key, argument), values.pop(key)) for key, (place, _) in fields.items()}
            settings = _build_settings(model, config, given)
            function(settings=settings, **values)

        own = [
            each for name, each in inspect.signature(function, eval_str=True).parameters.items() if name != "settings"
        ]
        offered = [_parameter(key, field, key == argument) for key, (_, field) in fields.items()]
        offered.sort(key=lambda each: each.name != argument)  # the positional one first
        set_signature(run, [*offered, _CONFIG_PARAMETER, *own])
        return run

    return decorate


_CONFIG_PARAMETER: Final = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[Path | None, typer.Option("--config", help="TOML file of settings; options override it.")],
)


def _fields(model: type[Settings], sections: tuple[str, ...]) -> dict[str, tuple[tuple[str, ...], FieldInfo]]:
    """Return, by option name, where each setting sits in the model and what it is."""
    if not sections:
        return {name: ((name,), field) for name, field in model.model_fields.items()}
    return {
        _RENAMED.get((section, name), name): ((section, name), field)
        for section in sections
        for name, field in model.model_fields[section].annotation.model_fields.items()  # type: ignore[union-attr]
    }


def _parameter(name: str, field: FieldInfo, positional: bool) -> inspect.Parameter:
    description = (field.description or "").strip()
    text = description[:1].upper() + description[1:] + "." if not description.startswith("`") else description + "."
    kind = _plain_type(field.annotation)
    metavar, between = None, "x"
    if typing.get_origin(kind) is list:
        text += " [repeatable]"
        metavar, between = f"<{typing.get_args(kind)[0].__name__}>", ", "  # what is given at a time
    if not field.is_required() and field.default not in (None, ()) and "default:" not in description:
        text += f" [default: {_show_default(field.default, between)}]"
    if positional:
        # Optional even where the setting is not: a --config file may hold it.
        argument = Annotated[str | None, typer.Argument(help=text, show_default=False, metavar=name.upper())]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=argument)
    option = _option(name)
    declaration = f"{option}/--no-{option.removeprefix('--')}" if kind is bool else option
    details = typer.Option(declaration, *_ALIASES.get(name, ()), help=text, show_default=False, metavar=metavar)
    annotation = Annotated[kind | None, details]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str, argument: str | None = None) -> str:
    """Return how a setting is written on the command line."""
    return name.upper() if name == argument else "--" + name.replace("_", "-")


def _show_default(value: Any, between: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return between.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain_type(annotation: Any) -> Any:
    """Return the type that the command line parses: int, float, bool, a list of one or, for anything else, text.

    A tuple of any length is a list: an option that may be given again and again. One of fixed length is written as
    one text, such as an image size.
    """
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation)[1:] == (Ellipsis,):
        return list[_plain_type(typing.get_args(annotation)[0])]  # type: ignore[misc]
    if typing.get_origin(annotation) is Annotated:
        return _plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _plain_type(next(each for each in typing.get_args(annotation) if each is not type(None)))
    return annotation if annotation in (int, float, bool) else str


def _build_settings(
    model: type[Settings], config: Path | None, given: dict[tuple[str, ...], tuple[str, Any]]
) -> Settings:
    """Lay the options over the values of the settings file, and validate the whole.

    Args:
        given: by the place of a setting, the name of its option and its value, None where it was not given.
    """
    values: dict[str, Any] = read_toml(config) if config else {}
    chosen = {place: option for place, (option, value) in given.items() if value is not None}
    for place in chosen:
        value = given[place][1]
        target = values
        for section in place[:-1]:
            inner = target.setdefault(section, {})
            target = inner if isinstance(inner, dict) else {}  # no table there: told by the validation
        target[place[-1]] = _image_size(value) if place[-1] == "image_size" else value
    return validate_settings(model, values, str(config) if config else COMMAND_LINE, chosen)


def _image_size(text: str) -> tuple[int, int]:
    """Read `HEIGHTxWIDTH`, or one number for a square."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UsageError(f"--image-size must be HEIGHTxWIDTH in pixels, such as 32x32, received {text!r}")
    height, width = match.groups()
    return int(height), int(width or height)
