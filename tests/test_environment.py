"""On what machine something was made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cnnpipe.environment import Processor, describe_environment, find_processor

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
