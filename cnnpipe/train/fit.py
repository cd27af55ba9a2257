"""Train a network on a prepared dataset: seeded, checkpointed after every epoch, its history on the disk."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import TrainingError
from cnnpipe.evaluate.predict import predict_keras
from cnnpipe.files import display_path
from cnnpipe.machine import describe_environment
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import RetrainSettings, TrainSettings, dataset_location, dump_toml
from cnnpipe.storage import storage_errors, write_file, write_json, write_text
from cnnpipe.train.backend import (
    compiles_with_xla,
    computing_in,
    count_lanes,
    keras,
    make_repeatable,
    pipeline,
    replicated,
    select_device,
    select_precision,
    spread,
)
from cnnpipe.train.batches import Augmentation, Batches, ResidentImages, open_batches, shrink, stay_on_device
from cnnpipe.train.calibrate import apply_temperature, fit_temperature
from cnnpipe.train.checkpoints import Checkpoints, Epochs, training_state
from cnnpipe.train.networks import InputStatistics, average_flips, build_network, measure_input
from cnnpipe.train.optimizers import Muon
from cnnpipe.train.presets import Recipe, compile_model, make_optimizer, resolve_recipe, small_size
from cnnpipe.train.schedule import Piece, plan_piece

__all__ = ["HISTORY_COLUMNS", "Candidate", "Record", "TrainingResult", "train_model"]

logger = logging.getLogger(__name__)

_VAL_BATCH_SIZE: Final = 256
"""Images; more do not stay in a core's cache."""

_CALIBRATION_IMAGES: Final = 2_000
"""At most so many for validation, evenly spread, decide over the temperature: one number needs no more."""


HISTORY_COLUMNS: Final = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds")
"""Columns of `history.csv`: Keras' own names, then the rate at the end of the epoch and its wall time."""

_TELLING: Final = 8
"""Intervals between the batches of a piece by which a known pace is measured anew: fewer may tell of a hiccup."""

_NEW_SHARE: Final = 0.5
"""Of an epoch's weights in their running average."""


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
    """Of the weights that were kept, 0-1, in the precision of training and without mirror images."""
    num_parameters: int
    seconds: float
    images_per_second: float
    """Training images a second, validation and checkpoints not counted out."""


