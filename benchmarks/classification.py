"""Compare how fast cnnpipe and common scripts classify a folder: alternating processes, medians, paired ratios.

The limit is measured in the same rounds: what decoding alone and inference alone reach on all cores, and from these
what both together could reach if nothing else took time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from PIL import Image

from benchmarks.contenders import CNNPIPE, INT8, KERAS, LOOPS, Contender, Models, read_labels
from benchmarks.limits import both_per_second
from benchmarks.processes import run_process
from benchmarks.tables import markdown_lines
from cnnpipe.errors import CnnpipeError
from cnnpipe.images.find import find_files

__all__ = ["Comparison", "Measurement", "compare_classification", "compare_start_up"]

_MIN_AGREEMENT: Final = 0.99
"""Fraction of equal labels below which two contenders with the same model and pixels cannot be doing the same work."""


@dataclass(frozen=True)
class Measurement:
    """One contender on one folder, in a process of its own."""

    seconds: float
    work_seconds: float
    """Seconds since its model was loaded, by its own clock."""
    images: int
    peak_bytes: int
    labels: dict[str, str]


@dataclass
class Comparison:
    """Measurements of all contenders, in the same rounds."""

    measured: dict[str, list[Measurement]] = field(default_factory=dict)
    limits: list[dict[str, Any]] = field(default_factory=list)
    """Output of `benchmarks.limits`, once per round."""
    skipped: list[str] = field(default_factory=list)
    """A line for each contender that cannot run here."""

    def median(self, name: str, figure: Callable[[Measurement], float]) -> float:
        """Return the median of a figure over the rounds."""
        return statistics.median(map(figure, self.measured[name]))

    def ratio(self, name: str, peer: str, figure: Callable[[Measurement], float]) -> float:
        """Return the median over the rounds of the peer's figure divided by the contender's: how many times as fast."""
        pairs = zip(self.measured[peer], self.measured[name], strict=True)
        return statistics.median(figure(theirs) / figure(own) for theirs, own in pairs)

    def agreement(self, name: str) -> float:
        """Return the fraction of files with the same label as from cnnpipe, 0-1."""
        ours, theirs = self.measured[CNNPIPE][0].labels, self.measured[name][0].labels
        if ours.keys() != theirs.keys():
            raise CnnpipeError(f"{name} classified {len(theirs):,} files, {CNNPIPE} {len(ours):,}: not the same folder")
        return sum(theirs[path] == label for path, label in ours.items()) / len(ours)


def compare_classification(folder: Path, contenders: Sequence[Contender], models: Models, rounds: int) -> list[str]:
    """Let all contenders classify a folder in turn, `rounds` times, and return their table and that of the limit.

    Raises:
        CnnpipeError: a contender failed, or its labels differ although it sees the same pixels.
    """
    compared = _run_rounds(folder, contenders, models, rounds)
    return [*_contender_table(compared), "", *_limit_table(compared), *compared.skipped]


def compare_start_up(folder: Path, contenders: Sequence[Contender], rounds: int) -> list[str]:
    """Let all contenders classify the first image of a folder alone, and return a table of whole-process times."""
    with tempfile.TemporaryDirectory() as scratch:
        first = next(find_files(folder))
        single = Path(scratch) / "one"
        single.mkdir()
        (single / Path(first).name).write_bytes((folder / first).read_bytes())
        compared = _run_rounds(single, contenders, None, rounds)
    rows = [("one image, cold", "s", "× one by one", "peak MB")]
    for name in compared.measured:
        rows.append(
            (
                name,
                f"{compared.median(name, _seconds):.2f}",
                f"{compared.ratio(name, 'one by one', _seconds):.2f}",
                f"{compared.median(name, _peak_bytes) / 1e6:,.0f}",
            )
        )
    return [*markdown_lines(rows), *compared.skipped]


def _run_rounds(folder: Path, contenders: Sequence[Contender], models: Models | None, rounds: int) -> Comparison:
    """Measure every contender in every round, and the limits too if `models` are given."""
    compared, running = Comparison(), list(contenders)
    for number in range(rounds):
        # Every second round backwards, so that a machine that gets slower or faster favours nobody.
        for contender in list(running if number % 2 == 0 else reversed(running)):
            measured = _measure(contender, folder)
            if isinstance(measured, str):
                compared.skipped.append(f"{contender.name}: left out, {measured}")
                running.remove(contender)
                continue
            compared.measured.setdefault(contender.name, []).append(measured)
            _tell(number, f"{contender.name}: {measured.seconds:.2f} s, {measured.work_seconds:.2f} s of work")
        if models is not None:
            if number == 0 and _has_model_size(folder, models):
                _check_agreement(compared, [each.name for each in running if each.exact])
            files = [str(model) for model in (models.onnx, models.int8) if model is not None]
            command = [sys.executable, "-m", "benchmarks.limits", str(folder), *files]
            compared.limits.append(run_process(command).report)
            _tell(number, f"limits: {compared.limits[-1]}")
    return compared


def _measure(contender: Contender, folder: Path) -> Measurement | str:
    """Let a contender classify a folder; returns a text if it cannot, which says why."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "labels.csv"
        run = run_process(contender.command(folder, output))
        if "skipped" in run.report:
            return str(run.report["skipped"])
        images, work_seconds = contender.work(run.report)
        labels = read_labels(output)
    if images != len(labels):
        raise CnnpipeError(f"{contender.name} reports {images:,} images, but its table has {len(labels):,}")
    return Measurement(run.seconds, work_seconds, images, run.peak.total, labels)


