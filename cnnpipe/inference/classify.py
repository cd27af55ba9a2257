"""Classify a folder: from settings to a table and its summary."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from cnnpipe.config import ClassifySettings
from cnnpipe.environment import package_versions, usable_cores
from cnnpipe.errors import DatasetError
from cnnpipe.files import display_path, find_files
from cnnpipe.inference.engine import EngineOptions, StageSeconds, check_top_k, classify_files
from cnnpipe.inference.predictions import check_output, open_table
from cnnpipe.inference.summary import (
    ClassificationSummary,
    ModelUsed,
    RowCounts,
    StageReport,
    check_failure_rate,
    summaries_of,
    write_summary,
)
from cnnpipe.registry import resolve_model_file
from cnnpipe.storage import make_folder, storage_errors
from cnnpipe.workers import DecoderPool

if TYPE_CHECKING:  # loading onnxruntime takes longer than refusing a wrong path
    from cnnpipe.inference.session import ClassifierSession

__all__ = ["Progress", "classify_folder", "create_output_folder", "predict_folder"]

Progress = Callable[[str, int, int], None]
"""(what, files done, files in all or 0 where unknown); as files are not counted in advance, always 0 here."""

_MAX_NAME_BYTES = 100
"""Of the input's name in the name of the output folder; file systems allow 255 bytes in all."""

_VERSIONS = ("onnxruntime-gpu", "onnxruntime", "pillow", "numpy", "pyarrow")

_logger = logging.getLogger(__name__)


def classify_folder(
    settings: ClassifySettings, artifacts: Path, *, progress: Progress | None = None
) -> ClassificationSummary:
    """Classify every file below a folder, write the table and, last, `summary.json` beside it.

    Args:
        artifacts: where models are looked up, and where the table goes without `settings.output`.
    Raises:
        FailureBudgetError: more files failed than allowed; table and summary are complete all the same.
        CnnpipeError: as `predict_folder`.
    """
    summary = predict_folder(settings, artifacts, progress=progress)
    check_failure_rate(summary)
    return summary


def predict_folder(
    settings: ClassifySettings, artifacts: Path, *, progress: Progress | None = None
) -> ClassificationSummary:
    """Do what `classify_folder` does, and leave the failure rate to the caller to judge.

    Raises:
        DatasetError: there is no such folder, or no file in it.
        PredictionsError: the output is there already or came there meanwhile, or is not a table.
        ModelError, RegistryError: there is no such model.
        ConfigError: `top_k` exceeds the number of classes.
        ProviderError: the device cannot be used.
        StorageError: the table cannot be written.
    """
    started, began = datetime.now(UTC), time.perf_counter()
    root = Path(settings.folder).expanduser()
    paths = _find_some(root)
    wanted = Path(settings.output).expanduser() if settings.output else None
    if wanted is not None:
        check_output(wanted, settings.overwrite)
    model = resolve_model_file(settings.model, artifacts)
    with DecoderPool(settings.workers or usable_cores()) as pool:
        pool.start()  # comes up while this process loads onnxruntime
        session = _open(model, settings.device)
        check_top_k(settings.top_k, session)
        start_up = time.perf_counter() - began
        with _output(wanted, root, artifacts, started) as output:
            counts, seconds = _write_table(settings, root, paths, output, session, pool, progress)
    report = StageReport(
        time.perf_counter() - began, start_up, seconds.list, seconds.decode, seconds.inference, seconds.write
    )
    summary = _summarize(settings, output, session, pool.workers, counts, report, started)
    _logger.info("summary: %s", write_summary(summary, output))
    return summary


def create_output_folder(root: Path, artifacts: Path, started: datetime) -> Path:
    """Create the folder that the table goes to if no output is given, named after the input and the time.

    Raises:
        StorageError: it cannot be created.
    """
    name = display_path(root.resolve().name).encode()[:_MAX_NAME_BYTES].decode("utf-8", "ignore") or "root"
    predictions = make_folder(artifacts / "predictions")
    wanted = f"{name}-{started:%Y%m%dT%H%M%SZ}"
    folder, number = predictions / wanted, 1
    while True:
        with storage_errors(folder):
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another classification of this second
                number += 1
                folder = predictions / f"{wanted}-{number}"


