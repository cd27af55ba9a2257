"""Artifacts of a run in the Prefect UI: markdown and tables, with the pictures inside as `data:` URIs.

Names of classes and files come from users and may contain markup: they go into markdown only by `_text` and `_code`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cnnpipe.manifest import best_epoch, read_history, read_parity
from cnnpipe.paths import escape_path
from cnnpipe.settings import RetrainSettings, load_toml

if TYPE_CHECKING:
    from cnnpipe.classify.summary import ClassificationSummary
    from cnnpipe.evaluate.metrics import Evaluation
    from cnnpipe.prepare.dataset import PreparedDataset
    from cnnpipe.promote.gate import Decision

__all__ = ["publish_classification", "publish_dataset", "publish_decision", "publish_metrics", "publish_plots"]


def publish_dataset(dataset: PreparedDataset) -> None:
    """Show the dataset: the number of images of each split and class, and the warnings."""
    lines = [
        f"# Dataset {_text(dataset.name)}",
        "",
        f"Source {_code(dataset.source)}, fingerprint {_code(dataset.fingerprint[:12])}",
        "",
    ]
    splits = list(dataset.num_images)
    counts = dataset.report.class_counts
    rows = [[name, *(counts[split].get(name, 0) for split in splits)] for name in dataset.class_names]
    lines += _table(["class", *splits], [*rows, ["all", *dataset.num_images.values()]])
    lines += ["", "## Warnings", ""] if dataset.report.warnings else ["", "Nothing to warn about."]
    lines += [f"- {_text(warning)}" for warning in dataset.report.warnings]
    description = f"{_text(dataset.name)}: images by split and class"
    create_markdown_artifact("\n".join(lines), key="dataset", description=description)


def publish_metrics(evaluation: Evaluation) -> None:
    """Show the metrics of the test split, overall and by class."""
    values = {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        f"top-{evaluation.top_k} accuracy": evaluation.top_k_accuracy,
        "macro F1": evaluation.macro_f1,
        "expected calibration error": evaluation.expected_calibration_error,
    }
    values |= {f"F1 of {each.name}": each.f1 for each in evaluation.per_class}
    rows = [{"metric": name, "value": f"{value:.4f}"} for name, value in values.items()]
    description = f"test accuracy {evaluation.accuracy:.4f} on {evaluation.num_images:,} images"
    create_table_artifact(rows, key="metrics", description=description)


def publish_plots(run: Path) -> None:
    """Show the training report with the curves in place, and the confusion matrix."""
    from cnnpipe.evaluate.metrics import read_evaluation

    settings = load_toml(RetrainSettings, run / "config.toml")
    history = read_history(run)
    preset, seed = _code(settings.train.preset), settings.train.seed
    best = best_epoch(history["val_accuracy"], history["val_loss"])
    evaluation = read_evaluation(run)
    lines = [
        f"# {_text(settings.prepare.resolved_name)}: {evaluation.accuracy:.2%} of the test images are right",
        "",
        f"Run {_code(run.name)}: {evaluation.num_correct:,} of {evaluation.num_images:,} images of the test split, "
        "which were not used in training.",
        "",
        f"Preset {preset}, seed {seed}: {len(history['epoch'])} epochs in {sum(history['seconds']):,.0f} s; "
        f"best validation accuracy **{history['val_accuracy'][best]:.4f}** in epoch {history['epoch'][best]:.0f}.",
        "",
        _picture("Accuracy by epoch", run / "accuracy.png"),
        "",
        _picture("Loss by epoch", run / "loss.png"),
        "",
        "## Test images, as predicted",
        "",
        _picture("Sample predictions", run / "samples.png"),
        "",
        "## The most confident mistakes",
        "",
        _picture("Mistakes", run / "mistakes.png"),
        "",
        f"Everything is in {_code(run)}.",
    ]
    create_markdown_artifact("\n".join(lines), key="training-report", description="curves, samples and mistakes")
    matrix = f"# Confusion matrix\n\n{_picture('Confusion matrix', run / 'confusion_matrix.png')}"
    create_markdown_artifact(matrix, key="confusion-matrix", description="actual classes against predicted ones")


def publish_decision(run: Path, decision: Decision) -> None:
    """Show whether the run became the champion, and why."""
    verdict = "Promoted" if decision.promoted else "Not promoted"
    before = "" if decision.champion_accuracy is None else f"{decision.champion_accuracy:.4f}"
    rows = [
        ["this run", decision.run_id, f"{decision.accuracy:.4f}"],
        ["champion before", decision.champion or "none yet", before],
        ["floor", "", f"{decision.min_accuracy:.4f}"],
    ]
    reason = _text(decision.reason)
    lines = [f"# {verdict}", "", reason[:1].upper() + reason[1:] + ".", ""]
    lines += _table(["", "run", "test accuracy"], rows)
    lines += ["", f"Measured on {decision.num_images:,} test images of {_code(decision.dataset_fingerprint[:12])}.", ""]
    lines += [f"The model is {_code(run / 'model.onnx')}. Its precisions:", ""]
    lines += _variants_table(run)
    create_markdown_artifact("\n".join(lines), key="promotion-decision", description=f"{verdict}: {reason}")


def _variants_table(run: Path) -> list[str]:
    """Return a table of the model's precisions: which were kept, and their accuracy and speed."""
    rows = []
    for precision, record in read_parity(run).items():
        kept = "reference" if precision == "fp32" else "kept" if record["kept"] else f"not kept: {record['reason']}"
        accuracy, speed, agreement = (record.get(key) for key in ("accuracy", "relative_speed", "agreement"))
        rows.append(
            [
                precision,
                kept,
                "" if accuracy is None else f"{accuracy:.4f}",
                "" if agreement is None else f"{agreement:.2%}",
                "" if speed is None else f"{speed:.1f} times",
            ]
        )
    return _table(["precision", "", "test accuracy", "same class as trained", "speed on the CPU"], rows)


