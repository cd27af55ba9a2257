"""Draw what a run's files say: the curves, the confusion matrix, samples and mistakes.

Every picture is drawn on its own `Figure`, without pyplot and its global state, so threads may draw side by side. The
files are small, because the Prefect UI shows them inline, and the same input gives the same bytes. Right and wrong,
train and val differ in brightness and in marks, not by hue alone.

Colours: Okabe and Ito, Color Universal Design, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnpipe.errors import DatasetError, RegistryError, one_line
from cnnpipe.evaluate.metrics import PREDICTIONS_FILE, read_evaluation
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.storage import write_bytes

# A user's style would need what is not installed here, such as LaTeX, or give other pictures of the same run.
os.environ["MATPLOTLIBRC"] = os.devnull
os.environ.pop("MPLBACKEND", None)
# A file in the working folder comes before that.
with chdir(Path(os.__file__).parent) if Path("matplotlibrc").exists() else nullcontext():
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import MaxNLocator
matplotlib.rcdefaults()  # for a program that had imported it before

__all__ = [
    "HISTORY_FILE",
    "PredictedImages",
    "Predictions",
    "plot_confusion_matrix",
    "plot_history",
    "plot_mistakes",
    "plot_run",
    "plot_samples",
    "read_history",
    "read_predictions",
]

HISTORY_FILE: Final = "history.csv"

_RESOLUTIONS: Final = (120, 96, 76, 60)  # dots an inch
_FALLBACK_FONTS: Final = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei",
                          "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")  # fmt: skip

_TRAIN_COLOUR, _VAL_COLOUR, _BEST_COLOUR = "#0072B2", "#D55E00", "#555555"
_RIGHT_COLOUR, _WRONG_COLOUR = "#007A59", "#C44E00"  # the palette's green and vermillion, darker: they colour text too
_MAX_INLINE_BYTES: Final = 120_000
_MAX_GRID_BYTES: Final = 300_000
_GRID_COLUMNS, _GRID_ROWS = 6, 4
_MAX_LABELLED_CLASSES: Final = 120
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """What `predictions_test.csv` says, in the order of the test split."""

    predicted: npt.NDArray[np.int64]
    """(N,), index of the predicted class."""
    probability: npt.NDArray[np.float64]
    """(N,), of the predicted class, 0-1."""


@dataclass(frozen=True)
class PredictedImages:
    """Images with what they are and what the model says."""

    images: npt.NDArray[np.uint8]
    """(N, H, W, 3) RGB."""
    labels: npt.NDArray[np.int64]
    """(N,), index of the actual class."""
    predicted: npt.NDArray[np.int64]
    """(N,), index of the predicted class."""
    probabilities: npt.NDArray[np.floating[Any]]
    """(N,), of the predicted class, 0-1."""
    class_names: Sequence[str]


def plot_run(run: Path, dataset: PreparedDataset) -> list[Path]:
    """Draw all pictures of an evaluated run into its folder.

    Args:
        run: holds `history.csv`, `metrics.json`, `confusion_matrix.csv` and `predictions_test.csv`.
        dataset: what it was evaluated on; gives the test images.
    Returns:
        The files: accuracy, loss, confusion matrix, samples, mistakes.
    Raises:
        RegistryError: a file of the run is missing or damaged.
        DatasetError: the run was evaluated on another dataset.
        StorageError: a picture cannot be written.
    """
    evaluation = read_evaluation(run)
    labels, names = dataset.labels("test"), dataset.class_names
    if evaluation.class_names != names:
        raise DatasetError(f"{run} was evaluated on other classes than {dataset.name} has; evaluate it again")
    predictions = read_predictions(run, names, labels)
    shown = PredictedImages(dataset.images("test"), labels, predictions.predicted, predictions.probability, names)
    return [
        *plot_history(run),
        plot_confusion_matrix(evaluation.confusion_matrix, names, run / "confusion_matrix.png"),
        plot_samples(shown, run / "samples.png"),
        plot_mistakes(shown, run / "mistakes.png"),
    ]


def read_predictions(run: Path, class_names: Sequence[str], labels: npt.NDArray[np.int64]) -> Predictions:
    """Read `predictions_test.csv`, and make sure that it is about these labels.

    Raises:
        RegistryError: it is missing or damaged.
        DatasetError: it is about other images.
    """
    index = {name: number for number, name in enumerate(class_names)}
    actual, predicted, probability = [], [], []
    for row in _read_rows(run / PREDICTIONS_FILE):
        try:
            actual.append(index[row["label"]])
            predicted.append(index[row["predicted"]])
            probability.append(float(row["probability"]))
        except (KeyError, TypeError, ValueError) as error:
            reason = one_line(repr(error))
            raise RegistryError(f"{run / PREDICTIONS_FILE} is damaged: {reason}; evaluate the run again") from error
    if not np.array_equal(actual, labels):
        raise DatasetError(f"{run / PREDICTIONS_FILE} is about another test split; evaluate the run again")
    return Predictions(np.array(predicted, np.int64), np.array(probability, np.float64))


def read_history(run: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Read `history.csv`: a column's name -> its value at every epoch.

    Raises:
        RegistryError: it is missing or damaged, or no epoch was finished.
    """
    path = run / HISTORY_FILE
    rows = list(_read_rows(path))
    if not rows:
        raise RegistryError(f"{path} has no epochs; train again")
    columns = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss")
    try:
        return {column: np.array([float(row[column]) for row in rows]) for column in columns}
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(f"{path} is damaged: {one_line(repr(error))}; train again") from error


