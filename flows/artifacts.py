"""Artifacts of a run in the Prefect UI: markdown and tables, with the pictures inside as `data:` URIs.

Names of classes and files come from users and may contain markup: they go into markdown only by `_text` and `_code`.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageOps
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cnnpipe.manifest import best_epoch, read_history, read_parity
from cnnpipe.paths import escape_path
from cnnpipe.settings import RetrainSettings, load_toml

if TYPE_CHECKING:
    from cnnpipe.classify.summary import ClassificationSummary
    from cnnpipe.evaluate.metrics import Evaluation
    from cnnpipe.prepare.dataset import PreparedDataset
    from cnnpipe.promote.gate import Decision

# Bytes of WebP; the database of the server keeps 4/3 of them: 300,000 for the two curves, the matrix and the two grids.
_MAX_CURVE_BYTES, _MAX_MATRIX_BYTES, _MAX_GRID_BYTES = 15_000, 55_000, 70_000
_QUALITIES: Final = ((1.0, None), (1.0, 80), *((0.75**step, 50) for step in range(8)))  # scale, quality; None: lossless

__all__ = ["publish_classification", "publish_dataset", "publish_decision", "publish_metrics", "publish_plots"]


def publish_dataset(dataset: PreparedDataset) -> None:
    """Show the dataset: the number of images of each split and class, and the warnings."""
    counts = dataset.report.class_counts
    rows = [[name, *(counts[split].get(name, 0) for split in dataset.num_images)] for name in dataset.class_names]
    warnings = "\n".join(f"- {_text(warning)}" for warning in dataset.report.warnings)
    _publish(
        "dataset",
        f"{_text(dataset.name)}: images by split and class",
        f"# Dataset {_text(dataset.name)}",
        f"Source {_code(dataset.source)}, fingerprint {_code(dataset.fingerprint[:12])}",
        _table(["class", *dataset.num_images], [*rows, ["all", *dataset.num_images.values()]]),
        f"## Warnings\n\n{warnings}" if warnings else "Nothing to warn about.",
    )


def publish_metrics(evaluation: Evaluation) -> None:
    """Show the metrics of the test split, overall and by class."""
    values = {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        f"top-{evaluation.top_k} accuracy": evaluation.top_k_accuracy,
        "macro F1": evaluation.macro_f1,
        "expected calibration error": evaluation.expected_calibration_error,
        **{f"F1 of {each.name}": each.f1 for each in evaluation.per_class},
    }
    rows = [{"metric": name, "value": f"{value:.4f}"} for name, value in values.items()]
    description = f"test accuracy {evaluation.accuracy:.4f} on {evaluation.num_images:,} images"
    create_table_artifact(rows, key="metrics", description=description)


def publish_plots(run: Path) -> None:
    """Show the training report with the curves in place, and the confusion matrix."""
    from cnnpipe.evaluate.metrics import read_evaluation

    settings, history = load_toml(RetrainSettings, run / "config.toml"), read_history(run)
    evaluation = read_evaluation(run)
    best = best_epoch(history["val_accuracy"], history["val_loss"])
    _publish(
        "training-report",
        "curves, samples and mistakes",
        f"# {_text(settings.prepare.resolved_name)}: {evaluation.accuracy:.2%} of the test images are right",
        f"Run {_code(run.name)}: {evaluation.num_correct:,} of {evaluation.num_images:,} images of the test split, "
        "which were not used in training.",
        f"Preset {_code(settings.train.preset)}, seed {settings.train.seed}: {len(history['epoch'])} epochs in "
        f"{sum(history['seconds']):,.0f} s; best validation accuracy **{history['val_accuracy'][best]:.4f}** in epoch "
        f"{history['epoch'][best]:.0f}.",
        _picture("Accuracy by epoch", run / "accuracy.png", _MAX_CURVE_BYTES),
        _picture("Loss by epoch", run / "loss.png", _MAX_CURVE_BYTES),
        "## Test images, as predicted",
        _picture("Sample predictions", run / "samples.png", _MAX_GRID_BYTES),
        "## The most confident mistakes",
        _picture("Mistakes", run / "mistakes.png", _MAX_GRID_BYTES),
        f"Everything is in {_code(run)}.",
    )
    matrix = _picture("Confusion matrix", run / "confusion_matrix.png", _MAX_MATRIX_BYTES)
    _publish("confusion-matrix", "actual classes against predicted ones", "# Confusion matrix", matrix)


def publish_decision(run: Path, decision: Decision) -> None:
    """Show whether the run became the champion, and why: every check, and the comparison with the champion."""
    from cnnpipe.promote.gate import STATES_IN_WORDS

    verdict, reason = STATES_IN_WORDS[decision.state].capitalize(), _text(decision.reason)
    checks = [
        (name, f"{each.value:.4g}", "" if each.limit is None else f"{each.limit:.4g}", "no" if each.problem else "yes")
        for name, each in decision.checks.items()
    ]
    _publish(
        "promotion-decision",
        f"{verdict}: {reason}",
        f"# {verdict}",
        f"{reason[:1].upper()}{reason[1:]}.",
        f"Run {_code(decision.run_id)}; champion before: {_code(decision.champion or 'none yet')}.",
        f"Measured on {decision.num_images:,} test images of {_code(decision.dataset_fingerprint[:12])}.",
        _table(["floor or budget", "value", "limit", "passed"], checks),
        *_comparison_blocks(decision),
        f"The model is {_code(run / 'model.onnx')}. Its precisions:",
        _variants_table(run),
    )


def _comparison_blocks(decision: Decision) -> list[str]:
    """Return the numbers of the comparison with the champion, and the images that only one of the two has right."""
    if (compared := decision.comparison) is None:
        return []
    numbers = asdict(compared) | {f"worst class: {name}": each for name, each in asdict(compared.worst_class).items()}
    rows = [(name.replace("_", " "), each) for name, each in numbers.items() if type(each) in (str, int, float)]
    right = {"this run": compared.gained_paths, "the champion": compared.lost_paths}
    examples = [(name, path) for name, paths in right.items() for path in paths]
    return [
        "## Against the champion",
        _table(["", ""], [(name, f"{each:.4g}" if isinstance(each, float) else each) for name, each in rows]),
        "The first images that only one has right:" if examples else "",
        _table(["right", "image"], examples),
    ]


def _variants_table(run: Path) -> str:
    """Return a table of the model's precisions: which were kept, and their accuracy and speed."""
    forms = {"accuracy": "{:.4f}", "agreement": "{:.2%}", "relative_speed": "{:.1f} times"}
    rows = []
    for precision, record in read_parity(run).items():
        kept = "reference" if precision == "fp32" else "kept" if record["kept"] else f"not kept: {record['reason']}"
        figures = ["" if record.get(name) is None else form.format(record[name]) for name, form in forms.items()]
        rows.append([precision, kept, *figures])
    return _table(["precision", "", "test accuracy", "same class as trained", "speed on the CPU"], rows)


