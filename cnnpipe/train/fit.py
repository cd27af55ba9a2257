"""Train a network on a prepared dataset: seeded, with a checkpoint and a row of the history after every epoch."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from cnnpipe.errors import TrainingError
from cnnpipe.evaluate.evaluation import predict_keras
from cnnpipe.machine import describe_environment
from cnnpipe.paths import escape_path
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import RetrainSettings, TrainSettings, dataset_location, dump_toml
from cnnpipe.storage import storage_errors, write_file, write_json, write_text
from cnnpipe.train.backend import (
    compiles_with_xla,
    computing_in,
    count_parts,
    keras,
    make_repeatable,
    pipeline,
    replicated,
    select_device,
    select_precision,
    split_batch,
)
from cnnpipe.train.batches import Augmentation, Batches, ResidentImages, shrink, stay_on_device
from cnnpipe.train.calibrate import apply_temperature, fit_temperature
from cnnpipe.train.checkpoints import Checkpoints, Epochs, training_state
from cnnpipe.train.networks import View, average_views, build_network, measure_input, prediction_views, set_temperature
from cnnpipe.train.optimizers import Muon, TriangularRate
from cnnpipe.train.presets import Recipe, resolve_recipe, small_size
from cnnpipe.train.schedule import Pace, Schedule, shorten

__all__ = ["HISTORY_COLUMNS", "NEW_FRACTION", "Models", "TrainingResult", "build_models", "train_model"]

logger = logging.getLogger(__name__)

HISTORY_COLUMNS: Final = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds")
"""Columns of `history.csv`: Keras' names, then the learning rate at the end of the epoch and its wall time."""

NEW_FRACTION: Final = 0.5
"""Weight of the newest epoch in the running average of the weights.

All weights are averaged, once an epoch. Keras' EMA would leave out the statistics of batch normalisation, which then
do not match the averaged weights, and costs time in every step.
"""

_MOMENTUM: Final = 0.8
_VAL_BATCH_SIZE: Final = 256
"""Validation images a batch; more do not stay in a core's cache."""

_CALIBRATION_IMAGES: Final = 2_000
"""Largest number of validation images, evenly spaced, that the temperature is fitted to: one number needs no more."""

_MEASURED_FRACTION: Final = 0.01
"""Fraction of the time budget in which the pace is measured at each image size, compiling not counted."""

_MAX_MEASURED_SECONDS: Final = 5.0

_FORWARD_FRACTION: Final = 1 / 3
"""Work of validation as a fraction of a training step's on the same images; gradients are the other two thirds."""

