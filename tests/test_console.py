"""Progress bars and lines, signals, unexpected errors, standard streams and locales."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import write_digits

from cnnpipe import console
from cnnpipe.console import progress_bar, table_lines
from cnnpipe.progress import StageProgress


class _Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Time:
    clock = _Time()
    for module in ("cnnpipe.console", "cnnpipe.progress"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock


def _text_after(clock: _Time, *reports: tuple[str, int, int]) -> str:
    """Return the line of text after reports a second apart."""
    progress = StageProgress()
    for report in reports:
        progress.report(*report)
        clock.now += 1
    return progress.text()


@pytest.mark.parametrize(
    ("counts", "total", "line"),
    [
        ([0, 4_900, 9_800], 58_000, "classify: 0 failed: 9,800/58,000 images, 17 %, 4,900 images/s, 0:00:10 left"),
        ([0, 4_900, 9_800], 0, "classify: 0 failed: 9,800 images, 4,900 images/s"),
        ([0], 0, "classify: 0 failed: 0 images"),
        ([0, 32], 58_000, "classify: 0 failed: 32/58,000 images, 0 %"),
        ([0, 1, 58_000], 58_000, "classify: 0 failed: 58,000/58,000 images, 100 %, 57,999 images/s"),
        ([5_000_000, 5_000_100, 5_000_200], 0, "classify: 0 failed: 5,000,200 images, 100 images/s"),
        ([500, 900, 0, 100, 200], 0, "classify: 0 failed: 200 images, 100 images/s"),
        ([0, 900, 1800], 10_000_000, "classify: 0 failed: 1,800/10,000,000 images, 0 %, 900 images/s, 3:05:10 left"),
    ],
)
def test_a_line_tells_what_is_known(counts: list[int], total: int, line: str, clock: _Time) -> None:
    assert _text_after(clock, *(("classify: 0 failed", count, total) for count in counts)) == line


def test_a_download_is_told_in_megabytes(clock: _Time) -> None:
    text = _text_after(clock, *(("download", number * 4_000_000, 170_000_000) for number in range(3)))
    assert text == "download: 8/170 MB, 5 %, 4.0 MB/s, 0:00:41 left"


def test_rate_and_total_belong_to_one_stage(clock: _Time) -> None:
    reports = [("hash", 50_000 * number, 200_000) for number in range(4)] + [
        ("decode", 50 * number, 0) for number in range(3)
    ]
    assert _text_after(clock, *reports) == "decode: 100 images, 50 images/s"


def _shown_on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(console, "_stderr", Console(file=text, force_terminal=terminal, width=200, highlight=False))
    return text


def test_a_log_gets_a_line_every_ten_seconds(clock: _Time, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _shown_on(False, monkeypatch)
    with progress_bar() as update:
        for second in range(25):
            clock.now += 1
            update("classify: 0 failed", second * 100, 2400 if second > 15 else 0)
    assert text.getvalue().splitlines() == [
        "classify: 0 failed: 900 images, 100 images/s",
        "classify: 0 failed: 1,900/2,400 images, 79 %, 100 images/s, 0:00:05 left",
    ]


def test_a_terminal_shows_a_total_that_becomes_known_and_none_of_the_stage_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = _shown_on(True, monkeypatch)
    with progress_bar() as update:
        update("hash", 5, 10)
        update("classify: [0] failed", 100, 0)
        update("classify: [0] failed", 200, 2400)
    last = text.getvalue().split("\r")
    assert any("classify: [0] failed" in frame and "200/2,400 images" in frame for frame in last)
    assert "200/10" not in text.getvalue()


def test_columns_of_a_table_are_aligned_in_any_script_and_never_cut() -> None:
    long = "/x" * 500
    assert table_lines([("A", "B"), ("写真", long), ("b", "")]) == ["A     B", f"写真  {long}", "b"]


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "interrupted; finished work is kept\n"),
        (signal.SIGTERM, 143, "ended by SIGTERM; finished work is kept\n"),
    ],
)
def test_a_signal_that_comes_within_a_finaliser_ends_the_command_too(
    number: signal.Signals, status: int, said: str
) -> None:
    script = f"""
        import signal, time
        import typer
        from cnnpipe.console import command

        class Finalised:
            def __del__(self):
                signal.raise_signal({number})

        @command
        def work() -> None:
            Finalised()
            print("went on", flush=True)
            time.sleep(30)
            print("was not ended")

        signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off in what a shell has in the background
        typer.run(work)
    """
    ended = run_script(script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "went on\n", said)


def test_an_error_that_cannot_be_written_down_is_one_line_too(tmp_path: Path) -> None:
    script = f"""
        import tempfile, typer
        from cnnpipe.console import command

        @command
        def work() -> None:
            raise ValueError("first " + "x" * 5000 + " last")

        tempfile.tempdir = {str(tmp_path / "gone")!r}
        typer.run(work)
    """
    (line,) = run_script(script).stderr.splitlines()
    assert line.startswith("error: unexpected ValueError: first xxx")
    assert line.endswith("xxx last; the whole error could not be written (No such file or directory); --debug shows it")
    assert len(line) == 300


def test_other_errors_in_a_finaliser_are_told_as_python_tells_them() -> None:
    script = """
        import typer
        from cnnpipe.console import command

        class Finalised:
            def __del__(self):
                raise ValueError("left behind")

        @command
        def work() -> None:
            Finalised()
            print("went on")

        typer.run(work)
    """
    ended = run_script(script)
    assert (ended.returncode, ended.stdout) == (0, "went on\n")
    assert "ValueError: left behind" in ended.stderr


def in_a_shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell in which `python` is this one, in a folder that holds `images` with three digits."""
    if not (folder / "images").exists():
        write_digits(folder / "images", range(3))
    return subprocess.run(
        ["sh", "-c", line.replace("python", sys.executable)], capture_output=True, cwd=folder, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )  # fmt: skip


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_no_row(closed: str, model: Path, tmp_path: Path) -> None:
    ended = in_a_shell(
        f"python -m cnnpipe.cli classify images --model {model} --output t.csv --device cpu {closed}", tmp_path
    )
    assert ended.returncode == 0
    assert [row["status"] for row in rows(tmp_path / "t.csv")] == ["ok"] * 3


