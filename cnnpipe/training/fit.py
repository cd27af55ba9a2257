"""Train a network on a prepared dataset: seeded, checkpointed by validation accuracy, its history on the disk.

Backend-neutral: nothing here knows whether TensorFlow or JAX does the arithmetic.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cnnpipe.config import RetrainSettings, dump_toml
from cnnpipe.environment import describe_environment
from cnnpipe.errors import TrainingError
from cnnpipe.storage import storage_errors, write_file, write_json, write_text
from cnnpipe.training.backend import keras, make_repeatable, select_device
from cnnpipe.training.datasets import PreparedDataset
from cnnpipe.training.download import Progress
from cnnpipe.training.models import Augmentation, Recipe, build_model, resolve_recipe

__all__ = ["HISTORY_COLUMNS", "TrainingResult", "train_model"]

logger = logging.getLogger(__name__)

HISTORY_COLUMNS: Final = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds")
"""Columns of `history.csv`: Keras' own names, then the rate at the end of the epoch and its wall time."""


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training."""

    run: Path
    epochs: int
    best_epoch: int
    """1 for the first."""
    val_accuracy: float
    """Of the checkpoint that was kept, 0-1."""
    num_parameters: int
    seconds: float
    images_per_second: float
    """Training images a second, validation and checkpoints not counted out."""


def train_model(
    settings: RetrainSettings, dataset: PreparedDataset, run: Path, progress: Progress | None = None
) -> TrainingResult:
    """Train a fresh network and keep the weights of its best epoch.

    Writes to the run folder: `config.toml`, `environment.json`, `history.csv` after every epoch, and `model.keras`
    whenever the validation accuracy has improved (at equal accuracy, when the loss has).

    Args:
        settings: the whole retraining's, so that `config.toml` repeats it; training uses `settings.train`.
        dataset: prepared; its test split is not opened.
        run: an existing folder.
        progress: called about ten times a second with the number of training images seen so far, all epochs together.
    Raises:
        TrainingError: the loss became infinite or not a number; the best checkpoint so far is kept.
        ProviderError: the device asked for cannot be used.
        StorageError: the run folder cannot be written.
    """
    recipe = resolve_recipe(settings.train)
    device = select_device(settings.train.device)
    write_text(run / "config.toml", dump_toml(settings))
    write_json(
        run / "environment.json", {**describe_environment(), "device": device, "dataset": str(dataset.path.resolve())}
    )
    make_repeatable(settings.train.seed, device)
    model = build_model(settings.train.preset, dataset.image_size, len(dataset.class_names))
    model.summary(print_fn=lambda text, **_: logger.info("\n%s", text), line_length=78)
    logger.info("training on %s with the %s backend: %s", device, keras.backend.backend(), asdict(recipe))

    trainable = _training_model(model, recipe, settings.train.seed)
    record = _Record(model, run, recipe, dataset.num_images["train"], progress)
    started = time.perf_counter()
    trainable.fit(
        _batches(dataset, "train", recipe, settings.train.seed),
        validation_data=_batches(dataset, "val", recipe, seed=None),
        epochs=recipe.epochs,
        verbose=0,
        callbacks=[record],
    )
    seconds = time.perf_counter() - started
    return TrainingResult(
        run=run,
        epochs=recipe.epochs,
        best_epoch=record.best_epoch,
        val_accuracy=record.best[0],
        num_parameters=model.count_params(),
        seconds=seconds,
        images_per_second=recipe.epochs * dataset.num_images["train"] / seconds,
    )


def _training_model(model: keras.Model, recipe: Recipe, seed: int) -> keras.Model:
    """Compile the network for training, behind its augmentation if there is any; the weights are the same objects."""
    trainable = model
    if recipe.augment:
        images = keras.Input(model.input_shape[1:], dtype="uint8")
        trainable = keras.Model(images, model(Augmentation(seed=seed)(images)), name=f"augmented_{model.name}")
    trainable.compile(
        optimizer=keras.optimizers.Adam(recipe.learning_rate),
        loss=keras.losses.CategoricalCrossentropy(),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    return trainable


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split, straight from its memory-mapped bytes; every image once an epoch, the last batch short."""

    def __init__(
        self, images: npt.NDArray[np.uint8], one_hot: npt.NDArray[np.float32], batch_size: int, seed: int | None
    ) -> None:
        super().__init__(workers=1)
        self._images, self._one_hot, self._batch_size = images, one_hot, batch_size
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._order = np.arange(len(images))
        self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        chosen = np.sort(self._order[index * self._batch_size : (index + 1) * self._batch_size])
        return self._images[chosen], self._one_hot[chosen]  # (B, H, W, 3) uint8, (B, classes) float32

    def on_epoch_end(self) -> None:
        if self._rng is not None:
            self._rng.shuffle(self._order)