def _read_rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except FileNotFoundError as error:
        raise RegistryError(f"{path.parent} has no {path.name}; run the stage that writes it again") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RegistryError(f"{path} cannot be read: {error}; run the stage that writes it again") from error


def plot_history(run: Path) -> tuple[Path, Path]:
    """Draw `accuracy.png` and `loss.png` from a run's `history.csv`, and return their paths.

    Raises:
        RegistryError: the history is missing or damaged.
        StorageError: a picture cannot be written.
    """
    history = read_history(run)
    # As the checkpoint is chosen: the highest val accuracy; of equal ones the lowest loss, then the first.
    best = int(np.lexsort((history["val_loss"], -history["val_accuracy"]))[0])
    paths = (run / "accuracy.png", run / "loss.png")
    save_figure(_draw_curves(history, "accuracy", best), paths[0], _MAX_INLINE_BYTES)
    save_figure(_draw_curves(history, "loss", best), paths[1], _MAX_INLINE_BYTES)
    return paths


def _draw_curves(history: dict[str, npt.NDArray[np.float64]], metric: str, best: int) -> Figure:
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
    axes.set_xlabel("epoch")
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_ylabel(metric)
    _limit_values(axes, np.concatenate([train, val]), metric)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.85)
    return figure


def _limit_values(axes: Axes, values: npt.NDArray[np.float64], metric: str) -> None:
    """Let the curves fill the picture, but not make noise look like a mountain."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    low, high = float(finite.min()), float(finite.max())
    if metric == "loss" and low > 0 and high / float(np.median(finite)) > 10:
        axes.set_yscale("log")
        axes.set_ylabel("loss (logarithmic)")
        return
    margin = max(0.05 * (high - low), (0.1 - (high - low)) / 2)
    top = min(1.0, high + margin) if metric == "accuracy" else high + margin
    axes.set_ylim(max(0.0, low - margin), top + (0.01 if top == 1.0 else 0.0))


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> Path:
    """Draw a confusion matrix: the colour is the share of the actual class, the cells say counts and shares.

    The numbers leave first the shares (more than 12 classes), then the cells altogether (more than 30).

    Args:
        matrix: counts; rows actual, columns predicted.
        path: the picture to write.
    Raises:
        StorageError: the picture cannot be written.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    num_classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.66 * num_classes, 3.2, 9.0))  # of the matrix, inches; the labels come on top
    label_size = float(np.interp(num_classes, [10, 30, 60, 100], [10, 8, 6.5, 5.5]))
    names = [shorten_name(name, index, 24 if num_classes <= 60 else 20) for index, name in enumerate(class_names)]
    # The matrix fills the figure; the rest lies around it, and save_figure takes as much room as that needs.
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    # The square root makes a confusion of a few percent visible beside a diagonal near 100 %.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=1.0))
    _draw_colour_bar(figure, image, side)
    _label_classes(axes, names, label_size)
    _write_cells(axes, counts, shares)
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"Confusion matrix: {right:,} of {total:,} right ({right / max(total, 1):.2%})")
    save_figure(figure, path, _MAX_INLINE_BYTES)
    return path


def _draw_colour_bar(figure: Figure, image: AxesImage, side: float) -> None:
    beside = figure.add_axes((1 + 0.15 / side, 0, 0.2 / side, 1))
    shares = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
    bar = figure.colorbar(image, cax=beside, ticks=shares)
    bar.ax.set_yticklabels([f"{share:.0%}" for share in shares])
    bar.set_label("share of the actual class")


