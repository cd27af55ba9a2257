"""The ONNX model as the contract says it is, and the parity check that guards it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cnnpipe import __version__
from cnnpipe.errors import ModelError, ParityError, RegistryError
from cnnpipe.evaluate.metrics import PROBABILITIES_FILE, compare_probabilities
from cnnpipe.export.onnx import convert_model, export_run
from cnnpipe.machine import find_processor
from cnnpipe.manifest import ModelInfo
from cnnpipe.prepare.dataset import DATASET_FILE, PreparedDataset
from cnnpipe.session import device_report
from cnnpipe.settings import ExportSettings
from cnnpipe.storage import sha256_file
from cnnpipe.train.backend import keras
from cnnpipe.train.networks import average_views, build_network, measure_input, prediction_views


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_input_and_output_are_the_contracts(finished_run: Path) -> None:
    model = onnx.load(finished_run / "model.onnx")
    (image_input,), (output,) = model.graph.input, model.graph.output

    assert (image_input.name, image_input.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert dims(image_input) == ["batch", 32, 32, 3]
    assert (output.name, output.type.tensor_type.elem_type) == ("probabilities", onnx.TensorProto.FLOAT)
    assert dims(output) == ["batch", 10]
    onnx.checker.check_model(model, full_check=True)


def test_no_shape_arithmetic_is_left_in_the_graph(finished_run: Path) -> None:
    graph = onnx.load(finished_run / "model.onnx").graph

    leftovers = {"Shape", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Identity"}
    assert leftovers.isdisjoint(node.op_type for node in graph.node)
    assert [node.op_type for node in graph.node].count("Add") == 2  # the biases of the two dense layers
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_any_batch_size_gives_the_trained_models_probabilities(finished_run: Path, digits: PreparedDataset) -> None:
    session = onnxruntime.InferenceSession(finished_run / "model.onnx", providers=["CPUExecutionProvider"])
    images = np.asarray(digits.images("test")[:64])
    trained = keras.saving.load_model(finished_run / "model.keras").predict(images, verbose=0)
    for batch in (1, 2, 7, 64):
        (probabilities,) = session.run(None, {"images": images[:batch]})
        np.testing.assert_allclose(probabilities, trained[:batch], atol=1e-5)


def test_the_file_tells_a_client_all_it_needs(finished_run: Path, digits: PreparedDataset) -> None:
    metadata = {each.key: each.value for each in onnx.load(finished_run / "model.onnx").metadata_props}
    metrics = json.loads((finished_run / "metrics.json").read_text())

    assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["image_size"]) == [32, 32]
    assert json.loads(metadata["test_accuracy"]) == metrics["accuracy"]
    assert metadata["dataset_fingerprint"] == digits.fingerprint
    assert metadata["run_id"] == finished_run.name
    assert metadata["cnnpipe_version"] == __version__
    info = ModelInfo.from_metadata(metadata, finished_run)
    assert info.training_statistics.num_images == digits.num_images["train"]


def test_parity_is_recorded_with_the_digest_of_the_file(finished_run: Path, digits: PreparedDataset) -> None:
    record = json.loads((finished_run / "parity.json").read_text())
    parity = record["fp32"]

    assert parity["sha256"] == sha256_file(finished_run / "model.onnx")
    assert parity["num_images"] == digits.num_images["test"]
    assert parity["agreement"] >= 0.999
    assert parity["max_difference"] <= 1e-4


def test_variants_are_recorded_with_their_own_figures_and_digests(finished_run: Path, digits: PreparedDataset) -> None:
    record = json.loads((finished_run / "parity.json").read_text())

    assert list(record) == ["fp32", "int8", "fp16"]
    for precision in ("int8", "fp16"):
        variant = record[precision]
        assert variant["kept"]
        assert variant["sha256"] == sha256_file(finished_run / f"model.{precision}.onnx")
        assert variant["num_images"] == digits.num_images["test"]
        assert variant["accuracy"] >= record["fp32"]["accuracy"] - ExportSettings().max_accuracy_loss
        assert 0 < variant["max_difference"] < 0.5
    assert record["int8"]["relative_speed"] > 0
    assert record["int8"]["measured_on"] == find_processor().model
    problem = device_report()["problem"]
    assert (record["fp16"]["relative_speed"] is not None) == (not problem) == bool(record["fp16"]["measured_on"])
    assert not problem or f"speed not measured: {problem}" in record["fp16"]["reason"]


def test_variants_are_among_the_files_that_the_manifest_lists(finished_run: Path) -> None:
    files = json.loads((finished_run / "manifest.json").read_text())["files"]
    parity = json.loads((finished_run / "parity.json").read_text())

    assert files["model.int8.onnx"]["sha256"] == parity["int8"]["sha256"]
    assert files["model.fp16.onnx"]["sha256"] == parity["fp16"]["sha256"]


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_variant_keeps_the_contract_and_says_its_precision_and_accuracy(finished_run: Path, precision: str) -> None:
    reference = onnx.load(finished_run / "model.onnx")
    variant = onnx.load(finished_run / f"model.{precision}.onnx")

    assert variant.graph.input == reference.graph.input
    assert variant.graph.output == reference.graph.output
    onnx.checker.check_model(variant, full_check=True)
    theirs, ours = ({each.key: each.value for each in model.metadata_props} for model in (reference, variant))
    record = json.loads((finished_run / "parity.json").read_text())[precision]
    assert (theirs["precision"], ours["precision"]) == ("fp32", precision)
    assert json.loads(ours["test_accuracy"]) == record["accuracy"]
    assert ours == theirs | {key: ours[key] for key in ("precision", "test_accuracy")}


def test_variants_that_are_not_wanted_are_not_made_and_old_ones_go(unfinished_run: Path) -> None:
    export_run(unfinished_run, ExportSettings(int8=False, fp16=False))

    assert sorted(file.name for file in unfinished_run.glob("*.onnx")) == ["model.onnx"]
    assert list(json.loads((unfinished_run / "parity.json").read_text())) == ["fp32"]


def test_a_variant_that_loses_too_much_is_not_kept_and_says_why(
    unfinished_run: Path, digits: PreparedDataset, caplog: pytest.LogCaptureFixture
) -> None:
    # Seen with one dark image only, the activations of all others are cut off.
    settings = ExportSettings(calibration_images=1, fp16=False)
    _blank_training_images(unfinished_run, digits)

    export_run(unfinished_run, settings)

    assert (unfinished_run / "model.onnx").is_file()
    assert not (unfinished_run / "model.int8.onnx").exists()
    record = json.loads((unfinished_run / "parity.json").read_text())["int8"]
    assert not record["kept"]
    assert record["accuracy"] < 0.9
    assert len(record["disagreements"]) == 10
    assert record["sha256"] == ""
    assert "int8: not kept, loses " in caplog.text
    assert record["reason"].endswith("points of accuracy, at most 0.50")


@pytest.fixture
def unfinished_run(finished_run: Path, tmp_path: Path) -> Path:
    run = tmp_path / "artifacts" / "digits" / "runs" / finished_run.name
    shutil.copytree(finished_run, run)
    (run / "manifest.json").unlink()
    return run


def _blank_training_images(run: Path, digits: PreparedDataset) -> None:
    """Let a run's dataset be a copy of the digits with 4 blank training images."""
    folder = Path(shutil.copytree(digits.path, run.parent / "blank" / digits.path.name))
    np.save(folder / "train_images.npy", np.zeros((4, 32, 32, 3), np.uint8))
    np.save(folder / "train_labels.npy", np.zeros(4, np.int64))
    (folder / "train_digests.npy").unlink()
    description = json.loads((folder / DATASET_FILE).read_text())
    description["num_images"]["train"] = 4
    (folder / DATASET_FILE).write_text(json.dumps(description))
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"dataset": str(folder)}))


