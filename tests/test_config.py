"""Settings: what is written is read back, and what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cnnpipe.errors import ConfigError
from cnnpipe.settings import (
    ClassifySettings,
    EvaluateSettings,
    ExportSettings,
    PrepareSettings,
    PromoteSettings,
    RetrainSettings,
    Settings,
    TrainSettings,
    dump_toml,
    load_toml,
    validate_settings,
)


def _round_trip(settings: Settings, folder: Path) -> Settings:
    path = folder / "config.toml"
    path.write_text(dump_toml(settings), encoding="utf-8")
    return load_toml(type(settings), path)


def test_defaults_survive_toml(tmp_path: Path) -> None:
    assert _round_trip(RetrainSettings(), tmp_path) == RetrainSettings()


def test_every_kind_of_value_survives_toml(tmp_path: Path) -> None:
    settings = RetrainSettings(
        prepare=PrepareSettings(dataset='Fotos "groß"\\\n\t日本', name="x.y-z", image_size=(48, 64), val_fraction=0.15),
        train=TrainSettings(epochs=3, learning_rate=1e-05, augment=False, device="cuda:1"),
    )
    assert _round_trip(settings, tmp_path) == settings


@given(st.builds(PrepareSettings, dataset=st.text(st.characters(codec="utf-8"), min_size=1), name=st.just("any")))
def test_any_prepare_settings_survive_toml(tmp_path_factory: pytest.TempPathFactory, settings: PrepareSettings) -> None:
    assert _round_trip(settings, tmp_path_factory.getbasetemp()) == settings


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert load_toml(RetrainSettings, tmp_path / "config.toml") == RetrainSettings()


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (RetrainSettings, {"train": {"epochz": 3}}, "no setting is called train.epochz; see --help for their names"),
        (RetrainSettings, {"trian": {}}, "no setting is called trian; see --help for their names"),
        (RetrainSettings, {"train": 3}, "train must be a table of settings, received 3"),
        (TrainSettings, {"epochs": 0}, "epochs must be at least 1, received 0"),
        (TrainSettings, {"epochs": "many"}, "epochs must be a valid integer, received 'many'"),
        (TrainSettings, {"device": "gpu"}, "device must be auto, cpu, cuda, cuda:N or cuda:all, received 'gpu'"),
        (TrainSettings, {"preset": "huge"}, "preset must be 'baseline', 'fast' or 'accurate', received 'huge'"),
        (PrepareSettings, {"image_size": [4, 32]}, "image_size.0 must be at least 8, received 4"),
        (
            PrepareSettings,
            {"image_size": "4 32"},
            "image_size must be HEIGHTxWIDTH in pixels, such as 32x32, received '4 32'",
        ),
        (PrepareSettings, {"val_fraction": float("nan")}, "val_fraction must be a finite number, received nan"),
        (PrepareSettings, {"max_imbalance": float("inf")}, "max_imbalance must be a finite number, received inf"),
        (
            PrepareSettings,
            {"name": "two\nlines"},
            "name must be at most 64 ASCII letters, digits, `.`, `_` or `-`, and "
            "begin with a letter or digit, received 'two\\nlines'",
        ),
        (ClassifySettings, {}, "folder is missing; give it"),
        (
            ClassifySettings,
            {"folder": "photos", "output": "table.xlsx"},
            "output must end in .csv, .jsonl or .parquet, received 'table.xlsx'",
        ),
    ],
)
def test_wrong_setting_is_named_with_what_was_received(
    model: type[Settings], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_settings(model, values, "x.toml")
    assert str(caught.value) == f"{message}, in x.toml"


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read settings from .*none\.toml: .*; check the path"):
        load_toml(RetrainSettings, tmp_path / "none.toml")


def test_file_that_is_no_toml_is_a_config_error_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train]\nepochs = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 2.*; fix that line"):
        load_toml(RetrainSettings, tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "gr\xf6sse"')
    with pytest.raises(ConfigError, match=r"cannot read settings from .*latin\.toml: .*utf-8"):
        load_toml(RetrainSettings, tmp_path / "latin.toml")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainSettings().epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "digits"),
        ({"dataset": "cifar10"}, "cifar10"),
        ({"dataset": "cifar10", "name": "tutorial"}, "tutorial"),
        ({"dataset": "/data/My Photos (2)/"}, "My-Photos-2"),
        ({"dataset": "/data/" + "x" * 100}, "x" * 64),
        ({"dataset": "/data/.hidden"}, "hidden"),
        ({"dataset": "/data/set/../other"}, "other"),
    ],
)
def test_resolved_name_is_the_given_one_or_made_from_the_dataset(values: dict[str, Any], name: str) -> None:
    assert PrepareSettings(**values).resolved_name == name


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_resolved_name_of_any_folder_is_a_valid_name_or_must_be_given(folder: str) -> None:
    try:
        name = PrepareSettings(dataset=f"/data/{folder}").resolved_name
    except ValidationError:
        return  # tested below
    assert PrepareSettings(name=name).resolved_name == name


@pytest.mark.parametrize("dataset", ["/data/写真", "/data/predictions", "/"])
def test_folder_without_a_usable_name_is_refused_without_name(dataset: str) -> None:
    with pytest.raises(ValidationError, match="no usable name"):
        PrepareSettings(dataset=dataset)
    assert PrepareSettings(dataset=dataset, name="photos").resolved_name == "photos"


def test_every_setting_has_a_description_for_the_form_and_no_html_in_it() -> None:
    for model in (PrepareSettings, TrainSettings, EvaluateSettings, ExportSettings, PromoteSettings, ClassifySettings):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert not set("<>") & set(field.description), f"{model.__name__}.{name}"
