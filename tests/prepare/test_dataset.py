"""Sources become prepared arrays: complete, split without leaks, reported on, and made only once."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from tiny_models import model_info

from cnnpipe.classify.run import classify_folder
from cnnpipe.errors import DatasetError, StorageError
from cnnpipe.images.decode import decode_image
from cnnpipe.manifest import RunManifest, write_manifest
from cnnpipe.prepare.cifar10 import CIFAR10_ARCHIVE
from cnnpipe.prepare.dataset import (
    DATASET_FILE,
    DIGESTS_FILE,
    PreparedDataset,
    assign_splits,
    load_prepared,
    open_source,
    prepare_dataset,
    read_digests,
    scratch_folder,
)
from cnnpipe.prepare.report import compute_statistics, measure_shift
from cnnpipe.prepare.sources import SPLITS, TEST, TRAIN, VAL
from cnnpipe.settings import ClassifySettings, PrepareSettings

DIGITS = load_digits()


def digit_image(label: int, index: int) -> Image.Image:
    """The index-th real handwritten digit of a class, 8x8 grey."""
    rows = np.flatnonzero(DIGITS.target == label)
    return Image.fromarray((DIGITS.images[rows[index]] * 15).astype(np.uint8))


def write_class(folder: Path, label: int, indices: range, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        digit_image(label, index).save(folder / f"{index:03d}{suffix}")


def write_flat(root: Path, per_class: int = 20, num_classes: int = 3) -> Path:
    for label in range(num_classes):
        write_class(root / f"digit{label}", label, range(per_class))
    return root


def write_splits(root: Path, **per_class: int) -> Path:
    """Write <root>/<split>/<class>/*, different images in each split."""
    for label in range(3):
        start = 0
        for split, count in per_class.items():
            write_class(root / split / f"digit{label}", label, range(start, start + count), ".jpg")
            start += count
    return root


def prepare(root: Path | str, data: Path, **overrides: Any) -> PreparedDataset:
    names = ("workers", "progress", "archive", "publish", "champion")
    options = {key: overrides.pop(key) for key in names if key in overrides}
    return prepare_dataset(PrepareSettings(dataset=str(root), **overrides), data, **options)


def all_paths(dataset: PreparedDataset) -> list[str]:
    return [path for split in SPLITS for path in dataset.paths(split)]


def digests(dataset: PreparedDataset) -> dict[str, str]:
    """SHA-256 of every file of a prepared dataset."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in dataset.path.iterdir()}


# --- the digits


def test_digits_are_prepared_without_a_network(tmp_path: Path) -> None:
    dataset = prepare("digits", tmp_path)
    assert dataset.class_names == tuple("0123456789")
    assert sum(dataset.num_images.values()) == 1797
    assert dataset.report.warnings == ()
    index = int(dataset.paths("test")[0].removeprefix("digits/"))
    file = io.BytesIO()
    Image.fromarray(np.round(DIGITS.images[index] * 255 / 16).astype(np.uint8)).save(file, "PNG")
    assert np.array_equal(dataset.images("test")[0], decode_image(file.getvalue(), (32, 32)))
    assert dataset.labels("test")[0] == DIGITS.target[index]
    assert dataset.source == dataset.name == "digits"
    for split in SPLITS:
        images, labels = dataset.images(split), dataset.labels(split)
        assert isinstance(images, np.memmap)
        assert images.shape == (dataset.num_images[split], 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert len(labels) == len(dataset.paths(split)) == dataset.num_images[split]
    assert dataset.num_images["test"] == pytest.approx(0.2 * 1797, abs=6)
    assert dataset.num_images["val"] == pytest.approx(0.2 * 0.8 * 1797, abs=6)


# --- folders


def test_a_flat_folder_is_split_and_every_image_is_in_one_split(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "digits three")
    dataset = prepare(root, tmp_path / "data")
    assert dataset.name == "digits-three"
    assert dataset.class_names == ("digit0", "digit1", "digit2")
    assert dataset.num_images == {"train": 39, "val": 9, "test": 12}
    expected = sorted(str(file.relative_to(root)) for file in root.rglob("*.png"))
    assert sorted(all_paths(dataset)) == expected
    for split in SPLITS:
        for path, label, pixels in zip(dataset.paths(split), dataset.labels(split), dataset.images(split), strict=True):
            assert path.startswith(f"digit{label}/")
            assert np.array_equal(pixels, decode_image((root / path).read_bytes(), (32, 32)))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"train": 20, "test": 5}, {"train": 48, "val": 12, "test": 15}),
        ({"train": 12, "val": 4, "test": 5}, {"train": 36, "val": 12, "test": 15}),
        ({"train": 20, "val": 4}, {"train": 48, "val": 12, "test": 12}),
        ({"training": 12, "validation": 4, "testing": 5}, {"train": 36, "val": 12, "test": 15}),
        ({"Train": 12, "VALID": 4, "Test": 5}, {"train": 36, "val": 12, "test": 15}),
    ],
)
def test_given_splits_are_kept_and_missing_ones_are_taken_from_train(
    tmp_path: Path, counts: dict[str, int], expected: dict[str, int]
) -> None:
    dataset = prepare(write_splits(tmp_path / "root", **counts), tmp_path / "data")
    assert dataset.num_images == expected
    folders = {name.lower()[:3]: name for name in counts}
    for split in SPLITS:
        assert {path.split("/")[0] for path in dataset.paths(split)} == {folders.get(split[:3], next(iter(counts)))}


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_folder_called_like_a_built_in_dataset_is_told_and_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write_flat(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert prepare(f"./{name}", tmp_path / "data").source == "folder"
    assert "built-in" not in caplog.text
    settings = PrepareSettings(dataset=name)
    assert open_source(settings, tmp_path, CIFAR10_ARCHIVE, 1, lambda *_: None).kind == name
    assert caplog.messages[-1] == (
        f"{name} is the built-in dataset here, not the folder of that name; for the folder give ./{name}"
    )


def test_a_link_in_a_circle_beside_the_classes_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    (root / "circle").symlink_to("circle")
    dataset = prepare(root, tmp_path / "data")
    assert dataset.report.warnings[0] == f"1 files in {root} are in no class folder and were left out: circle"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = tmp_path / "vehicles"
    for label, name in enumerate(("car", "train", "bus")):
        write_class(root / name, label, range(15))
    assert prepare(root, tmp_path / "data").class_names == ("bus", "car", "train")


def test_classes_are_sorted_bytewise(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for label, name in enumerate(("b", "a10", "a9", "É", "Z")):
        write_class(root / name, label, range(20))
    assert prepare(root, tmp_path / "data").class_names == ("Z", "a10", "a9", "b", "É")


def test_any_image_size_mode_and_depth_of_folders_will_do(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root", num_classes=2)
    Image.new("CMYK", (300, 200), (0, 255, 255, 0)).save(root / "digit0" / "photo.jpg")
    (root / "digit1" / "more" / "still").mkdir(parents=True)
    Image.new("LA", (3, 9)).save(root / "digit1" / "more" / "still" / "icon.png")
    dataset = prepare(root, tmp_path / "data", image_size=(24, 40))
    assert {"digit0/photo.jpg", "digit1/more/still/icon.png"} <= set(all_paths(dataset))
    assert dataset.images("train").shape[1:] == (24, 40, 3)


def grey(low: int, high: int, index: int, kind: type[np.generic] = np.uint8) -> Image.Image:
    values = np.random.default_rng(index).integers(low, high, (16, 16 + index), endpoint=True)
    return Image.fromarray(values.astype(kind))


def grey_palette(index: int) -> Image.Image:
    image = grey(0, 3, index).convert("P")
    image.putpalette([128] * 768)
    return image


def commented(index: int) -> Image.Image:
    image = grey(0, 255, 0)
    image.info["comment"] = str(index)
    return image


WRONG = "check that the files show what they should"
LOW_CONTRAST: dict[str, tuple[str, Callable[[int], Image.Image], str, str]] = {
    # name -> suffix of the files, image by its number, what is said of its values, and how to fix it
    "16 bits, 60 and 200": (
        ".png",
        lambda index: grey(*((60, 64), (200, 200))[index % 2], index, np.uint16),
        "16-bit values up to 200 of 65,535",
        "multiply their values by up to 327, or save them with 8 bits",
    ),
    "PGM of 16 bits": (".pgm", lambda index: grey(0, 255, index, np.uint16), "16-bit values up to 255", "up to 257"),
    "12 bits in 16": (".tif", lambda index: grey(0, 4095, index, np.uint16), "16-bit values up to 4,095", "up to 16,"),
    "16 bits, one colour": (".png", lambda index: grey(30000, 30000, index, np.uint16), "up to 30,000 of", WRONG),
    "black": (".png", lambda index: grey(0, 0, index), "8-bit values up to 0 of 255", WRONG),
    "one colour": (".png", lambda index: Image.new("RGB", (16, 16 + index), (200, 30, 30)), "up to 200 of 255", WRONG),
    "class numbers": (".png", lambda index: grey(0, 2, index), "8-bit values up to 2 of 255", WRONG),
    "one palette colour": (".png", grey_palette, "8-bit values up to 128 of 255", WRONG),
    "one picture": (".gif", commented, "8-bit values up to 255 of 255", WRONG),
}


@pytest.mark.parametrize("name", LOW_CONTRAST)
def test_pictures_that_hardly_differ_once_decoded_stop_the_run_with_the_range_of_their_values(
    tmp_path: Path, name: str
) -> None:
    suffix, image, values, remedy = LOW_CONTRAST[name]
    for index in range(40):
        file = tmp_path / "root" / "ab"[index % 2] / f"{index}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        image(index).save(file)
    for _ in range(2):  # the second time they are prepared already
        with pytest.raises(DatasetError, match=rf"the decoded pictures hardly differ \(.*{values}.*{remedy}"):
            prepare(tmp_path / "root", tmp_path / "data", image_size=(16, 16))


@pytest.mark.parametrize(
    "image", [lambda index: grey(0, 15, index), lambda index: grey(0, 65535, index, np.uint16)], ids=["night", "16"]
)
def test_dark_pictures_of_8_bits_and_whole_ranges_of_16_are_prepared(
    tmp_path: Path, image: Callable[[int], Image.Image]
) -> None:
    for index in range(40):
        file = tmp_path / "root" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image(index).save(file)
    assert sum(prepare(tmp_path / "root", tmp_path / "data", image_size=(16, 16)).num_images.values()) == 40


def test_what_systems_leave_is_passed_over_with_one_warning(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    image = (root / "digit0" / "000.png").read_bytes()
    left = (
        *(".DS_Store", "digit0/.hidden.png", "digit0/Thumbs.db", "digit1/desktop.ini", ".git/x/y.png"),
        *("digit0/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/S-1-5/$R1.png", "__MACOSX/digit0/._1.png"),
        *("digit1/._2.png", "digit1/~$x.docx", "lost+found/x.png", "digit2/1.png:Zone.Identifier"),
    )
    for path in left:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(image)
    dataset = prepare(root, tmp_path / "data")
    assert sum(dataset.num_images.values()) == 60
    assert dataset.class_names == ("digit0", "digit1", "digit2")
    assert dataset.report.unreadable == ()
    told = [warning for warning in dataset.report.warnings if "passed over" in warning]
    assert [warning.partition(":")[0] for warning in told] == [
        "12 files and folders that systems leave or cnnpipe wrote were passed over"
    ]
    assert "@eaDir (1)" in told[0]


def test_what_cnnpipe_wrote_into_a_dataset_is_neither_image_nor_class(
    tmp_path: Path, finished_run: Path, model: Path
) -> None:
    root = write_flat(tmp_path / "root")
    shutil.copytree(finished_run.parents[2], root / "artifacts")
    prepare(root, root / "data")
    for table in ("digit0/t.csv", "t.jsonl", "artifacts/predictions/x/predictions.csv"):
        chosen = {"folder": str(root), "model": str(model), "device": "cpu", "include": ("*.png",)}
        sort_into = str(tmp_path / "sorted")
        classify_folder(
            ClassifySettings(**chosen, output=str(root / table), sort_into=sort_into), tmp_path / "artifacts"
        )
    shutil.move(tmp_path / "sorted", root)
    dataset = prepare(root, root / "data")
    assert dataset.class_names == ("digit0", "digit1", "digit2")
    assert sum(dataset.num_images.values()) == 60
    assert len(list((root / "data" / "prepared").iterdir())) == 1
    assert prepare(root / "sorted", tmp_path / "data", min_images_per_class=1).num_images["train"] > 0


def test_files_that_no_suffix_calls_an_image_are_left_out_and_counted(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    for file in sorted(root.rglob("*.png")):
        file.with_name(f"{file.name}.json").write_text("{}")
    (root / "digit0" / "LABELS.CSV").write_text("a")
    (root / "digit1" / "unknown.xyz").write_text("a")
    (root / "stray.png").touch()
    report = prepare(root, tmp_path / "data").report
    assert report.warnings[0] == f"1 files in {root} are in no class folder and were left out: stray.png"
    assert report.warnings[1] == "61 files that are not images by their suffixes were left out: .json (60), .csv (1)"
    assert [file.path for file in report.unreadable] == ["digit1/unknown.xyz"]


def test_patterns_choose_the_files_of_a_dataset(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root", num_classes=4)
    (root / "digit0" / "thumbs").mkdir()
    shutil.copy(root / "digit0" / "000.png", root / "digit0" / "thumbs")
    whole = prepare(root, tmp_path / "data")
    chosen = prepare(root, tmp_path / "data", include=("*.png",), exclude=("digit3/*", "*/thumbs/*"))
    assert chosen.class_names == ("digit0", "digit1", "digit2")
    assert sum(chosen.num_images.values()) == 60
    assert chosen.path != whole.path
    with pytest.raises(DatasetError, match="has no class folders with files that are wanted"):
        prepare(root, tmp_path / "data", exclude=("*",))


def test_one_damaged_image_of_a_small_folder_stops_nothing_unless_none_is_allowed(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    (root / "digit0" / "000.png").write_bytes(b"spoilt")
    assert sum(prepare(root, tmp_path / "data").num_images.values()) == 59
    with pytest.raises(DatasetError, match=r"1 of 60 files are unreadable, more than 0 \(max_unreadable_fraction\)"):
        prepare(root, tmp_path / "data", max_unreadable_fraction=0)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("caf\u00e9", "cafe\u0301"), r"'cafe\u0301' and 'caf\xe9'"),
        (("Cat", "cat"), "'Cat' and 'cat'"),
        (("cat", "cat "), "'cat' and 'cat '"),
        (("red cat", "red  cat"), r"'red \x20cat' and 'red cat'"),
        (("cat", "cat\u200b"), r"'cat' and 'cat\u200b'"),
    ],
)
def test_classes_whose_names_look_alike_are_told_apart(tmp_path: Path, names: tuple[str, str], shown: str) -> None:
    for label, name in enumerate(names):
        write_class(tmp_path / "flat" / name, label, range(15))
        write_class(tmp_path / "split" / "train" / name, label, range(15))
    try:
        assert len(list((tmp_path / "flat").iterdir())) == 2
    except AssertionError:
        pytest.skip("this file system takes them for one")
    assert prepare(tmp_path / "flat", tmp_path / "data").report.warnings[0] == (
        f"classes have names that look alike: {shown}; merge those that mean one class"
    )
    write_class(tmp_path / "split" / "train" / "other", 5, range(15))
    (tmp_path / "split" / "test").mkdir()
    shutil.move(tmp_path / "split" / "train" / names[1], tmp_path / "split" / "test")
    first, second = sorted([shown.partition(" and ")[0], shown.partition(" and ")[2]])
    with pytest.raises(DatasetError, match="is in test, but not in train, which has") as caught:
        prepare(tmp_path / "split", tmp_path / "data")
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_unreadable_files_are_reported_and_left_out(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    (root / "digit0" / "notes.x").write_text("not an image")
    (root / "digit1" / "cut.png").write_bytes((root / "digit1" / "000.png").read_bytes()[:60])
    (root / "digit2" / "empty.png").touch()
    (root / "digit2" / "gone.png").symlink_to(root / "nowhere")
    dataset = prepare(root, tmp_path / "data", max_unreadable_fraction=0.1)
    assert sum(dataset.num_images.values()) == 60
    assert {(file.path, file.kind) for file in dataset.report.unreadable} == {
        ("digit0/notes.x", "not_an_image"),
        ("digit1/cut.png", "truncated"),
        ("digit2/empty.png", "empty"),
        ("digit2/gone.png", "not_found"),
    }
    assert dataset.report.warnings[0] == (
        "4 of 64 files are unreadable and were left out: digit0/notes.x (not_an_image), digit1/cut.png (truncated), "
        "digit2/empty.png (empty), …"
    )


def test_classes_missing_in_test_are_a_warning(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "root", train=15, test=5)
    shutil.rmtree(root / "test" / "digit1")
    report = prepare(root, tmp_path / "data").report
    assert report.warnings[0] == "test has no images of 1 classes: digit1 (15 different in all)"
    assert report.class_counts["test"] == {"digit0": 5, "digit1": 0, "digit2": 5}


def remove_class(root: Path) -> None:
    for label in (1, 2):
        shutil.rmtree(root / f"digit{label}")


def empty_class(root: Path) -> None:
    for file in (root / "digit1").iterdir():
        file.unlink()


def empty_root(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def only_files(root: Path) -> None:
    empty_root(root)
    (root / "a.png").touch()


def file_instead(root: Path) -> None:
    shutil.rmtree(root)
    root.touch()


def with_test(root: Path) -> Path:
    """Make the flat folder one of a given split, and return where its test goes."""
    shutil.move(root, root.with_name("train"))
    root.mkdir()
    shutil.move(root.with_name("train"), root / "train")
    return root / "test"


def other_class_in_test(root: Path) -> None:
    write_class(with_test(root) / "digit9", 9, range(3))


def empty_test(root: Path) -> None:
    (with_test(root) / "digit0").mkdir(parents=True)


def spoilt_test(root: Path) -> None:
    folder = with_test(root) / "digit0"
    folder.mkdir(parents=True)
    (folder / "x.jpg").write_bytes(b"spoilt")


def spoil_all(root: Path) -> None:
    for file in root.rglob("*.png"):
        file.write_bytes(b"spoilt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "there is no dataset .*root; need digits, cifar10 or the path of a folder"),
        (file_instead, "cannot list .*root: Not a directory; need <root>"),
        (empty_root, "root holds no folders of images; need <root>/{train,val,test}/<class>"),
        (only_files, "root holds no folders of images; need"),
        (remove_class, "need at least two classes, received only 'digit0'"),
        (empty_class, "class 'digit1' of .* has no images in train"),
        (spoil_all, "none of the 60 files in .* can be read as an image; the first, digit0/000.png: not an image"),
        (other_class_in_test, r"class 'digit9' of .* is in test, but not in train"),
        (empty_test, "test holds no images in class folders"),
        (spoilt_test, "leaves no readable image for test"),
    ],
)
def test_a_folder_that_is_not_a_dataset_says_why_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    root = write_flat(tmp_path / "root")
    spoil(root)
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(root, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("prepared/*"))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 15, "val": 3, "valid": 3}, "has val and valid, both mean val; merge or rename them"),
        ({"Train": 15, "test": 3, "Testing": 3}, "has Testing and test, both mean test; merge or rename them"),
        ({"test": 15, "val": 3}, "has test and val, but no train"),
    ],
)
def test_folders_that_look_like_splits_are_never_taken_for_classes(
    tmp_path: Path, splits: dict[str, int], message: str
) -> None:
    root = write_splits(tmp_path / "root", **splits)
    with pytest.raises(DatasetError, match=message):
        prepare(root, tmp_path / "data")


# --- splitting


@settings(deadline=None, max_examples=200)
@given(
    images=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=150),
    val_fraction=st.one_of(st.none(), st.floats(0.01, 0.9)),
    test_fraction=st.one_of(st.none(), st.floats(0.01, 0.9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_are_whole_stratified_without_leaks_and_repeatable(
    images: list[tuple[int, int]], val_fraction: float | None, test_fraction: float | None, seed: int
) -> None:
    labels = np.array([label for label, _ in images])
    contents = [f"{label}-{content}" for label, content in images]
    given_splits = np.zeros(len(images), np.int8)
    options = {"val_fraction": val_fraction, "test_fraction": test_fraction}

    splits = assign_splits(labels, contents, given_splits, seed=seed, **options)
    assert np.array_equal(splits, assign_splits(labels, contents, given_splits, seed=seed, **options))
    assert splits.shape == labels.shape
    assert set(splits.tolist()) <= {TRAIN, VAL, TEST}
    split_of: dict[str, set[int]] = {}
    for content, split in zip(contents, splits.tolist(), strict=True):
        split_of.setdefault(content, set()).add(split)
    assert all(len(found) == 1 for found in split_of.values())

    for label in set(labels.tolist()):
        distinct = {content: found for content, found in split_of.items() if content.startswith(f"{label}-")}
        counts = [sum(found == {split} for found in distinct.values()) for split in (TRAIN, VAL, TEST)]
        assert counts[TRAIN] >= 1
        assert test_fraction is not None or counts[TEST] == 0
        assert val_fraction is not None or counts[VAL] == 0
        if len(distinct) >= 3:
            assert test_fraction is None or counts[TEST] >= 1
            assert val_fraction is None or counts[VAL] >= 1
        if test_fraction is not None and len(distinct) * min(test_fraction, 1 - test_fraction) >= 3:
            assert abs(counts[TEST] - test_fraction * len(distinct)) <= 1


def test_another_seed_is_another_split() -> None:
    labels, contents = np.zeros(100, np.int64), [str(index) for index in range(100)]
    one, two = (
        assign_splits(labels, contents, np.zeros(100, np.int8), val_fraction=0.2, test_fraction=0.2, seed=seed)
        for seed in range(2)
    )
    assert not np.array_equal(one, two)


def test_a_growing_folder_keeps_its_images_in_their_splits() -> None:
    contents = [str(index) for index in range(1050)]

    def test_split(count: int) -> set[str]:
        splits = assign_splits(
            np.zeros(count, np.int64),
            contents[:count],
            np.zeros(count, np.int8),
            val_fraction=None,
            test_fraction=0.2,
            seed=0,
        )
        return {content for content, split in zip(contents, splits, strict=False) if split == TEST}

    before, after = test_split(1000), test_split(1050)
    assert len(before - after) <= 10  # a shuffled list would move 160 of 200
    assert len(after) == 210


def test_copies_of_an_image_are_never_parted(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    for label in range(3):
        for index in range(20):
            shutil.copy(root / f"digit{label}" / f"{index:03d}.png", root / f"digit{label}" / f"copy{index}.png")
    report = prepare(root, tmp_path / "data").report
    assert report.leaks == ()
    assert report.duplicates == 60
    assert re.fullmatch(
        r"60 images repeat another one of their split: digit0/\w+\.png = digit0/\w+\.png, .*, …", report.warnings[0]
    )


# --- the report and its gates


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((0, 1), "no readable image for val: its 40 images are copies of 2, and copies stay in one split"),
        ((0, 0), r"the decoded pictures hardly differ .*; check that the files show what they should; see .*root$"),
    ],
)
def test_a_dataset_of_copies_says_so(tmp_path: Path, classes: tuple[int, int], message: str) -> None:
    for name, label in zip("ab", classes, strict=True):
        write_class(tmp_path / "root" / name, label, range(1))
        for number in range(1, 20):
            shutil.copy(tmp_path / "root" / name / "000.png", tmp_path / "root" / name / f"{number}.png")
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path / "root", tmp_path / "data")


def test_a_class_that_our_own_split_leaves_unmeasured_is_named(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    for file in sorted((root / "digit1").iterdir())[2:]:
        shutil.copy(root / "digit1" / f"00{int(file.stem) % 2}.png", file)
    warnings = prepare(root, tmp_path / "data").report.warnings
    for split in ("val", "test"):
        assert f"{split} has no images of 1 classes: digit1 (2 different in all)" in warnings


def test_leaks_between_given_splits_are_reported_and_more_than_one_stop_the_run(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "root", train=15, val=5, test=5)
    shutil.copy(root / "train" / "digit1" / "003.jpg", root / "test" / "digit1" / "leaked.jpg")
    report = prepare(root, tmp_path / "data").report
    assert [asdict(leak) for leak in report.leaks] == [
        {
            "path": "test/digit1/leaked.jpg",
            "split": "test",
            "other_path": "train/digit1/003.jpg",
            "other_split": "train",
        }
    ]
    assert report.warnings[0] == (
        "1 of 16 images of test are also in another, where they were left out: "
        "test/digit1/leaked.jpg = train/digit1/003.jpg"
    )
    shutil.copy(root / "train" / "digit2" / "004.jpg", root / "test" / "digit2" / "leaked.jpg")
    expected = (
        r"2 of 17 images of test are also in another split, more than 0\.01 \(max_leaked_fraction\): "
        r"test/digit1/leaked\.jpg = train/digit1/003\.jpg, test/digit2/leaked\.jpg = train/digit2/004\.jpg; restore"
    )
    with pytest.raises(DatasetError, match=expected):
        prepare(root, tmp_path / "data")


def test_of_copies_in_several_given_splits_only_that_in_the_last_is_used(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "root", train=15, val=5, test=5)
    Image.open(root / "test" / "digit0" / "020.jpg").save(root / "val" / "digit0" / "same pixels.png")
    for number in range(2):
        shutil.copy(root / "test" / "digit0" / "020.jpg", root / "train" / "digit0" / f"{number}.jpg")
    shutil.copy(root / "val" / "digit1" / "015.jpg", root / "train" / "digit1" / "15.jpg")
    dataset = prepare(root, tmp_path / "data", max_leaked_fraction=0.1)
    assert dataset.num_images == {"train": 45, "val": 15, "test": 15}
    left_out = ("train/digit0/0.jpg", "train/digit0/1.jpg", "train/digit1/15.jpg", "val/digit0/same pixels.png")
    assert dataset.report.left_out == left_out
    assert [(leak.path, leak.other_path) for leak in dataset.report.leaks] == [
        ("val/digit1/015.jpg", "train/digit1/15.jpg"),
        ("test/digit0/020.jpg", "train/digit0/0.jpg"),
    ]
    digests = [digest.tobytes() for split in SPLITS for digest in dataset.digests(split)]
    assert len(set(digests)) == len(digests) == 75


def test_a_split_of_nothing_but_copies_says_so(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "root", train=15)
    shutil.copytree(root / "train", root / "test")
    with pytest.raises(DatasetError, match="no readable image for train: 45 images of train and val are left out, as"):
        prepare(root, tmp_path / "data")


def test_images_in_two_classes_are_named_and_too_many_stop_the_run(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    shutil.copy(root / "digit0" / "000.png", root / "digit1" / "zero.png")
    report = prepare(root, tmp_path / "data").report
    assert report.contradictions == ("digit0/000.png and digit1/zero.png",)
    assert "1 images are in two classes: digit0/000.png and digit1/zero.png" in report.warnings
    Image.open(root / "digit0" / "001.png").save(root / "digit2" / "same pixels.bmp")
    expected = (
        r"2 of 62 images are in two classes, more than 0\.01 \(max_contradictory_fraction\): "
        r"digit0/000\.png and digit1/zero\.png, digit0/001\.png and digit2/same pixels\.bmp; restore, fix"
    )
    with pytest.raises(DatasetError, match=expected):
        prepare(root, tmp_path / "data")


def write_champion(folder: Path, dataset: PreparedDataset) -> Path:
    """Write the manifest and the digests of a champion that was trained on a dataset."""
    model = model_info(run_id="one", class_names=dataset.class_names, training_statistics=dataset.statistics)
    facts: dict[str, Any] = {"created": "", "dataset": {}, "metrics": {}, "parity": {}, "promotion_reason": ""}
    write_manifest(folder, RunManifest(model=model, promoted=True, files={}, **facts))
    np.savez(folder / DIGESTS_FILE, allow_pickle=False, **read_digests(dataset.path))
    return folder


def test_classes_and_pixels_must_be_those_of_the_champion_unless_the_limits_allow_others(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    champion = write_champion(tmp_path, prepare(root, tmp_path / "data"))
    shown: list[PreparedDataset] = []
    prepare(root, tmp_path / "data", champion=champion, publish=shown.append)
    assert shown[0] == load_prepared(shown[0].path)

    shutil.move(root / "digit2", root / "digit3")
    classes = (
        r"the classes are not those of the champion one, new: digit3; gone: digit2 \(same_classes\); "
        r"restore the folder, allow it with --no-same-classes, or train another model with --name; see .*dataset\.json$"
    )
    with pytest.raises(DatasetError, match=classes):
        prepare(root, tmp_path / "data", champion=champion, publish=shown.append)
    assert shown[1].report.warnings[-1].startswith("the classes are not those of the champion")
    prepare(root, tmp_path / "data", champion=champion, same_classes=False)

    (root / "digit3" / "000.png").rename(root / "digit3" / "999.png")  # only a name
    for index in range(20):
        Image.eval(digit_image(1, index), lambda value: 255 - value).save(root / "digit1" / f"{index:03}.png")
    pixels = (
        r"the train images differ by 0\.\d\d from those of the champion one, more than 0\.1 \(max_pixel_shift\): "
        r"mean RGB \d+ \d+ \d+, was \d+ \d+ \d+; 13 images are new: digit1/\d+.png, .*; check the images, raise"
    )
    with pytest.raises(DatasetError, match=pixels):
        prepare(root, tmp_path / "data", champion=champion, same_classes=False)
    prepare(root, tmp_path / "data", champion=champion, same_classes=False, max_pixel_shift=1)


def test_the_shift_of_pixels_is_that_of_brightness_colour_or_contrast() -> None:
    images = np.random.default_rng(0).integers(50, 200, (400, 4, 4, 3), np.uint8)
    changed = {"colour": images.copy(), "contrast": 125 + (images.astype(int) - 125) // 2, "brightness": images.copy()}
    changed["colour"][..., 0] += 51
    changed["brightness"][::2] += 51
    changed["brightness"][1::2] -= 50
    labels = np.zeros(400, np.int64)
    before = compute_statistics(images, labels, 1)
    assert measure_shift(before, compute_statistics(images[::2], labels[::2], 1)) < 0.02
    for each in changed.values():
        assert measure_shift(before, compute_statistics(each.astype(np.uint8), labels, 1)) > 0.08


# --- digests


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (20, 12)])
def test_digests_are_of_the_prepared_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    for source in ("digits", write_flat(tmp_path / "root")):
        dataset = prepare(source, tmp_path / "data", image_size=size)
        for split, digests in read_digests(dataset.path).items():
            expected = [hashlib.sha256(image.tobytes()).digest()[:16] for image in dataset.images(split)]
            assert [digest.tobytes() for digest in digests] == expected
            (dataset.path / f"{split}_digests.npy").unlink()  # as older versions prepared it
            assert np.array_equal(read_digests(dataset.path)[split], digests)


def test_digests_that_are_missing_or_damaged_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no digests\.npz, and its prepared dataset is gone; train again"):
        read_digests(tmp_path)
    np.savez(tmp_path / DIGESTS_FILE, allow_pickle=False, train=np.zeros((2, 16), np.uint8))
    with pytest.raises(DatasetError, match=r"digests\.npz is damaged: .*val.*; train again"):
        read_digests(tmp_path)
    (tmp_path / DIGESTS_FILE).write_bytes((tmp_path / DIGESTS_FILE).read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"digests\.npz is damaged: .*; train again"):
        read_digests(tmp_path)


def test_small_classes_and_unequal_ones_are_warnings(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root", per_class=170, num_classes=2)
    write_class(root / "few", 2, range(16))
    assert prepare(root, tmp_path / "data").report.warnings == (
        "class 'digit0' has 109 images in train and 'few' has 10, 10.9 times fewer",
        "1 classes have fewer than 50 images in train: few (10)",
    )


def test_every_warning_is_a_line_of_the_log_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_flat(tmp_path / "root", per_class=170, num_classes=2)
    (root / "digit0" / "line\nbreak.png").write_bytes(b"spoilt")
    for _ in range(2):
        caplog.clear()
        prepare(root, tmp_path / "data")
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "root: 1 of 341 files are unreadable and were left out: digit0/line break.png (not_an_image)"
        ]


def test_a_dataset_that_exceeds_a_limit_is_prepared_and_shown_all_the_same(tmp_path: Path) -> None:
    strict = PrepareSettings(dataset=str(write_flat(tmp_path / "root")), min_images_per_class=100)
    shown: list[PreparedDataset] = []
    with pytest.raises(DatasetError, match=r"class 'digit0' has 13 images in train, need at least 100"):
        prepare_dataset(strict, tmp_path / "data", publish=shown.append)
    assert [load_prepared(shown[0].path)] == shown


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_images_per_class": 14}, r"class 'digit0' has 13 images in train, need at least 14 \(min_images_per"),
        (
            {"max_unreadable_fraction": 0.02},
            r"2 of 77 files are unreadable, more than 0\.02 \(max_unreadable_fraction\)",
        ),
        ({"max_imbalance": 1.5, "max_unreadable_fraction": 1}, r"'digit2' has 22 images in train and 'digit0' has 13"),
    ],
)
def test_a_passed_limit_names_itself_what_it_received_and_the_report(
    tmp_path: Path, limits: dict[str, float], message: str
) -> None:
    root = write_flat(tmp_path / "root")
    write_class(root / "digit2", 2, range(20, 35))
    for name in ("a.png", "b.png"):
        (root / "digit1" / name).write_bytes(b"spoilt")
    options = {"max_unreadable_fraction": 0.1, **limits}
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(root, tmp_path / "data", **options)
    report = str(caught.value).rpartition("see ")[2]
    assert len(json.loads(Path(report).read_bytes())["report"]["unreadable"]) == 2


def test_a_milder_limit_decodes_nothing_again(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    with pytest.raises(DatasetError, match="min_images_per_class"):
        prepare(root, tmp_path / "data", min_images_per_class=100)
    stages: set[str] = set()
    prepare(root, tmp_path / "data", progress=lambda stage, _, __: stages.add(stage))
    assert stages == {"hash"}
    with pytest.raises(DatasetError, match="min_images_per_class"):
        prepare(root, tmp_path / "data", min_images_per_class=100)


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    dataset = prepare(write_flat(tmp_path / "root"), tmp_path / "data")
    images, statistics = dataset.images("train").astype(float), dataset.statistics
    assert statistics.num_images == len(images)
    assert statistics.channel_mean == pytest.approx(images.mean(axis=(0, 1, 2)))
    assert statistics.channel_std == pytest.approx(images.std(axis=(0, 1, 2)))
    brightness = images.mean(axis=(1, 2, 3))
    assert statistics.brightness_deciles == pytest.approx(np.percentile(brightness, range(0, 101, 10)))
    assert statistics.class_shares == pytest.approx([1 / 3] * 3)


# --- prepared once, and told apart by what is in it


def test_a_prepared_folder_is_found_again_without_decoding(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    stages: list[str] = []
    first = prepare(root, tmp_path / "data", progress=lambda stage, _, __: stages.append(stage))
    assert set(stages) == {"decode", "write"}  # one pass: nothing to compare a digest with
    stages.clear()
    second = prepare(root, tmp_path / "data", progress=lambda stage, _, __: stages.append(stage))
    assert set(stages) == {"hash"}
    assert first == second == load_prepared(first.path)
    assert first.path.name == f"root-{first.fingerprint[:12]}"


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    other = tmp_path / "elsewhere"
    for file in sorted(root.rglob("*.png"), reverse=True):
        copy = other / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        os.utime(copy, (1, 1))
    one = prepare(root, tmp_path / "data", workers=1)
    two = prepare(other, tmp_path / "data2", name="root", min_images_per_class=2, workers=2)
    assert one.fingerprint == two.fingerprint
    assert digests(one) == digests(two)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": (16, 16)},
        {"seed": 1},
        {"val_fraction": 0.3},
        {"test_fraction": 0.1},
        {"include": ("*.png",)},
        {"exclude": ("*.jpg",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_change_an_array_change_the_fingerprint(tmp_path: Path, change: dict[str, Any]) -> None:
    root = write_flat(tmp_path / "root")
    assert (
        prepare(root, tmp_path / "data").fingerprint
        != prepare(root, tmp_path / "data", min_images_per_class=1, **change).fingerprint
    )


def test_a_changed_image_is_noticed_even_if_its_size_and_time_are_not(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root")
    before = prepare(root, tmp_path / "data")
    file = root / "digit0" / "000.png"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = prepare(root, tmp_path / "data", max_unreadable_fraction=1)
    assert after.fingerprint != before.fingerprint
    assert before.path.is_dir()


@pytest.mark.parametrize("change", ["more", "fewer", "others", "none"])
def test_a_folder_that_changes_while_it_is_read_gives_the_images_that_its_fingerprint_is_of(
    tmp_path: Path, change: str
) -> None:
    root = write_flat(tmp_path / "root", per_class=70)  # several chunks
    before = Path(shutil.copytree(root, tmp_path / "before"))

    def change_folder(stage: str, done: int, total: int) -> None:
        if stage != "decode" or done == total:
            return
        if change == "more":
            write_class(root / "digit0", 0, range(70, 75))
        elif change == "others":
            write_class(root / "digit2", 2, range(70, 140))
            for number in range(70):
                (root / "digit2" / f"{number + 70:03}.png").replace(root / "digit2" / f"{number:03}.png")
        elif change == "fewer":
            (root / "digit2" / "069.png").unlink(missing_ok=True)
        else:
            shutil.rmtree(root, ignore_errors=True)

    if change == "none":
        with pytest.raises(DatasetError, match=r"82 of 210 files are unreadable, .* \(not_found\), …; restore, fix"):
            prepare(root, tmp_path / "data", progress=change_folder)
        return
    changed = prepare(root, tmp_path / "data", progress=change_folder)
    same = prepare(before if change == "more" else root, tmp_path / "data2", name="root")
    if change == "fewer":
        assert changed.report.warnings[0].endswith("unreadable and were left out: digit2/069.png (not_found)")
        assert changed.fingerprint != same.fingerprint
    else:
        assert digests(changed) == digests(same)
        assert changed.fingerprint == same.fingerprint
    assert all_paths(changed) == all_paths(same)


def test_several_processes_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root", per_class=170, num_classes=4)  # enough files for the pool
    (root / "digit0" / "spoilt.png").write_bytes(b"spoilt")
    seen: list[tuple[str, int, int]] = []
    many = prepare(root, tmp_path / "many", workers=3, progress=lambda *args: seen.append(args))
    one = prepare(root, tmp_path / "one", workers=1)
    assert digests(many) == digests(one)
    assert ("decode", 681, 681) in seen


def child_processes() -> list[str]:
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_an_interrupt_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "root", per_class=170, num_classes=4)
    before = child_processes()

    def interrupt(stage: str, done: int, total: int) -> None:
        assert len(child_processes()) > len(before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(root, tmp_path / "data", workers=2, progress=interrupt)
    assert child_processes() == before
    assert list((tmp_path / "data" / "prepared").iterdir()) == []


def test_what_killed_processes_left_is_removed_unless_another_is_at_work(tmp_path: Path) -> None:
    prepared = tmp_path / "data" / "prepared"
    users, left = prepared / ".users", {prepared / ".scratch.abcdefgh", prepared / ".root.0123456789abcdef"}
    for folder in (users, *left):
        folder.mkdir(parents=True)
        (folder / "pixels").touch()
        os.utime(folder, (1, 1))  # a folder that is written to keeps its own time
    root = write_flat(tmp_path / "root")
    lock = os.open(prepared, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    dataset = prepare(root, tmp_path / "data")
    assert {users, *left, dataset.path} == set(prepared.iterdir())
    os.close(lock)
    with scratch_folder(prepared) as scratch, scratch_folder(prepared) as other:
        assert scratch.is_dir()
        assert other.is_dir()
        assert {users, dataset.path, scratch, other} == set(prepared.iterdir())
    assert {users, dataset.path} == set(prepared.iterdir())


@pytest.mark.parametrize("spoil", ["no dataset.json", "bad json", "array cut", "array gone", "digests cut"])
def test_a_damaged_prepared_folder_is_refused_and_made_again(tmp_path: Path, spoil: str) -> None:
    root = write_flat(tmp_path / "root")
    dataset = prepare(root, tmp_path / "data")
    before = digests(dataset)
    images = dataset.path / "train_images.npy"
    if spoil == "no dataset.json":
        (dataset.path / DATASET_FILE).unlink()
    elif spoil == "bad json":
        (dataset.path / DATASET_FILE).write_text('{"name": "root"}')
    elif spoil == "digests cut":
        np.save(dataset.path / "val_digests.npy", dataset.digests("val")[1:])
    elif spoil == "array cut":
        images.write_bytes(images.read_bytes()[:-100])
    else:
        images.unlink()
    with pytest.raises(DatasetError, match="prepare it again"):
        load_prepared(dataset.path)
    assert digests(prepare(root, tmp_path / "data")) == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(StorageError, match=r"cannot write .*prepared: Not a directory; check"):
        prepare(write_flat(tmp_path / "root"), tmp_path / "data")


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    root = write_flat(tmp_path / "root")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a disk with room for 32 images
    try:
        with pytest.raises(StorageError, match=r"cannot write .*: File too large; "):
            prepare(root, tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "data" / "prepared").iterdir()) == []
