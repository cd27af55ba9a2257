"""Settings of every stage: frozen pydantic models, read from options, TOML files and the form of the Prefect UI.

A field's docstring is its help text on the command line and in the form, so neither can lag behind the code.
Settings are validated once, written to `config.toml` of every run, and read back from it.
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
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import pydantic
import tomli_w
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from cnnpipe.errors import ConfigError, UsageError, one_line
from cnnpipe.paths import NO_URL, escape_path, expand_path

BUILT_IN_DATASETS: Final = ("digits", "cifar10")

COMMAND_LINE: Final = "the command line"
"""Origin of settings that come from no file."""

_DEVICE: Final = r"^(auto|cpu|cuda|cuda:\d+)$"
_TRAIN_DEVICE: Final = r"^(auto|cpu|cuda|cuda:\d+|cuda:all)$"
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_PATTERNS_IN_WORDS: Final = {
    _DEVICE: "must be auto, cpu, cuda or cuda:N",
    _TRAIN_DEVICE: "must be auto, cpu, cuda, cuda:N or cuda:all",
    _NAME: "must be at most 64 ASCII letters, digits, `.`, `_` or `-`, and begin with a letter or digit",
}


def _check_path(value: Any, check: pydantic.ValidatorFunctionWrapHandler) -> Any:
    """Accept a path with bytes that are not text, which pydantic refuses in a string, but not a URL."""
    if not isinstance(value, str):
        return check(value)
    check(escape_path(value))
    try:
        expand_path(value)
    except UsageError as error:
        raise PydanticCustomError("path", NO_URL) from error
    return value


def _parse_image_size(value: Any) -> Any:
    """Read `HEIGHTxWIDTH`, or one number for a square, as (height, width)."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
    if match is None:
        raise PydanticCustomError("image_size", "must be HEIGHTxWIDTH in pixels, such as 32x32")
    return int(match[1]), int(match[2] or match[1])


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Device = Annotated[str, Field(pattern=_DEVICE)]
UserPath = Annotated[str, pydantic.WrapValidator(_check_path), pydantic.PlainSerializer(escape_path, when_used="json")]
"""Text that `expand_path` makes a path of. In JSON and TOML, bytes that are not text become `\\xNN`."""
_Pixels = Annotated[int, Field(ge=8, le=1024)]
ImageSize = Annotated[tuple[_Pixels, _Pixels], pydantic.BeforeValidator(_parse_image_size)]
"""(height, width) in pixels, also written as the text `32x32`."""


