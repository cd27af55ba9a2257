"""Run folders, the champion alias, the history of promotions, and rollback.

    artifacts/<name>/runs/<run id>/       one folder a run, complete once it holds manifest.json
    artifacts/<name>/champion             the run id in production, one line
    artifacts/<name>/promotions.jsonl     what moved the alias, when and why, oldest first

The alias is the truth; the history explains it. The history is written first, so that the alias never moves
unexplained: after a crash in between, promoting the same run again completes the move.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.manifest import MANIFEST_FILE, read_manifest
from cnnpipe.storage import make_folder, storage_errors, write_text

__all__ = [
    "CHAMPION_FILE",
    "HISTORY_FILE",
    "Promotion",
    "champion_run",
    "create_run",
    "list_names",
    "list_runs",
    "promote_run",
    "promotion_history",
    "resolve_model_file",
    "resolve_run",
    "rollback",
]

CHAMPION_FILE: Final = "champion"
HISTORY_FILE: Final = "promotions.jsonl"
_LOCK_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Promotion:
    """One move of the champion alias."""

    time: str
    """UTC, ISO 8601."""
    action: Literal["promote", "rollback"]
    run_id: str
    """The champion from then on."""
    previous: str | None
    """The champion before."""
    reason: str


def create_run(artifacts: Path, name: str) -> Path:
    """Create the folder of a new run, named by the UTC time to the second, and return it.

    Raises:
        StorageError: it cannot be created.
    """
    runs = make_folder(artifacts / name / "runs")
    while True:
        run = runs / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        with storage_errors(run):
            try:
                run.mkdir()
                return run
            except FileExistsError:
                time.sleep(0.2)  # another run began in this second


def list_names(artifacts: Path) -> list[str]:
    """Return the names that have runs or a champion, sorted."""
    if not artifacts.is_dir():
        return []
    return sorted(
        folder.name
        for folder in artifacts.iterdir()
        if (folder / "runs").is_dir() or (folder / CHAMPION_FILE).is_file()
    )


def list_runs(artifacts: Path, name: str) -> list[Path]:
    """Return the run folders of a name, oldest first, complete or not."""
    runs = artifacts / name / "runs"
    return sorted(run for run in runs.iterdir() if run.is_dir()) if runs.is_dir() else []


def champion_run(artifacts: Path, name: str) -> Path | None:
    """Return the run folder that the champion alias names, or None before the first promotion.

    Raises:
        RegistryError: the alias names a run that is not there or not complete.
    """
    alias = artifacts / name / CHAMPION_FILE
    return _read_alias(alias) if alias.is_file() else None


def _read_alias(alias: Path) -> Path:
    run_id = alias.read_text(encoding="utf-8").strip()
    run = alias.parent / "runs" / run_id
    if not run_id or not (run / MANIFEST_FILE).is_file():
        raise RegistryError(
            f"{alias} names the run {run_id!r}, which is not complete in {alias.parent / 'runs'}; "
            "choose another with `cnnpipe models promote`"
        )
    return run


def promotion_history(artifacts: Path, name: str) -> list[Promotion]:
    """Return every move of the alias, oldest first.

    Raises:
        RegistryError: the history is damaged.
    """
    path = artifacts / name / HISTORY_FILE
    if not path.is_file():
        return []
    try:
        return [Promotion(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (ValueError, TypeError) as error:
        raise RegistryError(f"{path} is damaged: {error}; mend or remove the line") from error


def promote_run(artifacts: Path, name: str, run_id: str, reason: str) -> Promotion:
    """Make a complete run the champion; promoting the champion again changes nothing.

    Raises:
        RegistryError: the run is missing or not complete.
        StorageError: the alias or the history cannot be written.
    """
    return _move_alias(artifacts, name, "promote", run_id, reason)


def rollback(artifacts: Path, name: str, reason: str, run_id: str | None = None) -> Promotion:
    """Give the alias back to the champion before the present one, or to a given run.

    Raises:
        RegistryError: there is no earlier champion, or the run is missing or not complete.
        StorageError: the alias or the history cannot be written.
    """
    if run_id is None:
        champions: list[str] = []
        for move in promotion_history(artifacts, name):
            if move.action == "rollback" and move.run_id in champions:
                del champions[champions.index(move.run_id) + 1 :]
            else:
                champions.append(move.run_id)
        if len(champions) < 2:
            raise RegistryError(f"{name} has no earlier champion to go back to; see `cnnpipe models list {name}`")
        run_id = champions[-2]
    return _move_alias(artifacts, name, "rollback", run_id, reason)


def _move_alias(
    artifacts: Path, name: str, action: Literal["promote", "rollback"], run_id: str, reason: str
) -> Promotion:
    folder = artifacts / name
    read_manifest(folder / "runs" / run_id)
    with _lock(folder):
        history = promotion_history(artifacts, name)
        alias = folder / CHAMPION_FILE
        previous = alias.read_text(encoding="utf-8").strip() if alias.is_file() else None
        explained = bool(history) and history[-1].run_id == run_id
        if explained and previous == run_id:
            return history[-1]
        if explained:  # the crash between history and alias: only the alias is missing
            move = history[-1]
        else:
            move = Promotion(datetime.now(UTC).isoformat(timespec="seconds"), action, run_id, previous, reason)
            lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in [*history, move]]
            write_text(folder / HISTORY_FILE, "\n".join(lines) + "\n")
        write_text(alias, run_id + "\n")
        return move


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time move an alias; the lock ends with the process, even if it is killed."""
    lock = FileLock(folder / ".lock")
    try:
        with storage_errors(folder):
            lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS)
    except Timeout as error:
        raise RegistryError(f"another process holds {folder / '.lock'}; wait for it and try again") from error
    try:
        yield
    finally:
        lock.release()


