"""The command line as a user meets it: exit statuses, one-line errors, `--json`, help."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import write_digits
from typer.testing import CliRunner, Result

from cnnpipe import __version__
from cnnpipe.cli import app
from cnnpipe.machine import usable_cores
from cnnpipe.prepare.dataset import PreparedDataset, prepare_dataset
from cnnpipe.registry import champion_run, list_runs
from cnnpipe.settings import PrepareSettings, RetrainSettings, TrainSettings, load_toml
from cnnpipe.train.backend import keras

COMMANDS = ["prepare", "train", "evaluate", "plot", "export", "classify", "doctor", "models list", "models show",
            "models diff", "models promote", "models rollback"]  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def last_json(result: Result) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return value


def write_images(digits: PreparedDataset, folder: Path) -> None:
    """Write the test images into a folder for each class."""
    labels = digits.labels("test")
    for index, image in enumerate(digits.images("test")):
        file = folder / digits.class_names[labels[index]] / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def assert_one_line_error(result: Result, status: int, *words: str) -> None:
    assert result.exit_code == status, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_each_option_in_at_most_two_lines(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=120)
    assert result.exit_code == 0
    for option in re.split(r"\n  (?=--)", result.stdout.rstrip())[1:]:
        first, *others = option.splitlines()
        beside_its_name = bool(re.search(r"\S {2,}\S", first))
        assert len(others) + beside_its_name in (1, 2), option


def test_version_is_the_packages() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"cnnpipe {__version__}\n")


@pytest.mark.parametrize("model", [PrepareSettings, TrainSettings])
def test_every_setting_is_an_option(model: type[PrepareSettings | TrainSettings]) -> None:
    text = run("train", "--help").stdout
    for name in model.model_fields:
        if name != "dataset":
            assert f"--{name.replace('_', '-')}" in text


def test_stages_run_by_hand_make_a_complete_run_and_a_champion(data: Path, tmp_path: Path) -> None:
    places = ["--artifacts", str(tmp_path / "artifacts")]
    prepared = last_json(run("prepare", "digits", "--data", data, "--json"))
    trained = run("train", "digits", "--data", data, *places, "--epochs", "3", "--json")
    folder = last_json(trained)["run"]

    assert prepared["num_images"] == {"train": 1151, "val": 287, "test": 359}
    assert "epoch 3/3" in trained.stderr
    assert last_json(run("evaluate", folder, *places, "--json"))["accuracy"] > 0.5
    assert len(run("plot", folder, *places).stdout.splitlines()) == 5
    assert last_json(run("export", folder, *places, "--json"))["parity"]["agreement"] == 1.0
    assert last_json(run("models", "promote", folder, *places, "--json"))["promoted"] is True
    assert champion_run(tmp_path / "artifacts", "digits") == Path(folder)


def test_a_settings_file_may_hold_some_settings_or_all_of_them(artifacts: Path, photos: Path, tmp_path: Path) -> None:
    some, whole = tmp_path / "some.toml", tmp_path / "whole.toml"
    some.write_text("top_k = 3\n")
    whole.write_text(f'folder = "{photos}"\ntop_k = 2\n')

    for number, arguments in enumerate(([photos, "--config", some], ["--config", whole])):
        output = tmp_path / str(number) / "table.csv"
        result = run("classify", *arguments, "--artifacts", artifacts, "--output", output, "--json")
        assert last_json(result)["top_k"] == 3 - number


def test_options_override_a_settings_file_and_the_run_and_its_dataset_are_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    write_digits(Path("small"), range(150))
    prepare = '[prepare]\ndataset = "small"\nimage_size = "8x8"\nmin_images_per_class = 1\n'
    Path("nightly.toml").write_text(f"{prepare}[train]\nepochs = 9\nseed = 4\n")
    trained = run("train", "--config", "nightly.toml", "--epochs", "1", "--data", data, "--json")
    folder = Path(last_json(trained)["run"])
    assert not folder.is_absolute()
    settings = load_toml(RetrainSettings, folder / "config.toml")
    assert (settings.train.epochs, settings.train.seed) == (1, 4)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluated = run("evaluate", tmp_path / folder, "--data", data, "--json")
    prepared = run("prepare", "--config", tmp_path / folder / "config.toml", "--data", data, "--json")
    assert last_json(evaluated)["num_images"] == last_json(prepared)["num_images"]["test"]
    assert [Path(last_json(prepared)["path"])] == list(data.glob("prepared/*"))


def test_a_training_is_refused_before_it_begins_if_its_data_or_its_champion_are_not_as_they_were(
    artifacts: Path, tmp_path: Path
) -> None:
    write_digits(tmp_path / "photos", range(150))
    shutil.rmtree(tmp_path / "photos" / "7")
    options = ("--name", "digits", "--min-images-per-class", "1", "--artifacts", artifacts, "--data", tmp_path / "data")
    result = run("train", tmp_path / "photos", *options)
    assert_one_line_error(result, 1, "the classes are not those of the champion", "gone: 7 (same_classes)", "restore")
    (artifacts / "digits" / "champion").write_text("nonsense\n")
    assert_one_line_error(run("train", tmp_path / "photos", *options), 1, "names the run 'nonsense'", "or delete it")
    assert len(list_runs(artifacts, "digits")) == 1


def test_a_complete_run_is_not_changed(artifacts: Path) -> None:
    for command in ("plot", "export"):
        assert_one_line_error(run(command, "digits", "--artifacts", artifacts), 1, "is complete", "train again")


def test_evaluate_takes_the_runs_own_settings(artifacts: Path) -> None:
    champion = champion_run(artifacts, "digits")
    assert champion is not None
    (champion / "manifest.json").unlink()
    config = champion / "config.toml"
    config.write_text(config.read_text().replace("top_k = 5", "top_k = 3"))

    assert last_json(run("evaluate", champion, "--artifacts", artifacts, "--json"))["top_k"] == 3
    assert last_json(run("evaluate", champion, "--top-k", "2", "--artifacts", artifacts, "--json"))["top_k"] == 2


def test_evaluate_scores_keras_onnx_run_and_champion_alike(artifacts: Path, finished_run: Path, data: Path) -> None:
    metrics = json.loads((finished_run / "metrics.json").read_text())
    before = {file.name: file.stat().st_mtime_ns for file in finished_run.iterdir()}

    for model in ("digits", finished_run, finished_run / "model.keras", finished_run / "model.onnx"):
        figures = last_json(run("evaluate", model, "--artifacts", artifacts, "--data", data, "--json"))
        assert figures["accuracy"] == metrics["accuracy"]
        assert figures["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert {file.name: file.stat().st_mtime_ns for file in finished_run.iterdir()} == before


def test_evaluate_takes_any_dataset(artifacts: Path, data: Path) -> None:
    result = run("evaluate", "digits", "--dataset", "digits", "--artifacts", artifacts, "--data", data, "--json")
    assert last_json(result)["num_images"] == 359


def test_evaluate_splits_another_dataset_as_the_runs_own_was(artifacts: Path, tmp_path: Path) -> None:
    folder = list_runs(artifacts, "digits")[0]
    config = folder / "config.toml"
    text = config.read_text()
    assert text.count("\n[train]") == 1
    head, tail = text.split("\n[train]")
    config.write_text(re.sub(r"(?m)^seed = 0$", "seed = 5", head) + "\n[train]" + tail)

    options = ("--dataset", "digits", "--data", tmp_path / "data", "--json")
    result = run("evaluate", folder / "model.onnx", *options)

    assert result.exit_code == 0, result.output
    (prepared,) = (tmp_path / "data" / "prepared").glob("digits-*")
    expected = prepare_dataset(PrepareSettings(seed=5), tmp_path / "expected")
    assert prepared.name == expected.path.name  # of the fingerprint, in which the split has a part


def write_classes(digits: PreparedDataset, root: Path, classes: str, number: int) -> None:
    """Write the first `number` test images of some classes, each into the folder of its class."""
    labels, images = digits.labels("test"), digits.images("test")
    for label in map(int, classes):
        (root / str(label)).mkdir(parents=True)
        for index in np.flatnonzero(labels == label)[:number]:
            Image.fromarray(images[index]).save(root / str(label) / f"{index}.png")


@pytest.mark.parametrize(
    ("folders", "num_images"),
    [
        ({"": ("0123456789", 2)}, 20),
        ({"": ("37", 30)}, 60),
        ({"": ("3", 1)}, 1),
        ({"test": ("0123456789", 2)}, 20),
        ({"train": ("0123456789", 3), "test": ("37", 2)}, 4),
        ({"train": ("0123456789", 3), "val": ("37", 2)}, 34),
    ],
    ids=str,
)
def test_evaluate_scores_all_images_of_a_folder_or_those_of_its_test(
    artifacts: Path, digits: PreparedDataset, tmp_path: Path, folders: dict[str, tuple[str, int]], num_images: int
) -> None:
    for place, (classes, number) in folders.items():
        write_classes(digits, tmp_path / "写真" / place, classes, number)
    places = ("--artifacts", artifacts, "--data", tmp_path / "data")

    result = run("evaluate", "digits", "--dataset", tmp_path / "写真", *places, "--json")

    assert result.exit_code == 0, result.output
    assert last_json(result)["num_images"] == num_images
    assert last_json(result)["accuracy"] > 0.7
    assert f"on {num_images} images of" in result.stderr
    assert not list((tmp_path / "data" / "prepared").iterdir())


def test_evaluate_says_how_many_images_the_model_has_learned(
    artifacts: Path, digits: PreparedDataset, tmp_path: Path
) -> None:
    write_classes(digits, tmp_path / "hold", "0", 2)
    for index, image in enumerate(digits.images("train")[:3]):
        Image.fromarray(image).save(tmp_path / "hold" / "0" / f"learned {index}.png")
    options = ("--dataset", tmp_path / "hold", "--artifacts", artifacts, "--data", tmp_path / "data")
    assert "the model was trained on 3 of these images" in run("evaluate", "digits", *options).stderr


def test_evaluate_leaves_out_what_it_cannot_read_and_says_so(
    artifacts: Path, photos: Path, digits: PreparedDataset, tmp_path: Path
) -> None:
    (photos / next(iter(digits.class_names)) / "notes.png").write_text("no image")
    result = run("evaluate", "digits", "--dataset", photos, "--artifacts", artifacts, "--data", tmp_path, "--json")

    assert last_json(result)["num_images"] == 12
    for told in ("1 of 13 files are unreadable", "notes.png (not_an_image)", "zz-notes.png"):
        assert told in result.stderr


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({"": "0", "cat": "1"}, ("cat", "does not have", "0, 1, 2, 3, 4, …")),
        ({"test/dog": "0", "test/cat": "1", "train": "01"}, ("cat, dog", "does not have")),
        ({"train/x/y": "0", "other": "1"}, ("other, train", "does not have")),
    ],
    ids=str,
)
def test_evaluate_names_the_classes_that_the_model_does_not_know(
    artifacts: Path, digits: PreparedDataset, tmp_path: Path, folders: dict[str, str], words: tuple[str, ...]
) -> None:
    for place, classes in folders.items():
        write_classes(digits, tmp_path / "hold" / place, classes, 1)
    options = ("--dataset", tmp_path / "hold", "--artifacts", artifacts, "--data", tmp_path / "data")
    assert_one_line_error(run("evaluate", "digits", *options), 1, *words)


def test_evaluate_takes_a_prepared_dataset_and_only_the_test_images_of_the_runs_own_folder(
    artifacts: Path, digits: PreparedDataset, tmp_path: Path
) -> None:
    options = ("--artifacts", artifacts, "--data", tmp_path / "data", "--json")
    assert last_json(run("evaluate", "digits", "--dataset", digits.path, *options))["num_images"] == 359

    write_images(digits, tmp_path / "own")
    environment = list_runs(artifacts, "digits")[0] / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"source": str(tmp_path / "own")}))
    result = run("evaluate", "digits", "--dataset", tmp_path / "own", *options)
    assert 60 < last_json(result)["num_images"] < 80  # a fifth of them: the others are what it was trained on
    assert "test images of own" in result.stderr


def test_a_home_of_nobody_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_one_line_error(run("prepare", "~no-such-user/photos", "--data", tmp_path), 1, "~no-such-user/photos")
    assert_one_line_error(run("models", "show", "~no-such-user/run", "--artifacts", tmp_path), 1, "~no-such-user/run")
    assert_one_line_error(run("classify", "~no-such-user/photos", "--artifacts", tmp_path), 1)


def test_a_run_outside_a_registry_is_not_promoted(artifacts: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(list_runs(artifacts, "digits")[0], tmp_path / "copy"))
    before = {file.name: file.read_bytes() for file in copy.iterdir()}

    for force in ([], ["--force"]):
        result = run("models", "promote", copy, *force, "--artifacts", artifacts)
        assert_one_line_error(result, 1, "is not in <artifacts>/<name>/runs")
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert not (tmp_path / ".lock").exists()


def test_classify_gives_a_row_for_every_file(artifacts: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "table.csv"

    result = run("classify", photos, "--artifacts", artifacts, "--output", output, "--json")

    assert result.exit_code == 0, result.output
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    assert [row["status"] for row in rows].count("error") == 1
    assert rows[-1]["path"] == "zz-notes.png"
    assert rows[-1]["error"].startswith("not_an_image")
    summary = last_json(result)
    assert (summary["found"], summary["ok"], summary["error"]) == (13, 12, 1)
    assert json.loads((tmp_path / "table.csv.summary.json").read_text())["device"] == "cpu"


def test_the_tables_accuracy_is_the_metrics_accuracy(
    artifacts: Path, finished_run: Path, digits: PreparedDataset, tmp_path: Path
) -> None:
    folder, output = tmp_path / "test", tmp_path / "table.csv"
    write_images(digits, folder)

    run("classify", folder, "--artifacts", artifacts, "--output", output, "--precision", "fp32")

    with output.open(newline="") as file_of_rows:
        right = [row["label"] == row["path"].split("/")[0] for row in csv.DictReader(file_of_rows)]
    assert sum(right) / len(right) == json.loads((finished_run / "metrics.json").read_text())["accuracy"]


@pytest.mark.skipif(sys.platform == "darwin", reason="names are text there")
def test_folders_whose_names_are_not_text_are_used_as_they_are(artifacts: Path, photos: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/F\xe9"))
    odd.mkdir()
    photos = photos.rename(odd / "photos")
    (photos / "zz-notes.png").unlink()
    artifacts = artifacts.rename(odd / "artifacts")
    table = odd / "out" / os.fsdecode(b"t\xe8.csv")
    sorted_into, report = odd / "sorted", odd / "report.html"
    result = run(
        "classify", photos, "--output", table, "--sort-into", sorted_into, "--report", report, "--artifacts", artifacts
    )
    assert result.exit_code == 0, result.output
    assert table.is_file()
    assert report.is_file()
    assert len([path for path in sorted_into.rglob("*.png") if path.is_file()]) == 12
    for command in (["evaluate", "digits"], ["models", "show", "digits"], ["doctor"]):
        result = run(*command, "--artifacts", artifacts, "--json")
        assert result.exit_code == 0, result.output


def test_too_many_failures_end_with_status_3_and_a_complete_table(
    artifacts: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table.jsonl"
    options = ["--artifacts", artifacts, "--output", output, "--max-failure-rate", "0.05"]

    result = run("classify", photos, *options)
    assert_one_line_error(result, 3, "1 of 13", "zz-notes.png")
    assert result.stdout.splitlines()[-1] == str(output)
    summary = last_json(run("classify", photos, *options, "--overwrite", "--json"))
    assert (summary["status"], summary["error"]) == ("too_many_failures", 1)
    assert len(output.read_text().splitlines()) == 13


def test_models_lists_shows_promotes_and_rolls_back(artifacts: Path) -> None:
    first = champion_run(artifacts, "digits")
    assert first is not None
    second = first.with_name("20990101T000000Z")
    shutil.copytree(first, second)
    places = ["--artifacts", str(artifacts)]

    listing = run("models", "list", *places)
    assert listing.stdout.splitlines()[0].split() == ["NAME", "RUN", "PRESET", "ACCURACY", "STATE"]
    assert [line.split()[-4] for line in listing.stdout.splitlines()[1:]] == [second.name, first.name]
    assert listing.stdout.splitlines()[2].startswith("*")
    assert first.name in run("models", "show", "digits", *places).stdout

    assert "unchanged: it is the same model as" in run("models", "promote", second, *places).stdout
    assert run("models", "promote", second, "--force", *places).exit_code == 0
    assert champion_run(artifacts, "digits") == second
    back = run("models", "rollback", "digits", *places)
    assert back.exit_code == 0
    assert champion_run(artifacts, "digits") == first
    assert_one_line_error(run("models", "rollback", "digits", *places), 1, "no earlier champion")


def test_a_refused_run_is_promoted_only_by_force(artifacts: Path) -> None:
    first = champion_run(artifacts, "digits")
    assert first is not None
    second = first.with_name("20990101T000000Z")
    shutil.copytree(first, second)
    decision = json.loads((second / "promotion.json").read_text())
    refusal = {"promoted": False, "state": "NotPromoted", "reason": "too bad"}
    (second / "promotion.json").write_text(json.dumps(decision | refusal))

    refused = run("models", "promote", second, "--artifacts", artifacts)
    assert "not promoted: too bad" in refused.stdout
    assert champion_run(artifacts, "digits") == first

    run("models", "promote", second, "--force", "--reason", "the classes changed", "--artifacts", artifacts)
    assert champion_run(artifacts, "digits") == second


def test_a_champion_that_is_gone_is_replaced_by_force(artifacts: Path) -> None:
    first = champion_run(artifacts, "digits")
    assert first is not None
    (artifacts / "digits" / "champion").write_text("20200101T000000Z\n")
    places = ["--artifacts", str(artifacts)]

    assert_one_line_error(run("classify", "x", "--model", "digits", *places), 1, "does not exist")
    assert_one_line_error(run("evaluate", "digits", *places), 1, "20200101T000000Z", "--force")
    assert "digits" in run("models", "list", *places).stdout
    assert run("models", "promote", first, "--force", *places).exit_code == 0
    assert champion_run(artifacts, "digits") == first


def test_a_damaged_run_does_not_hide_the_others(artifacts: Path) -> None:
    first = champion_run(artifacts, "digits")
    assert first is not None
    second = first.with_name("20990101T000000Z")
    shutil.copytree(first, second)
    (second / "manifest.json").write_text("{")

    rows = last_json(run("models", "list", "--artifacts", artifacts, "--json"))["runs"]
    assert [row["state"] for row in rows] == ["damaged", "passed"]


def test_no_runs_are_an_empty_list_but_a_wrong_name_is_an_error(artifacts: Path, tmp_path: Path) -> None:
    assert last_json(run("models", "list", "--artifacts", tmp_path / "none", "--json"))["runs"] == []
    assert_one_line_error(run("models", "list", "pets", "--artifacts", artifacts), 1, "'pets'", "digits")


def test_doctor_tells_devices_versions_and_champions(artifacts: Path) -> None:
    report = last_json(run("doctor", "--artifacts", artifacts, "--json"))

    assert report["artifacts"]["champions"] == {"digits": champion_run(artifacts, "digits").name}  # type: ignore[union-attr]
    assert report["versions"]["keras"].startswith("3.")
    assert report["cores"] == usable_cores()
    assert "devices" in report


def test_doctor_without_a_server_says_so(artifacts: Path) -> None:
    result = run("doctor", "--artifacts", artifacts)
    assert re.search(r"^nightly\.server +not running$", result.stdout, re.MULTILINE)
    assert last_json(run("doctor", "--artifacts", artifacts, "--json"))["nightly"]["next_runs"] == {}


def test_doctor_tells_a_broken_champion_alias_and_fails(artifacts: Path) -> None:
    (artifacts / "pets" / "runs").mkdir(parents=True)
    (artifacts / "pets" / "champion").write_text("nonsense\n")

    result = run("doctor", "--artifacts", artifacts, "--json")
    assert_one_line_error(result, 1, "pets/champion", "nonsense", "models promote")
    report = last_json(result)
    assert report["status"] == "failed"
    assert list(report["artifacts"]["champions"]) == ["digits"]
    (problem,) = report["artifacts"]["problems"].values()
    assert "nonsense" in problem

    (artifacts / "pets" / "champion").unlink()
    assert run("doctor", "--artifacts", artifacts).exit_code == 0


def test_doctor_with_json_has_every_check(artifacts: Path) -> None:
    report = last_json(run("doctor", "--artifacts", artifacts, "--json"))
    assert report["status"] == "ok"
    assert all(set(check) == {"name", "ok", "text"} and check["ok"] for check in report["checks"])
    names = [check["name"] for check in report["checks"]]
    machine = ["python", "packages", "onnxruntime", "cuda", "disk"]
    assert names == [*machine, "champion of digits", "server", "schedule"]


def test_doctor_names_the_files_of_a_champion_that_changed_and_the_way_back(artifacts: Path) -> None:
    champion = champion_run(artifacts, "digits")
    assert champion is not None
    (champion / "model.onnx").write_bytes((champion / "model.onnx").read_bytes()[:-1] + b"x")
    (champion / "loss.png").unlink()
    result = run("doctor", "--artifacts", artifacts)
    assert_one_line_error(
        result,
        1,
        "champion of digits: these files of ",
        "in manifest.json: loss.png, model.onnx; ",
        "cnnpipe models rollback digits",
    )
    assert "\nproblem: champion of digits: these files of " in result.stdout


def make_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(root / name / f"{index}.png")
    return root


class TestBadInput:
    def test_wrong_path(self, tmp_path: Path) -> None:
        missing = tmp_path / "nowhere"
        assert_one_line_error(run("train", missing, "--data", tmp_path), 1, "nowhere")
        assert_one_line_error(run("classify", missing, "--artifacts", tmp_path), 1, "nowhere", "does not exist")

    def test_empty_folder(self, tmp_path: Path, artifacts: Path) -> None:
        (tmp_path / "void").mkdir()
        assert_one_line_error(run("train", tmp_path / "void", "--data", tmp_path), 1, "void")
        assert_one_line_error(run("classify", tmp_path / "void", "--artifacts", artifacts), 1, "no files in")

    def test_one_class_only(self, tmp_path: Path) -> None:
        folder = make_classes(tmp_path / "pets", {"cat": 20})
        assert_one_line_error(run("prepare", folder, "--data", tmp_path), 1, "cat")

    def test_class_without_images(self, tmp_path: Path) -> None:
        folder = make_classes(tmp_path / "pets", {"cat": 20, "dog": 20, "eel": 0})
        assert_one_line_error(run("prepare", folder, "--data", tmp_path), 1, "eel")

    def test_a_model_that_is_no_model(self, tmp_path: Path, photos: Path) -> None:
        fake = tmp_path / "fake.onnx"
        fake.write_text("not a model")
        assert_one_line_error(run("classify", photos, "--model", fake), 1, "fake.onnx")
        assert_one_line_error(run("classify", photos, "--model", photos / "zz-notes.png"), 1, "is not a model")
        assert_one_line_error(run("classify", photos, "--model", "nobody", "--artifacts", tmp_path), 1, "nobody")
        fake_keras = tmp_path / "fake.keras"
        fake_keras.write_text("not a model")
        assert_one_line_error(run("evaluate", fake_keras, "--dataset", "digits", "--data", tmp_path), 1, "fake.keras")

    def test_a_wrong_value_is_a_usage_error(self, tmp_path: Path, photos: Path) -> None:
        assert_one_line_error(run("train", "--epochs", "0"), 2, "epochs", "0")
        assert_one_line_error(run("prepare", "--image-size", "big"), 2, "--image-size must be HEIGHTxWIDTH", "big")
        assert_one_line_error(run("classify", photos, "--output", "table.xls"), 2, ".csv, .jsonl or .parquet")
        assert run("train", "--no-such-option").exit_code == 2

    def test_a_wrong_settings_file(self, tmp_path: Path) -> None:
        config = tmp_path / "settings.toml"
        config.write_text("[train]\nepoch = 3\n")
        assert_one_line_error(run("train", "--config", config), 1, "no setting is called train.epoch", "settings.toml")

    def test_errors_are_json_too_where_json_is_asked_for(self, tmp_path: Path) -> None:
        result = run("classify", tmp_path / "nowhere", "--json")
        assert last_json(result)["status"] == "failed"
        assert last_json(result)["kind"] == "DatasetError"

    def test_what_nobody_foresaw_is_one_line_too(self) -> None:
        assert_one_line_error(run("classify", "x" * 300), 1, "File name too long")

    def test_an_error_deep_in_keras_is_one_line_that_names_the_file_with_all_of_it(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pixels = keras.Input((32, 32, 3), dtype="uint8")
        values = keras.layers.Flatten()(keras.layers.Embedding(10, 2)(pixels))  # which pixels above 9 are not in
        keras.Model(pixels, keras.layers.Dense(10)(values)).save(tmp_path / "model.keras")
        temporary = tmp_path / ("long " * 40).strip()
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))

        result = run("evaluate", tmp_path / "model.keras", "--dataset", "digits", "--data", data, "--json")

        (file,) = temporary.iterdir()
        assert_one_line_error(result, 1, "error: unexpected InvalidArgumentError: ", f"; the whole error is in {file}")
        (line,) = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
        assert last_json(result)["error"] == line.removeprefix("error: ")
        assert len(line) <= max(300, len(str(file)) + 100)
        whole = file.read_text()
        assert "in predict_on_batch" in whole
        assert "is not in [0, 10)" in whole
        assert f"keras {keras.__version__}" in whole
        assert whole.splitlines()[0].startswith(sys.argv[0])

    def test_a_long_value_is_cut_where_an_error_repeats_it(self, tmp_path: Path) -> None:
        (tmp_path / "settings.toml").write_text(f"[train]\nepochs = '{'9' * 5000}'\n")
        result = run("train", "--config", tmp_path / "settings.toml")
        assert_one_line_error(result, 1, "train.epochs", "settings.toml")
        assert len(result.stderr) < 500

    def test_a_folder_without_a_usable_name_needs_one(self, tmp_path: Path) -> None:
        make_classes(tmp_path / "写真", {"cat": 20, "dog": 20})
        assert_one_line_error(run("prepare", tmp_path / "写真", "--data", tmp_path), 2, "--name")

    def test_a_traceback_is_shown_only_with_debug(self, tmp_path: Path) -> None:
        assert "Traceback" in run("classify", tmp_path / "nowhere", "--debug").stderr

    def test_an_unwritable_place_is_one_line(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        result = run("train", "digits", "--epochs", "1", "--data", data, "--artifacts", tmp_path / "file" / "below")
        assert_one_line_error(result, 1, "cannot write")


def test_a_signal_ends_training_with_one_line_and_its_status(
    data: Path, digits: PreparedDataset, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cnnpipe.cli", "train", "digits", "--epochs", "1000"]
    process = subprocess.Popen(
        [*command, "--data", str(data), "--artifacts", str(tmp_path / "artifacts")],
        stderr=subprocess.PIPE,
        text=True,
    )
    history = tmp_path / "artifacts" / "digits" / "runs"
    while process.poll() is None and not list(history.glob("*/history.csv")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 143
    assert stderr.splitlines()[-1] == "ended by SIGTERM; finished work is kept"
    assert "Traceback" not in stderr
    assert list(history.glob("*/model.keras"))
    assert not list(history.glob("*/manifest.json"))
    assert not list(history.glob("*/.*"))
