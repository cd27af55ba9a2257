"""The pictures: written, small, the same every time, and right about what they show."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cnnpipe.errors import RegistryError, StorageError
from cnnpipe.evaluate.metrics import METRICS_FILE, PROBABILITIES_FILE
from cnnpipe.manifest import HISTORY_FILE, MANIFEST_FILE
from cnnpipe.plot import plots
from cnnpipe.plot.plots import (
    PredictedImages,
    plot_confusion_matrix,
    plot_history,
    plot_mistakes,
    plot_run,
    plot_samples,
)
from cnnpipe.storage import write_text

HEADER = "epoch,accuracy,loss,val_accuracy,val_loss,learning_rate,seconds\n"
LONG_NAME = "a class with a long name "
ODD_NAMES = ("a$b$ and $x^", "日本語", "two\nlines", "_hidden", "Größe", "x" * 200, "", "\ud83e", "50 %", r"\frac{a}")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved in a test, to look into."""
    seen: list[Figure] = []
    save = plots.save_figure

    def remember(figure: Figure, path: Path) -> Path:
        seen.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", remember)
    return seen


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def _write_history(run: Path, epochs: int) -> None:
    rng = np.random.default_rng(0)
    done = np.arange(1, epochs + 1) / epochs
    columns = (0.95 - 0.5 * np.exp(-4 * done), np.exp(-2 * done), 0.7 - 0.3 * np.exp(-6 * done), 1 + done**2)
    noisy = [column + rng.normal(0, 0.005, epochs) for column in columns]
    rows = [f"{epoch + 1},{','.join(f'{each[epoch]:.4f}' for each in noisy)},0.001,22.5\n" for epoch in range(epochs)]
    write_text(run / HISTORY_FILE, HEADER + "".join(rows))


def _matrix(num_classes: int, images_per_class: int = 100) -> list[list[int]]:
    rng = np.random.default_rng(num_classes)
    shares = 0.25 * rng.dirichlet(np.full(num_classes, 0.2), num_classes) + 0.75 * np.eye(num_classes)
    return [rng.multinomial(images_per_class, row).tolist() for row in shares]


