"""Tiny datasets and exported runs whose models give chosen answers: each reads its answer from a pixel of the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from tiny_models import CLASS_NAMES, IMAGE_SIZE, model_info, write_model

from cnnpipe.evaluate.evaluation import predict_onnx
from cnnpipe.evaluate.metrics import evaluate_probabilities, write_evaluation
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.prepare.sources import SPLITS
from cnnpipe.session import open_session
from cnnpipe.settings import PrepareSettings, PromoteSettings, RetrainSettings, dump_toml
from cnnpipe.storage import sha256_file

Answers = npt.NDArray[np.int64]  # (N,), index of the class that a model says


@dataclass
class Pool:
    """Random images, of which datasets are made; pixel `column` holds the answer of one model."""

    images: npt.NDArray[np.uint8]  # (N, 8, 8, 3)
    labels: Answers
    class_names: tuple[str, ...] = CLASS_NAMES

    @classmethod
    def make(cls, labels: Sequence[int] | Answers, class_names: tuple[str, ...] = CLASS_NAMES) -> Pool:
        pixels = np.random.default_rng(0).integers(0, 256, (len(labels), *IMAGE_SIZE, 1), np.uint8)
        return cls(np.repeat(pixels, 3, axis=3), np.asarray(labels, np.int64), class_names)

    def answer(self, column: int, answers: Answers) -> None:
        """Let the model of this column give these answers; before any dataset is written."""
        self.images[:, 0, column] = answers[:, None]

    def wrong_at(self, *indices: int) -> Answers:
        """Return the right answers, but the next class at these images."""
        answers = self.labels.copy()
        answers[list(indices)] = (answers[list(indices)] + 1) % len(self.class_names)
        return answers

    def write(self, folder: Path, like: PreparedDataset, **splits: npt.ArrayLike) -> PreparedDataset:
        """Write a prepared dataset of the images with these indices by split."""
        chosen = {split: np.asarray(splits[split], np.int64) for split in SPLITS}
        dataset = replace(
            like,
            path=folder,
            name="tiny",
            fingerprint=f"{abs(hash(folder)):064x}",
            class_names=self.class_names,
            image_size=IMAGE_SIZE,
            num_images={split: len(rows) for split, rows in chosen.items()},
        )
        folder.mkdir(parents=True)
        for split, rows in chosen.items():
            np.save(folder / f"{split}_images.npy", self.images[rows])
            np.save(folder / f"{split}_labels.npy", self.labels[rows])
            (folder / f"{split}_paths.json").write_text(json.dumps([f"image-{row}" for row in rows.tolist()]))
        values = TypeAdapter(PreparedDataset).dump_python(dataset, mode="json", exclude={"path"})
        (folder / "dataset.json").write_text(json.dumps(values))
        return dataset


def write_run(
    artifacts: Path, run_id: str, dataset: PreparedDataset, column: int, sharpness: float = 2.0, **promote: Any
) -> Path:
    """Write an exported run, ready for the stage `promote`, whose model gives the answers of a column.

    Args:
        sharpness: how sure the model is; it does not change an answer.
    """
    run = artifacts / "tiny" / "runs" / run_id
    run.mkdir(parents=True)
    settings = RetrainSettings(prepare=PrepareSettings(name="tiny"), promote=PromoteSettings(**promote))
    (run / "config.toml").write_text(dump_toml(settings))
    (run / "environment.json").write_text(json.dumps({"source": "digits", "dataset": str(dataset.path)}))
    number = np.arange(len(dataset.class_names), dtype=np.float32)
    weights = np.zeros((IMAGE_SIZE[0] * IMAGE_SIZE[1], len(number)), np.float32)
    weights[column] = 2 * sharpness * 255 * number  # -sharpness * (pixel - number)^2, up to what softmax cancels
    info = model_info(run_id=run_id, class_names=dataset.class_names, dataset_fingerprint=dataset.fingerprint)
    model = write_model(run / "model.onnx", info, layer=(weights, -sharpness * number**2))
    probabilities = predict_onnx(open_session(model, "cpu"), dataset.images("test"))
    labels = dataset.labels("test")
    evaluation = evaluate_probabilities(probabilities, labels, dataset.class_names, settings.evaluate)
    write_evaluation(run, evaluation, probabilities, labels, dataset.paths("test"))
    record = {"agreement": 1.0, "sha256": sha256_file(model)}
    (run / "parity.json").write_text(json.dumps({"fp32": record}))
    return run
