"""The whole of a retraining with the preset as it is, all 15 epochs of it: what the quick tests cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnnpipe.evaluate.evaluation import evaluate_run
from cnnpipe.export.onnx import export_run
from cnnpipe.plot.plots import plot_run
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.promote.gate import conclude_run
from cnnpipe.registry import champion_run
from cnnpipe.settings import RetrainSettings
from cnnpipe.train.stage import train_run

pytestmark = pytest.mark.slow


def test_the_baseline_learns_the_digits_and_becomes_the_champion(digits: PreparedDataset, tmp_path: Path) -> None:
    run = train_run(RetrainSettings(), digits.path, tmp_path).run
    evaluation = evaluate_run(run)
    plot_run(run)
    parity = export_run(run)
    decision = conclude_run(run)

    assert len((run / "history.csv").read_text().splitlines()) == 1 + 15
    assert evaluation.accuracy >= 0.95
    assert parity.agreement >= 0.999
    assert decision.promoted
    assert champion_run(tmp_path, "digits") == run