def _has_white_border(path: Path) -> bool:
    """Return whether nothing touches the edge of a picture, as something that is cut off would."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    return bool(min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) == 255)


def _photos(number: int, side: int = 32) -> npt.NDArray[np.uint8]:
    """Return noise, which is what PNG can compress least."""
    return np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epochs", [1, 2, 15, 200])
def test_curves_are_complete_at_any_number_of_epochs(tmp_path: Path, drawn: list[Figure], epochs: int) -> None:
    _write_history(tmp_path, epochs)
    paths = plot_history(tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "loss.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", HISTORY_FILE, "loss.png"]
    for path, figure, metric in zip(paths, drawn, ("accuracy", "loss"), strict=True):
        assert _has_white_border(path)
        (axes,) = figure.axes
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()[:2]] == ["train", "val"]
        assert axes.get_title() == f"{metric.capitalize()} over {epochs} epoch{'s' if epochs > 1 else ''}"
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 1 <= len(ticks) <= 20
        assert all(tick == round(tick) for tick in ticks)
        bottom, top = axes.get_ylim()
        shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines[:2]])
        assert bottom <= shown.min() <= shown.max() <= top
        assert len(shown) == 2 * epochs


def test_best_epoch_is_the_one_whose_weights_are_kept(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        "1,0.5,1.5,0.60,1.2",
        "2,0.6,1.0,0.70,1.1",
        "3,0.7,0.8,0.70,0.9",
        "4,0.8,0.5,0.70,0.9",
        "5,0.9,0.1,0.65,0.8",
    ]
    write_text(tmp_path / HISTORY_FILE, HEADER + "".join(f"{row},0.001,1\n" for row in rows))
    plot_history(tmp_path)
    assert "best epoch 3: val accuracy 0.7000" in _texts(drawn[0])
    assert "best epoch 3: val loss 0.9000" in _texts(drawn[1])


def test_accuracy_axis_stays_within_reason(tmp_path: Path, drawn: list[Figure]) -> None:
    write_text(tmp_path / HISTORY_FILE, HEADER + "1,1.0,0.001,0.999,0.002,0.1,1\n2,1.0,0.001,1.0,0.002,0.1,1\n")
    plot_history(tmp_path)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert 0.9 <= bottom <= 0.96
    assert 1.0 < top <= 1.02


def test_loss_that_falls_by_magnitudes_is_drawn_logarithmically(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [f"{epoch},0.5,{100 / epoch**3},0.5,{200 / epoch**3},0.1,1\n" for epoch in range(1, 20)]
    write_text(tmp_path / HISTORY_FILE, HEADER + "".join(rows))
    plot_history(tmp_path)
    assert drawn[1].axes[0].get_yscale() == "log"
    assert drawn[1].axes[0].get_ylabel() == "loss (logarithmic)"


@pytest.mark.filterwarnings("error")
def test_loss_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    write_text(tmp_path / HISTORY_FILE, HEADER + "1,0.5,nan,0.5,nan,0.1,1\n2,0.5,inf,0.5,nan,0.1,1\n")
    assert all(path.stat().st_size for path in plot_history(tmp_path))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "num_classes"), [("", 10), (LONG_NAME, 2), (LONG_NAME, 30), (LONG_NAME, 100)])
def test_confusion_matrix_is_uncut_at_any_number_of_classes(tmp_path: Path, name: str, num_classes: int) -> None:
    names = [f"{name}{number}" for number in range(num_classes)]
    path = plot_confusion_matrix(_matrix(num_classes), names, tmp_path / "confusion_matrix.png")
    assert _has_white_border(path)


def test_labels_of_100_classes_do_not_overlap(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"some class {number}" for number in range(100)]
    plot_confusion_matrix(_matrix(100), names, tmp_path / "confusion_matrix.png")
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == names
    boxes = [label.get_window_extent() for label in labels]
    assert all(lower.y1 <= upper.y0 + 1 for upper, lower in pairwise(boxes))


def test_cells_say_counts_and_shares_then_counts_then_nothing(tmp_path: Path, drawn: list[Figure]) -> None:
    for number in (2, 13, 31):
        plot_confusion_matrix(
            (np.eye(number, dtype=int) * 1500 + 500).tolist(), [str(n) for n in range(number)], tmp_path / "m.png"
        )
    cells = [[text.get_text() for text in figure.axes[0].texts] for figure in drawn]
    assert cells[0] == ["2,000\n80.0%", "500\n20.0%", "500\n20.0%", "2,000\n80.0%"]
    assert sorted(set(cells[1])) == ["2,000", "500"]
    assert cells[2] == []
    assert "Confusion matrix: 4,000 of 5,000 right (80.00%)" in _texts(drawn[0])


@pytest.mark.filterwarnings("error")
def test_class_without_images_is_an_empty_row(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_confusion_matrix([[3, 1], [0, 0]], ["cat", "dog"], tmp_path / "m.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["3\n75.0%", "1\n25.0%", "0", "0"]


@pytest.mark.filterwarnings("error")
def test_class_names_of_any_text_can_be_drawn(tmp_path: Path) -> None:
    labels = np.arange(10)
    plot_confusion_matrix(_matrix(10), ODD_NAMES, tmp_path / "m.png")
    plot_samples(PredictedImages(_photos(10), labels, labels[::-1], np.full(10, 0.5), ODD_NAMES), tmp_path / "s.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"),
        ("two\n lines", "two lines"),
        ("exactly-16-chars", "exactly-16-chars"),
        ("golden_retriever", "golden_retriever"),
        ("golden_retrievers", "golden_ret…evers"),
        ("\U0010ffff", "class 7"),
    ],
)
def test_long_names_keep_their_beginning_and_end(name: str, shown: str) -> None:
    assert plots.shorten_name(name, 7, 16) == shown


def test_samples_begin_with_the_first_image_and_span_the_split(tmp_path: Path, drawn: list[Figure]) -> None:
    labels = np.arange(100) // 10
    predicted = np.where(np.arange(100) % 2 == 0, labels, (labels + 1) % 10)
    names = [f"class-{number}" for number in range(10)]
    path = plot_samples(
        PredictedImages(_photos(100), labels, predicted, np.linspace(0.5, 1, 100), names), tmp_path / "samples.png"
    )
    assert _has_white_border(path)
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert len(titles) == 24
    assert titles[0] == "✓ class-0 50.0%\nactual: class-0"
    assert {title.split()[-1] for title in titles} == set(names)
    assert "Sample predictions: 24 of 100 test images; of all, 50.00% are right" in _texts(drawn[0])


def test_right_and_wrong_differ_in_mark_and_colour(tmp_path: Path, drawn: list[Figure]) -> None:
    right = np.array([0, 1])
    plot_samples(
        PredictedImages(_photos(2), right, np.array([0, 0]), np.array([0.9, 0.8]), ["a", "b"]), tmp_path / "samples.png"
    )
    first, second = drawn[0].axes[:2]
    assert (first.get_title()[0], second.get_title()) == ("✓", "✗ a 80.0%\nactual: b")
    assert first.title.get_color() != second.title.get_color()


def test_mistakes_are_shown_by_falling_confidence(tmp_path: Path, drawn: list[Figure]) -> None:
    labels, predicted = np.zeros(60, np.int64), np.arange(60) % 2
    probabilities = np.linspace(0.5, 1, 60)
    path = plot_mistakes(
        PredictedImages(_photos(60), labels, predicted, probabilities, ["a", "b"]), tmp_path / "mistakes.png"
    )
    assert _has_white_border(path)
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    shown = [float(title.split()[2].rstrip("%")) / 100 for title in titles]
    assert all(title.startswith("✗ b") for title in titles)
    assert shown == pytest.approx(sorted(probabilities[1::2], reverse=True)[:24], abs=0.001)
    assert "Most confident mistakes: 24 of 30 among 60 test images" in _texts(drawn[0])


def test_no_mistakes_give_a_picture_that_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    labels = np.zeros(1234, np.int64)
    path = plot_mistakes(
        PredictedImages(_photos(1234, 8), labels, labels, np.ones(1234), ["a", "b"]), tmp_path / "mistakes.png"
    )
    assert path.is_file()
    assert _texts(drawn[0]) == ["No mistakes: all 1,234 test images are classified right"]


def test_same_input_gives_the_same_bytes_in_any_thread(tmp_path: Path) -> None:
    def draw(number: int) -> tuple[bytes, ...]:
        run = tmp_path / str(number)
        _write_history(run, 15)
        matrix = plot_confusion_matrix(_matrix(5), list("abcde"), run / "m.png")
        return tuple(path.read_bytes() for path in (*plot_history(run), matrix))

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(draw, range(2)))) == 1


def test_picture_carries_no_metadata(tmp_path: Path) -> None:
    path = plot_confusion_matrix(_matrix(2), ["a", "b"], tmp_path / "m.png")
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        assert picture.format == "PNG"
        assert picture.info == {}


def test_picture_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*; check the folder, its permissions and the disk"):
        plot_confusion_matrix(_matrix(2), ["a", "b"], tmp_path / "file" / "m.png")


@pytest.fixture
def evaluated_run(artifacts: Path) -> Path:
    """A run that is not complete, with all that its pictures are drawn from."""
    run = next((artifacts / "digits" / "runs").iterdir())
    (run / MANIFEST_FILE).unlink()
    return run


def test_all_pictures_of_a_run_are_drawn_from_its_files(evaluated_run: Path) -> None:
    run = evaluated_run
    names = ["accuracy.png", "loss.png", "confusion_matrix.png", "samples.png", "mistakes.png"]
    before = [(run / name).read_bytes() for name in names]
    for name in names:
        (run / name).unlink()
    assert plot_run(run) == [run / name for name in names]
    assert [(run / name).read_bytes() for name in names] == before


def test_run_evaluated_on_another_dataset_is_refused(evaluated_run: Path) -> None:
    run, file = evaluated_run, evaluated_run / PROBABILITIES_FILE
    probabilities = np.load(file)
    for damage, message in (
        (probabilities[::-1], "was evaluated on another dataset than .*; evaluate it again"),
        (probabilities[1:], r"probabilities_test\.npy has 358 rows for 359 images; evaluate the run again"),
    ):
        np.save(file, damage)
        with pytest.raises(RegistryError, match=message):
            plot_run(run)
    file.write_bytes(b"\x93NUMPY")
    with pytest.raises(RegistryError, match=r"probabilities_test\.npy is damaged: .*; evaluate the run again"):
        plot_run(run)
    file.unlink()
    with pytest.raises(RegistryError, match=r"has no probabilities_test\.npy: evaluate it with `cnnpipe evaluate"):
        plot_run(run)
    np.save(file, probabilities)
    metrics = run / METRICS_FILE
    metrics.write_text(metrics.read_text().replace('"9"', '"neun"'))
    with pytest.raises(RegistryError, match=r"was evaluated on another dataset than .*; evaluate it again"):
        plot_run(run)


_SETTINGS_OF_A_USER = "text.usetex: True\nfont.size: 30\nnonsense: 3\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_settings_of_matplotlib_do_not_change_a_picture(encoding: str, tmp_path: Path) -> None:
    _write_history(tmp_path / "run", 3)
    plot_history(tmp_path / "run")
    plain = (tmp_path / "run" / "loss.png").read_bytes()
    for name in ("home/.config/matplotlib/matplotlibrc", "matplotlibrc", "style"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_SETTINGS_OF_A_USER, encoding=encoding)
    environment = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"MATPLOTLIBRC": str(tmp_path / "style"), "MPLBACKEND": "nonsense"}
    code = "from cnnpipe.plot.plots import plot_history; from pathlib import Path; plot_history(Path('run'))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "run" / "loss.png").read_bytes() == plain
