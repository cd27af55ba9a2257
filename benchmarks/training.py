"""Compare training with the tutorial's script: alternating processes, a seed per round, medians, paired ratios."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import run_process
from benchmarks.tables import markdown_lines

__all__ = ["compare_training"]


@dataclass(frozen=True)
class Measurement:
    """One training in its own process."""

    precision: str
    """Type that the layers compute in, such as `float32`."""
    fit_seconds: float
    images_per_second: float
    peak_gigabytes: float
    flops_per_second: float
    """Work of convolutions and dense layers in training; validation and all else count as time, not as work."""
    test_accuracy: float
    val_accuracies: list[tuple[float, float]]
    """Seconds since the start and validation accuracy, after every epoch."""


def compare_training(
    prepared: Path, epochs: int, rounds: int, presets: Sequence[str], fractions: Sequence[float] = ()
) -> list[str]:
    """Train the tutorial's script and each preset in turn, `rounds` times, and return a table.

    Args:
        prepared: folder of a prepared dataset.
        epochs: epochs of every training, so that they do the same work; 0: the default of each.
        presets: cnnpipe's presets to train.
        fractions: the first preset is also trained in each of these fractions of the tutorial's time.
    """
    measured, limit = _train_in_turn(prepared, epochs, rounds, list(dict.fromkeys(presets)), dict.fromkeys(fractions))
    rows = [("", "s in fit", "images/s", "peak GB", "GFLOP/s", "of the limit", "test accuracy", "time / tutorial's")]
    for name, runs in measured.items():
        pairs = zip(runs, measured["tutorial"], strict=True)
        ratio = statistics.median(own.fit_seconds / peer.fit_seconds for own, peer in pairs)
        speed = _median(runs, "flops_per_second")
        rows.append(
            (
                name,
                f"{_median(runs, 'fit_seconds'):.1f}",
                f"{_median(runs, 'images_per_second'):,.0f}",
                f"{_median(runs, 'peak_gigabytes'):.2f}",
                f"{speed / 1e9:.0f}",
                f"{speed / limit[runs[0].precision]:.0%}",
                _spread([run.test_accuracy for run in runs]),
                f"{ratio:.2f}",
            )
        )
    limits_shown = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in limit.items())
    curves = (f"- {name}: {_curve(runs[0])}" for name, runs in measured.items())
    return [
        *markdown_lines(rows),
        "",
        f"Convolutions alone, forward and back: {limits_shown}.",
        "",
        "Validation accuracy (and seconds since the start) after each epoch of the first round:",
        *curves,
    ]


def _train_in_turn(
    prepared: Path, epochs: int, rounds: int, presets: Sequence[str], fractions: Iterable[float]
) -> tuple[dict[str, list[Measurement]], dict[str, float]]:
    """Return each contender's trainings, one per round, and the FLOP/s of convolutions alone by precision."""
    measured: dict[str, list[Measurement]] = {name: [] for name in ("tutorial", *presets)}
    measured |= {f"{presets[0]}, in {fraction:g} of the time": [] for fraction in fractions}
    limits: dict[str, list[float]] = {}
    for seed in range(rounds):
        tutorial = _measure(["benchmarks.tutorial", str(prepared), str(epochs), str(seed)])
        ours = [["benchmarks.preset", str(prepared), str(epochs), preset, str(seed)] for preset in presets]
        ours += [[*ours[0], str(fraction * tutorial.fit_seconds / 60.0)] for fraction in fractions]
        for runs, run in zip(measured.values(), (tutorial, *map(_measure, ours)), strict=True):
            runs.append(run)
        for precision in sorted({runs[-1].precision for runs in measured.values()}):
            alone = run_process([sys.executable, "-m", "benchmarks.arithmetic", precision])
            limits.setdefault(precision, []).append(alone.report["flops_per_second"])
    return measured, {precision: statistics.median(rates) for precision, rates in limits.items()}


def _curve(run: Measurement) -> str:
    return ", ".join(f"{accuracy:.3f} ({seconds:.0f})" for seconds, accuracy in run.val_accuracies)


def _spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation where there is one."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _median(runs: list[Measurement], figure: str) -> float:
    values: list[float] = [getattr(run, figure) for run in runs]
    return statistics.median(values)


def _measure(arguments: list[str]) -> Measurement:
    run = run_process([sys.executable, "-m", *arguments])
    measurement = Measurement(
        precision=run.report["precision"],
        fit_seconds=run.report["fit_seconds"],
        images_per_second=run.report["images"] / run.report["fit_seconds"],
        peak_gigabytes=run.peak.total / 1e9,
        flops_per_second=run.report["flops"] / run.report["fit_seconds"],
        test_accuracy=run.report["test_accuracy"],
        val_accuracies=run.report["val_accuracies"],
    )
    print(f"{' '.join(arguments)}: {measurement}", file=sys.stderr)
    return measurement
