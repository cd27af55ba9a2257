"""What `cnnpipe doctor` finds on this machine, without TensorFlow.

Each check returns what it found. If something is wrong, it raises an error whose last clause says how to fix it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cnnpipe import registry
from cnnpipe.errors import CnnpipeError, ProviderError, RegistryError, ServerError, StorageError, one_line
from cnnpipe.machine import ask_driver, describe_environment, package_versions, usable_cores, usable_memory
from cnnpipe.manifest import digest_files, read_manifest
from cnnpipe.nightly import Nightly, http_client, look_at_nightly, prefect_home, server_log

__all__ = ["Check", "examine"]

_MIN_FREE_BYTES: Final = 2_000_000_000
"""Free bytes on the disk of the artifacts below which a night may not end."""

_MIN_MEMORY_BYTES: Final = 2_000_000_000
"""Bytes of memory below which training may be killed: TensorFlow alone takes about 700 MB."""

_PCI_DEVICES: Final = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    ok: bool
    text: str  # what was found
    fix: str  # how to fix it; empty if nothing is wrong

    def line(self) -> str:
        """Return the result as text for a person."""
        return f"{self.name}: {self.text}; {self.fix}" if self.fix else f"{self.name}: {self.text}"


def examine(artifacts: Path) -> tuple[dict[str, Any], Nightly | None, list[Check]]:
    """Return this machine and the artifacts as values for JSON, the nightly schedule, and the results of all checks.

    Args:
        artifacts: folder of runs and champions; it may be missing.
    """
    checks: list[Check] = []

    def check(name: str, find: Callable[..., str], *arguments: Any) -> None:
        try:
            checks.append(Check(name, True, find(*arguments), ""))
        except CnnpipeError as error:
            text, _, fix = str(error).rpartition("; ")
            checks.append(Check(name, False, text, fix))
        except OSError as error:
            checks.append(Check(name, False, one_line(error), "check the file, its permissions and the disk"))
        except metadata.PackageNotFoundError as error:
            checks.append(Check(name, False, f"{error.name} is not installed", "delete .venv and run `make setup`"))

    check("python", _check_python)
    check("packages", _check_packages)
    devices: dict[str, Any] = {}
    check("onnxruntime", _check_onnxruntime, devices)
    check("cuda", _check_cuda, devices)
    check("machine", _check_machine)
    folder = next(each for each in (artifacts.resolve(), *artifacts.resolve().parents) if each.exists())
    check("disk", _check_disk, folder)
    for name in registry.list_names(artifacts):
        check(f"champion of {name}", _check_champion, artifacts, name)
    home, states = prefect_home(artifacts), list[Nightly]()
    check("server", _check_server, home, states)
    nightly = states[0] if states else None
    if nightly is not None and (nightly.healthy or nightly.server is None):
        check("schedule", _check_schedule, nightly, server_log(home))
        check("last nights", _check_nights, nightly)
    champions, problems = registry.list_champions(artifacts)
    place = {
        "path": str(artifacts.resolve()),
        "writable": not _write_problem(folder),
        "free_gigabytes": round(shutil.disk_usage(folder).free / 1e9, 1),
        "champions": champions,
        "problems": problems,
    }
    return {**describe_environment(), "devices": devices, "artifacts": place}, nightly, checks


def _check_python() -> str:
    bits = 64 if sys.maxsize > 2**32 else 32
    if bits == 32:
        raise CnnpipeError("it has 32 bits, and TensorFlow needs 64; name another: make setup PYTHON=python3")
    return f"{sys.version.split()[0]}, {bits} bits"


def _check_packages() -> str:
    """Compare the versions that are installed with those that cnnpipe, and TensorFlow on a GPU, require."""
    from packaging.requirements import Requirement  # onnxruntime and prefect require it

    owners = {"cnnpipe": "", "tensorflow": "and-cuda"} if ask_driver().gpus else {"cnnpipe": ""}
    wrong, right = [], 0
    for owner, extra in owners.items():
        for text in metadata.requires(owner) or ():
            each = Requirement(text)
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                installed = package_versions((each.name,)).get(each.name)
                if installed and each.specifier.contains(installed, prereleases=True):
                    right += 1
                else:
                    wrong.append(f"{each.name}{each.specifier} is required, {installed or 'none'} is installed")
    if wrong:
        raise CnnpipeError(
            f"{', '.join(wrong)}; delete .venv and run `make setup{' CUDA=1' if len(owners) > 1 else ''}`"
        )
    return f"{right} as required"


def _check_onnxruntime(devices: dict[str, Any]) -> str:
    """Run a model on the CPU; fill `devices` with what is known of all devices."""
    try:
        from cnnpipe.session import device_report, try_provider
    except ImportError as error:
        devices["problem"] = f"onnxruntime cannot be loaded: {one_line(error)}"
        raise ProviderError(f"{devices['problem']}; delete .venv and run `make setup`") from error
    devices |= device_report()
    return f"{devices['onnxruntime']}, a model runs on {try_provider(None)}"


def _check_cuda(devices: dict[str, Any]) -> str:
    """Run a model on the first GPU; nothing is wrong if there is none, or if CUDA_VISIBLE_DEVICES hides it."""
    driver = ask_driver()
    if not driver.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if driver.cuda and not hidden and any(map(_is_nvidia_gpu, _PCI_DEVICES.glob("*"))):
            raise ProviderError(
                f"there is a GPU, but {driver.problem}; `nvidia-smi` says more: install the driver again"
            )
        return driver.problem
    if devices["problem"]:
        raise ProviderError(devices["problem"])
    from cnnpipe.session import try_provider

    versions = f"driver for CUDA {driver.cuda}, onnxruntime for {devices['onnxruntime_cuda']}"
    return f"{', '.join(driver.gpus)}, {versions}, a model runs on {try_provider(0)}"


def _is_nvidia_gpu(device: Path) -> bool:
    """Source: Linux' Documentation/ABI/testing/sysfs-bus-pci; 0x10de is NVIDIA, class 3 are displays."""
    kind, vendor = ((device / name).read_text() for name in ("class", "vendor"))
    return kind.startswith("0x03") and vendor.startswith("0x10de")


