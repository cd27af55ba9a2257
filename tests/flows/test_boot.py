"""The files that start `flows.serve` after every boot: what systemd and YAML make of them."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
from servers import clean_environment
from typer.testing import CliRunner, Result

from flows.boot import app

yaml: Final[Any] = importlib.import_module("yaml")  # of Prefect's own requirements, without types
ROOT: Final = Path(__file__).parents[2]
DATASET: Final = 'it\'s 50% $HOME "x" \\n {a}'
WORDS: Final = [DATASET, "--cron", "0 2 * * 1-5", "--name=a b", "--seed", "1", "--timezone", "Europe/Rome"]
"""Dataset and options of `flows.serve`, with all that systemd, compose and YAML take for more than text."""


def write(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with an awkward name and the dataset, without variables of Prefect's or ours."""
    folder = tmp_path / "w [x] %h $d {y} é\\"
    (folder / DATASET).mkdir(parents=True)
    monkeypatch.chdir(folder)
    with mock.patch.dict(os.environ, clean_environment(), clear=True):
        yield folder


def unit_of(folder: Path) -> dict[str, str]:
    """Return the settings of the unit in a folder, by name."""
    lines = (folder / "cnnpipe.service").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and line[0] not in "#[")


def words_of(command: str) -> list[str]:
    """Split a command as systemd.service(5) tells: quotes, backslashes, `%%` and `$$`."""
    quoted_or_bare = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', command)
    words = [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare for quoted, bare in quoted_or_bare]
    assert not re.search("[%$]", "".join(words).replace("%%", "").replace("$$", "")), "specifiers or variables"
    return [word.replace("%%", "%").replace("$$", "$") for word in words]


def service_of(folder: Path) -> dict[str, Any]:
    """Return the only service of the compose file in a folder."""
    services = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert list(services) == ["cnnpipe"]
    return dict(services["cnnpipe"])


def test_unit_runs_serve_in_this_folder_with_the_options_as_they_are(clone: Path) -> None:
    result = write("systemd", *WORDS)
    assert result.exit_code == 0, result.output
    unit = unit_of(clone)
    assert words_of(unit["ExecStart"]) == [sys.executable, "-m", "flows.serve", *WORDS]
    assert unit["WorkingDirectory"].replace("%%", "%") == f"{clone}/"
    pattern = unit["EnvironmentFile"].removeprefix("-").replace("%%", "%")
    (clone / "cnnpipe.env").touch()
    assert [str(found) for found in _glob(pattern)] == [f"{clone}/cnnpipe.env"]
    assert "enable --now cnnpipe" in result.stdout


