"""The command `cnnpipe`: every stage by hand, without Prefect.

Each command imports its wing only when it runs, so that `cnnpipe classify` loads no TensorFlow and `--help` is quick.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cnnpipe import __version__
from cnnpipe.console import JsonOption, command, field_lines, progress_bar, run_app, show_result, table_lines
from cnnpipe.errors import RegistryError
from cnnpipe.machine import describe_environment
from cnnpipe.manifest import MANIFEST_FILE, read_manifest
from cnnpipe.nightly import look_at_nightly, prefect_home
from cnnpipe.options import ArtifactsOption, DataOption, takes_settings
from cnnpipe.registry import list_names, promote_run, registry_place, resolve_run, rollback, summarize_runs
from cnnpipe.settings import ClassifySettings, EvaluateSettings, RetrainSettings

__all__ = ["app", "main"]

app = typer.Typer(
    name="cnnpipe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models_app = typer.Typer(
    help="The registry: list runs, show one, promote one, roll back.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(models_app, name="models")

_ARTIFACTS = Path("artifacts")
_DATA = Path("data")

RunArgument = Annotated[str, typer.Argument(help="A run folder, <name>/<run id>, or a name (its champion).")]
NameArgument = Annotated[str, typer.Argument(help="A model's name, such as digits.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnnpipe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train an image-classification CNN, export it to ONNX, and classify folders of images in bulk."""


@app.command()
@command
@takes_settings(RetrainSettings, "dataset", ("prepare",))
def prepare(settings: RetrainSettings, data: DataOption = _DATA, as_json: JsonOption = False) -> None:
    """Decode a dataset into train, val and test arrays; does nothing where that is done already."""
    from cnnpipe.prepare.dataset import prepare_dataset

    with progress_bar() as progress:
        dataset = prepare_dataset(settings.prepare, data, progress=progress)
    show_result(
        {
            "path": str(dataset.path),
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "num_images": dataset.num_images,
            "class_names": list(dataset.class_names),
            "warnings": list(dataset.report.warnings),
        },
        [str(dataset.path)],
        as_json=as_json,
    )


