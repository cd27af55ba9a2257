"""What is wrong with a dataset, and whether it is too wrong to learn from."""

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
from cnnpipe.prepare.splits import SPLITS, TEST, TRAIN, VAL
from cnnpipe.settings import PrepareSettings

__all__ = [
    "DataReport",
    "Leak",
    "Unreadable",
    "build_report",
    "check_limits",
    "compute_statistics",
    "warn_of_unreadable",
]

_CHUNK_BYTES = 2**22

# Worth a line to the user, though not worth stopping the run for, as the limits in the settings are.
_NOTABLE_IMBALANCE = 10.0
_FEW_IMAGES = 50

_LOW_STD = 1.0
"""Standard deviation of all pixels, 0-255, below which there is nothing to learn from."""
_DARK = 16
"""Mean brightness, 0-255, that no image reaches whose 16-bit values are below 4,096."""
_LOOK_INTO = 20
"""Files that are read again to find the range of their values."""


@dataclass(frozen=True)
class Unreadable:
    """A source file that is no image, or a damaged one."""

    path: str
    kind: str
    """One of `cnnpipe.images.decode.ERROR_KINDS`."""
    message: str


@dataclass(frozen=True)
class Leak:
    """An image that a model is judged on, and exactly the same image among those it has learnt from."""

    path: str
    split: str
    other_path: str
    other_split: str


@dataclass(frozen=True)
class DataReport:
    """What was found while preparing a dataset; written to its `dataset.json`."""

    unreadable: tuple[Unreadable, ...]
    leaks: tuple[Leak, ...]
    """Images of val that are also in train, and of test that are also in train or val."""
    duplicates: int
    """Images that repeat an earlier one of the same split."""
    class_counts: dict[str, dict[str, int]]
    """Split -> class -> number of images."""
    imbalance: float
    """Images of the largest class in train for each one of the smallest; ≥ 1."""
    warnings: tuple[str, ...]
    """All of that, where it is worth reading, in a line each; whether or not a limit is passed."""


def build_report(
    class_names: Sequence[str],
    labels: npt.NDArray[np.int64],
    splits: npt.NDArray[np.int8],
    digests: Sequence[str],
    paths: Sequence[str],
    unreadable: Sequence[Unreadable],
    warnings: Sequence[str],
) -> DataReport:
    """Find leaks, duplicates, contradictions and small classes.

    Args:
        labels, splits, digests, paths: of each readable image, N in all; `splits` indexes `SPLITS`.
        warnings: of the source, put first.
    """
    leaks, duplicates = _find_leaks(splits, digests, paths)
    counts = {
        name: dict(zip(class_names, _count(labels[splits == split], len(class_names)), strict=True))
        for split, name in enumerate(SPLITS)
    }
    found = [
        *warnings,
        *warn_of_unreadable(unreadable, len(labels)),
        *_warn_of_leaks(leaks, counts),
        *_warn_of_duplicates(duplicates),
        *_warn_of_contradictions(labels, digests, paths),
        *_warn_of_unmeasured(counts, class_names, labels, digests),
        *_warn_of_classes(counts[SPLITS[TRAIN]]),
    ]
    return DataReport(
        unreadable=tuple(unreadable),
        leaks=tuple(leaks),
        duplicates=len(duplicates),
        class_counts=counts,
        imbalance=_imbalance(counts[SPLITS[TRAIN]]),
        warnings=tuple(" ".join(warning.split()) for warning in found),  # names of files may hold line breaks
    )


def _count(labels: npt.NDArray[np.int64], num_classes: int) -> list[int]:
    return [int(count) for count in np.bincount(labels, minlength=num_classes)]


def _imbalance(train: dict[str, int]) -> float:
    return max(train.values()) / max(min(train.values()), 1)  # none at all counts as one; JSON has no infinity


def _find_leaks(
    splits: npt.NDArray[np.int8], digests: Sequence[str], paths: Sequence[str]
) -> tuple[list[Leak], list[str]]:
    """Return the leaks in the order of the images, and for each duplicate within a split whose it is."""
    first: dict[int, dict[str, int]] = {TRAIN: {}, VAL: {}, TEST: {}}
    duplicates = []
    for index, (split, digest) in enumerate(zip(splits.tolist(), digests, strict=True)):
        if (original := first[split].setdefault(digest, index)) != index:
            duplicates.append(f"{paths[index]} = {paths[original]}")
    leaks = []
    for index, (split, digest) in enumerate(zip(splits.tolist(), digests, strict=True)):
        for other in range(split):  # train comes before val, and val before test
            if (twin := first[other].get(digest)) is not None:
                leaks.append(Leak(paths[index], SPLITS[split], paths[twin], SPLITS[other]))
                break
    return leaks, duplicates


