"""The whole of a retraining with the preset as it is, all 15 epochs of it: what the quick tests cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnnpipe import stages
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.registry import champion_run
from cnnpipe.settings import RetrainSettings

pytestmark = pytest.mark.slow


def test_the_baseline_learns_the_digits_and_becomes_the_champion(digits: PreparedDataset, tmp_path: Path) -> None:
    run = stages.train_run(RetrainSettings(), digits.path, tmp_path).run
    evaluation = stages.evaluate_run(run)
    stages.plot_run(run)
    parity = stages.export_run(run)
    decision = stages.conclude_run(run)

    assert len((run / "history.csv").read_text().splitlines()) == 1 + 15
    assert evaluation.accuracy >= 0.95
    assert parity.agreement >= 0.999
    assert decision.promoted
    assert champion_run(tmp_path, "digits") == run
