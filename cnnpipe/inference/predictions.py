"""The table of predictions: its columns, and its three formats CSV, JSON Lines and Parquet.

    path, status, label, probability, label_2, probability_2, …, error, sha256, model

All formats hold the same values. Where a row has none, CSV is empty and the others have null. `error` is
`kind: message`. A probability is written with the fewest digits that give the model's float32 back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from cnnpipe.errors import PredictionsError
from cnnpipe.images import display_path
from cnnpipe.inference.engine import Prediction
from cnnpipe.storage import write_file

__all__ = ["TABLE_SUFFIXES", "TableWriter", "check_output", "open_table", "table_columns"]

TABLE_SUFFIXES: Final = (".csv", ".jsonl", ".parquet")

# Rows of a Parquet row group, the unit that is held in memory: about 10 MB of Python objects.
_ROW_GROUP: Final = 16_384

_NEEDS_QUOTES: Final = re.compile('[",\r\n]')

Row = list[str | float | None]


class TableWriter(Protocol):
    """An open table."""

    def write(self, rows: Sequence[Prediction]) -> None:
        """Append rows."""


def table_columns(top_k: int) -> list[str]:
    """Return the names of the columns."""
    likeliest = [f"{name}{suffix}" for suffix in _rank_suffixes(top_k) for name in ("label", "probability")]
    return ["path", "status", *likeliest, "error", "sha256", "model"]


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        PredictionsError: its suffix is none of `TABLE_SUFFIXES`, it is a folder, or it is there already.
    """
    if path.suffix not in TABLE_SUFFIXES:
        raise PredictionsError(f"the output must end in {', '.join(TABLE_SUFFIXES)}, received {path}")
    if path.is_dir():
        raise PredictionsError(f"the output must be a file, received the folder {path}; name a file in it")
    if path.exists() and not overwrite:
        raise PredictionsError(f"{path} is there already; name another output, or allow it with --overwrite")


@contextmanager
def open_table(path: Path, top_k: int) -> Iterator[tuple[TableWriter, Path]]:
    """Open a table for writing; it takes its name only when the block ends without an error.

    Args:
        path: its suffix decides the format.
        top_k: classes in each row.
    Yields:
        The writer, and the temporary file it writes to.
    Raises:
        StorageError: it cannot be written.
    """
    with write_file(path) as temporary:
        if path.suffix == ".parquet":
            parquet = _ParquetWriter(temporary, top_k)
            try:
                yield parquet, temporary
                parquet.flush()
            finally:
                parquet.close()
            return
        # Not the platform's line ends, and UTF-8 without conditions: the same bytes everywhere.
        with temporary.open("w", encoding="utf-8", newline="", buffering=2**20) as file:
            writer = _CsvWriter(file, top_k) if path.suffix == ".csv" else _JsonLinesWriter(file, top_k)
            yield writer, temporary


def _rank_suffixes(top_k: int) -> list[str]:
    return ["", *(f"_{rank}" for rank in range(2, top_k + 1))]


def _values(row: Prediction, top_k: int) -> Row:
    """Return a row's values in the order of `table_columns`, with None where it has none."""
    likeliest: Row = [None] * (2 * top_k)
    if row.status == "ok":
        likeliest[::2], likeliest[1::2] = row.labels, row.probabilities
    error = f"{row.error_kind}: {row.error}" if row.error_kind else None
    return [display_path(row.path), row.status, *likeliest, error, row.sha256 or None, row.model]


class _CsvWriter:
    r"""RFC 4180 with `\n` between rows.

    Not the csv module's: before Python 3.13 it leaves a lone carriage return in a name unquoted, which splits the row.
    Source: https://www.rfc-editor.org/rfc/rfc4180
    """

    def __init__(self, file: TextIO, top_k: int) -> None:
        self._file, self._top_k = file, top_k
        file.write(",".join(table_columns(top_k)) + "\n")

    def write(self, rows: Sequence[Prediction]) -> None:
        self._file.writelines(",".join(map(_csv_field, _values(row, self._top_k))) + "\n" for row in rows)


def _csv_field(value: str | float | None) -> str:
    if value is None:
        return ""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text


class _JsonLinesWriter:
    """One JSON object a line, UTF-8."""

    def __init__(self, file: TextIO, top_k: int) -> None:
        self._file, self._top_k, self._columns = file, top_k, table_columns(top_k)

    def write(self, rows: Sequence[Prediction]) -> None:
        for row in rows:
            values = dict(zip(self._columns, _values(row, self._top_k), strict=True))
            self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


class _ParquetWriter:
    """Typed columns: text, and float32 probabilities; only path, status and model are never null."""

    def __init__(self, path: Path, top_k: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._top_k = top_k
        self._rows: list[Row] = []
        self._arrow: Any = pa
        self._schema = pa.schema(
            [
                pa.field(
                    name,
                    pa.float32() if name.startswith("probability") else pa.string(),
                    nullable=name not in ("path", "status", "model"),
                )
                for name in table_columns(top_k)
            ]
        )
        self._writer: Any = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: Sequence[Prediction]) -> None:
        self._rows.extend(_values(row, self._top_k) for row in rows)
        if len(self._rows) >= _ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what is held in memory as one row group."""
        if self._rows:
            columns = zip(*self._rows, strict=True)
            kinds = [field.type for field in self._schema]
            arrays = [self._arrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            self._writer.write_batch(self._arrow.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._rows = []

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()
