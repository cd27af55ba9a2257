"""Batches split over the cores of a CPU: neither predictions nor what is learned may change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.train.backend import count_parts, keras, split_batch
from cnnpipe.train.networks import build_network, measure_input

IMAGES = np.random.default_rng(0).integers(0, 256, (37, 16, 16, 3), dtype=np.uint8)
ONE_HOT = np.eye(3, dtype=np.float32)[np.arange(37) % 3]


def in_parts(network: keras.Model, number: int) -> keras.Model:
    images = keras.Input((16, 16, 3), dtype="uint8")
    return keras.Model([images], split_batch(network, number)([images]))


@pytest.mark.parametrize("preset", ["baseline", "fast"])
@pytest.mark.parametrize("number", [2, 3])
def test_parts_give_the_networks_own_probabilities_in_the_order_of_the_images(preset: str, number: int) -> None:
    network = build_network(preset, (16, 16), 3, measure_input(IMAGES))
    model = in_parts(network, number)

    assert model.output_shape == (None, 3)
    np.testing.assert_allclose(model.predict(IMAGES, verbose=0), network.predict(IMAGES, verbose=0), atol=1e-6)


def test_a_step_in_parts_is_a_step_of_the_whole_batch() -> None:
    network = build_network("baseline", (16, 16), 3, measure_input(IMAGES))
    begun, learned = network.get_weights(), []
    for model in (network, in_parts(network, 2)):
        network.set_weights(begun)
        model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
        model.train_on_batch(IMAGES, ONE_HOT)
        learned.append(network.get_weights())

    for whole, parts, before in zip(*learned, begun, strict=True):
        np.testing.assert_allclose(whole, parts, atol=1e-6)
        assert np.abs(whole - before).max() > 1e-5


def test_a_batch_has_two_parts_if_each_has_sixteen_images() -> None:
    assert count_parts(15, "cpu") == count_parts(31, "cpu") == 1
    assert count_parts(32, "cpu") == count_parts(10_000, "cpu") == 2


@pytest.mark.slow
def test_the_number_of_cores_does_not_change_the_weights(digits: PreparedDataset, tmp_path: Path) -> None:
    script = """
import hashlib, sys
from pathlib import Path
import cnnpipe.machine
cnnpipe.machine.usable_cores = lambda: int(sys.argv[1])  # threads; of real cores there are no more than there are
from cnnpipe.settings import RetrainSettings, TrainSettings
from cnnpipe.prepare.dataset import load_prepared
from cnnpipe.train.fit import train_model
run = Path(sys.argv[3]) / sys.argv[1]
run.mkdir()
train = TrainSettings(preset="fast", epochs=1, batch_size=512, precision="float32")
train_model(RetrainSettings(train=train), load_prepared(Path(sys.argv[2])), run)
print((run / "history.csv").read_text().splitlines()[1].rsplit(",", 1)[0])
"""
    command = [sys.executable, "-c", script]
    histories = [
        subprocess.run([*command, cores, str(digits.path), str(tmp_path)], capture_output=True, text=True, check=True)
        for cores in ("2", "32")
    ]
    two, many = ([float(value) for value in each.stdout.splitlines()[-1].split(",")] for each in histories)
    assert many == pytest.approx(two, rel=1e-3)


def test_a_gpu_takes_the_whole_batch() -> None:
    assert count_parts(10_000, "cuda:0") == 1
