"""Score a model on labelled images: metrics from probabilities, whoever made them.

Everything is summed over all images and divided once, so a short last batch weighs what it should. Ties are broken
by the order of the classes, everywhere in the same way: of two classes equally likely, the first is the prediction.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cnnpipe.errors import DatasetError, ModelError, RegistryError, one_line
from cnnpipe.evaluate.predict import Probabilities, predict_model
from cnnpipe.files import display_path
from cnnpipe.manifest import MANIFEST_FILE, read_manifest
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.settings import EvaluateSettings
from cnnpipe.storage import write_json, write_text

__all__ = [
    "CONFUSION_FILE",
    "METRICS_FILE",
    "PREDICTIONS_FILE",
    "REPORT_FILE",
    "ClassMetrics",
    "Evaluation",
    "Parity",
    "compare_probabilities",
    "evaluate_model",
    "evaluate_probabilities",
    "read_evaluation",
    "recorded_classes",
    "write_evaluation",
]

METRICS_FILE: Final = "metrics.json"
CONFUSION_FILE: Final = "confusion_matrix.csv"
REPORT_FILE: Final = "classification_report.csv"
PREDICTIONS_FILE: Final = "predictions_test.csv"

_FIGURES: Final = ("precision", "recall", "f1")

_EPSILON: Final = 1e-7
"""Probabilities are clipped to this distance from 0 and 1 before the logarithm, so that one image cannot be infinite.

Source: Keras' `keras.config.epsilon()`, used by its categorical cross-entropy in the same way.
"""

_SUM_TOLERANCE: Final = 0.25
"""How far from 1 a row may sum: a quantised softmax rounds every class by itself. Logits are far outside."""

_MAX_DISAGREEMENTS_LISTED: Final = 10

Labels = npt.NDArray[np.int64]  # (N,), index of the actual class


@dataclass(frozen=True)
class ClassMetrics:
    """How well one class is told from the others; a figure without a denominator is 0.0."""

    name: str
    precision: float
    """Share of the images predicted as this class that are of it; 0.0 if none was predicted."""
    recall: float
    """Share of the images of this class that were predicted as it; 0.0 if there are none."""
    f1: float
    """Harmonic mean of the two."""
    support: int
    """Number of images of this class."""


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on one set of images. Rates are 0-1."""

    num_images: int
    num_correct: int
    accuracy: float
    loss: float
    """Mean categorical cross-entropy, natural logarithm."""
    top_k: int
    """The k that `top_k_accuracy` was computed with: the setting, but at most the number of classes."""
    top_k_accuracy: float
    expected_calibration_error: float
    """How far confidence and accuracy lie apart, on average over the images."""
    per_class: tuple[ClassMetrics, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]
    """Counts; a row is an actual class, a column a predicted one."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the model's output."""
        return tuple(each.name for each in self.per_class)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes, each counted once."""
        return self.average("f1")

    def average(self, figure: Literal["precision", "recall", "f1"], *, weighted: bool = False) -> float:
        """Return a figure's mean over the classes, each counted once, or by its number of images."""
        weights = [each.support if weighted else 1 for each in self.per_class]
        values: list[float] = [getattr(each, figure) for each in self.per_class]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def evaluate_probabilities(
    probabilities: Probabilities, labels: Labels, class_names: Sequence[str], settings: EvaluateSettings
) -> Evaluation:
    """Compute every metric from a model's output.

    Args:
        probabilities: (N, classes) float, each row sums to 1.
        labels: (N,) integers, index of the actual class.
        class_names: in the order of the columns.
    Raises:
        ModelError: the probabilities are none: of the wrong shape, NaN, infinite, outside 0-1, or logits.
        DatasetError: the labels do not fit the probabilities or the classes, or there are no images.
    """
    _require_labels(labels, len(class_names))
    _require_probabilities(probabilities, len(labels), len(class_names))
    num_images, top_k = len(labels), min(settings.top_k, len(class_names))
    predicted = probabilities.argmax(axis=1)
    correct = predicted == labels
    of_actual = probabilities[np.arange(num_images), labels]  # (N,)
    num_correct = int(correct.sum())
    num_top_k = int((_ranks(probabilities, labels, of_actual) < top_k).sum())
    # Keras' own order: first to sum 1, then away from 0 and 1.
    likelihood = np.clip(of_actual / probabilities.sum(axis=1, dtype=np.float64), _EPSILON, 1.0 - _EPSILON)
    confidence = probabilities.max(axis=1)
    return Evaluation(
        num_images=num_images,
        num_correct=num_correct,
        accuracy=num_correct / num_images,
        loss=float(-np.log(likelihood).sum() / num_images),
        top_k=top_k,
        top_k_accuracy=num_top_k / num_images,
        expected_calibration_error=_calibration_error(confidence, correct, settings.calibration_bins),
        per_class=_class_metrics(labels, predicted, class_names),
        confusion_matrix=tuple(
            tuple(row) for row in confusion_matrix(labels, predicted, labels=range(len(class_names))).tolist()
        ),
    )


