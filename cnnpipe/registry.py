"""The registry: run folders, the champion alias, the history of promotions, and rollback.

    artifacts/<name>/runs/<run id>/       one folder for each run, complete when it holds manifest.json
    artifacts/<name>/champion             run id of the model in production, one line
    artifacts/<name>/promotions.jsonl     every move of the alias, when and why, oldest first

The alias decides; the history explains it and is written first: after a crash between the two, the same move made
again completes it, and any other starts from the alias.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.manifest import MANIFEST_FILE, Precision, choose_model_file, read_manifest
from cnnpipe.paths import expand_path
from cnnpipe.storage import make_folder, storage_errors, write_text

CHAMPION_FILE: Final = "champion"
PROMOTIONS_FILE: Final = "promotions.jsonl"
TRAINING_LOCK: Final = "training/lock"
"""File in a run folder that is locked by the process that trains; its folder goes when the training is complete."""
RUN_ID: Final = re.compile(r"\d{8}T\d{6}Z")
_LOCK_TIMEOUT_SECONDS = 30.0
_RUN_ID_FORMAT: Final = "%Y%m%dT%H%M%SZ"

_STATES = {"Promoted": "passed", "NotPromoted": "refused", "Unchanged": "unchanged", "AwaitingApproval": "awaiting"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """One move of the champion alias."""

    time: str  # UTC, ISO 8601
    action: Literal["promote", "rollback"]
    run_id: str  # champion after the move
    previous: str | None  # champion before the move
    reason: str


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs."""

    name: str
    run_id: str
    champion: bool
    preset: str | None  # None while the run is incomplete, as is `accuracy`
    accuracy: float | None  # on the test split, 0-1
    state: str  # passed, refused, unchanged or awaiting, by the gate's decision; else incomplete or damaged


def create_run(artifacts: Path, name: str) -> Path:
    """Create the folder of a new run, named by the UTC time to the second, and return it; raises StorageError.

    If the clock was set back, the name is a second after that of the newest run, because names are in order of time.
    """
    runs = make_folder(artifacts / name / "runs")
    while True:
        run_id = f"{datetime.now(UTC):{_RUN_ID_FORMAT}}"
        newest = max((run.name for run in runs.iterdir() if RUN_ID.fullmatch(run.name)), default="")
        if run_id < newest:
            run_id = f"{datetime.strptime(newest, _RUN_ID_FORMAT) + timedelta(seconds=1):{_RUN_ID_FORMAT}}"
            logger.warning("the clock is before the newest run, %s: the new run is named %s", newest, run_id)
        run = runs / run_id
        with storage_errors(run), suppress(FileExistsError):
            run.mkdir()
            return run
        time.sleep(0.2)  # another run began in this second


def list_names(artifacts: Path) -> list[str]:
    """Return the names that have runs or a champion, sorted."""
    folders = {path.parent for pattern in ("*/runs/", f"*/{CHAMPION_FILE}") for path in artifacts.glob(pattern)}
    return sorted(folder.name for folder in folders if not folder.name.startswith("."))  # Prefect's own has runs too


def list_runs(artifacts: Path, name: str) -> list[Path]:
    """Return the run folders of a name, oldest first, complete or not."""
    return sorted((artifacts / name / "runs").glob("[!.]*/"))


def summarize_runs(artifacts: Path, name: str | None = None) -> list[RunSummary]:
    """Return every run of a name, or of all names, newest first; a damaged run or alias is not an error here."""
    champions, _ = list_champions(artifacts)
    names = list_names(artifacts) if name is None else [name]
    return [_summarize(run, champions.get(each)) for each in names for run in reversed(list_runs(artifacts, each))]


def _summarize(run: Path, champion: str | None) -> RunSummary:
    start = (run.parent.parent.name, run.name, run.name == champion)
    if not (run / MANIFEST_FILE).is_file():
        return RunSummary(*start, None, None, "incomplete")
    try:
        manifest = read_manifest(run)
    except RegistryError:
        return RunSummary(*start, None, None, "damaged")
    state = _STATES[manifest.state or ("Promoted" if manifest.promoted else "NotPromoted")]
    return RunSummary(*start, manifest.model.preset, manifest.model.test_accuracy, state)


