"""The stage `clean`: remove old runs, prepared datasets, results of tasks, and classifications that were interrupted.

It never removes the champion, the five champions before it, a run that was rolled back from, one that may be under way
or that awaits approval, the dataset of such a run, and complete tables of predictions. It removes what an earlier call
was removing when it was killed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from cnnpipe.errors import CnnpipeError
from cnnpipe.images.leftovers import JOB_FILE
from cnnpipe.manifest import MANIFEST_FILE, PROMOTION_FILE, TRAINING_FILE, read_origin
from cnnpipe.nightly import MAX_LOG_BYTES, prefect_home, server_log
from cnnpipe.registry import RUN_ID, TRAINING_LOCK, alias_lock, list_names, list_runs, replay_history
from cnnpipe.settings import CleanSettings, read_toml
from cnnpipe.storage import TEMPORARY_NAME, remove_path, storage_errors, write_file

_KEPT_PREDECESSORS: Final = 5
"""Number of champions before the present one that stay for a rollback, however old they are."""

_DAY_SECONDS: Final = 86_400.0
"""Seconds without a change after which a run that is not complete counts as dead: nobody works on it."""

_PREPARED: Final = re.compile(r"(.+)-[0-9a-f]{12}")


@dataclass(frozen=True)
class Entry:
    """A file or folder that was removed or is kept."""

    kind: str
    """`run`, `prepared dataset`, `task result` or `interrupted classification`."""
    path: str
    bytes: int
    """Size of its files."""


@dataclass(frozen=True)
class Cleaning:
    """Result of the stage `clean`."""

    removed: tuple[Entry, ...]
    kept: tuple[Entry, ...]
    """Runs and prepared datasets that are left."""
    database_bytes: int
    """Size of the SQLite database of the server of the artifacts folder; 0 if it has none."""
    free_bytes: int
    """Free space on the disk of the artifacts folder."""

    def line(self, verb: str = "removed") -> str:
        """Return what was removed and what is in use, in one line."""
        database = f", database {_megabytes(self.database_bytes)}" if self.database_bytes else ""
        used = f"in use: {_describe(self.kept)}{database}"
        return f"{verb} {_describe(self.removed)}; {used}; {self.free_bytes / 1e9:,.1f} GB of the disk are free"


def list_prepared(data: Path) -> dict[str, list[Path]]:
    """Return the folders of the prepared datasets by their name, those used last first."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(data.glob("prepared/*/"), key=_changed, reverse=True):
        if (match := _PREPARED.fullmatch(folder.name)) and not (folder.is_symlink() or folder.name.startswith(".")):
            found.setdefault(match[1], []).append(folder)
    return found


def clean_up(
    settings: CleanSettings,
    names: Collection[str],
    data: Path,
    artifacts: Path,
    *,
    run: Path | None = None,
    dry_run: bool = False,
) -> Cleaning:
    """Remove what is older than the settings allow.

    Args:
        names: names whose runs and prepared datasets are looked at; old files of no name are removed in any case.
        data: folder of prepared datasets.
        artifacts: folder of runs and champions.
        run: run folder to keep with its dataset, however old they are.
        dry_run: whether to remove nothing and only return what would be removed.
    Raises:
        RegistryError: an alias or a history is damaged, and it is not known what a rollback needs.
        StorageError: something cannot be removed.
    """
    removed: list[Entry] = []
    kept: list[Entry] = []

    def settle(kind: str, path: Path, old: bool) -> None:
        (removed if old else kept).append(Entry(kind, str(path), _size(path)))
        if old and not dry_run:
            remove_path(path)

    for name in names:
        if (artifacts / name).is_dir():
            with alias_lock(artifacts, name), storage_errors(artifacts / name):
                for each, old in _judge_runs(artifacts, name, settings.keep_runs, run):
                    settle("run", each, old)
    in_use = _datasets_in_use(artifacts, run)
    prepared = list_prepared(data)
    for number, folder in (each for name in names for each in enumerate(prepared.get(name, ()))):
        settle("prepared dataset", folder, number >= settings.keep_prepared and folder.resolve() not in in_use)
    home = prefect_home(artifacts)
    for kind, path in _old_files(artifacts, home, settings.keep_days):
        settle(kind, path, old=True)
    log = server_log(home)
    if not dry_run and log.is_file() and log.stat().st_size > MAX_LOG_BYTES:  # that of a server that runs on
        with write_file(log.with_suffix(".log.1")) as temporary, storage_errors(log):
            shutil.copyfile(log, temporary)
        os.truncate(log, 0)  # the server appends
    disk = next(folder for folder in (artifacts, *artifacts.resolve().parents) if folder.is_dir())
    database = sum(map(_size, home.glob("prefect.db*")))
    return Cleaning(tuple(removed), tuple(kept), database, shutil.disk_usage(disk).free)


def _judge_runs(artifacts: Path, name: str, keep_runs: int, current: Path | None) -> Iterator[tuple[Path, bool]]:
    """Yield each run of a name and whether it can be removed; its training lock is held until the next one is taken.

    The newest `keep_runs` trained runs stay. A run that was interrupted or failed in training can be removed as soon as
    there is a newer run: only the next training would continue it.
    """
    hidden = (artifacts / name / "runs").glob(".*")
    yield from ((leftover, True) for leftover in hidden if TEMPORARY_NAME.fullmatch(leftover.name))
    runs = [run for run in list_runs(artifacts, name) if RUN_ID.fullmatch(run.name) and not run.is_symlink()]
    champions, rolled_back = replay_history(artifacts, name)  # the gate refuses a model that equals a rolled-back one
    needed = {*champions[-1 - _KEPT_PREDECESSORS :], *rolled_back, *([current.name] if current else ())}
    trained = [run for run in runs if any((run / file).is_file() for file in (TRAINING_FILE, MANIFEST_FILE))]
    newest = {*trained[-keep_runs:], *runs[-1:]}
    for run in runs:
        old, lock = run not in newest and run.name not in needed and not _is_busy(run), FileLock(run / TRAINING_LOCK)
        try:
            if old and (run / TRAINING_LOCK).is_file():
                lock.acquire(blocking=False)
        except Timeout:
            old = False
        yield run, old
        lock.release()


def _is_busy(run: Path) -> bool:
    """Return whether a run awaits approval, or is not complete and was changed within a day."""
    if not (run / MANIFEST_FILE).is_file():
        with suppress(FileNotFoundError):
            return max(map(_changed, (run, *run.rglob("*")))) > time.time() - _DAY_SECONDS
        return True  # a folder has just been removed
    with suppress(OSError, ValueError, AttributeError, CnnpipeError):
        decision = run / PROMOTION_FILE
        hours = float(read_toml(run / "config.toml").get("promote", {}).get("approval_hours", 0))
        waits = json.loads(decision.read_bytes()).get("state") == "AwaitingApproval"
        return waits and _changed(decision) > time.time() - 3600 * hours
    return False


def _datasets_in_use(artifacts: Path, current: Path | None) -> set[Path]:
    """Return the prepared datasets that runs of any name still need."""
    found = set()
    for name in list_names(artifacts):
        runs = list_runs(artifacts, name)
        unfinished = [run for run in runs[-1:] if not (run / MANIFEST_FILE).is_file()]
        for run in {*unfinished, *filter(_is_busy, runs), *([current] if current else ())}:
            with suppress(CnnpipeError):  # it has only just begun, or is damaged
                found.add(read_origin(run).prepared)
    return {path.resolve() for path in found if path}


def _old_files(artifacts: Path, home: Path, keep_days: int) -> Iterator[tuple[str, Path]]:
    """Yield the kind and path of old results of tasks, and of what interrupted classifications have left."""
    oldest = time.time() - keep_days * _DAY_SECONDS
    yield from (("task result", path) for path in home.glob("results/*") if _changed(path) < oldest)
    for folder in artifacts.glob("predictions/*/"):
        with suppress(FileNotFoundError):  # another night has just removed it
            inside = list(folder.iterdir())
            left = [
                path
                for path in inside
                if JOB_FILE.fullmatch(os.fsencode(path.name)) or TEMPORARY_NAME.fullmatch(path.name)
            ]
            if left and all(_changed(path) < oldest for path in inside):
                yield from (("interrupted classification", path) for path in ([folder] if left == inside else left))


def _changed(path: Path) -> float:
    """Return the time of the last change of a file, or of the list of files of a folder; infinity if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder that do not go meanwhile."""
    with suppress(FileNotFoundError):
        return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir())
    return 0


def _describe(entries: Sequence[Entry]) -> str:
    """Return the number and size of each kind, such as `2 runs 1.5 MB, 1 prepared dataset 0.3 MB`."""
    texts = []
    for kind, group in groupby(entries, attrgetter("kind")):
        sizes = [entry.bytes for entry in group]
        texts.append(f"{len(sizes):,} {kind}{'s' * (len(sizes) > 1)} {_megabytes(sum(sizes))}")
    return ", ".join(texts) or "nothing"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
