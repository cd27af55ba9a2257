"""The settings of every step, as frozen pydantic models: validated once, written to every run, read back from TOML.

The same models are the parameters of the Prefect flows, so the descriptions below are what the UI's form shows.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import tomli_w
import typer
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from cnnpipe.errors import ConfigError, UsageError, one_line
from cnnpipe.files import NO_URL, display_path, user_path

__all__ = [
    "BUILT_IN_DATASETS",
    "COMMAND_LINE",
    "ClassifySettings",
    "Device",
    "EvaluateSettings",
    "ExportSettings",
    "PrepareSettings",
    "PromoteSettings",
    "RetrainSettings",
    "Settings",
    "TrainSettings",
    "dataset_location",
    "dataset_name",
    "dump_toml",
    "load_toml",
    "read_toml",
    "set_signature",
    "takes_settings",
    "validate_settings",
]

BUILT_IN_DATASETS = ("digits", "cifar10")

COMMAND_LINE = "the command line"
"""The origin of settings that come from no file."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")]
TrainDevice = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+|cuda:all)$")]


def _check_path(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Admit a path whose bytes are not text, which pydantic refuses in a string, and no URL."""
    if not isinstance(value, str):
        return check(value)
    check(display_path(value))
    try:
        user_path(value)
    except UsageError as error:
        raise PydanticCustomError("path", NO_URL) from error
    return value


UserPath = Annotated[str, WrapValidator(_check_path), PlainSerializer(display_path, when_used="json")]
"""Text that `user_path` makes a path of; in JSON and TOML bytes that are not text stand there as `\\xNN`."""

ImageSize = Annotated[int, Field(ge=8, le=1024)]


class Settings(BaseModel):
    """Base of all settings: frozen, and a misspelt name is an error rather than a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PrepareSettings(Settings):
    """Which images to learn from, and how to split them."""

    dataset: UserPath = Field(
        "digits",
        min_length=1,
        description="`digits` (built in), `cifar10` (the official archive), or the path of a folder of images: "
        "FOLDER/{train,val,test}/CLASS/* or FOLDER/CLASS/*",
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="what the model is called; default: the dataset's or the folder's own name",
    )
    include: tuple[str, ...] = Field(
        (),
        description="only files of a folder that match one of these patterns; one without `/` is compared with the "
        "file's name",
    )
    exclude: tuple[str, ...] = Field((), description="no files of a folder that match one of these patterns")
    image_size: tuple[ImageSize, ImageSize] = Field((32, 32), description="(height, width) of the model, pixels")
    val_fraction: float = Field(0.2, gt=0.0, lt=1.0, description="share of train that becomes val if there is none")
    test_fraction: float = Field(
        0.2, gt=0.0, lt=1.0, description="share of all but val that becomes test if there is none"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="decides which images go to which split")
    min_images_per_class: int = Field(10, ge=1, description="a class with fewer images in train stops the run")
    max_unreadable_fraction: Fraction = Field(
        0.01, description="a larger share of unreadable images, and more than one, stops the run; 0 allows none"
    )
    max_leaked_fraction: Fraction = Field(0.01, description="a larger share of test images also in train stops the run")
    max_imbalance: float = Field(100.0, ge=1.0, description="a larger ratio of largest to smallest class stops the run")

    @model_validator(mode="after")
    def _name_is_usable(self) -> Self:
        if self.resolved_name in ("", "predictions"):
            raise ValueError(f"{self.dataset!r} gives no usable name for the model; give one with --name")
        return self

    @model_validator(mode="after")
    def _patterns_have_a_folder(self) -> Self:
        if self.dataset in BUILT_IN_DATASETS and (self.include or self.exclude):
            raise ValueError(f"include and exclude choose files of a folder, received the dataset {self.dataset!r}")
        return self

    @property
    def resolved_name(self) -> str:
        """The name of the dataset, of its models and of their folder: `name`, or made from `dataset`."""
        if self.name is not None:
            return self.name
        return dataset_name(self.dataset)


def dataset_name(dataset: str) -> str:
    """Return the name that a dataset gives to itself and its models; empty where its folder's has no ASCII letter."""
    if dataset in BUILT_IN_DATASETS:
        return dataset
    return re.sub(r"[^A-Za-z0-9._-]+", "-", user_path(dataset).resolve().name).strip("-._")[:64]


def dataset_location(dataset: str) -> str:
    """Return where a dataset comes from: a folder's absolute path, symbolic links kept, or a built-in one's name."""
    if dataset in BUILT_IN_DATASETS:
        return dataset
    return display_path(os.path.abspath(user_path(dataset)))  # noqa: PTH100  a link may name another folder every night


class TrainSettings(Settings):
    """Which network to train, and how. What is left empty is the preset's."""

    preset: Literal["baseline", "fast", "accurate"] = Field(
        "baseline",
        description="`baseline`: the classic tutorial's CNN and settings; `fast`: a network that learns in few epochs; "
        "`accurate`: a deeper one, for longer; on a GPU both are trained longer or wider",
    )
    epochs: int | None = Field(None, ge=1, le=100_000, description="passes over the training images")
    batch_size: int | None = Field(None, ge=1, le=65_536, description="images a step")
    learning_rate: float | None = Field(None, gt=0.0, description="the optimizer's rate")
    augment: bool | None = Field(None, description="random flips and shifts of the training images")
    label_smoothing: float | None = Field(
        None, ge=0.0, lt=1.0, description="share of each label that is spread over all classes, against overconfidence"
    )
    average_weights: bool = Field(
        False,
        description="keep running averages of the weights of the last few epochs, not those of one epoch",
    )
    class_weights: bool = Field(False, description="let every class weigh the same in the loss, however rare it is")
    patience: int | None = Field(
        None, ge=1, description="epochs without better weights by validation after which training stops; default: never"
    )
    max_minutes: float | None = Field(
        None,
        gt=0.0,
        description="for training: where it is too short for all epochs, fewer are planned, and the rate of `fast` and "
        "`accurate` falls to zero in them; default: no limit",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="the initial weights, the order of images and their augmentation")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the arithmetic, on weights of float32; `auto`: less than float32 where the "
        "device is known to be faster so",
    )
    resume: bool = Field(True, description="go on with the newest run that was broken off at the same training")
    device: TrainDevice = Field(
        "auto", description="`auto`, `cpu`, `cuda`, `cuda:N`, or `cuda:all` for all GPUs; only `auto` may choose"
    )


