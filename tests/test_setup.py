"""The set-up: the lock files, `scripts/setup.sh` with interpreters of our making, and the Makefile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parent.parent
LOCKS: Final = ("requirements.lock", "requirements-cuda.lock")
PLATFORMS: Final = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
PYTHONS: Final = ("3.11", "3.12", "3.13")

# What the script itself calls, so that its PATH can be without any real Python.
TOOLS: Final = ("cat", "cksum", "date", "dirname", "grep", "mkdir", "mv", "rm", "sh", "tail", "uname")

FAKE_PYTHON: Final = """#!/bin/sh
# A Python {version} that writes down what it is called with instead of doing it.
case "$*" in
*sys.version_info*) echo {version} ;;
*ensurepip*) exit {no_venv} ;;
"-m venv --clear "*)
    echo "$*" >>"{calls}"
    mkdir -p "$4/bin"
    cat "$0" >"$4/bin/python"
    chmod +x "$4/bin/python"
    ;;
"-m uv "*)
    echo "$*" >>"{calls}"
    echo "# locked" >>requirements.lock
    ;;
"-m pip "* | "-m pytest "*)
    echo "$*" >>"{calls}"
    if [ -e "{broken}" ]; then echo "ERROR: no network"; exit 1; fi
    ;;
esac
"""


def _locked(lock: str) -> list[Requirement]:
    return [
        Requirement(line.removesuffix("\\").strip())
        for line in (ROOT / lock).read_text(encoding="utf-8").splitlines()
        if re.match(r"[a-z]", line)
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_is_pinned_and_has_hashes(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries = re.findall(r"^[a-z][^\n]*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)
    requirements = _locked(lock)
    assert len(entries) == len(requirements) > 100
    assert all(re.fullmatch(r"==[^*,]+", str(each.specifier)) for each in requirements)


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_files_are_small_and_name_no_index(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert "://" not in text
    assert not re.search(r"^--", text, re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("platform", PLATFORMS, ids="-".join)
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_files_satisfy_pyproject(lock: str, platform: tuple[str, str], python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    wanted += project["project"]["optional-dependencies"]["dask"]
    if "cuda" in lock:
        wanted += project["project"]["optional-dependencies"]["cuda"]
    environment = {
        "sys_platform": platform[0],
        "platform_machine": platform[1],
        "python_version": python,
        "python_full_version": f"{python}.5",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    pinned: dict[str, str] = {}
    for each in filter(applies, _locked(lock)):
        assert each.name not in pinned, f"{each.name} is there twice"
        pinned[each.name] = str(each.specifier).removeprefix("==")
    for requirement in filter(applies, map(Requirement, wanted)):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
    assert ("onnxruntime-gpu" in pinned) == (platform == ("linux", "x86_64"))
    assert ("onnxruntime" in pinned) != ("onnxruntime-gpu" in pinned)
    assert ("nvidia-cudnn-cu12" in pinned) == ("cuda" in lock and platform == ("linux", "x86_64"))


def test_cuda_lock_has_the_versions_of_the_other_one() -> None:
    plain, cuda = ({str(each) for each in _locked(lock)} for lock in LOCKS)
    assert plain <= cuda
    assert all(each.startswith("nvidia-") for each in cuda - plain)


def test_no_file_names_a_package_index() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("not in a git checkout")
    index = re.compile(rb"(index-url|find-links|trusted-host)[ =]\S*[:/]|pypi\.|python[h]osted|/simple/")
    found = [
        name
        for name in listed.stdout.decode().split("\0")
        if name and name != "tests/test_setup.py" and (ROOT / name).is_file()
        if index.search((ROOT / name).read_bytes())
    ]
    assert found == []


class Machine:
    """A machine whose only interpreters are fakes, with a copy of the set-up script and a project of one package."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "a project"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.broken = folder / "broken"
        (self.project / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", self.project / "scripts")
        for lock in LOCKS:
            (self.project / lock).write_text("some-package==1.0 \\\n")
        (self.project / "pyproject.toml").write_text("[project]\n")
        for tool in (*TOOLS, "chmod"):
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)

    def add_python(self, name: str, version: str, *, has_venv: bool = True) -> None:
        values = {"version": version, "no_venv": int(not has_venv), "calls": self.calls, "broken": self.broken}
        (self.bin / name).write_text(FAKE_PYTHON.format(**values))
        (self.bin / name).chmod(0o755)

    def add_stub(self, name: str) -> None:
        (self.bin / name).write_text("#!/bin/sh\necho 'no such version is installed' >&2\nexit 127\n")
        (self.bin / name).chmod(0o755)

    def setup(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "CUDA": "0", **variables}
        script = self.project / "scripts" / "setup.sh"
        return subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True)

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def _failure(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert result.stderr.startswith("setup: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("pythons", "variables", "message"),
    [
        ({}, {}, r"needs Python 3\.11, 3\.12 or 3\.13; found none; install one"),
        ({"python3": "3.9"}, {}, r"needs Python .* found: python3 is 3\.9; install one .*make PYTHON="),
        (
            {"python3.12": "3.12 without venv", "python3": "3.9"},
            {},
            r"Python 3\.12 has no venv module; install it .*apt-get install python3\.12-venv",
        ),
        ({"python3": "3.11"}, {"PYTHON": "no-python"}, r"PYTHON=no-python does not run"),
        ({"python3": "3.11"}, {"CUDA": "yes"}, r"CUDA must be 0 or 1, received 'yes'"),
    ],
)
def test_setup_that_cannot_work_says_what_to_do_in_one_line(
    machine: Machine, pythons: dict[str, str], variables: dict[str, str], message: str
) -> None:
    for name, version in pythons.items():
        machine.add_python(name, version.partition(" ")[0], has_venv="without" not in version)
    assert re.search(message, _failure(machine.setup(**variables)))


def test_setup_passes_over_interpreters_that_do_not_run_or_lack_venv(machine: Machine) -> None:
    machine.add_stub("python3.13")
    machine.add_python("python3.12", "3.12", has_venv=False)
    machine.add_python("python3.11", "3.11")
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    assert "with Python 3.11" in result.stdout


def test_setup_installs_with_hashes_and_nothing_outside_of_venv(machine: Machine) -> None:
    machine.add_python("python3", "3.13")
    assert machine.setup().returncode == 0
    create, packages, project, check = machine.called()
    assert create == "-m venv --clear .venv"
    assert "--require-hashes" in packages
    assert packages.endswith("-r requirements.lock")
    assert "--no-build-isolation" in project
    assert "pip check" in check
    assert not {"--user", "--target", "--prefix"} & set(packages.split())


def test_second_setup_installs_nothing(machine: Machine) -> None:
    machine.add_python("python3", "3.12")
    machine.setup()
    calls = machine.called()
    os.utime(machine.project / "requirements.lock")
    second = machine.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert machine.called() == calls


def test_setup_follows_a_changed_file_in_the_same_venv(machine: Machine) -> None:
    machine.add_python("python3", "3.12")
    machine.setup()
    for name in ("requirements.lock", "pyproject.toml"):
        machine.calls.unlink()
        with (machine.project / name).open("a") as file:
            file.write("# changed\n")
        assert machine.setup().returncode == 0
        assert [call.split()[1] for call in machine.called()] == ["pip", "pip", "pip"]


def test_failed_setup_says_why_and_is_repeated(machine: Machine) -> None:
    machine.add_python("python3", "3.12")
    machine.broken.touch()
    message = _failure(machine.setup())
    assert re.search(r"failed: ERROR: no network; whole log: \.venv/setup\.log; fix it and run make again", message)
    machine.broken.unlink()
    again = machine.setup()
    assert again.returncode == 0
    assert "done in" in again.stdout


@pytest.mark.parametrize(("cuda", "lock"), [("0", "requirements.lock"), ("1", "requirements-cuda.lock")])
def test_setup_takes_the_cuda_lock_if_told_and_later_keeps_to_it(machine: Machine, cuda: str, lock: str) -> None:
    machine.add_python("python3", "3.12")
    machine.setup(CUDA=cuda)
    calls = machine.called()
    assert calls[1].endswith(f"-r {lock}")
    again = machine.setup(CUDA="")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.called() == calls


def test_setup_with_another_python_replaces_the_venv(machine: Machine) -> None:
    machine.add_python("python3.12", "3.12")
    machine.setup()
    machine.add_python("python3.11", "3.11")
    assert "with Python 3.11" in machine.setup(PYTHON="python3.11").stdout


def _make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # Without what the make that runs these tests passes on to those it thinks it calls.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment.update(NAME="not-a-setting", ARGS="--not-one-either")
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_make_lists_every_target() -> None:
    result = _make()
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert re.findall(r"^  ([a-z-]+) ", result.stdout, re.MULTILINE) == phony[1].split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["retrain"], ["flows.retrain"]),
        (["retrain", "DATASET=my photos", "EPOCHS=3"], ["flows.retrain", "my photos", "--epochs", "3"]),
        (["retrain", "NAME=it's", "ARGS=--seed 1"], ["flows.retrain", "--name", "it's", "--seed", "1"]),
        (["classify", "FOLDER=a b/", "OUTPUT=c d.csv"], ["flows.classify", "a b/", "--output", "c d.csv"]),
        (["serve", "PRESET=baseline"], ["flows.serve", "--preset", "baseline"]),
        (["test-slow", "ARGS=-k setup"], ["pytest", "-m", "slow", "-k", "setup"]),
    ],
)
def test_make_passes_settings_on_as_they_are(arguments: list[str], expected: list[str]) -> None:
    command = _make("--dry-run", *arguments).stdout.partition("scripts/setup.sh\n")[2]
    shown = command.replace(".venv/bin/python", "printf '%s\\n'", 1)
    words: Any = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == ["-m", *expected]


