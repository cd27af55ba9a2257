"""Who may import whom; each case in a fresh interpreter, because imports leave traces."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cnnpipe"
TRAINING = ("tensorflow", "keras", "matplotlib", "sklearn", "tf2onnx", "onnx")
FLOWS = ("prefect", "fastapi")
GROUND_FLOOR = (
    "config", "decoding", "decoding_process", "devices", "environment", "errors", "files", "finding", "images",
    "leftovers", "listing", "manifest", "nightly", "pidfile", "progress", "registry", "selection", "storage",
    "variants", "workers",
)  # fmt: skip


def loaded_packages(modules: str) -> set[str]:
    """Return the top-level packages that are loaded after `import modules`."""
    code = f"import {modules}, sys, json; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports anywhere, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_cnnpipe_itself_loads_nothing() -> None:
    assert loaded_packages("cnnpipe") - loaded_packages("builtins") == {"cnnpipe"}


def test_ground_floor_loads_no_heavy_package() -> None:
    loaded = loaded_packages(", ".join(f"cnnpipe.{name}" for name in GROUND_FLOOR))
    assert not loaded & {*TRAINING, *FLOWS, "onnxruntime", "pyarrow", "httpx"}


@pytest.mark.parametrize("module", ["session", "engine", "predictions", "classify", "summary"])
def test_inference_loads_no_training_package(module: str) -> None:
    assert not loaded_packages(f"cnnpipe.inference.{module}") & {*TRAINING, *FLOWS, "httpx", "pyarrow"}


def test_decoding_worker_loads_only_the_decoder() -> None:
    loaded = loaded_packages("cnnpipe.decoding")
    assert {"numpy", "PIL"} <= loaded
    assert not loaded & {*TRAINING, *FLOWS, "onnxruntime", "pydantic", "pyarrow", "typer", "rich"}


def test_command_line_loads_no_wing() -> None:
    assert not loaded_packages("cnnpipe.cli") & {*TRAINING, *FLOWS, "onnxruntime", "pyarrow", "httpx"}


def test_classify_flow_loads_no_training_package() -> None:
    assert not loaded_packages("flows.classify") & set(TRAINING)


def test_cnnpipe_never_imports_prefect_or_the_flows() -> None:
    wrong = [
        (module_name(path), name)
        for path in PACKAGE.rglob("*.py")
        for name in imported_modules(path)
        if name.split(".")[0] in ("prefect", "flows", "prefect_dask")
    ]
    assert not wrong


def test_ground_floor_imports_no_wing() -> None:
    wrong = [
        (floor, name)
        for floor in GROUND_FLOOR
        for name in imported_modules(PACKAGE / f"{floor}.py")
        if name.startswith(("cnnpipe.training", "cnnpipe.inference", "cnnpipe.cli", "cnnpipe.console"))
    ]
    assert not wrong


def test_inference_never_imports_training() -> None:
    wrong = [
        (module_name(path), name)
        for path in (PACKAGE / "inference").glob("*.py")
        for name in imported_modules(path)
        if name.startswith(("cnnpipe.training", "cnnpipe.cli", "cnnpipe.console"))
    ]
    assert not wrong


def test_training_uses_of_inference_only_the_session() -> None:
    wrong = [
        (module_name(path), name)
        for path in (PACKAGE / "training").glob("*.py")
        for name in imported_modules(path)
        if name.startswith("cnnpipe.inference") and not name.startswith("cnnpipe.inference.session")
    ]
    assert not wrong
