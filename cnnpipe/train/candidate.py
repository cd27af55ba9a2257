"""What would be kept if training ended now, and how good it is."""

from __future__ import annotations

from typing import Final

from cnnpipe.train.backend import keras, pipeline
from cnnpipe.train.batches import Batches
from cnnpipe.train.lanes import spread
from cnnpipe.train.presets import Recipe, compile_model

__all__ = ["Candidate"]

_NEW_SHARE: Final = 0.5
"""Of an epoch's weights in their running average."""


class Candidate:
    """The model that is saved, beside the network that is trained: in float32, of one image size, without augmentation.

    Args:
        model: is saved.
        network: of the same weights, is validated: in the precision of training, as float32 may take twice the time,
            and without what `models.average_flips` made of it, which does so too. The model is better then.
        trained: the network in training, with as many weights as `network`, in their order.
        batches: for validation.
        recipe: of the training, whose loss is that of validation too.
        lanes: over which validation is spread.
    """

    def __init__(
        self,
        model: keras.Model,
        network: keras.Model,
        trained: keras.Model,
        batches: Batches,
        recipe: Recipe,
        lanes: int,
    ) -> None:
        self.model, self._network = model, network
        self._trained, self._batches, self._average = trained, pipeline(batches), recipe.average_weights
        images = keras.Input(network.input_shape[1:], dtype="uint8")
        self._validated = keras.Model([images], spread(network, lanes)([images]))
        compile_model(self._validated, recipe)

    def take_weights(self, epoch: int) -> None:
        """Take over the weights as they are after an epoch of training, 0 for the first."""
        weights = self._trained.get_weights()
        if self._average and epoch > 0:
            pairs = zip(weights, self.model.get_weights(), strict=True)
            weights = [_NEW_SHARE * new + (1 - _NEW_SHARE) * average for new, average in pairs]
        self.model.set_weights(weights)
        self._network.set_weights(weights)

    def validate(self) -> dict[str, float]:
        """Return `val_accuracy` and `val_loss` of the network on the validation images."""
        scores = self._validated.evaluate(self._batches, verbose=0, return_dict=True)
        return {f"val_{name}": float(scores[name]) for name in ("accuracy", "loss")}
