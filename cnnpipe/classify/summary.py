"""What a classification did, in `summary.json` beside its table and as lines for a person."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cnnpipe.classify.engine import Prediction
from cnnpipe.classify.sort_into import SortedFiles, uncertainty_test
from cnnpipe.errors import AlreadyThereError, FailureBudgetError, PredictionsError
from cnnpipe.files import display_path
from cnnpipe.images.leftovers import SUMMARY_FILE, described_table, summaries_of, summary_aside
from cnnpipe.storage import storage_errors, write_json

__all__ = [
    "ClassificationSummary",
    "FailedFile",
    "ModelUsed",
    "RowCounts",
    "StageReport",
    "check_failure_rate",
    "read_summary",
    "remove_summaries",
    "write_summary",
]

_FAILED_FILES_SHOWN: Final = 10
_COUNTS_SHOWN: Final = 10


@dataclass(frozen=True)
class FailedFile:
    """A file that has no label."""

    path: str
    kind: str
    """One of `cnnpipe.images.decode.ERROR_KINDS`."""
    message: str


@dataclass(frozen=True)
class ModelUsed:
    """Which model made the labels."""

    name: str
    run_id: str
    path: str
    sha256: str


@dataclass(frozen=True)
class StageReport:
    """Seconds in each stage; they overlap. `decode` is summed over the workers, `inference` over the threads."""

    total: float
    start_up: float
    """Until the model was loaded and the first file could be worked on."""
    list: float
    decode: float
    inference: float
    write: float


@dataclass(frozen=True)
class ClassificationSummary:
    """Counts, rates and circumstances of one finished classification."""

    table: str
    """Path of the table."""
    folder: str
    found: int
    """Files found; `ok + error = found`."""
    ok: int
    error: int
    resumed: int
    """Of these, files whose rows were made by an earlier attempt that was broken off."""
    unchanged: int
    """Files whose rows were taken over from the earlier table, as their content and the model are the same."""
    uncertain: int
    """Classified files whose likeliest class has less than `min_probability`."""
    min_probability: float
    passed_over: int
    """Files and folders that are left by systems or written by cnnpipe, found in this attempt; they have no rows."""
    failure_rate: float
    """`error / found`, 0-1."""
    max_failure_rate: float
    classes: dict[str, int]
    """Files by their likeliest class, in the model's order; classes without files are left out."""
    error_kinds: dict[str, int]
    """Most frequent first."""
    first_errors: tuple[FailedFile, ...]
    images_per_second: float
    """Files classified or failed in this attempt by its time after start-up."""
    images_per_second_with_start_up: float
    seconds: StageReport
    slowest_stage: str
    """The one that would have to become faster: decode counts by the worker, inference by the thread."""
    device: str
    """`cpu` or `cuda:N`, as really used."""
    provider: str
    """onnxruntime's name for it."""
    precision: str
    """Of the model that was used: `fp32`, `int8` or `fp16`."""
    precision_reason: str
    """Why this one, in a few words."""
    batch_size: int
    workers: int
    """Decoding processes, at most."""
    threads: int
    """Of the CPU, each of which runs batches; 1 on CUDA."""
    top_k: int
    safe_csv: bool
    """Whether texts that a spreadsheet would take for formulas have an apostrophe in front."""
    sorted_files: SortedFiles | None
    """What `--sort-into` did."""
    report: str | None
    """Path of the contact sheet."""
    model: ModelUsed
    versions: dict[str, str]
    started: str
    """UTC, ISO 8601."""
    finished: str

    @property
    def too_many_failed(self) -> bool:
        """Whether `failure_rate` is above `max_failure_rate`; equal is allowed, so 1 allows everything."""
        return self.failure_rate > self.max_failure_rate

    def to_json(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the result for a person, the table's path last."""
        lines = [
            f"{self.found:,} files: {self.ok:,} classified, {self.error:,} failed ({self.failure_rate:.1%})",
            f"{self.images_per_second:,.0f} images/s on {self.device} in {self.precision}, {self.seconds.total:.1f} s "
            f"with {self.seconds.start_up:.1f} s of start-up; slowest stage: {self.slowest_stage}",
            f"precision {self.precision}: {self.precision_reason}",
            "classes: " + (_list_counts(self.classes) or "none"),
        ]
        if self.error:
            lines.append("errors: " + _list_counts(self.error_kinds))
        if self.passed_over:
            lines.append(f"passed over: {self.passed_over:,} files and folders left by systems or written by cnnpipe")
        if self.uncertain:
            lines.append(f"uncertain: {self.uncertain:,} with a probability below {self.min_probability:g}")
        if self.resumed:
            lines.append(f"resumed: {self.resumed:,} were there from an attempt that was broken off")
        if self.unchanged:
            lines.append(f"unchanged: {self.unchanged:,} rows taken over from the earlier table")
        if self.sorted_files is not None:
            counts = {name: count for name, count in asdict(self.sorted_files).items() if count}
            lines.append("sorted: " + (_list_counts(counts) or "none"))
        if self.report is not None:
            lines.append(f"report: {self.report}")
        return [*lines, self.table]


@dataclass
class RowCounts:
    """Counts the rows that pass."""

    ok: int = 0
    error: int = 0
    uncertain: int = 0
    unchanged: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """By the likeliest class."""
    error_kinds: Counter[str] = field(default_factory=Counter)
    first_errors: list[FailedFile] = field(default_factory=list)

    @property
    def found(self) -> int:
        """All rows."""
        return self.ok + self.error

    def add(self, rows: Sequence[Prediction], min_probability: float) -> None:
        """Count rows; one of less than `min_probability` is uncertain."""
        is_uncertain = uncertainty_test(min_probability)
        for row in rows:
            if row.status == "ok":
                self.ok += 1
                self.labels[row.labels[0]] += 1
                self.unchanged += row.unchanged
                if min_probability and is_uncertain(row.probabilities[0]):
                    self.uncertain += 1
                continue
            self.error += 1
            self.error_kinds[row.error_kind] += 1
            if len(self.first_errors) < _FAILED_FILES_SHOWN:
                self.first_errors.append(FailedFile(display_path(row.path), row.error_kind, row.error))

    def merge(self, other: RowCounts) -> None:
        """Add the counts of the rows that follow."""
        self.ok += other.ok
        self.error += other.error
        self.uncertain += other.uncertain
        self.unchanged += other.unchanged
        self.labels.update(other.labels)
        self.error_kinds.update(other.error_kinds)
        self.first_errors = [*self.first_errors, *other.first_errors][:_FAILED_FILES_SHOWN]

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        failed = [asdict(file) for file in self.first_errors]
        # Not asdict of the whole, which counts a Counter's items anew.
        return {**vars(self), "first_errors": failed}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RowCounts:
        """Return the counts that `to_json` made these of."""
        failed = [FailedFile(**file) for file in values["first_errors"]]
        counters = {name: Counter(values[name]) for name in ("labels", "error_kinds")}
        return cls(**{**values, **counters, "first_errors": failed})


def _list_counts(counts: dict[str, int]) -> str:
    """Return the largest counts as text; of a thousand classes a person wants the first."""
    largest = Counter(counts).most_common(_COUNTS_SHOWN)
    others = f", and {len(counts) - _COUNTS_SHOWN:,} more" if len(counts) > _COUNTS_SHOWN else ""
    return ", ".join(f"{name} {count:,}" for name, count in largest) + others


def read_summary(table: Path) -> dict[str, Any] | None:
    """Return the content of a table's summary, or None if the table is not complete or was not made by us."""
    for path in summaries_of(table):
        with suppress(OSError, ValueError):
            content: dict[str, Any] = json.loads(path.read_bytes())
            return content
    return None


def remove_summaries(table: Path) -> None:
    """Remove the summary of a table that is about to be replaced: it must never stand beside the new one.

    Raises:
        StorageError: it cannot be removed.
    """
    for summary in summaries_of(table):
        with storage_errors(summary):
            summary.unlink(missing_ok=True)


def write_summary(summary: ClassificationSummary, table: Path) -> Path:
    """Write `summary.json` beside the table, and return its path.

    The summary of another table in the folder steps aside and becomes `<table>.summary.json`.

    Args:
        table: what it describes; `summary.table` may be spelled in another way.
    Raises:
        PredictionsError: a `summary.json` that is not ours came there while the table was written; it stays.
        StorageError: it cannot be written.
    """
    path = table.with_name(SUMMARY_FILE)
    other = described_table(path)
    if other is not None and other != display_path(table.name):
        aside = summary_aside(path.parent, other)
        if os.path.lexists(aside) and described_table(aside) is None:
            raise PredictionsError(
                f"{table} is complete, but {aside} is no summary of ours; rename it, and run it again"
            )
        with storage_errors(path):
            os.replace(path, aside)
    try:
        write_json(path, summary.to_json(), replace=False)
    except AlreadyThereError as error:
        raise PredictionsError(
            f"{table} is complete, but {path} was written by another process meanwhile and stays; "
            "give each table its own folder with --output"
        ) from error
    return path


def check_failure_rate(summary: ClassificationSummary) -> None:
    """Refuse to call it a success when more files failed than allowed.

    Raises:
        FailureBudgetError: `too_many_failed`.
    """
    if not summary.too_many_failed:
        return
    first = ", ".join(f"{failed.path} ({failed.kind})" for failed in summary.first_errors[:3])
    raise FailureBudgetError(
        f"{summary.error:,} of {summary.found:,} files failed, {summary.failure_rate:.1%} where --max-failure-rate "
        f"allows {summary.max_failure_rate:.1%}: {first}{', …' if summary.error > 3 else ''}; "
        f"the table is complete, see its column error: {summary.table}"
    )
