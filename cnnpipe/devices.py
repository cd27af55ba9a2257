"""GPUs and their memory as the NVIDIA driver reports them, asked without any library of CUDA."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Final

from cnnpipe.errors import ProviderError

__all__ = ["Driver", "ask_driver", "free_gpu_memory"]

_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says."""

    cuda: str = ""
    """Newest CUDA version it supports, such as `12.4`; empty without a driver."""
    gpus: tuple[str, ...] = ()
    """Names, by CUDA's numbers, as far as CUDA_VISIBLE_DEVICES shows them."""
    problem: str = ""
    """Why there is no GPU, in one line; empty if there is one."""


def ask_driver() -> Driver:
    """Ask the NVIDIA driver itself, which is there or not whatever libraries of CUDA are installed.

    Source: https://docs.nvidia.com/cuda/cuda-driver-api/
    """
    if sys.platform == "darwin":
        return Driver(problem="macOS has no CUDA")
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return Driver(problem="no NVIDIA driver (libcuda.so.1)")
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"").decode("ascii", "replace") if status else "it shows no GPU"
        return Driver(cuda, problem=f"the NVIDIA driver gives no GPU: {reason or f'error {status}'}")
    names = []
    for number in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode("utf-8", "replace"))
    return Driver(cuda, tuple(names))


def free_gpu_memory(number: int) -> int:
    """Return how much memory of a GPU is free, in bytes.

    Asks within the context that the libraries of CUDA share in this process, and leaves it as it was.

    Args:
        number: CUDA's, of a GPU that `ask_driver` shows.
    Raises:
        ProviderError: the driver does not tell.
    Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html and group__CUDA__PRIMARY__CTX.html
    """
    driver = ctypes.CDLL(_DRIVER)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number)
    status = status or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if not status:
        status = driver.cuCtxPushCurrent_v2(context)
        if not status:
            status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        driver.cuDevicePrimaryCtxRelease_v2(device)
    if status:
        raise ProviderError(f"cuda:{number} does not tell its free memory: error {status}; give --batch-size")
    return free.value
