"""The statistics of a paired comparison, and what differs between two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Pool, write_run
from typer.testing import CliRunner

from cnnpipe.cli import app
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.promote.comparison import bound_difference, find_worst_class, mcnemar_test
from cnnpipe.promote.gate import conclude_run


def test_mcnemar_test_is_the_sign_test_of_the_discordant_pairs() -> None:
    assert mcnemar_test(0, 0) == 1.0
    assert mcnemar_test(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar_test(1, 5, "less") == pytest.approx(7 / 2**6)


def test_bound_of_the_difference_is_tangos(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound_difference(0, 0, 359) == pytest.approx(-2.7055 / (359 + 2.7055), abs=1e-6)
    assert bound_difference(0, 20, 20) == -1.0
    # Tango's own example, 44 pairs with one discordant: -0.118 to 0.059 with 95 % confidence on both sides.
    monkeypatch.setattr("cnnpipe.promote.comparison._QUANTILE", 1.959964)
    assert bound_difference(0, 1, 44) == pytest.approx(-0.118, abs=5e-4)
    assert -bound_difference(1, 0, 44) == pytest.approx(0.059, abs=5e-4)


@pytest.mark.parametrize(("gained", "lost", "num_images"), [(5, 12, 359), (20, 35, 1000), (300, 340, 8000)])
def test_true_difference_is_below_the_bound_as_rarely_as_it_should(gained: int, lost: int, num_images: int) -> None:
    pairs = np.random.default_rng(0).multinomial(
        num_images, [gained / num_images, lost / num_images, 1 - (gained + lost) / num_images], 1000
    )
    true = (gained - lost) / num_images
    missed = sum(bound_difference(int(more), int(less), num_images) > true for more, less, _ in pairs)
    assert 0.02 < missed / 1000 < 0.08


def test_of_many_classes_one_that_loses_by_chance_is_not_significant_but_one_that_collapses_is() -> None:
    labels, names = np.repeat(np.arange(1000), 10), tuple(map(str, range(1000)))
    champion, run = np.ones(10_000, bool), np.ones(10_000, bool)
    for label in range(1000):  # every class has five discordant pairs; 30 lose all five, as 1 in 32 does by chance
        (run if label < 30 else champion)[10 * label : 10 * label + 5] = False
    by_chance = find_worst_class(run, champion, labels, names, 0.05)
    assert by_chance.p_value >= by_chance.max_p_value
    run[70:80] = False
    worst = find_worst_class(run, champion, labels, names, 0.05)
    assert (worst.name, worst.drop, worst.p_value) == ("7", 1.0, 1 / 2**10)
    assert worst.p_value < worst.max_p_value


def _show(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_diff_shows_settings_recall_and_the_paired_test(tmp_path: Path, digits: PreparedDataset) -> None:
    labels = np.arange(200) % 10
    pool = Pool.make(labels)
    pool.answer(0, labels)
    pool.answer(1, pool.wrong_at(20, 30, 47))
    dataset = pool.write(tmp_path / "dataset", digits, train=range(180, 190), val=range(190, 200), test=range(180))
    places = ("--artifacts", tmp_path / "artifacts")
    runs = [
        write_run(tmp_path / "artifacts", name, dataset, column, min_accuracy=0.5 + 0.1 * column)
        for column, name in enumerate(("20260101T020000Z", "20260102T020000Z"))
    ]
    for run in runs:
        conclude_run(run)

    found: dict[str, Any] = json.loads(_show("models", "diff", "tiny", runs[1], *places, "--json"))

    assert found["settings"] == {"promote.min_accuracy": [0.5, 0.6]}
    assert found["accuracy"] == [1.0, pytest.approx(177 / 180)]
    assert found["recall"]["digit 0"] == [1.0, pytest.approx(16 / 18)]
    assert (found["comparison"]["gained"], found["comparison"]["lost"]) == (0, 3)
    text = _show("models", "diff", "tiny", "tiny/20260102T020000Z", *places)
    assert "comparison.lost_paths                   image-20, image-30, image-47" in text
    shown = _show("models", "show", "tiny/20260102T020000Z", *places)
    assert "decision.state" in shown
    assert "Unchanged" in shown

    (dataset.path / "dataset.json").unlink()
    gone = json.loads(_show("models", "diff", "tiny", runs[1], *places, "--json"))
    assert (gone["comparison"], gone["accuracy"]) == (None, found["accuracy"])
    assert "dataset.json" in gone["not_compared"]
