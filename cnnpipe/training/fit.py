"""Train a network on a prepared dataset: seeded, checkpointed after every epoch, its history on the disk.

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

from cnnpipe.config import RetrainSettings, TrainSettings, dump_toml
from cnnpipe.environment import describe_environment
from cnnpipe.errors import TrainingError
from cnnpipe.storage import storage_errors, write_file, write_json, write_text
from cnnpipe.training.backend import keras, make_repeatable, select_device
from cnnpipe.training.checkpoints import Checkpoints, Epochs
from cnnpipe.training.datasets import PreparedDataset
from cnnpipe.training.download import Progress
from cnnpipe.training.models import Augmentation, build_model
from cnnpipe.training.recipes import Recipe, compile_model, resolve_recipe

__all__ = ["HISTORY_COLUMNS", "TrainingResult", "train_model"]

logger = logging.getLogger(__name__)

HISTORY_COLUMNS: Final = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds")
"""Columns of `history.csv`: Keras' own names, then the rate at the end of the epoch and its wall time."""


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training."""

    run: Path
    epochs: int
    """That were trained, in all processes that had a part in it."""
    resumed_after: int
    """Epochs that an earlier process had done; 0 without one."""
    stopped: str | None
    """Why before the last epoch of the recipe; None if it was reached."""
    best_epoch: int
    """1 for the first."""
    val_accuracy: float
    """Of the checkpoint that was kept, 0-1."""
    num_parameters: int
    seconds: float
    images_per_second: float
    """Training images a second, validation and checkpoints not counted out."""


def train_model(
    settings: RetrainSettings,
    dataset: PreparedDataset,
    run: Path,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train a network, fresh or from its checkpoint, and keep the weights of its best epoch.

    On a CPU the same seed gives the same weights, bit for bit, on the same kind of processor with as many cores and the
    same packages, whether it was broken off or not.

    Writes to the run folder: `config.toml`, `environment.json`, `history.csv` after every epoch, and `model.keras`
    whenever the validation accuracy has improved (at equal accuracy, when the loss has).

    Args:
        settings: the whole retraining's, so that `config.toml` repeats it; training uses `settings.train`.
        dataset: prepared; its test split is not opened.
        run: an existing folder.
        progress: called about ten times a second with the number of training images seen so far, all epochs together.
        checkpoints: where to go on from, and to save to after every epoch; None does neither.
    Raises:
        TrainingError: the loss became infinite or not a number, and the best weights so far are kept; or the checkpoint
            is damaged.
        ProviderError: the device asked for cannot be used.
        StorageError: the run folder cannot be written.
    """
    recipe = resolve_recipe(settings.train, dataset.num_images["train"])
    device = select_device(settings.train.device)
    write_text(run / "config.toml", dump_toml(settings))
    write_json(
        run / "environment.json", {**describe_environment(), "device": device, "dataset": str(dataset.path.resolve())}
    )
    make_repeatable(settings.train.seed, device)
    images = dataset.images("train")
    model = build_model(settings.train.preset, dataset.image_size, len(dataset.class_names), images)
    _draw_weights(model, settings.train.seed)
    model.summary(print_fn=lambda text, **_: logger.info("\n%s", text), line_length=78)
    logger.info("training on %s with the %s backend: %s", device, keras.backend.backend(), asdict(recipe))

    trainable = _training_model(model, recipe, settings.train.seed, len(images))
    done = checkpoints.restore(trainable) if checkpoints else Epochs()
    record = _Record(model, run, recipe, settings.train, dataset.num_images["train"], progress, checkpoints, done)
    if done.rows:
        logger.info("epochs 1 to %d are done", len(done.rows))
        record.write_files()
    if len(done.rows) < recipe.epochs and record.reason_to_stop() is None:
        _fit(trainable, dataset, recipe, settings.train, record)
    epochs = record.epochs
    return TrainingResult(
        run=run,
        epochs=len(epochs.rows),
        resumed_after=len(done.rows),
        stopped=record.reason_to_stop() if len(epochs.rows) < recipe.epochs else None,
        best_epoch=epochs.best_epoch,
        val_accuracy=epochs.best_accuracy,
        num_parameters=model.count_params(),
        seconds=epochs.seconds,
        images_per_second=len(epochs.rows) * dataset.num_images["train"] / epochs.seconds,
    )


def _draw_weights(model: keras.Model, seed: int) -> None:
    """Draw the kernels that are trained anew, each from the seed and its place in the network.

    Keras draws them from seeds of Python's global generator, from which other threads of the process draw too.
    """
    for place, layer in enumerate(model.layers):
        initializer = getattr(layer, "kernel_initializer", None)
        if layer.trainable and initializer is not None and "seed" in initializer.get_config():
            own = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
            initializer = type(initializer).from_config({**initializer.get_config(), "seed": own})
            layer.kernel.assign(initializer(layer.kernel.shape, layer.kernel.dtype))


def _class_weights(labels: npt.NDArray[np.int64]) -> dict[int, float]:
    """Return what an image of each class weighs, so that every class weighs the same and an image 1 on average."""
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(classes.tolist(), (len(labels) / (len(classes) * counts)).tolist(), strict=True))


def _fit(
    trainable: keras.Model, dataset: PreparedDataset, recipe: Recipe, settings: TrainSettings, record: _Record
) -> None:
    """Train the epochs that are not done."""
    batches = _batches(dataset, "train", recipe, settings.seed)
    trainable.fit(
        batches,
        validation_data=_batches(dataset, "val", recipe, seed=None),
        initial_epoch=len(record.epochs.rows),
        epochs=recipe.epochs,
        class_weight=_class_weights(dataset.labels("train")) if settings.class_weights else None,
        # Keras would shuffle the batches with that generator too.
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: batches.shuffle(epoch)), record],
    )


