"""The table of predictions: its columns, and its three formats CSV, JSON Lines and Parquet.

    path, status, label, probability, label_2, probability_2, …, error, sha256, model

All formats hold the same values. Where a row has none, CSV is empty and the others have null. `error` is
`kind: message`. A probability is written with the fewest digits that give the model's float32 back.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cnnpipe.classify.engine import Prediction
from cnnpipe.errors import PredictionsError, StorageError, one_line
from cnnpipe.files import display_path
from cnnpipe.storage import storage_errors, write_file

__all__ = ["TableFormat", "TableWriter", "join_tables", "open_table", "read_table", "table_columns"]


# Rows of a Parquet row group, the unit that is held in memory: about 10 MB of Python objects.
_ROW_GROUP: Final = 16_384

_NEEDS_QUOTES: Final = re.compile('[",\r\n]')

_FORMULA_SIGNS: Final = tuple("=+-@\t\r")
"""What makes a spreadsheet take a field for a formula, when it is the first character of it.

Source: https://owasp.org/www-community/attacks/CSV_Injection
"""

Row = list[str | float | None]


@dataclass(frozen=True)
class TableFormat:
    """How a table is written."""

    suffix: str
    """One of `cnnpipe.images.leftovers.TABLE_SUFFIXES`."""
    top_k: int
    """Classes in each row."""
    safe_csv: bool = False
    """Whether it is made for a spreadsheet: texts that it would take for formulas get an apostrophe in front, and the
    file a byte order mark, without which Excel does not read UTF-8."""


def table_columns(top_k: int) -> list[str]:
    """Return the names of the columns."""
    likeliest = [f"{name}{suffix}" for suffix in _rank_suffixes(top_k) for name in ("label", "probability")]
    return ["path", "status", *likeliest, "error", "sha256", "model"]


@contextmanager
def open_table(path: Path, form: TableFormat, *, part: bool = False) -> Iterator[TableWriter]:
    """Open a table for writing; it takes its name, and the place of what had it, when the block ends without an error.

    Args:
        part: whether it is a part for `join_tables`, which needs no names of the columns.
    Raises:
        StorageError: it cannot be written.
    """
    with write_file(path) as temporary:
        table = TableWriter(path, temporary, form)
        try:
            if form.suffix == ".csv" and not part:
                table.write_values([[*_csv_header(form)]])
            yield table
            table.close()
        finally:
            with suppress(StorageError):  # closed above, or an error is on its way that says more
                table.close()


def join_tables(parts: Iterable[Path], path: Path, form: TableFormat) -> None:
    """Write one table of the rows of its parts, in their order.

    Raises:
        StorageError: it cannot be written, or a part cannot be read.
    """
    if form.suffix == ".parquet":
        with open_table(path, form) as table:
            for part in parts:
                for batch in _parquet_batches(part):
                    table.write_values(batch)
        return
    with write_file(path) as temporary, storage_errors(path), temporary.open("wb") as file:
        if form.suffix == ".csv":
            file.write(_csv_line(_csv_header(form)).encode())
        for part in parts:
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file, 2**20)


def read_table(path: Path, form: TableFormat, *, part: bool = False) -> Iterator[Prediction]:
    """Yield the rows of a finished table, in order; their paths as they are displayed.

    Args:
        part: whether it was written as a part.
    Raises:
        PredictionsError: it cannot be read, or is no table of ours with so many classes in a row.
    """
    try:
        for values in _READERS[form.suffix](path, form, part):
            yield _prediction(values, form.top_k)
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
        reason = one_line(error)
        raise PredictionsError(
            f"{path} cannot be read as a table of {form.top_k} classes a row: {reason}; make it anew with --overwrite"
        ) from error


class TableWriter:
    """An open table; what cannot be written is a StorageError that names the table, not its temporary file."""

    def __init__(self, path: Path, temporary: Path, form: TableFormat) -> None:
        self._path = path
        self._top_k = form.top_k
        with storage_errors(path):
            self._format = _FORMATS[form.suffix](temporary, form)

    def write(self, rows: Sequence[Prediction]) -> None:
        """Append rows.

        Raises:
            StorageError: they cannot be written.
        """
        self.write_values([_values(row, self._top_k) for row in rows])

    def write_values(self, rows: Sequence[Row]) -> None:
        """Append rows that are given as values in the order of the columns; raises as `write`."""
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

    def __init__(self, path: Path, form: TableFormat) -> None: ...

    def write(self, rows: Sequence[Row]) -> None: ...

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


def _prediction(values: Sequence[Any], top_k: int) -> Prediction:
    """Return the row that `_values` made these of."""
    path, status, *likeliest, error, sha256, model = values
    if status not in ("ok", "error") or len(likeliest) != 2 * top_k:
        raise ValueError(f"a row that is not ours: {values!r}")
    kind, _, message = (error or "").partition(": ")
    labels = tuple(likeliest[::2]) if status == "ok" else ()
    probabilities = tuple(map(float, likeliest[1::2])) if status == "ok" else ()
    return Prediction(path, status, labels, probabilities, kind, message, sha256 or "", model)


class _TextWriter:
    """UTF-8 without conditions and not the platform's line ends: the same bytes everywhere."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="", buffering=2**20)

    def close(self) -> None:
        self._file.close()


