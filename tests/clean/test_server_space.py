"""The stage `clean` on a real Prefect server: the runs it deletes, and the size of the pictures of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from flows import artifacts
from flows.flow_runs import delete_old_runs


def test_only_old_runs_of_the_own_artifacts_are_deleted(prefect_server: None, tmp_path: Path) -> None:
    @flow(name="classify")
    def classify(artifacts: str) -> None:
        pass

    folders = [str(tmp_path), str(tmp_path / "other")]
    states: list[State[Any]] = [classify(folder, return_state=True) for folder in folders]
    own, foreign = (state.state_details.flow_run_id for state in states)
    assert own
    assert foreign
    assert delete_old_runs(str(tmp_path), 1) == 0
    assert delete_old_runs(str(tmp_path), 0) == 1
    with get_client(sync_client=True) as client:
        client.read_flow_run(foreign)
        with pytest.raises(ObjectNotFound):
            client.read_flow_run(own)


def test_the_pictures_of_a_run_take_at_most_300_kilobytes_of_the_database(tmp_path: Path) -> None:
    """Even of noise, which is worse than any picture."""
    noise = np.random.default_rng(0).integers(0, 256, (533, 636, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    limits = (artifacts._MAX_CURVE_BYTES, artifacts._MAX_MATRIX_BYTES, artifacts._MAX_GRID_BYTES)
    curve, matrix, grid = (artifacts._picture("", tmp_path / "picture.png", limit) for limit in limits)
    assert 2 * len(curve) + len(matrix) + 2 * len(grid) <= 300_500
    for picture in (curve, matrix, grid):
        assert re.match(r"!\[\]\(data:image/webp;base64,[A-Za-z0-9+/=]+\)$", picture)
