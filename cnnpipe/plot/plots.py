"""The stage `plot`: the curves, the confusion matrix, samples and mistakes of an evaluated run.

Every picture is drawn on its own `Figure`, without pyplot and its global state, so threads may draw side by side, and
the same input gives the same bytes. Right and wrong, train and val differ in brightness and in marks, not by hue alone.

Colours: Okabe and Ito, Color Universal Design, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.metrics import confusion_matrix

from cnnpipe.errors import RegistryError
from cnnpipe.evaluate.evaluation import load_run
from cnnpipe.evaluate.metrics import read_evaluation, read_probabilities
from cnnpipe.manifest import best_epoch, read_history, require_unfinished
from cnnpipe.storage import write_bytes

# A user's style may need what is not installed here, such as LaTeX, or would change the pictures.
os.environ["MATPLOTLIBRC"] = os.devnull
os.environ.pop("MPLBACKEND", None)
# A file in the working folder has priority over MATPLOTLIBRC.
with chdir(Path(os.__file__).parent) if Path("matplotlibrc").exists() else nullcontext():
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
matplotlib.rcdefaults()  # for a program that had imported it before

_DOTS_PER_INCH: Final = 120
_FALLBACK_FONTS: Final = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei",
                          "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")  # fmt: skip

_TRAIN_COLOUR, _VAL_COLOUR, _BEST_COLOUR = "#0072B2", "#D55E00", "#555555"
_RIGHT_COLOUR, _WRONG_COLOUR = "#007A59", "#C44E00"  # the palette's green and vermillion, darker: they colour text too
_GRID_COLUMNS, _GRID_ROWS = 6, 4
_MAX_LABELLED_CLASSES: Final = 120


@dataclass(frozen=True)
class PredictedImages:
    """Images with their actual and predicted classes."""

    images: npt.NDArray[np.uint8]  # (N, H, W, 3) RGB
    labels: npt.NDArray[np.int64]  # (N,), index of the actual class
    predicted: npt.NDArray[np.int64]  # (N,), index of the predicted class
    probabilities: npt.NDArray[np.floating[Any]]  # (N,), of the predicted class, 0-1
    class_names: Sequence[str]


def plot_run(run: Path) -> list[Path]:
    """Draw accuracy, loss, confusion matrix, samples and mistakes of an evaluated run into its folder.

    Raises:
        RegistryError: the run is complete, a file of it is missing or damaged, or it was evaluated on another dataset.
        StorageError: a picture cannot be written.
    """
    require_unfinished(run)
    dataset, evaluation = load_run(run).dataset, read_evaluation(run)
    names, images, labels = dataset.class_names, dataset.images("test"), dataset.labels("test")
    probabilities = read_probabilities(run, len(labels))
    predicted = probabilities.argmax(axis=1)
    if evaluation.class_names != names or evaluation.num_correct != int((predicted == labels).sum()):
        raise RegistryError(f"{run} was evaluated on another dataset than {dataset.path}; evaluate it again")
    counts = confusion_matrix(labels, predicted, labels=range(len(names)))
    shown = PredictedImages(images, labels, predicted, probabilities.max(axis=1), names)
    return [
        *plot_history(run),
        plot_confusion_matrix(counts, names, run / "confusion_matrix.png"),
        plot_samples(shown, run / "samples.png"),
        plot_mistakes(shown, run / "mistakes.png"),
    ]


def plot_history(run: Path) -> list[Path]:
    """Draw `accuracy.png` and `loss.png` from a run's `history.csv`; raises as `plot_run`."""
    history = {name: np.array(values) for name, values in read_history(run).items()}
    best = best_epoch(history["val_accuracy"].tolist(), history["val_loss"].tolist())
    figures = {metric: _draw_curves(history, metric, best) for metric in ("accuracy", "loss")}
    return [save_figure(figure, run / f"{metric}.png") for metric, figure in figures.items()]


