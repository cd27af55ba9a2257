"""On what machine something was made."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cnnpipe.machine import Processor, describe_environment, find_processor, usable_cores

CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model name\t: AMD EPYC 9654 96-Core Processor
flags\t\t: fpu sse2 avx512f avx512_bf16
power management: ts ttp

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: of the second one
flags\t\t: amx_bf16
"""


def test_the_first_processor_is_described(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    flags = frozenset({"fpu", "sse2", "avx512f", "avx512_bf16"})
    assert find_processor(file) == Processor("AuthenticAMD", "AMD EPYC 9654 96-Core Processor", flags)


def test_a_system_that_does_not_tell_has_a_processor_of_which_nothing_is_known(tmp_path: Path) -> None:
    assert find_processor(tmp_path / "missing") == Processor("", "", frozenset())
    other = tmp_path / "cpuinfo"
    other.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\n")  # as on 64-bit Arm
    assert find_processor(other) == Processor("", "", frozenset())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_run_says_on_which_processor_it_was_made() -> None:
    assert describe_environment()["processor"] == find_processor().model


def write_cgroups(folder: Path, own: str, files: dict[str, str]) -> int:
    """Write made-up control groups, and return the cores that a process of 64 of them finds."""
    (folder / "own").write_text(own)
    for name, content in files.items():
        file = folder / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return usable_cores(folder / "fs", folder / "own")


V1_HOST = "9:name=systemd:/\n2:cpu,cpuacct:/docker/c0ffee\n1:memory:/docker/c0ffee\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/a\n", {"a/b/cpu.max": "100000 100000\n", "c/cpu.max": "100000 100000\n"}, 64),
        (V1_HOST, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (V1_HOST, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        (
            V1_HOST,
            {"cpu/docker/c0ffee/cpu.cfs_quota_us": "400000", "cpu/docker/c0ffee/cpu.cfs_period_us": "100000"},
            4,
        ),
        (V1_HOST, {"cpu/cpu.cfs_quota_us": "250000\n"}, 64),
        ("0::/gone\n", {}, 64),
        ("0::/\n", {"cpu.max": "much 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "100000 0\n"}, 64),
        ("0::/\n", {"cpu.max": "\n"}, 64),
        ("0::/\n", {"cpu.max": "0 100000\n"}, 1),
        ("garbage\n", {"cpu.max": "100000 100000\n"}, 64),
        ("", {"cpu.max": "100000 100000\n"}, 64),
    ],
)
def test_cores_are_what_the_container_grants(
    own: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert write_cgroups(tmp_path, own, files) == cores


def test_cores_are_those_of_the_affinity_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "fs", tmp_path / "own") == len(os.sched_getaffinity(0))
