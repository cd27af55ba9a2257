"""The checks of `cnnpipe doctor`; they load no TensorFlow.

Each check returns what it found. If something is wrong, it raises an error whose last clause says how to fix it.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement  # onnxruntime and Prefect require `packaging`
from packaging.specifiers import SpecifierSet

from cnnpipe import registry
from cnnpipe.errors import CnnpipeError, ProviderError, RegistryError, ServerError, StorageError, one_line
from cnnpipe.machine import ask_driver, describe_environment, package_versions
from cnnpipe.manifest import digest_files, read_manifest
from cnnpipe.nightly import Nightly, http_client, look_at_nightly, prefect_home, server_log
from cnnpipe.storage import storage_errors

__all__ = ["Check", "examine"]

_MIN_FREE_BYTES: Final = 2_000_000_000
"""Free bytes on the disk of the artifacts below which a night may not end."""

_PCI_DEVICES: Final = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    ok: bool
    text: str  # what was found and, if it is wrong, how to fix it


def examine(artifacts: Path) -> tuple[dict[str, Any], Nightly | None, list[Check]]:
    """Return this machine and the artifacts as values for JSON, the nightly schedule, and the results of all checks.

    Args:
        artifacts: folder of runs and champions; it may be missing.
    """
    checks: list[Check] = []

    def check(name: str, find: Callable[..., str], *arguments: Any) -> None:
        ok = False
        try:
            text, ok = find(*arguments), True
        except CnnpipeError as error:
            text = str(error)
        except ImportError as error:  # a package is not installed, or lacks a library
            text = f"{one_line(error)}; delete .venv and run `make setup`"
        except OSError as error:
            text = f"{one_line(error)}; check the file, its permissions and the disk"
        checks.append(Check(name, ok, text))

    check("python", _check_python)
    check("packages", _check_packages)
    devices: dict[str, Any] = {}
    check("onnxruntime", _check_onnxruntime, devices)
    check("cuda", _check_cuda, devices)
    folder = next(each for each in (artifacts.resolve(), *artifacts.resolve().parents) if each.exists())
    check("disk", _check_disk, folder)
    for name in registry.list_names(artifacts):
        check(f"champion of {name}", _check_champion, artifacts, name)
    home, states = prefect_home(artifacts), list[Nightly]()
    check("server", _check_server, home, states)
    nightly = states[0] if states else None
    if nightly and (nightly.healthy or not nightly.server):
        check("schedule", _check_schedule, nightly, server_log(home))
    if nightly and nightly.healthy:
        check("last nights", _check_nights, f"{nightly.server}")
    champions, problems = registry.list_champions(artifacts)
    place = {
        "path": str(artifacts.resolve()),
        "writable": os.access(folder, os.W_OK),
        "free_gigabytes": round(shutil.disk_usage(folder).free / 1e9, 1),
        "champions": champions,
        "problems": problems,
    }
    return {**describe_environment(), "devices": devices, "artifacts": place}, nightly, checks


def _check_python() -> str:
    found, required = platform.python_version(), metadata.metadata("cnnpipe")["Requires-Python"] or ""
    if found not in SpecifierSet(required):
        raise CnnpipeError(f"{found} is installed, {required} is required; name another: make setup PYTHON=python3")
    return found


def _check_packages() -> str:
    """Compare the versions that are installed with those that cnnpipe, and TensorFlow on a GPU, require."""
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
        raise CnnpipeError(f"{', '.join(wrong)}; delete .venv and run `make setup{' CUDA=1' * (len(owners) > 1)}`")
    return f"{right} as required"


def _check_onnxruntime(devices: dict[str, Any]) -> str:
    """Run a model on the CPU; fill `devices` with what is known of all devices."""
    from cnnpipe.session import device_report, try_provider

    devices |= device_report()
    return f"{devices['onnxruntime']}, a model runs on {try_provider(None)}"


def _check_cuda(devices: dict[str, Any]) -> str:
    """Run a model on the first GPU; nothing is wrong if there is none, or if CUDA_VISIBLE_DEVICES hides it."""
    driver = ask_driver()
    if not driver.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if driver.cuda and not hidden and any(map(_is_nvidia_gpu, _PCI_DEVICES.glob("*"))):
            raise ProviderError(f"there is a GPU, but {driver.problem}; install the driver again, and see `nvidia-smi`")
        return driver.problem
    from cnnpipe.session import try_provider

    if devices["problem"]:
        raise ProviderError(devices["problem"])
    versions = f"driver for CUDA {driver.cuda}, onnxruntime for {devices['onnxruntime_cuda']}"
    return f"{', '.join(driver.gpus)}, {versions}, a model runs on {try_provider(0)}"


def _is_nvidia_gpu(device: Path) -> bool:
    """Return whether a PCI device is a display of NVIDIA; Source: Linux' Documentation/ABI/testing/sysfs-bus-pci."""
    return (device / "vendor").read_text().startswith("0x10de") and (device / "class").read_text().startswith("0x03")


def _check_disk(folder: Path) -> str:
    with storage_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
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
    if wrong := [file for file, digest in manifest.files.items() if found.get(file) != digest]:
        problem = f"these files of {run} are missing or not as in manifest.json: {', '.join(wrong)}"
        raise RegistryError(f"{problem}; restore them, or go back with `cnnpipe models rollback {name}`")
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
    text = "scheduler {scheduler}, next run {next run}".format_map(nightly.shown())
    if idle := [name for name in nightly.schedulers if name not in nightly.next_runs]:
        raise ServerError(
            f"{text}: no run of {', '.join(idle)} is due; look into {log} and, in the UI, for a paused schedule, "
            "then start again"
        )
    if nightly.server_pid and (lost := sorted(nightly.next_runs.keys() - nightly.schedulers.keys())):
        raise ServerError(
            f"{text}; start what is missing with `make serve`, or delete retrain/{lost[0]}-nightly in the UI"
        )
    return text


def _check_nights(server: str) -> str:
    """Tell how the last run of each schedule ended, or that it is late: nothing executes it."""
    import httpx

    ended = {
        "state": {"operator": "or_", "type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}, "name": {"any_": ["Late"]}}
    }
    filters = {"flows": {"name": {"any_": ["retrain"]}}, "deployments": {"name": {"like_": "nightly"}}}
    body = {"flow_runs": ended, **filters, "sort": "EXPECTED_START_TIME_DESC", "limit": 100}
    try:
        with http_client(f"{server}/api", 5.0) as client:
            runs = client.post("/flow_runs/filter", json=body).raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"the server does not tell: {one_line(error)}; try again, or look into its log") from error
    last = {run["deployment_id"]: run for run in reversed(runs)}.values()
    text = ", ".join(f"{run['name']} {run['state_name']}" for run in last) or "none"
    if failed := [f"{server}/runs/flow-run/{run['id']}" for run in last if run["state_type"] != "COMPLETED"]:
        raise ServerError(f"{text}; look at {', '.join(failed)}")
    return text
