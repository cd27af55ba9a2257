"""Files that start `flows.serve` after every boot: a systemd unit, or a compose file with its Dockerfile.

The server is a child of `flows.serve`. Both kinds end it with its parent, and start it again with it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import flows
from cnnpipe.console import command, make_app, run_app
from cnnpipe.errors import AlreadyThereError, UsageError
from cnnpipe.paths import escape_path, expand_path
from cnnpipe.settings import read_toml
from cnnpipe.storage import make_folder, write_text
from flows.serve import _serve, local_timezone
from flows.server import _PREFECT_ENVIRONMENT

__all__: list[str] = []

_ENVIRONMENT_FILE: Final = "cnnpipe.env"

_UNIT: Final = """\
# Written by `python -m flows.boot systemd`.
[Unit]
Description=cnnpipe: retrain every night
StartLimitIntervalSec=0

[Service]
{user}WorkingDirectory={folder}
# Passwords and other variables, one NAME=value a line.
EnvironmentFile=-{environment}
ExecStart={start}
# SIGTERM to flows.serve, which ends the runs under way within 60 s; then SIGKILL to the server.
KillMode=mixed
TimeoutStopSec=90
SuccessExitStatus=143
# A wrong option (2) does not become right; what is missing now, such as a network drive, may come.
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2
# A training that needs too much memory does not end the server.
OOMPolicy=continue

[Install]
WantedBy={target}
"""

_COMPOSE: Final = """\
# Written by `python -m flows.boot compose`.
services:
  cnnpipe:
    build: {{context: {context}, dockerfile: {dockerfile}, args: {{LOCK: requirements.lock}}}}
    # NVIDIA GPU, with the NVIDIA Container Toolkit: requirements-cuda.lock above, and this:
    # deploy: {{resources: {{reservations: {{devices: [{{driver: nvidia, count: all, capabilities: [gpu]}}]}}}}}}
    command: {command}
    init: true
    restart: unless-stopped
    stop_grace_period: 90s
    # The server listens on 127.0.0.1 of this machine, as without a container. Docker Desktop: allow host networking.
    network_mode: host
    user: "{uid}:{gid}"
    environment: {{TZ: {timezone}}}
    # Passwords and other variables, one NAME=value a line.
    env_file: [{{path: {environment}, required: false}}]
    # Every path is the same inside, because runs and champions record where their images are.
    working_dir: {folder}
    volumes:
{volumes}
    healthcheck: {{test: {health}, interval: 5m, timeout: 1m, start_period: 5m}}
