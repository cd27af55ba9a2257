"""The summary of a classification: `<table>.summary.json`, and lines for a person."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from cnnpipe.classify.sort_into import SortedFiles
from cnnpipe.errors import FailureBudgetError
from cnnpipe.images.leftovers import summary_path
from cnnpipe.storage import write_json

__all__ = ["ClassificationSummary", "FailedFile", "ModelUsed", "StageReport", "check_failure_rate", "write_summary"]

_COUNTS_SHOWN: Final = 10

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FailedFile:
    """A file without a label."""

    path: str
    kind: str
    """One of `cnnpipe.images.decode.ERROR_KINDS`."""
    message: str


@dataclass(frozen=True)
class ModelUsed:
    """The model that made the labels."""

    name: str
    run_id: str
    path: str
    sha256: str


@dataclass(frozen=True)
class StageReport:
    """Seconds in each stage; they overlap. `decode` is summed over the workers, `inference` over the threads."""

    total: float
    start_up: float
    """Seconds until the model was loaded and the first file could be decoded."""
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
    """Files among them whose rows an interrupted attempt had made."""
    unchanged: int
    """Files whose rows were taken over from the previous table, as their content and the model are the same."""
    uncertain: int
    """Classified files whose likeliest class has less than `min_probability`."""
    min_probability: float
    passed_over: int
    """Files and folders left by systems or written by cnnpipe that this attempt found; they have no rows."""
    failure_rate: float
    """`error / found`, 0-1."""
    max_failure_rate: float
    classes: dict[str, int]
    """Files by their likeliest class, in the model's order; classes without files are left out."""
    error_kinds: dict[str, int]
    """Most frequent first."""
    first_errors: tuple[FailedFile, ...]
    images_per_second: float
    """Files of this attempt, classified or failed, per second after start-up."""
    images_per_second_with_start_up: float
    seconds: StageReport
    slowest_stage: str
    """Stage that limits the speed: decode counts by the worker, inference by the thread."""
    device: str
    """`cpu` or `cuda:N`, as really used."""
    provider: str
    """onnxruntime's name of the device."""
    precision: str
    """Precision of the model that was used: `fp32`, `int8` or `fp16`."""
    precision_reason: str
    """Reason for this precision, in a few words."""
    batch_size: int
    workers: int
    """Maximum number of decoding processes."""
    threads: int
    """CPU threads that run batches; 1 on CUDA."""
    top_k: int
    safe_csv: bool
    """Whether texts that look like formulas have an apostrophe in front."""
    sorted_files: SortedFiles | None
    """Result of `--sort-into`."""
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
        """Return the content of `<table>.summary.json`."""
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
            lines.append(f"resumed: {self.resumed:,} from an interrupted attempt")
        if self.unchanged:
            lines.append(f"unchanged: {self.unchanged:,} rows taken over from the previous table")
        if self.sorted_files is not None:
            counts = {name: count for name, count in asdict(self.sorted_files).items() if count}
            lines.append("sorted: " + (_list_counts(counts) or "none"))
        if self.report is not None:
            lines.append(f"report: {self.report}")
        return [*lines, self.table]


def _list_counts(counts: dict[str, int]) -> str:
    """Return the largest counts as text: of a thousand classes, a person wants the first."""
    largest = Counter(counts).most_common(_COUNTS_SHOWN)
    others = f", and {len(counts) - _COUNTS_SHOWN:,} more" if len(counts) > _COUNTS_SHOWN else ""
    return ", ".join(f"{name} {count:,}" for name, count in largest) + others


def write_summary(summary: ClassificationSummary, table: Path) -> None:
    """Write the summary beside its table (`summary.table` may be spelled in another way); raises StorageError."""
    path = summary_path(table)
    write_json(path, summary.to_json())
    _logger.info("summary: %s", path)


def check_failure_rate(summary: ClassificationSummary) -> None:
    """Raise if more files failed than allowed.

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
