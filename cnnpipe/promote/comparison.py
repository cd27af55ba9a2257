"""The paired comparison of two runs on the same test images, and everything else that differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binomtest

from cnnpipe.errors import CnnpipeError, DatasetError, RegistryError
from cnnpipe.evaluate.evaluation import LoadedRun, describe_difference, load_run, predict_onnx
from cnnpipe.evaluate.metrics import Labels, Probabilities, read_evaluation, read_probabilities
from cnnpipe.manifest import MODEL_FILES, read_manifest, read_origin
from cnnpipe.prepare.dataset import find_shared, read_digests
from cnnpipe.prepare.sources import SPLITS
from cnnpipe.session import open_session
from cnnpipe.settings import RetrainSettings, load_toml

SIGNIFICANCE: Final = 0.05
"""Probability of chance below which a difference counts."""

_REFUSED_BY_CHANCE: Final = 0.25
"""Highest probability of refusing a run that has equally good classes, because one of many falls by chance.

It is that high because a refusal costs a night, and a class that has become worse costs more.
"""

_QUANTILE: Final = 1.6448536269514722
"""Quantile of the normal distribution for a one-sided bound with 95 % confidence."""

_MIN_IMAGES: Final = 100
"""Fewest images to compare on, or half of the test split if that is fewer."""

_NUM_EXAMPLES: Final = 10

Answers = npt.NDArray[np.bool_]  # (N,), whether a run classifies an image right


class IncomparableError(RegistryError):
    """Two runs have no images on which both can be judged fairly; the message begins with the champion's name."""


@dataclass(frozen=True)
class ClassChange:
    """Recall of one class, by a run and by the champion."""

    name: str
    num_images: int
    recall: float  # of the run, 0-1
    champion_recall: float
    p_value: float  # of a one-sided exact McNemar test that the recall fell
    max_p_value: float  # p value below which a fall counts: of many classes some fall by chance

    @property
    def drop(self) -> float:
        """Recall that the run loses to the champion; negative where it gains."""
        return self.champion_recall - self.recall


@dataclass(frozen=True)
class Comparison:
    """A run against the champion on the test images that neither has learned from."""

    num_images: int
    num_left_out: int  # images of the run's test split that one of the two has learned from
    accuracy: float  # of the run, 0-1
    champion_accuracy: float
    gained: int  # number of images that only the run classifies right
    lost: int  # number of images that only the champion classifies right
    p_value: float  # of the two-sided exact McNemar test
    lower_bound: float  # of accuracy - champion_accuracy, one-sided, with 95 % confidence
    same_model: bool  # whether both give the same probabilities for the whole test split
    worst_class: ClassChange  # the class that loses most; one that loses more than chance explains comes first
    gained_paths: tuple[str, ...]  # the first images that only the run classifies right
    lost_paths: tuple[str, ...]


def compare_runs(champion: Path, run: Path, loaded: LoadedRun) -> Comparison:
    """Compare an evaluated run with a complete one on the test split that `loaded` describes, the run's own.

    The champion's `model.onnx` is scored here; the run's probabilities are those that `cnnpipe evaluate` has stored.

    Raises:
        IncomparableError: the runs solve different problems, or too few test images are new to both.
        ModelError: the champion's model cannot be read.
    """
    dataset, limits = loaded.dataset, loaded.settings.promote
    unseen = _find_unseen(champion, loaded)
    own, theirs = read_probabilities(run, len(unseen)), score_run(champion, loaded)
    labels, paths = dataset.labels("test"), dataset.paths("test")
    right, champion_right = own.argmax(axis=1) == labels, theirs.argmax(axis=1) == labels
    only_run = np.flatnonzero(unseen & right & ~champion_right)
    only_champion = np.flatnonzero(unseen & champion_right & ~right)
    num_images, gained, lost = int(unseen.sum()), len(only_run), len(only_champion)
    answers = right[unseen], champion_right[unseen], labels[unseen]
    return Comparison(
        num_images=num_images,
        num_left_out=len(unseen) - num_images,
        accuracy=float(right[unseen].mean()),
        champion_accuracy=float(champion_right[unseen].mean()),
        gained=gained,
        lost=lost,
        p_value=mcnemar_test(gained, lost),
        lower_bound=bound_difference(gained, lost, num_images),
        same_model=give_same(own, theirs, loaded),
        worst_class=find_worst_class(*answers, dataset.class_names, limits.max_class_drop),
        gained_paths=tuple(paths[index] for index in only_run[:_NUM_EXAMPLES]),
        lost_paths=tuple(paths[index] for index in only_champion[:_NUM_EXAMPLES]),
    )


