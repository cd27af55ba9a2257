"""A run folder: metadata that survive the ONNX file and the manifest, the history, and the choice of a model file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.manifest import (
    HISTORY_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    FileDigest,
    ModelInfo,
    RunManifest,
    TrainingStatistics,
    best_epoch,
    choose_model_file,
    digest_files,
    read_history,
    read_manifest,
    read_parity,
    write_manifest,
)
from cnnpipe.registry import resolve_model

STATISTICS = TrainingStatistics(
    num_images=1149,
    channel_mean=(78.1, 78.2, 1 / 3),
    channel_std=(91.0, 91.5, 92.0),
    brightness_deciles=tuple(float(number) for number in range(11)),
    class_shares=(0.3, 0.7),
)


def _info(class_names: tuple[str, ...] = ("cat", "dog")) -> ModelInfo:
    return ModelInfo(
        cnnpipe_version="0.1.0",
        name="pets",
        run_id="20260101T020000Z",
        preset="baseline",
        class_names=class_names,
        image_size=(32, 48),
        dataset_fingerprint="0123456789ab",
        test_accuracy=2 / 3,
        training_statistics=STATISTICS,
    )


def _manifest() -> RunManifest:
    return RunManifest(
        model=_info(),
        created="2026-01-01T02:00:00+00:00",
        dataset={"name": "pets", "num_images": {"train": 1149}},
        metrics={"accuracy": 2 / 3},
        parity={"fp32": {"agreement": 1.0}},
        promoted=True,
        promotion_reason="first champion",
        files={"model.onnx": FileDigest(bytes=3, sha256="0" * 64)},
    )


def test_metadata_are_text_with_a_key_for_each_field() -> None:
    metadata = _info(("Größe", "日本")).to_metadata()
    assert sorted(metadata) == sorted(ModelInfo.model_fields)
    assert metadata["name"] == "pets"
    assert metadata["class_names"] == '["Größe", "日本"]'
    assert metadata["image_size"] == "[32, 48]"
    assert json.loads(metadata["training_statistics"])["num_images"] == 1149


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=4))
def test_any_class_names_survive_an_onnx_file(names: list[str]) -> None:
    info = _info(tuple(names))
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, info.to_metadata())
    read = onnx.ModelProto.FromString(model.SerializeToString())
    metadata = {entry.key: entry.value for entry in read.metadata_props}
    assert ModelInfo.from_metadata(metadata, Path("model.onnx")) == info


def test_metadata_of_other_tools_beside_ours_are_passed_over() -> None:
    metadata = _info().to_metadata() | {"author": "somebody"}
    assert ModelInfo.from_metadata(metadata, Path("model.onnx")) == _info()


@pytest.mark.parametrize("key", sorted(ModelInfo.model_fields))
def test_missing_key_is_a_model_error(key: str) -> None:
    metadata = _info().to_metadata()
    del metadata[key]
    with pytest.raises(ModelError, match=r"other\.onnx is an ONNX file, but carries no cnnpipe metadata"):
        ModelInfo.from_metadata(metadata, Path("other.onnx"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("class_names", "cat,dog"), ("class_names", '["cat"]'), ("image_size", "[32]"), ("test_accuracy", "NaN")],
)
def test_damaged_key_is_a_model_error(key: str, value: str) -> None:
    with pytest.raises(ModelError, match="use one exported by `cnnpipe export`"):
        ModelInfo.from_metadata(_info().to_metadata() | {key: value}, Path("other.onnx"))


def test_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest())
    assert read_manifest(tmp_path) == _manifest()


def test_run_without_manifest_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=rf"is not a complete run: it has no {MANIFEST_FILE}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"model": 1}', b"\xff\xfe", b"[]"])
def test_damaged_manifest_is_a_registry_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(RegistryError, match=r"manifest\.json cannot be read: .*; train again") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_digests_are_of_every_finished_file_but_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"")
    (tmp_path / "a.csv").write_bytes(b"abc")
    (tmp_path / ".a.0123.csv").write_bytes(b"half")
    (tmp_path / MANIFEST_FILE).write_bytes(b"{}")
    (tmp_path / "folder").mkdir()
    digests = digest_files(tmp_path)
    assert list(digests) == ["a.csv", "b.csv"]
    assert digests["a.csv"].bytes == 3
    assert digests["a.csv"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


HEADER = "epoch,accuracy,loss,val_accuracy,val_loss,learning_rate,seconds\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"history\.csv has no epochs; train again"),
        (HEADER, r"history\.csv has no epochs; train again"),
        ("epoch,accuracy\n1,0.5\n", r"history\.csv is damaged: KeyError\('loss'\); train again"),
        ("\udcff", r"history\.csv is damaged: .*; train again"),
        (HEADER + "1,0.5,half\n", r"history\.csv is damaged: .*; train again"),
    ],
)
def test_damaged_history_is_a_registry_error(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RegistryError, match=r"has no history\.csv; train again"):
        read_history(tmp_path)
    (tmp_path / HISTORY_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RegistryError, match=message):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("accuracy", "loss", "best"),
    [
        ([0.6], [1.0], 0),
        ([0.6, 0.7, 0.7, 0.7, 0.6], [1.2, 1.1, 0.9, 0.9, 0.8], 2),  # then the lowest loss, then the first
        ([0.7, 0.7, 0.7], [math.nan, 1.0, math.inf], 1),
        ([0.7, 0.7], [math.nan, math.nan], 0),
    ],
)
def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss(
    accuracy: list[float], loss: list[float], best: int
) -> None:
    assert best_epoch(accuracy, loss) == best


def write_run(run: Path, precisions: tuple[str, ...] = ("fp32", "int8", "fp16"), **records: dict[str, Any]) -> Path:
    """Write a run folder with empty model files, and a `parity.json` that speaks well of them unless told otherwise."""
    run.mkdir(parents=True)
    for precision, name in MODEL_FILES.items():
        if precision in precisions:
            (run / name).touch()
    usual = {
        "int8": {"kept": True, "relative_speed": 2.0},
        "fp16": {"kept": True, "relative_speed": 1.4, "measured_on": "NVIDIA H100"},
    }
    parity = {"fp32": {}} | {each: usual[each] for each in precisions if each != "fp32"} | records
    (run / PARITY_FILE).write_text(json.dumps(parity))
    return run


def test_auto_takes_int8_on_the_cpu_and_fp16_on_cuda(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert choose_model_file(run, "cpu", "auto").path == run / "model.int8.onnx"
    assert choose_model_file(run, "cuda", "auto").path == run / "model.fp16.onnx"


@pytest.mark.parametrize("relative_speed", [1.0, 0.7, None])
def test_auto_takes_int8_only_where_it_was_measured_faster(tmp_path: Path, relative_speed: float | None) -> None:
    run = write_run(tmp_path / "run", int8={"kept": True, "relative_speed": relative_speed})
    assert choose_model_file(run, "cpu", "auto").path == run / "model.onnx"


@pytest.mark.parametrize("relative_speed", [1.0, 0.7, None])
def test_auto_takes_fp16_only_where_a_gpu_measured_it_faster(tmp_path: Path, relative_speed: float | None) -> None:
    run = write_run(tmp_path / "run", fp16={"kept": True, "relative_speed": relative_speed})
    assert choose_model_file(run, "cuda", "auto").path == run / "model.onnx"


def test_choice_says_what_it_was_made_by(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", int8={"kept": True, "relative_speed": 0.9})
    lost, old = write_run(tmp_path / "lost", ("fp32",)), write_run(tmp_path / "old", fp16={"kept": True})
    assert [
        choose_model_file(run, "cuda", "auto").reason,
        choose_model_file(run, "cpu", "auto").reason,
        choose_model_file(lost, "cuda", "auto").reason,
        choose_model_file(old, "cuda", "auto").reason,
        choose_model_file(run, "cuda", "fp32").reason,
        choose_model_file(run / "model.fp16.onnx", "cuda", "auto").reason,
    ] == [
        "fp16 was 1.40 times as fast as fp32 on NVIDIA H100 at export",
        "int8 was 0.90 times as fast as fp32 at export",
        "there is no fp16 model",
        "the gain of fp16 was not measured on a GPU",
        "asked for",
        "that of the file given",
    ]


def test_auto_takes_fp32_where_nothing_else_was_kept(tmp_path: Path) -> None:
    lost = {"kept": False, "relative_speed": None, "reason": "loses 0.90 points of accuracy, at most 0.50"}
    run = write_run(tmp_path / "run", ("fp32",), int8=lost, fp16=lost)
    for device in ("cpu", "cuda"):
        assert choose_model_file(run, device, "auto").path == run / "model.onnx"


def test_explicit_precision_is_taken_whatever_the_device_and_the_speed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", int8={"kept": True, "relative_speed": 0.5})
    for precision, name in MODEL_FILES.items():
        for device in ("cpu", "cuda"):
            assert choose_model_file(run, device, precision).path == run / name


def test_precision_that_a_run_lacks_is_refused_with_the_reason_and_the_way_to_make_it(tmp_path: Path) -> None:
    lost = {"kept": False, "reason": "loses 0.90 points of accuracy, at most 0.50"}
    run = write_run(tmp_path / "run", ("fp32", "fp16"), int8=lost)
    with pytest.raises(ModelError, match=r"has no int8 model \(not kept, loses 0\.90 points .*\), only fp32, fp16; .*"
                                         r"make it with `cnnpipe export "):  # fmt: skip
        choose_model_file(run, "cpu", "int8")
    (run / "manifest.json").touch()  # what is complete is not exported again
    with pytest.raises(ModelError, match="or train it again"):
        choose_model_file(run, "cpu", "int8")


def test_run_of_an_earlier_version_has_only_fp32(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("fp32",))
    (run / PARITY_FILE).write_text('{"fp32": {"agreement": 1.0}, "sha256": "00"}')
    assert choose_model_file(run, "cpu", "auto").path == run / "model.onnx"
    assert list(read_parity(run)) == ["fp32"]
    with pytest.raises(ModelError, match=r"has no int8 model \(it was not exported\), only fp32"):
        choose_model_file(run, "cpu", "int8")


def test_run_without_any_model_says_how_to_finish_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ())
    with pytest.raises(ModelError, match=r"has no model\.onnx; finish it with `cnnpipe export"):
        choose_model_file(run, "cpu", "auto")


@pytest.mark.parametrize("content", ["{", "[]", '{"int8": 1}', "\udcff"])
def test_damaged_figures_are_an_error_and_never_a_guess(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / PARITY_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"parity\.json (cannot be read|must hold an object for each precision)"):
        choose_model_file(run, "cpu", "auto")
    assert choose_model_file(run, "cpu", "fp32").path == run / "model.onnx"


def test_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = write_run(tmp_path / "run") / "model.onnx"
    assert choose_model_file(file, "cuda", "auto").path == file


def test_missing_precision_is_refused_when_the_model_is_looked_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "digits" / "runs" / "A", ("fp32",))
    assert resolve_model("digits/A", tmp_path) == run
    with pytest.raises(ModelError, match="has no fp16 model"):
        resolve_model("digits/A", tmp_path, "fp16")
    own = run / "model.onnx"
    assert resolve_model(str(own), tmp_path, "fp16") == own  # what it is stands in the file, and is seen on opening