def _label_classes(axes: Axes, names: Sequence[str], size: float) -> None:
    """Name the rows and the columns; of very many classes every second, third, …"""
    step = math.ceil(len(names) / _MAX_LABELLED_CLASSES)
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=size, **text_style())
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=size, **text_style())
    axes.tick_params(length=2 if len(names) > 30 else 3.5, pad=2)


def _write_cells(axes: Axes, counts: Counts, shares: npt.NDArray[np.float64]) -> None:
    if len(counts) > 30:
        return
    widest = len(f"{counts.max():,}")
    size = float(np.interp(len(counts), [10, 12, 20, 30], [9, 8, 7.5, 5.5])) * min(1.0, 6 / widest)
    for row, column in np.ndindex(*counts.shape):
        count, share = counts[row, column], shares[row, column]
        if not count and len(counts) > 12:
            continue  # the colour says it, and the numbers that matter stand out
        text = f"{count:,}\n{share:.1%}" if len(counts) <= 12 and count else f"{count:,}"
        colour = "white" if share > 0.3 else "#222222"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def plot_samples(shown: PredictedImages, path: Path) -> Path:
    """Draw a grid of test images, evenly spaced over the split, the first one included, with what the model says.

    Raises:
        StorageError: the picture cannot be written.
    """
    labels, predicted = shown.labels, shown.predicted
    number = min(_GRID_COLUMNS * _GRID_ROWS, len(labels))
    chosen = np.arange(number) * len(labels) // number
    right = int((predicted == labels).sum())
    title = f"Sample predictions: {number} of {len(labels):,} test images; of all, {right / len(labels):.2%} are right"
    save_figure(_draw_grid(shown, chosen, title), path, _MAX_GRID_BYTES)
    return path


def plot_mistakes(shown: PredictedImages, path: Path) -> Path:
    """Draw a grid of the wrong predictions with the highest probability, highest first; see `plot_samples`."""
    labels, predicted, probabilities = shown.labels, shown.predicted, shown.probabilities
    wrong = np.flatnonzero(predicted != labels)
    chosen = wrong[np.argsort(-probabilities[wrong], kind="stable")][: _GRID_COLUMNS * _GRID_ROWS]
    title = f"Most confident mistakes: {len(chosen)} of {len(wrong):,} among {len(labels):,} test images"
    if not len(wrong):
        title = f"No mistakes: all {len(labels):,} test images are classified right"
    save_figure(_draw_grid(shown, chosen, title), path, _MAX_GRID_BYTES)
    return path


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
        axes.set_title(text, fontsize=8.5, color=colour, pad=3, **text_style())
    return figure


def shorten_name(name: str, index: int, length: int) -> str:
    """Return a class name as it can be drawn: one line, its middle left out if it is too long.

    A name that no installed font can draw becomes the number of the class, as in the order of the matrix.
    """
    name = " ".join(name.split())
    if any(ord(character) not in _drawable_characters() for character in name):
        return f"class {index}"
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 3
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


@cache
def _fonts() -> tuple[str, ...]:
    """Return matplotlib's own font and those installed that cover other scripts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed))


@cache
def _drawable_characters() -> frozenset[int]:
    return frozenset(
        code for name in _fonts() for code in font_manager.get_font(font_manager.findfont(name)).get_charmap()
    )


def text_style() -> dict[str, Any]:
    """Return how text with a class name is drawn: `$` is a dollar, not mathematics."""
    return {"family": list(_fonts()), "parse_math": False}


def save_figure(figure: Figure, path: Path, max_bytes: int) -> None:
    """Write a figure as PNG, as sharp as fits in `max_bytes`: fewer colours first, then fewer pixels.

    Written by Pillow without metadata, so the same figure gives the same bytes whenever it is drawn.

    Raises:
        StorageError: it cannot be written.
    """
    content = _encode_png(_render(figure, _RESOLUTIONS[0]))
    for dpi in _RESOLUTIONS:
        if len(content) <= max_bytes:
            break
        content = _encode_png(_render(figure, dpi).quantize(256))
    write_bytes(path, content)


def _render(figure: Figure, dpi: int) -> Image.Image:
    """Draw everything that belongs to the figure, also what reaches out of it: labels are never cut."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pil_kwargs={"compress_level": 1})
    return Image.open(buffer).convert("RGB")


def _encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
