"""The presets: epochs, batches, optimizer and its rate, loss and augmentation of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from cnnpipe.settings import TrainSettings

__all__ = ["ON_A_GPU", "PRESETS", "Recipe", "resolve_recipe", "small_size"]

_MIN_SHRUNK: Final = 16
"""Side in pixels of the smallest images that are trained at a smaller size first."""

_MIN_BATCH_SIZE: Final = 32
_MIN_STEPS_PER_EPOCH: Final = 16


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: values of the preset, overridden by the user's."""

    epochs: int
    batch_size: int
    learning_rate: float
    """Highest rate, if it changes."""
    augment: bool
    network: str = "baseline"
    """Network that `networks.build_network` builds."""
    max_shift: float = 1 / 16
    """Largest random shift of an image, as a fraction of each side; only with `augment`."""
    cutout: float = 0.0
    """Side of the hidden square of each image, as a fraction of each side; only with `augment`."""
    reflected: bool = False
    """Whether reflected pixels fill the edge that a shift uncovers, not the nearest ones; only with `augment`."""
    optimizer: Literal["adam", "muon"] = "adam"
    """`adam` has a constant rate, `muon` a triangular one."""
    weight_decay: float = 0.0
    """Decay of dense layers, for each unit of the rate; Muon sets the scale of convolutions itself."""
    label_smoothing: float = 0.0
    small_fraction: float = 0.0
    """Leading fraction of training that uses images at 3/4 resolution."""
    average_flips: bool = False
    """Whether the saved model averages its probabilities for an image and its mirror image; only with `augment`."""
    average_shifts: bool = False
    """Whether it averages over shifts too, see `networks.prediction_views`; only with `augment`."""
    average_weights: bool = False
    """Whether the running average of the weights is validated and saved, see `fit.NEW_FRACTION`."""
    calibrate: bool = False
    """Whether the saved model gets a temperature that calibrates it, see `cnnpipe.train.calibrate`."""
    min_steps: int = 0
    """Smallest number of optimizer steps: a small dataset gets smaller batches at a lower rate, and more epochs."""

    def small_until(self, image_size: tuple[int, int]) -> float:
        """Return the leading fraction of training that uses images of `small_size`, 0 for a dataset of tiny images.

        Args:
            image_size: (height, width) of the dataset.
        """
        return self.small_fraction if min(image_size) >= _MIN_SHRUNK else 0.0


def small_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) at 3/4 resolution."""
    height, width = image_size
    return height * 3 // 4, width * 3 // 4


_FAST: Final = Recipe(
    epochs=7,
    batch_size=512,
    learning_rate=0.8,
    augment=True,
    network="fast",
    optimizer="muon",
    weight_decay=5e-3,
    label_smoothing=0.1,
    small_fraction=2 / 3,
    average_flips=True,
    calibrate=True,
    min_steps=300,
)

PRESETS: Final = {
    "baseline": Recipe(epochs=15, batch_size=64, learning_rate=1e-3, augment=False),
    "fast": _FAST,
    "accurate": replace(_FAST, epochs=36, network="accurate", min_steps=600),
}
"""Recipe of each preset on a CPU.

`baseline` is the classic CIFAR-10 tutorial's, with Adam at its default rate. Source:
https://www.tensorflow.org/tutorials/images/cnn; here with "same" padding, softmax and one-hot labels.

`fast` follows the line of work on training CIFAR-10 in seconds: Page 2018 (the rate and its triangle, weight decay),
Howard 2018 (small images first), Jordan 2024, arXiv:2404.00498 (label smoothing, averaged flips), and Muon. `accurate`
does the same for longer with a deeper network.
"""

ON_A_GPU: Final[dict[str, dict[str, Any]]] = {
    "fast": {"epochs": 12},
    "accurate": {
        "epochs": 45,
        "network": "wide",
        "max_shift": 1 / 8,
        "cutout": 3 / 8,
        "reflected": True,
        "label_smoothing": 0.2,
        "average_shifts": True,
    },
}
"""Changes to the presets on a GPU, which trains an epoch in one or two seconds.

A GPU always trains on whole images: compiling a second size takes tens of seconds, and would save one. `accurate`
takes its epochs, widths, GELU, label smoothing, shifts of 4 pixels in 32, cutout of 12 (DeVries & Taylor 2017,
arXiv:1708.04552) and averaged shifts from airbench96, github.com/KellerJordan/cifar10-airbench.
"""

_CHOSEN: Final = ("epochs", "batch_size", "learning_rate", "augment", "label_smoothing", "average_weights")
"""Fields of a recipe that the user's settings override."""


def resolve_recipe(settings: TrainSettings, num_images: int, device: str = "cpu") -> Recipe:
    """Return the preset's recipe for a dataset and a device, overridden by the user's settings.

    Args:
        num_images: number of images to train on.
        device: result of `backend.select_device`.
    """
    recipe = PRESETS[settings.preset]
    if device != "cpu":
        recipe = replace(recipe, small_fraction=0.0, **ON_A_GPU.get(settings.preset, {}))
    recipe = _fit_to(recipe, num_images)
    chosen = {name: getattr(settings, name) for name in _CHOSEN}
    recipe = replace(recipe, **{name: value for name, value in chosen.items() if value is not None})
    if recipe.augment:
        return recipe
    return replace(recipe, average_flips=False, average_shifts=False)  # a mirror image may mean something else


def _fit_to(recipe: Recipe, num_images: int) -> Recipe:
    """Return the recipe with at least `min_steps` steps on a dataset of this size."""
    if recipe.min_steps <= recipe.epochs * math.ceil(num_images / recipe.batch_size):
        return recipe
    batch_size = recipe.batch_size
    while batch_size > _MIN_BATCH_SIZE and num_images < _MIN_STEPS_PER_EPOCH * batch_size:
        batch_size //= 2
    epochs = math.ceil(recipe.min_steps / math.ceil(num_images / batch_size))
    rate = recipe.learning_rate * batch_size / recipe.batch_size
    return replace(recipe, batch_size=batch_size, learning_rate=rate, epochs=max(recipe.epochs, epochs))
