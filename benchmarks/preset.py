"""Train a preset once, measured like `benchmarks.tutorial`; prints one JSON object on the last line.

`python -m benchmarks.preset PREPARED EPOCHS PRESET SEED [MAX_MINUTES]`
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

from benchmarks.arithmetic import count_flops
from cnnpipe.evaluate.evaluation import evaluate_run
from cnnpipe.prepare.dataset import PreparedDataset, load_prepared
from cnnpipe.settings import RetrainSettings, TrainSettings
from cnnpipe.train.backend import keras
from cnnpipe.train.networks import build_network, measure_input
from cnnpipe.train.presets import resolve_recipe, small_size
from cnnpipe.train.stage import train_run


def main(prepared: Path, epochs: int, preset: str, seed: int, max_minutes: float | None = None) -> None:
    """Train a preset on a prepared dataset and score the test split; `fit_seconds` include compiling and checkpoints.

    Args:
        epochs: number of epochs; 0: the preset's.
        max_minutes: time for training; None: no limit.
    """
    values = {"preset": preset, "epochs": epochs or None, "seed": seed, "max_minutes": max_minutes}
    train = TrainSettings.model_validate(values)
    settings = RetrainSettings(train=train)
    with tempfile.TemporaryDirectory() as folder:
        result = train_run(settings, prepared, Path(folder))
        accuracy = evaluate_run(result.run).accuracy
        precision = json.loads((result.run / "environment.json").read_bytes())["precision"]
        history = list(csv.DictReader((result.run / "history.csv").read_text(encoding="utf-8").splitlines()))
    ends = accumulate(float(row["seconds"]) for row in history)
    images = round(result.seconds * result.images_per_second)
    report = {
        "precision": precision,
        "fit_seconds": result.seconds,
        "test_accuracy": accuracy,
        "val_accuracies": list(zip(ends, (float(row["val_accuracy"]) for row in history), strict=True)),
        "images": images,
        "flops": images * flops_for_each_image(load_prepared(prepared), train),
    }
    print(json.dumps(report))


def flops_for_each_image(dataset: PreparedDataset, train: TrainSettings) -> float:
    """Return the floating-point operations of training per image, on average over all epochs.

    A time limit changes the fraction of small images by a few percent, which is not counted.
    """
    total = 0.0
    statistics = measure_input(dataset.images("train")[:1])  # any image: the work is the same
    whole = dataset.image_size
    recipe = resolve_recipe(train, dataset.num_images["train"])
    small = recipe.small_until(whole)
    for image_size, fraction in ((small_size(whole), small), (whole, 1.0 - small)):
        if fraction:
            like = (recipe.network, whole, len(dataset.class_names), statistics)
            network = build_network(*like, any_size=image_size != whole)
            given = keras.Input((*image_size, 3), dtype="uint8")
            total += fraction * count_flops(keras.models.clone_model(network, given))
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), *map(float, sys.argv[5:]))
