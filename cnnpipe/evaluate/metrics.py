"""Metrics from the probabilities that any model gives to labelled images, and their files in a run folder.

Everything is summed over all images and divided once, so a short last batch has its own weight. Ties are broken the
same way everywhere: of two equally likely classes the first is the prediction.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cnnpipe.errors import DatasetError, ModelError, RegistryError, one_line
from cnnpipe.paths import escape_path
from cnnpipe.settings import EvaluateSettings
from cnnpipe.storage import storage_errors, write_file, write_json, write_text

METRICS_FILE: Final = "metrics.json"
CONFUSION_FILE: Final = "confusion_matrix.csv"
REPORT_FILE: Final = "classification_report.csv"
PREDICTIONS_FILE: Final = "predictions_test.csv"
PROBABILITIES_FILE: Final = "probabilities_test.npy"

_FIGURES: Final = ("precision", "recall", "f1")

_EPSILON: Final = 1e-7
"""Distance from 0 and 1 that probabilities are clipped to before the logarithm, so that one image cannot be infinite.

Source: Keras' `keras.config.epsilon()`, which its categorical cross-entropy uses in the same way.
"""

_SUM_TOLERANCE: Final = 0.25
"""Largest distance from 1 of a row's sum: a quantised softmax rounds every class by itself. Logits are far outside."""

Labels = npt.NDArray[np.int64]  # (N,), index of the actual class
Probabilities = npt.NDArray[np.float32]  # (N, classes)


@dataclass(frozen=True)
class ClassMetrics:
    """Figures of one class, 0-1; a figure without a denominator is 0.0."""

    name: str
    precision: float
    recall: float
    f1: float  # harmonic mean of precision and recall
    support: int  # number of images of this class


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on one set of images. Rates are 0-1."""

    num_images: int
    num_correct: int
    accuracy: float
    loss: float  # mean categorical cross-entropy, natural logarithm
    top_k: int  # the k of `top_k_accuracy`: the setting, but at most the number of classes
    top_k_accuracy: float
    expected_calibration_error: float  # mean distance between confidence and accuracy over the images
    per_class: tuple[ClassMetrics, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the model's output."""
        return tuple(each.name for each in self.per_class)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes, each counted once."""
        return self.average("f1")

    def average(self, figure: Literal["precision", "recall", "f1"], *, weighted: bool = False) -> float:
        """Return a figure's mean over the classes, each counted once, or weighted by its number of images."""
        weights = [each.support for each in self.per_class] if weighted else None
        return float(np.average([getattr(each, figure) for each in self.per_class], weights=weights))


def evaluate_probabilities(
    probabilities: Probabilities, labels: Labels, class_names: Sequence[str], settings: EvaluateSettings
) -> Evaluation:
    """Compute every metric from a model's output.

    Top-k accuracy and loss are computed here because scikit-learn's break ties the other way, take two classes in
    another shape, and clip at another epsilon than Keras does in `history.csv`.

    Args:
        probabilities: (N, classes) float, each row sums to 1.
        labels: (N,) integers, index of the actual class.
        class_names: in the order of the columns.
    Raises:
        ModelError: these are not probabilities: wrong shape, NaN, infinite, outside 0-1, or logits.
        DatasetError: there are no images.
    """
    if not len(labels):
        raise DatasetError("there are no images to evaluate on; prepare a dataset with a test split")
    _require_probabilities(probabilities, len(labels), len(class_names))
    num_images, top_k = len(labels), min(settings.top_k, len(class_names))
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predicted == labels
    of_actual = probabilities[np.arange(num_images), labels][:, None]  # (N, 1)
    earlier_class = np.arange(len(class_names)) < labels[:, None]
    num_likelier = ((probabilities > of_actual) | ((probabilities == of_actual) & earlier_class)).sum(axis=1)
    # Keras' own order: first to sum 1, then away from 0 and 1.
    likelihood = np.clip(of_actual[:, 0] / probabilities.sum(axis=1, dtype=np.float64), _EPSILON, 1.0 - _EPSILON)
    classes = range(len(class_names))
    figures = precision_recall_fscore_support(labels, predicted, labels=classes, average=None, zero_division=0.0)
    return Evaluation(
        num_images=num_images,
        num_correct=int(correct.sum()),
        accuracy=int(correct.sum()) / num_images,
        loss=float(-np.log(likelihood).sum() / num_images),
        top_k=top_k,
        top_k_accuracy=int((num_likelier < top_k).sum()) / num_images,
        expected_calibration_error=_calibration_error(confidence, correct, settings.calibration_bins),
        per_class=tuple(map(ClassMetrics, class_names, *(figure.tolist() for figure in figures))),
    )


def _require_probabilities(probabilities: Probabilities, num_images: int, num_classes: int) -> None:
    if probabilities.shape != (num_images, num_classes):
        raise ModelError(
            f"the model must give probabilities of shape ({num_images}, {num_classes}), images by classes, "
            f"received {probabilities.shape}; use a model of these classes"
        )
    if broken := int((~np.isfinite(probabilities).all(axis=1)).sum()):
        problem = f"the model gives NaN or infinity for {broken:,} of {num_images:,} images"
        raise ModelError(f"{problem}; train again, with a smaller --learning-rate")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    lowest, highest, furthest = probabilities.min(), probabilities.max(), sums[np.abs(sums - 1.0).argmax()]
    if lowest < -1e-3 or highest > 1.0 + 1e-3 or abs(furthest - 1.0) > _SUM_TOLERANCE:
        raise ModelError(
            "the model's outputs must be probabilities, 0 to 1 with sum 1, "
            f"received {lowest:.3g} to {highest:.3g} with a sum of {furthest:.3g}; end it with a softmax"
        )