def test_comparison_names_the_images_that_disagree() -> None:
    reference = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], np.float32)
    exported = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]], np.float32)

    parity = compare_probabilities(reference, exported, ["a.png", "b.png", "c.png"])

    assert parity.agreement == pytest.approx(2 / 3)
    assert parity.max_difference == pytest.approx(0.3)
    assert parity.disagreements == ("b.png",)


def test_a_model_that_disagrees_fails_the_run_and_is_not_kept(unfinished_run: Path) -> None:
    (unfinished_run / "model.onnx").unlink()

    with pytest.raises(ParityError, match=r"differs by \d\.\de-\d+ \(at most 1\.0e-30\); it was not kept"):
        export_run(unfinished_run, ExportSettings(max_difference=1e-30))

    assert not (unfinished_run / "model.onnx").exists()
    assert not list(unfinished_run.glob(".model*"))


def test_a_run_that_lacks_what_is_exported_or_compared_with_is_refused(unfinished_run: Path) -> None:
    (unfinished_run / PROBABILITIES_FILE).unlink()
    with pytest.raises(RegistryError, match=r"has no probabilities_test\.npy: evaluate it with `cnnpipe evaluate"):
        export_run(unfinished_run)
    (unfinished_run / "model.keras").unlink()
    with pytest.raises(ModelError, match=r"model\.keras"):
        export_run(unfinished_run)


@pytest.mark.parametrize(
    ("preset", "flips", "image_size", "num_classes"),
    [
        ("baseline", False, (64, 64), 100),
        ("fast", False, (64, 64), 100),
        ("fast", True, (16, 24), 2),
        ("accurate", True, (16, 24), 2),
        ("wide", True, (16, 24), 2),
    ],
)
def test_every_preset_exports_at_any_size_and_number_of_classes(
    preset: str, flips: bool, image_size: tuple[int, int], num_classes: int
) -> None:
    train = np.random.default_rng(1).integers(0, 256, (9, *image_size, 3), np.uint8)
    model = build_network(preset, image_size, num_classes, measure_input(train))
    views = prediction_views(image_size, flips=flips, shifts=preset == "wide")
    model = average_views(model, views) if len(views) > 1 else model
    images = np.random.default_rng(0).integers(0, 256, (3, *image_size, 3), dtype=np.uint8)

    graph = convert_model(model, image_size, opset=17)

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"images": images})
    np.testing.assert_allclose(probabilities, model.predict(images, verbose=0), atol=1e-5)
    kinds = [node.op_type for node in graph.graph.node]
    assert "Shape" not in kinds
    assert kinds.count("Concat") == flips
