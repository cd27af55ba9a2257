"""On what machine and with which packages something was made."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any, Final

from cnnpipe import __version__

__all__ = ["PACKAGES", "describe_environment", "package_versions", "usable_cores"]

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


def describe_environment() -> dict[str, Any]:
    """Return Python, platform, cores and package versions, as JSON-able values."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": usable_cores(),
        "keras_backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "versions": package_versions(),
    }