class Settings(BaseModel):
    """Base of all settings: frozen, and a misspelt name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class PrepareSettings(Settings):
    """Which images to learn from, and how to split them."""

    dataset: UserPath = Field("digits", min_length=1)
    """`digits` (built in), `cifar10` (downloaded once), or a folder of images: FOLDER/CLASS/* or
    FOLDER/{train,val,test}/CLASS/*."""
    name: str | None = Field(None, pattern=_NAME)
    """Name of the model and of its folder in artifacts. Default: the name of the dataset or of its folder."""
    include: tuple[str, ...] = ()
    """Use only the files of the folder that match this shell pattern, such as `*.jpg` or `cats/*`."""
    exclude: tuple[str, ...] = ()
    """Leave out the files of the folder that match this shell pattern, such as `*_thumb.*`."""
    image_size: ImageSize = (32, 32)
    """Height and width to which every image is resized, in pixels. Photos need more than the default."""
    val_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Fraction of the train split that becomes val, for a dataset without a val split."""
    test_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Fraction of the images, without those of a given val split, that becomes test if there is no test split."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the random split into train, val and test."""
    min_images_per_class: int = Field(10, ge=1)
    """Fewest train images that a class may have. The run stops before training if a class has fewer."""
    max_unreadable_fraction: Fraction = 0.01
    """Largest fraction of unreadable images before the run stops. One is always allowed, unless this is 0."""
    max_leaked_fraction: Fraction = 0.01
    """Largest fraction of val or test images that may also be in another split before the run stops. One is always
    allowed, unless this is 0."""
    max_contradictory_fraction: Fraction = 0.01
    """Largest fraction of images in two classes before the run stops. One is always allowed, unless this is 0."""
    max_imbalance: float = Field(100.0, ge=1.0)
    """Largest ratio of the biggest class to the smallest before the run stops."""
    same_classes: bool = True
    """Stop before training if classes are new or gone since the champion was trained."""
    max_pixel_shift: Fraction = 0.1
    """Largest change of brightness, colour or contrast since the champion was trained, as a fraction of the range of
    values, before the run stops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resolved_name in ("", "predictions"):
            raise ValueError(f"{self.dataset!r} gives no usable name for the model; choose one with --name")
        if self.dataset in BUILT_IN_DATASETS and (self.include or self.exclude):
            raise ValueError(f"include and exclude need a folder of images, received the dataset {self.dataset!r}")
        return self

    @property
    def resolved_name(self) -> str:
        """Name of the dataset, of its models and of their folder: `name`, or made from `dataset`."""
        return dataset_name(self.dataset) if self.name is None else self.name


def dataset_name(dataset: str) -> str:
    """Return the default name of a dataset; empty if its folder's name has no ASCII letter or digit."""
    if dataset in BUILT_IN_DATASETS:
        return dataset
    return re.sub(r"[^A-Za-z0-9._-]+", "-", expand_path(dataset).resolve().name).strip("-._")[:64]


def dataset_location(dataset: str) -> str:
    """Return where a dataset comes from: a folder's absolute path, symbolic links kept, or a built-in one's name."""
    if dataset in BUILT_IN_DATASETS:
        return dataset
    return escape_path(os.path.abspath(expand_path(dataset)))  # noqa: PTH100  a link may name another folder every night


class TrainSettings(Settings):
    """Which network to train, and how. Settings left empty take the value of the preset."""

    preset: Literal["baseline", "fast", "accurate"] = "baseline"
    """`baseline`: the CNN of the classic tutorial. `fast`: more accurate, in fewer epochs. `accurate`: deeper and the
    most accurate, but slower."""
    epochs: int | None = Field(None, ge=1, le=100_000)
    """Passes over the train images. Default: those of the preset."""
    batch_size: int | None = Field(None, ge=1, le=65_536)
    """Images per training step. Default: that of the preset. Lower it if the memory is too small."""
    learning_rate: float | None = Field(None, gt=0.0)
    """Highest learning rate. Default: that of the preset."""
    augment: bool | None = None
    """Flip and shift train images at random. Default: that of the preset. Turn it off where a mirror image means
    something else, such as letters."""
    label_smoothing: float | None = Field(None, ge=0.0, lt=1.0)
    """Fraction of each label that is spread over all classes, against overconfidence. Default: that of the preset."""
    average_weights: bool = False
    """Use a running average of the weights of the last few epochs instead of the weights of one epoch."""
    class_weights: bool = False
    """Give every class the same total weight in the loss. Use it when rare classes matter as much as common ones."""
    patience: int | None = Field(None, ge=1)
    """Stop after this number of epochs without an improvement on val. Default: never."""
    max_minutes: float | None = Field(None, gt=0.0)
    """Time budget for training: fewer epochs and a shorter schedule if not all fit. Default: no limit."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the initial weights, of the order of the images and of their augmentation."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute precision (weights stay float32). `auto` lowers it only where that is known to be faster."""
    resume: bool = True
    """Continue the newest interrupted run of the same dataset and settings, if there is one."""
    device: str = Field("auto", pattern=_TRAIN_DEVICE)
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `cuda:all` for all GPUs. Only `auto` may fall back to the CPU."""


class EvaluateSettings(Settings):
    """How to score a model on the test split."""

    top_k: int = Field(5, ge=1)
    """Report also how often the right class is among the k most probable ones."""
    calibration_bins: int = Field(15, ge=1, le=1000)
    """Number of equal-width confidence bins for the expected calibration error."""


class ExportSettings(Settings):
    """How to write the ONNX model, and how closely it must agree with the trained one."""

    opset: int = Field(17, ge=13, le=21)
    """Version of the ONNX operator set. Lower it for an older ONNX runtime."""
    min_agreement: Fraction = 0.999
    """Fraction of test images for which model.onnx must predict the same class as Keras, or the export fails."""
    max_difference: float = Field(1e-4, gt=0.0)
    """Largest difference between a probability of model.onnx and that of Keras before the export fails."""
    int8: bool = True
    """Write an int8 model too, for CPUs, unless it loses more than max_accuracy_loss."""
    fp16: bool = True
    """Write an fp16 model too, for GPUs, unless it loses more than max_accuracy_loss."""
    max_accuracy_loss: Fraction = 0.005
    """Test accuracy that an int8 or fp16 model may lose: 0.005 is half a percentage point."""
    calibration_images: int = Field(512, ge=1, le=100_000)
    """Number of train images from which the value ranges of the int8 model are measured."""


class PromoteSettings(Settings):
    """When a new model becomes the champion."""

    min_accuracy: Fraction = 0.5
    """Lowest test accuracy of a champion. A model below it is never promoted, not even the first one."""
    min_macro_recall: Fraction | None = None
    """Lowest mean recall of the classes of a champion. Default: more than that of a model that always gives one."""
    max_accuracy_drop: Fraction = 0.005
    """Loss of accuracy that must be ruled out, with 95 % confidence, before a model that is not significantly better
    replaces the champion."""
    max_class_drop: Fraction = 0.05
    """Largest recall that any class may lose against the champion. A loss that chance explains does not count."""
    max_megabytes: float | None = Field(None, gt=0.0)
    """Largest size of each model file, in millions of bytes. Default: no limit."""
    max_milliseconds: float | None = Field(None, gt=0.0)
    """Longest time of an image on this machine, in batches as `classify` makes them. Default: no limit."""
    promotion: Literal["auto", "manual"] = "auto"
    """`manual`: a model that passes waits for a person's approval before it becomes the champion."""
    approval_hours: float = Field(72.0, gt=0.0)
    """Hours that a run waits for approval in the Prefect UI before it ends without a promotion."""


class CleanSettings(Settings):
    """Limits on what is kept of earlier nights."""

    keep_runs: int = Field(30, ge=1)
    """Number of trained runs to keep of each name, the newest, besides the champion and the five before it."""
    keep_prepared: int = Field(2, ge=1)
    """Number of prepared datasets to keep of each name, those used last, besides those of runs under way."""
    keep_days: int = Field(30, ge=1, le=36_500)
    """Days to keep flow runs in the server's database, results of tasks, and classifications that were interrupted."""


class RetrainSettings(Settings):
    """Everything one retraining needs; written to `config.toml` of its run."""

    prepare: PrepareSettings = Field(default_factory=PrepareSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)
    promote: PromoteSettings = Field(default_factory=PromoteSettings)
    clean: CleanSettings = Field(default_factory=CleanSettings)


class ClassifySettings(Settings):
    """Which images to classify, with which model, and where the table goes."""

    folder: UserPath = Field(min_length=1)
    """Folder of images to classify, with all its subfolders."""
    files: UserPath | None = None
    """Text file of the paths to classify, one a line or NUL-separated; `-` reads standard input. They are relative to
    the folder, or to the current folder if none is named."""
    include: tuple[str, ...] = ()
    """Classify only files that match this shell pattern, such as `*.jpg` or `cats/*`."""
    exclude: tuple[str, ...] = ()
    """Leave out files that match this shell pattern, such as `*_thumb.*`."""
    model: UserPath | None = None
    """Name (its champion), alias file, run folder or .onnx file. Default: the champion, if there is only one."""
    output: UserPath | None = None
    """Table to write: .csv, .jsonl or .parquet. Default: predictions.csv in a new folder in artifacts/predictions."""
    resume: bool = True
    """Continue an interrupted classification of the same settings."""
    overwrite: bool = False
    """Replace an existing table, and an interrupted one of other settings."""
    retry_failed: bool = False
    """Classify again only the files whose row in the table is an error, and keep the other rows."""
    incremental: bool = False
    """Update an existing table: classify new and changed files, and keep the rows of the others."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`. Only `auto` may fall back to the CPU."""
    precision: Literal["auto", "fp32", "int8", "fp16"] = "auto"
    """Precision of the model. `auto`: int8 on a CPU or fp16 on a GPU if export measured it to be faster, else fp32."""
    batch_size: int | None = Field(None, ge=1, le=65_536)
    """Images per step of the model. Default: 32 on a CPU; on a GPU up to 2048, by image size and free memory."""
    workers: int | None = Field(None, ge=1, le=1024)
    """Number of processes that decode images. Default: one per core."""
    file_timeout: float = Field(60.0, gt=0.0)
    """Seconds that decoding one file may take before its row becomes an error."""
    shard_size: int = Field(4096, ge=1, le=1_000_000)
    """Number of rows that are saved together: at most these are classified again after an interruption."""
    top_k: int = Field(1, ge=1)
    """Number of classes to report for each image, the most probable first."""
    min_probability: Fraction = 0.0
    """Images with a lower probability count as uncertain, and --sort-into puts them into a folder of their own."""
    safe_csv: bool = False
    """Write a .csv for spreadsheets: byte order mark, and an apostrophe before text that looks like a formula."""
    sort_into: UserPath | None = None
    """Folder to sort the files into, one subfolder per class, as hard links or, on another disk, copies."""
    report: UserPath | None = None
    """Contact sheet to write: an .html page with counts, pictures of every class, and errors."""
    max_failure_rate: Fraction = 0.1
    """Largest fraction of files that may fail. If more do, the table is complete but the exit status is 3."""

    @model_validator(mode="before")
    @classmethod
    def _list_needs_no_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("files") and not values.get("folder"):
            return {**values, "folder": "."}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.output is not None and Path(self.output).suffix not in (".csv", ".jsonl", ".parquet"):
            raise ValueError(f"output must end in .csv, .jsonl or .parquet, received {self.output!r}")
        if self.safe_csv and self.output is not None and Path(self.output).suffix != ".csv":
            raise ValueError(f"safe_csv needs a table that ends in .csv, received {self.output!r}")
        if self.report is not None and Path(self.report).suffix not in (".html", ".htm"):
            raise ValueError(f"report must end in .html, received {self.report!r}")
        if self.retry_failed and self.incremental:
            raise ValueError("incremental classifies failed files again too; leave out retry_failed")
        if (self.retry_failed or self.incremental) and self.output is None:
            mode = "retry_failed" if self.retry_failed else "incremental"
            raise ValueError(f"{mode} needs output: name the table to update")
        if self.retry_failed and (self.files or self.include or self.exclude):
            raise ValueError("retry_failed takes its files from the table; leave out files, include and exclude")
        return self

    @property
    def replaces_output(self) -> bool:
        """Whether existing files at `output` and `report` may be replaced."""
        return self.overwrite or self.retry_failed or self.incremental


_BOUNDS: Final = {"greater": "at least", "less": "at most"}

SettingsT = TypeVar("SettingsT", bound=Settings)


def validate_settings(
    model: type[SettingsT], values: dict[str, Any], origin: str, options: Mapping[tuple[str, ...], str] | None = None
) -> SettingsT:
    """Build settings from plain values.

    Args:
        origin: where the values come from, for the message, such as a file's name.
        options: name of the option for each value that came from the command line, by the keys that lead to it.
    Raises:
        ConfigError: a value is not valid; names the first one, what it received and what it must be.
        UsageError: the same, for a value from the command line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        keys = tuple(key for key in first["loc"] if isinstance(key, str))
        option = next((name for place, name in (options or {}).items() if keys[: len(place)] == place), None)
        message = _say_what_is_wrong(first, option or ".".join(map(str, first["loc"])) or "settings")
        message = " ".join(message.split())
        if option is not None or origin == COMMAND_LINE:
            raise UsageError(message) from error
        raise ConfigError(f"{message}, in {origin}") from error


def _say_what_is_wrong(error: ErrorDetails, name: str) -> str:
    received = one_line(repr(error["input"]))
    match error["type"]:
        case "value_error":  # raised in this module, and complete
            return str(error["ctx"]["error"])
        case "extra_forbidden":
            return f"no setting is called {name}; see --help for their names"
        case "missing":
            return f"{name} is missing; give it"
        case "model_type":
            problem = "must be a table of settings"
        case "string_pattern_mismatch":
            problem = _PATTERNS_IN_WORDS[error["ctx"]["pattern"]]
        case _:
            problem = re.sub(r"^\w+ should ", "must ", error["msg"]).partition(", unable to parse")[0]
            problem = re.sub("(greater|less) than or equal to", lambda found: _BOUNDS[found[1]], problem)
    return f"{name} {problem}, received {received}"


def load_toml(model: type[SettingsT], path: Path) -> SettingsT:
    """Read settings from a TOML file; settings that are not in it have their defaults.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a value that is not valid.
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


_RENAMED: Final[Mapping[tuple[str, ...], str]] = {("prepare", "seed"): "split_seed"}
"""Option names, with `_` for `-`, of settings whose plain name would be taken twice, by their keys."""

_SHORT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {"top_k": ("--topk",)}
"""Further names of an option: help shows them, messages use the plain one."""


def takes_settings(
    model: type[Settings], argument: str, sections: tuple[str, ...] = (), tables: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Fill a command's parameter `settings` from options and from a `--config` file, over which options win.

    Args:
        model: class of the settings.
        argument: field that is the command's one positional argument.
        sections: fields of `model` that are settings themselves and become options; none for a flat model.
        tables: the command takes a list of settings, and its file may have several: `[tables.NAME]` for each, with
            sections or, outside of them, names of options. NAME is the default of `name` and of the argument.
    """
    places: dict[tuple[str, ...], FieldInfo] = {}
    for section in sections or (None,):
        owner: Any = model.model_fields[section].annotation if section else model
        places |= {(section, name) if section else (name,): field for name, field in owner.model_fields.items()}
    offered = {_RENAMED.get(place, place[-1]): (place, field) for place, field in places.items()}

    def merge(loaded: dict[str, Any], values: dict[str, Any], *, replace: bool = True) -> None:
        for name, value in values.items():
            place, _ = offered[name]
            table = loaded.setdefault(place[0], {}) if sections else loaded
            if isinstance(table, dict) and (replace or place[-1] not in table):  # else validation tells what is there
                table[place[-1]] = value

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, config: Path | None, **values: Any) -> None:
            given = {name: value for name in offered if (value := values.pop(name)) is not None}
            options = {offered[name][0]: name.upper() if name == argument else _option(name) for name in given}

            loaded = read_toml(config) if config else {}
            found = {str(config) if config else COMMAND_LINE: loaded}
            if tables in loaded:
                if alone := [options[offered[name][0]] for name in (argument, "name") if name in given]:
                    problem = f"leave it out, {config} has them in [{tables}.NAME]"
                    raise UsageError(f"{alone[0]} is for one dataset; {problem}")
                named = loaded.pop(tables)
                if loaded or not (
                    isinstance(named, dict) and named and all(type(each) is dict for each in named.values())
                ):
                    raise ConfigError(f"{config} must have a table [{tables}.NAME] for each dataset, and nothing else")
                for name, table in named.items():
                    merge(table, {each: table.pop(each) for each in offered if each in table})
                    merge(table, {argument: name, "name": name}, replace=False)
                found = {f"[{tables}.{name}] of {config}": table for name, table in named.items()}
            settings = []
            for origin, table in found.items():
                merge(table, given)
                settings.append(validate_settings(model, table, origin, options))
            function(settings=settings[0] if tables is None else settings, **values)

        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [_parameter(name, field, name == argument) for name, (_, field) in offered.items()]
        parameters.sort(key=lambda each: each.name != argument)  # the positional one first
        set_signature(run, [*parameters, _CONFIG, *(each for each in own if each.name != "settings")])
        return run

    return decorate


def set_signature(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function the keyword parameters that typer turns into options."""
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    function.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in keywords}


_keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=None)
_CONFIG: Final = _keyword(
    "config",
    annotation=Annotated[Path | None, typer.Option("--config", help="TOML file of settings. Options override it.")],
)


def _parameter(name: str, field: FieldInfo, positional: bool) -> inspect.Parameter:
    """Return the parameter that typer turns into the option or argument of a field; None stands for not given."""
    help_text = " ".join((field.description or "").split())
    kind = _plain_type(field.annotation)
    metavar, between = None, "x"
    if typing.get_origin(kind) is list:
        help_text += " [repeatable]"
        metavar, between = f"<{typing.get_args(kind)[0].__name__}>", ", "
    if not field.is_required() and field.default not in (None, ()) and "Default:" not in help_text:
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        shown = between.join(map(str, default))
        help_text += f" [default: {shown.lower() if kind is bool else shown}]"
    details: Any
    if positional:  # optional even where the setting is not: the --config file may have it
        kind, details = str, typer.Argument(help=help_text, show_default=False, metavar=name.upper())
    else:
        option = _option(name)
        names = (f"{option}/--no-{option.removeprefix('--')}" if kind is bool else option, *_SHORT_NAMES.get(name, ()))
        details = typer.Option(*names, help=help_text, show_default=False, metavar=metavar)
    return _keyword(name, annotation=Annotated[kind | None, details])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain_type(annotation: Any) -> Any:
    """Return the type that the command line parses: int, float, bool, text, or a list for a tuple of any length."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return list[_plain_type(arguments[0])]  # type: ignore[misc]
    if origin is Annotated:
        return _plain_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _plain_type(next(each for each in arguments if each is not type(None)))
    return annotation if annotation in (int, float, bool) else str