def score_run(run: Path, loaded: LoadedRun) -> Probabilities:
    """Return the probabilities of a run's `model.onnx` for the test split that `loaded` describes, on the CPU."""
    return predict_onnx(open_session(run / MODEL_FILES["fp32"], "cpu"), loaded.dataset.images("test"))


def give_same(first: Probabilities, second: Probabilities, loaded: LoadedRun) -> bool:
    """Return whether two models give the same classes, and the same probabilities up to what an export may change."""
    same_classes = first.shape == second.shape and bool((first.argmax(axis=1) == second.argmax(axis=1)).all())
    return same_classes and float(np.abs(first - second).max()) <= loaded.settings.export.max_difference


def mcnemar_test(gained: int, lost: int, alternative: Literal["two-sided", "less"] = "two-sided") -> float:
    """Return the p value of the exact McNemar test: whether as many images are gained as lost, or no fewer.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 1947.
    """
    return float(binomtest(gained, gained + lost, 0.5, alternative).pvalue) if gained + lost else 1.0


def bound_difference(gained: int, lost: int, num_images: int) -> float:
    """Return the one-sided lower bound, with 95 % confidence, of the difference of two paired accuracies.

    It is the difference at which the score z = (gained - lost - N d) / sqrt(N (2 q + d (1 - d))) is 1.645, where q is
    the likeliest fraction of lost images for that d. Unlike the textbook's bound, it holds for few discordant pairs:
    with none it is -2.71 / (N + 2.71).

    Source: Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17, 1998.
    """
    total = num_images

    def excess(difference: float) -> float:
        linear = (2 * total - gained + lost) * difference - gained - lost
        root = sqrt(max(linear**2 + 8 * total * lost * difference * (1 - difference), 0.0))
        variance = total * ((root - linear) / (2 * total) + difference * (1 - difference))
        return (gained - lost - total * difference) - _QUANTILE * sqrt(max(variance, 0.0))

    # Just below the observed difference, because there the variance may be 0, and the excess with it.
    return -1.0 if lost == total else float(brentq(excess, -1.0, (gained - lost) / total - 1e-9))


def find_worst_class(
    right: Answers, champion_right: Answers, labels: Labels, class_names: Sequence[str], max_drop: float
) -> ClassChange:
    """Return the class whose recall falls most, of those that fall by more than `max_drop` and by more than chance.

    If no class does, return the one whose recall falls most of all that have images. A fall counts at a p value below
    0.05, or lower where many classes have enough discordant pairs to reach that.

    Args:
        right: answers of the run; `champion_right` those of the champion for the same images.
    Source: Tarone, A modified Bonferroni method for discrete data, Biometrics 46, 1990.
    """
    size = len(class_names)
    images, own, theirs, gained, lost = (
        np.bincount(labels[chosen], minlength=size)
        for chosen in (slice(None), right, champion_right, right & ~champion_right, champion_right & ~right)
    )
    smallest = 0.5 ** (gained + lost).astype(np.float64)  # p value if all discordant pairs of a class were lost
    num_tests = next(k for k in range(1, size + 1) if (smallest * k < _REFUSED_BY_CHANCE).sum() <= k)
    level = min(SIGNIFICANCE, _REFUSED_BY_CHANCE / num_tests)
    changes = [
        ClassChange(
            class_names[each],
            int(images[each]),
            float(own[each] / images[each]),
            float(theirs[each] / images[each]),
            mcnemar_test(int(gained[each]), int(lost[each]), "less"),
            level,
        )
        for each in np.flatnonzero(images).tolist()
    ]
    return max(changes, key=lambda change: (change.drop > max_drop and change.p_value < level, change.drop))


