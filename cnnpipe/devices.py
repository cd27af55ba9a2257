"""Which GPUs the NVIDIA driver shows, asked without any library of CUDA."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

__all__ = ["Driver", "ask_driver"]


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
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
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
