"""Which files a job is about: those of a folder, of a list, or the ones that failed; from any place on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cnnpipe.classify.earlier import EarlierTable
from cnnpipe.classify.shards import Job
from cnnpipe.errors import PredictionsError
from cnnpipe.files import source_path
from cnnpipe.images.find import FileFilter, count_files, find_files, read_file_list

__all__ = ["JobFiles"]


class JobFiles:
    """The files of a job, in their order.

    Args:
        earlier: the table whose failed rows are to be tried again, for a job that does so.
        report: the page that will be written, and may be there from the last time.
    Attributes:
        passed_over: what the walk of this attempt has left out, as `find_files` counts it.
    """

    def __init__(self, job: Job, earlier: EarlierTable | None, report: Path | None = None) -> None:
        self._job = job
        self._report = report
        self._earlier = earlier
        self._root = Path(job.root)
        self._wanted = FileFilter(job.include, job.exclude)
        self.passed_over: Counter[str] = Counter()

    def behind(self, last: str | None, num_files: int) -> Iterator[str]:
        """Yield the files behind the `num_files`-th, which is `last`; all of them behind None and 0.

        Raises:
            DatasetError: the folder or the list cannot be read.
            PredictionsError: the list is another one than before.
        """
        job = self._job
        if job.mode == "retry-failed":
            shown = self._earlier.failed() if self._earlier else iter(())
            return _behind((_name_in(self._root, path) for path in shown), last, num_files)
        if job.files is not None:
            return _behind(filter(self._wanted.admits, read_file_list(job.files)), last, num_files)
        found = find_files(self._root, after=last, passed_over=self.passed_over)
        if job.include or job.exclude:
            found = filter(self._wanted.admits, found)
        table = Path(job.table)
        own = [table, Path(os.path.realpath(table)), *([self._report] if self._report else [])]
        return _without_own(found, self._root, own)

    def count(self) -> int:
        """Return how many there are, to show progress; 0 where it is not quickly told."""
        if self._job.files is not None or self._job.mode == "retry-failed":
            return 0
        return count_files(self._root, self._wanted)


def _behind(paths: Iterator[str], last: str | None, num_files: int) -> Iterator[str]:
    """Yield what a list has behind its `num_files`-th path, which must be `last`.

    Raises:
        PredictionsError: the list is another one.
    """
    if num_files:
        reached = next(islice(paths, num_files - 1, None), None)
        if reached != last:
            raise PredictionsError(
                f"the list of files has changed: number {num_files:,} was {last!r} and is {reached!r}; "
                "give the same list to go on, or start over with --no-resume"
            )
    yield from paths


def _name_in(root: Path, shown: str) -> str:
    """Return the path, relative to the folder, of a file that a table shows."""
    if "\\x" not in shown:
        return shown
    return str(source_path(root, shown)).removeprefix(f"{root}/")


def _without_own(paths: Iterator[str], root: Path, files: list[Path]) -> Iterator[str]:
    """Leave out what this job will replace, which the walk may not know for ours."""
    base = Path(os.path.realpath(root))
    own = {name for file in files if (name := _name_below(base, file)) is not None}
    return (path for path in paths if path not in own) if own else paths


def _name_below(base: Path, file: Path) -> str | None:
    """Return a file's path relative to a folder without links in its own path; None if it lies elsewhere."""
    place = Path(os.path.realpath(file.parent))
    return (place / file.name).relative_to(base).as_posix() if place.is_relative_to(base) else None
