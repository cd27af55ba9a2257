"""A promotion that is killed or meets a full disk: the champion stays whole, and repeating it completes it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pytest
from tiny_runs import Pool, write_run

from cnnpipe.errors import StorageError
from cnnpipe.manifest import MANIFEST_FILE, PROMOTION_FILE, digest_file, read_manifest
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.promote.gate import conclude_run
from cnnpipe.registry import champion_run, list_runs, promotion_history, summarize_runs

CHAMPION, CHALLENGER = "20260101T020000Z", "20260102T020000Z"
FULL: Final = 7
"""Exit status of a process that the full disk ended with a clear error."""

Fault = Literal["killed", "full"]
Stage = Literal["conclude", "approve"]


def _promote(run: Path, stage: Stage) -> None:
    conclude_run(run, approved="yes" if stage == "approve" else None)


def _promote_with_fault(run: Path, stage: Stage, fault: Fault, number: int) -> None:
    """Promote in this process, which is killed at its write number `number`, or has a full disk from then on."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        written = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        flushed = event == "open" and arguments[1] is None  # `os.open`, to flush a file or a folder
        if not written and not (fault == "killed" and (flushed or event == "os.remove")) and event != "os.rename":
            return
        if str(run.parents[2]) not in str(arguments[0]):
            return
        seen += 1
        if seen >= number:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)
    try:
        _promote(run, stage)
    except StorageError as error:
        sys.exit(FULL if "No space left on device; free some space" in str(error) else 1)


def assert_whole(artifacts: Path) -> None:
    """Check that the champion is one of the two, and that every run that looks complete is."""
    champion = champion_run(artifacts, "tiny")
    assert champion is not None
    for run in list_runs(artifacts, "tiny"):
        if (run / MANIFEST_FILE).exists():
            for name, digest in read_manifest(run).files.items():
                assert name == PROMOTION_FILE or digest_file(run / name) == digest
    assert {row.state for row in summarize_runs(artifacts)} <= {"passed", "incomplete", "awaiting"}


def try_every(step: int, tmp_path: Path, like: PreparedDataset, stage: Stage, fault: Fault) -> int:
    """Let each `step`-th write of a promotion fail, and return the number of writes that were tried."""
    labels = np.arange(120) % 10
    pool = Pool.make(labels)
    pool.answer(0, pool.wrong_at(*range(20)))
    pool.answer(1, labels)
    dataset = pool.write(tmp_path / "dataset", like, train=range(100, 110), val=range(110, 120), test=range(100))
    folder = tmp_path / "artifacts"
    conclude_run(write_run(folder, CHAMPION, dataset, 0))
    run = write_run(folder, CHALLENGER, dataset, 1, promotion="manual" if stage == "approve" else "auto")
    if stage == "approve":
        conclude_run(run)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cnnpipe.promote.gate"])
    for number in range(1, 1000, step):
        artifacts = Path(shutil.copytree(folder, tmp_path / f"{number}"))
        copy = artifacts / run.relative_to(folder)
        process = context.Process(target=_promote_with_fault, args=(copy, stage, fault, number))
        process.start()
        process.join()
        assert_whole(artifacts)
        if process.exitcode == 0:
            assert champion_run(artifacts, "tiny") == copy
            return number
        assert process.exitcode == (FULL if fault == "full" else -signal.SIGKILL), number
        _promote(copy, stage)
        assert_whole(artifacts)
        assert champion_run(artifacts, "tiny") == copy
        assert [move.run_id for move in promotion_history(artifacts, "tiny")] == [CHAMPION, CHALLENGER]
        manifest = read_manifest(copy)
        assert (manifest.state, manifest.files[PROMOTION_FILE]) == ("Promoted", digest_file(copy / PROMOTION_FILE))
        assert [row.state for row in summarize_runs(artifacts)] == ["passed", "passed"]
    raise AssertionError("the promotion never ended")


@pytest.mark.parametrize(("fault", "stage"), [("killed", "conclude"), ("full", "approve")])
def test_a_promotion_that_some_writes_fail_leaves_the_champion_whole_and_can_be_repeated(
    tmp_path: Path, digits: PreparedDataset, fault: Fault, stage: Stage
) -> None:
    assert try_every(5, tmp_path, digits, stage, fault) > 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["conclude", "approve"])
@pytest.mark.parametrize("fault", ["killed", "full"])
def test_a_promotion_that_any_write_fails_leaves_the_champion_whole_and_can_be_repeated(
    tmp_path: Path, digits: PreparedDataset, fault: Fault, stage: Stage
) -> None:
    assert try_every(1, tmp_path, digits, stage, fault) > 5