def _require_labels(labels: Labels, num_classes: int) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DatasetError(f"labels must be (N,) integers, received {labels.shape} {labels.dtype}; prepare them again")
    if not len(labels):
        raise DatasetError("there are no images to evaluate on; prepare a dataset with a test split")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DatasetError(
            f"labels must be 0 to {num_classes - 1}, one for each class, received {labels.min()} to {labels.max()}; "
            "prepare the dataset again"
        )


def _require_probabilities(probabilities: Probabilities, num_images: int, num_classes: int) -> None:
    if probabilities.shape != (num_images, num_classes):
        raise ModelError(
            f"the model must give probabilities of shape ({num_images}, {num_classes}), images by classes, "
            f"received {probabilities.shape}; use a model of these classes"
        )
    broken = int((~np.isfinite(probabilities).all(axis=1)).sum())
    if broken:
        raise ModelError(
            f"the model gives NaN or infinity for {broken:,} of {num_images:,} images; "
            "train again, with a smaller --learning-rate"
        )
    sums = probabilities.sum(axis=1, dtype=np.float64)
    lowest, highest, furthest = probabilities.min(), probabilities.max(), sums[np.abs(sums - 1.0).argmax()]
    if lowest < -1e-3 or highest > 1.0 + 1e-3 or abs(furthest - 1.0) > _SUM_TOLERANCE:
        raise ModelError(
            "the model's outputs must be probabilities, 0 to 1 with sum 1, "
            f"received {lowest:.3g} to {highest:.3g} with a sum of {furthest:.3g}; end it with a softmax"
        )