class _CsvWriter(_TextWriter):
    r"""RFC 4180 with `\n` between rows.

    Not the csv module's: before Python 3.13 it leaves a lone carriage return in a name unquoted, which splits the row.
    Source: https://www.rfc-editor.org/rfc/rfc4180
    """

    def __init__(self, path: Path, form: TableFormat) -> None:
        super().__init__(path)
        self._line = _safe_csv_line if form.safe_csv else _csv_line

    def write(self, rows: Sequence[Row]) -> None:
        self._file.writelines(map(self._line, rows))


def _csv_header(form: TableFormat) -> list[str]:
    first, *others = table_columns(form.top_k)
    return ["\ufeff" + first if form.safe_csv else first, *others]


def _csv_line(values: Sequence[str | float | None]) -> str:
    fields = ["" if value is None else str(value) for value in values]
    line = ",".join(fields)
    # Of the whole line first: nearly none needs quotes, and there may be millions.
    if line.count(",") >= len(fields) or '"' in line or "\r" in line or "\n" in line:
        line = ",".join('"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text for text in fields)
    return line + "\n"


def _safe_csv_line(values: Sequence[str | float | None]) -> str:
    return _csv_line([_defuse(value) if isinstance(value, str) else value for value in values])


def _defuse(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would compute; and before an apostrophe, so that it can be undone."""
    return "'" + text if text.startswith((*_FORMULA_SIGNS, "'")) else text


class _JsonLinesWriter(_TextWriter):
    """One JSON object a line."""

    def __init__(self, path: Path, form: TableFormat) -> None:
        super().__init__(path)
        self._columns = table_columns(form.top_k)

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            values = dict(zip(self._columns, row, strict=True))
            self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


class _ParquetWriter:
    """Typed columns: text, and float32 probabilities; only path, status and model are never null."""

    def __init__(self, path: Path, form: TableFormat) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._rows: list[Row] = []
        self._arrow: Any = pa
        self._schema = pa.schema(
            [
                pa.field(
                    name,
                    pa.float32() if name.startswith("probability") else pa.string(),
                    nullable=name not in ("path", "status", "model"),
                )
                for name in table_columns(form.top_k)
            ]
        )
        self._file = path.open("wb")
        self._writer: Any = pq.ParquetWriter(self._file, self._schema, compression="zstd")

    def write(self, rows: Sequence[Row]) -> None:
        self._rows.extend(rows)
        while len(self._rows) >= _ROW_GROUP:
            # Groups of one length, wherever the rows came from: the same rows give the same bytes.
            group, self._rows = self._rows[:_ROW_GROUP], self._rows[_ROW_GROUP:]
            self._write_group(group)

    def _write_group(self, rows: Sequence[Row]) -> None:
        columns = zip(*rows, strict=True)
        kinds = [field.type for field in self._schema]
        arrays = [self._arrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        self._writer.write_batch(self._arrow.RecordBatch.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """Write what is held in memory, and the footer."""
        if not self._file.closed:
            with self._file:
                rows, self._rows = self._rows, []  # taken out first: what fails is not tried again
                if rows:
                    self._write_group(rows)
                self._writer.close()


def _read_csv(path: Path, form: TableFormat, part: bool) -> Iterator[list[str]]:
    with path.open(encoding="utf-8" if part else "utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        if not part:
            _check_columns(next(rows, []), form)
        for row in rows:
            yield [_undo_defuse(field) for field in row] if form.safe_csv else row


def _undo_defuse(text: str) -> str:
    return text.removeprefix("'")


def _read_json_lines(path: Path, form: TableFormat, _: bool) -> Iterator[list[Any]]:
    columns = table_columns(form.top_k)
    with path.open(encoding="utf-8", newline="") as file:
        for line in file:
            row = json.loads(line)
            _check_columns(list(row), form)
            yield [row[column] for column in columns]


def _read_parquet(path: Path, form: TableFormat, _: bool) -> Iterator[Row]:
    for rows in _parquet_batches(path, form):
        yield from rows


def _parquet_batches(path: Path, form: TableFormat | None = None) -> Iterator[list[Row]]:
    """Yield the rows of a Parquet file, some at a time; a probability with the digits of its float32."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if form is not None:
            _check_columns(file.schema_arrow.names, form)
        for batch in file.iter_batches(_ROW_GROUP):
            columns = [column.to_pylist() for column in batch.columns]
            yield [list(row) for row in zip(*columns, strict=True)]


def _check_columns(found: list[str], form: TableFormat) -> None:
    if found != table_columns(form.top_k):
        raise ValueError(f"its columns are {', '.join(found)[:100] or 'missing'}")


_FORMATS: Final[dict[str, type[_Format]]] = {
    ".csv": _CsvWriter,
    ".jsonl": _JsonLinesWriter,
    ".parquet": _ParquetWriter,
}
_READERS: Final[dict[str, Callable[[Path, TableFormat, bool], Iterator[Sequence[Any]]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
