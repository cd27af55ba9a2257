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
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from cnnpipe.errors import PredictionsError, one_line
from cnnpipe.storage import storage_errors

__all__ = ["Columns", "Prediction", "TableFormat", "read_table", "table_columns", "write_table"]

_NEEDS_QUOTES: Final = re.compile('[",\r\n]')

_FORMULA_SIGNS: Final = tuple("=+-@\t\r")
"""First characters that make a spreadsheet compute a field.

Source: https://owasp.org/www-community/attacks/CSV_Injection
"""

_LEAST_ROUNDED: Final = 1e-12

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
    with storage_errors(path):
        if form.suffix == ".parquet":
            _write_parquet(path, form, groups)
            return
        lines = _csv_lines if form.suffix == ".csv" else _json_lines
        # UTF-8 whatever the locale, and the same line ends on every platform.
        with path.open("w", encoding="utf-8", newline="", buffering=2**20) as file:
            if form.suffix == ".csv":
                file.write(("\ufeff" if form.safe_csv else "") + ",".join(table_columns(form.top_k)) + "\n")
            for columns in groups:
                file.write(lines(columns, form))


def read_table(path: Path, form: TableFormat) -> Iterator[Prediction]:
    """Yield the rows of a finished table, in order.

    Raises:
        PredictionsError: the file cannot be read, or is not a table of cnnpipe with this many classes a row.
    """
    try:
        for values in _READERS[form.suffix](path, form):
            yield _prediction(values, form.top_k)
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
        raise PredictionsError(
            f"{path} cannot be read as a table of {form.top_k} classes a row: {one_line(error)}; "
            "classify again with --overwrite"
        ) from error


def _statuses(columns: Columns) -> list[str]:
    return ["ok" if error is None else "error" for error in columns.errors]


def _shortest_decimals(probabilities: npt.NDArray[np.float32]) -> list[str]:
    """Return the decimals with the fewest digits that give each float32 back, as Python writes them.

    Rounding whole columns in float64 is ten times as fast as printing float32: an integer of at most nine digits,
    divided by a power of ten that float64 holds exactly, is the float64 nearest to that decimal.
    """
    exact = probabilities.astype(np.float64)
    shortest = exact.copy()
    left = np.abs(exact) >= _LEAST_ROUNDED  # smaller ones need powers of ten that float64 does not hold
    small = ~left
    for digits in range(6, 10):  # six digits always come back from a float32, and nine always lead to it
        values = exact[left]
        power = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.rint(values * power) / power
        indices = np.flatnonzero(left)[rounded.astype(np.float32) == values]
        shortest[indices] = rounded[rounded.astype(np.float32) == values]
        left[indices] = False
    others = np.flatnonzero(left | small)
    # NumPy prints the shortest digits that tell a float32 from its neighbours; Python's float keeps them.
    shortest[others] = probabilities[others].astype("U32").astype(np.float64)
    return list(map(str, shortest.tolist()))


def _text_columns(columns: Columns, encode: Callable[[Sequence[str | None]], list[str]]) -> list[list[str]]:
    """Return all columns as text, in the order of `table_columns`.

    Args:
        encode: turns a column of texts, with None for no value, into fields.
    """
    (nothing,) = encode([None])
    failed = [index for index, error in enumerate(columns.errors) if error is not None]
    likeliest: list[list[str]] = []
    for labels, probabilities in zip(columns.labels, columns.probabilities, strict=True):
        decimals = _shortest_decimals(probabilities)
        for index in failed:
            decimals[index] = nothing
        likeliest += [encode(labels), decimals]
    model = encode([columns.model]) * len(columns.paths)
    texts = (columns.paths, _statuses(columns), columns.errors, columns.sha256)
    path, status, error, sha256 = map(encode, texts)
    return [path, status, *likeliest, error, sha256, model]


def _csv_lines(columns: Columns, form: TableFormat) -> str:
    r"""Return lines by RFC 4180, with `\n` between rows.

    Not by the csv module: before Python 3.13 it leaves a lone carriage return unquoted, which splits the row.
    Source: https://www.rfc-editor.org/rfc/rfc4180
    """

    def encode(texts: Sequence[str | None]) -> list[str]:
        fields = [text or "" for text in texts]
        if form.safe_csv:
            fields = list(map(_defuse, fields))
        if _NEEDS_QUOTES.search("\0".join(fields)):  # hardly any column needs quotes, and there may be millions of rows
            fields = ['"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text for text in fields]
        return fields

    return "\n".join(map(",".join, zip(*_text_columns(columns, encode), strict=True))) + "\n"


def _defuse(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would compute; and before an apostrophe, so that it can be undone."""
    return "'" + text if text.startswith((*_FORMULA_SIGNS, "'")) else text


def _json_lines(columns: Columns, form: TableFormat) -> str:
    """Return one JSON object a line."""

    def encode(texts: Sequence[str | None]) -> list[str]:
        return ["null" if text is None else encode_basestring(text) for text in texts]

    template = "{" + ", ".join(f'"{name}": %s' for name in table_columns(form.top_k)) + "}\n"
    return "".join(map(template.__mod__, zip(*_text_columns(columns, encode), strict=True)))


def _write_parquet(path: Path, form: TableFormat, groups: Iterable[Columns]) -> None:
    """Write typed columns: text, and float32 probabilities; only path, status and model are never null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    required = ("path", "status", "model")
    kinds = [(name, pa.float32() if name.startswith("prob") else pa.string()) for name in table_columns(form.top_k)]
    schema = pa.schema([pa.field(name, kind, nullable=name not in required) for name, kind in kinds])
    # The file is opened here, so that what cannot be written is an OSError with a number.
    with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for columns in groups:
            failed = np.array([error is not None for error in columns.errors], bool)
            likeliest: list[Any] = []
            for labels, probabilities in zip(columns.labels, columns.probabilities, strict=True):
                likeliest += [pa.array(labels, pa.string()), pa.array(probabilities, pa.float32(), mask=failed)]
            models = [columns.model] * len(columns.paths)
            texts = (columns.paths, _statuses(columns), columns.errors, columns.sha256, models)
            path_, status, error, sha256, model = (pa.array(column, pa.string()) for column in texts)
            arrays = [path_, status, *likeliest, error, sha256, model]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _prediction(values: Sequence[Any], top_k: int) -> Prediction:
    """Return the row of values in the order of `table_columns`."""
    path, status, *likeliest, error, sha256, model = values
    if status not in ("ok", "error") or len(likeliest) != 2 * top_k:
        raise ValueError(f"not a row of a table: {values!r}")
    kind, _, message = (error or "").partition(": ")
    labels = tuple(likeliest[::2]) if status == "ok" else ()
    probabilities = tuple(map(float, likeliest[1::2])) if status == "ok" else ()
    return Prediction(path, status, labels, probabilities, kind, message, sha256 or "", model)


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


_READERS: Final[dict[str, Callable[[Path, TableFormat], Iterator[Sequence[Any]]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
