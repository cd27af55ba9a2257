"""Opening a model and the device that is really used."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from tiny_models import CLASS_NAMES, expected_probabilities, load_digits, model_info, write_model

from cnnpipe.errors import ConfigError, ModelError, ProviderError
from cnnpipe.machine import ask_driver, free_gpu_memory
from cnnpipe.manifest import MODEL_FILES, PARITY_FILE
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.session import (
    BoundBuffers,
    cuda_batch_size,
    cuda_options,
    device_report,
    is_out_of_memory,
    open_session,
    silent_onnxruntime,
)

# As onnxruntime printed them on the machines of people who reported them, but for the names of those machines.
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
    "Name:'fc1/Conv' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, "
    "onnxruntime::WaitNotificationFn) Failed to allocate memory for requested buffer of size 4585490524",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running TfIdfVectorizer node. "
    "Status Message: bfc_arena.cc:376 void *onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, "
    "onnxruntime::Stream *, bool, onnxruntime::WaitNotificationFn) Available memory of 0 is smaller than requested "
    "bytes of 135383040",
    "[ONNXRuntimeError] : 1 : FAIL : D:\\a\\_work\\1\\s\\onnxruntime\\core\\providers\\cuda\\cuda_call.cc:121 "
    "onnxruntime::CudaCall CUDA failure 2: out of memory ; GPU=0 ; hostname=H ; file=cuda_stream_handle.cc ; "
    "line=175 ; expr=cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Gemm node. "
    "Name:'fullyconnected0' Status Message: CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=H ; "
    "file=cuda_execution_provider.cc ; line=168 ; expr=cublasCreate(&cublas_handle_);",
    "CUDNN failure 2: CUDNN_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=H ; expr=cudnnCreate(&cudnn_handle_);",
    "CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0 ; hostname=H",
)
OTHER_FAILURES = (
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=H ; expr=cudaStreamSynchronize",
    "CUDA failure 209: no kernel image is available for execution on the device ; GPU=0 ; hostname=H",
    "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0 ; hostname=H ; expr=cublasSgemm",
    "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ; hostname=H",
    "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: images",
)

needs_no_driver = pytest.mark.skipif(bool(ask_driver().gpus), reason="this machine has a GPU")


def rgb_digits(count: int) -> Any:
    return np.repeat(load_digits()[0][:count, :, :, None], 3, axis=3)


def test_session_gives_the_models_probabilities(model: Path) -> None:
    images = rgb_digits(100)
    probabilities = open_session(model, "cpu").run(images)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected_probabilities(images), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7, 33])
def test_session_takes_any_batch_size(model: Path, count: int) -> None:
    assert open_session(model, "cpu").run(rgb_digits(count)).shape == (count, 10)


def test_session_says_which_model_and_device_it_is(model: Path) -> None:
    session = open_session(model, "cpu", threads=1)
    assert session.info == model_info()
    assert session.model_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (session.device, session.provider) == ("cpu", "CPUExecutionProvider")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 9, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8), np.uint8),
    ],
)
def test_images_of_another_shape_or_type_are_refused(model: Path, images: Any) -> None:
    with pytest.raises(ModelError, match=r"needs uint8 images of shape \(N, 8, 8, 3\), received"):
        open_session(model, "cpu").run(images)


@needs_no_driver
def test_auto_takes_the_cpu_without_a_driver_and_says_why(
    model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="cnnpipe"):
        session = open_session(model)
    assert session.device == "cpu"
    assert "device auto: the CPU" in caplog.text
    assert "NVIDIA driver" in caplog.text
    assert capfd.readouterr() == ("", "")


@needs_no_driver
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_request_without_cuda_raises(model: Path, device: str) -> None:
    with pytest.raises(ProviderError, match=f"{device} cannot be used: .*NVIDIA driver"):
        open_session(model, device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "CPU", ""])
def test_unknown_device_is_a_setting_error(model: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N, received"):
        open_session(model, device)


@pytest.mark.parametrize("content", [b"", b"this is a text file, not a model\n", b"PK\x03\x04" + bytes(100)])
def test_file_that_is_not_a_model_is_refused_in_one_line(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx is not an ONNX model that can be run") as caught:
        open_session(path, "cpu")
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_model_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read the model .*none\.onnx: No such file"):
        open_session(tmp_path / "none.onnx", "cpu")
    with pytest.raises(ModelError, match=r"has no model\.onnx; finish it with `cnnpipe export"):
        open_session(tmp_path, "cpu")


def test_onnx_model_of_others_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx", metadata=False)
    with pytest.raises(ModelError, match="carries no cnnpipe metadata"):
        open_session(path, "cpu")


@pytest.mark.parametrize(
    ("changes", "info"),
    [
        ({"names": ("pixels_in", "probabilities")}, {}),
        ({"names": ("images", "scores")}, {}),
        ({"input_type": "FLOAT"}, {}),
        ({}, {"image_size": (16, 8)}),
        ({}, {"class_names": CLASS_NAMES[:9]}),
    ],
)
def test_model_that_breaks_the_contract_is_refused(
    tmp_path: Path, changes: dict[str, Any], info: dict[str, Any]
) -> None:
    path = write_model(tmp_path / "model.onnx", model_info(**info), **changes)
    with pytest.raises(ModelError, match=r"must take .* and give .*, received"):
        open_session(path, "cpu")


def test_model_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes only batches of 4"):
        open_session(write_model(tmp_path / "model.onnx", batch=4), "cpu")


def test_probabilities_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    session = open_session(write_model(tmp_path / "model.onnx", scale=float("nan")), "cpu")
    with pytest.raises(ModelError, match="not numbers"):
        session.run(rgb_digits(1))


def test_run_folder_opens_with_the_model_of_the_precision(finished_run: Path, digits: PreparedDataset) -> None:
    images = np.asarray(digits.images("test")[:50])
    probabilities: dict[str, Any] = {}
    for precision in ("fp32", "int8", "fp16"):
        session = open_session(finished_run, "cpu", precision=precision)
        assert session.precision == precision
        assert session.path == finished_run / MODEL_FILES[session.precision]
        probabilities[precision] = session.run(images)
    for precision, tolerance in (("int8", 0.2), ("fp16", 0.01)):
        assert 0 < np.abs(probabilities[precision] - probabilities["fp32"]).max() < tolerance


@needs_no_driver
def test_auto_device_takes_the_precision_of_the_cpu_where_there_is_no_gpu(artifacts: Path, tmp_path: Path) -> None:
    run = next((artifacts / "digits" / "runs").iterdir())
    for relative_speed, precision in ((2.0, "int8"), (0.9, "fp32")):
        parity = json.loads((run / PARITY_FILE).read_text())
        parity["int8"]["relative_speed"] = relative_speed
        (run / PARITY_FILE).write_text(json.dumps(parity))
        session = open_session(run)
        assert session.precision == precision
        assert session.precision_reason.startswith(f"int8 was {relative_speed:.2f} times as fast as fp32")


def test_file_given_by_its_path_is_taken_as_it_is(finished_run: Path) -> None:
    assert open_session(finished_run / "model.onnx", "cpu").precision == "fp32"
    assert open_session(finished_run / "model.fp16.onnx", "cpu").precision == "fp16"
    assert open_session(finished_run / "model.int8.onnx", "cpu", precision="int8").precision == "int8"
    with pytest.raises(ModelError, match=r"model\.onnx is fp32, not int8; name the run folder"):
        open_session(finished_run / "model.onnx", "cpu", precision="int8")


def test_model_of_an_earlier_version_is_fp32_and_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx")
    assert open_session(path, "cpu").precision == "fp32"
    model = onnx.load(path)
    onnx.helper.set_model_props(model, model_info().to_metadata() | {"precision": "int4"})
    onnx.save(model, path)
    with pytest.raises(ModelError, match="must be of precision fp32, int8, fp16, received 'int4'"):
        open_session(path, "cpu")


def test_unknown_precision_is_a_setting_error(model: Path) -> None:
    with pytest.raises(ConfigError, match="precision must be auto, fp32, int8, fp16, received 'int4'"):
        open_session(model, "cpu", precision="int4")


def test_bound_buffers_give_what_a_plain_run_gives_for_every_batch(model: Path) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    buffers = BoundBuffers(session, len(CLASS_NAMES), "cpu")
    images = rgb_digits(120)
    batches = [images[:32], images[32:64], images[64:80], images[88:120], images[::4]]
    results = [buffers.run(batch) for batch in batches]
    buffers.release()
    results.append(buffers.run(batches[0]))
    for batch, result in zip([*batches, batches[0]], results, strict=True):
        np.testing.assert_allclose(result, expected_probabilities(batch), atol=1e-5)


def test_tf32_is_off_but_for_fp16_which_needs_the_tensor_cores(finished_run: Path) -> None:
    options = {each: cuda_options(1, (finished_run / name).read_bytes()) for each, name in MODEL_FILES.items()}
    assert {each: values["use_tf32"] for each, values in options.items()} == {"fp32": "0", "int8": "0", "fp16": "1"}
    assert {values["device_id"] for values in options.values()} == {"1"}


GIB = 2**30


@pytest.mark.parametrize(
    ("image_size", "free_bytes", "batch_size"),
    [
        ((32, 32), 80 * GIB, 2048),
        ((8, 8), 80 * GIB, 2048),
        ((64, 64), 80 * GIB, 512),
        ((48, 40), 80 * GIB, 1024),
        ((224, 224), 80 * GIB, 256),
        ((224, 224), 8 * GIB, 64),
        ((32, 32), 3 * GIB, 1024),
        ((32, 32), 100_000_000, 32),
        ((1024, 1024), GIB, 1),
        ((32, 32), 0, 1),
    ],
)
def test_batch_of_a_gpu_suits_its_free_memory_and_divides_a_shard(
    image_size: tuple[int, int], free_bytes: int, batch_size: int
) -> None:
    assert cuda_batch_size(image_size, free_bytes) == batch_size
    assert 4096 % batch_size == 0


def test_batch_of_a_cpu_has_32_images_of_any_size(model: Path) -> None:
    assert open_session(model, "cpu").default_batch_size == 32


class _FakeDriver:
    """Answers as libcuda does with 5 GB free of 8; notes what is called."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuMemGetInfo_v2":
                arguments[0]._obj.value, arguments[1]._obj.value = 5_000_000_000, 8_000_000_000
            return 201 if name == self._failing else 0

        return call


