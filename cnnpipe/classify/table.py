"""The table of predictions: its rows, its columns, and its three formats CSV, JSON Lines and Parquet.

    path, status, label, probability, label_2, probability_2, …, error, sha256, model

All formats hold the same values. Where a row has no value, CSV is empty and the others have null. `error` is
`kind: message`. A probability is written with the fewest digits that give the model's float32 back.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import PredictionsError, one_line
from cnnpipe.storage import storage_errors

__all__ = ["Columns", "Prediction", "TableFormat", "read_table", "table_columns", "write_table"]

_NEEDS_QUOTES: Final = re.compile('[",\r\n]')

_FORMULA_SIGNS: Final = tuple("=+-@\t\r'")
"""First characters that make a spreadsheet compute a field, and the apostrophe that prevents it.

Source: https://owasp.org/www-community/attacks/CSV_Injection
"""

_ROWS_READ: Final = 16_384
"""Rows of a Parquet file that are read at a time."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row of the table: the outcome for one file."""

    path: str
    """Relative to the folder, with `/`, as displayed."""
    status: Literal["ok", "error"]
    labels: tuple[str, ...]
    """The `top_k` likeliest classes, the likeliest first; empty for an error."""
    probabilities: tuple[float, ...]
    """Probabilities of `labels`, 0-1: the shortest decimals that give the model's float32 back."""
    error_kind: str
    """One of `cnnpipe.images.decode.ERROR_KINDS`; empty if ok."""
    error: str
    """One line for a person; empty if ok."""
    sha256: str
    """SHA-256 of the file's bytes; empty if they could not be read."""
    model: str
    """`<name>/<run id>`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Consecutive rows of the table, column by column."""

    paths: Sequence[str]
    """As displayed."""
    labels: Sequence[Sequence[str | None]]
    """A column for each rank; None in rows of errors."""
    probabilities: npt.NDArray[np.float32]
    """(ranks, rows), 0-1; anything in rows of errors."""
    errors: Sequence[str | None]
    """`kind: message`; None if ok."""
    sha256: Sequence[str | None]
    """64 hexadecimal digits; None if the file could not be read."""
    model: str

    @property
    def statuses(self) -> list[str]:
        """`ok` or `error`."""
        return ["ok" if error is None else "error" for error in self.errors]


@dataclass(frozen=True)
class TableFormat:
    """How a table is written."""

    suffix: str
    """One of `cnnpipe.images.leftovers.TABLE_SUFFIXES`."""
    top_k: int
    """Classes in each row."""
    safe_csv: bool = False
    """Whether the file is for a spreadsheet: texts that look like formulas get an apostrophe in front, and the file a
    byte order mark, without which Excel does not read UTF-8."""


def table_columns(top_k: int) -> list[str]:
    """Return the names of the columns."""
    ranks = ["", *(f"_{rank}" for rank in range(2, top_k + 1))]
    likeliest = [f"{name}{rank}" for rank in ranks for name in ("label", "probability")]
    return ["path", "status", *likeliest, "error", "sha256", "model"]


