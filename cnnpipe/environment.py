"""On what machine and with which packages something was made."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cnnpipe import __version__

__all__ = ["PACKAGES", "Processor", "describe_environment", "find_processor", "package_versions", "usable_cores"]

PACKAGES: Final = (
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "numpy",
    "pillow",
    "scikit-learn",
    "prefect",
)
"""The distributions that decide what comes out."""


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of the distributions that are installed, without importing them."""
    versions = {"cnnpipe": __version__}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # onnxruntime and onnxruntime-gpu: one of the two is there
    return versions


def usable_cores() -> int:
    """Return the number of cores this process may use, which a container or taskset may have lowered."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Processor:
    """What a processor says of itself; empty where this system does not tell."""

    vendor: str = ""
    """Such as `AuthenticAMD`."""
    model: str = ""
    flags: frozenset[str] = frozenset()
    """Of what it can do, by Linux' names, such as `avx512_bf16`."""


def find_processor(description: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the first processor of this machine.

    Args:
        description: Linux' file. Source: proc_cpuinfo(5).
    """
    try:
        first = description.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return Processor()
    pairs = (line.partition(":") for line in first.splitlines())
    values = {name.strip(): value.strip() for name, _, value in pairs}
    flags = frozenset(values.get("flags", "").split())
    return Processor(values.get("vendor_id", ""), values.get("model name", ""), flags)


def describe_environment() -> dict[str, Any]:
    """Return Python, platform, processor, cores and package versions, as JSON-able values."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": find_processor().model,
        "cores": usable_cores(),
        "versions": package_versions(),
    }