"""

_DOCKERFILE: Final = """\
# Written by `python -m flows.boot compose`.
FROM python:{python}-slim
ARG LOCK=requirements.lock
ENV HOME=/tmp PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /usr/src/cnnpipe
COPY requirements*.lock ./
RUN pip install --require-hashes --no-deps --only-binary :all: -r "$LOCK"
COPY pyproject.toml README.md ./
COPY cnnpipe cnnpipe
COPY flows flows
RUN pip install --no-deps --no-build-isolation . && pip check
USER 1000:1000
CMD ["cnnpipe", "--help"]
"""

_IGNORE: Final = "*\n!requirements*.lock\n!pyproject.toml\n!README.md\n!cnnpipe\n!flows\n**/__pycache__\n"

app = make_app("Write the files that start `python -m flows.serve` after every boot.")


def _parse(words: list[str]) -> typer.Context:
    """Return the values of the dataset and the options of `flows.serve`; a wrong option ends the command."""
    serve = typer.Typer()
    serve.command()(_serve)
    return typer.main.get_command(serve).make_context("python -m flows.serve", [*words])  # type: ignore[return-value]


def _check(words: list[str]) -> list[str]:
    """Return the words with the folders that are in the environment, which a service does not have."""
    context = _parse(words)
    named = [name for name in ("data", "artifacts") if "ENV" in str(context.get_parameter_source(name))]
    return [*words, *(f"--{name}={context.params[name]}" for name in named)]


ServeArguments = Annotated[
    list[str], typer.Argument(default_factory=list, callback=_check, metavar="[DATASET] [OPTIONS]", show_default=False,
                              help="Dataset and options of `python -m flows.serve`.")]  # fmt: skip
FolderOption = Annotated[Path, typer.Option(help="Folder for the files.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
_PASS_ON: Final = {"ignore_unknown_options": True}


@app.command(context_settings=_PASS_ON)
@command
def systemd(words: ServeArguments, folder: FolderOption = Path(), overwrite: OverwriteOption = False) -> None:
    """Write a systemd unit: for your user, or, if root calls this, for the machine."""
    here, target = _text(Path.cwd()), folder.resolve() / "cnnpipe.service"
    start = [_quote_for_systemd(_text(word)) for word in (sys.executable, "-m", "flows.serve", *words)]
    is_root = os.geteuid() == 0
    unit = _UNIT.format(
        user=f"User={Path.cwd().stat().st_uid}\n" if is_root else "",
        folder=here.replace("%", "%%") + "/",  # a backslash or a space at the end would mean something else
        environment=re.sub(r"([*?[\\])", r"\\\1", here).replace("%", "%%") + f"/{_ENVIRONMENT_FILE}",  # it is a pattern
        start=" ".join([start[0].replace("$$", "$"), *start[1:]]),  # no variables in the name of the program
        target="multi-user.target" if is_root else "default.target",
    )
    _write({target: unit}, overwrite)
    units, user = ("/etc/systemd/system", "") if is_root else ("~/.config/systemd/user", " --user")
    typer.echo(f"install -D -m 644 -t {units} {shlex.quote(str(target))}")
    typer.echo(f"systemctl{user} daemon-reload && systemctl{user} enable --now cnnpipe")
    if not is_root:
        typer.echo("loginctl enable-linger  # start at boot, not at your login")
    typer.echo(f"journalctl{user} --unit cnnpipe --follow")


@app.command(context_settings=_PASS_ON)
@command
def compose(words: ServeArguments, folder: FolderOption = Path(), overwrite: OverwriteOption = False) -> None:
    """Write a compose file, and the Dockerfile of its image."""
    options, here, place = _parse(words).params, Path.cwd(), folder.resolve()
    data, artifacts = (expand_path(options[name]).resolve() for name in ("data", "artifacts"))
    values = [word.partition("=")[2] if word.startswith("-") else word for word in words]
    values += _datasets(read_toml(expand_path(options["config"])) if options.get("config") else {})
    readable = {path for value in values if value and (path := expand_path(value).resolve()).exists()}
    volumes = dict.fromkeys((data, artifacts), "") | dict.fromkeys(
        sorted(readable - {data, artifacts}), ", read_only: true"
    )
    mount = "      - {{type: bind, source: {0}, target: {0}{1}}}"
    text = _COMPOSE.format(
        context=_quote_for_compose(Path(flows.__file__).parents[1]),
        dockerfile=_quote_for_compose(place / "Dockerfile"),
        command=_quote_for_compose("python", "-m", "flows.serve", *words),
        uid=here.stat().st_uid,
        gid=here.stat().st_gid,
        timezone=_quote_for_compose(options.get("timezone") or local_timezone()),
        environment=_quote_for_compose(here / _ENVIRONMENT_FILE),
        folder=_quote_for_compose(here),
        volumes="\n".join(mount.format(_quote_for_compose(path), more) for path, more in volumes.items()),
        health=_quote_for_compose("CMD", "cnnpipe", "doctor", "--artifacts", artifacts),
    )
    files = {
        place / "compose.yaml": text,
        place / "Dockerfile": _DOCKERFILE.format(python="{}.{}".format(*sys.version_info)),
        place / "Dockerfile.dockerignore": _IGNORE,
    }
    _write(files, overwrite)
    for path in (data, artifacts):  # Docker would make them root's
        make_folder(path)
    docker = f"docker compose --file {shlex.quote(str(place / 'compose.yaml'))}"
    typer.echo(f"{docker} up --build --detach\n{docker} logs --follow\n{docker} down")


def _datasets(table: dict[str, Any]) -> list[str]:
    """Return the datasets that a settings file names, in any of its tables."""
    inner = [name for value in table.values() if isinstance(value, dict) for name in _datasets(value)]
    return inner + [str(value) for key, value in table.items() if key == "dataset"]


def _write(files: dict[Path, str], overwrite: bool) -> None:
    """Write the files, or none if one exists, and tell which variables of this shell they do not have."""
    if there := [str(path) for path in files if not overwrite and path.exists()]:
        raise AlreadyThereError(f"{there[0]} exists; replace it with --overwrite, or choose another --folder")
    for path, text in files.items():
        write_text(path, text, replace=overwrite)
        typer.echo(f"# wrote {path}")
    if names := sorted(name for name in os.environ.keys() - _PREFECT_ENVIRONMENT if name.startswith("PREFECT_")):
        typer.echo(f"# write those that it needs into {Path.cwd() / _ENVIRONMENT_FILE}: {', '.join(names)}")


def _text(text: object) -> str:
    """Return a path or a word as text; raises UsageError if it has characters that neither kind of file can hold."""
    if not (value := str(text)).isprintable():
        raise UsageError(f"paths and options must be printable text here, received {escape_path(value)!r}; rename it")
    return value


def _quote_for_systemd(word: str) -> str:
    """Quote a word of a command. Source: systemd.service(5), "Command lines"; systemd.unit(5), "Specifiers"."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[\w/.:=@,+-]+", word) else f'"{escaped}"'


def _quote_for_compose(*words: object) -> str:
    """Quote a word, or several as a list: JSON is YAML, and `$$` is a dollar sign."""
    values = [_text(word).replace("$", "$$") for word in words]
    return json.dumps(values if len(values) > 1 else values[0], ensure_ascii=False)


if __name__ == "__main__":
    run_app(app)
