"""Training as on a GPU, compiled by XLA: on a CPU here, whose XLA lacks the same operations.

In processes of their own: TensorFlow reads its flags once, and in a process that has trained on a CPU it is told to be
deterministic, for which Keras does without XLA. So the files of compiled code are counted, which only XLA writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from tiny_models import write_digits

from cnnpipe.prepare.dataset import prepare_dataset
from cnnpipe.settings import PrepareSettings
from cnnpipe.train.stage import set_xla_flags

CASES: Final[dict[str, dict[str, Any]]] = {
    "baseline": {"precision": "float32"},
    "fast, float16": {"preset": "fast", "precision": "float16"},
    "accurate": {"preset": "accurate", "precision": "bfloat16"},
}
OTHER_CASES: Final[dict[str, dict[str, Any]]] = {
    "baseline, augmented, images sent": {"augment": True, "precision": "float32", "resident": False},
    "baseline, float16": {"precision": "float16"},
    "fast": {"preset": "fast", "precision": "bfloat16"},
    "fast, not augmented, images sent": {"preset": "fast", "augment": False, "precision": "float32", "resident": False},
    "accurate, float16, images sent": {"preset": "accurate", "precision": "float16", "resident": False},
}

TRAIN: Final = """
import json, sys
from pathlib import Path
from cnnpipe.train.stage import set_xla_flags

folder, prepared, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
set_xla_flags(folder / "compiled", "GPU of a test")
from cnnpipe.settings import RetrainSettings, TrainSettings
from cnnpipe.train import fit
from cnnpipe.prepare.dataset import load_prepared

fit.select_device = lambda device: "cuda:0"  # what the device is taken for; a CPU does the arithmetic
outcomes = {}
for name, values in cases.items():
    resident = values.pop("resident", True)
    fit.stay_on_device = lambda images, device: resident
    settings = RetrainSettings(train=TrainSettings(epochs=1, batch_size=60, **values))
    run = folder / name
    run.mkdir(parents=True)
    before = set((folder / "compiled").rglob("xla*"))
    try:
        fit.train_model(settings, load_prepared(prepared), run)
        outcomes[name] = f"{len(set((folder / 'compiled').rglob('xla*')) - before)} compiled"
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}"

from cnnpipe.train.batches import shrink
from cnnpipe.train.backend import keras
import tensorflow as tf

def shape_of(function):
    try:
        return list(tf.function(function, jit_compile=True)(tf.zeros((4, 32, 32, 3), tf.uint8)).shape)
    except Exception as error:
        return str(error)

outcomes["shrink"] = shape_of(lambda images: shrink(images, (24, 24)))
outcomes["resize"] = shape_of(lambda images: keras.ops.image.resize(images, (24, 24), antialias=True))
print(json.dumps(outcomes))
"""


def train(folder: Path, prepared: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train one epoch of each case in one process; return what became of them."""
    # Without optimising, compiling takes half the time, and refuses the same operations.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", TRAIN, str(folder), str(prepared), json.dumps(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits at 16x16 pixels."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, range(200))
    settings = PrepareSettings(dataset=str(folder), image_size=(16, 16), min_images_per_class=5)
    return prepare_dataset(settings, tmp_path_factory.mktemp("data")).path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def outcomes(prepared: Path, folder: Path) -> dict[str, Any]:
    return train(folder / "first", prepared, CASES)


@pytest.mark.parametrize("case", CASES)
def test_xla_compiles_the_training_step_of_every_preset_and_for_one_shape_only(
    case: str, outcomes: dict[str, Any], folder: Path
) -> None:
    assert outcomes[case] == "1 compiled"
    assert (folder / "first" / case / "model.keras").is_file()


@pytest.mark.slow
def test_xla_compiles_every_precision_with_and_without_augmentation(prepared: Path, tmp_path: Path) -> None:
    outcomes = train(tmp_path, prepared, OTHER_CASES)
    assert {case: outcomes[case] for case in OTHER_CASES} == dict.fromkeys(OTHER_CASES, "1 compiled")


def test_xla_compiles_our_shrinking_where_it_refuses_the_antialiased_resizing_of_keras(
    outcomes: dict[str, Any],
) -> None:
    assert outcomes["shrink"] == [4, 24, 24, 3]
    assert "ScaleAndTranslate" in outcomes["resize"]


@pytest.mark.usefixtures("outcomes")
def test_the_next_process_takes_the_compiled_code_that_is_there(prepared: Path, folder: Path) -> None:
    (folder / "second").mkdir()
    (folder / "second" / "compiled").symlink_to(folder / "first" / "compiled")
    again = train(folder / "second", prepared, {"baseline": CASES["baseline"]})
    assert again["baseline"] == "0 compiled"


def test_compiled_code_is_bounded_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_max_cluster_size=7")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    for age in range(5):
        file = tmp_path / "earlier" / f"{age}.pb"
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as opened:
            opened.truncate(200 << 20)
        os.utime(file, (1e9 - age, 1e9 - age))

    set_xla_flags(tmp_path, "NVIDIA H100 80GB HBM3", "12.8")

    assert sorted(file.name for file in tmp_path.rglob("*.pb")) == ["0.pb", "1.pb"]
    flag, last = os.environ["TF_XLA_FLAGS"].rsplit(" ", 1)
    assert last == "--tf_xla_max_cluster_size=7"
    assert flag.startswith(f"--tf_xla_persistent_cache_directory='{tmp_path}/")
    assert flag.endswith("-NVIDIA-H100-80GB-HBM3-12.8'")
    assert os.environ["XLA_FLAGS"].endswith(" --xla_gpu_enable_triton_gemm=true"), "what the user sets decides"
