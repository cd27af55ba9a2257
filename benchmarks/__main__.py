"""`python -m benchmarks`: choose what to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.training import compare_training
from cnnpipe.config import PrepareSettings
from cnnpipe.training.datasets import prepare_dataset

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def training(
    dataset: Annotated[str, typer.Argument(help="Dataset to train on.")] = "digits",
    epochs: Annotated[int, typer.Option(help="Epochs of every training.")] = 3,
    rounds: Annotated[int, typer.Option(help="How often each contender is trained, in turn.")] = 3,
    data: Annotated[Path, typer.Option(help="Folder of raw and prepared datasets.")] = Path("data"),
) -> None:
    """Train the tutorial's script and the presets side by side; prints medians, and ratios pair by pair."""
    prepared = prepare_dataset(PrepareSettings(dataset=dataset), data).path
    for line in compare_training(prepared, epochs, rounds, ["baseline"]):
        typer.echo(line)


if __name__ == "__main__":
    app()
