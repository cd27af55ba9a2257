"""Which file of a run is opened for a device and a precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cnnpipe.errors import ModelError
from cnnpipe.manifest import MODEL_FILES, PARITY_FILE, choose_model_file, read_parity
from cnnpipe.registry import resolve_model, resolve_model_file


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
    assert resolve_model_file("digits/A", tmp_path) == run / "model.onnx"
    with pytest.raises(ModelError, match="has no fp16 model"):
        resolve_model("digits/A", tmp_path, "fp16")
    own = run / "model.onnx"
    assert resolve_model(str(own), tmp_path, "fp16") == own  # what it is stands in the file, and is seen on opening
