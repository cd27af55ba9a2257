"""An ONNX classifier on the device that was asked for: CUDA or CPU, never silently another.

onnxruntime lists CUDA wherever its GPU build is installed, and falls back to the CPU with no more than a line on
stderr. So the NVIDIA driver is asked first, and after opening it is checked which provider the session really has.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from cnnpipe.cuda import (
    CUDA,
    BoundBuffers,
    built_for_cuda,
    cuda_batch_size,
    cuda_options,
    cuda_problem,
    is_out_of_memory,
    missing_libraries,
)
from cnnpipe.devices import ask_driver, free_gpu_memory
from cnnpipe.errors import CnnpipeError, ConfigError, GpuMemoryError, ModelError, ProviderError, one_line
from cnnpipe.machine import usable_cores
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME, PRECISIONS, ChosenFile, ModelInfo, Precision, choose_model_file

__all__ = ["ClassifierSession", "device_report", "open_session"]

CPU: Final = "CPUExecutionProvider"

_CPU_BATCH_SIZE: Final = 32
"""Number of small images that stay in a CPU's cache: 17,900 images/s against 13,500 at 256."""

# The exceptions of onnxruntime have no common base but Exception.
_NOT_A_MODEL = (_ort.InvalidProtobuf, _ort.InvalidGraph, _ort.NoModel, _ort.NotImplemented, _ort.InvalidArgument)
_SESSION_ERRORS = (*_NOT_A_MODEL, _ort.Fail, _ort.RuntimeException, _ort.EPFail, _ort.NotFound, RuntimeError,
                   ValueError)  # fmt: skip

_logger = logging.getLogger(__name__)


class ClassifierSession:
    """A model that is ready to run; made by `open_session`.

    Attributes:
        info: what the model says of itself.
        precision: of the file that was opened.
        precision_reason: why this one, in a few words.
        provider: `CPUExecutionProvider` or `CUDAExecutionProvider`, as the session itself reports it.
        device: `cpu` or `cuda:N`.
        path: the model's file.
        model_sha256: of the bytes that were loaded, 64 hexadecimal digits.
    """

    def __init__(
        self, session: Any, info: ModelInfo, precision: Precision, chosen: ChosenFile, sha256: str, device: str
    ) -> None:
        self._session = session
        self.info = info
        self.precision = precision
        self.precision_reason = chosen.reason
        self.path = chosen.path
        self.model_sha256 = sha256
        self.device = device
        self.provider: str = session.get_providers()[0]
        on_gpu = self.provider == CUDA
        self._buffers = BoundBuffers(session, len(info.class_names), device) if on_gpu else None

    @cached_property
    def default_batch_size(self) -> int:
        """The batch size that suits the device: on CUDA also by the memory that is free when it is first asked for."""
        if self.provider != CUDA:
            return _CPU_BATCH_SIZE
        return cuda_batch_size(self.info.image_size, free_gpu_memory(int(self.device.removeprefix("cuda:"))))

    @property
    def wants_fixed_batch(self) -> bool:
        """Whether a new batch size costs more than the images it saves: CUDA plans its memory for each shape."""
        return self.provider == CUDA

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classify images.

        Args:
            images: (N, H, W, 3) uint8 RGB, of the model's size; N may be 0.
        Returns:
            Probabilities, (N, classes) float32, each row sums to 1.
        Raises:
            ModelError: shape or type do not fit, the model failed, or it gave something that is no number.
            GpuMemoryError: the GPU's memory is too small for so many images; a smaller batch may fit.
            ProviderError: the GPU failed otherwise.
        """
        height, width = self.info.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, 3):
            raise ModelError(
                f"{self.path} needs uint8 images of shape (N, {height}, {width}, 3), received {images.dtype} "
                f"{images.shape}; bring them to the model's size first"
            )
        if not len(images):
            return np.empty((0, len(self.info.class_names)), np.float32)
        try:
            probabilities = self._run(images)
        except _SESSION_ERRORS as error:
            raise self._failure(error, len(images)) from error
        if not np.isfinite(probabilities).all():
            raise ModelError(f"{self.path} gave probabilities that are no numbers (NaN or infinite); train it again")
        return probabilities

    def _run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if self._buffers is not None:
            return self._buffers.run(images)
        probabilities: npt.NDArray[np.float32] = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        return probabilities

    def _failure(self, error: Exception, num_images: int) -> CnnpipeError:
        if self._buffers is None:
            return ModelError(f"{self.path} failed on {num_images} images: {_one_line(error)}; export it again")
        if is_out_of_memory(str(error)):
            self._buffers.release()  # the smaller batch that may be tried next needs what they hold
            return GpuMemoryError(
                f"{self.device} has no room for {num_images} images at once: {_one_line(error)}; "
                "choose a smaller batch size, or end what else uses the GPU"
            )
        return ProviderError(f"{self.device} failed on {num_images} images: {_one_line(error)}; try --device cpu")


def open_session(
    model: Path, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> ClassifierSession:
    """Open a model exported by cnnpipe.

    Args:
        model: a run folder, or an .onnx file.
        device: `auto`, `cpu`, `cuda` (the first) or `cuda:N`. Only `auto` may choose, and logs what it took and why.
        threads: for one operator, on the CPU; default: one a usable core.
        precision: `auto`, `fp32`, `int8` or `fp16`. `auto` takes a file as it is, and of a run the one that is fastest
            on the device, which is chosen first.
    Raises:
        ConfigError: `device`, `threads` or `precision` is none of these.
        ModelError: the file cannot be read or is not a model of ours, or is not of that precision.
        ProviderError: CUDA was asked for and cannot be used; names what is missing.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, received {device!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, received {threads}")
    if precision not in ("auto", *PRECISIONS):
        raise ConfigError(f"precision must be auto, {', '.join(PRECISIONS)}, received {precision!r}")
    wanted = _Wanted(model, cast("Precision | Literal['auto']", precision), threads or usable_cores())
    if device == "auto":
        return _open_cuda_if_possible(wanted) or _open_cpu(wanted)
    if device == "cpu":
        return _open_cpu(wanted)
    number = int(match[1] or 0)
    if problem := cuda_problem(number):
        raise ProviderError(f"{device} cannot be used: {problem}; mend that, or use --device cpu")
    return _open_cuda(wanted, number)


def device_report() -> dict[str, Any]:
    """Return what this machine can classify on, as JSON-able values.

    `gpus` are names by CUDA's numbers, `driver_cuda` the newest CUDA that the driver supports, `onnxruntime_cuda` the
    one that onnxruntime was built for, and `problem` says why CUDA cannot be used; each is empty where there is none.
    """
    driver = ask_driver()
    return {
        "gpus": list(driver.gpus),
        "driver_cuda": driver.cuda,
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_cuda": built_for_cuda(),
        "problem": cuda_problem(0) or missing_libraries(),
    }


@dataclass(frozen=True)
class _Wanted:
    """What to open, on whatever device it will be."""

    model: Path
    precision: Precision | Literal["auto"]
    threads: int


def _open_cpu(wanted: _Wanted) -> ClassifierSession:
    chosen = choose_model_file(wanted.model, "cpu", wanted.precision)
    content = _read_model(chosen.path)
    try:
        session = _create(content, wanted.threads, [CPU])
    except _SESSION_ERRORS as error:
        raise _not_a_model(chosen.path, error) from error
    return _check_model(session, chosen, content, "cpu", wanted)


def _open_cuda_if_possible(wanted: _Wanted) -> ClassifierSession | None:
    """Open on the first GPU, or return None and log why not."""
    if problem := cuda_problem(0):
        _logger.info("device auto: the CPU (%s)", problem)
        return None
    try:
        session = _open_cuda(wanted, 0)
    except ProviderError as error:
        _logger.warning("device auto: the CPU, although there is a GPU: %s", error)
        return None
    _logger.info("device auto: cuda:0")
    return session


def _open_cuda(wanted: _Wanted, number: int) -> ClassifierSession:
    chosen = choose_model_file(wanted.model, "cuda", wanted.precision)
    content = _read_model(chosen.path)
    missing = missing_libraries()
    # onnxruntime would print a paragraph for each library that it does not find; the reason is in our own line.
    onnxruntime.set_default_logger_severity(4)
    try:
        # Where cuDNN has no plan without TF32 for a convolution with its Relu, onnxruntime 1.26 takes one with TF32.
        providers = [(CUDA, cuda_options(number, content)), CPU]
        session = _create(content, wanted.threads, providers, ["ConvActivationFusion"])
    except _NOT_A_MODEL as error:
        raise _not_a_model(chosen.path, error) from error
    except _SESSION_ERRORS as error:
        raise ProviderError(f"cuda:{number} cannot be used: {missing or _one_line(error)}") from error
    finally:
        onnxruntime.set_default_logger_severity(3)
    if session.get_providers()[0] != CUDA:
        raise ProviderError(f"cuda:{number} cannot be used: {missing or 'onnxruntime refused it without a reason'}")
    return _check_model(session, chosen, content, f"cuda:{number}", wanted)


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror or error}; check the path") from error


