"""What a command shows: log and progress on stderr, the result on stdout, one line for an error, the exit status."""

from __future__ import annotations

import functools
import inspect
import io
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from cnnpipe.errors import CnnpipeError, FailureBudgetError, UsageError, one_line
from cnnpipe.files import user_path
from cnnpipe.machine import package_versions
from cnnpipe.progress import ProgressCallback, StageClock, progress_text, stage_of

__all__ = [
    "DEBUG_VARIABLE",
    "JsonOption",
    "command",
    "field_lines",
    "print_note",
    "progress_bar",
    "run_app",
    "set_signature",
    "show_result",
    "table_lines",
]

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells give it."""

TERMINATED = 143
"""Exit status after SIGTERM, likewise."""

JsonOption = Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON object.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and debug messages.")]

_LINE_LENGTH = 300
"""Characters of the line about an unexpected error; a longer path of the file with the rest is never cut."""

_stderr = Console(stderr=True, highlight=False)
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_UNTIL_SENT_AGAIN = 0.05

DEBUG_VARIABLE = "CNNPIPE_DEBUG"
"""Set in the environment while a command runs with `--debug`."""

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def run_app(app: typer.Typer) -> None:
    """Run a command line as a process of its own, with open standard streams, and with UTF-8 whatever the locale.

    Where the locale has another encoding, Python is started again in its UTF-8 mode: nothing else changes how it reads
    the names of files and the command line. Printing never fails: bytes in a path that are not text are the same bytes
    on stdout, so that a shell can use them.
    """
    _open_standard_descriptors()
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one will start
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # its descriptor was closed
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    app()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Run a command's body with its log on stderr, and turn what goes wrong into one line and an exit status.

    Adds the option `--debug`. A command that offers `JsonOption` calls its parameter `as_json`. The body gets what
    `user_path` makes of its options that are paths.
    """

    @functools.wraps(function)
    def run(*, debug: bool = False, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            with _log_to_stderr(debug), _ended_by_sigterm(), _lost_signals_sent_again():
                function(**{name: _resolve_path(name, value) for name, value in options.items()})
        except _TerminatedError:
            raise _failed("ended by SIGTERM; what was finished is kept", "interrupted", TERMINATED, as_json) from None
        except KeyboardInterrupt:
            raise _failed("interrupted; what was finished is kept", "interrupted", INTERRUPTED, as_json) from None
        except BrokenPipeError:  # the reader of our output has gone, such as `head`; nothing can be told any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                _stderr.print_exception()
            message = str(error) if isinstance(error, CnnpipeError) else _unexpected(error)
            status = error.exit_status if isinstance(error, CnnpipeError) else 1
            # Past the failure budget the work is done, and its result has been printed as the last line already.
            as_json = as_json and not isinstance(error, FailureBudgetError)
            raise _failed(f"error: {message}", type(error).__name__, status, as_json) from error

    own = inspect.signature(function, eval_str=True).parameters.values()
    set_signature(run, [*own, inspect.Parameter("debug", _KEYWORD, default=False, annotation=DebugOption)])
    return run


def _resolve_path(name: str, value: Any) -> Any:
    try:
        return user_path(value) if isinstance(value, Path) else value
    except UsageError as error:
        raise UsageError(f"--{name}: {error}") from error


def _failed(message: str, kind: str, status: int, as_json: bool) -> typer.Exit:
    """Print why a command ends, and return the exception that ends it."""
    line = " ".join(message.split())
    _stderr.print(Text(line, style="bold red" if line.startswith("error: ") else ""), soft_wrap=True)
    if as_json:
        failure = {"status": "failed", "error": line.removeprefix("error: "), "kind": kind, "exit_status": status}
        with suppress(OSError):  # standard output may be what failed
            _print_json(failure)
    return typer.Exit(status)


def _unexpected(error: Exception) -> str:
    """Return an error that nobody foresaw on one line that names the file with all of it."""
    try:
        rest = f"the whole error is in {_write_whole(error)}"
    except OSError as failure:
        rest = f"the whole error could not be written ({failure.strerror}); --debug shows it"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f", {error.filename!r}" if error.filename else "")
    start, end = f"unexpected {type(error).__name__}: ", f"; {rest}"
    return start + one_line(text, max(_LINE_LENGTH - len(f"error: {start}{end}"), 3)) + end