@app.command()
@command
@takes_settings(RetrainSettings, "dataset", ("prepare", "train"))
def train(
    settings: RetrainSettings,
    data: DataOption = _DATA,
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Prepare a dataset and train a network on it, in a new run folder."""
    from cnnpipe.prepare.dataset import prepare_dataset
    from cnnpipe.stages import train_run

    with progress_bar() as progress:
        dataset = prepare_dataset(settings.prepare, data, progress=progress)
        result = train_run(settings, dataset.path, artifacts, progress)
    show_result({**asdict(result), "run": str(result.run)}, [str(result.run)], as_json=as_json)


@app.command()
@command
@takes_settings(EvaluateSettings, "model")
def evaluate(
    settings: EvaluateSettings,
    model: Annotated[str, typer.Argument(help="A name (its champion), a run folder, or a .keras or .onnx file.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Folder of images to score on, as a whole or by its `test`; default: the run's own test split."
        ),
    ] = None,
    data: DataOption = _DATA,
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Score a model on its test split, or on all images of a folder.

    A run that is still being made gets its metrics.json and the tables beside it from its model.keras; a complete run
    is scored by its model.onnx, and nothing in it changes.
    """
    from cnnpipe.stages import evaluate_any

    with progress_bar() as progress:
        scored, evaluation = evaluate_any(model, dataset, settings, data, artifacts, progress)
    figures = {key: value for key, value in asdict(evaluation).items() if isinstance(value, int | float)}
    values = {"model": str(scored), **figures, "macro_f1": evaluation.macro_f1}
    show_result(values, field_lines(values), as_json=as_json)


@app.command()
@command
def plot(run: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Draw the plots of an evaluated run."""
    from cnnpipe.stages import plot_run

    plots = [str(path) for path in plot_run(resolve_run(run, artifacts))]
    show_result({"plots": plots}, plots, as_json=as_json)


@app.command()
@command
def export(run: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Write a run's model.onnx and check it against model.keras on the test images."""
    from cnnpipe.stages import export_run

    folder = resolve_run(run, artifacts)
    parity = export_run(folder)
    model = folder / "model.onnx"
    show_result({"model": str(model), "parity": asdict(parity)}, [str(model)], as_json=as_json)


@app.command()
@command
@takes_settings(ClassifySettings, "folder")
def classify(settings: ClassifySettings, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Classify every file of a folder; one row for each in a CSV, JSONL or Parquet table."""
    from cnnpipe.classify.run import classify_folder
    from cnnpipe.classify.summary import check_failure_rate

    with progress_bar() as progress:
        summary = classify_folder(settings, artifacts, progress=progress)
    status = "too_many_failures" if summary.too_many_failed else "ok"
    show_result(summary.to_json(), summary.lines(), as_json=as_json, status=status)
    check_failure_rate(summary)


@app.command()
@command
def doctor(artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Say what this machine has: versions, devices, cores, free disk, champions, and the nightly schedule."""
    from cnnpipe.session import device_report

    existing = next(folder for folder in (artifacts.resolve(), *artifacts.resolve().parents) if folder.is_dir())
    champions = [row for row in summarize_runs(artifacts) if row.champion]
    nightly = look_at_nightly(prefect_home(artifacts))
    report = {
        **describe_environment(),
        "devices": device_report(),
        "artifacts": {
            "path": str(artifacts.resolve()),
            "writable": (artifacts.is_dir() or not artifacts.exists()) and os.access(existing, os.W_OK),
            "free_gigabytes": round(shutil.disk_usage(existing).free / 1e9, 1),
            "champions": {row.name: row.run_id for row in champions},
        },
    }
    lines = field_lines({**report, "nightly": nightly.shown()})
    show_result({**report, "nightly": asdict(nightly)}, lines, as_json=as_json)


@models_app.command("list")
@command
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this name's runs.")] = None,
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first; * marks the champion."""
    known = list_names(artifacts)
    if name is not None and name not in known:
        raise RegistryError(
            f"no runs of {name!r} in {artifacts}; there are {', '.join(known) or 'none'}; check the name"
        )
    rows = summarize_runs(artifacts, name)
    table = [("", "NAME", "RUN", "PRESET", "ACCURACY", "STATE")]
    for row in rows:
        accuracy = "-" if row.accuracy is None else f"{row.accuracy:.4f}"
        table.append(("*" if row.champion else "", row.name, row.run_id, row.preset or "-", accuracy, row.state))
    show_result({"runs": [asdict(row) for row in rows]}, table_lines(table), as_json=as_json)


@models_app.command("show")
@command
def show_model(model: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Show a complete run's manifest; `--json` with the digests of its files."""
    run = resolve_run(model, artifacts)
    manifest = read_manifest(run).model_dump(mode="json")
    shown = {"run": str(run), **{key: value for key, value in manifest.items() if key != "files"}}
    show_result({"run": str(run), "manifest": manifest}, field_lines(shown), as_json=as_json)


@models_app.command("promote")
@command
def promote_model(
    run: RunArgument,
    force: Annotated[bool, typer.Option("--force", help="Promote it whatever the decision was.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for the history; with --force.")] = "promoted by hand",
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Decide on an exported run and make it the champion if it passes.

    A complete run keeps the decision it has: one that was refused then, or stepped back from, needs --force.
    """
    from cnnpipe.stages import conclude_run

    folder = resolve_run(run, artifacts)
    if force and (folder / MANIFEST_FILE).is_file():
        promoted, text = True, promote_run(*registry_place(folder), folder.name, reason).reason
    else:
        decision = conclude_run(folder, forced=reason if force else None)
        promoted, text = decision.promoted, decision.reason
    verdict = "promoted" if promoted else "not promoted"
    values = {"run": str(folder), "promoted": promoted, "reason": text}
    show_result(values, [f"{folder.name} {verdict}: {text}"], as_json=as_json)


@models_app.command("rollback")
@command
def rollback_model(
    name: NameArgument,
    to: Annotated[str | None, typer.Option(help="Run id to go back to; default: the champion before.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "rolled back by hand",
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Give the champion alias back to the champion before, or to a given run."""
    move = rollback(artifacts, name, reason, to)
    show_result(asdict(move), [f"{name}: champion is {move.run_id} again, was {move.previous}"], as_json=as_json)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
