"""Who does the work of a flow: this process, or the workers of a Dask cluster. Imports no prefect."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Final, Literal

from cnnpipe.errors import ConfigError, UsageError

__all__ = ["Runner", "check_runner"]

Runner = Literal["local", "dask"]

_ADDRESS: Final = re.compile(r"(tcp|tls|ws|wss)://\S+:\d{1,5}")


def check_runner(runner: Runner, scheduler: str | None) -> None:
    """Refuse a way to run that cannot work, before anything is started.

    Args:
        scheduler: address of a Dask scheduler; None for a cluster on this machine.
    Raises:
        UsageError: the address is none, or is of no use to the runner.
        ConfigError: Dask is not installed.
    """
    if scheduler is not None and runner != "dask":
        raise UsageError(f"--scheduler is for --runner dask, received {scheduler!r} with --runner {runner}")
    if scheduler is not None and not _ADDRESS.fullmatch(scheduler):
        raise UsageError(
            f"--scheduler must be the address of a Dask scheduler, such as tcp://host:8786, received {scheduler!r}"
        )
    if runner == "dask" and find_spec("prefect_dask") is None:
        raise ConfigError(
            "--runner dask needs prefect-dask, which is not installed; `make setup` brings it, "
            "elsewhere: pip install 'cnnpipe[dask]'"
        )
