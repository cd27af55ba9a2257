"""Run folders, the champion alias, the history of promotions, and rollback.

    artifacts/<name>/runs/<run id>/       one folder a run, complete once it holds manifest.json
    artifacts/<name>/champion             the run id in production, one line
    artifacts/<name>/promotions.jsonl     what moved the alias, when and why, oldest first

The alias is the truth; the history explains it. The history is written first, so that the alias never moves
unexplained: after a crash in between, the same move made again completes it, and any other move goes from the alias.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.files import user_path
from cnnpipe.manifest import MANIFEST_FILE, Precision, choose_model_file, read_manifest
from cnnpipe.storage import make_folder, storage_errors, write_text

__all__ = [
    "CHAMPION_FILE",
    "PROMOTIONS_FILE",
    "Promotion",
    "RunSummary",
    "alias_lock",
    "champion_run",
    "create_run",
    "list_names",
    "list_runs",
    "promote_run",
    "promotion_history",
    "resolve_model",
    "resolve_model_file",
    "resolve_run",
    "rollback",
    "summarize_runs",
]

CHAMPION_FILE: Final = "champion"
PROMOTIONS_FILE: Final = "promotions.jsonl"
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


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs."""

    name: str
    run_id: str
    champion: bool
    preset: str | None
    accuracy: float | None
    """On the test split, 0-1; None while the run is incomplete, like `preset`."""
    state: Literal["passed", "refused", "incomplete", "damaged"]
    """What the promotion gate said, or why it cannot be told."""


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
        if not folder.name.startswith(".")  # of Prefect's, which has runs too
        and ((folder / "runs").is_dir() or (folder / CHAMPION_FILE).is_file())
    )


def list_runs(artifacts: Path, name: str) -> list[Path]:
    """Return the run folders of a name, oldest first, complete or not."""
    runs = artifacts / name / "runs"
    if not runs.is_dir():
        return []
    return sorted(run for run in runs.iterdir() if run.is_dir() and not run.name.startswith("."))


def summarize_runs(artifacts: Path, name: str | None = None) -> list[RunSummary]:
    """Return every run of a name, or of all names, newest first; a damaged one is told, not raised."""
    summaries = []
    for each in list_names(artifacts) if name is None else [name]:
        champion = None
        with suppress(RegistryError):  # then no run is marked; `doctor` and promotion say what is wrong with the alias
            champion = _alias_content(artifacts / each / CHAMPION_FILE)
        summaries += [_summarize(each, run, run.name == champion) for run in reversed(list_runs(artifacts, each))]
    return summaries


def _summarize(name: str, run: Path, champion: bool) -> RunSummary:
    if not (run / MANIFEST_FILE).is_file():
        return RunSummary(name, run.name, champion, None, None, "incomplete")
    try:
        manifest = read_manifest(run)
    except RegistryError:
        return RunSummary(name, run.name, champion, None, None, "damaged")
    state: Literal["passed", "refused"] = "passed" if manifest.promoted else "refused"
    return RunSummary(name, run.name, champion, manifest.model.preset, manifest.model.test_accuracy, state)


def champion_run(artifacts: Path, name: str) -> Path | None:
    """Return the run folder that the champion alias names, or None before the first promotion.

    Raises:
        RegistryError: the alias names a run that is not there or not complete.
    """
    alias = artifacts / name / CHAMPION_FILE
    return _read_alias(alias) if alias.is_file() else None


def _read_alias(alias: Path) -> Path:
    run_id = _alias_content(alias)
    if run_id is None or not (alias.parent / "runs" / run_id / MANIFEST_FILE).is_file():
        raise RegistryError(
            f"{alias} names the run {run_id or ''!r}, which is not complete in {alias.parent / 'runs'}; "
            f"put another in its place with `cnnpipe models promote {alias.parent.name}/<run id> --force`"
        )
    return alias.parent / "runs" / run_id


def _alias_content(alias: Path) -> str | None:
    """Return the run id that an alias file names, whether there is such a run or not; None without one."""
    try:
        return alias.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{alias} cannot be read: {error}; delete it and promote a run with --force") from error


