"""Train a network on a prepared dataset: seeded, checkpointed after every epoch, its history on the disk."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
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
from cnnpipe.train.augmentation import Augmentation, ResidentImages, shrink, stay_on_device
from cnnpipe.train.backend import (
    compiles_with_xla,
    computing_in,
    keras,
    make_repeatable,
    pipeline,
    replicated,
    select_device,
    select_precision,
)
from cnnpipe.train.batches import Batches, open_batches
from cnnpipe.train.calibrate import apply_temperature, fit_temperature
from cnnpipe.train.candidate import Candidate
from cnnpipe.train.checkpoints import Checkpoints, Epochs, training_state
from cnnpipe.train.lanes import count_lanes, spread
from cnnpipe.train.networks import InputStatistics, average_flips, build_network, measure_input
from cnnpipe.train.optimizers import Muon
from cnnpipe.train.presets import Recipe, compile_model, make_optimizer, resolve_recipe, small_size
from cnnpipe.train.record import Record
from cnnpipe.train.schedule import plan_piece

__all__ = ["TrainingResult", "train_model"]

logger = logging.getLogger(__name__)

_VAL_BATCH_SIZE: Final = 256
"""Images; more do not stay in a core's cache."""

_CALIBRATION_IMAGES: Final = 2_000
"""At most so many for validation, evenly spread, decide over the temperature: one number needs no more."""


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