def list_champions(artifacts: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the champions' run ids by name, and by name the problem of each alias that cannot be used."""
    champions, problems = {}, {}
    for name in list_names(artifacts):
        try:
            if run := champion_run(artifacts, name):
                champions[name] = run.name
        except RegistryError as error:
            problems[name] = str(error)
    return champions, problems


def champion_run(artifacts: Path, name: str) -> Path | None:
    """Return the champion's run folder, or None before the first promotion.

    Raises:
        RegistryError: the alias names a run that is missing or not complete.
    """
    alias = artifacts / name / CHAMPION_FILE
    return _read_alias(alias) if alias.is_file() else None


def _read_alias(alias: Path) -> Path:
    run_id = _alias_content(alias)
    if run_id is None or not (alias.parent / "runs" / run_id / MANIFEST_FILE).is_file():
        raise RegistryError(
            f"{alias} names the run {run_id or ''!r}, which is not complete in {alias.parent / 'runs'}; "
            f"promote another run with `cnnpipe models promote {alias.parent.name}/<run id> --force`, or delete it"
        )
    return alias.parent / "runs" / run_id


def _alias_content(alias: Path) -> str | None:
    """Return the run id in an alias file, whether there is such a run or not; None if the file is missing or empty."""
    try:
        return alias.read_text(encoding="utf-8").strip() or None if alias.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{alias} cannot be read: {error}; delete it and promote a run with --force") from error


def promotion_history(artifacts: Path, name: str) -> list[Promotion]:
    """Return every move of the alias, oldest first; raises RegistryError if the history is damaged."""
    path = artifacts / name / PROMOTIONS_FILE
    if not path.is_file():
        return []
    try:
        # Not splitlines(): a reason may hold a Unicode line separator, which JSON leaves as it is.
        return [Promotion(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(f"{path} is damaged: {error}; fix or remove the line") from error


def promote_run(
    artifacts: Path, name: str, run_id: str, reason: str, action: Literal["promote", "rollback"] = "promote"
) -> Promotion:
    """Make a complete run the champion; promoting the champion again changes nothing.

    Raises:
        RegistryError: the run is missing or not complete, or the history is damaged.
        StorageError: the alias or the history cannot be written.
    """
    folder, alias = artifacts / name, artifacts / name / CHAMPION_FILE
    with alias_lock(artifacts, name):
        # With `..` or a path the alias would point outside its folder.
        if run_id not in [run.name for run in list_runs(artifacts, name)]:
            missing = f"there is no run {run_id!r} in {folder / 'runs'}, where old runs are removed"
            raise RegistryError(f"{missing}; see `cnnpipe models list {name}`")
        read_manifest(folder / "runs" / run_id)
        history, previous = promotion_history(artifacts, name), _alias_content(alias)
        if history and history[-1].run_id == run_id:
            move = history[-1]  # the alias is there already, or a crash came between history and alias
        else:
            move = Promotion(datetime.now(UTC).isoformat(timespec="seconds"), action, run_id, previous, reason)
            lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in [*history, move]]
            write_text(folder / PROMOTIONS_FILE, "".join(lines))
        if previous != run_id:
            write_text(alias, run_id + "\n")
        return move


def rollback(artifacts: Path, name: str, reason: str, run_id: str | None = None) -> Promotion:
    """Give the alias back to the previous champion, or to a given run.

    A second rollback goes one champion further back: a champion that was rolled back from counts again only after it
    has been promoted again.

    Raises:
        RegistryError: there is no earlier champion; otherwise raises as `promote_run`.
    """
    with alias_lock(artifacts, name):
        if run_id is None:
            champions, _ = replay_history(artifacts, name)
            if len(champions) < 2:
                raise RegistryError(f"{name} has no earlier champion to go back to; see `cnnpipe models list {name}`")
            run_id = champions[-2]
        return promote_run(artifacts, name, run_id, reason, "rollback")


def replay_history(artifacts: Path, name: str) -> tuple[list[str], set[str]]:
    """Return the champions that a rollback can return to, and the runs that were rolled back from.

    Returns:
        Run ids of the champions, oldest first, the present one last; run ids of those that were rolled back from and
            not promoted since.
    Raises:
        RegistryError: the alias or the history is damaged.
    """
    champions: list[str] = []
    left: set[str] = set()
    for move in promotion_history(artifacts, name):
        _return_to(champions, move.previous)  # differs from the last only if a move was written, but not made
        if move.action == "rollback":
            before = list(champions)
            _return_to(champions, move.run_id)
            left.update(before[len(champions) :] or before[-1:])
        elif champions[-1:] != [move.run_id]:
            champions.append(move.run_id)
        left.discard(move.run_id)
    _return_to(champions, _alias_content(artifacts / name / CHAMPION_FILE))
    return champions, left


def _return_to(champions: list[str], run_id: str | None) -> None:
    """Drop the champions after the last occurrence of `run_id`; append one that was never champion."""
    if run_id is None:
        champions.clear()
    elif run_id not in champions:
        champions.append(run_id)
    else:
        while champions[-1] != run_id:
            champions.pop()


@contextmanager
def alias_lock(artifacts: Path, name: str) -> Iterator[None]:
    """Let one process at a time decide about an alias and move it; the thread that holds the lock may take it again.

    Raises:
        RegistryError: there is no such name, or another process holds the lock for 30 seconds.
    """
    folder = artifacts / name
    if not folder.is_dir():
        there = ", ".join(list_names(artifacts)) or "none"
        raise RegistryError(f"there is no model {name!r} in {artifacts}, which has: {there}; check the name")
    from filelock import FileLock, Timeout  # loads asyncio, which `--help` need not wait for

    lock = FileLock(folder.resolve() / ".lock", is_singleton=True)
    with storage_errors(folder):
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS)
        except Timeout as error:  # inside `storage_errors`, because it is an OSError too
            raise RegistryError(f"another process holds {folder / '.lock'}; wait for it and try again") from error
    try:
        yield
    finally:
        lock.release()


def registry_place(run: Path) -> tuple[Path, str]:
    """Return the artifacts folder and the name that a run folder belongs to; RegistryError for a copy elsewhere."""
    runs = run.resolve().parent
    if runs.name != "runs":
        raise RegistryError(f"{run} is not in <artifacts>/<name>/runs, so it cannot be champion; copy it there")
    return runs.parent.parent, runs.parent.name


def find_model(model: str, artifacts: Path) -> Path:
    """Return the model file or the run folder that a user means: a file that exists, else as `resolve_run`.

    So a name such as `cats.onnx` means its champion, unless there is a file of that name.
    """
    path = expand_path(model)
    if not path.is_file() or path.name == CHAMPION_FILE:
        return resolve_run(model, artifacts)
    if path.suffix not in (".onnx", ".keras"):
        raise ModelError(f"{path} is not a model: a model file ends in .onnx or .keras")
    return path


def resolve_run(model: str, artifacts: Path) -> Path:
    """Return the run folder that a user means.

    Args:
        model: a name (its champion), an alias file, a run folder, or `<name>/<run id>`.
    Raises:
        ModelError: there is no such run.
        RegistryError: the alias names a run that is not complete.
    """
    path = expand_path(model)
    if path.name == CHAMPION_FILE and path.is_file():
        return _read_alias(path)
    if path.is_dir():
        run = path.resolve()  # the parent of `.` is known only then
        if run.parent.name == "runs" or (run / MANIFEST_FILE).is_file():
            return run
        if (run / CHAMPION_FILE).is_file():
            return _read_alias(run / CHAMPION_FILE)
    name, _, run_id = model.rstrip("/").partition("/")
    if run_id and (artifacts / name / "runs" / run_id).is_dir():
        return artifacts / name / "runs" / run_id
    names = list_names(artifacts)
    if name in names and not run_id:
        if champion := champion_run(artifacts, name):
            return champion
        raise ModelError(
            f"{name} has no champion yet in {artifacts}; promote a run with `cnnpipe models promote`, "
            f"or give one as {name}/<run id>"
        )
    if path.suffix in (".onnx", ".keras"):
        raise ModelError(f"there is no model file at {path}; check the path")
    removed = " any more, because old runs are removed" if RUN_ID.fullmatch(path.name) else ""
    there = ", ".join(names) or "none"
    raise ModelError(
        f"there is no model {model!r}{removed}; give a name ({there} in {artifacts}), a run folder, or an .onnx file"
    )


def resolve_model(model: str | None, artifacts: Path, precision: Precision | Literal["auto"] = "auto") -> Path:
    """Return the run folder or the model file to apply.

    Args:
        model: as for `find_model`; None is the only champion there is.
        precision: checked here, before anything heavy is loaded, if the model is a run.
    Raises:
        ModelError: there is no such model, no such precision of it, or None was given and there is not one champion.
        RegistryError: the alias names a run that is not complete.
    """
    if model is None:
        names = [name for name in list_names(artifacts) if (artifacts / name / CHAMPION_FILE).is_file()]
        if not names:
            raise ModelError(f"{artifacts} has no champion; train one with `make retrain`, or give --model FILE.onnx")
        if len(names) > 1:
            raise ModelError(f"{artifacts} has several champions ({', '.join(names)}); choose one with --model")
        found = _read_alias(artifacts / names[0] / CHAMPION_FILE)
    else:
        found = find_model(model, artifacts)
    if found.is_dir():
        choose_model_file(found, "cpu", precision)
    return found
