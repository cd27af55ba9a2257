"""The table of predictions: its columns, and its three formats CSV, JSON Lines and Parquet.

    path, status, label, probability, label_2, probability_2, …, error, sha256, model

All formats hold the same values. Where a row has none, CSV is empty and the others have null. `error` is
`kind: message`. A probability is written with the fewest digits that give the model's float32 back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

from cnnpipe.errors import AlreadyThereError, PredictionsError, StorageError
from cnnpipe.files import display_path
from cnnpipe.inference.engine import Prediction
from cnnpipe.inference.summary import SUMMARY_FILE, described_table, summaries_of
from cnnpipe.storage import storage_errors, write_file

__all__ = ["TABLE_SUFFIXES", "TableWriter", "check_output", "open_table", "table_columns"]

TABLE_SUFFIXES: Final = (".csv", ".jsonl", ".parquet")

# Rows of a Parquet row group, the unit that is held in memory: about 10 MB of Python objects.
_ROW_GROUP: Final = 16_384

_NEEDS_QUOTES: Final = re.compile('[",\r\n]')

Row = list[str | float | None]


def table_columns(top_k: int) -> list[str]:
    """Return the names of the columns."""
    likeliest = [f"{name}{suffix}" for suffix in _rank_suffixes(top_k) for name in ("label", "probability")]
    return ["path", "status", *likeliest, "error", "sha256", "model"]


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    The summary is part of the output: it is replaced only with the table it describes.

    Args:
        path: the table.
        overwrite: whether a table and its summary may be replaced.
    Raises:
        PredictionsError: its suffix is none of `TABLE_SUFFIXES`, it is a folder, it or its summary is there already,
            or the `summary.json` beside it is not ours.
        StorageError: there can be no such file.
    """
    if path.suffix not in TABLE_SUFFIXES:
        raise PredictionsError(f"the output must end in {', '.join(TABLE_SUFFIXES)}, received {path}")
    with storage_errors(path):  # such as a name that is too long
        if path.is_dir():
            raise PredictionsError(f"the output must be a file, received the folder {path}; name a file in it")
    summary = path.with_name(SUMMARY_FILE)
    if os.path.lexists(summary) and described_table(summary) is None:
        raise PredictionsError(f"{summary} is no summary of ours; choose another folder for --output")
    for file in (path, *summaries_of(path)):
        if os.path.lexists(file) and not overwrite:
            raise PredictionsError(f"{file} is there already; name another output, or allow it with --overwrite")


@contextmanager
def open_table(path: Path, top_k: int, *, overwrite: bool = False) -> Iterator[tuple[TableWriter, Path]]:
    """Open a table for writing; it takes its name only when the block ends without an error.

    Args:
        path: its suffix decides the format.
        top_k: classes in each row.
        overwrite: whether a table of that name gives way.
    Yields:
        The writer, and the temporary file it writes to.
    Raises:
        PredictionsError: the name was taken while this table was written.
        StorageError: it cannot be written.
    """
    try:
        with write_file(path, replace=overwrite) as temporary:
            table = TableWriter(path, temporary, top_k)
            try:
                yield table, temporary
                table.close()
            finally:
                with suppress(StorageError):  # closed above, or an error is on its way that says more
                    table.close()
    except AlreadyThereError as error:
        raise PredictionsError(
            f"{path} was written by another process meanwhile, so this table was dropped; "
            "run again with another --output"
        ) from error


class TableWriter:
    """An open table; what cannot be written is a StorageError that names the table, not its temporary file."""

    def __init__(self, path: Path, temporary: Path, top_k: int) -> None:
        self._path = path
        with storage_errors(path):
            self._format = _FORMATS[path.suffix](temporary, top_k)

    def write(self, rows: Sequence[Prediction]) -> None:
        """Append rows.

        Raises:
            StorageError: they cannot be written.
        """
        with storage_errors(self._path):
            self._format.write(rows)

    def close(self) -> None:
        """Write what is still held in memory, and close the file; once more does nothing.

        Raises:
            StorageError: it cannot be written; the file is closed all the same.
        """
        with storage_errors(self._path):
            self._format.close()


class _Format(Protocol):
    """A file of rows; may raise OSError."""

    def __init__(self, path: Path, top_k: int) -> None: ...

    def write(self, rows: Sequence[Prediction]) -> None: ...

    def close(self) -> None: ...


def _rank_suffixes(top_k: int) -> list[str]:
    return ["", *(f"_{rank}" for rank in range(2, top_k + 1))]


def _values(row: Prediction, top_k: int) -> Row:
    """Return a row's values in the order of `table_columns`, with None where it has none."""
    likeliest: Row = [None] * (2 * top_k)
    if row.status == "ok":
        likeliest[::2], likeliest[1::2] = row.labels, row.probabilities
    error = f"{row.error_kind}: {row.error}" if row.error_kind else None
    return [display_path(row.path), row.status, *likeliest, error, row.sha256 or None, row.model]


class _TextWriter:
    """UTF-8 without conditions and not the platform's line ends: the same bytes everywhere."""

    def __init__(self, path: Path, top_k: int) -> None:
        self._top_k, self._columns = top_k, table_columns(top_k)
        self._file = path.open("w", encoding="utf-8", newline="", buffering=2**20)

    def close(self) -> None:
        self._file.close()


class _CsvWriter(_TextWriter):
    r"""RFC 4180 with `\n` between rows.

    Not the csv module's: before Python 3.13 it leaves a lone carriage return in a name unquoted, which splits the row.
    Source: https://www.rfc-editor.org/rfc/rfc4180
    """

    def __init__(self, path: Path, top_k: int) -> None:
        super().__init__(path, top_k)
        self._file.write(",".join(self._columns) + "\n")

    def write(self, rows: Sequence[Prediction]) -> None:
        self._file.writelines(",".join(map(_csv_field, _values(row, self._top_k))) + "\n" for row in rows)


def _csv_field(value: str | float | None) -> str:
    if value is None:
        return ""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text


class _JsonLinesWriter(_TextWriter):
    """One JSON object a line."""

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
        self._file = path.open("wb")
        self._writer: Any = pq.ParquetWriter(self._file, self._schema, compression="zstd")

    def write(self, rows: Sequence[Prediction]) -> None:
        self._rows.extend(_values(row, self._top_k) for row in rows)
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        """Write what is held in memory as one row group."""
        rows, self._rows = self._rows, []  # taken out first: what fails is not tried again by `close`
        if rows:
            columns = zip(*rows, strict=True)
            kinds = [field.type for field in self._schema]
            arrays = [self._arrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            self._writer.write_batch(self._arrow.RecordBatch.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """Write what is held in memory, and the footer."""
        if not self._file.closed:
            with self._file:
                self._flush()
                self._writer.close()


_FORMATS: Final[dict[str, type[_Format]]] = {
    ".csv": _CsvWriter,
    ".jsonl": _JsonLinesWriter,
    ".parquet": _ParquetWriter,
}