class EvaluateSettings(Settings):
    """How to score a model on the test split."""

    top_k: int = Field(5, ge=1, description="an image is top-k correct if its class is among the k likeliest")
    calibration_bins: int = Field(15, ge=1, le=1000, description="equal-width bins of the expected calibration error")


class ExportSettings(Settings):
    """How to write the ONNX model, and how closely it must agree with the trained one."""

    opset: int = Field(17, ge=13, le=21, description="version of the ONNX operator set")
    min_agreement: Fraction = Field(0.999, description="share of test images that must get the same class")
    max_difference: float = Field(1e-4, gt=0.0, description="largest allowed difference of any probability")
    int8: bool = Field(True, description="also write an int8 model, for CPUs, if it is accurate enough")
    fp16: bool = Field(True, description="also write an fp16 model, for CUDA, if it is accurate enough")
    max_accuracy_loss: Fraction = Field(0.005, description="test accuracy that an int8 or fp16 model may lose")
    calibration_images: int = Field(512, ge=1, le=100_000, description="training images that int8's ranges come from")


class PromoteSettings(Settings):
    """When a new model takes the champion's place."""

    min_accuracy: Fraction = Field(0.5, description="test accuracy below this is never promoted, first run included")


class RetrainSettings(Settings):
    """Everything one retraining needs; written to `config.toml` of its run."""

    prepare: PrepareSettings = Field(default_factory=PrepareSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)
    promote: PromoteSettings = Field(default_factory=PromoteSettings)