def promotion_history(artifacts: Path, name: str) -> list[Promotion]:
    """Return every move of the alias, oldest first.

    Raises:
        RegistryError: the history is damaged.
    """
    path = artifacts / name / PROMOTIONS_FILE
    if not path.is_file():
        return []
    try:
        # Not splitlines(): a reason may hold a Unicode line separator, which JSON leaves as it is.
        return [Promotion(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(f"{path} is damaged: {error}; mend or remove the line") from error


def promote_run(artifacts: Path, name: str, run_id: str, reason: str) -> Promotion:
    """Make a complete run the champion; promoting the champion again changes nothing.

    Raises:
        RegistryError: the run is missing or not complete, or the history is damaged.
        StorageError: the alias or the history cannot be written.
    """
    with alias_lock(artifacts, name):
        return _move_alias(artifacts, name, "promote", run_id, reason)


def rollback(artifacts: Path, name: str, reason: str, run_id: str | None = None) -> Promotion:
    """Give the alias back to the champion before the present one, or to a given run.

    Going back again goes further back: what a rollback left is not returned to, unless it was promoted again.

    Raises:
        RegistryError: there is no earlier champion, the run is missing or not complete, or the history is damaged.
        StorageError: the alias or the history cannot be written.
    """
    with alias_lock(artifacts, name):
        if run_id is None:
            champions = _champions(promotion_history(artifacts, name), _alias_content(artifacts / name / CHAMPION_FILE))
            if len(champions) < 2:
                raise RegistryError(f"{name} has no earlier champion to go back to; see `cnnpipe models list {name}`")
            run_id = champions[-2]
        return _move_alias(artifacts, name, "rollback", run_id, reason)


def _champions(history: list[Promotion], champion: str | None) -> list[str]:
    """Return the champions that can be gone back to, oldest first, the present one last.

    Args:
        history: every move, oldest first.
        champion: what the alias names.
    """
    champions: list[str] = []
    for move in history:
        _return_to(champions, move.previous)  # differs from the last only where a move was written, but never made
        if move.action == "rollback":
            _return_to(champions, move.run_id)
        elif champions[-1:] != [move.run_id]:
            champions.append(move.run_id)
    _return_to(champions, champion)
    return champions


def _return_to(champions: list[str], run_id: str | None) -> None:
    """Drop the champions after the latest place of `run_id`; one that was never champion follows the others."""
    if run_id is None:
        champions.clear()
    elif run_id not in champions:
        champions.append(run_id)
    else:
        while champions[-1] != run_id:
            champions.pop()


def _move_alias(
    artifacts: Path, name: str, action: Literal["promote", "rollback"], run_id: str, reason: str
) -> Promotion:
    """Move the alias and write the history; the caller holds the lock."""
    folder = artifacts / name
    _require_complete(folder, run_id)
    history = promotion_history(artifacts, name)
    alias = folder / CHAMPION_FILE
    previous = _alias_content(alias)
    explained = bool(history) and history[-1].run_id == run_id
    if explained and previous == run_id:
        return history[-1]
    if explained:  # the crash between history and alias: only the alias is missing
        move = history[-1]
    else:
        move = Promotion(datetime.now(UTC).isoformat(timespec="seconds"), action, run_id, previous, reason)
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in [*history, move]]
        write_text(folder / PROMOTIONS_FILE, "\n".join(lines) + "\n")
    write_text(alias, run_id + "\n")
    return move


def _require_complete(folder: Path, run_id: str) -> None:
    run = folder / "runs" / run_id
    # A run id is one name: `..` or a path would let the alias leave its folder.
    if run.name != run_id or run.parent != folder / "runs" or run_id == ".." or not run.is_dir():
        raise RegistryError(
            f"no run is called {run_id!r} in {folder / 'runs'}; see `cnnpipe models list {folder.name}`"
        )
    read_manifest(run)


@contextmanager
def alias_lock(artifacts: Path, name: str) -> Iterator[None]:
    """Let one process at a time decide on an alias and move it; the lock ends with the process, even if it is killed.

    May be taken again by the thread that holds it.

    Raises:
        RegistryError: there is no such name, or another process holds the lock for long.
    """
    folder = artifacts / name
    if not folder.is_dir():
        raise RegistryError(
            f"nothing is called {name!r} in {artifacts} (there is: {', '.join(list_names(artifacts)) or 'nothing'})"
            "; check the name"
        )
    lock = FileLock(folder.resolve() / ".lock", is_singleton=True)
    with storage_errors(folder):
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS)
        except Timeout as error:  # inside, because it is an OSError too
            raise RegistryError(f"another process holds {folder / '.lock'}; wait for it and try again") from error
    try:
        yield
    finally:
        lock.release()


