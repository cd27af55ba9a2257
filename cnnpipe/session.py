"""An ONNX classifier on the device that was requested: CUDA or CPU, never silently another.

onnxruntime lists CUDA wherever its GPU build is installed, and falls back to the CPU with no more than a line on
stderr. So the NVIDIA driver is asked first, and after opening, the session is asked which provider it really has.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _ort
from onnxruntime.datasets import get_example

from cnnpipe.errors import CnnpipeError, ConfigError, GpuMemoryError, ModelError, ProviderError, one_line
from cnnpipe.machine import ask_driver, free_gpu_memory, usable_cores
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME, PRECISIONS, ChosenFile, ModelInfo, Precision, choose_model_file

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"

_BUILT_FOR_CUDA: Final[str] = getattr(onnxruntime, "cuda_version", "") or ""
"""CUDA version that onnxruntime was built for; empty if it was built without CUDA."""

# The exceptions of onnxruntime have no common base class but Exception.
_NOT_A_MODEL = (_ort.InvalidProtobuf, _ort.InvalidGraph, _ort.NoModel, _ort.NotImplemented, _ort.InvalidArgument)
_SESSION_ERRORS = (*_NOT_A_MODEL, _ort.Fail, _ort.RuntimeException, _ort.EPFail, _ort.NotFound, RuntimeError,
                   ValueError)  # fmt: skip

_logger = logging.getLogger(__name__)

_Wanted = Precision | Literal["auto"]


class ClassifierSession:
    """A model that is ready to run; made by `open_session`.

    Attributes:
        info: the model's own description of itself.
        precision: the precision of the opened file.
        precision_reason: why this precision, in a few words.
        provider: `CPUExecutionProvider` or `CUDAExecutionProvider`, as the session itself reports it.
        device: `cpu` or `cuda:N`.
        path: the model's file.
        model_sha256: digest of the loaded bytes, 64 hexadecimal digits.
    """

    def __init__(
        self, session: Any, info: ModelInfo, precision: Precision, chosen: ChosenFile, sha256: str, device: str
    ) -> None:
        self._session = session
        self.info, self.precision, self.model_sha256, self.device = info, precision, sha256, device
        self.path, self.precision_reason = chosen.path, chosen.reason
        self.provider: str = session.get_providers()[0]
        self._buffers = BoundBuffers(session, len(info.class_names), device) if self.provider == CUDA else None

    @cached_property
    def default_batch_size(self) -> int:
        """The batch size that suits the device; on CUDA it also depends on the memory that is free at first use.

        32 small images stay in a CPU's cache: 17,900 images/s against 13,500 at 256.
        """
        if self.provider != CUDA:
            return 32
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
            Probabilities, (N, classes) float32; each row sums to 1.
        Raises:
            ModelError: shape or type do not fit, the model failed, or a probability is not a number.
            GpuMemoryError: the GPU's memory is too small for so many images; a smaller batch may fit.
            ProviderError: the GPU failed otherwise.
        """
        height, width = self.info.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
            raise ModelError(
                f"{self.path} needs uint8 images of shape (N, {height}, {width}, 3), received {images.dtype} "
                f"{images.shape}; resize them to the model's size first"
            )
        if not len(images):
            return np.empty((0, len(self.info.class_names)), np.float32)
        probabilities: npt.NDArray[np.float32]
        try:
            if self._buffers is None:
                (probabilities,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})
            else:
                probabilities = self._buffers.run(images)
        except _SESSION_ERRORS as error:
            raise self._failure(error, len(images)) from error
        if not np.isfinite(probabilities).all():
            raise ModelError(f"{self.path} gave probabilities that are not numbers (NaN or infinite); train it again")
        return probabilities

    def _failure(self, error: Exception, num_images: int) -> CnnpipeError:
        """Return the exception for a failed run; frees the buffers if memory is short, for a smaller batch."""
        if self._buffers is None:
            return ModelError(f"{self.path} failed on {num_images} images: {_one_line(error)}; export it again")
        if is_out_of_memory(str(error)):
            self._buffers.release()
            return GpuMemoryError(
                f"{self.device} has no room for {num_images} images at once: {_one_line(error)}; "
                "choose a smaller batch size, or stop other programs that use the GPU"
            )
        return ProviderError(f"{self.device} failed on {num_images} images: {_one_line(error)}; try --device cpu")


