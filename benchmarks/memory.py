"""Memory of `cnnpipe classify` on trees of many files, up to millions.

A tree is made of hard links to copies of a few thousand small images: unique names that take little disk.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.contenders import CNNPIPE, Models, line_up
from benchmarks.processes import ProcessRun, run_process
from benchmarks.tables import markdown_lines
from cnnpipe.errors import CnnpipeError
from cnnpipe.images.find import find_files

__all__ = ["Layout", "make_tree", "measure_memory"]


_FILES_IN_A_FOLDER: Final = 10_000
_MAX_ORIGINALS: Final = 4000

# ext4 allows 65,000 names for one file.
# Source: https://docs.kernel.org/filesystems/ext4/about.html
_MAX_LINKS: Final = 60_000


class Layout(StrEnum):
    """How a tree is built."""

    FOLDERS = "folders"
    """Folders of 10,000 files each."""
    FLAT = "flat"
    """All files in one folder."""


@dataclass(frozen=True)
class _Case:
    num_files: int
    layout: Layout
    run: ProcessRun


def measure_memory(
    source: Path, models: Models, numbers: Sequence[int], layouts: Sequence[Layout], scratch: Path
) -> list[str]:
    """Classify a tree of each number of files in each layout, and return a table.

    Args:
        source: a folder of small images, of which up to 4,000 are taken.
        scratch: folder in which the trees are made, one at a time, and removed.
    Raises:
        CnnpipeError: there are too few images, or a classification failed.
    """
    cases = []
    for num_files in numbers:
        for layout in layouts:
            with _scratch_folder(scratch) as folder:
                tree = make_tree(source, folder / "tree", num_files, layout)
                print(f"{num_files:,} files, {layout}: made", file=sys.stderr)
                cases.append(_Case(num_files, layout, _classify(tree, folder / "out" / "table.csv", models)))
                print(f"{num_files:,} files, {layout}: {cases[-1].run.seconds:.1f} s", file=sys.stderr)
    return _table(cases)


def make_tree(source: Path, tree: Path, num_files: int, layout: Layout) -> Path:
    """Make a folder of `num_files` hard links, and return it; their files are in a folder beside it.

    Raises:
        CnnpipeError: `source` has too few files for that many links.
    """
    # Copies, because links cannot reach into another file system.
    originals = tree.with_name("originals")
    originals.mkdir(parents=True)
    copies: list[Path] = []
    for number, name in enumerate(islice(find_files(source), _MAX_ORIGINALS)):
        copies.append(originals / f"{number}{Path(name).suffix}")
        shutil.copyfile(source / name, copies[-1])
    if len(copies) < math.ceil(num_files / _MAX_LINKS):
        raise CnnpipeError(f"{len(copies)} files in {source} are too few for {num_files:,} hard links; give more")
    tree.mkdir()
    for number in range(num_files):
        copy = copies[number % len(copies)]
        folder = tree if layout is Layout.FLAT else tree / f"{number // _FILES_IN_A_FOLDER:05}"
        if layout is Layout.FOLDERS and number % _FILES_IN_A_FOLDER == 0:
            folder.mkdir()
        os.link(copy, folder / f"{number:08}{copy.suffix}")
    return tree


@contextmanager
def _scratch_folder(scratch: Path) -> Iterator[Path]:
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tree-", dir=scratch) as folder:
        yield Path(folder)


def _classify(tree: Path, output: Path, models: Models) -> ProcessRun:
    contender = next(each for each in line_up(models)[0] if each.name == CNNPIPE)
    output.parent.mkdir()
    return run_process(contender.command(tree, output))


def _table(cases: Sequence[_Case]) -> list[str]:
    rows = [("files", "s", "images/s after start-up", "parent MB", "children MB", "peak MB")]
    for case in cases:
        run, seconds = case.run, case.run.report["seconds"]
        if run.report["found"] != case.num_files:
            raise CnnpipeError(f"{CNNPIPE} found {run.report['found']:,} of {case.num_files:,} files: a bug")
        rows.append(
            (
                f"{case.num_files:,}, {case.layout}",
                f"{run.seconds:.1f}",
                f"{case.num_files / (seconds['total'] - seconds['start_up']):,.0f}",
                f"{run.peak.parent / 1e6:,.0f}",
                f"{run.peak.children / 1e6:,.0f}",
                f"{run.peak.total / 1e6:,.0f}",
            )
        )
    return markdown_lines(rows)
