"""A month of nights: real runs of the flow `retrain` on a server of their own, and what they leave on the disk.

The folder of images grows and shrinks, so every night prepares another dataset. Before each night everything is made a
day older: the times of the files, and those of flow runs and events in the database, through a connection beside the
server's. The server looks for old rows every few seconds instead of every hour and every day.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.processes import run_process
from benchmarks.tables import markdown_lines
from cnnpipe.storage import make_folder

__all__ = ["measure_nights"]

_CLASSES: Final = ("dark", "light", "mixed")
_SIZE: Final = 16  # height and width in pixels
_FEWEST, _STEP, _PERIOD = 40, 6, 10  # images of a class, more of them each night, nights from the most to the most
_DAY_SECONDS: Final = 86_400
_OLD_ROWS: Final = (("flow_run", "end_time"), ("events", "occurred"), ("event_resources", "occurred"))
_SERVER_ENVIRONMENT: Final = {
    "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS": "5",
}


def measure_nights(nights: int, keep: int) -> list[str]:
    """Run the flow `retrain` night after night, and return a table.

    Args:
        keep: value of --keep-runs and --keep-days; --keep-prepared has its default.
    Raises:
        CnnpipeError: a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="nights-") as folder, _server(Path(folder, "artifacts")) as artifacts:
        rows: list[tuple[str, ...]] = [
            ("night", "images", "s", "state", "runs", "prepared", "artifacts MB", "data MB", "results", "database MB")
        ]
        for night in range(1, nights + 1):
            rows.append(_run_night(Path(folder), artifacts, night, keep))
            print("  ".join(rows[-1]), file=sys.stderr)
        return markdown_lines(rows)


@contextmanager
def _server(artifacts: Path) -> Iterator[Path]:
    """Give the folder, with a Prefect server of its own while the block lasts."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(_SERVER_ENVIRONMENT)
    _run_module("flows.server", "start", artifacts=artifacts)
    try:
        yield artifacts
    finally:
        _run_module("flows.server", "stop", artifacts=artifacts)


def _run_module(module: str, *arguments: str, artifacts: Path) -> tuple[dict[str, Any], float]:
    """Return what a command prints as JSON, and the seconds that it took."""
    run = run_process([sys.executable, "-m", module, *arguments, "--artifacts", str(artifacts), "--json"])
    return run.report, run.seconds


def _run_night(folder: Path, artifacts: Path, night: int, keep: int) -> tuple[str, ...]:
    data, images, home = folder / "data", folder / "images", artifacts / ".prefect"
    if night > 1:
        _age(home / "prefect.db", (artifacts / "images", home / "results", data))
    _write_images(images, _FEWEST + _STEP * abs(_PERIOD // 2 - night % _PERIOD))
    options = {"image-size": _SIZE, "epochs": 4, "batch-size": 16, "keep-runs": keep, "keep-days": keep}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    report, seconds = _run_module("flows.retrain", str(images), *given, "--data", str(data), artifacts=artifacts)
    counts = (len(list(place.glob("[!.]*"))) for place in (artifacts / "images" / "runs", data / "prepared"))
    return (
        str(night),
        str(len(list(images.glob("*/*")))),
        f"{seconds:.1f}",
        report.get("state") or ("Promoted" if report["promoted"] else "NotPromoted"),
        *map(str, counts),
        _megabytes(artifacts, home),
        _megabytes(data),
        str(len(list(home.glob("results/*")))),
        f"{sum(path.stat().st_size for path in home.glob('prefect.db*')) / 1e6:.1f}",
    )


def _write_images(folder: Path, count: int) -> None:
    """Let each class have `count` images: its first ones, which are the same every night."""
    for label, name in enumerate(_CLASSES):
        make_folder(folder / name)
        for number in range(count):
            noise = np.random.default_rng((label, number)).integers(0, 96, (_SIZE, _SIZE, 3), dtype=np.uint8)
            noise[: (0, _SIZE, _SIZE // 2)[label]] += 128
            Image.fromarray(noise).save(folder / name / f"{number:04}.png")
        for number in range(count, count + _STEP):
            (folder / name / f"{number:04}.png").unlink(missing_ok=True)


def _age(database: Path, folders: tuple[Path, ...]) -> None:
    """Make files and the rows that are deleted by their age a day older."""
    for path in [path for folder in folders for path in folder.rglob("*")]:
        times = path.stat()
        os.utime(path, (times.st_atime - _DAY_SECONDS, times.st_mtime - _DAY_SECONDS))
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in _OLD_ROWS:
            shifted = f"strftime('%Y-%m-%d %H:%M:%f000', {column}, '-1 day')"
            connection.execute(f"UPDATE {table} SET {column} = {shifted} WHERE {column} IS NOT NULL")


def _megabytes(folder: Path, without: Path | None = None) -> str:
    files = (path for path in folder.rglob("*") if path.is_file() and (without is None or without not in path.parents))
    return f"{sum(path.stat().st_size for path in files) / 1e6:.2f}"