class ClassifySettings(Settings):
    """Which images to classify, with which model, and where the table goes."""

    folder: UserPath = Field(min_length=1, description="folder of images; searched to the bottom")
    files: UserPath | None = Field(
        None,
        description="text file of paths in the folder to classify, one a line or each ended by NUL; `-` is standard "
        "input; without a folder they are relative to the current one",
    )
    include: tuple[str, ...] = Field(
        (), description="only files that match one of these patterns; one without `/` is held against the file's name"
    )
    exclude: tuple[str, ...] = Field((), description="no files that match one of these patterns")
    model: UserPath | None = Field(
        None,
        description="a name (its champion), an alias file, a run folder or an .onnx file; "
        "default: the only champion there is",
    )
    output: UserPath | None = Field(
        None,
        description="table to write; .csv, .jsonl or .parquet; "
        "default: a new folder below artifacts/predictions with predictions.csv",
    )
    resume: bool = Field(True, description="go on with the rows of an attempt of the same settings that was broken off")
    overwrite: bool = Field(False, description="replace `output` if it exists, and a half-done one of other settings")
    retry_failed: bool = Field(False, description="try only the rows of `output` that failed, and keep the others")
    incremental: bool = Field(
        False, description="bring `output` up to date: files of the same content and model keep their rows"
    )
    device: Device = Field("auto", description="`auto`, `cpu`, `cuda`, or `cuda:N`; only `auto` may choose")
    precision: Literal["auto", "fp32", "int8", "fp16"] = Field(
        "auto",
        description="of the model; `auto`: int8 on cpu, fp16 on cuda, if measured faster at export; else fp32",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="images a step; default: 32 on cpu; on cuda up to 2048, by image size and memory",
    )
    workers: int | None = Field(None, ge=1, le=1024, description="decoding processes; default: one a core")
    file_timeout: float = Field(60.0, gt=0.0, description="seconds that decoding one file may take")
    shard_size: int = Field(4096, ge=1, le=1_000_000, description="files whose rows are written, and kept, together")
    top_k: int = Field(1, ge=1, description="classes to report for each image")
    min_probability: Fraction = Field(0.0, description="images below it count as uncertain, and are sorted apart")
    safe_csv: bool = Field(
        False,
        description="for a spreadsheet: a .csv with a byte order mark, and an apostrophe before texts like formulas",
    )
    sort_into: UserPath | None = Field(
        None, description="folder to sort the files into, by class: hard links, else copies"
    )
    report: UserPath | None = Field(None, description="contact sheet of the result to write; .html")
    max_failure_rate: Fraction = Field(0.1, description="a larger share of unreadable images ends with exit status 3")

    @model_validator(mode="before")
    @classmethod
    def _list_needs_no_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("files") and not values.get("folder"):
            return {**values, "folder": "."}
        return values

    @model_validator(mode="after")
    def _files_have_known_suffixes(self) -> Self:
        if self.output is not None and Path(self.output).suffix not in (".csv", ".jsonl", ".parquet"):
            raise ValueError(f"output must end in .csv, .jsonl or .parquet, received {self.output!r}")
        if self.safe_csv and self.output is not None and Path(self.output).suffix != ".csv":
            raise ValueError(f"safe_csv is for a table that ends in .csv, received {self.output!r}")
        if self.report is not None and Path(self.report).suffix not in (".html", ".htm"):
            raise ValueError(f"report must end in .html, received {self.report!r}")
        return self

    @model_validator(mode="after")
    def _earlier_table_is_named(self) -> Self:
        if not (self.retry_failed or self.incremental):
            return self
        if self.retry_failed and self.incremental:
            raise ValueError("incremental tries failed files again too; leave out retry_failed")
        mode = "retry_failed" if self.retry_failed else "incremental"
        if self.output is None:
            raise ValueError(f"{mode} needs output, the table to bring up to date")
        if self.retry_failed and (self.files or self.include or self.exclude):
            raise ValueError("retry_failed takes its files from the table; leave out files, include and exclude")
        return self

    @property
    def replaces_output(self) -> bool:
        """Whether what is at `output` and `report` may give way."""
        return self.overwrite or self.retry_failed or self.incremental


SettingsT = TypeVar("SettingsT", bound=Settings)


def validate_settings(
    model: type[SettingsT],
    values: dict[str, Any],
    origin: str,
    options: Mapping[tuple[str, ...], str] = MappingProxyType({}),
) -> SettingsT:
    """Build settings from plain values.

    Args:
        origin: where the values come from, for the message, such as a file's name.
        options: of the values that came from the command line, the option's name by the place of the value.
    Raises:
        ConfigError: a value does not fit; names the first setting, what it received and what it must be.
        UsageError: the same, of a value from the command line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        received = one_line(repr(first["input"]))
        place = tuple(part for part in first["loc"] if isinstance(part, str))
        option = next((name for key, name in options.items() if place[: len(key)] == key), None)
        if option is not None:
            raise UsageError(" ".join(f"{option}: {first['msg']}, received {received}".split())) from error
        setting = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "extra_forbidden":
            message = f"no setting is called {setting}, in {origin}; see the settings in the README"
        elif first["type"] == "missing":
            message = f"{setting} is missing in {origin}; give it"
        elif first["type"] == "value_error":  # written in this module, and complete
            message = f"{first['ctx']['error']}, in {origin}"
        else:
            message = f"{setting}: {first['msg']}, received {received}, in {origin}"
        error_type = UsageError if origin == COMMAND_LINE else ConfigError
        raise error_type(" ".join(message.split())) from error


def load_toml(model: type[SettingsT], path: Path) -> SettingsT:
    """Read settings from a TOML file; what it leaves out has its default.

    Raises:
        ConfigError: the file is missing, is not TOML, or a value does not fit.
    """
    return validate_settings(model, read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read the plain values of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read settings from {path}: {one_line(error)}; check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {one_line(error)}; fix that line") from error


def dump_toml(settings: Settings) -> str:
    """Return settings as TOML that `load_toml` reads back to an equal value; TOML has no null, so None is left out."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


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


def set_signature(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function the keyword parameters that typer is to make options of."""
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    function.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in keywords}