_REPORT_SECONDS: Final = 0.1
"""Seconds between two progress reports, each of which waits for the device."""


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a training."""

    run: Path
    """Run folder with the saved model."""
    epochs: int
    """Number of epochs trained, in all processes that took part."""
    resumed_after: int
    """Number of epochs that an interrupted process had completed; 0 if there was none."""
    stopped: str | None
    """Reason for fewer epochs than the recipe has; None if all were trained."""
    best_epoch: int
    """Number of the epoch whose weights are saved; the first is 1."""
    val_accuracy: float
    """Validation accuracy of the saved weights, 0-1, in the training precision and without averaged views."""
    num_parameters: int
    """Number of parameters of the saved model."""
    seconds: float
    """Seconds of the training, in all processes that took part."""
    images_per_second: float
    """Training images a second of all that time, validation and checkpoints included."""


@dataclass(frozen=True)
class Models:
    """The models of a training. Three views of one set of weights are trained and validated; another set is saved."""

    trained: keras.Model
    """The network in the training precision, for images of any size where small ones are trained first."""
    steps: dict[bool, keras.Model]
    """The trained network with augmentation, compiled: for small images (True), if there are any, and whole ones."""
    validated: keras.Model
    """The trained network without augmentation, compiled for validation on whole images."""
    network: keras.Model
    """The network that is saved: float32, for whole images."""
    saved: keras.Model
    """The model written to the run: that network, or its average over `views`."""
    views: list[View]
    """Views of an image whose probabilities the saved model averages; one if it averages none."""
    batches: Batches
    """Training batches."""
    rate: TriangularRate | None
    """Learning rate that depends on the length of the training; None for a constant rate."""


def train_model(
    settings: RetrainSettings,
    dataset: PreparedDataset,
    run: Path,
    progress: ProgressCallback | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train a network, from the start or from its checkpoint, and save the weights of its best epoch.

    On a CPU the same seed gives the same weights, bit for bit, on the same kind of processor with as many cores and the
    same packages, interrupted or not; except with a time budget, because the schedule then depends on the pace.

    Writes to the run folder: `config.toml`, `environment.json`, `history.csv` after every epoch, and `model.keras`
    whenever the validation accuracy has improved (at equal accuracy, when the loss has), and again at the end if the
    recipe calibrates it.

    Args:
        settings: settings of the whole retraining, written to `config.toml`; training uses `settings.train`.
        dataset: prepared dataset; its test split is not opened.
        run: existing run folder.
        progress: called about ten times a second with the number of training images seen, all epochs together.
        checkpoints: where to resume from and to save to after every epoch; None does neither.
    Raises:
        TrainingError: the loss became infinite or not a number, and the best weights so far are kept; or the checkpoint
            is damaged.
        ProviderError: the requested device cannot be used.
        StorageError: the run folder cannot be written.
    """
    train = settings.train
    device = checkpoints.job.device if checkpoints else select_device(train.device)
    precision = checkpoints.job.precision if checkpoints else select_precision(train.precision, device)
    recipe = resolve_recipe(train, dataset.num_images["train"], device)
    _write_settings(run, settings, dataset, device, precision)  # resumed too: later stages read the new ones
    if checkpoints and (values := checkpoints.result) is not None:
        logger.info("its training is complete")
        return TrainingResult(**{**values, "run": run, "resumed_after": values["epochs"]})
    make_repeatable(train.seed, device)
    models = build_models(recipe, dataset, train.seed, device, precision)
    models.trained.summary(print_fn=lambda text, **_: logger.info("\n%s", text), line_length=78)
    compiled = " compiled by XLA" if compiles_with_xla(device) else ""
    logger.info("training on %s in %s%s: %s", device, precision, compiled, asdict(recipe))

    state = training_state(models.steps[False], models.saved)
    done = checkpoints.restore(state) if checkpoints else Epochs()
    recorder = _Recorder(models, run, dataset, recipe, train, done, progress or (lambda *_: None), checkpoints)
    if done.rows:
        logger.info("epochs 1 to %d are done", len(done.rows))
        recorder.write_files()
    full = Schedule(recipe.epochs, recipe.epochs * models.batches.number, recipe.small_until(dataset.image_size))
    class_weights = _class_weights(dataset) if train.class_weights else None
    schedule = _fit(models, recorder, full, train.max_minutes, class_weights)
    epochs, passes = recorder.epochs, recorder.epochs.images / dataset.num_images["train"]
    stopped = recorder.reason_to_stop() if epochs.steps < schedule.steps else None
    if stopped is None and train.max_minutes is not None and passes < recipe.epochs - 0.1:
        stopped = f"{train.max_minutes:g} minutes were enough for {passes:.1f} epochs of {recipe.epochs}"
    if stopped is not None:
        logger.info("stopped after epoch %d: %s", len(epochs.rows), stopped)
    if recipe.calibrate:
        _calibrate(models, run, dataset)
    result = TrainingResult(
        run=run,
        epochs=len(epochs.rows),
        resumed_after=len(done.rows),
        stopped=stopped,
        best_epoch=epochs.best_epoch,
        val_accuracy=epochs.best_accuracy,
        num_parameters=models.saved.count_params(),
        seconds=epochs.seconds,
        images_per_second=epochs.images / epochs.seconds,
    )
    if checkpoints:
        checkpoints.finish({**asdict(result), "run": run.name})
    return result