def _ranks(probabilities: Probabilities, labels: Labels, of_actual: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return how many classes come before the actual one, (N,); of equally likely ones the first comes first."""
    columns = np.arange(probabilities.shape[1])
    likelier = probabilities > of_actual[:, None]
    earlier_tie = (probabilities == of_actual[:, None]) & (columns < labels[:, None])
    ranks: npt.NDArray[np.int64] = (likelier | earlier_tie).sum(axis=1)
    return ranks


def _calibration_error(confidence: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_], num_bins: int) -> float:
    """Return the expected calibration error over equal-width bins of the confidence.

    Each bin's |accuracy - mean confidence| is weighted by its share of the images. Bin m holds ((m-1)/M, m/M].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3, https://arxiv.org/abs/1706.04599
    """
    exact = confidence.astype(np.float64)
    bins = np.clip(np.ceil(exact * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - exact, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(exact))


def _class_metrics(
    labels: Labels, predicted: npt.NDArray[np.int64], class_names: Sequence[str]
) -> tuple[ClassMetrics, ...]:
    columns = precision_recall_fscore_support(
        labels, predicted, labels=range(len(class_names)), average=None, zero_division=0.0
    )
    rows = zip(class_names, *(column.tolist() for column in columns), strict=True)
    return tuple(ClassMetrics(*row) for row in rows)


def evaluate_model(
    model: Path, dataset: PreparedDataset, settings: EvaluateSettings, *, output: Path | None = None
) -> Evaluation:
    """Score a model file on a dataset's test split.

    Args:
        model: a `.keras` or `.onnx` file.
        output: folder to write `metrics.json` and the tables to; None writes nothing.
    Raises:
        ModelError: the file is no model, or its classes or image size are not the dataset's.
        DatasetError: the test split is empty.
        StorageError: `output` cannot be written.
    """
    labels = dataset.labels("test")
    probabilities = predict_model(model, dataset, recorded_classes(model.parent))
    evaluation = evaluate_probabilities(probabilities, labels, dataset.class_names, settings)
    if output is not None:
        write_evaluation(output, evaluation, probabilities, labels, dataset.paths("test"), dataset.class_names)
    return evaluation


def recorded_classes(run: Path) -> tuple[str, ...] | None:
    """Return the classes that a run folder records; None for a `.keras` file that stands alone, or is new."""
    if (run / MANIFEST_FILE).is_file():
        return read_manifest(run).model.class_names
    if (run / METRICS_FILE).is_file():
        return read_evaluation(run).class_names
    return None


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    probabilities: Probabilities,
    labels: Labels,
    paths: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Write `predictions_test.csv`, `classification_report.csv`, `confusion_matrix.csv` and, last, `metrics.json`.

    Args:
        folder: the run's, or any other.
        probabilities: (N, classes), as for `evaluate_probabilities`.
        labels: (N,).
        paths: the images' names, in the same order.
    Raises:
        DatasetError: there is not one name for each image.
        StorageError: a file cannot be written.
    """
    if len(paths) != len(labels):
        raise DatasetError(f"{len(labels)} images have {len(paths)} names; prepare the dataset again")
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    predictions = [
        (display_path(path), class_names[actual], class_names[guess], f"{probability:.6f}", int(actual == guess))
        for path, actual, guess, probability in zip(paths, labels, predicted, confidence, strict=True)
    ]
    write_text(folder / PREDICTIONS_FILE, _csv(("path", "label", "predicted", "probability", "correct"), predictions))
    write_text(folder / REPORT_FILE, _csv(("class", *_FIGURES, "support"), _report_rows(evaluation)))
    matrix = zip(evaluation.class_names, evaluation.confusion_matrix, strict=True)
    rows = [(name, *counts) for name, counts in matrix]
    write_text(folder / CONFUSION_FILE, _csv(("actual", *evaluation.class_names), rows))
    path, actual, guess, _, _ = predictions[0]
    first = {"path": path, "actual": actual, "predicted": guess, "probability": float(confidence[0])}
    write_json(folder / METRICS_FILE, _to_json(evaluation) | {"first_image": first})


def _report_rows(evaluation: Evaluation) -> list[tuple[Any, ...]]:
    """Return the rows of the classification report: the classes, then their two averages, under a name of their own."""
    rows: list[tuple[Any, ...]] = [astuple(each) for each in evaluation.per_class]
    for name, weighted in (("macro avg", False), ("weighted avg", True)):
        while name in evaluation.class_names:
            name = f"({name})"
        averages = [evaluation.average(figure, weighted=weighted) for figure in _FIGURES]
        rows.append((name, *averages, evaluation.num_images))
    return [(name, *(f"{value:.6f}" for value in values), support) for name, *values, support in rows]


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _to_json(evaluation: Evaluation) -> dict[str, Any]:
    averages = {f"macro_{figure}": evaluation.average(figure) for figure in _FIGURES}
    values = asdict(evaluation) | averages | {"class_names": evaluation.class_names}
    del values["confusion_matrix"]  # a million numbers for 1,000 classes
    return values


def read_evaluation(run: Path) -> Evaluation:
    """Read `metrics.json` and `confusion_matrix.csv` back; an older run has the matrix in `metrics.json`.

    Raises:
        RegistryError: one of them is missing or damaged.
    """
    path = run / METRICS_FILE
    try:
        values = json.loads(path.read_bytes())
        values["per_class"] = tuple(ClassMetrics(**each) for each in values["per_class"])
        if "confusion_matrix" not in values:
            path = run / CONFUSION_FILE
            values["confusion_matrix"] = _read_matrix(path, len(values["per_class"]))
        values["confusion_matrix"] = tuple(tuple(row) for row in values["confusion_matrix"])
        return Evaluation(**{name: values[name] for name in Evaluation.__dataclass_fields__})
    except FileNotFoundError as error:
        raise RegistryError(f"{run} has no {path.name}: evaluate it with `cnnpipe evaluate {run}`") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RegistryError(f"{path} is damaged: {one_line(repr(error))}; evaluate the run again") from error


def _read_matrix(path: Path, num_classes: int) -> list[list[int]]:
    """Return the counts in `confusion_matrix.csv`; raises ValueError if there is not one for each pair of classes."""
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    counts = [[int(count) for count in row[1:]] for row in rows]
    if [len(row) for row in counts] != [num_classes] * num_classes:
        raise ValueError(f"it must have {num_classes} rows and columns of counts, as {METRICS_FILE} has classes")
    return counts


@dataclass(frozen=True)
class Parity:
    """How closely an exported model repeats the trained one on the same images."""

    num_images: int
    agreement: float
    """Share of images that get the same class, 0-1."""
    max_difference: float
    """Largest difference of any probability."""
    disagreements: tuple[str, ...]
    """The first images that get another class."""


def compare_probabilities(reference: Probabilities, exported: Probabilities, paths: list[str]) -> Parity:
    """Compare two models' probabilities for the same images.

    Args:
        reference: (N, classes), of the trained model.
        exported: (N, classes), of the exported one.
        paths: the images' names, in the same order.
    """
    differs = np.flatnonzero(reference.argmax(axis=1) != exported.argmax(axis=1))
    return Parity(
        num_images=len(reference),
        agreement=1.0 - len(differs) / len(reference),
        max_difference=float(np.abs(reference - exported).max()),
        disagreements=tuple(paths[index] for index in differs[:_MAX_DISAGREEMENTS_LISTED]),
    )
