"""A disk that is full during a stage: one line, no half-written file, and the same command completes it later."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from cnnpipe.prepare.dataset import PreparedDataset

ROOT: Final = Path(__file__).parents[1]

PROGRAM: Final = """
import errno, os, sys

def watch(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes and str(arguments[0]).startswith(os.environ["FULL_DISK"]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

if "FULL_DISK" in os.environ:
    sys.addaudithook(watch)
from cnnpipe.cli import main
main()
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `cnnpipe` with a disk that is full below the folder FULL_DISK, if it is given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "stage", ["export", *(pytest.param(each, marks=pytest.mark.slow) for each in ("train", "evaluate", "plot"))]
)
def test_a_full_disk_ends_a_stage_with_one_line_and_the_same_command_completes_it(
    stage: str, finished_run: Path, digits: PreparedDataset, tmp_path: Path
) -> None:
    artifacts = tmp_path / "artifacts"
    folder = artifacts / "digits" / "runs" / finished_run.name
    if stage == "train":
        command = ["train", "digits", "--epochs", "1", "--data", str(digits.path.parents[1])]
    else:
        shutil.copytree(finished_run, folder)
        (folder / "manifest.json").unlink()
        command = [stage, str(folder)]
    command += ["--artifacts", str(artifacts)]
    before = {file.name: file.read_bytes() for file in folder.glob("*")}

    full = run(*command, FULL_DISK=str(artifacts))

    assert full.returncode == 1
    (error,) = re.findall("^error: .*", full.stderr, re.MULTILINE)
    assert re.fullmatch(r"error: cannot write \S+: No space left on device; free some space", error)
    assert "Traceback" not in full.stderr
    left = {file.name: file.read_bytes() for file in folder.glob("*")}
    assert all(before[name] == content for name, content in left.items())
    assert not list(artifacts.glob("*/runs/*/manifest.json"))
    assert run(*command).returncode == 0