def registry_place(run: Path) -> tuple[Path, str]:
    """Return the artifacts folder and the name that a run folder belongs to.

    Raises:
        RegistryError: it is a copy outside any registry.
    """
    runs = run.resolve().parent
    if runs.name != "runs":
        raise RegistryError(f"{run} does not lie in <artifacts>/<name>/runs, so it cannot be champion; copy it there")
    return runs.parent.parent, runs.parent.name


def resolve_run(model: str, artifacts: Path) -> Path:
    """Return the run folder that a user means.

    Args:
        model: a name (its champion), an alias file, a run folder, or `<name>/<run id>`.
    Raises:
        ModelError: nothing is found under it.
        RegistryError: the alias names a run that is not complete.
    """
    path = user_path(model)
    if path.name == CHAMPION_FILE and path.is_file():
        return _read_alias(path)
    if path.is_dir():
        run = path.resolve()  # `.` inside a run folder has a parent only so
        if run.parent.name == "runs" or (run / MANIFEST_FILE).is_file():
            return run
        if (run / CHAMPION_FILE).is_file():
            return _read_alias(run / CHAMPION_FILE)
    model = model.rstrip("/")
    name, _, run_id = model.partition("/")
    if run_id and (artifacts / name / "runs" / run_id).is_dir():
        return artifacts / name / "runs" / run_id
    names = list_names(artifacts)
    if model in names:
        champion = champion_run(artifacts, model)
        if champion is None:
            raise ModelError(
                f"{model} has no champion yet in {artifacts}; promote a run with `cnnpipe models promote`, "
                f"or give one as {model}/<run id>"
            )
        return champion
    raise ModelError(
        f"no model is called {model!r}; give a name ({', '.join(names) or 'none'} in {artifacts}), a run folder, "
        "or an .onnx file"
    )


def resolve_model(model: str | None, artifacts: Path, precision: Precision | Literal["auto"] = "auto") -> Path:
    """Return the run folder or the model file that a user means.

    Args:
        model: as for `resolve_run`, or the path of an .onnx or .keras file; None is the only champion there is.
        precision: a run that has no model of it is refused now, before anything heavy is loaded.
    Raises:
        ModelError: nothing is found under it, None and there is not exactly one champion, or no such precision.
        RegistryError: the alias names a run that is not complete.
    """
    path = user_path(_only_champion(artifacts) if model is None else model)
    if path.suffix in (".onnx", ".keras"):
        if not path.is_file():
            raise ModelError(f"no model file at {path}; check the path")
        return path
    if path.is_file() and path.name != CHAMPION_FILE:
        raise ModelError(f"{path} is no model: it ends in {path.suffix or 'no suffix'}, not in .onnx or .keras")
    run = resolve_run(str(path) if model is None else model, artifacts)
    choose_model_file(run, "cpu", precision)
    return run


def _only_champion(artifacts: Path) -> str:
    champions = [name for name in list_names(artifacts) if (artifacts / name / CHAMPION_FILE).is_file()]
    if len(champions) == 1:
        return champions[0]
    if champions:
        raise ModelError(f"{artifacts} has several champions ({', '.join(champions)}); choose one with --model")
    raise ModelError(f"{artifacts} has no champion; train one with `make retrain`, or give --model FILE.onnx")


def resolve_model_file(model: str | None, artifacts: Path) -> Path:
    """Return the model file that a user means: of a run, the fp32 one; arguments and errors as for `resolve_model`."""
    return choose_model_file(resolve_model(model, artifacts, "fp32"), "cpu", "fp32").path
