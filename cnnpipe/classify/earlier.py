"""An earlier table that is brought up to date: which of its rows are kept, and which files are tried again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cnnpipe.classify.engine import Prediction
from cnnpipe.classify.summary import ModelUsed, RowCounts, read_summary
from cnnpipe.classify.table import TableFormat, open_table, read_table
from cnnpipe.errors import PredictionsError, StorageError
from cnnpipe.files import display_path
from cnnpipe.settings import ClassifySettings

__all__ = ["EarlierTable", "KeptRows", "kept_rows", "replace_failed"]


class EarlierTable:
    """A finished table, with the summary that says how it was made.

    Raises:
        PredictionsError: it has no summary, so nobody knows what made it.
    """

    def __init__(self, path: Path) -> None:
        summary = read_summary(path)
        if summary is None:
            raise PredictionsError(
                f"{display_path(str(path))} has no summary.json beside it that says how it was made; "
                "classify anew with --overwrite"
            )
        self.path = path
        try:
            self.form = TableFormat(path.suffix, summary["top_k"], summary["safe_csv"])
            self._folder, self._model = summary["folder"], ModelUsed(**summary["model"])
        except (KeyError, TypeError) as error:
            raise PredictionsError(
                f"the summary of {display_path(str(path))} is one of another version ({error}); classify anew with "
                "--overwrite"
            ) from error

    def difference(self, model_sha256: str, root: Path, settings: ClassifySettings) -> str:
        """Return in what it was made otherwise than its new rows would be, or an empty string."""
        made = self._model
        folder = display_path(str(root.absolute()))
        if settings.retry_failed and self._folder != folder:
            return f"the folder {self._folder} (now {folder})"
        if made.sha256 != model_sha256:
            return f"the model {made.name}/{made.run_id} ({made.sha256[:12]}…, now {model_sha256[:12]}…)"
        for name in ("top_k", "safe_csv"):
            if (then := getattr(self.form, name)) != getattr(settings, name):
                return f"{name} {then!r} (now {getattr(settings, name)!r})"
        return ""

    def rows(self) -> Iterator[Prediction]:
        """Yield its rows; raises PredictionsError as `read_table`."""
        return read_table(self.path, self.form)

    def failed(self) -> Iterator[str]:
        """Yield the paths, as displayed, of the rows that failed, in order."""
        return (row.path for row in self.rows() if row.status == "error")


class KeptRows:
    """The classified rows of an earlier table by path: on disk, as there may be millions; made by `kept_rows`."""

    def __init__(self, database: sqlite3.Connection, rows: Iterable[Prediction]) -> None:
        self._database = database
        database.execute("CREATE TABLE kept (path TEXT PRIMARY KEY, sha256 TEXT, model TEXT, likeliest TEXT)")
        database.executemany(
            "INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)",
            (
                (row.path, row.sha256, row.model, json.dumps([row.labels, row.probabilities]))
                for row in rows
                if row.status == "ok"  # what failed is tried again: it may have been the disk, or the time limit
            ),
        )

    def digest(self, path: str) -> str:
        """Return the SHA-256 that a file had when its row was made; empty if there is no row to keep."""
        found = self._database.execute("SELECT sha256 FROM kept WHERE path = ?", (display_path(path),)).fetchone()
        return str(found[0]) if found else ""

    def row(self, path: str) -> Prediction:
        """Return the row of a file that has a digest."""
        query = "SELECT sha256, model, likeliest FROM kept WHERE path = ?"
        sha256, model, likeliest = self._database.execute(query, (display_path(path),)).fetchone()
        labels, probabilities = json.loads(likeliest)
        return Prediction(path, "ok", tuple(labels), tuple(probabilities), "", "", sha256, model, unchanged=True)


@contextmanager
def kept_rows(earlier: EarlierTable) -> Iterator[KeptRows]:
    """Look up the rows of an earlier table by path, until the block ends.

    Raises:
        PredictionsError: the table cannot be read.
        StorageError: there is no room for the index in the folder for temporary files.
    """
    database = sqlite3.connect("", check_same_thread=False)  # a file without a name, which goes with the connection
    try:
        yield KeptRows(database, earlier.rows())
    except sqlite3.Error as error:
        raise StorageError(f"cannot index {earlier.path}: {error}; free some space for temporary files") from error
    finally:
        database.close()


def replace_failed(
    earlier: EarlierTable, parts: Iterable[Path], path: Path, form: TableFormat, min_probability: float
) -> RowCounts:
    """Write the earlier table anew, with each row that failed replaced by the next row of the parts; return all counts.

    Raises:
        PredictionsError: the table has changed meanwhile, so that the rows do not belong together.
        StorageError: it cannot be written.
    """
    tried = (row for part in parts for row in read_table(part, form, part=True))
    counts = RowCounts()
    with open_table(path, form) as table:
        for row in earlier.rows():
            if row.status == "error":
                new = next(tried, None)
                if new is None or display_path(new.path) != row.path:
                    raise PredictionsError(f"{earlier.path} has changed meanwhile; run it again with --overwrite")
                row = new
            table.write([row])
            counts.add([row], min_probability)
    return counts
