"""Calibrate a trained network: fit the temperature of its logits on validation images.

Label smoothing over few epochs leaves a network whose probabilities are far lower than its accuracy.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import softmax

__all__ = ["apply_temperature", "fit_temperature"]

_BOUNDS: Final = (0.05, 20.0)
"""Lowest and highest temperature, far beyond that of any trained network."""

_TINY: Final = 1e-30
"""Added to probabilities before the logarithm; float32 has hardly any smaller number."""

Labels = npt.NDArray[np.int64]  # (N,)


def fit_temperature(
    views: npt.NDArray[np.float32], labels: Labels, weights: npt.NDArray[np.float64] | None = None
) -> float:
    """Return the temperature that makes the labels most likely.

    Targets are slightly below 1, and closer to it the more images there are: otherwise the probabilities of a network
    that is right about each of a few images would all become 1. Sources: Guo et al. 2017, arXiv:1706.04599, section
    4.2; for the targets Platt 1999, Probabilistic Outputs for Support Vector Machines, section 2.2.

    Args:
        views: (V, N, classes), probabilities for each of V views of the images, whose mean is the prediction.
        labels: (N,), index of the actual class.
        weights: (V,), of the views in the mean; None weighs them alike.
    Returns:
        Divisor of the logits, 0.05-20; below 1 it makes probabilities more certain.
    """
    num_images, num_classes = views.shape[1:]
    doubt = 1.0 / (num_images + 2)
    targets = np.full((num_images, num_classes), doubt / num_classes)
    targets[np.arange(num_images), labels] += 1.0 - doubt

    def loss(log_temperature: float) -> float:
        probabilities = apply_temperature(views, math.exp(log_temperature), weights)
        return float(-(targets * np.log(probabilities + _TINY)).sum() / num_images)

    found = minimize_scalar(loss, bounds=np.log(_BOUNDS), method="bounded")
    return math.exp(found.x)


def apply_temperature(
    views: npt.NDArray[np.float32], temperature: float, weights: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Return the mean over views of the probabilities at a temperature.

    Args:
        views: (V, N, classes), probabilities at temperature 1.
        weights: (V,), of the views in the mean; None weighs them alike.
    Returns:
        (N, classes), each row of sum 1.
    """
    logits = np.log(views.astype(np.float64) + _TINY) / temperature  # up to a constant in each row
    mean: npt.NDArray[np.float64] = np.average(softmax(logits, axis=-1), axis=0, weights=weights)
    return mean
