"""Run cnnpipe and its peers side by side. Nothing else should use the machine meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.classification import compare_classification, compare_start_up
from benchmarks.contenders import find_models, line_up
from benchmarks.gathering import measure_gathering
from benchmarks.memory import Layout, measure_memory
from benchmarks.nights import measure_nights
from benchmarks.photos import make_photos
from benchmarks.training import compare_training
from cnnpipe.console import ArtifactsOption, DataOption, command
from cnnpipe.settings import PrepareSettings

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

_PHOTO_SIZE, _LARGE_PHOTO_SIZE = (500, 375), (4000, 3000)  # (width, height) in pixels

FolderArgument = Annotated[Path, typer.Argument(help="Folder of small images, such as CIFAR-10's as JPEG files.")]
ModelOption = Annotated[
    str | None, typer.Option(help="A name (its champion), a run folder or an .onnx file; default: the only champion.")
]
_ARTIFACTS = Path("artifacts")
_FILES = [10_000]
_PRESETS = ["baseline", "fast"]
_LAYOUTS = list(Layout)
_NO_FRACTIONS: list[float] = []


@app.command()
@command
def training(
    dataset: Annotated[str, typer.Argument(help="Dataset to train on.")] = "digits",
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of every training; 0: the default of each.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each contender is trained.")] = 3,
    preset: Annotated[
        list[str], typer.Option(help="Preset to train beside the tutorial's script; may be repeated.")
    ] = _PRESETS,
    fraction: Annotated[
        list[float],
        typer.Option("--fraction", min=0.01, help="Also train the first preset for this fraction of its time."),
    ] = _NO_FRACTIONS,
    data: DataOption = Path("data"),
) -> None:
    """Train the tutorial's script and the presets side by side; prints medians, and ratios pair by pair."""
    from cnnpipe.prepare.dataset import prepare_dataset

    prepared = prepare_dataset(PrepareSettings(dataset=dataset), data).path
    for line in compare_training(prepared, epochs, rounds, preset, fraction):
        typer.echo(line)


@app.command()
@command
def classification(
    folder: FolderArgument,
    model: ModelOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each contender classifies each folder.")] = 5,
    photos: Annotated[int, typer.Option(min=0, help="Photos of 500x375 to make and classify; 0 for none.")] = 2000,
    large_photos: Annotated[
        int, typer.Option(min=0, help="Photos of 4000x3000 to make and classify; 0 for none.")
    ] = 100,
    cache: Annotated[Path, typer.Option(help="Folder that keeps the photos for the next run.")] = Path("data/photos"),
    torch: Annotated[Path | None, typer.Option(help="Folder that holds PyTorch, where it is not installed.")] = None,
    artifacts: ArtifactsOption = _ARTIFACTS,
) -> None:
    """Classify small images and photos beside common scripts, and beside the limit of the machine."""
    models = find_models(model, artifacts)
    contenders, missing = line_up(models, torch)
    folders = {"small images": folder}
    if photos:
        folders["photos of 500x375"] = make_photos(folder, cache, photos, _PHOTO_SIZE)
    if large_photos:
        folders["photos of 4000x3000"] = make_photos(folder, cache, large_photos, _LARGE_PHOTO_SIZE)
    for line in (*missing, "", *compare_start_up(folder, contenders, rounds)):
        typer.echo(line)
    for title, images in folders.items():
        for line in ("", f"{title}:", "", *compare_classification(images, contenders, models, rounds)):
            typer.echo(line)


@app.command()
@command
def gathering(
    folder: FolderArgument,
    model: ModelOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step; default: what suits a CPU.")] = None,
    artifacts: ArtifactsOption = _ARTIFACTS,
) -> None:
    """Measure the CPU time that the process which gathers the rows spends on a file."""
    for line in measure_gathering(folder, model, artifacts, batch_size):
        typer.echo(line)


@app.command()
@command
def memory(
    folder: FolderArgument,
    model: ModelOption = None,
    files: Annotated[list[int], typer.Option(min=1, help="Files in a tree; may be repeated.")] = _FILES,
    layout: Annotated[
        list[Layout], typer.Option(help="folders (of 10,000 files) or flat; may be repeated.")
    ] = _LAYOUTS,
    scratch: Annotated[Path, typer.Option(help="Folder for the trees, which are removed afterwards.")] = Path(
        "data/trees"
    ),
    artifacts: ArtifactsOption = _ARTIFACTS,
) -> None:
    """Classify trees of many hard links: memory of parent and children, and speed."""
    for line in measure_memory(folder, find_models(model, artifacts), files, layout, scratch):
        typer.echo(line)


@app.command()
@command
def nights(
    nights: Annotated[int, typer.Option(min=1, help="Nights to run; each takes some seconds.")] = 30,
    keep: Annotated[int, typer.Option(min=1, help="Runs to keep, and days.")] = 5,
) -> None:
    """Retrain night after night on a folder that grows and shrinks: time, disk and database of each."""
    for line in measure_nights(nights, keep):
        typer.echo(line)


if __name__ == "__main__":
    app()