def _create(content: bytes, threads: int, providers: list[Any], disabled: list[str] | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about optimisations that do not concern a user
    options.intra_op_num_threads = threads
    # A spinning thread answers faster, but takes its core from the processes that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        content, options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
    )


def _check_model(session: Any, chosen: ChosenFile, content: bytes, device: str, wanted: _Wanted) -> ClassifierSession:
    path = chosen.path
    metadata = session.get_modelmeta().custom_metadata_map
    info = ModelInfo.from_metadata(metadata, path)
    _check_tensors(session, info, path)
    precision = metadata.get("precision", "fp32")  # models of version 0.1 do not say it, and were all of this one
    if precision not in PRECISIONS:
        raise ModelError(
            f"{path} must be of precision {', '.join(PRECISIONS)}, received {precision!r}; export it again"
        )
    if wanted.precision not in ("auto", precision):
        raise ModelError(
            f"{path} is {precision}, not {wanted.precision}; name the run folder to have its {wanted.precision} model, "
            "or leave --precision at auto"
        )
    return ClassifierSession(session, info, precision, chosen, hashlib.sha256(content).hexdigest(), device)


def _check_tensors(session: Any, info: ModelInfo, path: Path) -> None:
    """Hold the model to the contract on its tensors; a batch of any size, everything else fixed."""
    height, width = info.image_size
    expected = (
        [(INPUT_NAME, "tensor(uint8)", [height, width, 3])],
        [(OUTPUT_NAME, "tensor(float)", [len(info.class_names)])],
    )
    found = tuple(
        [(tensor.name, tensor.type, list(tensor.shape[1:])) for tensor in tensors]
        for tensors in (session.get_inputs(), session.get_outputs())
    )
    if found != expected:
        raise ModelError(
            f"{path} must take {expected[0]} and give {expected[1]}, a batch of any size before each shape, received "
            f"{found[0]} and {found[1]}; use one exported by `cnnpipe export`"
        )
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise ModelError(f"{path} takes only batches of {session.get_inputs()[0].shape[0]}; export it again")


def _not_a_model(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is not an ONNX model that can be run: {_one_line(error)}; see `cnnpipe export`")


def _one_line(error: Exception) -> str:
    """Return what onnxruntime says, without its codes and C++ signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return one_line(re.sub(r"^.*failed:(/\S+ .*\) )?", "", text)) or type(error).__name__
