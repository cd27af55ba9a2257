"""One training of a preset, measured as `benchmarks.tutorial` is; prints one JSON object on the last line."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

from benchmarks.flops import count_flops
from cnnpipe.config import RetrainSettings, TrainSettings
from cnnpipe.training.backend import keras
from cnnpipe.training.datasets import PreparedDataset, load_prepared
from cnnpipe.training.models import build_network, measure_input
from cnnpipe.training.recipes import resolve_recipe, small_size
from cnnpipe.training.stages import evaluate_run, train_run


def main(prepared: Path, epochs: int, preset: str, seed: int) -> None:
    """Train a preset on a prepared dataset and score the test split; `fit_seconds` include compiling and checkpoints.

    Args:
        epochs: 0 is the preset's own number.
    """
    train = TrainSettings.model_validate({"preset": preset, "epochs": epochs or None, "seed": seed})
    settings = RetrainSettings(train=train)
    with tempfile.TemporaryDirectory() as folder:
        result = train_run(settings, prepared, Path(folder))
        accuracy = evaluate_run(result.run).accuracy
        history = list(csv.DictReader((result.run / "history.csv").read_text(encoding="utf-8").splitlines()))
    ends = accumulate(float(row["seconds"]) for row in history)
    dataset = load_prepared(prepared)
    num_images = dataset.num_images["train"]
    report = {
        "fit_seconds": result.seconds,
        "test_accuracy": accuracy,
        "course": list(zip(ends, (float(row["val_accuracy"]) for row in history), strict=True)),
        "images": result.epochs * num_images,
        "flops": num_images * flops_for_each_image(dataset, train),
    }
    print(json.dumps(report))


def flops_for_each_image(dataset: PreparedDataset, train: TrainSettings) -> int:
    """Return the work that training does for one image, in all epochs."""
    total = 0
    statistics = measure_input(dataset.images("train")[:1])  # no matter which: the work is the same
    recipe = resolve_recipe(train, dataset.num_images["train"])
    small = recipe.small_epochs(dataset.image_size, recipe.epochs)
    for image_size, epochs in ((small_size(dataset.image_size), small), (dataset.image_size, recipe.epochs - small)):
        if epochs:
            smaller = image_size != dataset.image_size
            like = (train.preset, dataset.image_size, len(dataset.class_names), statistics)
            given = keras.Input((*image_size, 3), dtype="uint8")
            total += epochs * count_flops(keras.models.clone_model(build_network(*like, any_size=smaller), given))
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