def resolve_run(model: str, artifacts: Path) -> Path:
    """Return the run folder that a user means.

    Args:
        model: a name (its champion), an alias file, a run folder, or `<name>/<run id>`.
    Raises:
        ModelError: nothing is found under it.
        RegistryError: the alias names a run that is not complete.
    """
    path = Path(model).expanduser()
    if path.name == CHAMPION_FILE and path.is_file():
        return _read_alias(path)
    if path.is_dir() and path.parent.name == "runs":
        return path
    if path.is_dir() and (path / CHAMPION_FILE).is_file():
        return _read_alias(path / CHAMPION_FILE)
    name, _, run_id = model.partition("/")
    if run_id and (artifacts / name / "runs" / run_id).is_dir():
        return artifacts / name / "runs" / run_id
    champion = champion_run(artifacts, model) if name == model and name not in ("", ".", "..") else None
    if champion is not None:
        return champion
    names = ", ".join(list_names(artifacts)) or "none"
    raise ModelError(
        f"no model is called {model!r}; give a name with a champion ({names} in {artifacts}), a run folder, "
        "or an .onnx file"
    )


def resolve_model_file(model: str | None, artifacts: Path, file_name: str = "model.onnx") -> Path:
    """Return the model file that a user means.

    Args:
        model: as for `resolve_run`, or the path of an .onnx or .keras file; None is the only champion there is.
        file_name: the file to take from a run folder.
    Raises:
        ModelError: nothing is found under it, or None and there is not exactly one champion.
        RegistryError: the alias names a run that is not complete.
    """
    if model is None:
        champions = [name for name in list_names(artifacts) if (artifacts / name / CHAMPION_FILE).is_file()]
        if len(champions) != 1:
            found = f"{artifacts} has {len(champions)} champions" + (f" ({', '.join(champions)})" if champions else "")
            raise ModelError(f"{found}; say which model with --model, or train one with `make retrain`")
        model = champions[0]
    path = Path(model).expanduser()
    if path.suffix in (".onnx", ".keras"):
        if not path.is_file():
            raise ModelError(f"no model file at {path}; check the path")
        return path
    if path.is_file() and path.name != CHAMPION_FILE:
        raise ModelError(f"{path} is no model: it ends in {path.suffix or 'no suffix'}, not in .onnx or .keras")
    file = resolve_run(model, artifacts) / file_name
    if not file.is_file():
        raise ModelError(f"the run {file.parent} has no {file_name}; finish it with `cnnpipe export {file.parent}`")
    return file
