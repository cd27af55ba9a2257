"""Training on several devices, here two of one CPU, in processes of their own: devices are set once in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnpipe.prepare.dataset import PreparedDataset

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from cnnpipe.settings import RetrainSettings, TrainSettings
from cnnpipe.train.backend import keras, replicated
from cnnpipe.prepare.dataset import load_prepared
from cnnpipe.train.fit import train_model
from cnnpipe.evaluate.evaluation import predict_keras

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))
dataset, run = load_prepared(Path(sys.argv[2])), Path(sys.argv[3])
run.mkdir()
train = TrainSettings.model_validate_json(sys.argv[4])
result = train_model(RetrainSettings(train=train), dataset, run)
model = keras.saving.load_model(run / "model.keras")
network = next((layer for layer in model.layers if isinstance(layer, keras.Model)), model)  # without mirror images
accuracy = np.mean(predict_keras(network, dataset.images("val")).argmax(axis=1) == dataset.labels("val"))
weights = np.concatenate([each.ravel() for each in model.get_weights()])
np.save(run / "weights.npy", weights)

with replicated() as replicas:
    pass
print(json.dumps({"replicas": replicas, "kept": result.val_accuracy, "accuracy": accuracy}))
"""


def train_on(devices: int, digits: PreparedDataset, run: Path, **train: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, str(devices), str(digits.path), str(run), json.dumps(train)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


def test_two_devices_learn_what_one_learns(digits: PreparedDataset, tmp_path: Path) -> None:
    settings = {"epochs": 1, "batch_size": 100, "precision": "float32"}
    one = train_on(1, digits, tmp_path / "one", **settings)
    two = train_on(2, digits, tmp_path / "two", **settings)

    assert (one["replicas"], two["replicas"]) == (1, 2)
    first, second = (np.load(tmp_path / name / "weights.npy") for name in ("one", "two"))
    # Two devices leave out one of 1,151 images and sum in another order, which Adam amplifies for small gradients:
    # so the mean is compared, to 12 steps of about 1e-3.
    assert np.abs(first - second).mean() < 5e-4
    assert two["kept"] == pytest.approx(two["accuracy"], abs=1e-6)


@pytest.mark.slow
def test_devices_share_batches_of_fast(digits: PreparedDataset, tmp_path: Path) -> None:
    result = train_on(2, digits, tmp_path / "run", preset="fast", epochs=2, batch_size=64, precision="float32")

    assert result["replicas"] == 2
    assert result["kept"] == pytest.approx(result["accuracy"], abs=1e-6)


INTERRUPTED = """
import json, sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from cnnpipe.settings import RetrainSettings, TrainSettings
from cnnpipe.train.stage import train_run
from cnnpipe.train.backend import keras

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
settings = RetrainSettings(train=TrainSettings(preset="fast", epochs=3, batch_size=64, seed=3))

class InterruptedForTestError(Exception):
    pass

def interrupt(what, done, total):
    if "epoch 3/" in what:
        raise InterruptedForTestError

results = []
for name, interrupted in (("uninterrupted", False), ("interrupted", True)):
    if interrupted:
        try:
            train_run(settings, Path(sys.argv[1]), Path(sys.argv[2]) / name, interrupt)
        except InterruptedForTestError:
            pass
    results.append(train_run(settings, Path(sys.argv[1]), Path(sys.argv[2]) / name))
weights = [keras.saving.load_model(result.run / "model.keras").get_weights() for result in results]
equal = [bool(np.array_equal(one, other)) for one, other in zip(*weights, strict=True)]
print(json.dumps({"resumed_after": [result.resumed_after for result in results], "equal": equal}))
"""


@pytest.mark.slow
def test_interrupted_on_two_devices_it_ends_with_the_same_weights(digits: PreparedDataset, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(digits.path), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["resumed_after"] == [0, 2]
    assert values["equal"]
    assert all(values["equal"])