def _write_whole(error: Exception) -> str:
    """Write an error with its traceback, the command line and the versions to a temporary file; return its path."""
    number, path = tempfile.mkstemp(".txt", f"cnnpipe-error-{time.strftime('%Y%m%dT%H%M%S')}-")
    with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
        file.write(f"{shlex.join(sys.argv)}\nPython {sys.version.split()[0]}, {versions}\n\n")
        file.writelines(traceback.format_exception(error))
    return path


class _TerminatedError(BaseException):
    """SIGTERM has come; like KeyboardInterrupt no Exception, so that nobody takes it for an error of theirs."""

    signal = signal.SIGTERM


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: with its clean-up, so that nothing half-written stays behind."""

    def end(*_: object) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _lost_signals_sent_again() -> Iterator[None]:
    """Send Ctrl-C and SIGTERM once more where they came up in a finaliser, which Python lets no exception out of.

    Of a few hundred interrupts in the middle of a training with TensorFlow, one came up in the callback of a weak
    reference: the training went on as if nothing had happened.
    """
    before = sys.unraisablehook

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        error, number = lost.exc_value, None
        if isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        elif not isinstance(error, Exception):  # ours, or Prefect's, which takes its place within a flow
            number = getattr(error, "signal", None)
        if number is None:
            before(lost)
            return
        timer = threading.Timer(_SECONDS_UNTIL_SENT_AGAIN, os.kill, (os.getpid(), number))  # the finaliser is done then
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def set_signature(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function the keyword parameters that typer is to make options of."""
    keywords = [each.replace(kind=_KEYWORD) for each in parameters]
    function.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in keywords}


def show_result(values: dict[str, Any], lines: list[str], *, as_json: bool, status: str = "ok") -> None:
    """Print a command's result on stdout: one JSON object with `status`, or lines for a person."""
    if as_json:
        _print_json({"status": status, **values})
    else:
        for line in lines:
            typer.echo(line)


def _print_json(values: dict[str, Any]) -> None:
    """Print an object as one line of valid UTF-8; a byte of a path that is not text is the escape of a surrogate."""
    text = json.dumps(values, ensure_ascii=False)
    typer.echo(text.encode("utf-8", "backslashreplace").decode())


def print_note(line: str) -> None:
    """Print a line beside the result, on stderr."""
    _stderr.print(line, soft_wrap=True, markup=False)


def field_lines(values: dict[str, Any]) -> list[str]:
    """Return nested values as aligned lines, `outer.inner  value`."""
    flat = list(_flatten(values))
    width = max((len(key) for key, _ in flat), default=0)
    return [f"{key:<{width}}  {value}" for key, value in flat]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield prefix + key, ", ".join(map(_plain, value)) or "none"
        else:
            yield prefix + key, _plain(value)


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text, the header first, as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class _StderrHandler(logging.Handler):
    """Print log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        _stderr.print(Text(self.format(record), style=style), soft_wrap=True)


@contextmanager
def _log_to_stderr(debug: bool) -> Iterator[None]:
    """Print the library's log records on stderr while a command runs."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"  # for what is imported only later, such as Keras
    logger, handler = logging.getLogger("cnnpipe"), _StderrHandler()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        if debug:
            os.environ.pop(DEBUG_VARIABLE, None)


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Give a callback `(what, done, total)` that shows a bar with the rate and the time left.

    Where stderr is no terminal, such as a nightly log, a line every ten seconds takes the bar's place.
    A total of 0 means that it is not known yet.
    """
    if not _stderr.is_terminal:
        yield _print_lines()
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), console=_stderr, transient=True) as bar:
        clock = StageClock()
        shown: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            stage = stage_of(what)
            if stage not in shown:  # a bar cannot forget a total, so each stage has one of its own
                for task in shown.values():
                    bar.remove_task(task)
                shown.clear()
                shown[stage] = bar.add_task(what, total=None)
            text = progress_text(what, done, total, clock.rate(what, done))
            bar.update(shown[stage], description=text, completed=done, total=total or None)

        yield update


def _print_lines() -> ProgressCallback:
    clock = StageClock()
    printed = time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        rate = clock.rate(what, done)
        if now - printed < _SECONDS_BETWEEN_LINES or not rate:
            return
        printed = now
        _stderr.print(progress_text(what, done, total, rate), soft_wrap=True)

    return update


def _open_standard_descriptors() -> None:
    """Put the null device on descriptors 0, 1 and 2 where they are closed, so that no file is opened as one of them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