def _write_settings(
    run: Path, settings: RetrainSettings, dataset: PreparedDataset, device: str, precision: str
) -> None:
    write_text(run / "config.toml", dump_toml(settings))
    environment = {
        "backend": keras.config.backend(),
        "device": device,
        "precision": precision,
        "dataset": escape_path(str(dataset.path.resolve())),
        "source": dataset_location(settings.prepare.dataset),
    }
    write_json(run / "environment.json", {**describe_environment(), **environment})


def build_models(recipe: Recipe, dataset: PreparedDataset, seed: int, device: str, precision: str) -> Models:
    """Build and compile everything that takes part in a training.

    Args:
        device: result of `backend.select_device`.
        precision: result of `backend.select_precision`.
    Raises:
        TrainingError: there are more devices than images in a batch.
    """
    size, images = dataset.image_size, dataset.images("train")
    statistics = measure_input(images)
    network = build_network(recipe.network, size, len(dataset.class_names), statistics)
    with computing_in(precision), replicated() as replicas:
        resident = ResidentImages(images) if stay_on_device(images, device) else None
        batches = _training_batches(recipe, dataset, seed, device, replicas, resident=resident is not None)
        any_size = recipe.small_until(size) > 0.0
        trained = build_network(recipe.network, size, len(dataset.class_names), statistics, any_size=any_size)
        _draw_weights(trained, seed)
        rate = TriangularRate(recipe.learning_rate) if recipe.optimizer == "muon" else None
        optimizer = keras.optimizers.Adam(recipe.learning_rate)
        if rate is not None:
            optimizer = Muon(rate, _MOMENTUM, weight_decay=recipe.weight_decay)
        if precision == "float16":  # whose smallest number is too large for many gradients
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        inputs = [keras.Input(part.shape[1:], dtype=part.dtype.name) for part in batches[0][0]]
        pixels = inputs[0] if resident is None else resident(inputs[0])
        if recipe.augment:
            pixels = Augmentation(resident, statistics.mean)(inputs)
        steps, parts = {}, count_parts(batches.smallest // replicas, device)
        for is_small in [True, False] if any_size else [False]:
            x = shrink(pixels, small_size(size)) if is_small else pixels
            step = keras.Model(inputs, trained(x), name=f"trained_{trained.name}")
            steps[is_small] = keras.Model(inputs, split_batch(step, parts)(inputs), name=step.name)
            _compile(steps[is_small], recipe, optimizer, xla=compiles_with_xla(device))
        optimizer.build(trained.trainable_variables)
    whole = keras.Input((*size, 3), dtype="uint8")
    parts = count_parts(min(_VAL_BATCH_SIZE, dataset.num_images["val"]), device)
    validated = keras.Model([whole], split_batch(trained, parts)([whole]))
    _compile(validated, recipe)
    views = prediction_views(size, flips=recipe.average_flips, shifts=recipe.average_shifts)
    saved = average_views(network, views) if len(views) > 1 else network
    return Models(trained, steps, validated, network, saved, views, batches, rate)


def _training_batches(
    recipe: Recipe, dataset: PreparedDataset, seed: int, device: str, replicas: int, *, resident: bool
) -> Batches:
    batches = Batches(
        dataset.images("train"),
        dataset.labels("train"),
        len(dataset.class_names),
        recipe.batch_size,
        seed,
        multiple=replicas,
        equal=compiles_with_xla(device),
        augment=(recipe.max_shift, recipe.cutout, recipe.reflected) if recipe.augment else None,
        resident=resident,
    )
    if batches.smallest < replicas:
        raise TrainingError(
            f"batches of {batches.smallest} images cannot be shared by {replicas} devices; use --device cuda"
        )
    return batches


def _compile(
    model: keras.Model, recipe: Recipe, optimizer: keras.optimizers.Optimizer | None = None, *, xla: bool = False
) -> None:
    """Compile a model with the loss of a recipe and the metric `accuracy`.

    Args:
        optimizer: None compiles for validation only.
        xla: whether XLA compiles the steps; Keras would decide by itself.
    """
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        auto_scale_loss=False,  # `build_models` wraps the optimizer where the loss must be scaled
        jit_compile=xla,
    )