@pytest.mark.parametrize(
    "failing", ["", "cuInit", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"]
)
def test_free_memory_is_the_drivers_and_every_context_is_given_back(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = _FakeDriver(failing)
    monkeypatch.setattr("cnnpipe.machine.ctypes.CDLL", lambda _: driver)
    if failing:
        with pytest.raises(ProviderError, match="cannot read the free memory of cuda:1: CUDA error 201"):
            free_gpu_memory(1)
    else:
        assert free_gpu_memory(1) == 5_000_000_000
    given_back = [
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2"),
        ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"),
    ]
    for taken, given in given_back:
        assert (taken in driver.calls and taken != failing) == (given in driver.calls)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_lack_of_gpu_memory_is_told_from_the_message(message: str) -> None:
    assert is_out_of_memory(message)


@pytest.mark.parametrize("message", OTHER_FAILURES)
def test_other_failures_of_the_gpu_are_not_a_lack_of_memory(message: str) -> None:
    assert not is_out_of_memory(message)


def test_message_of_the_real_runtime_is_known() -> None:
    node = onnx.helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    shape = onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [1])
    zeros = onnx.helper.make_tensor_value_info("zeros", onnx.TensorProto.FLOAT, [None])
    graph = onnx.helper.make_graph([node], "full", [shape], [zeros])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(RuntimeException) as caught:
        session.run(None, {"shape": np.array([2**45])})  # the arena of the CPU speaks as the one of CUDA does
    assert is_out_of_memory(str(caught.value))


def test_onnxruntime_is_silent_inside_the_block_and_warns_again_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    unused = onnx.helper.make_tensor("unused", onnx.TensorProto.FLOAT, [1], [1.0])  # onnxruntime warns of it
    relu = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([relu], "graph", tensors[:1], tensors[1:], [unused])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)

    def warnings() -> int:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return capfd.readouterr().err.count("unused")

    with silent_onnxruntime():
        assert warnings() == 0
    assert warnings() == 1


def test_device_report_is_json() -> None:
    report = device_report()
    assert json.loads(json.dumps(report)) == report
    assert bool(report["gpus"]) or report["problem"]


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(model: Path) -> None:
    images = rgb_digits(300)
    session = open_session(model, "cuda")
    assert (session.device, session.provider) == ("cuda:0", "CUDAExecutionProvider")
    np.testing.assert_allclose(session.run(images), open_session(model, "cpu").run(images), atol=1e-4)
    assert session.default_batch_size in (256, 512, 1024, 2048)
    with pytest.raises(ProviderError, match="there is no GPU 99, only cuda:0"):
        open_session(model, "cuda:99")