def _find_unseen(champion: Path, loaded: LoadedRun) -> Answers:
    """Return which images of the test split neither the champion nor the run has learned from, (N,) bool."""
    dataset, theirs = loaded.dataset, read_manifest(champion).model
    if theirs.class_names != dataset.class_names:
        owners = ("only the champion", "only this run")
        different = describe_difference(theirs.class_names, dataset.class_names, owners)
        raise IncomparableError(f"{champion.name} has other classes ({different})")
    if theirs.image_size != dataset.image_size:
        sizes = "takes images of {}x{} pixels, this run of {}x{}".format(*theirs.image_size, *dataset.image_size)
        raise IncomparableError(f"{champion.name} {sizes}")
    origin, own = read_origin(champion), read_digests(dataset.path)
    known: dict[str, npt.NDArray[np.uint8]] | None = None
    with suppress(DatasetError):  # a champion of an earlier version, whose prepared dataset is gone
        known = read_digests(champion)
    elsewhere = theirs.dataset_fingerprint != dataset.fingerprint and origin.location != loaded.location
    # A folder that was only moved has most of the champion's test images.
    if elsewhere and (known is None or find_shared(known["test"], *own.values()).mean() <= 0.5):
        places = f"was trained on {origin.location}, this run on {loaded.location}, which has other images"
        raise IncomparableError(f"{champion.name} {places}")
    if known is None:
        unknown = "has no digests of its images, and its prepared dataset is gone"
        raise IncomparableError(f"{champion.name} {unknown}, so it may have learned from these test images")
    learned = [digests[split] for digests in (known, own) for split in ("train", "val")]
    unseen = ~find_shared(own["test"], *learned)
    if unseen.sum() < min(_MIN_IMAGES, len(unseen) / 2):
        left = f"{unseen.sum():,} of the {len(unseen):,} test images are new to it and to this run"
        raise IncomparableError(f"{champion.name} has learned from too many of these images: only {left}")
    return unseen


def diff_runs(first: Path, second: Path) -> dict[str, Any]:
    """Return what differs between two complete runs, as values for JSON; lists hold the first and the second value.

    `comparison` is that of the second with the first on its own test images; None if `not_compared` says why not.

    Raises:
        RegistryError: one is not complete.
    """
    runs = (first, second)
    data, evaluations = [read_manifest(run).dataset for run in runs], [read_evaluation(run) for run in runs]
    own, other = (load_toml(RetrainSettings, run / "config.toml").model_dump(mode="json") for run in runs)
    pairs = {f"{table}.{key}": [value, other[table][key]] for table in own for key, value in own[table].items()}
    recalls = [{each.name: each.recall for each in evaluation.per_class} for evaluation in evaluations]
    comparison, problem = None, ""
    try:
        comparison = asdict(compare_runs(first, second, load_run(second)))
    except CnnpipeError as error:
        problem = str(error)
    return {
        "runs": [str(run) for run in runs],
        "settings": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "dataset": {key: [each.get(key) for each in data] for key in ("location", "fingerprint")},
        "num_images": {split: [each["num_images"].get(split) for each in data] for split in SPLITS},
        "accuracy": [evaluation.accuracy for evaluation in evaluations],
        "recall": {name: [recall.get(name) for recall in recalls] for name in recalls[0] | recalls[1]},
        "comparison": comparison,
        "not_compared": problem,
    }
