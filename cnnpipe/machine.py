"""Cores, processor and GPUs of this machine, and versions of the packages that decide the results."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cnnpipe import __version__
from cnnpipe.errors import ProviderError

PACKAGES: Final = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy", "pillow",
                   "scikit-learn", "prefect")  # fmt: skip
"""Distributions that decide the results."""

_DRIVER: Final = "libcuda.so.1"


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of those distributions that are installed, without importing them."""
    versions = {"cnnpipe": __version__}
    for name in names:
        with suppress(metadata.PackageNotFoundError):  # of onnxruntime and onnxruntime-gpu only one is there
            versions[name] = metadata.version(name)
    return versions


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores that this process may use: its affinity, or its container's limit if that is less.

    A limit is rounded up to whole cores.

    Args:
        cgroups: folder where the control groups are mounted.
        own: file that names the groups of this process.
    Source: Linux' Documentation/admin-guide/cgroup-v2.rst, "CPU"; for version 1 Documentation/scheduler/sched-bwc.rst;
        for `own` cgroups(7).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits: list[int] = []
    with suppress(OSError, ValueError, ArithmeticError):  # not Linux, or files that are not as documented
        for line in own.read_text(errors="replace").splitlines():
            _, controllers, group = line.split(":", 2)
            limits += _core_limits(cgroups, controllers, group)
    return max(1, min([cores, *limits]))


def _core_limits(cgroups: Path, controllers: str, group: str) -> Iterator[int]:
    """Yield the limits of a control group and of the groups that contain it, in cores."""
    root, files = cgroups, ["cpu.max"]
    if controllers:  # version 1
        root, files = cgroups / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        if "cpu" not in controllers.split(","):
            return
    folder = root / group.lstrip("/")
    for each in (folder, *folder.parents):
        if each.is_relative_to(root) and all((each / name).is_file() for name in files):
            quota, period = " ".join((each / name).read_text() for name in files).split()
            if quota not in ("max", "-1"):
                yield math.ceil(float(quota) / float(period))


@dataclass(frozen=True)
class Processor:
    """Description of a processor; fields that the system does not tell are empty."""

    vendor: str = ""  # such as AuthenticAMD
    model: str = ""  # such as AMD EPYC 9654 96-Core Processor
    flags: frozenset[str] = frozenset()  # such as avx512_bf16


def find_processor(description: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the first processor of this machine, from a file of the format that proc_cpuinfo(5) describes."""
    try:
        first = description.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return Processor()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    flags = frozenset(values.get("flags", "").split())
    return Processor(values.get("vendor_id", ""), values.get("model name", ""), flags)


def describe_environment() -> dict[str, Any]:
    """Return Python, platform, processor, cores and package versions, as values for JSON."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": find_processor().model,
        "cores": usable_cores(),
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class Driver:
    """GPUs that the NVIDIA driver reports."""

    cuda: str = ""
    """Newest CUDA version that it supports, such as `12.4`; empty without a driver."""
    gpus: tuple[str, ...] = ()
    """Names of the GPUs, by CUDA's numbers; only those that CUDA_VISIBLE_DEVICES allows."""
    problem: str = ""
    """Reason why there is no GPU, in one line; empty if there is one."""


def ask_driver() -> Driver:
    """Ask the NVIDIA driver for its GPUs, which works whether or not any CUDA library is installed.

    Source: https://docs.nvidia.com/cuda/cuda-driver-api/
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return Driver(problem="no NVIDIA driver (libcuda.so.1)")
    version, count, text = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
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
    """Return the free memory in bytes of a GPU, by its number in `ask_driver`; leaves CUDA's shared context as it was.

    Raises:
        ProviderError: the driver does not tell.
    Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html and group__CUDA__PRIMARY__CTX.html
    """
    driver = ctypes.CDLL(_DRIVER)
    device, context, free, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number)
    status = status or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if not status:
        if not (status := driver.cuCtxPushCurrent_v2(context)):
            status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        driver.cuDevicePrimaryCtxRelease_v2(device)
    if status:
        raise ProviderError(f"cannot read the free memory of cuda:{number}: CUDA error {status}; choose a --batch-size")
    return free.value