def publish_classification(summary: ClassificationSummary) -> None:
    """Show the result for a folder: counts by status, class and kind of error, and the seconds of each stage."""
    lines = [f"# {summary.found:,} files of {_code(summary.folder)}", ""]
    lines += _table(["", "files"], _outcomes(summary))
    lines += ["", f"Table {_code(summary.table)}; model {_code(f'{summary.model.name}/{summary.model.run_id}')}."]
    if summary.report is not None:
        lines += ["", f"Contact sheet, with thumbnails of each class and of the errors: {_code(summary.report)}."]
    lines += ["", "## Classes", "", *_table(["class", "files"], _counts(summary.classes))]
    if summary.error:
        lines += ["", "## Errors", "", *_table(["kind", "files"], _counts(summary.error_kinds)), "", "The first:", ""]
        lines += _table(
            ["file", "kind", "reason"], [[each.path, each.kind, each.message] for each in summary.first_errors]
        )
    lines += ["", "## Time", "", *_table(["stage", "seconds"], _stages(summary)), ""]
    lines += [
        f"{summary.images_per_second:,.0f} images/s after start-up on {_code(summary.device)} ({summary.provider}) "
        f"in {summary.precision}; slowest stage: {summary.slowest_stage}."
    ]
    description = f"{summary.ok:,} classified, {summary.error:,} failed"
    create_markdown_artifact("\n".join(lines), key="classification-summary", description=description)


def _outcomes(summary: ClassificationSummary) -> list[list[str]]:
    """Return rows of an outcome and its number of files; outcomes that only some jobs have, only if there are any."""
    sorted_files = summary.sorted_files
    counts = {"classified": summary.ok, "failed": summary.error, "found": summary.found}
    special = {
        f"uncertain: a probability below {summary.min_probability:g}": summary.uncertain,
        "resumed: made by an attempt that was interrupted": summary.resumed,
        "unchanged: taken from the previous table": summary.unchanged,
        "sorted into folders, as links": sorted_files.linked if sorted_files else 0,
        "sorted into folders, as copies": sorted_files.copied if sorted_files else 0,
    }
    return _counts(counts | {name: count for name, count in special.items() if count})


def _counts(counts: Mapping[str, int]) -> list[list[str]]:
    return [[name, f"{count:,}"] for name, count in counts.items()]


def _stages(summary: ClassificationSummary) -> list[list[str]]:
    spent = summary.seconds
    stages = {
        "start-up": spent.start_up,
        "list": spent.list,
        "decode (summed over its processes)": spent.decode,
        "inference": spent.inference,
        "write": spent.write,
        "in all (stages overlap)": spent.total,
    }
    return [[name, f"{seconds:,.2f}"] for name, seconds in stages.items()]


def _picture(alt: str, path: Path) -> str:
    """Return markdown that shows a PNG without a server for the file."""
    return f"![{alt}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')})"


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a markdown table with plain text in its cells."""
    head, *body = (f"| {' | '.join(_text(cell) for cell in row)} |" for row in (header, *rows))
    return [head, "|" + " --- |" * len(header), *body]


# Characters that begin markdown, HTML or an entity. An underscore inside a word does not.
_MARKUP = re.compile(r"[\\`*\[\]<>|!~&#]|(?<![^\W_])_|_(?![^\W_])")


def _text(value: object) -> str:
    """Return markdown that shows a text as it is, on one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(value).split()))


def _code(value: object) -> str:
    """Return markdown that shows a text as code, on one line."""
    text = " ".join(escape_path(str(value)).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""  # between the backticks of the text and the fence; not shown
    return f"{fence}{space}{text}{space}{fence}"