def _draw_weights(model: keras.Model, seed: int) -> None:
    """Draw the kernels of trained layers, each from the seed and the layer's position in the network.

    Keras would draw them from seeds of Python's global generator, which other threads of the process use too.
    """
    for index, layer in enumerate(model.layers):
        initializer = getattr(layer, "kernel_initializer", None)
        if layer.trainable and initializer is not None and "seed" in initializer.get_config():
            layer_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
            initializer = type(initializer).from_config({**initializer.get_config(), "seed": layer_seed})
            layer.kernel.assign(initializer(layer.kernel.shape, layer.kernel.dtype))


def _fit(
    models: Models,
    recorder: _Recorder,
    full: Schedule,
    max_minutes: float | None,
    class_weights: dict[int, float] | None,
) -> Schedule:
    """Train the epochs that are left until there is a reason to stop, and return the last schedule.

    Args:
        full: the schedule without a time budget.
    """
    batches, rate, schedule = models.batches, models.rate, full
    pace = None if max_minutes is None else _measure_pace(models, recorder, 60.0 * max_minutes - recorder.seconds)
    if pace is not None and not pace.small_step:
        full = replace(full, small_fraction=0.0)
    while (done := recorder.epochs).steps < schedule.steps and recorder.reason_to_stop() is None:
        epoch, began = len(done.rows), recorder.seconds
        if pace is not None and max_minutes is not None:
            schedule = shorten(full, epoch, done.steps, pace, 60.0 * max_minutes - began)
            logger.debug("%s at %s", schedule, pace)
        if rate is not None:
            rate.steps.assign(schedule.steps)
        segments = schedule.segments(epoch, done.steps)
        for segment in segments:
            batches.select(epoch, segment.first, segment.last)
            recorder.schedule, recorder.first_batch = schedule, segment.first
            models.steps[segment.small].fit(
                pipeline(batches),
                initial_epoch=epoch,
                epochs=epoch + 1,
                class_weight=class_weights,
                shuffle=False,  # Keras would shuffle with Python's global generator
                verbose=0,
                callbacks=[recorder],
            )
        if pace is not None:
            pace = pace.corrected(segments, recorder.seconds - began)
    return schedule