def _draw_curves(history: Mapping[str, npt.NDArray[np.float64]], metric: str, best: int) -> Figure:
    epochs, train, val = history["epoch"], history[metric], history[f"val_{metric}"]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    marked = len(epochs) <= 30  # more would hide the line; a single epoch is nothing but its marker
    for values, colour, marker, label in ((train, _TRAIN_COLOUR, "o", "train"), (val, _VAL_COLOUR, "s", "val")):
        axes.plot(epochs, values, color=colour, marker=marker if marked else None, markersize=4, label=label)
    best_label = f"best epoch {epochs[best]:.0f}: val {metric} {val[best]:.4f}"
    axes.axvline(epochs[best], color=_BEST_COLOUR, linestyle=":", linewidth=1.2, zorder=1)
    (ring,) = axes.plot(epochs[best], val[best], color=_BEST_COLOUR, linestyle="none", zorder=4, label=best_label)
    ring.set(marker="o", fillstyle="none", markersize=11, markeredgewidth=2)
    axes.set_title(f"{metric.capitalize()} over {len(epochs)} epoch{'s' if len(epochs) > 1 else ''}")
    axes.set(xlabel="epoch", ylabel=metric, xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    _limit_values(axes, np.concatenate([train, val]), metric)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.85)
    return figure


def _limit_values(axes: Axes, values: npt.NDArray[np.float64], metric: str) -> None:
    """Fit the value axis to the curves, but not so closely that noise looks like a trend."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    low, high = float(finite.min()), float(finite.max())
    if metric == "loss" and low > 0 and high / float(np.median(finite)) > 10:
        axes.set(yscale="log", ylabel="loss (logarithmic)")
        return
    margin = max(0.05 * (high - low), (0.1 - (high - low)) / 2)
    top = min(1.0, high + margin) if metric == "accuracy" else high + margin
    axes.set_ylim(max(0.0, low - margin), top + (0.01 if top == 1.0 else 0.0))


def plot_confusion_matrix(matrix: npt.ArrayLike, class_names: Sequence[str], path: Path) -> Path:
    """Draw a confusion matrix: the colour is the fraction of the actual class, the cells hold counts and percentages.

    With more than 12 classes the cells hold no percentages, with more than 30 no numbers.

    Args:
        matrix: counts; rows actual, columns predicted.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    num_classes = len(counts)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.66 * num_classes, 3.2, 9.0))  # of the matrix, inches; the labels come on top
    label_size = float(np.interp(num_classes, [10, 30, 60, 100], [10, 8, 6.5, 5.5]))
    names = [shorten_name(name, index, 24 if num_classes <= 60 else 20) for index, name in enumerate(class_names)]
    # The matrix fills the figure; titles and labels lie around it, and save_figure adds the room that they need.
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    # The square root makes a confusion of a few percent visible beside a diagonal near 100 %.
    image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=1.0))
    ticks = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
    bar = figure.colorbar(image, cax=figure.add_axes((1 + 0.15 / side, 0, 0.2 / side, 1)), ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.0%}" for tick in ticks])
    bar.set_label("share of the actual class")
    step = math.ceil(num_classes / _MAX_LABELLED_CLASSES)  # with very many classes, only every second, third, …
    axes.set(xlabel="predicted", ylabel="actual")
    axes.set_xticks(range(0, num_classes, step), names[::step], rotation=90, fontsize=label_size, **_text_style())
    axes.set_yticks(range(0, num_classes, step), names[::step], fontsize=label_size, **_text_style())
    axes.tick_params(length=2 if num_classes > 30 else 3.5, pad=2)
    _write_cells(axes, counts, fractions)
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"Confusion matrix: {right:,} of {total:,} right ({right / max(total, 1):.2%})")
    return save_figure(figure, path)