def _batches(dataset: PreparedDataset, split: str, recipe: Recipe, seed: int | None) -> _Batches:
    """Return a split's batches; shuffled anew each epoch if there is a seed, else in order and larger."""
    one_hot = np.eye(len(dataset.class_names), dtype=np.float32)[dataset.labels(split)]
    batch_size = recipe.batch_size if seed is not None else max(recipe.batch_size, 256)
    return _Batches(dataset.images(split), one_hot, batch_size, seed)


class _Record(keras.callbacks.Callback):  # type: ignore[misc]
    """Write the history and the best weights after every epoch, report progress, stop at a loss that is no number."""

    def __init__(self, model: keras.Model, run: Path, recipe: Recipe, num_images: int, progress: Progress | None):
        super().__init__()
        self._saved_model = model  # without the augmentation
        self._run, self._recipe, self._num_images = run, recipe, num_images
        self._progress = progress or (lambda *_: None)
        self._rows: list[dict[str, float]] = []
        self._epoch_started = self._reported = 0.0
        self._epoch = 0
        self.best = (-1.0, -math.inf)  # (accuracy, -loss) on val
        self.best_epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self._epoch, self._epoch_started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        now = time.perf_counter()
        if now - self._reported < 0.1:
            return
        self._reported = now
        self._stop_unless_finite((logs or {}).get("loss", 0.0))
        self._report(min((batch + 1) * self._recipe.batch_size, self._num_images))

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        figures = {key: float(value) for key, value in (logs or {}).items()}
        for key in ("loss", "val_loss"):
            self._stop_unless_finite(figures[key])
        figures |= {
            "epoch": epoch + 1,
            "learning_rate": float(self.model.optimizer.learning_rate),
            "seconds": round(time.perf_counter() - self._epoch_started, 3),
        }
        self._rows.append(figures)
        score = (figures["val_accuracy"], -figures["val_loss"])
        improved = score > self.best
        if improved:
            self.best, self.best_epoch = score, epoch + 1
            path = self._run / "model.keras"
            with write_file(path) as temporary, storage_errors(path):
                self._saved_model.save(temporary)
        self._write_history()  # after the weights: an epoch that it tells of is not lost
        logger.info(
            "epoch %d/%d  accuracy %.4f  loss %.4f  val_accuracy %.4f  val_loss %.4f  %.0f images/s%s",
            *(epoch + 1, self._recipe.epochs, figures["accuracy"], figures["loss"]),
            *(figures["val_accuracy"], figures["val_loss"], self._num_images / figures["seconds"]),
            "  (best)" if improved else "",
        )
        self._report(self._num_images)

    def _report(self, done_in_epoch: int) -> None:
        best = f", best val_accuracy {self.best[0]:.4f}" if self.best_epoch else ""
        self._progress(
            f"train: epoch {self._epoch + 1}/{self._recipe.epochs}{best}",
            self._epoch * self._num_images + done_in_epoch,
            self._recipe.epochs * self._num_images,
        )

    def _stop_unless_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = f"the weights of epoch {self.best_epoch} are kept" if self.best_epoch else "nothing was learned"
            raise TrainingError(
                f"the loss became {loss} in epoch {self._epoch + 1}; {kept} in {self._run}; "
                "try a smaller --learning-rate"
            )

    def _write_history(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._run / "history.csv", text.getvalue())