@contextmanager
def _output(wanted: Path | None, root: Path, artifacts: Path, started: datetime) -> Iterator[Path]:
    """Give the path of the table; a folder that was created for it goes again if no table came of it."""
    if wanted is not None:
        yield wanted
        return
    folder = create_output_folder(root, artifacts, started)
    try:
        yield folder / "predictions.csv"
    finally:
        with suppress(OSError):  # it is not empty: the table is in it
            folder.rmdir()


def _find_some(root: Path) -> Iterator[str]:
    """Return the files below `root`, at least one."""
    paths = find_files(root)
    first = next(paths, None)
    if first is None:
        raise DatasetError(f"no files in {display_path(str(root))}; name a folder that has images in or below it")
    return chain([first], paths)


def _open(model: Path, device: str) -> ClassifierSession:
    from cnnpipe.inference.session import open_session

    return open_session(model, device)


def _write_table(
    settings: ClassifySettings,
    root: Path,
    paths: Iterator[str],
    output: Path,
    session: ClassifierSession,
    pool: DecoderPool,
    progress: Progress | None,
) -> tuple[RowCounts, StageSeconds]:
    counts, seconds = RowCounts(), StageSeconds()
    found = 0

    def count(names: Iterator[str]) -> Iterator[str]:
        nonlocal found
        for name in names:
            found += 1
            yield name

    options = EngineOptions(settings.batch_size, settings.top_k)
    with open_table(output, settings.top_k, overwrite=settings.overwrite) as (table, temporary):
        files = count(_without(root, temporary, paths))
        for rows in classify_files(root, files, session, pool, options, seconds):
            began = time.perf_counter()
            table.write(rows)
            seconds.write += time.perf_counter() - began
            counts.add(rows)
            if progress is not None:
                progress(f"classify: {counts.error:,} failed", counts.ok + counts.error, 0)
        if counts.ok + counts.error != found:
            raise RuntimeError(f"{found:,} files found, but {counts.ok:,} ok + {counts.error:,} error: a bug of ours")
        if settings.overwrite:
            _remove_summaries(output)
    return counts, seconds


def _remove_summaries(table: Path) -> None:
    """Remove the summary of the table that is about to be replaced: it must never stand beside the new one."""
    for summary in summaries_of(table):
        with storage_errors(summary):
            summary.unlink()


def _without(root: Path, temporary: Path, paths: Iterator[str]) -> Iterator[str]:
    """Leave out our own unfinished table, which is found if the output lies below the folder."""
    own = Path(os.path.realpath(temporary))
    base = Path(os.path.realpath(root))
    if not own.is_relative_to(base):
        return paths
    name = own.relative_to(base).as_posix()
    return (path for path in paths if path != name)


def _summarize(
    settings: ClassifySettings,
    output: Path,
    session: ClassifierSession,
    workers: int,
    counts: RowCounts,
    seconds: StageReport,
    started: datetime,
) -> ClassificationSummary:
    found = counts.ok + counts.error
    stages = {
        "list": seconds.list,
        "decode": seconds.decode / workers,
        "inference": seconds.inference,
        "write": seconds.write,
    }
    return ClassificationSummary(
        table=display_path(str(output.absolute())),
        folder=display_path(str(Path(settings.folder).expanduser().absolute())),
        found=found,
        ok=counts.ok,
        error=counts.error,
        failure_rate=counts.error / found,
        max_failure_rate=settings.max_failure_rate,
        classes={name: counts.labels[name] for name in session.info.class_names if counts.labels[name]},
        error_kinds=dict(counts.error_kinds.most_common()),
        first_errors=tuple(counts.first_errors),
        images_per_second=found / max(seconds.total - seconds.start_up, 1e-9),
        images_per_second_with_start_up=found / seconds.total,
        seconds=seconds,
        slowest_stage=max(stages, key=lambda stage: stages[stage]),
        device=session.device,
        provider=session.provider,
        batch_size=settings.batch_size or session.default_batch_size,
        workers=workers,
        threads=session.threads,
        top_k=settings.top_k,
        model=ModelUsed(
            session.info.name, session.info.run_id, display_path(str(session.path.absolute())), session.model_sha256
        ),
        versions=package_versions(_VERSIONS),
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