def _write_cells(axes: Axes, counts: npt.NDArray[np.int64], fractions: npt.NDArray[np.float64]) -> None:
    if len(counts) > 30:
        return
    widest = len(f"{counts.max():,}")
    size = float(np.interp(len(counts), [10, 12, 20, 30], [9, 8, 7.5, 5.5])) * min(1.0, 6 / widest)
    for row, column in np.ndindex(*counts.shape):
        count, fraction = counts[row, column], fractions[row, column]
        if not count and len(counts) > 12:
            continue  # the colour says it, and the other numbers stand out
        text = f"{count:,}\n{fraction:.1%}" if len(counts) <= 12 and count else f"{count:,}"
        colour = "white" if fraction > 0.3 else "#222222"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def plot_samples(shown: PredictedImages, path: Path) -> Path:
    """Draw a grid of test images with their predictions, evenly spaced over the split and beginning with the first."""
    total = len(shown.labels)
    number = min(_GRID_COLUMNS * _GRID_ROWS, total)
    right = (shown.predicted == shown.labels).mean()
    title = f"Sample predictions: {number} of {total:,} test images; of all, {right:.2%} are right"
    return save_figure(_draw_grid(shown, np.arange(number) * total // number, title), path)


def plot_mistakes(shown: PredictedImages, path: Path) -> Path:
    """Draw a grid of the wrong predictions with the highest probability, highest first."""
    wrong = np.flatnonzero(shown.predicted != shown.labels)
    chosen = wrong[np.argsort(-shown.probabilities[wrong], kind="stable")][: _GRID_COLUMNS * _GRID_ROWS]
    title = f"Most confident mistakes: {len(chosen)} of {len(wrong):,} among {len(shown.labels):,} test images"
    if not len(wrong):
        title = f"No mistakes: all {len(shown.labels):,} test images are classified right"
    return save_figure(_draw_grid(shown, chosen, title), path)


def _draw_grid(shown: PredictedImages, chosen: npt.NDArray[np.int64], title: str) -> Figure:
    if not len(chosen):
        figure = Figure(figsize=(7.2, 1.2))
        figure.text(0.5, 0.5, title, fontsize=13, ha="center", va="center")
        return figure
    rows = math.ceil(len(chosen) / _GRID_COLUMNS)
    cell_height = 1.7 * float(np.clip(shown.images.shape[1] / shown.images.shape[2], 0.2, 2.0)) + 0.4  # inches
    figure = Figure(figsize=(1.75 * _GRID_COLUMNS, 0.5 + rows * cell_height), layout="constrained")
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(rows, _GRID_COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, chosen, strict=False):
        actual, guess = int(shown.labels[index]), int(shown.predicted[index])
        mark, colour = ("✓", _RIGHT_COLOUR) if actual == guess else ("✗", _WRONG_COLOUR)
        text = f"{mark} {shorten_name(shown.class_names[guess], guess, 16)} {shown.probabilities[index]:.1%}\n"
        text += f"actual: {shorten_name(shown.class_names[actual], actual, 16)}"
        axes.imshow(shown.images[index], interpolation="nearest")
        axes.set_title(text, fontsize=8.5, color=colour, pad=3, **_text_style())
    return figure


def shorten_name(name: str, index: int, length: int) -> str:
    """Return a class name on one line of at most `length` characters, its middle left out if it is longer.

    A name that no installed font can draw becomes the number of its class, as in the order of the matrix.
    """
    name = " ".join(name.split())
    if any(ord(character) not in _drawable_characters() for character in name):
        return f"class {index}"
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 3
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


@cache
def _text_style() -> dict[str, Any]:
    """Return the style of a text with a class name: fonts for its script, and `$` is a dollar sign, not mathematics."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {"family": ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)], "parse_math": False}


@cache
def _drawable_characters() -> frozenset[int]:
    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in _text_style()["family"])
    return frozenset(code for font in fonts for code in font.get_charmap())


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG.

    It holds what lies outside of the figure too, so labels are never cut. Pillow writes it without metadata, so the
    same figure always gives the same bytes.
    """
    drawn, written = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight", pil_kwargs={"compress_level": 1})
    Image.open(drawn).convert("RGB").save(written, "PNG", optimize=True)
    write_bytes(path, written.getvalue())
    return path