def warn_of_unreadable(unreadable: Sequence[Unreadable], num_readable: int) -> list[str]:
    """Return a warning if some files are unreadable, else nothing."""
    if not unreadable:
        return []
    total = num_readable + len(unreadable)
    offenders = first_few([f"{file.path} ({file.kind})" for file in unreadable])
    return [f"{len(unreadable):,} of {total:,} files are unreadable and were left out: {offenders}"]


def _warn_of_leaks(leaks: Sequence[Leak], counts: dict[str, dict[str, int]]) -> list[str]:
    warnings = []
    for split in (SPLITS[VAL], SPLITS[TEST]):
        pairs = [f"{leak.path} = {leak.other_path}" for leak in leaks if leak.split == split]
        if pairs:
            total = sum(counts[split].values())
            warnings.append(f"{len(pairs):,} of {total:,} images of {split} are also in another: {first_few(pairs)}")
    return warnings


def _warn_of_duplicates(pairs: Sequence[str]) -> list[str]:
    return [f"{len(pairs):,} images repeat another one of their split: {first_few(pairs)}"] if pairs else []


def _warn_of_contradictions(labels: npt.NDArray[np.int64], digests: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return a warning if the same image is in two classes: one of its labels is wrong."""
    first: dict[str, int] = {}
    pairs = []
    for index, digest in enumerate(digests):
        twin = first.setdefault(digest, index)
        if labels[twin] != labels[index]:
            pairs.append(f"{paths[twin]} and {paths[index]}")
    return [f"{len(pairs)} images are in two classes: {first_few(pairs)}"] if pairs else []


def _warn_of_unmeasured(
    counts: dict[str, dict[str, int]],
    class_names: Sequence[str],
    labels: npt.NDArray[np.int64],
    digests: Sequence[str],
) -> list[str]:
    """Return a warning for each of val and test that lacks classes: nothing is measured of them there."""
    warnings = []
    different = Counter(label for label, _ in set(zip(labels.tolist(), digests, strict=True)))
    for split in (SPLITS[VAL], SPLITS[TEST]):
        missing = [
            f"{name} ({different[label]:,} different in all)"
            for label, name in enumerate(class_names)
            if not counts[split][name]
        ]
        if missing:
            warnings.append(f"{split} has no images of {len(missing)} classes: {first_few(missing)}")
    return warnings


def _warn_of_classes(train: dict[str, int]) -> list[str]:
    """Return a warning if classes are far apart in size, and one if some are small."""
    warnings = []
    if (ratio := _imbalance(train)) > _NOTABLE_IMBALANCE:
        smallest, largest = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
        warnings.append(
            f"class {largest!r} has {train[largest]:,} images in train and {smallest!r} has {train[smallest]:,}, "
            f"{ratio:.4g} times fewer"
        )
    small = [f"{name} ({train[name]})" for name in train if train[name] < _FEW_IMAGES]
    if small:
        warnings.append(f"{len(small)} classes have fewer than {_FEW_IMAGES} images in train: {first_few(small)}")
    return warnings


def check_limits(report: DataReport, settings: PrepareSettings, details: str) -> None:
    """Refuse a dataset that is too bad to learn from.

    Args:
        settings: the limits; they do not touch what is prepared, so a milder limit needs no new preparation.
        details: where the whole report is, for the messages.
    Raises:
        DatasetError: a limit is passed; names it, what it received, and the first of the images.
    """
    num_images = {split: sum(counts.values()) for split, counts in report.class_counts.items()}
    _check_share(
        [f"{file.path} ({file.kind})" for file in report.unreadable],
        sum(num_images.values()) + len(report.unreadable),
        settings.max_unreadable_fraction,
        ("files are unreadable", "max_unreadable_fraction", "fix or remove them"),
        details,
        one_is_allowed=True,
    )
    for name, count in report.class_counts["train"].items():
        if count < settings.min_images_per_class:
            raise DatasetError(
                f"class {name!r} has {count} images in train, need at least {settings.min_images_per_class} "
                f"(min_images_per_class); add images, remove the class or lower the limit; see {details}"
            )
    for split in ("val", "test"):
        _check_share(
            [f"{leak.path} = {leak.other_path}" for leak in report.leaks if leak.split == split],
            num_images[split],
            settings.max_leaked_fraction,
            (f"images of {split} are also in another split", "max_leaked_fraction", "remove them from one"),
            details,
        )
    if report.imbalance > settings.max_imbalance:
        counts = report.class_counts["train"]
        largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        raise DatasetError(
            f"class {largest!r} has {counts[largest]:,} images in train and {smallest!r} has {counts[smallest]:,}, "
            f"{report.imbalance:.4g} times fewer; at most {settings.max_imbalance:g} are allowed (max_imbalance); "
            f"balance them or raise the limit; see {details}"
        )


def check_contrast(
    images: npt.NDArray[np.uint8], statistics: TrainingStatistics, files: Sequence[Path], details: str
) -> None:
    """Refuse pictures that are black, of one colour or all the same once they are decoded to 8 bits.

    Most often their files have 16 bits, of which the values fill the lower part: a decoder keeps the high byte.

    Args:
        images: of train, (N, H, W, 3), N ≥ 1; may be mapped.
        files: of those images, or none where they never were files.
        details: where the whole report is, for the message.
    Raises:
        DatasetError: the pictures hardly differ; names the range of values, and how to fix it.
    """
    hardly_differ = max(statistics.channel_std) < _LOW_STD or all(np.array_equal(image, images[0]) for image in images)
    if not hardly_differ and statistics.brightness_deciles[-1] >= _DARK:
        return
    highest, most = 0, 255
    for file in files[:: max(1, len(files) // _LOOK_INTO)]:
        with suppress(ImageError):  # gone since, or one that only just could be decoded
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


def _check_share(
    offenders: list[str],
    total: int,
    limit: float,
    words: tuple[str, str, str],
    details: str,
    *,
    one_is_allowed: bool = False,
) -> None:
    what, setting, remedy = words
    if one_is_allowed and limit and len(offenders) == 1:  # of less than 100 files, one is over 1 %
        return
    if total and len(offenders) / total > limit:
        raise DatasetError(
            f"{len(offenders):,} of {total:,} {what}, more than {limit:.4g} ({setting}): {first_few(offenders)}; "
            f"{remedy}, or raise the limit; see {details}"
        )


def first_few(items: Sequence[str], number: int = 3) -> str:
    """Return the first items of a list as text."""
    return ", ".join(items[:number]) + (", …" if len(items) > number else "")


def compute_statistics(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], num_classes: int
) -> TrainingStatistics:
    """Measure the training images, a few at a time.

    An image's brightness is the mean of all its values, the three channels alike.

    Args:
        images: shape (N, H, W, 3), uint8; may be a mapped file larger than the memory. N ≥ 1.
        labels: shape (N,).
    """
    num_pixels = images.shape[1] * images.shape[2]
    step = max(1, _CHUNK_BYTES // (num_pixels * 3))
    histogram = np.zeros((3, 256))  # of each channel; exact, as are the sums that follow from it
    sums = np.empty(len(images))
    for start in range(0, len(images), step):
        chunk = np.ascontiguousarray(images[start : start + step])
        # Pillow counts several times faster than NumPy adds along an axis of three.
        counted = Image.fromarray(chunk.reshape(-1, images.shape[2], 3)).histogram()
        histogram += np.array(counted).reshape(3, 256)
        sums[start : start + step] = chunk.reshape(len(chunk), -1).sum(axis=1, dtype=np.uint64)
    total = len(images) * num_pixels
    values = np.arange(256)
    mean = histogram @ values / total
    std = np.sqrt(np.maximum(histogram @ values**2 / total - mean**2, 0.0))
    brightness = sums / (3 * num_pixels)
    counts = Counter(labels.tolist())
    return TrainingStatistics(
        num_images=len(images),
        channel_mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        channel_std=(float(std[0]), float(std[1]), float(std[2])),
        brightness_deciles=tuple(float(value) for value in np.percentile(brightness, range(0, 101, 10))),
        class_shares=tuple(counts[label] / len(images) for label in range(num_classes)),
    )
