"""What a training leaves behind as it goes: after every epoch its checkpoint, the best weights and the history."""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from cnnpipe.errors import TrainingError
from cnnpipe.progress import ProgressCallback
from cnnpipe.settings import TrainSettings
from cnnpipe.storage import storage_errors, write_file, write_text
from cnnpipe.train.backend import keras
from cnnpipe.train.batches import Batches
from cnnpipe.train.candidate import Candidate
from cnnpipe.train.checkpoints import Checkpoints, Epochs, training_state
from cnnpipe.train.schedule import Piece

__all__ = ["HISTORY_COLUMNS", "Record"]

logger = logging.getLogger(__name__)

HISTORY_COLUMNS: Final = ("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds")
"""Columns of `history.csv`: Keras' own names, then the rate at the end of the epoch and its wall time."""

_TELLING: Final = 8
"""Intervals between the batches of a piece by which a known pace is measured anew: fewer may tell of a hiccup."""


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
        return statistics.median(intervals) / of_a_batch if len(intervals) >= (_TELLING if known else 1) else 0.0

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