def _check_machine() -> str:
    memory = usable_memory()
    text = f"{usable_cores()} of {os.cpu_count()} cores, {memory / 1e9:.1f} GB of memory"
    if memory < _MIN_MEMORY_BYTES:
        raise CnnpipeError(f"{text}, and training needs {_MIN_MEMORY_BYTES / 1e9:.0f} GB; raise the container's limit")
    return text


def _write_problem(folder: Path) -> str:
    """Return why no file can be written in a folder; empty if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _check_disk(folder: Path) -> str:
    if problem := _write_problem(folder):
        raise StorageError(f"cannot write in {folder}: {problem}; check the folder, its permissions and the disk")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in {folder}"
    if free < _MIN_FREE_BYTES:
        raise StorageError(f"{text}, less than {_MIN_FREE_BYTES / 1e9:.0f}; free some, see `cnnpipe models prune`")
    return text


def _check_champion(artifacts: Path, name: str) -> str:
    """Compare the champion's files with the digests in its manifest."""
    run = registry.champion_run(artifacts, name)
    if run is None:
        return "none yet"
    manifest, found = read_manifest(run), digest_files(run)
    wrong = [file for file, digest in manifest.files.items() if found.get(file) != digest]
    if wrong:
        raise RegistryError(
            f"{', '.join(wrong)} of {run} {'is' if len(wrong) == 1 else 'are'} missing or not as in manifest.json; "
            f"restore the files, or go back with `cnnpipe models rollback {name}`"
        )
    return f"{run.name}, accuracy {manifest.model.test_accuracy:.4f}, {len(found)} files as in its manifest"


def _check_server(home: Path, states: list[Nightly]) -> str:
    """Ask the server; put the state of the schedule into `states`."""
    nightly = look_at_nightly(home)
    states.append(nightly)
    text = nightly.shown()["server"]
    if nightly.server and not nightly.healthy:
        raise ServerError(f"{text}; look into {server_log(home)}, then `make stop` and `make serve`")
    return text


def _check_schedule(nightly: Nightly, log: Path) -> str:
    shown = nightly.shown()
    runs, is_due = shown["scheduler"] != "not running", shown["next run"] != "none"
    text = f"scheduler {shown['scheduler']}, next run {shown['next run']}"
    if runs and not is_due:
        raise ServerError(f"{text}; look into {log} and, in the UI, for a paused schedule, then start again")
    if is_due and not runs:
        raise ServerError(f"{text}; start the scheduler with `make serve`, or stop the server with `make stop`")
    return text


def _check_nights(nightly: Nightly) -> str:
    """Tell how the last run of each schedule ended, or that it is late: nothing executes it."""
    import httpx

    if not nightly.healthy:
        return "not known without a server"
    types, names = ["COMPLETED", "FAILED", "CRASHED"], ["Late"]
    ended = {"state": {"operator": "or_", "type": {"any_": types}, "name": {"any_": names}}}
    filters = {"flows": {"name": {"any_": ["retrain"]}}, "deployments": {"name": {"like_": "nightly"}}}
    body = {"flow_runs": ended, **filters, "sort": "EXPECTED_START_TIME_DESC", "limit": 100}
    try:
        with http_client(f"{nightly.server}/api", 5.0) as client:
            runs = client.post("/flow_runs/filter", json=body).raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(
            f"the server does not tell: {one_line(error)}; is its password in the environment?"
        ) from error
    last = {run["deployment_id"]: run for run in reversed(runs)}.values()
    text = ", ".join(f"{run['name']} {run['state_name']}" for run in last) or "none"
    if failed := [run["id"] for run in last if run["state_type"] != "COMPLETED"]:
        links = ", ".join(f"{nightly.server}/runs/flow-run/{each}" for each in failed)
        raise ServerError(f"{text}; look at {links}")
    return text
