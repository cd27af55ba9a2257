"""README and docs against the code: every option, command, target, file and link, and what README's commands print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer

import benchmarks.__main__
import cnnpipe.cli

ROOT: Final = Path(__file__).parent.parent
README: Final = ROOT / "README.md"
DOCS: Final = (README, *sorted((ROOT / "docs").glob("*.md")))
PAGES: Final = (*DOCS, ROOT / "CHANGELOG.md", ROOT / "data" / "README.md", ROOT / "artifacts" / "README.md")
FLOWS: Final = ("retrain", "classify", "serve", "server", "server start", "server stop", "server status",
                "boot", "boot systemd", "boot compose")  # fmt: skip
MAX_README_WORDS: Final = 1_500
MAX_PARAGRAPH_WORDS: Final = 60
MAX_PICTURE_BYTES: Final = 400_000


def all_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in DOCS)


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands of a click tree that do something, by the words that a user types."""
    if hasattr(command, "commands"):
        for name, each in command.commands.items():
            yield from commands(each, f"{path} {name}")
    else:
        yield path, command


def options(command: Any) -> set[str]:
    """Return the long options of a click command."""
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("--")}


def missing(names: set[str], text: str) -> list[str]:
    """Return the names that a text does not have as words of their own."""
    return sorted(name for name in names if not re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text))


def blocks(page: Path) -> Iterator[list[str]]:
    """Yield the groups of lines that blank lines separate."""
    for block in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
        yield block.strip("\n").splitlines()


def session(command: str) -> list[str]:
    """Return the lines that README shows below a command and its prompt."""
    for block in blocks(README):
        if block[0].strip() == f"$ {command}":
            return [line.removeprefix("    ") for line in block[1:]]
    raise AssertionError(f"README does not show `$ {command}`")


def shape(line: str) -> str:
    """Return the start of a line without the numbers, names and paths that differ from run to run."""
    line = re.sub(r"\S*/(?=out/)", "…/", line)
    line = re.sub(r"\b(int8|fp16|fp32)\b", "PRECISION", re.sub(r"\d[\d.,]*", "#", line))
    return re.split(r"[:,]", line)[0].strip()


def run(*arguments: str, folder: Path) -> str:
    """Run a module as a user does, in a folder of its own, and return stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("app", "program"), [(cnnpipe.cli.app, "cnnpipe"), (benchmarks.__main__.app, "python -m benchmarks")]
)
def test_every_command_and_option_is_documented(app: typer.Typer, program: str) -> None:
    tree = typer.main.get_command(app)
    found = dict(commands(tree, program))
    names = set(found) | options(tree).union(*(options(each) for each in found.values()))
    assert not missing(names, all_text())


@pytest.mark.parametrize("flow", FLOWS)
def test_every_command_and_option_of_the_flows_is_documented(flow: str, tmp_path: Path) -> None:
    help_text = run(*f"flows.{flow} --help".split(), folder=tmp_path)
    names = {f"flows.{flow}", *re.findall(r"--[a-z][a-z0-9-]*", help_text)}
    assert not missing(names, all_text())
    subcommands = re.findall(r"^  ([a-z]+)  ", help_text.partition("Commands:")[2], re.MULTILINE)
    assert {f"{flow} {name}" for name in subcommands} <= set(FLOWS)


def test_every_make_target_and_variable_is_documented() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) - {"help"}
    variables = set(re.findall(r"^([A-Z]+) :=", makefile, re.MULTILINE)) | {"PYTHON", "CUDA"}
    assert not missing({f"make {target}" for target in targets} | variables, all_text())
    named = set(re.findall(r"(?:`|\$ |^    )make ([a-z-]+)", all_text(), re.MULTILINE))
    assert named <= targets, "README or docs name a target that does not exist"


def test_every_file_of_a_run_is_documented(finished_run: Path) -> None:
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for text in (README.read_text(encoding="utf-8"), training):
        assert not [file.name for file in finished_run.iterdir() if f"`{file.name}`" not in text]


def test_every_environment_variable_is_documented() -> None:
    tree = typer.main.get_command(cnnpipe.cli.app)
    parameters = [each for _, command in commands(tree, "cnnpipe") for each in command.params]
    assert not missing({str(each.envvar) for each in parameters if each.envvar}, all_text())


def test_every_page_is_linked_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES if page != README}
    assert not {page for page in pages if f"]({page})" not in text}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which has no such heading"


def test_every_path_in_the_readme_exists() -> None:
    text = README.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:cnnpipe|flows|tests|benchmarks|docs|scripts)/[\w/.]*)`", text))
    assert len(paths) >= 7, "the table of the pipeline names a folder for each stage"
    layout = next(block for block in blocks(README) if block[0].startswith("    cnnpipe/"))
    paths |= set(re.findall(r"(?<!\S)[a-z_]+(?:/|\.py)", "\n".join(layout)))
    assert not [path for path in paths if not ((ROOT / path).exists() or (ROOT / "cnnpipe" / path).exists())]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MAX_README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paragraphs_are_short(page: Path) -> None:
    prose = [" ".join(block) for block in blocks(page) if not block[0].startswith(("    ", "|", "#", "-", "!"))]
    assert not [text for text in prose if len(text.split()) > MAX_PARAGRAPH_WORDS]


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs").glob("*.png"))
    assert pictures
    assert not [picture.name for picture in pictures if picture.stat().st_size > MAX_PICTURE_BYTES]


def test_classify_prints_what_the_readme_shows(artifacts: Path, photos: Path) -> None:
    folder = artifacts.parent
    assert photos.parent == folder
    command = "classify photos --output out/photos.csv"
    shown = [shape(line) for line in session(f".venv/bin/cnnpipe {command}") if line != "…"]
    printed = iter([shape(line) for line in run("cnnpipe.cli", *command.split(), folder=folder).splitlines()])
    assert all(line in printed for line in shown), "in this order"
    header = session("cut -c 1-78 out/photos.csv | head -5")[0]
    assert (folder / "out" / "photos.csv").read_text(encoding="utf-8").splitlines()[0] == header
    assert (folder / "out" / "photos.csv.summary.json").is_file()


def test_models_list_prints_what_the_readme_shows(artifacts: Path) -> None:
    shown = session(".venv/bin/cnnpipe models list")
    printed = run("cnnpipe.cli", "models", "list", folder=artifacts.parent).splitlines()
    assert printed[0] == shown[0]
    assert re.sub(r"[\d.]+", "#", printed[1]) == re.sub(r"[\d.]+", "#", shown[-1]), "the champion"


@pytest.mark.parametrize("command", ["cnnpipe doctor", "python -m flows.server status"])
def test_the_commands_for_when_something_fails_work(command: str, artifacts: Path) -> None:
    assert f"`.venv/bin/{command}`" in README.read_text(encoding="utf-8")
    module = command.replace("cnnpipe ", "cnnpipe.cli ").removeprefix("python -m ")
    printed = run(*module.split(), folder=artifacts.parent)
    shown = "\n".join(line for page in DOCS for block in blocks(page) for line in block if line.startswith("    "))
    names = {re.split(r":|  +", line)[0] for line in printed.splitlines()}
    assert {"server", "scheduler", "next run", "last error"} <= {name.removeprefix("nightly.") for name in names}
    assert all(f"    {name}" in shown for name in names if name.startswith(("nightly", "next run", "last error")))