def _glob(pattern: str) -> list[str]:
    """Return what the shell finds for a pattern; like glob(3), and unlike Python's, it knows backslashes."""
    quoted = re.sub(r"(?<!\\)([ $])", r"\\\1", pattern)
    found = subprocess.run(["sh", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("is_root", [True, False])
def test_systemd_finds_nothing_wrong_with_the_unit(is_root: bool, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 1000)
    units = clone / "units"
    assert write("systemd", *WORDS, "--folder", str(units)).exit_code == 0
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(units / "cnnpipe.service")], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    assert ("User" in unit_of(units)) is is_root, "a unit of a user cannot change it"


def test_container_runs_serve_on_the_same_paths_with_the_options_as_they_are(clone: Path) -> None:
    result = write("compose", *WORDS)
    assert result.exit_code == 0, result.output
    service = service_of(clone)
    plain = [word.replace("$$", "$") for word in service["command"]]
    assert plain == ["python", "-m", "flows.serve", *WORDS]
    assert "$" not in "".join(service["command"]).replace("$$", "")
    mounted = {each["source"].replace("$$", "$"): each.get("read_only", False) for each in service["volumes"]}
    assert mounted == {f"{clone}/data": False, f"{clone}/artifacts": False, f"{clone}/{DATASET}": True}
    assert all(each["target"] == each["source"] and Path(each["source"].replace("$$", "$")).is_dir()
               for each in service["volumes"])  # fmt: skip
    assert service["working_dir"].replace("$$", "$") == str(clone)
    assert service["environment"] == {"TZ": "Europe/Rome"}
    assert (service["restart"], service["network_mode"]) == ("unless-stopped", "host")


def test_container_has_the_datasets_that_a_settings_file_names(clone: Path) -> None:
    (clone / "nightly.toml").write_text("[prepare]\ndataset = 'photos of cats'\n")
    (clone / "photos of cats").mkdir()
    assert write("compose", "--config", "nightly.toml", "--timezone", "Europe/Rome").exit_code == 0
    read_only = [each["source"].replace("$$", "$") for each in service_of(clone)["volumes"] if each.get("read_only")]
    assert read_only == [f"{clone}/nightly.toml", f"{clone}/photos of cats"]


def test_image_has_the_locked_packages_and_the_program_and_no_secret(clone: Path) -> None:
    assert write("compose").exit_code == 0
    build = service_of(clone)["build"]
    assert build["context"] == str(ROOT)
    dockerfile = Path(build["dockerfile"].replace("$$", "$")).read_text()
    assert f"FROM python:{sys.version_info[0]}.{sys.version_info[1]}-slim\n" in dockerfile
    assert "--require-hashes" in dockerfile
    assert "USER 1000" in dockerfile
    assert "://" not in dockerfile
    kept = (clone / "Dockerfile.dockerignore").read_text().splitlines()
    assert kept[0] == "*"
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()}
    assert copied == {line.removeprefix("!") for line in kept if line.startswith("!")}
    assert all(list(ROOT.glob(each)) for each in copied)


@pytest.mark.parametrize("kind", ["systemd", "compose"])
def test_files_that_exist_are_replaced_only_if_told(kind: str, clone: Path) -> None:
    mine = clone / ("cnnpipe.service" if kind == "systemd" else "Dockerfile")
    mine.write_text("mine")
    result = write(kind)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.match(r"error: .* exists; replace it with --overwrite", result.stderr)
    assert mine.read_text() == "mine"
    assert not (clone / "compose.yaml").exists()
    assert write(kind, "--overwrite").exit_code == 0
    assert mine.read_text() != "mine"


def test_options_that_serve_does_not_have_are_a_usage_error(clone: Path) -> None:
    result = write("systemd", "digits", "--epoch", "1")
    assert result.exit_code == 2
    assert "No such option: --epoch" in result.stderr
    assert not (clone / "cnnpipe.service").exists()


def test_variables_of_this_shell_that_the_files_lack_are_named_without_their_values(clone: Path) -> None:
    assert "cnnpipe.env" not in write("systemd").stdout
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = "somebody:secret"
    result = write("systemd", "--overwrite")
    assert f"{clone}/cnnpipe.env: PREFECT_SERVER_API_AUTH_STRING\n" in result.stdout
    assert "secret" not in result.stdout + (clone / "cnnpipe.service").read_text()


def test_folders_that_the_environment_names_become_options(clone: Path) -> None:
    os.environ["CNNPIPE_ARTIFACTS"] = str(clone / "models")
    for kind in ("systemd", "compose"):
        assert write(kind, "digits", "--data", "d", "--timezone", "UTC").exit_code == 0
    options = ["digits", "--data", "d", "--timezone", "UTC", f"--artifacts={clone}/models"]
    assert words_of(unit_of(clone)["ExecStart"])[3:] == options
    assert [word.replace("$$", "$") for word in service_of(clone)["command"]][3:] == options
    mounted = {each["source"].replace("$$", "$"): each.get("read_only", False) for each in service_of(clone)["volumes"]}
    assert mounted == {f"{clone}/d": False, f"{clone}/models": False}


def test_a_folder_that_the_files_cannot_name_is_refused(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clone / "two\nlines"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for kind in ("systemd", "compose"):
        result = write(kind)
        assert result.exit_code == 2
        assert "must be printable text here" in result.stderr
    assert not list(folder.iterdir())
