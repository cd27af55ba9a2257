"""The command `cnnpipe`: every stage by hand, without Prefect.

Each command imports its stage only when it runs, so `cnnpipe classify` loads no TensorFlow and `--help` is quick.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cnnpipe import __version__, registry
from cnnpipe.console import (
    ArtifactsOption,
    DataOption,
    JsonOption,
    command,
    field_lines,
    make_app,
    progress_bar,
    run_app,
    show_result,
    table_lines,
)
from cnnpipe.errors import CnnpipeError, RegistryError
from cnnpipe.manifest import MANIFEST_FILE, RunState, read_manifest
from cnnpipe.settings import ClassifySettings, EvaluateSettings, RetrainSettings, takes_settings

app = make_app("Train an image-classification CNN, export it to ONNX, and classify folders of images in bulk.")
models_app = make_app("List, show, compare, promote, roll back and prune trained models.")
app.add_typer(models_app, name="models")

_ARTIFACTS = Path("artifacts")
_DATA = Path("data")

RunArgument = Annotated[str, typer.Argument(help="Run folder, <name>/<run id>, or name (its champion).", metavar="RUN")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnnpipe {__version__}")
        raise typer.Exit


ModelArgument = Annotated[
    str, typer.Argument(help="Name (its champion), run folder, or .keras or .onnx file.", metavar="MODEL")
]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@command
@takes_settings(RetrainSettings, "dataset", ("prepare",))
def prepare(settings: RetrainSettings, data: DataOption = _DATA, as_json: JsonOption = False) -> None:
    """Decode a dataset into train, val and test arrays.

    Does nothing if that was done before with the same images and settings.
    """
    from cnnpipe.prepare.dataset import prepare_dataset

    with progress_bar() as progress:
        dataset = prepare_dataset(settings.prepare, data, progress=progress)
    values = {
        "path": str(dataset.path),
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "num_images": dataset.num_images,
        "class_names": list(dataset.class_names),
        "warnings": list(dataset.report.warnings),
    }
    show_result(values, [str(dataset.path)], as_json=as_json)


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
    from cnnpipe.train.stage import train_run

    champion = registry.champion_run(artifacts, settings.prepare.resolved_name)
    with progress_bar() as progress:
        dataset = prepare_dataset(settings.prepare, data, progress=progress, champion=champion)
        result = train_run(settings, dataset.path, artifacts, progress)
    show_result({**asdict(result), "run": str(result.run)}, [str(result.run)], as_json=as_json)


@app.command()
@command
@takes_settings(EvaluateSettings, "model")
def evaluate(
    settings: EvaluateSettings,
    model: ModelArgument,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Folder of images to score: all, or those in its `test` folder if it has one. "
            "Default: the run's test split."
        ),
    ] = None,
    data: DataOption = _DATA,
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Score a model on its test split or on the images of a folder.

    An incomplete run is scored with model.keras, and gets its metrics.json and tables. A complete run is scored with
    model.onnx, and its files do not change.
    """
    from cnnpipe.evaluate.evaluation import evaluate_any

    with progress_bar() as progress:
        scored, evaluation = evaluate_any(model, dataset, settings, data, artifacts, progress)
    figures = {key: value for key, value in asdict(evaluation).items() if isinstance(value, int | float)}
    values = {"model": str(scored), **figures, "macro_f1": evaluation.macro_f1}
    show_result(values, field_lines(values), as_json=as_json)


