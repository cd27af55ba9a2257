"""Probabilities that mean what they say: the temperature of a trained network, fitted on validation images.

Label smoothing over few epochs leaves a network that is right far more often than its probabilities tell.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

__all__ = ["apply_temperature", "fit_temperature"]

_BOUNDS: Final = (0.05, 20.0)
"""Of temperatures, far beyond any that a trained network has."""

_TINY: Final = 1e-30
"""Added to probabilities before the logarithm: float32 has hardly anything below."""

Labels = npt.NDArray[np.int64]  # (N,)


def fit_temperature(views: npt.NDArray[np.float32], labels: Labels) -> float:
    """Return the temperature at which probabilities are likeliest to have the labels come out as they are.

    Targets are not quite 1, and the closer to it the more images there are: else the probabilities of a network that
    has every one of few images right would all become 1. Sources: Guo et al. 2017, arXiv:1706.04599, section 4.2; the
    targets are those of Platt 1999, Probabilistic Outputs for Support Vector Machines, section 2.2.

    Args:
        views: (V, N, classes), the probabilities for each of V views of the images, of which the mean will be taken.
        labels: (N,), index of the actual class.
    Returns:
        What logits are to be divided by, 0.05-20: less than 1 makes probabilities more certain.
    """
    num_images, num_classes = views.shape[1:]
    doubt = 1.0 / (num_images + 2)
    targets = np.full((num_images, num_classes), doubt / num_classes)
    targets[np.arange(num_images), labels] += 1.0 - doubt

    def loss(log_temperature: float) -> float:
        probabilities = apply_temperature(views, math.exp(log_temperature))
        return float(-(targets * np.log(probabilities + _TINY)).sum() / num_images)

    found = minimize_scalar(loss, bounds=np.log(_BOUNDS), method="bounded")
    return math.exp(found.x)


def apply_temperature(views: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    """Return the mean over views of the probabilities that a network would give with its logits divided.

    Args:
        views: (V, N, classes), probabilities at temperature 1.
    Returns:
        (N, classes), each row of sum 1.
    """
    logits = np.log(views.astype(np.float64) + _TINY) / temperature  # but for a constant in each row
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mean: npt.NDArray[np.float64] = (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=0)
    return mean
