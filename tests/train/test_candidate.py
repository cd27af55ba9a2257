"""What would be kept: last weights or averaged ones, and their validation."""

from __future__ import annotations

import numpy as np
import pytest

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.settings import TrainSettings
from cnnpipe.train.backend import keras
from cnnpipe.train.batches import open_batches
from cnnpipe.train.fit import Candidate
from cnnpipe.train.networks import average_flips, build_network, measure_input
from cnnpipe.train.presets import resolve_recipe


def candidate_of(
    trained: keras.Model, digits: PreparedDataset, *, average: bool = False, smoothing: float = 0.0, flips: bool = False
) -> Candidate:
    network, kept = (build_network("baseline", (32, 32), 10, measure_input(digits.images("train"))) for _ in range(2))
    model = average_flips(kept) if flips else kept
    train = TrainSettings(average_weights=average, label_smoothing=smoothing)
    recipe = resolve_recipe(train, digits.num_images["train"])
    return Candidate(model, network, trained, open_batches(digits, "val", 100), recipe, lanes=2)


@pytest.fixture
def trained(digits: PreparedDataset) -> keras.Model:
    return build_network("baseline", (32, 32), 10, measure_input(digits.images("train")))


def test_without_averages_it_has_the_last_weights(trained: keras.Model, digits: PreparedDataset) -> None:
    candidate = candidate_of(trained, digits)
    for epoch in range(2):
        trained.set_weights([np.full_like(each, epoch + 1) for each in trained.get_weights()])
        candidate.take_weights(epoch)

    assert all((each == 2.0).all() for each in candidate.model.get_weights())


def test_averages_forget_the_first_epochs(trained: keras.Model, digits: PreparedDataset) -> None:
    candidate = candidate_of(trained, digits, average=True)
    for epoch in range(3):
        trained.set_weights([np.full_like(each, 2.0**epoch) for each in trained.get_weights()])
        candidate.take_weights(epoch)

    # Half of 4, a quarter of 2, a quarter of 1, which came first.
    assert all((each == 2.75).all() for each in candidate.model.get_weights())
    assert all((each == 4.0).all() for each in trained.get_weights())


@pytest.mark.parametrize("flips", [False, True])
def test_validation_is_of_the_weights_that_were_taken_and_of_no_mirror_images(
    trained: keras.Model, digits: PreparedDataset, *, flips: bool
) -> None:
    candidate = candidate_of(trained, digits, smoothing=0.1, flips=flips)
    candidate.take_weights(0)
    scores = candidate.validate()

    labels = np.asarray(digits.labels("val"))
    probabilities = trained.predict(digits.images("val"), verbose=0)
    smooth = 0.9 * np.eye(10)[labels] + 0.01
    assert scores["val_accuracy"] == pytest.approx(np.mean(probabilities.argmax(axis=1) == labels), abs=1e-6)
    assert scores["val_loss"] == pytest.approx(-np.mean(np.sum(smooth * np.log(probabilities), axis=1)), rel=1e-4)
