"""The peer of `baseline`: the classic tutorial's script, with its network, settings, float arrays and `fit`.

Run in its own process by `benchmarks.training`; prints one JSON object on the last line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from tensorflow import keras

from benchmarks.arithmetic import count_flops

TUTORIAL_EPOCHS = 15


def main(prepared: Path, epochs: int, seed: int) -> None:
    """Train on a prepared dataset as the tutorial does and score the test split.

    Args:
        epochs: number of epochs; 0: the tutorial's.
    """
    epochs = epochs or TUTORIAL_EPOCHS
    keras.utils.set_random_seed(seed)

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = np.load(prepared / f"{split}_images.npy"), np.load(prepared / f"{split}_labels.npy")
        return images / 255.0, keras.utils.to_categorical(labels)  # float64, as in the tutorial

    train, val, test = arrays("train"), arrays("val"), arrays("test")
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(train[0].shape[1:]),
            layers.Conv2D(32, (3, 3), padding="same", activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), padding="same", activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(train[1].shape[1], activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    began = time.perf_counter()
    val_accuracies: list[tuple[float, float]] = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda _, logs: val_accuracies.append((time.perf_counter() - began, logs["val_accuracy"]))
    )
    model.fit(*train, epochs=epochs, batch_size=64, validation_data=val, verbose=0, callbacks=[watch])
    seconds = time.perf_counter() - began
    _, accuracy = model.evaluate(*test, verbose=0)
    images = epochs * len(train[0])
    work = {"images": images, "flops": images * count_flops(model)}
    scores = {"test_accuracy": accuracy, "val_accuracies": val_accuracies}
    result = {"precision": keras.config.floatx(), "fit_seconds": seconds, **scores, **work}
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