def open_session(
    model: Path, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> ClassifierSession:
    """Open a model exported by cnnpipe.

    Args:
        model: a run folder, or an .onnx file.
        device: `auto`, `cpu`, `cuda` (the first GPU) or `cuda:N`. Only `auto` may choose; it logs its choice and why.
        threads: CPU threads for one operator; default: one per usable core.
        precision: `auto`, `fp32`, `int8` or `fp16`. `auto` takes a file as it is, and from a run the precision that is
            fastest on the device.
    Raises:
        ConfigError: `device` or `precision` is none of these.
        ModelError: the file cannot be read, is not a cnnpipe model, or has another precision.
        ProviderError: CUDA was requested and cannot be used; names what is missing.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, received {device!r}")
    if precision not in ("auto", *PRECISIONS):
        raise ConfigError(f"precision must be auto, {', '.join(PRECISIONS)}, received {precision!r}")
    open_on = partial(_open, model, cast("_Wanted", precision), threads or usable_cores())
    if device == "cpu":
        return open_on(None)
    number = int(match[1] or 0)
    problem = cuda_problem(number)
    if device != "auto":
        if problem:
            raise ProviderError(f"{device} cannot be used: {problem}; fix that, or use --device cpu")
        return open_on(number)
    if problem:
        _logger.info("device auto: the CPU (%s)", problem)
        return open_on(None)
    try:
        session = open_on(number)
    except ProviderError as error:
        _logger.warning("device auto: the CPU, although there is a GPU: %s", error)
        return open_on(None)
    _logger.info("device auto: %s", session.device)
    return session


def device_report() -> dict[str, Any]:
    """Return what this machine can classify on, and as `problem` why CUDA cannot be used, as values for JSON."""
    driver = ask_driver()
    return {
        "gpus": list(driver.gpus),
        "driver_cuda": driver.cuda,
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_cuda": _BUILT_FOR_CUDA,
        "problem": cuda_problem(0) or _missing_libraries(),
    }


def try_provider(gpu: int | None) -> str:
    """Run a model of one operator on a GPU, or on the CPU if `gpu` is None, and return the provider that ran it.

    Raises:
        ProviderError: it cannot be run there.
    """
    try:
        session = _create(Path(get_example("sigmoid.onnx")).read_bytes(), 1, gpu)
        session.run(None, {"x": np.zeros((3, 4, 5), np.float32)})
    except _SESSION_ERRORS as error:
        raise ProviderError(f"onnxruntime cannot run a model: {_one_line(error)}; see docs/gpu.md") from error
    if gpu is not None and session.get_providers()[0] != CUDA:
        raise ProviderError("onnxruntime refuses CUDA without a reason; see docs/gpu.md")
    return str(session.get_providers()[0])


@contextlib.contextmanager
def silent_onnxruntime() -> Iterator[None]:
    """Keep onnxruntime's own lines off stderr inside the block, where its exceptions say the same in one line."""
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # warnings, the default of a new process, which cannot be asked for


def _open(model: Path, precision: _Wanted, threads: int, gpu: int | None) -> ClassifierSession:
    """Open a model on a GPU, or on the CPU if `gpu` is None, and check that it keeps the contract."""
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    chosen = choose_model_file(model, "cpu" if gpu is None else "cuda", precision)
    try:
        content = chosen.path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read the model {chosen.path}: {error.strerror or error}; check the path") from error
    missing = "" if gpu is None else _missing_libraries()
    try:
        session = _create(content, threads, gpu)
    except _SESSION_ERRORS as error:
        if gpu is not None and not isinstance(error, _NOT_A_MODEL):
            raise ProviderError(f"{device} cannot be used: {missing or _one_line(error)}") from error
        raise ModelError(
            f"{chosen.path} is not an ONNX model that can be run: {_one_line(error)}; see `cnnpipe export`"
        ) from error
    if gpu is not None and session.get_providers()[0] != CUDA:
        raise ProviderError(f"{device} cannot be used: {missing or 'onnxruntime refused it without a reason'}")
    metadata = session.get_modelmeta().custom_metadata_map
    info = ModelInfo.from_metadata(metadata, chosen.path)
    _check_tensors(session, info, chosen.path)
    found = _check_precision(metadata, precision, chosen.path)
    return ClassifierSession(session, info, found, chosen, hashlib.sha256(content).hexdigest(), device)


def _create(content: bytes, threads: int, gpu: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about optimisations that do not concern a user
    options.intra_op_num_threads = threads
    # A spinning thread answers faster, but takes its core from the processes that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    create = partial(onnxruntime.InferenceSession, content, options, enable_fallback=0)
    if gpu is None:
        return create(providers=[CPU])
    with silent_onnxruntime():  # else it prints a paragraph for each library that it does not find
        # Where cuDNN has no plan without TF32 for a convolution with its Relu, onnxruntime 1.26 takes one with TF32.
        disabled = ["ConvActivationFusion"]
        return create(providers=[(CUDA, cuda_options(gpu, content)), CPU], disabled_optimizers=disabled)


def _check_tensors(session: Any, info: ModelInfo, path: Path) -> None:
    """Refuse a model whose tensors break the contract: a batch of any size, everything else fixed."""
    expected = (
        [(INPUT_NAME, "tensor(uint8)", [*info.image_size, 3])],
        [(OUTPUT_NAME, "tensor(float)", [len(info.class_names)])],
    )
    found = tuple(
        [(tensor.name, tensor.type, list(tensor.shape[1:])) for tensor in tensors]
        for tensors in (session.get_inputs(), session.get_outputs())
    )
    if found != expected:
        raise ModelError(
            f"{path} must take {expected[0]} and give {expected[1]}, with a batch of any size before each shape, "
            f"received {found[0]} and {found[1]}; use one exported by `cnnpipe export`"
        )
    if isinstance(batch := session.get_inputs()[0].shape[0], int):
        raise ModelError(f"{path} takes only batches of {batch}; export it again")


def _check_precision(metadata: dict[str, str], wanted: _Wanted, path: Path) -> Precision:
    found = metadata.get("precision", "fp32")  # models of version 0.1 have no such entry and were all fp32
    if found not in PRECISIONS:
        raise ModelError(f"{path} must be of precision {', '.join(PRECISIONS)}, received {found!r}; export it again")
    if wanted not in ("auto", found):
        raise ModelError(
            f"{path} is {found}, not {wanted}; name the run folder to use its {wanted} model, or use --precision auto"
        )
    return found


def _one_line(error: Exception) -> str:
    """Return what onnxruntime says, without its codes and C++ signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return one_line(re.sub(r"^.*failed:(/\S+ .*\) )?", "", text)) or type(error).__name__


class BoundBuffers:
    """Runs a session on an input and an output that stay in the device's memory from batch to batch.

    Without them every batch would allocate both. They are made again for another shape: keep to one.

    Args:
        session: an onnxruntime session with the tensors of the contract.
        num_classes: columns of the output.
        device: `cuda:N` or `cpu`.
    """

    def __init__(self, session: Any, num_classes: int, device: str) -> None:
        self._session, self._num_classes = session, num_classes
        kind, _, number = device.partition(":")
        self._device = (kind, int(number or 0))
        self.release()

    def release(self) -> None:
        """Give the buffers' memory back."""
        self._shape: tuple[int, ...] = ()
        self._binding = self._images = self._probabilities = cast("Any", None)

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the probabilities of (N, H, W, 3) uint8 images, (N, classes) float32; raises what onnxruntime does."""
        if images.shape != self._shape:
            self._allocate(images.shape)
        self._images.update_inplace(np.ascontiguousarray(images))
        self._session.run_with_iobinding(self._binding)
        # A copy, because on a CPU the array would be the buffer itself, which the next batch overwrites.
        return np.array(self._probabilities.numpy(), np.float32)

    def _allocate(self, shape: tuple[int, ...]) -> None:
        self.release()
        new = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._images = new(shape, np.uint8, *self._device)
        self._probabilities = new((shape[0], self._num_classes), np.float32, *self._device)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(INPUT_NAME, self._images)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._probabilities)
        self._shape = shape


def cuda_options(number: int, model: bytes) -> dict[str, str]:
    """Return the options of onnxruntime's CUDA provider that suit a model.

    fp32 runs without TF32: with it, the default, probabilities were off by up to 9.2e-4. fp16 runs with it, because
    without TF32 onnxruntime does not use the tensor cores at all.

    Args:
        number: the GPU's.
        model: content of the ONNX file.
    Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, `use_tf32`
    """
    is_fp16 = b"\n\tprecision\x12\x04fp16" in model  # a StringStringEntryProto of onnx.proto, in its metadata
    return {
        "device_id": str(number),
        "use_tf32": "1" if is_fp16 else "0",
        # The default, exhaustive search, times every convolution algorithm for each shape, for seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",  # not by doubling: the GPU may be shared
    }


def cuda_batch_size(image_size: tuple[int, int], free_bytes: int) -> int:
    """Return the batch size that suits a GPU: a power of two up to 2,048, so that a shard is a whole number of them.

    On an H100, images of 32x32 pass at 34,800 a second in batches of 2,048, at 25,100 in batches of 256. An image is
    estimated to take 1,024 bytes per pixel: 64 float32 channels take 256, and a layer needs four times that.
    `cnnpipe.classify.engine` halves the batches of a network that needs more.

    Args:
        image_size: (height, width) in pixels.
        free_bytes: free memory of the GPU, of which at most half is used.
    """
    pixels = math.prod(image_size)
    wanted = min(max(2048 * 32 * 32 // pixels, 256), 2048)
    possible = max(min(wanted, free_bytes // 2 // (pixels * 1024)), 1)
    return 1 << (possible.bit_length() - 1)


def is_out_of_memory(message: str) -> bool:
    """Return whether a message of onnxruntime on CUDA means that the GPU's memory was too small.

    onnxruntime has no exception for this; its arena, the CUDA runtime and each library word it in their own way.

    Source: onnxruntime 1.26, core/framework/bfc_arena.cc and core/providers/cuda/cuda_call.cc; the names of the
    states are those of cuBLAS, cuDNN and cuFFT.
    """
    patterns = (
        "Failed to allocate memory for requested buffer",
        r"Available memory of \d+ is smaller than requested bytes",
        "CUDA failure 2: ",  # cudaErrorMemoryAllocation
        "CUDA error executing cudaMalloc",
        r"(?:CUBLAS|CUDNN|CUFFT)_\w*ALLOC\w*_FAILED",
    )
    return re.search("|".join(patterns), message) is not None


def cuda_problem(number: int) -> str:
    """Return why GPU `number` cannot be used, as far as is known before its libraries are loaded; empty if it can."""
    driver = ask_driver()
    if driver.problem:
        return driver.problem
    if number >= len(driver.gpus):
        names = ", ".join(f"cuda:{index} {name}" for index, name in enumerate(driver.gpus))
        return f"there is no GPU {number}, only {names}; choose one of these"
    if CUDA not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} is built without CUDA; install onnxruntime-gpu instead"
    if _BUILT_FOR_CUDA and int(driver.cuda.split(".")[0]) < int(_BUILT_FOR_CUDA.split(".")[0]):
        return f"the NVIDIA driver supports CUDA {driver.cuda}, onnxruntime needs {_BUILT_FOR_CUDA}; update the driver"
    return ""


def _missing_libraries() -> str:
    """Load the CUDA libraries where pip put them, and return which are missing, in one line; empty if none is."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):  # it prints its failures; standard output is for results
        onnxruntime.preload_dlls()
    names = ", ".join(dict.fromkeys(re.findall(r"Failed to load (\S+?):", output.getvalue())))
    return names and f"{names} not found; install them with `make setup CUDA=1` (the extra `cuda`)"