def _tell(number: int, line: str) -> None:
    print(f"round {number + 1}, {line}", file=sys.stderr)


def _has_model_size(folder: Path, models: Models) -> bool:
    """Return whether the first image needs no resizing; contenders resize with different filters."""
    with Image.open(folder / next(find_files(folder))) as image:
        return (image.height, image.width) == models.image_size


def _check_agreement(compared: Comparison, names: Sequence[str]) -> None:
    for name in names:
        if (agreement := compared.agreement(name)) < _MIN_AGREEMENT:
            raise CnnpipeError(
                f"{name} agrees with {CNNPIPE} on {agreement:.2%} of the labels, where the same pixels must give at "
                f"least {_MIN_AGREEMENT:.0%}; the comparison is void"
            )


def _seconds(run: Measurement) -> float:
    return run.seconds


def _work_seconds(run: Measurement) -> float:
    return run.work_seconds


def _peak_bytes(run: Measurement) -> float:
    return run.peak_bytes


def _contender_table(compared: Comparison) -> list[str]:
    """Return a row for each contender; the ratios are of the time after start-up."""
    loop = min(LOOPS, key=lambda name: compared.median(name, _work_seconds))
    peers = {"× batched loop": loop, "× Keras": KERAS}
    peers = {title: peer for title, peer in peers.items() if peer in compared.measured}
    images = compared.measured[CNNPIPE][0].images
    rows = [(f"{images:,} images", "s", "s after start-up", "images/s after start-up", *peers, "peak MB", "same label")]
    for name in compared.measured:
        work_seconds = compared.median(name, _work_seconds)
        rows.append(
            (
                name,
                f"{compared.median(name, _seconds):.2f}",
                f"{work_seconds:.2f}",
                _rate(images / work_seconds),
                *(f"{compared.ratio(name, peer, _work_seconds):.2f}" for peer in peers.values()),
                f"{compared.median(name, _peak_bytes) / 1e6:,.0f}",
                f"{compared.agreement(name):.2%}",
            )
        )
    return markdown_lines(rows)


def _limit_table(compared: Comparison) -> list[str]:
    """Return what the cores allow, and the fraction of it that cnnpipe reaches."""
    limits, cores = compared.limits, compared.limits[0]["cores"]
    rows = [(f"limit on {cores} cores", "images/s", "cnnpipe reaches")]
    for key, title in (("decode", "reading, hashing, decoding alone"), ("pool", "the same, brought to one process")):
        rows.append((title, _rate(statistics.median(each[key] for each in limits)), ""))
    for index, (name, precision) in enumerate(((CNNPIPE, "fp32"), (INT8, "int8"))):
        if name not in compared.measured or index >= len(limits[0]["inference"]):
            continue
        inferred = [each["inference"][index]["images_per_second"] for each in limits]
        # On a busy machine the pool may seem faster than the decoding inside it; the higher figure is the limit.
        decoded = [max(each["decode"], each["pool"]) for each in limits]
        both = [both_per_second(*alone) for alone in zip(decoded, inferred, strict=True)]
        rates = [run.images / run.work_seconds for run in compared.measured[name]]
        reached = statistics.median(rate / limit for rate, limit in zip(rates, both, strict=True))
        way = limits[0]["inference"][index]
        how = f"batch {way['batch_size']}, {way['sessions']} session{'s' if way['sessions'] > 1 else ''}"
        rows.append((f"inference alone, {precision} ({how})", _rate(statistics.median(inferred)), ""))
        rows.append((f"decoding and inference, {precision}", _rate(statistics.median(both)), f"{reached:.0%}"))
    return markdown_lines(rows)


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.1f}"
