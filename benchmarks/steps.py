"""Count the parts of a training step as a GPU runs it, on any machine: `python -m benchmarks.steps PREPARED`.

Prints for each preset the nodes of the step's graph, the instructions of the code that XLA makes of it, and the seconds
that XLA takes to compile it, on this machine's CPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

from benchmarks.tables import markdown_lines
from cnnpipe.prepare.dataset import PreparedDataset, load_prepared
from cnnpipe.settings import TrainSettings
from cnnpipe.train.backend import pipeline
from cnnpipe.train.fit import build_models
from cnnpipe.train.presets import PRESETS, resolve_recipe


def count_step(dataset: PreparedDataset, preset: str) -> tuple[str, ...]:
    """Return the row of a preset."""
    recipe = resolve_recipe(TrainSettings.model_validate({"preset": preset}), dataset.num_images["train"], "cuda:0")
    models = build_models(recipe, dataset, 0, "cuda:0", "bfloat16")
    size, model = dataset.image_size, models.steps[False]
    batch = next(iter(pipeline(models.batches)))
    step: Any = tf.function(model.train_step, jit_compile=True)
    graph = step.get_concrete_function(batch).graph.as_graph_def()
    nodes = len(graph.node) + sum(len(each.node_def) for each in graph.library.function)
    began = time.perf_counter()
    step(batch)
    seconds = time.perf_counter() - began
    code = step.experimental_get_compiler_ir(batch)(stage="optimized_hlo")
    instructions = sum(" = " in line for line in code.splitlines())
    return (preset, f"{size[0]}x{size[1]}", f"{nodes:,}", f"{instructions:,}", f"{seconds:.1f}")


if __name__ == "__main__":
    prepared = load_prepared(Path(sys.argv[1]))
    header = ("preset", "images", "nodes", "instructions", "s to compile, and one step")
    for line in markdown_lines([header, *(count_step(prepared, preset) for preset in sys.argv[2:] or PRESETS)]):
        print(line)
