"""Report what is wrong with a dataset, and refuse one that is too bad to learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnpipe.errors import DatasetError, ImageError
from cnnpipe.images.decode import highest_value, read_file
from cnnpipe.manifest import TrainingStatistics
from cnnpipe.prepare.sources import LEFT_OUT, SPLITS, SourceImages, Unreadable, first_few
from cnnpipe.settings import PrepareSettings

# What is worth a warning; the limits in the settings, which stop the run, are others.
_NOTABLE_IMBALANCE = 10.0
_FEW_IMAGES = 50

_LOW_STD = 1.0  # standard deviation of all pixels, 0-255, below which there is nothing to learn
_DARK = 16  # mean brightness, 0-255, that an image with 16-bit values below 4,096 cannot reach
_SAMPLE_FILES = 20  # number of files that are read again to find the range of their values


@dataclass(frozen=True)
class Leak:
    """An image that a model is judged on, and exactly the same image among those that it learns from."""

    path: str
    """Image in `val` or `test`."""
    split: str
    """Split of the image."""
    other_path: str
    """The same image in another split."""
    other_split: str
    """Split of that image, `train` or `val`."""


@dataclass(frozen=True)
class DataReport:
    """Findings about a dataset; part of its `dataset.json`."""

    unreadable: tuple[Unreadable, ...]
    """Source files that were left out."""
    leaks: tuple[Leak, ...]
    """Images of val that are also in train, and of test that are also in train or val."""
    duplicates: int
    """Number of images that repeat an earlier one of the same split."""
    class_counts: dict[str, dict[str, int]]
    """Split -> class -> number of images."""
    imbalance: float
    """Ratio of the largest class in train to the smallest; ≥ 1."""
    warnings: tuple[str, ...]
    """The findings that are worth reading, one line each, whether or not a limit is exceeded."""
    left_out: tuple[str, ...] = ()
    """Images of train and val that are not used, because val or test has the same."""
    contradictions: tuple[str, ...] = ()
    """Names of the same image in two classes, one of which is wrong, such as `cat/1.png and dog/2.png`."""


def build_report(images: SourceImages, splits: npt.NDArray[np.int8]) -> DataReport:
    """Find leaks, duplicates, contradictions and small classes.

    Args:
        splits: split of each image, (N,), an index into `SPLITS`.
    """
    class_names, labels, digests, paths = images.class_names, images.labels, images.digests, images.paths
    leaks, duplicates = _find_leaks(images.given_split, splits, digests, paths)
    pairs = Counter(zip(splits.tolist(), labels.tolist(), strict=True))
    counts = {
        split: {name: pairs[number, label] for label, name in enumerate(class_names)}
        for number, split in enumerate(SPLITS)
    }
    train = counts["train"]
    imbalance = max(train.values()) / max(min(train.values()), 1)  # JSON has no infinity
    found = [*images.warnings, *warn_of_unreadable(images.unreadable, len(labels))]
    for split in ("val", "test"):
        leaked, total = _leaked_into(split, leaks), sum(counts[split].values())
        found += _warn(
            leaked, f"{len(leaked):,} of {total:,} images of {split} are also in another, where they were left out"
        )
    found += _warn(duplicates, f"{len(duplicates):,} images repeat another one of their split")
    first: dict[str, int] = {}
    twins = [(first.setdefault(digest, index), index) for index, digest in enumerate(digests)]
    contradictions = [f"{paths[one]} and {paths[two]}" for one, two in twins if labels[one] != labels[two]]
    found += _warn(contradictions, f"{len(contradictions)} images are in two classes")
    different = Counter(label for label, _ in set(zip(labels.tolist(), digests, strict=True)))
    totals = {name: f"{name} ({different[label]:,} different in all)" for label, name in enumerate(class_names)}
    for split in ("val", "test"):
        missing = [totals[name] for name, count in counts[split].items() if not count]
        found += _warn(missing, f"{split} has no images of {len(missing)} classes")
    if imbalance > _NOTABLE_IMBALANCE:
        found.append(_describe_imbalance(train, imbalance))
    small = [f"{name} ({count})" for name, count in train.items() if count < _FEW_IMAGES]
    found += _warn(small, f"{len(small)} classes have fewer than {_FEW_IMAGES} images in train")
    return DataReport(
        unreadable=images.unreadable,
        leaks=tuple(leaks),
        duplicates=len(duplicates),
        class_counts=counts,
        imbalance=imbalance,
        warnings=tuple(" ".join(warning.split()) for warning in found),  # names of files may have line breaks
        left_out=tuple(paths[row] for row in np.flatnonzero(splits == LEFT_OUT).tolist()),
        contradictions=tuple(contradictions),
    )


def _warn(offenders: Sequence[str], text: str) -> list[str]:
    return [f"{text}: {first_few(offenders)}"] if offenders else []


def warn_of_unreadable(unreadable: Sequence[Unreadable], num_readable: int) -> list[str]:
    """Return a warning if some files are unreadable, else nothing."""
    number = f"{len(unreadable):,} of {num_readable + len(unreadable):,}"
    return _warn(_name_unreadable(unreadable), f"{number} files are unreadable and were left out")


def _name_unreadable(unreadable: Sequence[Unreadable]) -> list[str]:
    return [f"{file.path} ({file.kind})" for file in unreadable]


def _leaked_into(split: str, leaks: Sequence[Leak]) -> list[str]:
    return [f"{leak.path} = {leak.other_path}" for leak in leaks if leak.split == split]


def _find_leaks(
    given_split: npt.NDArray[np.int8], splits: npt.NDArray[np.int8], digests: Sequence[str], paths: Sequence[str]
) -> tuple[list[Leak], list[str]]:
    """Return the leaks in the order of the images, and `path = original` for each duplicate within a split."""
    first: dict[tuple[int, str], int] = {}  # of each split as given
    for index, key in enumerate(zip(given_split.tolist(), digests, strict=True)):
        first.setdefault(key, index)
    kept: dict[tuple[int, str], int] = {}
    leaks, duplicates = [], []
    for index in np.flatnonzero(splits != LEFT_OUT).tolist():
        given, split, digest = int(given_split[index]), int(splits[index]), digests[index]
        if (original := kept.setdefault((split, digest), index)) != index:
            duplicates.append(f"{paths[index]} = {paths[original]}")
        twins = [(other, first[other, digest]) for other in range(given) if (other, digest) in first]
        for other, twin in twins[:1]:  # train comes before val, and val before test
            leaks.append(Leak(paths[index], SPLITS[given], paths[twin], SPLITS[other]))
    return leaks, duplicates


def _describe_imbalance(train: dict[str, int], ratio: float) -> str:
    smallest, largest = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
    return (
        f"class {largest!r} has {train[largest]:,} images in train and {smallest!r} has {train[smallest]:,}, "
        f"{ratio:.4g} times fewer"
    )


def check_limits(report: DataReport, settings: PrepareSettings, details: str) -> None:
    """Refuse a dataset that exceeds a limit.

    Args:
        settings: the limits; they change no array, so a milder limit needs no new preparation.
        details: path of the whole report, for the messages.
    Raises:
        DatasetError: a limit is exceeded; the message names it, what was received, and the first images concerned.
    """
    num_images = {split: sum(counts.values()) for split, counts in report.class_counts.items()}
    num_all, unreadable = sum(num_images.values()) + len(report.left_out), _name_unreadable(report.unreadable)
    findings = [
        ("unreadable", unreadable, num_all + len(unreadable), "files are unreadable"),
        ("contradictory", report.contradictions, num_all, "images are in two classes"),
    ]
    for split in ("val", "test"):
        text = f"images of {split} are also in another split"
        findings.append(("leaked", _leaked_into(split, report.leaks), num_images[split], text))
    for name, found, total, text in findings:
        limit = getattr(settings, f"max_{name}_fraction")
        # One of fewer than 100 images is over 1 %, but is no reason to stop.
        if len(found) > bool(limit) and len(found) / total > limit:
            raise DatasetError(
                f"{len(found):,} of {total:,} {text}, more than {limit:.4g} (max_{name}_fraction): {first_few(found)}; "
                f"restore, fix or remove them, or raise the limit; see {details}"
            )
    for name, count in report.class_counts["train"].items():
        if count < settings.min_images_per_class:
            raise DatasetError(
                f"class {name!r} has {count} images in train, need at least {settings.min_images_per_class} "
                f"(min_images_per_class); add images, remove the class or lower the limit; see {details}"
            )
    if report.imbalance > settings.max_imbalance:
        raise DatasetError(
            f"{_describe_imbalance(report.class_counts['train'], report.imbalance)}; at most "
            f"{settings.max_imbalance:g} are allowed (max_imbalance); balance them or raise the limit; see {details}"
        )


def measure_shift(statistics: TrainingStatistics, before: TrainingStatistics) -> float:
    """Return the largest change of brightness, colour or contrast of images, 0-1 of the range of values.

    Brightness is compared by the mean difference of the inner deciles, which estimates the distance that the brightness
    of an image has moved; colour and contrast by the mean and the standard deviation of each channel.
    """
    figures = ("brightness_deciles", "channel_mean", "channel_std")
    deciles, *channels = (np.abs(np.subtract(getattr(statistics, name), getattr(before, name))) for name in figures)
    return float(max(deciles[1:-1].mean(), *map(np.max, channels)) / 255)


def check_contrast(
    images: npt.NDArray[np.uint8], statistics: TrainingStatistics, files: Sequence[Path], details: str
) -> None:
    """Refuse pictures that are black, of one colour or all the same once they are decoded to 8 bits.

    Most often their files have 16 bits but only low values: a decoder keeps the high byte.

    Args:
        images: training images, (N, H, W, 3), N ≥ 1; may be mapped.
        statistics: statistics of those images.
        files: files of those images, or none if they do not come from files.
        details: path of the whole report, for the message.
    Raises:
        DatasetError: the pictures hardly differ; the message names the range of values, and how to fix it.
    """
    hardly_differ = max(statistics.channel_std) < _LOW_STD or all(np.array_equal(image, images[0]) for image in images)
    if not hardly_differ and statistics.brightness_deciles[-1] >= _DARK:
        return
    highest, most = 0, 255
    for file in files[:: max(1, len(files) // _SAMPLE_FILES)]:
        with suppress(ImageError):  # gone since, or too large to be decoded whole
            highest, most = max((highest, most), highest_value(read_file(file)))
    low_values = most > 255 and highest < _DARK << 8
    if not (hardly_differ or low_values):
        return
    remedy = "check that the files show what they should"
    if low_values:
        remedy = f"multiply their values by up to {most // max(highest, 1)}, or save them with 8 bits"
    raise DatasetError(
        f"the decoded pictures hardly differ ({most.bit_length()}-bit values up to {highest:,} of {most:,}); {remedy}; "
        f"see {details}"
    )


def compute_statistics(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], num_classes: int
) -> TrainingStatistics:
    """Measure the training images, a few at a time.

    The brightness of an image is the mean of all its values, in all three channels.

    Args:
        images: (N, H, W, 3) uint8, N ≥ 1; may be a mapped file larger than the memory.
        labels: (N,), indices of classes.
    """
    num_pixels = images.shape[1] * images.shape[2]
    step = max(1, 2**22 // (num_pixels * 3))
    histogram = np.zeros((3, 256))  # for each channel; exact, and so are the sums below
    sums = np.empty(len(images))
    for start in range(0, len(images), step):
        chunk = np.ascontiguousarray(images[start : start + step])
        # Pillow counts several times faster than NumPy adds along an axis of three.
        counted = Image.fromarray(chunk.reshape(-1, images.shape[2], 3)).histogram()
        histogram += np.array(counted).reshape(3, 256)
        sums[start : start + step] = chunk.reshape(len(chunk), -1).sum(axis=1, dtype=np.uint64)
    values, total = np.arange(256), len(images) * num_pixels
    mean = histogram @ values / total
    std = np.sqrt(np.maximum(histogram @ values**2 / total - mean**2, 0.0))
    return TrainingStatistics(
        num_images=len(images),
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        brightness_deciles=tuple(np.percentile(sums / (3 * num_pixels), range(0, 101, 10)).tolist()),
        class_shares=tuple((np.bincount(labels, minlength=num_classes) / len(images)).tolist()),
    )
