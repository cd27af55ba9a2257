"""Opening a model and the device that is really used."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CLASS_NAMES, expected_probabilities, load_digits, model_info, write_model

from cnnpipe.devices import ask_driver
from cnnpipe.errors import ConfigError, ModelError, ProviderError
from cnnpipe.inference.session import device_report, open_session

needs_no_driver = pytest.mark.skipif(bool(ask_driver().gpus), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


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
    assert (session.device, session.provider, session.threads) == ("cpu", "CPUExecutionProvider", 1)


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
    assert "NVIDIA driver" in caplog.text or "macOS" in caplog.text
    assert capfd.readouterr() == ("", "")


@needs_no_driver
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_request_without_cuda_raises(model: Path, device: str) -> None:
    with pytest.raises(ProviderError, match=f"{device} cannot be used: .*(NVIDIA driver|macOS)"):
        open_session(model, device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "CPU", ""])
def test_unknown_device_is_a_setting_error(model: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N, received"):
        open_session(model, device)


def test_threads_must_be_positive(model: Path) -> None:
    with pytest.raises(ConfigError, match="threads must be at least 1, received 0"):
        open_session(model, "cpu", threads=0)


@pytest.mark.parametrize("content", [b"", b"this is a text file, not a model\n", b"PK\x03\x04" + bytes(100)])
def test_file_that_is_no_model_is_refused_in_one_line(
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
    with pytest.raises(ModelError, match="cannot read the model"):
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


def test_probabilities_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    session = open_session(write_model(tmp_path / "model.onnx", scale=float("nan")), "cpu")
    with pytest.raises(ModelError, match="no numbers"):
        session.run(rgb_digits(1))


def test_device_report_is_json() -> None:
    report = device_report()
    assert json.loads(json.dumps(report)) == report
    assert bool(report["gpus"]) or report["problem"]


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(model: Path) -> None:
    images = rgb_digits(300)
    session = open_session(model, "cuda")
    assert (session.device, session.provider) == ("cuda:0", "CUDAExecutionProvider")
    np.testing.assert_allclose(session.run(images), open_session(model, "cpu").run(images), atol=1e-3)
    with pytest.raises(ProviderError, match="there is no GPU 99, only cuda:0"):
        open_session(model, "cuda:99")