def write_table(path: Path, form: TableFormat, groups: Iterable[Columns]) -> None:
    """Write a table in place; the caller gives it its name when it is whole.

    Args:
        groups: the rows, in order. Each is a row group of Parquet, so the same groups give the same bytes.
    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(path), path.open("wb", buffering=2**20) as file:
        if form.suffix == ".parquet":
            _write_parquet(file, form, groups)
            return
        if form.suffix == ".csv":
            file.write((("\ufeff" if form.safe_csv else "") + ",".join(table_columns(form.top_k)) + "\n").encode())
        lines = _csv_lines if form.suffix == ".csv" else _json_lines
        for columns in groups:
            file.write(lines(columns, form).encode())


def read_table(path: Path, form: TableFormat) -> Iterator[Prediction]:
    """Yield the rows of a finished table, in order.

    Raises:
        PredictionsError: the file cannot be read, or is not a table of cnnpipe with this many classes a row.
    """
    read = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}[form.suffix]
    try:
        for values in read(path, form):
            file, status, *likeliest, error, sha256, model = values
            if status not in ("ok", "error") or len(likeliest) != 2 * form.top_k:
                raise ValueError(f"not a row of a table: {values!r}")
            labels, probabilities = likeliest[::2] * (status == "ok"), likeliest[1::2] * (status == "ok")
            kind, _, message = (error or "").partition(": ")
            yield Prediction(
                file, status, tuple(labels), tuple(map(float, probabilities)), kind, message, sha256 or "", model
            )
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
        raise PredictionsError(
            f"{path} cannot be read as a table of {form.top_k} classes a row: {one_line(error)}; "
            "classify again with --overwrite"
        ) from error


def _text_columns(columns: Columns, encode: Callable[[Sequence[str | None]], list[str]]) -> Iterator[tuple[str, ...]]:
    """Yield rows of text, in the order of `table_columns`.

    Args:
        encode: turns a column of texts, with None for no value, into fields.
    """
    (nothing,) = encode([None])
    failed = [index for index, error in enumerate(columns.errors) if error is not None]
    likeliest: list[list[str]] = []
    for labels, probabilities in zip(columns.labels, columns.probabilities, strict=True):
        # NumPy prints the fewest digits that give a float32 back, and Python's float keeps them.
        decimals = list(map(str, probabilities.astype("U32").astype(np.float64).tolist()))
        for index in failed:
            decimals[index] = nothing
        likeliest += [encode(labels), decimals]
    texts = (columns.paths, columns.statuses, columns.errors, columns.sha256)
    path, status, error, sha256 = map(encode, texts)
    return zip(path, status, *likeliest, error, sha256, encode([columns.model]) * len(path), strict=True)


def _csv_lines(columns: Columns, form: TableFormat) -> str:
    r"""Return lines by RFC 4180, with `\n` between rows.

    Not by the csv module: before Python 3.13 it leaves a lone carriage return unquoted, which splits the row.
    Source: https://www.rfc-editor.org/rfc/rfc4180
    """

    def encode(texts: Sequence[str | None]) -> list[str]:
        fields = [text or "" for text in texts]
        if form.safe_csv:  # before an apostrophe too, so that it can be undone
            fields = ["'" + field if field.startswith(_FORMULA_SIGNS) else field for field in fields]
        if _NEEDS_QUOTES.search("\0".join(fields)):  # hardly any column needs quotes, and there may be millions of rows
            fields = ['"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text for text in fields]
        return fields

    return "\n".join(map(",".join, _text_columns(columns, encode))) + "\n"


def _json_lines(columns: Columns, form: TableFormat) -> str:
    """Return one JSON object a line."""

    def encode(texts: Sequence[str | None]) -> list[str]:
        return ["null" if text is None else encode_basestring(text) for text in texts]

    template = "{" + ", ".join(f'"{name}": %s' for name in table_columns(form.top_k)) + "}\n"
    return "".join(map(template.__mod__, _text_columns(columns, encode)))


def _write_parquet(file: IO[bytes], form: TableFormat, groups: Iterable[Columns]) -> None:
    """Write typed columns: text, and float32 probabilities; only path, status and model are never null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    required = ("path", "status", "model")
    kinds = [(name, pa.float32() if name.startswith("prob") else pa.string()) for name in table_columns(form.top_k)]
    schema = pa.schema([pa.field(name, kind, nullable=name not in required) for name, kind in kinds])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for columns in groups:
            failed = np.array(columns.statuses) == "error"
            likeliest: list[Any] = []
            for labels, probabilities in zip(columns.labels, columns.probabilities, strict=True):
                likeliest += [pa.array(labels, pa.string()), pa.array(probabilities, pa.float32(), mask=failed)]
            models = [columns.model] * len(columns.paths)
            texts = (columns.paths, columns.statuses, columns.errors, columns.sha256, models)
            path, status, error, sha256, model = (pa.array(column, pa.string()) for column in texts)
            arrays = [path, status, *likeliest, error, sha256, model]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _read_csv(path: Path, form: TableFormat) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        _check_columns(next(rows, []), form)
        for row in rows:
            yield [field.removeprefix("'") for field in row] if form.safe_csv else row


def _read_json_lines(path: Path, form: TableFormat) -> Iterator[list[Any]]:
    columns = table_columns(form.top_k)
    with path.open(encoding="utf-8", newline="") as file:
        for line in file:
            row = json.loads(line)
            _check_columns(list(row), form)
            yield [row[column] for column in columns]


def _read_parquet(path: Path, form: TableFormat) -> Iterator[Sequence[Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, form)
        for batch in file.iter_batches(_ROWS_READ):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _check_columns(found: list[str], form: TableFormat) -> None:
    if found != table_columns(form.top_k):
        raise ValueError(f"its columns are {', '.join(found)[:100] or 'missing'}")
