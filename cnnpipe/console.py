"""Output of every command: log and progress on stderr, result on stdout, one line for an error, an exit status."""

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
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from cnnpipe.errors import CnnpipeError, UsageError, one_line
from cnnpipe.machine import package_versions
from cnnpipe.paths import expand_path
from cnnpipe.settings import set_signature

if TYPE_CHECKING:
    from cnnpipe.progress import ProgressCallback

DEBUG_VARIABLE: Final = "CNNPIPE_DEBUG"
"""Environment variable that is set while a command runs with `--debug`."""

ArtifactsOption = Annotated[
    Path, typer.Option("--artifacts", envvar="CNNPIPE_ARTIFACTS", help="Folder of runs and champions.")
]
DataOption = Annotated[Path, typer.Option("--data", envvar="CNNPIPE_DATA", help="Folder of raw and prepared datasets.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, the last of stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show debug messages, and the traceback of an error.")]

_SECONDS_BETWEEN_LINES: Final = 10.0

_stderr = Console(stderr=True, highlight=False)


def make_app(help_text: str | None = None) -> typer.Typer:
    """Return an empty command line, with a help text if it will have several commands.

    Its help is plain text on up to 120 columns, and typer prints no tracebacks.
    """
    return typer.Typer(
        help=help_text,
        no_args_is_help=help_text is not None,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": 120},
    )


def run_app(app: typer.Typer) -> None:
    """Run a command line as a process of its own, with open standard streams, in UTF-8 whatever the locale.

    If the locale has another encoding, Python is started again in its UTF-8 mode: nothing else changes how it decodes
    file names and arguments. Printing never fails: bytes of a path that are not text are printed as they are on stdout,
    so that a shell can use them.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: no file may be opened as one of these
        os.set_inheritable(number, True)
    os.close(number)
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
    """Run a command with its log on stderr, and turn an error into one line and an exit status.

    Adds the option `--debug`, and expands options that are paths with `expand_path`. A command with `JsonOption` must
    call that parameter `as_json`.
    """

    @functools.wraps(function)
    def run(*, debug: bool = False, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            with _log_to_stderr(debug), _signals_end_the_block():
                function(**{name: _resolve_path(name, value) for name, value in options.items()})
        except _TerminatedError:
            raise _failed("ended by SIGTERM; finished work is kept", "interrupted", 143, as_json) from None
        except KeyboardInterrupt:
            raise _failed("interrupted; finished work is kept", "interrupted", 130, as_json) from None
        except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                _stderr.print_exception()
            message = str(error) if isinstance(error, CnnpipeError) else _unexpected(error)
            status = error.exit_status if isinstance(error, CnnpipeError) else 1
            as_json = as_json and not getattr(error, "follows_result", False)
            raise _failed(f"error: {message}", type(error).__name__, status, as_json) from error

    debug_option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
    set_signature(run, [*inspect.signature(function, eval_str=True).parameters.values(), debug_option])
    return run


def _resolve_path(name: str, value: Any) -> Any:
    try:
        return expand_path(value) if isinstance(value, Path) else value
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
    """Return a line of at most 300 characters for an error that is not a `CnnpipeError`.

    It names a temporary file with the traceback, the command line and the versions.
    """
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    try:
        number, path = tempfile.mkstemp(".txt", f"cnnpipe-error-{time.strftime('%Y%m%dT%H%M%S')}-")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{shlex.join(sys.argv)}\nPython {sys.version.split()[0]}, {versions}\n\n")
            file.writelines(traceback.format_exception(error))
        end = f"; the whole error is in {path}"
    except OSError as failure:
        end = f"; the whole error could not be written ({failure.strerror}); --debug shows it"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f", {error.filename!r}" if error.filename else "")
    start = f"unexpected {type(error).__name__}: "
    return start + one_line(text, max(300 - len(f"error: {start}{end}"), 3)) + end


class _TerminatedError(KeyboardInterrupt):
    """Raised by SIGTERM; not an Exception, so that no code takes it for an error of its own."""


@contextmanager
def _signals_end_the_block() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: with its clean-up.

    Either signal is sent again if it arrives in a finalizer, where Python discards the exception: without this, one of
    264 presses of Ctrl-C during a training with TensorFlow had no effect.
    """

    def terminate(*_: object) -> None:
        raise _TerminatedError

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(lost.exc_value, _TerminatedError) else signal.SIGINT
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()  # after the finalizer
        else:
            hook(lost)

    handler, hook, sys.unraisablehook = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook, send_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.unraisablehook = hook


def show_result(values: dict[str, Any], lines: list[str], *, as_json: bool, status: str = "ok") -> None:
    """Print a command's result on stdout: one JSON object with `status`, or lines for a person."""
    if as_json:
        _print_json({"status": status, **values})
    else:
        for line in lines:
            typer.echo(line)


def _print_json(values: dict[str, Any]) -> None:
    """Print an object as one line of valid UTF-8; bytes of a path that are not text become `\\udcNN`."""
    text = json.dumps(values, ensure_ascii=False)
    typer.echo(text.encode("utf-8", "backslashreplace").decode())


def print_note(line: str) -> None:
    """Print a line on stderr that is not part of the result."""
    _stderr.print(line, soft_wrap=True, markup=False)


def field_lines(values: dict[str, Any]) -> list[str]:
    """Return nested values as aligned lines, `outer.inner  value`."""
    return table_lines(list(_flatten(values)))


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            each = value if isinstance(value, list | tuple) else [value]
            texts = (f"{item:.6g}" if isinstance(item, float) else str(item) for item in each)
            yield prefix + key, ", ".join(texts) if each else "none"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as lines with aligned columns; not rich's Table, which wraps or cuts a long path."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


class _StderrHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        _stderr.print(Text(self.format(record), style=style), soft_wrap=True)


@contextmanager
def _log_to_stderr(debug: bool) -> Iterator[None]:
    """Print the library's log records on stderr while a command runs."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"  # for modules that are imported only later, such as Keras
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
        os.environ.pop(DEBUG_VARIABLE, None)


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Give a callback that shows a progress bar, or prints a line every ten seconds where stderr is not a terminal."""
    from cnnpipe.progress import StageProgress  # rich's progress bars take a tenth of the time of `--help`

    with StageProgress(_stderr if _stderr.is_terminal else None) as progress:
        printed = time.monotonic()

        def report(label: str, done: int, total: int) -> None:
            nonlocal printed
            progress.report(label, done, total)
            if progress.disable and time.monotonic() - printed >= _SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                print_note(progress.text())

        yield report