@pytest.fixture
def locking(machine: Machine) -> Machine:
    """A machine that is set up and has the Makefile."""
    machine.add_python("python3", "3.12")
    assert machine.setup().returncode == 0
    machine.calls.unlink()
    shutil.copy(ROOT / "Makefile", machine.project)
    return machine


def test_make_lock_installs_what_it_has_locked_and_tries_the_three_jobs(locking: Machine) -> None:
    result = _make("lock", cwd=locking.project)
    assert (result.returncode, result.stderr) == (0, "")
    assert [call.split()[1] for call in locking.called()] == ["uv", "uv", "pip", "pip", "pip", "pytest"]
    assert locking.called()[-1] == "-m pytest -m lock"
    last = "locked and tried: retrain, classify, a scheduled run; commit both lock files"
    assert result.stdout.splitlines()[-1] == last

    tests = (ROOT / "tests" / "flows" / "test_server.py").read_text()
    tried = re.findall(
        r"^@pytest\.mark\.lock\n(?:@.*\n)*def test_(retrain|too_many|run_comes_due)", tests, re.MULTILINE
    )
    assert tried == ["retrain", "too_many", "run_comes_due"]


def test_make_lock_fails_with_one_line_if_a_job_does(locking: Machine) -> None:
    jobs = locking.project / ".venv" / "bin" / "python"
    jobs.write_text(
        jobs.read_text().replace('"-m uv "*)', '"-m pytest "*) echo "FAILED tests/a.py::b"; exit 1 ;;\n"-m uv "*)')
    )
    result = _make("lock", cwd=locking.project)
    first, *make = result.stderr.splitlines()
    assert result.returncode != 0
    assert first == "lock: what is locked does not work: FAILED tests/a.py::b; whole log: .venv/lock.log"
    assert all(line.startswith("make: ") for line in make)
    assert "locked and tried" not in result.stdout


def test_make_classify_without_folder_says_so_in_one_line() -> None:
    result = _make("classify")
    assert result.returncode == 2
    assert re.fullmatch(r"Makefile:\d+: \*\*\* FOLDER is missing; name a folder.*\n", result.stderr)