def _calibration_error(confidence: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_], num_bins: int) -> float:
    """Return the mean |accuracy - mean confidence| of equal-width bins, by their images; bin m holds ((m-1)/M, m/M].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3, https://arxiv.org/abs/1706.04599
    """
    exact = confidence.astype(np.float64)
    bins = np.clip(np.ceil(exact * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - exact, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(exact))


def write_evaluation(
    folder: Path, evaluation: Evaluation, probabilities: Probabilities, labels: Labels, paths: Sequence[str]
) -> None:
    """Write the tables, `probabilities_test.npy` and, last, `metrics.json`.

    Args:
        probabilities, labels: as for `evaluate_probabilities`.
        paths: the images' names, in the same order.
    Raises:
        StorageError: a file cannot be written.
    """
    names, predicted, confidence = evaluation.class_names, probabilities.argmax(axis=1), probabilities.max(axis=1)
    predictions = [
        (escape_path(path), names[actual], names[guess], f"{probability:.6f}", int(actual == guess))
        for path, actual, guess, probability in zip(paths, labels, predicted, confidence, strict=True)
    ]
    counts = confusion_matrix(labels, predicted, labels=range(len(names)))  # rows actual, columns predicted
    matrix = [(name, *row) for name, row in zip(names, counts, strict=True)]
    _write_csv(folder / PREDICTIONS_FILE, ("path", "label", "predicted", "probability", "correct"), predictions)
    _write_csv(folder / REPORT_FILE, ("class", *_FIGURES, "support"), _report_rows(evaluation))
    _write_csv(folder / CONFUSION_FILE, ("actual", *names), matrix)
    with write_file(folder / PROBABILITIES_FILE) as temporary, storage_errors(folder / PROBABILITIES_FILE):
        np.save(temporary, probabilities)
    path, actual, guess, *_ = predictions[0]
    values = asdict(evaluation) | {f"macro_{figure}": evaluation.average(figure) for figure in _FIGURES}
    first = {"path": path, "actual": actual, "predicted": guess, "probability": float(confidence[0])}
    write_json(folder / METRICS_FILE, values | {"class_names": names, "first_image": first})


def _report_rows(evaluation: Evaluation) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of the classification report: the classes, then two averages, never named as a class is."""
    rows = [astuple(each) for each in evaluation.per_class]
    for name, weighted in (("macro avg", False), ("weighted avg", True)):
        while name in evaluation.class_names:
            name = f"({name})"
        averages = (evaluation.average(figure, weighted=weighted) for figure in _FIGURES)
        rows.append((name, *averages, evaluation.num_images))
    for name, *values, support in rows:
        yield name, *(f"{value:.6f}" for value in values), support


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def read_evaluation(run: Path) -> Evaluation:
    """Read `metrics.json` back; raises RegistryError if it is missing or damaged."""
    with _reading(run / METRICS_FILE):
        values = json.loads((run / METRICS_FILE).read_bytes())
        values["per_class"] = tuple(ClassMetrics(**each) for each in values["per_class"])
        return Evaluation(**{name: values[name] for name in Evaluation.__dataclass_fields__})


def read_probabilities(run: Path, num_images: int) -> Probabilities:
    """Read the trained model's probabilities for the test images, (N, classes) float32.

    Raises:
        RegistryError: the file is missing, damaged, or not of `num_images` images.
    """
    path = run / PROBABILITIES_FILE
    with _reading(path):
        probabilities: Probabilities = np.load(path, allow_pickle=False)
    if len(probabilities) != num_images:
        raise RegistryError(f"{path} has {len(probabilities)} rows for {num_images} images; evaluate the run again")
    return probabilities


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        message = f"{path.parent} has no {path.name}: evaluate it with `cnnpipe evaluate {path.parent}`"
        raise RegistryError(message) from error
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise RegistryError(f"{path} is damaged: {one_line(repr(error))}; evaluate the run again") from error


@dataclass(frozen=True)
class Parity:
    """How closely an exported model repeats the trained one on the same images."""

    num_images: int
    agreement: float  # fraction of images that get the same class, 0-1
    max_difference: float  # largest difference of any probability
    disagreements: tuple[str, ...]  # first 10 images that get another class


def compare_probabilities(reference: Probabilities, exported: Probabilities, paths: Sequence[str]) -> Parity:
    """Compare a trained and an exported model's probabilities, (N, classes), for the same images, by path."""
    differs = np.flatnonzero(reference.argmax(axis=1) != exported.argmax(axis=1))
    agreement, max_difference = 1.0 - len(differs) / len(reference), float(np.abs(reference - exported).max())
    return Parity(len(reference), agreement, max_difference, tuple(paths[index] for index in differs[:10]))