class _Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends every epoch with validation, checkpoint, saved model and history; reports progress; rejects a bad loss.

    Keras takes each segment of an epoch for an epoch.
    """

    schedule: Schedule
    """Schedule of the training; must be set before each segment."""
    first_batch: int
    """Index of the segment's first batch; must be set before each segment."""

    def __init__(
        self,
        models: Models,
        run: Path,
        dataset: PreparedDataset,
        recipe: Recipe,
        settings: TrainSettings,
        done: Epochs,
        progress: ProgressCallback,
        checkpoints: Checkpoints | None,
    ) -> None:
        super().__init__()
        self._models, self._run, self._average = models, run, recipe.average_weights
        self._settings, self._progress, self._checkpoints = settings, progress, checkpoints
        classes = len(dataset.class_names)
        batches = Batches(dataset.images("val"), dataset.labels("val"), classes, _VAL_BATCH_SIZE)
        self.val_batches = pipeline(batches)
        self.num_val_images = dataset.num_images["val"]
        self.epochs = done
        self._started = time.perf_counter() - done.seconds
        self._epoch_started = self._reported = 0.0
        self._sums: dict[str, float] = {}
        """Sums of accuracy and loss over the images of the epoch, in the segments that have ended."""

    @property
    def seconds(self) -> float:
        """Seconds spent on the training until now, in all processes that took part."""
        return time.perf_counter() - self._started

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        if self.first_batch == 0:
            self._epoch_started, self._sums = time.perf_counter(), {}

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if time.perf_counter() - self._reported < _REPORT_SECONDS:
            return
        self._reported = time.perf_counter()
        self._require_finite((logs or {}).get("loss", 0.0))
        self._report(self.first_batch + batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        batches = self._models.batches
        last_batch = self.first_batch + len(batches)
        images = batches.num_images(last_batch)
        for key, value in (logs or {}).items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value) * (images - batches.num_images(self.first_batch))
        self._require_finite(self._sums["loss"])
        self._report(last_batch)
        if last_batch == self.schedule.batches(epoch, self.epochs.steps):
            self._end_epoch(epoch, last_batch, images)

    def _end_epoch(self, epoch: int, steps: int, images: int) -> None:
        """Validate an epoch of this many steps and images, and write its checkpoint, saved model and history."""
        figures = {key: total / images for key, total in self._sums.items()}
        figures |= self._validate(epoch)
        self._require_finite(figures["val_loss"])
        figures |= {
            "epoch": epoch + 1,
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "seconds": round(time.perf_counter() - self._epoch_started, 3),
        }
        rows, done = (*self.epochs.rows, figures), self.epochs
        self.epochs = Epochs(rows, self.seconds, done.steps + steps, done.images + images)
        if self._checkpoints:
            self._checkpoints.save(training_state(self.model, self._models.saved), self.epochs)
        self.write_files()
        logger.info(
            "epoch %d/%d  accuracy %.4f  loss %.4f  val_accuracy %.4f  val_loss %.4f  %.0f images/s%s",
            *(epoch + 1, self.schedule.epochs, figures["accuracy"], figures["loss"]),
            *(figures["val_accuracy"], figures["val_loss"], images / figures["seconds"]),
            "" if self.epochs.epochs_since_best else "  (best)",
        )

    def _validate(self, epoch: int) -> dict[str, float]:
        """Give the saved model the weights after an epoch, or their average, and return the scores of these weights."""
        models = self._models
        weights = trained = models.trained.get_weights()
        if self._average and epoch > 0:
            pairs = zip(trained, models.saved.get_weights(), strict=True)
            weights = [NEW_FRACTION * new + (1 - NEW_FRACTION) * average for new, average in pairs]
            models.trained.set_weights(weights)
        models.saved.set_weights(weights)
        scores = models.validated.evaluate(self.val_batches, verbose=0, return_dict=True)
        if weights is not trained:
            models.trained.set_weights(trained)
        return {f"val_{name}": float(scores[name]) for name in ("accuracy", "loss")}

    def write_files(self) -> None:
        """Write model and history after an epoch; again if a process was killed between its checkpoint and these.

        So `model.keras` has the weights of the best epoch of the checkpoint, even where repeating it gives others.
        """
        if self.epochs.epochs_since_best == 0:
            _save(self._models.saved, self._run / "model.keras")
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs.rows)
        write_text(self._run / "history.csv", text.getvalue())  # last: the weights of its epochs are written

    def reason_to_stop(self) -> str | None:
        """Return why no epoch should follow, according to the settings, or None."""
        patience, max_minutes, epochs = self._settings.patience, self._settings.max_minutes, self.epochs
        if patience is not None and epochs.epochs_since_best >= patience:
            return f"no better weights by validation for {patience} epochs than those of epoch {epochs.best_epoch}"
        if max_minutes is not None and epochs.seconds >= 60.0 * max_minutes:
            return f"{epochs.seconds / 60.0:.1f} of {max_minutes:g} minutes have passed"
        return None

    def _report(self, batch: int) -> None:
        """Report progress after this many batches of the epoch."""
        done, batches, epochs = self.epochs, self._models.batches, self.schedule.epochs
        best = f", best val_accuracy {done.best_accuracy:.4f}" if done.rows else ""
        left = self.schedule.steps - done.steps
        self._progress(
            f"train: epoch {len(done.rows) + 1}/{epochs}{best}",
            done.images + batches.num_images(batch),
            done.images + batches.num_images(left),
        )

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            best = self.epochs.best_epoch
            kept = f"the weights of epoch {best} are kept" if best else "nothing was learned"
            raise TrainingError(
                f"the loss became {loss} in epoch {len(self.epochs.rows) + 1}; {kept} in {self._run}; "
                "try a smaller --learning-rate"
            )


