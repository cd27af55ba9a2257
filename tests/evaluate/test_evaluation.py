"""Metrics from probabilities, and the probabilities of a model: every image counted once."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report
from tiny_models import expected_probabilities, load_digits, model_info, write_digits, write_model

from cnnpipe.errors import DatasetError, ModelError, RegistryError
from cnnpipe.evaluate.evaluation import (
    evaluate_run,
    evaluate_split,
    load_keras_model,
    open_model,
    predict_keras,
    predict_onnx,
)
from cnnpipe.evaluate.metrics import (
    CONFUSION_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    PROBABILITIES_FILE,
    REPORT_FILE,
    Evaluation,
    evaluate_probabilities,
    read_evaluation,
    read_probabilities,
    write_evaluation,
)
from cnnpipe.prepare.dataset import PreparedDataset, prepare_dataset
from cnnpipe.session import open_session
from cnnpipe.settings import EvaluateSettings, PrepareSettings

NAMES = ("cat", "dog", "emu")
LABELS = np.array([0, 0, 1, 2])
PROBABILITIES = np.array(
    [[0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.25, 0.625, 0.125], [0.5, 0.375, 0.125]], np.float32
)  # right, wrong, right, wrong


def _evaluate(
    probabilities: npt.NDArray[np.float32] = PROBABILITIES,
    labels: npt.NDArray[np.int64] = LABELS,
    class_names: tuple[str, ...] = NAMES,
    *,
    top_k: int = 2,
    bins: int = 4,
) -> Evaluation:
    return evaluate_probabilities(
        probabilities, labels, class_names, EvaluateSettings(top_k=top_k, calibration_bins=bins)
    )


def _random_case(seed: int, number: int, classes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 0.3), number).astype(np.float32), rng.integers(0, classes, number)


def test_metrics_are_what_is_computed_by_hand() -> None:
    evaluation = _evaluate()
    assert (evaluation.num_images, evaluation.num_correct, evaluation.accuracy) == (4, 2, 0.5)
    assert evaluation.loss == pytest.approx(-math.log(0.75 * 0.25 * 0.625 * 0.125) / 4)
    # The second image's actual class ties for the second place and comes first of the two.
    assert (evaluation.top_k, evaluation.top_k_accuracy) == (2, 0.75)
    cat, dog, emu = evaluation.per_class
    assert (cat.name, cat.precision, cat.recall, cat.f1, cat.support) == ("cat", 0.5, 0.5, 0.5, 2)
    assert (dog.precision, dog.recall, dog.f1, dog.support) == (0.5, 1.0, 2 / 3, 1)
    assert (emu.precision, emu.recall, emu.f1, emu.support) == (0.0, 0.0, 0.0, 1)
    # (0.25, 0.5]: 0.5 wrong and 0.5 wrong; (0.5, 0.75]: 0.75 and 0.625 right.
    assert evaluation.expected_calibration_error == pytest.approx((abs(0 - 1.0) + abs(2 - 1.375)) / 4)


def test_loss_and_top_k_are_those_of_keras() -> None:
    from cnnpipe.train.backend import keras

    probabilities, labels = _random_case(seed=1, number=500, classes=7)
    probabilities[0] = np.eye(7)[(labels[0] + 1) % 7]  # certain and wrong: clipped, not infinite
    evaluation = _evaluate(probabilities, labels, tuple("abcdefg"), top_k=3)
    one_hot = np.eye(7, dtype=np.float32)[labels]
    loss = float(keras.ops.mean(keras.losses.categorical_crossentropy(one_hot, probabilities)))
    top_3 = keras.metrics.TopKCategoricalAccuracy(k=3)
    top_3.update_state(one_hot, probabilities)
    assert evaluation.loss == pytest.approx(loss, rel=1e-5)
    assert evaluation.top_k_accuracy == pytest.approx(float(top_3.result()))


def test_certain_and_wrong_costs_the_logarithm_of_epsilon() -> None:
    certain = np.array([[0.0, 1.0]], np.float32)
    assert _evaluate(certain, np.array([0]), ("no", "yes")).loss == pytest.approx(-math.log(1e-7))
    assert _evaluate(certain, np.array([1]), ("no", "yes")).loss == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), number=st.integers(2, 40), classes=st.integers(2, 6), data=st.data())
def test_parts_add_up_to_the_whole(seed: int, number: int, classes: int, data: st.DataObject) -> None:
    probabilities, labels = _random_case(seed, number, classes)
    names = tuple("abcdef"[:classes])
    cut = data.draw(st.integers(1, number - 1))
    whole = _evaluate(probabilities, labels, names)
    parts = [_evaluate(probabilities[part], labels[part], names) for part in (slice(cut), slice(cut, None))]
    assert whole.num_correct == sum(part.num_correct for part in parts)
    assert whole.loss == pytest.approx(sum(part.loss * part.num_images for part in parts) / number)
    for index, each in enumerate(whole.per_class):
        assert each.support == sum(part.per_class[index].support for part in parts)


def test_of_equally_likely_classes_the_first_is_predicted() -> None:
    even = np.full((3, 3), 1 / 3, np.float32)
    evaluation = _evaluate(even, np.array([0, 1, 2]), top_k=2)
    assert [each.recall for each in evaluation.per_class] == [1, 0, 0]
    assert evaluation.top_k_accuracy == pytest.approx(2 / 3)
    assert _evaluate(even, np.array([0, 1, 2]), top_k=1).top_k_accuracy == evaluation.accuracy


def test_top_k_is_at_most_the_number_of_classes_and_says_so() -> None:
    evaluation = _evaluate(top_k=5)
    assert (evaluation.top_k, evaluation.top_k_accuracy) == (3, 1.0)


@pytest.mark.filterwarnings("error")
def test_class_without_images_or_predictions_has_figures_of_zero() -> None:
    evaluation = _evaluate(PROBABILITIES[:1], LABELS[:1])
    assert [(each.precision, each.recall, each.f1, each.support) for each in evaluation.per_class] == [
        (1.0, 1.0, 1.0, 1),
        (0.0, 0.0, 0.0, 0),
        (0.0, 0.0, 0.0, 0),
    ]
    assert evaluation.macro_f1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("confidence", "num_right", "error"),
    [(1.0, 10, 0.0), (1.0, 0, 1.0), (0.75, 10, 0.25), (0.75, 0, 0.75), (0.75, 5, 0.25)],
)
def test_calibration_error_is_the_gap_of_confidence_and_accuracy(
    confidence: float, num_right: int, error: float
) -> None:
    probabilities = np.tile(np.array([confidence, 1 - confidence], np.float32), (10, 1))
    labels = np.where(np.arange(10) < num_right, 0, 1)
    assert _evaluate(probabilities, labels, ("a", "b")).expected_calibration_error == pytest.approx(error)


def test_calibration_bins_hold_their_upper_edge() -> None:
    # 0.75 and 0.7 share the bin (0.5, 0.75], so one too bold and one too timid make up for each other.
    probabilities = np.array([[0.75, 0.25], [0.7, 0.3]], np.float32)
    evaluation = _evaluate(probabilities, np.array([0, 1]), ("a", "b"), bins=4)
    assert evaluation.expected_calibration_error == pytest.approx(abs(1 - 1.45) / 2)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (PROBABILITIES[:3], r"of shape \(4, 3\), images by classes, received \(3, 3\); use a model of these classes"),
        (PROBABILITIES[:, :2], r"of shape \(4, 3\).*received \(4, 2\)"),
        (PROBABILITIES[:, 0], r"received \(4,\)"),
        (PROBABILITIES * np.array([[1], [np.nan], [1], [1]]), "gives NaN or infinity for 1 of 4 images; train again"),
        (PROBABILITIES + np.inf, "gives NaN or infinity for 4 of 4 images"),
        (PROBABILITIES * 8 - 3, r"must be probabilities, 0 to 1 with sum 1, received -2 to 3 .*end it with a softmax"),
        (PROBABILITIES / 2, r"with a sum of 0\.5; end it with a softmax"),
    ],
)
def test_what_are_no_probabilities_is_a_model_error(probabilities: npt.NDArray[np.float32], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _evaluate(probabilities)


def test_rounded_probabilities_of_a_quantised_model_are_accepted() -> None:
    assert _evaluate((np.round(PROBABILITIES * 16) * 1.05 / 16).astype(np.float32)).num_correct == 2


def test_no_images_are_a_dataset_error() -> None:
    with pytest.raises(DatasetError, match="no images to evaluate on; prepare a dataset with a test split"):
        _evaluate(PROBABILITIES[:0], LABELS[:0])


PATHS = ["cat/a.jpg", 'cat/größe, "2".jpg', "dog/two\nlines.jpg", "emu/\udcff.jpg"]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_is_read_back_as_written(tmp_path: Path) -> None:
    probabilities, labels = _random_case(seed=2, number=31, classes=3)
    evaluation = _evaluate(probabilities, labels)
    write_evaluation(tmp_path, evaluation, probabilities, labels, ["x"] * 31)
    assert read_evaluation(tmp_path) == evaluation
    np.testing.assert_array_equal(read_probabilities(tmp_path, 31), probabilities)


def test_metrics_file_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    write_evaluation(tmp_path, _evaluate(), PROBABILITIES, LABELS, PATHS)
    metrics = json.loads((tmp_path / METRICS_FILE).read_bytes())
    keys = "accuracy loss top_k top_k_accuracy expected_calibration_error num_images num_correct macro_precision "
    keys += "macro_recall macro_f1 class_names per_class first_image"
    assert sorted(metrics) == sorted(keys.split())
    assert metrics["first_image"] == {"path": "cat/a.jpg", "actual": "cat", "predicted": "cat", "probability": 0.75}
    assert metrics["class_names"] == list(NAMES)
    assert metrics["per_class"][0] == {"name": "cat", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert metrics["macro_recall"] == 0.5
    matrix = (tmp_path / CONFUSION_FILE).read_text()
    assert matrix == "actual,cat,dog,emu\ncat,1,1,0\ndog,0,1,0\nemu,1,0,0\n"


def test_predictions_have_a_row_for_every_image(tmp_path: Path) -> None:
    write_evaluation(tmp_path, _evaluate(), PROBABILITIES, LABELS, PATHS)
    rows = _rows(tmp_path / PREDICTIONS_FILE)
    assert list(rows[0]) == ["path", "label", "predicted", "probability", "correct"]
    assert [row["path"] for row in rows] == [*PATHS[:3], r"emu/\xff.jpg"]
    assert [(row["label"], row["predicted"], row["probability"], row["correct"]) for row in rows] == [
        ("cat", "cat", "0.750000", "1"),
        ("cat", "dog", "0.500000", "0"),
        ("dog", "dog", "0.625000", "1"),
        ("emu", "cat", "0.500000", "0"),
    ]


def test_report_has_the_classes_and_the_averages_of_sklearn(tmp_path: Path) -> None:
    probabilities, labels = _random_case(seed=3, number=200, classes=3)
    write_evaluation(tmp_path, _evaluate(probabilities, labels), probabilities, labels, ["x"] * 200)
    theirs = classification_report(labels, probabilities.argmax(axis=1), target_names=NAMES, output_dict=True)
    rows = _rows(tmp_path / REPORT_FILE)
    assert [row["class"] for row in rows] == [*NAMES, "macro avg", "weighted avg"]
    for row in rows:
        figures = [float(row[key]) for key in ("precision", "recall", "f1", "support")]
        expected = [theirs[row["class"]][key] for key in ("precision", "recall", "f1-score", "support")]
        assert figures == pytest.approx(expected, abs=1e-6)


def test_a_thousand_classes_make_small_metrics_and_a_matrix_of_their_own(tmp_path: Path) -> None:
    probabilities, labels = _random_case(seed=4, number=1500, classes=1000)
    names = tuple(f"class {number:03}" for number in range(1000))
    evaluation = _evaluate(probabilities, labels, names)
    write_evaluation(tmp_path, evaluation, probabilities, labels, ["x"] * 1500)
    assert (tmp_path / METRICS_FILE).stat().st_size < 300_000
    header, *rows = csv.reader((tmp_path / CONFUSION_FILE).read_text().splitlines())
    assert header == ["actual", *names]
    assert [row[0] for row in rows] == list(names)
    assert sum(int(count) for row in rows for count in row[1:]) == 1500
    assert read_evaluation(tmp_path) == evaluation


@pytest.mark.parametrize(
    ("names", "averages"),
    [
        (("accuracy", "dog", "emu"), ["macro avg", "weighted avg"]),
        (("macro avg", "dog", "emu"), ["(macro avg)", "weighted avg"]),
        (("macro avg", "(macro avg)", "weighted avg"), ["((macro avg))", "(weighted avg)"]),
    ],
)
def test_the_averages_never_have_the_name_of_a_class(
    tmp_path: Path, names: tuple[str, ...], averages: list[str]
) -> None:
    write_evaluation(tmp_path, _evaluate(class_names=names), PROBABILITIES, LABELS, PATHS)
    assert [row["class"] for row in _rows(tmp_path / REPORT_FILE)] == [*names, *averages]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"per_class": [1]}'])
def test_damaged_metrics_are_a_registry_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(RegistryError, match=r"has no metrics\.json: evaluate it with `cnnpipe evaluate"):
        read_evaluation(tmp_path)
    (tmp_path / METRICS_FILE).write_text(content)
    with pytest.raises(RegistryError, match=r"metrics\.json is damaged: .*; evaluate the run again"):
        read_evaluation(tmp_path)


def test_onnx_probabilities_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    images = np.repeat(load_digits()[0][:50, :, :, None], 3, axis=3)
    session = open_session(write_model(tmp_path / "tiny.onnx"), "cpu")
    for batch_size in (1, 7, 32, 100, None):
        probabilities = predict_onnx(session, images, batch_size)
        assert probabilities.dtype == np.float32
        assert probabilities == pytest.approx(expected_probabilities(images), abs=1e-5)


def test_keras_probabilities_do_not_depend_on_the_batch_size(finished_run: Path, digits: PreparedDataset) -> None:
    images = digits.images("test")[:50]
    model = load_keras_model(finished_run / "model.keras")
    expected = np.asarray(model(np.asarray(images), training=False))
    for batch_size in (1, 7, 50, 100):
        probabilities = predict_keras(model, images, batch_size)
        assert probabilities.dtype == np.float32
        assert probabilities == pytest.approx(expected, abs=1e-5)


def test_no_images_give_no_probabilities(finished_run: Path, digits: PreparedDataset) -> None:
    none = digits.images("test")[:0]
    assert predict_keras(finished_run / "model.keras", none).shape == (0, 10)
    assert predict_onnx(open_session(finished_run / "model.onnx", "cpu"), none).shape == (0, 10)


def test_keras_and_onnx_model_of_a_run_score_the_same(finished_run: Path, digits: PreparedDataset) -> None:
    settings = EvaluateSettings()
    keras_evaluation = evaluate_split(open_model(finished_run / "model.keras"), digits, settings)
    onnx_evaluation = evaluate_split(open_model(finished_run / "model.onnx"), digits, settings)
    assert keras_evaluation == read_evaluation(finished_run)
    assert keras_evaluation.num_images == digits.num_images["test"]
    assert onnx_evaluation.per_class == keras_evaluation.per_class
    assert onnx_evaluation.loss == pytest.approx(keras_evaluation.loss, abs=1e-5)
    assert len(_rows(finished_run / PREDICTIONS_FILE)) == digits.num_images["test"]
    trained = predict_keras(finished_run / "model.keras", digits.images("test"))
    np.testing.assert_array_equal(np.load(finished_run / PROBABILITIES_FILE), trained)


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """150 digits of 8x8 pixels, prepared from a folder; its classes are `0` to `9`."""
    folder = tmp_path_factory.mktemp("small") / "digits8"
    write_digits(folder, range(150))
    prepare = PrepareSettings(dataset=str(folder), image_size=(8, 8), min_images_per_class=1)
    return prepare_dataset(prepare, folder.parent / "data")


def test_onnx_model_is_scored_on_any_dataset_with_its_classes(tmp_path: Path, small_digits: PreparedDataset) -> None:
    model = write_model(tmp_path / "tiny.onnx", model_info(class_names=tuple("0123456789")))
    evaluation = evaluate_split(open_model(model), small_digits, EvaluateSettings())
    assert evaluation.num_images == small_digits.num_images["test"]
    predicted = expected_probabilities(np.asarray(small_digits.images("test"))).argmax(axis=1)
    assert evaluation.accuracy == np.mean(predicted == small_digits.labels("test"))


@pytest.mark.parametrize(
    ("class_names", "difference"),
    [
        (tuple("1234567890"), "the same in another order"),
        ((*"012345678", "neun"), "only the model has neun; only the dataset has 9"),
        (tuple("abcdefghij"), "only the model has a, b, c, …; only the dataset has 0, 1, 2, …"),
    ],
)
def test_onnx_model_of_other_classes_is_refused(
    tmp_path: Path, small_digits: PreparedDataset, class_names: tuple[str, ...], difference: str
) -> None:
    model = write_model(tmp_path / "tiny.onnx", model_info(class_names=class_names))
    with pytest.raises(ModelError, match=f"they differ: {difference}; evaluate it on a dataset with its own classes"):
        evaluate_split(open_model(model), small_digits, EvaluateSettings())


def test_model_of_another_image_size_is_refused(finished_run: Path, small_digits: PreparedDataset) -> None:
    for file in ("model.keras", "model.onnx"):
        with pytest.raises(ModelError, match=r"takes images of 32x32 pixels, the dataset .* with 8x8; prepare digits8"):
            evaluate_split(open_model(finished_run / file), small_digits, EvaluateSettings())


def test_keras_model_of_a_run_with_other_classes_is_refused(artifacts: Path, digits: PreparedDataset) -> None:
    run = next((artifacts / "digits" / "runs").iterdir())
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"9"', '"neun"'))
    with pytest.raises(ModelError, match="only the model has neun; only the dataset has 9"):
        evaluate_split(open_model(run / "model.keras"), digits, EvaluateSettings())
    manifest.unlink()  # an evaluated run that is not complete: its metrics name the classes
    metrics = run / METRICS_FILE
    metrics.write_text(metrics.read_text().replace('"9"', '"nine"'))
    with pytest.raises(ModelError, match="only the model has nine; only the dataset has 9"):
        evaluate_split(open_model(run / "model.keras"), digits, EvaluateSettings())


def test_run_with_damaged_metrics_is_evaluated_again(artifacts: Path) -> None:
    run = next((artifacts / "digits" / "runs").iterdir())
    (run / "manifest.json").unlink()
    before = (run / METRICS_FILE).read_bytes()
    (run / METRICS_FILE).write_bytes(before[:100])
    evaluate_run(run)
    assert (run / METRICS_FILE).read_bytes() == before


def test_file_that_is_no_model_is_a_model_error_of_one_line(tmp_path: Path, digits: PreparedDataset) -> None:
    for name in ("model.keras", "model.onnx"):
        (tmp_path / name).write_bytes(b"no model at all")
        with pytest.raises(ModelError, match=name) as caught:
            evaluate_split(open_model(tmp_path / name), digits, EvaluateSettings())
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"must end in \.keras or \.onnx, received .*model\.h5"):
        evaluate_split(open_model(tmp_path / "model.h5"), digits, EvaluateSettings())
    with pytest.raises(ModelError, match=r"no model file at .*none\.keras; check the path"):
        evaluate_split(open_model(tmp_path / "none.keras"), digits, EvaluateSettings())


def test_truncated_keras_file_is_a_model_error(finished_run: Path, tmp_path: Path) -> None:
    content = (finished_run / "model.keras").read_bytes()
    damaged = bytearray(content)
    damaged[200:400] = bytes(200)
    for part, reason in ((content[: len(content) // 2], "or a truncated one"), (bytes(damaged), "that can be loaded")):
        (tmp_path / "model.keras").write_bytes(part)
        with pytest.raises(ModelError, match=rf"model\.keras is not a Keras model,? {reason}.*; train again"):
            load_keras_model(tmp_path / "model.keras")


def test_keras_model_that_classifies_no_images_is_refused(tmp_path: Path) -> None:
    from cnnpipe.train.backend import keras

    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "model.keras")
    with pytest.raises(
        ModelError, match=r"must map .* images to .*, received input \(None, 4\) and output \(None, 2\)"
    ):
        load_keras_model(tmp_path / "model.keras")


def test_evaluating_an_onnx_model_waits_for_no_tensorflow() -> None:
    program = "import sys, cnnpipe.evaluate.evaluation; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