def _training_model(model: keras.Model, recipe: Recipe, seed: int, num_images: int) -> keras.Model:
    """Compile the network for training, behind its augmentation if there is any; the weights are the same objects."""
    trainable = model
    if recipe.augment:
        images = keras.Input(model.input_shape[1:], dtype="uint8")
        trainable = keras.Model(images, model(Augmentation(seed=seed)(images)), name=f"augmented_{model.name}")
    compile_model(trainable, recipe, math.ceil(num_images / recipe.batch_size))
    return trainable


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split, straight from its memory-mapped bytes; every image once an epoch, the last batch short."""

    def __init__(
        self, images: npt.NDArray[np.uint8], one_hot: npt.NDArray[np.float32], batch_size: int, seed: int | None
    ) -> None:
        super().__init__(workers=1)
        self._images, self._one_hot, self._batch_size = images, one_hot, batch_size
        self._seed = seed
        self._order = np.arange(len(images))

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        chosen = np.sort(self._order[index * self._batch_size : (index + 1) * self._batch_size])
        return self._images[chosen], self._one_hot[chosen]  # (B, H, W, 3) uint8, (B, classes) float32

    def shuffle(self, epoch: int) -> None:
        """Take the order of an epoch, 0 for the first, which follows from it and the seed alone."""
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._order))


def _batches(dataset: PreparedDataset, split: str, recipe: Recipe, seed: int | None) -> _Batches:
    """Return a split's batches; shuffled anew each epoch if there is a seed, else in order and larger."""
    one_hot = np.eye(len(dataset.class_names), dtype=np.float32)[dataset.labels(split)]
    batch_size = recipe.batch_size if seed is not None else max(recipe.batch_size, 256)
    return _Batches(dataset.images(split), one_hot, batch_size, seed)


class _Record(keras.callbacks.Callback):  # type: ignore[misc]
    """Write checkpoint, best weights and history after every epoch, report progress, stop where there is a reason."""

    def __init__(
        self,
        model: keras.Model,
        run: Path,
        recipe: Recipe,
        settings: TrainSettings,
        num_images: int,
        progress: Progress | None,
        checkpoints: Checkpoints | None,
        done: Epochs,
    ) -> None:
        super().__init__()
        self._saved_model = model  # without the augmentation
        self._run, self._recipe, self._settings, self._num_images = run, recipe, settings, num_images
        self._progress = progress or (lambda *_: None)
        self._checkpoints = checkpoints
        self.epochs = done
        self._started = time.perf_counter() - done.seconds
        self._epoch_started = self._reported = 0.0
        self._epoch = 0

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
        self.epochs = Epochs((*self.epochs.rows, figures), time.perf_counter() - self._started)
        if self._checkpoints:
            self._checkpoints.save(self.model, self.epochs)
        self.write_files()
        logger.info(
            "epoch %d/%d  accuracy %.4f  loss %.4f  val_accuracy %.4f  val_loss %.4f  %.0f images/s%s",
            *(epoch + 1, self._recipe.epochs, figures["accuracy"], figures["loss"]),
            *(figures["val_accuracy"], figures["val_loss"], self._num_images / figures["seconds"]),
            "" if self.epochs.epochs_since_best else "  (best)",
        )
        self._report(self._num_images)
        reason = self.reason_to_stop()
        if reason is not None and epoch + 1 < self._recipe.epochs:
            logger.info("stopped after epoch %d: %s", epoch + 1, reason)
            self.model.stop_training = True

    def write_files(self) -> None:
        """Write what there is after an epoch; again where a process was broken off after the checkpoint, before this.

        So `model.keras` is of the best epoch that the checkpoint tells of, even if one done again comes out otherwise.
        """
        if self.epochs.epochs_since_best == 0:
            path = self._run / "model.keras"
            with write_file(path) as temporary, storage_errors(path):
                self._saved_model.save(temporary)
        self._write_history()  # after the weights: an epoch that it tells of is not lost

    def reason_to_stop(self) -> str | None:
        """Return why no epoch should follow, by the settings."""
        patience, max_minutes = self._settings.patience, self._settings.max_minutes
        if patience is not None and self.epochs.epochs_since_best >= patience:
            return f"no better weights by validation for {patience} epochs than those of epoch {self.epochs.best_epoch}"
        if max_minutes is not None and self.epochs.seconds >= 60.0 * max_minutes:
            return f"{self.epochs.seconds / 60.0:.1f} of {max_minutes:g} minutes have passed"
        return None

    def _report(self, done_in_epoch: int) -> None:
        best = f", best val_accuracy {self.epochs.best_accuracy:.4f}" if self.epochs.rows else ""
        self._progress(
            f"train: epoch {self._epoch + 1}/{self._recipe.epochs}{best}",
            self._epoch * self._num_images + done_in_epoch,
            self._recipe.epochs * self._num_images,
        )

    def _stop_unless_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            best = self.epochs.best_epoch
            kept = f"the weights of epoch {best} are kept" if best else "nothing was learned"
            raise TrainingError(
                f"the loss became {loss} in epoch {self._epoch + 1}; {kept} in {self._run}; "
                "try a smaller --learning-rate"
            )

    def _write_history(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs.rows)
        write_text(self._run / "history.csv", text.getvalue())
