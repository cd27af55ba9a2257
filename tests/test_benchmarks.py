"""The comparison with the peers, on a handful of images and a tiny model; what it measures is real, if of no weight."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image
from typer.testing import CliRunner

from benchmarks import gathering, memory, photos
from benchmarks.__main__ import app
from benchmarks.arithmetic import count_flops
from benchmarks.classification import compare_classification, compare_start_up
from benchmarks.contenders import CNNPIPE, KERAS, LOOPS, Contender, Models, find_models, line_up, read_labels
from benchmarks.limits import both_per_second, measure_decoding, measure_inference, measure_pool
from benchmarks.preset import flops_for_each_image
from benchmarks.processes import run_process
from benchmarks.tables import markdown_lines
from cnnpipe.errors import CnnpipeError
from cnnpipe.images.find import find_files
from cnnpipe.prepare.dataset import PreparedDataset, prepare_dataset
from cnnpipe.settings import PrepareSettings, TrainSettings
from cnnpipe.train.backend import keras
from cnnpipe.train.networks import build_network, measure_input

NUM_IMAGES = 20
DATALOADER = "PyTorch DataLoader, 64"
without_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty digits in class folders."""
    path = tmp_path_factory.mktemp("digits")
    tiny_models.write_digits(path, range(NUM_IMAGES))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny model, which has no other forms."""
    path = tiny_models.write_model(tmp_path_factory.mktemp("model") / "tiny.onnx")
    return find_models(str(path), path.parent)


def contender_named(name: str, models: Models) -> Contender:
    return next(each for each in line_up(models)[0] if each.name == name)


def expected_labels(folder: Path) -> dict[str, str]:
    """Return what NumPy says the tiny model says of each file."""
    paths = list(find_files(folder))
    images = np.stack([np.asarray(Image.open(folder / path).convert("RGB")) for path in paths])
    best = tiny_models.expected_probabilities(images).argmax(axis=1)
    return {path: tiny_models.CLASS_NAMES[index] for path, index in zip(paths, best, strict=True)}


def test_all_commands_are_offered() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(name in shown for name in ("training", "classification", "memory"))


def test_line_up_tells_what_a_lone_model_file_leaves_out(models: Models) -> None:
    contenders, missing = line_up(models)
    assert [each.name for each in contenders] == [CNNPIPE, "one by one", *LOOPS, DATALOADER]
    assert ["int8" in line for line in missing] == [True, False]
    assert KERAS in missing[1]


def test_run_with_int8_is_classified_in_both_precisions(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.int8.onnx"):
        tiny_models.write_model(tmp_path / name)
    for name in ("model.keras", "manifest.json"):
        (tmp_path / name).touch()
    models = find_models(str(tmp_path / "model.onnx"), tmp_path)
    commands = {each.name: each.command(Path("in"), Path("out.csv")) for each in line_up(models)[0]}
    precisions = [command[-1] for command in commands.values() if "--precision" in command]
    assert precisions == ["fp32", "int8"]
    assert KERAS in commands


@pytest.mark.parametrize("name", [CNNPIPE, "one by one"])
def test_contender_labels_every_file_and_times_itself(name: str, folder: Path, models: Models, tmp_path: Path) -> None:
    contender = contender_named(name, models)
    run = run_process(contender.command(folder, tmp_path / "labels.csv"))
    images, work_seconds = contender.work(run.report)
    assert images == NUM_IMAGES
    assert 0 < work_seconds < run.seconds
    assert read_labels(tmp_path / "labels.csv") == expected_labels(folder)


@without_torch
def test_contender_that_cannot_be_imported_says_so(folder: Path, models: Models, tmp_path: Path) -> None:
    run = run_process(contender_named(DATALOADER, models).command(folder, tmp_path / "labels.csv"))
    assert "torch" in run.report["skipped"]


@pytest.mark.slow
def test_keras_labels_the_folder_as_cnnpipe_does(finished_run: Path, digits: PreparedDataset, tmp_path: Path) -> None:
    for index, image in enumerate(digits.images("test")[:NUM_IMAGES]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / f"{index:02}.png")  # lossless: the same pixels for both
    models = find_models(str(finished_run), tmp_path)
    labels: list[dict[str, str]] = []
    for name in (CNNPIPE, KERAS):
        contender = contender_named(name, models)
        run = run_process(contender.command(tmp_path / "in", tmp_path / f"{len(labels)}.csv"))
        assert contender.work(run.report)[0] == NUM_IMAGES
        labels.append(read_labels(tmp_path / f"{len(labels)}.csv"))
    assert labels[0] == labels[1]


@pytest.mark.slow
def test_comparison_has_a_row_for_each_contender_and_the_limits(folder: Path, models: Models) -> None:
    contenders = [each for each in line_up(models)[0] if each.name in (CNNPIPE, *LOOPS, DATALOADER)]
    lines = compare_classification(folder, contenders, models, rounds=1)
    rows = {cells[0]: cells[1:] for line in lines if len(cells := [cell.strip() for cell in line.split("|")[1:-1]]) > 1}
    assert rows["20 images"][-2:] == ["peak MB", "same label"]
    assert all(rows[name][-1] == "100.00%" for name in (CNNPIPE, *LOOPS))
    assert "1.00" in [rows[name][3] for name in LOOPS]
    assert rows["decoding and inference, fp32"][1].endswith("%")
    assert "decoding and inference, int8" not in rows
    if importlib.util.find_spec("torch") is None:
        assert [line for line in lines if line.startswith(f"{DATALOADER}: left out")]


@pytest.mark.slow
def test_start_up_is_measured_on_one_image(folder: Path, models: Models) -> None:
    contenders = [contender_named(name, models) for name in (CNNPIPE, "one by one")]
    lines = compare_start_up(folder, contenders, rounds=1)
    assert [line.split("|")[1].strip() for line in (lines[0], *lines[2:])] == [
        "one image, cold",
        CNNPIPE,
        "one by one",
    ]


def test_comparison_of_different_labels_is_void(folder: Path, models: Models, tmp_path: Path) -> None:
    other = find_models(str(tiny_models.write_model(tmp_path / "other.onnx", scale=-1 / 255)), tmp_path)
    contenders = [contender_named(CNNPIPE, models), *(contender_named(name, other) for name in LOOPS)]
    with pytest.raises(CnnpipeError, match=r"batched loop, 32 agrees with .* the comparison is void"):
        compare_classification(folder, contenders, models, rounds=1)


def test_unreadable_image_cannot_be_compared(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,status,label\na.jpg,ok,cat\nb.jpg,error,\n")
    with pytest.raises(CnnpipeError, match=r"b\.jpg and 0 more have no label"):
        read_labels(tmp_path / "labels.csv")


def test_limits_are_measured_on_all_files(folder: Path, models: Models) -> None:
    assert measure_decoding(folder, models.image_size, workers=2) > 0
    assert measure_pool(folder, models.image_size, workers=2) > 0
    images = np.zeros((3, *models.image_size, 3), np.uint8)
    limit = measure_inference(models.onnx, images, cores=2, seconds=0.01)
    assert limit.images_per_second > 0
    assert limit.sessions in (1, 2)


def test_cores_that_do_two_things_do_each_half_as_fast() -> None:
    assert both_per_second(1000.0, 1000.0) == pytest.approx(500.0)
    assert both_per_second(12_000.0, 18_000.0) == pytest.approx(7_200.0)


def test_photos_are_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    first, second = (photos.make_photos(folder, tmp_path / name, 3, (500, 375)) for name in ("a", "b"))
    names = list(find_files(first))
    assert len(names) == 3
    assert first.name == second.name
    assert [(first / name).read_bytes() for name in names] == [(second / name).read_bytes() for name in names]


def test_photos_are_made_once(folder: Path, tmp_path: Path) -> None:
    made = photos.make_photos(folder, tmp_path, 2, (64, 48))
    times = [(made / name).stat().st_mtime_ns for name in find_files(made)]
    assert photos.make_photos(folder, tmp_path, 2, (64, 48)) == made
    assert [(made / name).stat().st_mtime_ns for name in find_files(made)] == times
    assert photos.make_photos(folder, tmp_path, 2, (64, 40)) != made


def test_photos_look_like_a_camera_s(folder: Path, tmp_path: Path) -> None:
    made = photos.make_photos(folder, tmp_path, 2, (500, 375))
    files = [made / name for name in find_files(made)]
    assert all(30_000 < file.stat().st_size < 150_000 for file in files)
    with Image.open(files[0]) as portrait, Image.open(files[1]) as landscape:
        assert portrait.size == landscape.size == (500, 375)
        assert portrait.getexif()[274] == 6
        assert landscape.getexif()[274] == 1
        assert len(landscape.info["exif"]) > 4096


def test_photos_need_small_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CnnpipeError, match="to make photos from; name a folder of small images"):
        photos.make_photos(tmp_path / "empty", tmp_path, 1, (64, 48))


def test_tree_has_as_many_names_as_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_FILES_IN_A_FOLDER", 10)
    tree = memory.make_tree(folder, tmp_path / "a" / "tree", 45, memory.Layout.FOLDERS)
    assert [len(list(each.iterdir())) for each in sorted(tree.iterdir())] == [10, 10, 10, 10, 5]
    flat = memory.make_tree(folder, tmp_path / "b" / "tree", 45, memory.Layout.FLAT)
    assert len([path for path in flat.iterdir() if path.is_file()]) == 45
    assert len({path.stat().st_ino for path in flat.iterdir()}) == NUM_IMAGES


def test_tree_beyond_the_file_system_s_links_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MAX_LINKS", 2)
    with pytest.raises(CnnpipeError, match=r"20 files in .* are too few for 41 hard links"):
        memory.make_tree(folder, tmp_path / "tree", 41, memory.Layout.FLAT)


@pytest.mark.slow
def test_memory_is_measured_and_the_tree_removed(folder: Path, models: Models, tmp_path: Path) -> None:
    lines = memory.measure_memory(folder, models, [30], [memory.Layout.FLAT], tmp_path / "scratch")
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row[0] == "30, flat"
    parent, children, together = (float(cell) for cell in row[3:])
    assert 20 < parent < together
    assert children > 0
    assert not list((tmp_path / "scratch").iterdir())


def test_process_is_measured_with_its_children() -> None:
    child = "import time; held = bytearray(b'1' * 100_000_000); time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('{{\"done\": 1}}')"
    run = run_process([sys.executable, "-c", code])
    assert run.report == {"done": 1}
    assert run.peak.children > 100_000_000 > run.peak.parent > 1_000_000
    assert run.peak.total >= run.peak.children
    assert run.seconds > 0.5


def test_process_that_fails_is_told_with_its_last_line() -> None:
    with pytest.raises(CnnpipeError, match="ended with status 1: ValueError: no such thing"):
        run_process([sys.executable, "-c", "raise ValueError('no such thing')"])


def test_table_is_markdown() -> None:
    assert markdown_lines([("who", "s"), ("cnnpipe", "1.5")]) == [
        "| who     |   s |",
        "| ------- | --: |",
        "| cnnpipe | 1.5 |",
    ]


def test_the_work_of_a_training_step_is_counted_layer_by_layer() -> None:
    layers = keras.layers
    first, second = layers.Conv2D(4, 3, padding="same"), layers.Conv2D(5, 3)
    network = keras.Sequential([keras.Input((8, 8, 3)), first, second, layers.Flatten(), layers.Dense(7)])
    forward = [2 * 8 * 8 * 3 * 3 * 3 * 4, 2 * 6 * 6 * 3 * 3 * 4 * 5, 2 * 6 * 6 * 5 * 7]

    # Forward, for the weights, for the input, which is none of the first layer's business.
    assert count_flops(network) == 2 * forward[0] + 3 * forward[1] + 3 * forward[2]
    first.trainable = False
    assert count_flops(network) == forward[0] + 2 * forward[1] + 3 * forward[2]


def test_small_images_are_counted_as_they_are_trained(digits: PreparedDataset, tmp_path: Path) -> None:
    tiny = prepare_dataset(PrepareSettings(image_size=(15, 15)), tmp_path)  # not made smaller
    fast, whole, small, never = TrainSettings(preset="fast"), (32, 32), (24, 24), (15, 15)

    def work_of(size: tuple[int, int]) -> int:
        return count_flops(build_network("fast", size, 10, measure_input(digits.images("train"))))

    assert flops_for_each_image(digits, fast) == pytest.approx((2 * work_of(small) + work_of(whole)) / 3)
    assert flops_for_each_image(tiny, fast) == work_of(never)


def test_gathering_is_measured_in_every_format(folder: Path, models: Models, tmp_path: Path) -> None:
    lines = gathering.measure_gathering(folder, str(models.onnx), tmp_path, 8)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [".csv", ".jsonl", ".parquet"]
    assert all(float(line.split("|")[-2]) > 0 for line in lines[2:])
