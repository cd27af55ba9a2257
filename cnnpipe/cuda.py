"""What is special about an NVIDIA GPU: what is missing to use it, buffers that stay on it, when its memory is full."""

from __future__ import annotations

import contextlib
import io
import math
import re
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from cnnpipe.machine import ask_driver
from cnnpipe.manifest import INPUT_NAME, OUTPUT_NAME

__all__ = ["CUDA", "BoundBuffers", "built_for_cuda", "cuda_batch_size", "cuda_options", "cuda_problem",
           "is_out_of_memory", "missing_libraries"]  # fmt: skip

CUDA: Final = "CUDAExecutionProvider"

_OPTIONS: Final = {
    # Exhaustive search, the default, times every convolution algorithm anew for each shape: seconds before the first
    # image, for a network that needs milliseconds.
    "cudnn_conv_algo_search": "HEURISTIC",
    # Grow by what is needed, not by doubling: the GPU may be shared.
    "arena_extend_strategy": "kSameAsRequested",
}

_SAYS_FP16: Final = b"\n\tprecision\x12\x04fp16"
"""The entry `precision` of an fp16 model's metadata, as it is in the file.

Source: https://protobuf.dev/programming-guides/encoding/ and StringStringEntryProto of onnx.proto.
"""

_MIN_BATCH: Final = 256
_MAX_BATCH: Final = 2048
_BATCH_PIXELS: Final = 2048 * 32 * 32
"""On an H100 images of 32x32 pass at 34,800 a second in batches of 2,048, at 25,100 in batches of 256."""

_BYTES_PER_PIXEL: Final = 1024
"""Estimate: 64 channels in float32 at the size of the image take 256 bytes, and a layer needs four times that: for its
input, its output, what the next one makes of that, and cuDNN's workspace. A network that needs more has its batches
halved, see `cnnpipe.classify.engine.BatchRunner`.
"""

# onnxruntime has no exception of its own for this: its arena, the CUDA runtime and each library say it in their way.
_OUT_OF_MEMORY: Final = re.compile(
    r"Failed to allocate memory for requested buffer"
    r"|Available memory of \d+ is smaller than requested bytes"
    r"|CUDA failure 2: "  # cudaErrorMemoryAllocation
    r"|CUDA error executing cudaMalloc"
    r"|(?:CUBLAS|CUDNN|CUFFT)_\w*ALLOC\w*_FAILED",
)


def cuda_options(number: int, model: bytes) -> dict[str, str]:
    """Return the options of onnxruntime's CUDA provider that suit a model.

    fp32 is computed as such: in TF32, the default, probabilities were off by up to 9.2e-4. Not so for fp16, because
    without TF32 onnxruntime leaves the tensor cores alone altogether.

    Args:
        number: of the GPU.
        model: content of the ONNX file.
    Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, `use_tf32`
    """
    return {"device_id": str(number), "use_tf32": "1" if _SAYS_FP16 in model else "0", **_OPTIONS}


def cuda_batch_size(image_size: tuple[int, int], free_bytes: int) -> int:
    """Return the batch size that suits a GPU: a power of two, so that shards divide by it, up to 2,048.

    Args:
        image_size: (height, width) in pixels.
        free_bytes: free memory of the GPU, of which half is taken at most.
    """
    pixels = math.prod(image_size)
    wanted = min(max(_BATCH_PIXELS // pixels, _MIN_BATCH), _MAX_BATCH)
    possible = max(min(wanted, free_bytes // 2 // (pixels * _BYTES_PER_PIXEL)), 1)
    return 1 << (possible.bit_length() - 1)


class BoundBuffers:
    """Runs a session on an input and an output that stay in the device's memory from batch to batch.

    Without them every batch would allocate both anew. They are made for the shape of the first batch, and made again
    when another shape comes, which is why a caller should keep to one.

    Args:
        session: of onnxruntime, with the tensors of the contract.
        num_classes: columns of the output.
        device: `cuda:N` or `cpu`.
    """

    def __init__(self, session: Any, num_classes: int, device: str) -> None:
        self._session = session
        self._num_classes = num_classes
        kind, _, number = device.partition(":")
        self._device = (kind, int(number or 0))
        self._shape: tuple[int, ...] | None = None
        self._binding: Any = None
        self._images: Any = None
        self._probabilities: Any = None

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the probabilities of (N, H, W, 3) uint8 images, (N, classes) float32; raises what onnxruntime does."""
        if images.shape != self._shape:
            self._allocate(images.shape)
        self._images.update_inplace(np.ascontiguousarray(images))
        self._session.run_with_iobinding(self._binding)
        # A copy, because on a CPU the array would be the buffer itself, which the next batch overwrites.
        return np.array(self._probabilities.numpy(), np.float32)

    def release(self) -> None:
        """Give the buffers' memory back."""
        self._shape = self._binding = self._images = self._probabilities = None

    def _allocate(self, shape: tuple[int, ...]) -> None:
        self.release()
        new = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._images = new(shape, np.uint8, *self._device)
        self._probabilities = new((shape[0], self._num_classes), np.float32, *self._device)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(INPUT_NAME, self._images)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._probabilities)
        self._shape = shape


def is_out_of_memory(message: str) -> bool:
    """Return whether an exception of onnxruntime on CUDA says that the GPU's memory was too small.

    Source: onnxruntime 1.26, core/framework/bfc_arena.cc and core/providers/cuda/cuda_call.cc; the names of the
    states are those of cuBLAS, cuDNN and cuFFT.
    """
    return _OUT_OF_MEMORY.search(message) is not None


def cuda_problem(number: int) -> str:
    """Return what stands against GPU `number` before its libraries are tried, or an empty string."""
    driver = ask_driver()
    if driver.problem:
        return driver.problem
    if number >= len(driver.gpus):
        names = ", ".join(f"cuda:{index} {name}" for index, name in enumerate(driver.gpus))
        return f"there is no GPU {number}, only {names}; choose one of these"
    if CUDA not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} is built without CUDA; install onnxruntime-gpu in its place"
    built_for = built_for_cuda()
    if built_for and int(driver.cuda.split(".")[0]) < int(built_for.split(".")[0]):
        return f"the NVIDIA driver supports CUDA {driver.cuda}, onnxruntime needs {built_for}; update the driver"
    return ""


def built_for_cuda() -> str:
    """Return the CUDA version that onnxruntime was built for, or an empty string."""
    return getattr(onnxruntime, "cuda_version", "") or ""


def missing_libraries() -> str:
    """Load the CUDA libraries where pip put them, and return in one line which are not found; empty if none."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):  # it prints its failures; standard output is for results
        onnxruntime.preload_dlls()
    names = re.findall(r"Failed to load (\S+?):", output.getvalue())
    if not names:
        return ""
    return f"{', '.join(dict.fromkeys(names))} not found; install them with `make setup CUDA=1` (the extra `cuda`)"