class _Stopwatch(keras.callbacks.Callback):  # type: ignore[misc]
    """Measures the mean seconds a step, without the first step, which is compiled; then ends the `fit`.

    Args:
        seconds: shortest time to measure for.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._began = self.step_seconds = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if batch & (batch - 1):
            return  # waits for the device only after steps 0, 1, 2, 4, 8 and so on: each wait costs time
        float((logs or {})["loss"])
        if batch == 0:
            self._began = time.perf_counter()
            return
        seconds = time.perf_counter() - self._began
        self.step_seconds = seconds / batch
        self.model.stop_training = seconds >= self._seconds


def _measure_pace(models: Models, recorder: _Recorder, budget: float) -> Pace:
    """Measure some steps, which are undone afterwards; everything is compiled then.

    Args:
        budget: seconds left for the training.
    """
    state = training_state(models.steps[False], models.saved)
    before = [keras.ops.convert_to_numpy(variable.value) for variable in state]
    started, seconds = time.perf_counter(), dict[bool, float]()
    for small, model in sorted(models.steps.items()):  # whole images first
        if seconds and time.perf_counter() - started > budget / 3:
            break  # compiling a second size would cost too much of the budget
        stopwatch = _Stopwatch(min(_MEASURED_FRACTION * budget, _MAX_MEASURED_SECONDS))
        source = pipeline(models.batches).repeat()
        model.fit(source, steps_per_epoch=1_000_000, epochs=1, shuffle=False, verbose=0, callbacks=[stopwatch])
        seconds[small] = stopwatch.step_seconds
    models.validated.evaluate(recorder.val_batches, steps=1, verbose=0)  # compiles
    for variable, value in zip(state, before, strict=True):
        variable.assign(value)
    image = seconds[False] / models.batches.smallest
    validation = _FORWARD_FRACTION * recorder.num_val_images * image
    return Pace(seconds.get(True, 0.0), seconds[False], validation)


def _save(model: keras.Model, path: Path) -> None:
    with write_file(path) as temporary, storage_errors(path):
        model.save(temporary)


def _calibrate(models: Models, run: Path, dataset: PreparedDataset) -> None:
    """Save the best weights again, with the temperature that calibrates them on validation images."""
    models.saved.load_weights(run / "model.keras")
    step = math.ceil(dataset.num_images["val"] / _CALIBRATION_IMAGES)
    images, labels = dataset.images("val")[::step], dataset.labels("val")[::step]
    shown = (images[:, view.rows][:, :, view.columns] for view in models.views)
    probabilities = np.stack([predict_keras(models.network, each, _VAL_BATCH_SIZE) for each in shown])
    weights = np.array([view.weight for view in models.views])
    temperature = fit_temperature(probabilities, labels, weights)
    set_temperature(models.network, temperature)
    _save(models.saved, run / "model.keras")
    before, after = (apply_temperature(probabilities, each, weights) for each in (1.0, temperature))
    logger.info(
        "temperature %.3f by %d validation images: mean confidence %.3f, not %.3f, at accuracy %.3f",
        *(temperature, len(labels), after.max(axis=1).mean(), before.max(axis=1).mean()),
        np.mean(before.argmax(axis=1) == labels),
    )


def _class_weights(dataset: PreparedDataset) -> dict[int, float]:
    """Return the weight of an image of each class: every class weighs the same in all, an image 1 on average."""
    from sklearn.utils.class_weight import compute_class_weight  # only here: its import takes a second

    labels = np.asarray(dataset.labels("train"))
    classes = np.unique(labels)
    weights = compute_class_weight("balanced", classes=classes, y=labels)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))