@app.command()
@command
def plot(run: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Draw the plots of an evaluated run."""
    from cnnpipe.plot.plots import plot_run

    plots = [str(path) for path in plot_run(registry.resolve_run(run, artifacts))]
    show_result({"plots": plots}, plots, as_json=as_json)


@app.command()
@command
def export(run: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Write a run's model.onnx and check it against model.keras on the test images."""
    from cnnpipe.export.onnx import export_run

    folder = registry.resolve_run(run, artifacts)
    parity = export_run(folder)
    model = folder / "model.onnx"
    show_result({"model": str(model), "parity": asdict(parity)}, [str(model)], as_json=as_json)


@app.command()
@command
@takes_settings(ClassifySettings, "folder")
def classify(settings: ClassifySettings, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Classify every file of a folder into a table, one row per file."""
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
    """Check this machine, the champions, the server and the nightly schedule, and say how to fix what is wrong.

    The exit status is 1 if anything is wrong.
    """
    from cnnpipe.doctor import examine

    report, nightly, checks = examine(artifacts)
    wrong = [f"{check.name}: {check.text}" for check in checks if not check.ok]
    lines = [f"{'ok' if check.ok else 'problem'}: {check.name}: {check.text}" for check in checks]
    shown = field_lines({**report, "nightly": nightly.shown() if nightly else "unknown"})
    values = {**report, "nightly": nightly and asdict(nightly), "checks": [asdict(check) for check in checks]}
    show_result(values, [*shown, *lines], as_json=as_json, status="failed" if wrong else "ok")
    if wrong:
        error = CnnpipeError("; ".join(wrong))
        error.follows_result = True
        raise error


@models_app.command("list")
@command
def list_models(
    name: Annotated[str | None, typer.Argument(help="Show only the runs of this name.", metavar="NAME")] = None,
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first; * marks the champion."""
    names = registry.list_names(artifacts)
    if name is not None and name not in names:
        found = ", ".join(names) or "none"
        raise RegistryError(f"no runs of {name!r} in {artifacts}, which has runs of: {found}; check the name")
    rows = registry.summarize_runs(artifacts, name)
    table = [("", "NAME", "RUN", "PRESET", "ACCURACY", "STATE")]
    for row in rows:
        accuracy = "-" if row.accuracy is None else f"{row.accuracy:.4f}"
        table.append(("*" if row.champion else "", row.name, row.run_id, row.preset or "-", accuracy, row.state))
    show_result({"runs": [asdict(row) for row in rows]}, table_lines(table), as_json=as_json)


@models_app.command("show")
@command
def show_model(model: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False) -> None:
    """Show the manifest of a complete run and the decision on it.

    With --json it includes the SHA-256 of every file.
    """
    from cnnpipe.promote.gate import read_decision

    run = registry.resolve_run(model, artifacts)
    manifest, decision = read_manifest(run).model_dump(mode="json"), asdict(read_decision(run))
    shown = {"run": str(run), **{key: value for key, value in manifest.items() if key != "files"}, "decision": decision}
    show_result({"run": str(run), "manifest": manifest, "decision": decision}, field_lines(shown), as_json=as_json)


@models_app.command("diff")
@command
def diff_models(
    first: RunArgument, second: RunArgument, artifacts: ArtifactsOption = _ARTIFACTS, as_json: JsonOption = False
) -> None:
    """Show what differs between two complete runs: settings, data, accuracy and recall.

    The second is compared with the first on the same test images, as the promotion rules do, if both can be scored.
    """
    from cnnpipe.promote.comparison import diff_runs

    difference = diff_runs(registry.resolve_run(first, artifacts), registry.resolve_run(second, artifacts))
    show_result(difference, field_lines(difference), as_json=as_json)


ReasonOption = Annotated[str, typer.Option(help="Reason to record in promotions.jsonl.")]


@models_app.command("promote")
@command
def promote_model(
    run: RunArgument,
    force: Annotated[bool, typer.Option("--force", help="Promote the run even if it does not pass.")] = False,
    reason: ReasonOption = "promoted by hand",
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Make an exported run the champion if it passes the promotion rules, or approve one that waits for it.

    A complete run keeps the decision that was made for it: one that was refused or rolled back needs --force.
    """
    from cnnpipe.promote.gate import STATES_IN_WORDS, conclude_run

    folder = registry.resolve_run(run, artifacts)
    state: RunState = "Promoted"
    if force and (folder / MANIFEST_FILE).is_file():
        text = registry.promote_run(*registry.registry_place(folder), folder.name, reason).reason
    else:
        decision = conclude_run(folder, **{"forced" if force else "approved": reason})
        state, text = decision.state, decision.reason
    values = {"run": str(folder), "promoted": state == "Promoted", "state": state, "reason": text}
    show_result(values, [f"{folder.name} {STATES_IN_WORDS[state]}: {text}"], as_json=as_json)


@models_app.command("rollback")
@command
def rollback_model(
    name: Annotated[str, typer.Argument(help="Name of the model, such as digits.", metavar="NAME")],
    to: Annotated[str | None, typer.Option(help="Run id of the new champion. Default: the previous champion.")] = None,
    reason: ReasonOption = "rolled back by hand",
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion, or another run, the champion again."""
    move = registry.rollback(artifacts, name, reason, to)
    show_result(asdict(move), [f"{name}: champion is {move.run_id} again, was {move.previous}"], as_json=as_json)


@models_app.command("prune")
@command
@takes_settings(RetrainSettings, "", ("clean",))
def prune_models(
    settings: RetrainSettings,
    name: Annotated[str | None, typer.Argument(help="Prune only what is of this name.", metavar="NAME")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")] = False,
    data: DataOption = _DATA,
    artifacts: ArtifactsOption = _ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Remove old runs and prepared datasets, and what nights and interrupted classifications have left.

    Champions, what a rollback needs, and runs under way stay. Every night ends with this for its own name, and deletes
    old flow runs from the server's database too.
    """
    from cnnpipe.clean.retention import clean_up, list_prepared

    names = {*registry.list_names(artifacts), *list_prepared(data)}
    if not names or (name is not None and name not in names):
        what, found = name or "any name", ", ".join(sorted(names)) or "none"
        raise RegistryError(f"nothing of {what} in {artifacts} and {data}, whose names are: {found}; check the folders")
    cleaning = clean_up(settings.clean, [name] if name else sorted(names), data, artifacts, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    lines = table_lines([(each.kind, f"{each.bytes / 1e6:,.1f} MB", each.path) for each in cleaning.removed])
    values = {"dry_run": dry_run, "freed_bytes": sum(each.bytes for each in cleaning.removed), **asdict(cleaning)}
    show_result(values, [*lines, cleaning.line(verb)], as_json=as_json)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
