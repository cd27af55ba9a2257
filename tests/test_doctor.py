"""`cnnpipe doctor`: every problem is made for real, and is one line with a way out, and exit status 1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from servers import clean_environment, free_port
from typer.testing import CliRunner

from cnnpipe import doctor
from cnnpipe.cli import app
from cnnpipe.errors import ServerError
from cnnpipe.nightly import Nightly, PidFile

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ, clean_environment(), clear=True):
        yield


def examine(artifacts: Path) -> tuple[int, list[str]]:
    """Return the exit status of the command and its lines about problems, after a check that stderr has them too."""
    result = CliRunner().invoke(app, ["doctor", "--artifacts", str(artifacts)])
    lines = [line for line in result.stdout.splitlines() if line.startswith(("ok: ", "problem: "))]
    assert len(lines) >= 6, result.output
    problems = [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]
    assert result.stderr == (f"error: {'; '.join(problems)}\n" if problems else "")
    return result.exit_code, problems


def only_problem(artifacts: Path) -> str:
    status, problems = examine(artifacts)
    assert (status, len(problems)) == (1, 1), problems
    return problems[0]


def run_with(path: Path, artifacts: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that finds packages in a folder first."""
    variables = {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-m", "cnnpipe.cli", "doctor", "--artifacts", str(artifacts)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_nothing_is_wrong_without_gpu_server_and_models(tmp_path: Path) -> None:
    assert examine(tmp_path / "not" / "there") == (0, [])


def test_folder_that_cannot_be_written_is_a_problem() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder that not even root can write")
    problem = only_problem(Path("/proc/self/artifacts"))
    assert re.match(r"disk: cannot write /proc/\d+: .*; check the folder, its permissions", problem)


def test_little_space_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MIN_FREE_BYTES", 10**18)
    assert re.fullmatch(
        r"disk: [\d.]+ GB free in \S+, less than 1000000000; free some, .*prune`", only_problem(tmp_path)
    )


def test_packages_that_are_missing_or_old_are_named(tmp_path: Path) -> None:
    """A cnnpipe that requires other packages than the real one is installed in a folder, with one of them."""
    site = tmp_path / "site"
    wanted = "Requires-Dist: not-there>=1\nRequires-Dist: toy>=2\nRequires-Dist: other; extra == 'x'"
    for name, more in (("cnnpipe", wanted), ("toy", "")):
        folder = site / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{more}\n")
    result = run_with(site, tmp_path)
    assert result.returncode == 1
    wrong = "not-there>=1 is required, none is installed, toy>=2 is required, 1.0 is installed"
    assert result.stderr == f"error: packages: {wrong}; delete .venv and run `make setup`\n"


def test_onnxruntime_that_cannot_be_loaded_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "onnxruntime").mkdir(parents=True)
    (site / "onnxruntime" / "__init__.py").write_text("raise ImportError('libgone.so.1: cannot open shared object')")
    result = run_with(site, tmp_path)
    assert result.returncode == 1
    assert "problem: onnxruntime: libgone.so.1: cannot open shared object; delete .venv and run" in result.stdout
    assert "\nok: disk: " in result.stdout


@pytest.mark.parametrize(
    ("hidden", "vendor", "is_wrong"), [(None, "0x10de", True), ("-1", "0x10de", False), (None, "0x1af4", False)]
)
def test_driver_that_gives_no_gpu_is_a_problem_only_if_there_is_one_to_give(
    hidden: str | None, vendor: str, is_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver as after an update of the kernel: libcuda is there, and does not find its other half."""
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    library = tmp_path / "libcuda.so.1"
    source = (
        "int cuDriverGetVersion(int *v) { *v = 12040; return 0; } int cuInit(int f) { return 803; } "
        "int cuDeviceGetCount(int *n) { return 3; } "
        'int cuGetErrorString(int s, const char **t) { *t = "driver and library do not match"; return 0; }'
    )
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs a C compiler, for a driver that fails")
    (tmp_path / "pci" / "0000:01:00.0").mkdir(parents=True)
    for name, value in (("class", "0x030200"), ("vendor", vendor)):
        (tmp_path / "pci" / "0000:01:00.0" / name).write_text(value + "\n")
    monkeypatch.setattr("cnnpipe.machine._DRIVER", str(library))
    monkeypatch.setattr(doctor, "_PCI_DEVICES", tmp_path / "pci")
    if is_wrong:
        expected = "cuda: there is a GPU, but the NVIDIA driver gives no GPU: driver and library do not match; "
        assert only_problem(tmp_path).startswith(expected)
    else:
        assert examine(tmp_path) == (0, [])


@contextmanager
def running(home: Path, name: str, url: str) -> Iterator[None]:
    """Hold the record of a process of this project, as the process would."""
    code = (
        "import os, sys, time; from pathlib import Path; from cnnpipe.nightly import PidFile; "
        "pidfile = PidFile(Path(sys.argv[1]), sys.argv[2]); pidfile.acquire(); "
        "pidfile.write(os.getpid(), sys.argv[3]); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(home), name, f"{url}/api"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def test_server_that_does_not_answer_is_a_problem_with_its_log(tmp_path: Path) -> None:
    with running(tmp_path / ".prefect", "server", f"http://127.0.0.1:{free_port()}"):
        problem = only_problem(tmp_path)
    assert re.match(r"server: http://\S+, process \d+, does not answer; look into \S+/server\.log, then ", problem)


def test_process_whose_record_is_lost_is_a_problem(tmp_path: Path) -> None:
    with running(tmp_path / ".prefect", "server", "http://127.0.0.1:1"):
        PidFile(tmp_path / ".prefect", "server").record_path.unlink()
        assert re.match(r"server: a process of cnnpipe holds .*; end the process by hand", only_problem(tmp_path))


@pytest.mark.parametrize(
    ("schedulers", "problem"),
    [
        ({"cats": 2, "dogs": 3}, r"no run of dogs is due; look into \S+ and, in the UI, for a paused schedule"),
        ({}, r"start what is missing with `make serve`, or delete retrain/cats-nightly in the UI"),
    ],
)
def test_one_schedule_of_several_that_is_paused_or_that_nothing_runs_is_a_problem(
    tmp_path: Path, schedulers: dict[str, int], problem: str
) -> None:
    due = {"cats": "2026-11-27 02:00 UTC"} | ({} if schedulers else {"owls": "2026-11-27 02:00 UTC"})
    nightly = Nightly("http://127.0.0.1:4200", 1, True, schedulers or {"owls": 4}, due, None)
    with pytest.raises(ServerError, match=problem):
        doctor._check_schedule(nightly, tmp_path / "server.log")
