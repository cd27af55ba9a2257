"""Who may import whom; each case in a fresh interpreter, because imports leave traces."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cnnpipe"
TRAINING = ("tensorflow", "keras", "matplotlib", "sklearn", "tf2onnx", "onnx")
FLOWS = ("prefect", "fastapi")
LIGHT_FOLDERS = ("images", "classify")
"""Stages that run where no training package is loaded."""
STAGES = ("images", "prepare", "train", "evaluate", "plot", "export", "promote", "classify", "clean")
TOP = ("cli", "console")
"""Modules that stand above the stages."""
GROUND_FLOOR = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", *TOP))


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


def test_ground_floor_and_images_load_no_heavy_package() -> None:
    floor = [f"cnnpipe.{name}" for name in GROUND_FLOOR]
    images = [module_name(path) for path in (PACKAGE / "images").glob("[!_]*.py")]
    assert not loaded_packages(", ".join([*floor, *images])) & {*TRAINING, *FLOWS, "pyarrow", "httpx"}


def test_light_stages_load_no_training_package() -> None:
    modules = [module_name(path) for folder in LIGHT_FOLDERS for path in (PACKAGE / folder).glob("[!_]*.py")]
    assert not loaded_packages(", ".join(modules)) & {*TRAINING, *FLOWS, "httpx", "pyarrow"}


def test_decoding_worker_loads_only_the_decoder() -> None:
    loaded = loaded_packages("cnnpipe.images.workers")
    assert {"numpy", "PIL"} <= loaded
    assert not loaded & {*TRAINING, *FLOWS, "onnxruntime", "pydantic", "pyarrow", "typer", "rich"}


def test_command_line_loads_no_wing() -> None:
    assert not loaded_packages("cnnpipe.cli") & {*TRAINING, *FLOWS, "onnxruntime", "pyarrow", "httpx"}


def test_classify_flow_loads_no_training_package() -> None:
    assert not loaded_packages("flows.classify_flow") & set(TRAINING)


def test_cnnpipe_never_imports_prefect_or_the_flows() -> None:
    wrong = [
        (module_name(path), name)
        for path in PACKAGE.rglob("*.py")
        for name in imported_modules(path)
        if name.split(".")[0] in ("prefect", "flows", "prefect_dask")
    ]
    assert not wrong


def test_ground_floor_imports_no_stage() -> None:
    above = tuple(f"cnnpipe.{name}." for name in (*STAGES, *TOP))
    wrong = [
        (floor, name)
        for floor in GROUND_FLOOR
        for name in imported_modules(PACKAGE / f"{floor}.py")
        if f"{name}.".startswith(above) and not name.startswith("cnnpipe.images.")
    ]
    assert not wrong


def test_no_stage_imports_the_command_line() -> None:
    above = tuple(f"cnnpipe.{name}." for name in TOP)
    paths = [path for folder in STAGES for path in (PACKAGE / folder).glob("*.py")]
    assert not [(path.name, name) for path in paths for name in imported_modules(path) if f"{name}.".startswith(above)]


def test_images_and_classify_import_no_other_stage() -> None:
    others = tuple(f"cnnpipe.{name}." for name in STAGES if name not in LIGHT_FOLDERS)
    paths = [path for folder in LIGHT_FOLDERS for path in (PACKAGE / folder).glob("*.py")]
    assert not [(path.name, name) for path in paths for name in imported_modules(path) if name.startswith(others)]
