"""How closely one model repeats another on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cnnpipe.evaluate.predict import Probabilities

__all__ = ["Parity", "compare_probabilities"]

_MAX_DISAGREEMENTS_LISTED: Final = 10


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