def test_library_with_a_closed_stderr_classifies_too(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from cnnpipe.settings import ClassifySettings\n"
        "from cnnpipe.classify.run import classify_folder\n"
        f"settings = ClassifySettings(folder='images', model={str(model)!r}, output='t.csv', device='cpu')\n"
        "classify_folder(settings, Path('artifacts'))\n"
    )
    assert in_a_shell("python script.py 2>&-", tmp_path).returncode == 0
    assert [row["status"] for row in rows(tmp_path / "t.csv")] == ["ok"] * 3


_NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [_NO_UTF8, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_names_are_utf8_whatever_the_locale(environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "żółw" / "café", range(1))
    line = f"python -m cnnpipe.cli classify żółw --model {model} --output t.csv --device cpu"
    ended = in_a_shell(line + " --json", tmp_path, **environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.decode().splitlines()[-1])["folder"] == str(tmp_path / "żółw")
    assert [row["path"] for row in rows(tmp_path / "t.csv")] == ["café/0/0000.png"]
    again = in_a_shell(line, tmp_path, **environment)
    assert again.returncode == 1
    assert "t.csv exists" in again.stderr.decode()


@pytest.mark.parametrize("environment", [{}, _NO_UTF8])
def test_dataset_keeps_class_names_in_any_locale(environment: dict[str, str], tmp_path: Path) -> None:
    for name, numbers in (("żółw", range(20)), ("café", range(20, 40))):
        write_digits(tmp_path / "D" / name, numbers)
    ended = in_a_shell("python -m cnnpipe.cli prepare D --data data --json", tmp_path, **environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.decode().splitlines()[-1])["class_names"] == ["café", "żółw"]