def publish_classification(summary: ClassificationSummary) -> None:
    """Show the result for a folder: counts by status, class and kind of error, and the seconds of each stage."""
    sheet = "" if summary.report is None else _code(summary.report)
    errors = [[each.path, each.kind, each.message] for each in summary.first_errors]
    notes = {"start_up": "start-up", "decode": "decode (summed over its processes)", "total": "in all (stages overlap)"}
    total, *stages = ([notes.get(name, name), f"{each:,.2f}"] for name, each in asdict(summary.seconds).items())
    _publish(
        "classification-summary",
        f"{summary.ok:,} classified, {summary.error:,} failed",
        f"# {summary.found:,} files of {_code(summary.folder)}",
        _table(["", "files"], _outcomes(summary)),
        f"Table {_code(summary.table)}; model {_code(f'{summary.model.name}/{summary.model.run_id}')}.",
        sheet and f"Contact sheet, with thumbnails of each class and of the errors: {sheet}.",
        "## Classes",
        _table(["class", "files"], summary.classes.items()),
        "## Errors" if errors else "",
        _table(["kind", "files"], summary.error_kinds.items()),
        "The first:" if errors else "",
        _table(["file", "kind", "reason"], errors),
        "## Time",
        _table(["stage", "seconds"], [*stages, total]),
        f"{summary.images_per_second:,.0f} images/s after start-up on {_code(summary.device)} ({summary.provider}) "
        f"in {summary.precision}; slowest stage: {summary.slowest_stage}.",
    )


def _outcomes(summary: ClassificationSummary) -> list[tuple[str, int]]:
    """Return each outcome and its number of files; outcomes that only some jobs have, only if there are any."""
    links = summary.sorted_files
    counts = {
        f"uncertain: a probability below {summary.min_probability:g}": summary.uncertain,
        "resumed: made by an attempt that was interrupted": summary.resumed,
        "unchanged: taken from the previous table": summary.unchanged,
        "sorted into folders, as links": links.linked if links else 0,
        "sorted into folders, as copies": links.copied if links else 0,
    }
    always = [("classified", summary.ok), ("failed", summary.error), ("found", summary.found)]
    return always + [(name, count) for name, count in counts.items() if count]


def _publish(key: str, description: str, *blocks: str) -> None:
    """Show blocks of markdown with a blank line between them; empty ones are left out."""
    create_markdown_artifact("\n\n".join(filter(None, blocks)), key=key, description=description)


def _picture(alt: str, path: Path, max_bytes: int) -> str:
    """Return markdown that shows a picture without a server for the file, as sharp as `max_bytes` of WebP allow."""
    picture = Image.open(path).convert("RGB")
    for scale, quality in _QUALITIES:
        written = io.BytesIO()
        ImageOps.scale(picture, scale).save(written, "WEBP", lossless=quality is None, quality=quality or 75)
        if written.tell() <= max_bytes:
            break
    return f"![{alt}](data:image/webp;base64,{base64.b64encode(written.getvalue()).decode('ascii')})"


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a markdown table with plain text in its cells, or nothing if it has no rows."""
    head, *body = (f"| {' | '.join(map(_text, row))} |" for row in (header, *rows))
    return "\n".join([head, "|" + " --- |" * len(header), *body]) if body else ""


# Characters that begin markdown, HTML or an entity. An underscore inside a word does not.
_MARKUP = re.compile(r"[\\`*\[\]<>|!~&#]|(?<![^\W_])_|_(?![^\W_])")


def _text(value: object) -> str:
    """Return markdown that shows a text as it is, on one line, or a number with separators."""
    return f"{value:,}" if isinstance(value, int) else _MARKUP.sub(r"\\\g<0>", " ".join(str(value).split()))


def _code(value: object) -> str:
    """Return markdown that shows a text as code, on one line."""
    text = " ".join(escape_path(str(value)).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""  # between the backticks of the text and the fence; not shown
    return f"{fence}{space}{text}{space}{fence}"
