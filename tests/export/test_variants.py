"""int8 and fp16 models: what their graphs compute, what they are calibrated on, and that no CPU cuts a sum off."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnnpipe.errors import ModelError
from cnnpipe.evaluate.evaluation import predict_onnx
from cnnpipe.export.graphs import feed_pixels
from cnnpipe.export.onnx import convert_model
from cnnpipe.export.variants import convert_fp16, measure_relative_speed, quantize_int8, sample_calibration_images
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import open_session
from cnnpipe.train.networks import build_network, measure_input

RANDOM = np.random.default_rng(0)


def make_network(
    image_size: tuple[int, int] = (8, 8),
    kernel: tuple[int, int] = (3, 3),
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    strides: tuple[int, int] = (1, 1),
    *,
    bias: bool = True,
    relu: bool = True,
    scale: Any = 1 / 255,
    perm: tuple[int, int, int, int] = (0, 3, 1, 2),
) -> onnx.ModelProto:
    """Make a network of one convolution and one dense layer, as the conversion from Keras writes it."""
    values = {
        "scale": np.asarray(scale, np.float32),
        "filters": RANDOM.normal(0, 0.3, (5, 3, *kernel)).astype(np.float32),
        "conv_bias": RANDOM.normal(0, 0.3, 5).astype(np.float32),
        "weights": RANDOM.normal(0, 0.3, (5, 4)).astype(np.float32),
        "bias": RANDOM.normal(0, 0.3, 4).astype(np.float32),
    }
    inputs = ["channels_first", "filters", *(["conv_bias"] if bias else [])]
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["channels_first"], perm=perm),
        helper.make_node("Conv", inputs, ["conv"], kernel_shape=kernel, pads=pads, strides=strides, name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("ReduceMean", ["relu" if relu else "conv"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["product"], name="dense"),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    if not relu:
        del nodes[4]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *image_size, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value, name) for name, value in values.items() if bias or name != "conv_bias"],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def random_images(number: int, image_size: tuple[int, int] = (8, 8)) -> npt.NDArray[np.uint8]:
    return RANDOM.integers(0, 256, (number, *image_size, 3), dtype=np.uint8)


def run(model: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def first_filters(model: onnx.ModelProto) -> tuple[int, ...]:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    return next(tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name == conv.input[1])


@pytest.mark.parametrize(
    ("settings", "filters"),
    [
        ({}, (20, 12, 3, 3)),
        ({"image_size": (6, 16), "relu": False}, (20, 12, 3, 3)),
        ({"bias": False}, (20, 12, 3, 3)),
        ({"kernel": (5, 5), "pads": (2, 2, 2, 2)}, (20, 12, 5, 3)),
        ({"kernel": (1, 7), "pads": (0, 3, 0, 3)}, (20, 12, 1, 3)),
        ({"kernel": (2, 2), "pads": (0, 0, 1, 1)}, (20, 12, 2, 2)),
        ({"kernel": (3, 12), "pads": (1, 9, 1, 2), "image_size": (8, 12)}, (20, 12, 3, 5)),
    ],
)
def test_first_convolution_over_groups_of_pixels_computes_the_same(
    settings: dict[str, Any], filters: tuple[int, ...]
) -> None:
    model = make_network(**settings)
    images = random_images(5, settings.get("image_size", (8, 8)))
    expected = run(model, images)

    feed_pixels(model)

    onnx.checker.check_model(model, full_check=True)
    assert first_filters(model) == filters
    np.testing.assert_allclose(run(model, images), expected, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": (8, 10)},  # no whole groups in a row
        {"strides": (2, 2)},
        {"pads": (0, 0, 0, 0)},
        {"kernel": (1, 1), "pads": (0, 0, 0, 0)},
    ],
)
def test_first_convolution_of_another_shape_keeps_its_filters_and_reads_the_pixels_all_the_same(
    settings: dict[str, Any],
) -> None:
    model = make_network(**settings)
    images = random_images(5, settings.get("image_size", (8, 8)))
    expected, filters = run(model, images), first_filters(model)

    feed_pixels(model)

    assert first_filters(model) == filters
    assert operators(model)[:3] == ["Transpose", "DequantizeLinear", "Conv"]
    np.testing.assert_allclose(run(model, images), expected, atol=1e-6)


@pytest.mark.parametrize("settings", [{"scale": [0.1, 0.2, 0.3]}, {"perm": (0, 3, 2, 1)}])
def test_network_that_begins_otherwise_is_left_as_it_is(settings: dict[str, Any]) -> None:
    model = make_network(**settings)
    before = model.SerializeToString()
    feed_pixels(model)
    assert model.SerializeToString() == before


def test_int8_computes_the_layers_in_int8_and_reads_the_images_themselves(finished_run: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(finished_run / "model.int8.onnx", options, providers=["CPUExecutionProvider"])

    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node

    # Only the last layer and the softmax are float32, and no layout is changed in between.
    assert [node.op_type for node in nodes if node.op_type != "Reshape"] == [
        *("QLinearConv", "NhwcMaxPool", "QLinearConv", "NhwcMaxPool", "QLinearConv", "QGemm"),
        *("DequantizeLinear", "Gemm", "Softmax"),
    ]
    assert nodes[0].input[0] == "images"


def test_int8_weights_never_overflow_the_sums_of_a_cpu_without_vnni(finished_run: Path) -> None:
    graph = onnx.load(finished_run / "model.int8.onnx").graph
    weights = [numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == TensorProto.INT8]
    weights = [each for each in weights if each.ndim > 1]
    assert len(weights) == 4
    # Two products of a pixel and a weight are added in 16 bits there.
    assert max(2 * 255 * int(np.abs(each.astype(int)).max()) for each in weights) < 2**15
    assert any(np.abs(each).max() > 60 for each in weights)


def test_int8_has_a_scale_for_each_filter(finished_run: Path) -> None:
    graph = onnx.load(finished_run / "model.int8.onnx").graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    filters = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in sizes]
    scales = [sizes[scale] for tensor, scale, *_ in filters if len(sizes[tensor]) == 4]
    assert sorted(scales) == [[64], [64], [4 * 32]]  # the first layer takes four pixels at once


def test_network_that_whitens_gray_images_is_close_to_the_original_in_int8(
    digits: PreparedDataset, tmp_path: Path
) -> None:
    train, images = digits.images("train"), np.asarray(digits.images("test")[:64])
    graph = convert_model(build_network("fast", (32, 32), 10, measure_input(train)), (32, 32), opset=17)

    quantized = quantize_int8(graph, sample_calibration_images(digits, 64), tmp_path)

    tensors = [numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer]
    filters = [(each.dtype.name, each.shape) for each in tensors if each.ndim == 4]
    assert ("float32", (16, 3, 2, 2)) in filters
    assert [kind for kind, _ in filters].count("int8") == 6
    np.testing.assert_allclose(run(quantized, images), run(graph, images), atol=0.05)


def test_calibration_never_sees_val_or_test_images(digits: PreparedDataset, tmp_path: Path) -> None:
    copy = replace(digits, path=tmp_path / "digits")
    shutil.copytree(digits.path, copy.path)
    for split in ("val", "test"):
        (copy.path / f"{split}_images.npy").unlink()

    images = sample_calibration_images(copy, 100)

    training = {image.tobytes() for image in digits.images("train")}
    assert len({image.tobytes() for image in images} & training) == 100


def test_calibration_takes_the_same_images_every_time_and_no_more_than_there_are(digits: PreparedDataset) -> None:
    first, again = sample_calibration_images(digits, 64), sample_calibration_images(digits, 64)
    np.testing.assert_array_equal(first, again)
    assert len(sample_calibration_images(digits, 100_000)) == digits.num_images["train"]


def test_quantising_twice_gives_the_same_bytes_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, images = make_network(), random_images(20)
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(quantize_int8(model, images, tmp_path / name).SerializeToString())
    assert made[0] == made[1]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_warnings_of_onnxruntime_are_seen_again_after_quantising(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_network()
    quantize_int8(model, random_images(4), tmp_path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "unused"))
    run(model, random_images(1))
    assert "'unused'" in capfd.readouterr().err


def test_quantised_network_is_close_to_the_original(tmp_path: Path) -> None:
    model, images = make_network((32, 32)), random_images(64, (32, 32))
    expected = run(model, images)
    np.testing.assert_allclose(run(quantize_int8(model, images, tmp_path), images), expected, atol=0.02)
    np.testing.assert_allclose(run(convert_fp16(model), images), expected, atol=2e-3)


def test_fp16_computes_all_but_the_softmax_in_fp16() -> None:
    model = make_network()
    converted = convert_fp16(model)

    assert operators(converted)[-3:] == ["Add", "Cast", "Softmax"]
    assert {tensor.data_type for tensor in converted.graph.initializer} == {TensorProto.FLOAT16}
    assert converted.graph.input == model.graph.input
    assert converted.graph.output == model.graph.output
    assert run(converted, random_images(20)).sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_model_that_cannot_be_quantised_is_told_in_one_line(tmp_path: Path) -> None:
    model = make_network()
    model.graph.node[3].op_type = "Kovn"
    with pytest.raises(ModelError, match=r"this model cannot be made int8: .*; use --no-int8") as caught:
        quantize_int8(model, random_images(4), tmp_path)
    assert "\n" not in str(caught.value)


def test_relative_speed_is_the_ratio_of_the_times_in_full_batches(digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("test")[:3])  # fewer than a batch
    slow, fast = _SleepingSession(0.02), _SleepingSession(0.005)
    assert measure_relative_speed(fast, slow, images) > 1  # type: ignore[arg-type]
    assert set(slow.batches + fast.batches) == {(8, 32, 32, 3)}


class _SleepingSession:
    """A session that takes at least `seconds` for a batch."""

    default_batch_size = 8

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.batches: list[tuple[int, ...]] = []

    def run(self, images: npt.NDArray[np.uint8]) -> None:
        self.batches.append(images.shape)
        time.sleep(self.seconds)


@pytest.mark.parametrize("threads", [1, 2])
def test_variant_gives_the_same_probabilities_for_every_batch_and_thread(
    finished_run: Path, digits: PreparedDataset, threads: int
) -> None:
    images = np.asarray(digits.images("test")[:70])
    session = open_session(finished_run, "cpu", threads=threads, precision="int8")
    expected = predict_onnx(open_session(finished_run, "cpu", threads=1, precision="int8"), images, 70)
    for batch_size in (1, 7, 32):
        np.testing.assert_allclose(predict_onnx(session, images, batch_size), expected, atol=1e-6)
