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
    PrepareSettings,
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
        (RetrainSettings, {"train": {"epochz": 3}}, r"^no setting is called train\.epochz, in x\.toml; see"),
        (RetrainSettings, {"trian": {}}, r"^no setting is called trian, in x\.toml"),
        (TrainSettings, {"epochs": 0}, r"^epochs: .*greater than or equal to 1, received 0, in x\.toml$"),
        (TrainSettings, {"epochs": "many"}, r"^epochs: .*valid integer.*, received 'many', in x\.toml$"),
        (TrainSettings, {"device": "gpu"}, r"^device: .*received 'gpu'"),
        (
            TrainSettings,
            {"preset": "huge"},
            r"^preset: Input should be 'baseline', 'fast' or 'accurate', received 'huge'",
        ),
        (PrepareSettings, {"image_size": [4, 32]}, r"^image_size\.0: .*equal to 8, received 4"),
        (PrepareSettings, {"val_fraction": float("nan")}, r"^val_fraction: .*received nan"),
        (PrepareSettings, {"max_imbalance": float("inf")}, r"^max_imbalance: .*finite number, received inf"),
        (PrepareSettings, {"name": "../up"}, r"^name: .*received '\.\./up'"),
        (PrepareSettings, {"name": "two\nlines"}, r"^name: .*received 'two\\nlines'"),
        (ClassifySettings, {}, r"^folder is missing in x\.toml; give it$"),
        (
            ClassifySettings,
            {"folder": "photos", "output": "table.xlsx"},
            r"^output must end in \.csv, \.jsonl or \.parquet, received 'table\.xlsx', in x\.toml$",
        ),
    ],
)
def test_wrong_setting_is_named_with_what_was_received(
    model: type[Settings], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate_settings(model, values, "x.toml")
    assert "\n" not in str(caught.value)


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
    for model in (*Settings.__subclasses__(),):
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
            assert field.description or nested, f"{model.__name__}.{name}"
            assert not set("<>") & set(field.description or ""), f"{model.__name__}.{name}"