def train_model(
    settings: RetrainSettings,
    dataset: PreparedDataset,
    run: Path,
    progress: ProgressCallback | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train a network, fresh or from its checkpoint, and keep the weights of its best epoch.

    On a CPU the same seed gives the same weights, bit for bit, on the same kind of processor with as many cores and the
    same packages, whether it was broken off or not; but not where time is limited, by which the rate goes then.

    Writes to the run folder: `config.toml`, `environment.json`, `history.csv` after every epoch, and `model.keras`
    whenever the validation accuracy has improved (at equal accuracy, when the loss has), at the end once more with the
    temperature that suits it, where the recipe has one.

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
    train = settings.train
    device = select_device(train.device)
    recipe = resolve_recipe(train, dataset.num_images["train"], device)
    precision = select_precision(train.precision, device)
    write_text(run / "config.toml", dump_toml(settings))
    environment = {
        "device": device,
        "precision": precision,
        "dataset": display_path(str(dataset.path.resolve())),
        "source": dataset_location(settings.prepare.dataset),
    }
    write_json(run / "environment.json", {**describe_environment(), **environment})
    make_repeatable(train.seed, device)
    statistics = measure_input(dataset.images("train"))
    like = (recipe.network, dataset.image_size, len(dataset.class_names), statistics)
    with computing_in(precision), replicated() as replicas:
        trained = _assemble(like, recipe, dataset, train.seed, device, precision, replicas)
    trained.network.summary(print_fn=lambda text, **_: logger.info("\n%s", text), line_length=78)
    logger.info(
        "training on %s%s in %s%s: %s",
        *(device, f" ({replicas} devices)" if replicas > 1 else "", precision),
        *(" compiled by XLA" if compiles_with_xla(device) else "", asdict(recipe)),
    )

    kept = build_network(*like)
    model = average_flips(kept) if recipe.average_flips else kept
    with computing_in(precision):
        validated = build_network(*like)
    val_batches = open_batches(dataset, "val", _VAL_BATCH_SIZE)
    lanes = count_lanes(val_batches.smallest, device)
    candidate = Candidate(model, validated, trained.network, val_batches, recipe, lanes)
    state = training_state(next(iter(trained.models.values())), model)
    done = checkpoints.restore(state) if checkpoints else Epochs()
    record = Record(candidate, run, train, trained.batches, progress, checkpoints, done)
    if done.rows:
        logger.info("epochs 1 to %d are done", len(done.rows))
        record.write_files()
    _train_pieces(trained, record, recipe, dataset, train)
    epochs = record.epochs
    if recipe.calibrate:
        model.load_weights(run / "model.keras")
        _save_calibrated(run / "model.keras", kept, like, recipe, dataset)
    stopped = record.reason_to_stop() if epochs.share < 1.0 else None
    passes = epochs.images / dataset.num_images["train"]
    if stopped is None and train.max_minutes is not None and passes < recipe.epochs - 0.1:
        stopped = f"{train.max_minutes:g} minutes were enough for {passes:.1f} epochs of {recipe.epochs}"
    if stopped is not None:
        logger.info("stopped after epoch %d: %s", len(epochs.rows), stopped)
    return TrainingResult(
        run=run,
        epochs=len(epochs.rows),
        resumed_after=len(done.rows),
        stopped=stopped,
        best_epoch=epochs.best_epoch,
        val_accuracy=epochs.best_accuracy,
        num_parameters=model.count_params(),
        seconds=epochs.seconds,
        images_per_second=epochs.images / epochs.seconds,
    )


@dataclass(frozen=True)
class _Trained:
    """What is trained, and with what."""

    network: keras.Model
    models: dict[tuple[int, int], keras.Model]
    """By the (height, width) of its images: the network behind augmentation, compiled; they share its weights."""
    optimizer: keras.optimizers.Optimizer
    """That knows the rate; loss scaling may be around it."""
    batches: Batches


def _assemble(
    like: tuple[str, tuple[int, int], int, InputStatistics],
    recipe: Recipe,
    dataset: PreparedDataset,
    seed: int,
    device: str,
    precision: str,
    replicas: int,
) -> _Trained:
    """Make all that has a part in a training step.

    Args:
        like: the arguments of `build_network`.
    Raises:
        TrainingError: there are more devices than images in a batch.
    """
    images, whole, xla = dataset.images("train"), dataset.image_size, compiles_with_xla(device)
    resident = ResidentImages(images) if stay_on_device(images, device) else None
    augment = (recipe.max_shift, recipe.cutout) if recipe.augment else None
    kind = {"equal": xla, "augment": augment, "resident": resident is not None}
    batches = open_batches(dataset, "train", recipe.batch_size, seed, multiple=replicas, **kind)
    if batches.smallest < replicas:
        raise TrainingError(
            f"batches of {batches.smallest} images cannot be shared by {replicas} devices; use --device cuda"
        )
    sizes = [small_size(whole), whole] if recipe.small_until(whole) else [whole]
    network = build_network(*like, any_size=len(sizes) > 1)
    _draw_weights(network, seed)
    own = optimizer = make_optimizer(recipe)
    if precision == "float16":  # whose smallest number is too large for many a gradient
        optimizer = keras.optimizers.LossScaleOptimizer(own)
    lanes = count_lanes(batches.smallest // replicas, device)
    given = [keras.Input(part.shape[1:], dtype=part.dtype.name) for part in batches[0][0]]
    if recipe.augment:
        pixels = Augmentation(resident, like[3].mean)(given)
    elif resident is not None:
        pixels = resident(given[0])
    else:
        pixels = given[0]
    models = {}
    for size in sizes:
        x = shrink(pixels, size) if size != whole else pixels
        part = keras.Model(given, network(x), name=f"trained_{network.name}")
        models[size] = keras.Model(given, spread(part, lanes)(given), name=part.name)
        compile_model(models[size], recipe, optimizer, xla=xla)
    optimizer.build(network.trainable_variables)
    return _Trained(network, models, own, batches)


def _train_pieces(
    trained: _Trained, record: Record, recipe: Recipe, dataset: PreparedDataset, train: TrainSettings
) -> None:
    """Train a piece after the other, to the end of the training or until there is a reason to stop."""
    class_weights = _class_weights(dataset.labels("train")) if train.class_weights else None
    max_seconds = None if train.max_minutes is None else 60.0 * train.max_minutes
    batches, num_images = trained.batches, (dataset.num_images["train"], dataset.num_images["val"])
    compiled: set[tuple[int, int]] = set()
    while (epochs := record.epochs).share < 1.0 and (epochs.batches or record.reason_to_stop() is None):
        piece = plan_piece(recipe, dataset.image_size, batches.number, num_images, epochs, max_seconds, compiled)
        record.piece = piece
        batches.shuffle(len(epochs.rows), piece.first, piece.last)
        if isinstance(trained.optimizer, Muon):
            trained.optimizer.set_course(piece.start, piece.end, len(batches))
        trained.models[piece.image_size].fit(
            pipeline(batches),
            initial_epoch=len(epochs.rows),
            epochs=len(epochs.rows) + 1,
            class_weight=class_weights,
            shuffle=False,  # by Keras, which draws from that generator too
            verbose=0,
            callbacks=[record],
        )
        compiled.add(piece.image_size)


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


def _save_calibrated(
    path: Path,
    kept: keras.Model,
    like: tuple[str, tuple[int, int], int, InputStatistics],
    recipe: Recipe,
    dataset: PreparedDataset,
) -> None:
    """Save the model of a network with the temperature that suits it.

    Args:
        kept: of temperature 1.
        like: the arguments of `build_network`.
    """
    step = math.ceil(dataset.num_images["val"] / _CALIBRATION_IMAGES)
    images, labels = dataset.images("val")[::step], dataset.labels("val")[::step]
    sides = [images, images[:, :, ::-1]] if recipe.average_flips else [images]
    views = np.stack([predict_keras(kept, side, _VAL_BATCH_SIZE) for side in sides])
    temperature = fit_temperature(views, labels)
    calibrated = build_network(*like, temperature=temperature)
    calibrated.set_weights(kept.get_weights())
    model = average_flips(calibrated) if recipe.average_flips else calibrated
    with write_file(path) as temporary, storage_errors(path):
        model.save(temporary)
    before, after = (float(apply_temperature(views, each).max(axis=1).mean()) for each in (1.0, temperature))
    logger.info(
        "temperature %.3f by %d validation images: mean confidence %.3f, not %.3f, at accuracy %.3f",
        *(temperature, len(labels), after, before, np.mean(views.mean(axis=0).argmax(axis=1) == labels)),
    )


def _class_weights(labels: npt.NDArray[np.int64]) -> dict[int, float]:
    """Return what an image of each class weighs, so that every class weighs the same and an image 1 on average."""
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(classes.tolist(), (len(labels) / (len(classes) * counts)).tolist(), strict=True))


class Candidate:
    """The model that is saved, beside the network that is trained: in float32, of one image size, without augmentation.

    Args:
        model: is saved.
        network: of the same weights, is validated: in the precision of training, as float32 may take twice the time,
            and without what `models.average_flips` made of it, which does so too. The model is better then.
        trained: the network in training, with as many weights as `network`, in their order.
        batches: for validation.
        recipe: of the training, whose loss is that of validation too.
        lanes: over which validation is spread.
    """

    def __init__(
        self,
        model: keras.Model,
        network: keras.Model,
        trained: keras.Model,
        batches: Batches,
        recipe: Recipe,
        lanes: int,
    ) -> None:
        self.model, self._network = model, network
        self._trained, self._batches, self._average = trained, pipeline(batches), recipe.average_weights
        images = keras.Input(network.input_shape[1:], dtype="uint8")
        self._validated = keras.Model([images], spread(network, lanes)([images]))
        compile_model(self._validated, recipe)

    def take_weights(self, epoch: int) -> None:
        """Take over the weights as they are after an epoch of training, 0 for the first."""
        weights = self._trained.get_weights()
        if self._average and epoch > 0:
            pairs = zip(weights, self.model.get_weights(), strict=True)
            weights = [_NEW_SHARE * new + (1 - _NEW_SHARE) * average for new, average in pairs]
        self.model.set_weights(weights)
        self._network.set_weights(weights)

    def validate(self) -> dict[str, float]:
        """Return `val_accuracy` and `val_loss` of the network on the validation images."""
        scores = self._validated.evaluate(self._batches, verbose=0, return_dict=True)
        return {f"val_{name}": float(scores[name]) for name in ("accuracy", "loss")}


class Record(keras.callbacks.Callback):  # type: ignore[misc]
    """Validate after every epoch, write checkpoint, best weights and history, report progress, stop for a reason.

    What Keras takes for an epoch is a piece of one.

    Args:
        candidate: what would be kept if training ended now.
        batches: for training.
        done: epochs that the checkpoint brought.
    """

    def __init__(
        self,
        candidate: Candidate,
        run: Path,
        settings: TrainSettings,
        batches: Batches,
        progress: ProgressCallback | None,
        checkpoints: Checkpoints | None,
        done: Epochs,
    ) -> None:
        super().__init__()
        self._candidate = candidate
        self._run, self._settings, self._batches = run, settings, batches
        self._progress = progress or (lambda *_: None)
        self._checkpoints = checkpoints
        self.epochs = done
        self.piece: Piece
        """That is trained next; to be set before each."""
        self._started = time.perf_counter() - done.seconds
        self._epoch_started = self._piece_started = self._reported = 0.0
        self._batch_ends: list[float] = []
        """When each batch of the piece was done."""
        self._sums: dict[str, float] = {}
        """Of accuracy and loss over the images of the epoch, as far as its pieces have ended."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self._piece_started, self._batch_ends = time.perf_counter(), []
        if self.epochs.batches == 0:
            self._epoch_started, self._sums = self._piece_started, {}

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        now = time.perf_counter()
        self._batch_ends.append(now)
        if self.piece.has_measured(batch + 1, now - self._batch_ends[0]):
            self.model.stop_training = True  # this piece
        if now - self._reported < 0.1:
            return
        self._reported = now
        self._stop_unless_finite((logs or {}).get("loss", 0.0))
        self._report()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        number = len(self._batch_ends)
        images = self._images(number) - self._images(0)
        for key, value in (logs or {}).items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value) * images
        self._stop_unless_finite(self._sums["loss"])
        self._report()
        self.epochs = self._with_piece(number, images)
        if self.piece.ends_epoch and number == len(self._batches):
            self._end_epoch(epoch, self._images(number))

    def _end_epoch(self, epoch: int, images: int) -> None:
        """Validate an epoch of so many images, and write down what there is after it."""
        figures = {key: total / images for key, total in self._sums.items()}
        self._candidate.take_weights(epoch)
        figures |= self._candidate.validate()
        self._stop_unless_finite(figures["val_loss"])
        now = time.perf_counter()
        figures |= {
            "epoch": epoch + 1,
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "seconds": round(now - self._epoch_started, 3),
        }
        self.epochs = replace(
            self.epochs,
            rows=(*self.epochs.rows, figures),
            seconds=now - self._started,
            validation_seconds=now - self._batch_ends[-1],
            batches=0,
        )
        if self._checkpoints:
            self._checkpoints.save(training_state(self.model, self._candidate.model), self.epochs)
        self.write_files()
        logger.info(
            "epoch %d/%d  accuracy %.4f  loss %.4f  val_accuracy %.4f  val_loss %.4f  %.0f images/s%s",
            *(epoch + 1, epoch + self.piece.epochs, figures["accuracy"], figures["loss"]),
            *(figures["val_accuracy"], figures["val_loss"], images / figures["seconds"]),
            "" if self.epochs.epochs_since_best else "  (best)",
        )

    def write_files(self) -> None:
        """Write what there is after an epoch; again where a process was broken off after the checkpoint, before this.

        So `model.keras` is of the best epoch that the checkpoint tells of, even if one done again comes out otherwise.
        """
        if self.epochs.epochs_since_best == 0:
            path = self._run / "model.keras"
            with write_file(path) as temporary, storage_errors(path):
                self._candidate.model.save(temporary)
        self._write_history()  # after the weights: an epoch that it tells of is not lost

    def reason_to_stop(self) -> str | None:
        """Return why no epoch should follow, by the settings."""
        patience, max_minutes = self._settings.patience, self._settings.max_minutes
        if patience is not None and self.epochs.epochs_since_best >= patience:
            return f"no better weights by validation for {patience} epochs than those of epoch {self.epochs.best_epoch}"
        if max_minutes is not None and self.epochs.seconds >= 60.0 * max_minutes:
            return f"{self.epochs.seconds / 60.0:.1f} of {max_minutes:g} minutes have passed"
        return None

    def _images(self, number: int) -> int:
        """Return how many images the epoch has had after so many batches of the piece."""
        return self._batches.num_images(self.piece.first + number)

    def _with_piece(self, number: int, images: int) -> Epochs:
        """Return what is done with so many batches of this piece, and their images."""
        piece, done = self.piece, self.epochs
        used = number / len(self._batches)
        return replace(
            done,
            seconds=self._batch_ends[-1] - self._started,
            images=done.images + images,
            share=piece.start + (piece.end - piece.start) * used if used < 1.0 else piece.end,
            seconds_per_image=self._measure_pace(number, images) or done.seconds_per_image,
            compile_seconds=max(done.compile_seconds, self._batch_ends[0] - self._piece_started),
            batches=piece.first + number,
        )

    def _measure_pace(self, number: int, images: int) -> float:
        """Return the seconds of an image of the whole size in this piece, 0 where it is too short to tell.

        The median batch counts: one that has to be compiled first, as the first or the first of another size, does not.
        """
        of_a_batch = images / number * self.piece.image_cost
        if self._batches.number == 1:
            seconds = (self._batch_ends[0] - self._piece_started) / of_a_batch
            return min(seconds, self.epochs.seconds_per_image or math.inf)
        intervals = [end - start for start, end in pairwise(self._batch_ends)]
        known = self.epochs.seconds_per_image > 0.0
        return median(intervals) / of_a_batch if len(intervals) >= (_TELLING if known else 1) else 0.0

    def _report(self) -> None:
        done, piece = self.epochs, self.piece
        best = f", best val_accuracy {done.best_accuracy:.4f}" if done.rows else ""
        before = done.images - self._images(0)  # this epoch
        whole, rest = divmod(piece.first + piece.batches, self._batches.number)
        self._progress(
            f"train: epoch {len(done.rows) + 1}/{len(done.rows) + piece.epochs}{best}",
            before + self._images(len(self._batch_ends)),
            before + whole * self._batches.num_images(self._batches.number) + self._batches.num_images(rest),
        )

    def _stop_unless_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            best = self.epochs.best_epoch
            kept = f"the weights of epoch {best} are kept" if best else "nothing was learned"
            raise TrainingError(
                f"the loss became {loss} in epoch {len(self.epochs.rows) + 1}; {kept} in {self._run}; "
                "try a smaller --learning-rate"
            )

    def _write_history(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs.rows)
        write_text(self._run / "history.csv", text.getvalue())
