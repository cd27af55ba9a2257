"""One training of a preset, measured as `benchmarks.tutorial` is; prints one JSON object on the last line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from cnnpipe.config import RetrainSettings, TrainSettings
from cnnpipe.training.datasets import load_prepared
from cnnpipe.training.stages import evaluate_run, train_run


def main(prepared: Path, epochs: int, preset: str) -> None:
    """Train a preset on a prepared dataset and score the test split; `seconds` include compiling and checkpoints.

    Args:
        epochs: 0 is the preset's own number.
    """
    settings = RetrainSettings(train=TrainSettings.model_validate({"preset": preset, "epochs": epochs or None}))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = train_run(settings, prepared, Path(folder))
        whole = time.perf_counter() - began
        accuracy = evaluate_run(result.run).accuracy
    images = result.epochs * load_prepared(prepared).num_images["train"]
    report = {"fit_seconds": result.seconds, "train_seconds": whole, "test_accuracy": accuracy, "images": images}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
