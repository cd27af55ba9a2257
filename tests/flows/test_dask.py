"""Shards on a Dask cluster: real worker processes, one of them killed, and the bytes of a table made without Dask."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from uuid import UUID

import pytest
from prefect import State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from tiny_models import write_model

from cnnpipe.classify.engine import Shard
from cnnpipe.classify.run import Classification, classify_folder, open_classification
from cnnpipe.errors import ConfigError, PredictionsError, ServerError, UsageError
from cnnpipe.settings import ClassifySettings
from flows import dask
from flows.classify_flow import classify, classify_shard
from flows.dask import check_runner, run_shard

ROOT: Final = Path(__file__).parents[2]
NUM_FILES: Final = 75
SHARD_SIZE: Final = 16


@pytest.fixture(scope="module")
def many_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each file of `images` 160 times."""
    folder = tmp_path_factory.mktemp("many")
    for copy in range(160):
        shutil.copytree(images, folder / f"{copy:03}", copy_function=os.link)
    return folder


def settings_for(images: Path, model: Path, output: Path, **changes: Any) -> ClassifySettings:
    values = {"folder": str(images), "model": str(model), "device": "cpu", "output": str(output)}
    return ClassifySettings.model_validate(values | {"shard_size": SHARD_SIZE} | changes)


@pytest.fixture(scope="module")
def table(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the table of `images` as this process makes it."""
    folder = tmp_path_factory.mktemp("local")
    classify_folder(settings_for(images, model, folder / "t.csv"), folder)
    return (folder / "t.csv").read_bytes()


class Cluster:
    """A Dask scheduler and its workers, each a process of its own and with nobody to start it again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.workers: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        arguments = ("--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))
        self.scheduler = self._start("dask_scheduler", *arguments)
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.address: str = json.loads(file.read_text())["address"]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def with_workers(self, number: int, cwd: Path = ROOT) -> Cluster:
        """Start workers where some are missing."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        arguments = (self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0")
        while len(self.workers) < number:
            local = ("--local-directory", str(self._folder))
            self.workers.append(self._start("dask_worker", *arguments, *local, cwd=cwd))
        return self

    def _start(self, command: str, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        with (self._folder / f"{command}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{command}", "--host", "127.0.0.1", *arguments],
                cwd=cwd,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


@pytest.fixture(scope="module")
def own_cluster(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture
def two_workers(own_cluster: Cluster) -> Cluster:
    return own_cluster.with_workers(2)


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


def run_on_dask(settings: ClassifySettings, artifacts: Path, scheduler: str | None) -> State[Any]:
    state: State[Any] = classify(
        settings, artifacts=str(artifacts), runner="dask", scheduler=scheduler, return_state=True
    )
    return state


def flow_run_id(state: State[Any]) -> UUID:
    identifier = state.state_details.flow_run_id
    assert identifier is not None
    return identifier


def shard_states(client: SyncPrefectClient, state: State[Any]) -> dict[str, list[str]]:
    """Return the names of the final states of each shard's task runs, by the run's name."""
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id(state)]))
    deadline = time.monotonic() + 20
    while True:  # the workers tell the server by events, which take their time
        runs = [run for run in client.read_task_runs(flow_run_filter=wanted) if run.name.startswith("shard-")]
        if all(run.state is not None and run.state.is_final() for run in runs) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run.state_name or "")
    return found


def test_the_table_has_the_bytes_of_one_made_without_dask(
    two_workers: Cluster, client: SyncPrefectClient, images: Path, model: Path, table: bytes, tmp_path: Path
) -> None:
    settings = settings_for(images, model, tmp_path / "t.csv")

    state = run_on_dask(settings, tmp_path, two_workers.address)

    assert state.result()["found"] == NUM_FILES
    assert (tmp_path / "t.csv").read_bytes() == table
    assert shard_states(client, state) == {f"shard-{number}": ["Completed"] for number in range(5)}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["t.csv", "t.csv.summary.json"]


def test_a_worker_killed_in_the_middle_costs_no_row(
    two_workers: Cluster,
    client: SyncPrefectClient,
    many_images: Path,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    classify_folder(settings_for(many_images, model, tmp_path / "local" / "t.csv", shard_size=1500), tmp_path)
    settings = settings_for(many_images, model, tmp_path / "dask" / "t.csv", shard_size=1500)
    job = tmp_path / "dask" / "t.csv.job"
    victim = two_workers.workers[0]

    def kill() -> None:
        while not has_rows(job, 1500):
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    state = run_on_dask(settings, tmp_path, two_workers.address)

    assert state.result()["found"] == 160 * NUM_FILES
    assert victim.wait(timeout=1) == -signal.SIGKILL
    assert "has gone; what it had begun is done again" in caplog.text
    assert (tmp_path / "dask" / "t.csv").read_bytes() == (tmp_path / "local" / "t.csv").read_bytes()
    assert shard_states(client, state) == {f"shard-{number}": ["Completed"] for number in range(8)}


def test_only_the_shard_that_is_missing_is_done(
    two_workers: Cluster, client: SyncPrefectClient, images: Path, model: Path, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(images / "0", tmp_path / "images" / f"{number}")) for number in range(3)]
    settings = settings_for(tmp_path / "images", model, tmp_path / "t.csv", shard_size=len(list(folders[0].iterdir())))
    settings = settings.model_copy(update={"max_failure_rate": 1.0})
    with open_classification(settings, tmp_path) as classification:
        shards = list(classification.plan())
        for shard, digests in shards:
            if shard.number != 1:
                classification.add(shard, *do(classification, shard, digests))
    assert len(shards) == 3

    state = run_on_dask(settings, tmp_path, two_workers.address)

    assert state.result()["resumed"] == 2 * settings.shard_size
    assert shard_states(client, state) == {"shard-1": ["Completed"]}
    classify_folder(
        settings_for(tmp_path / "images", model, tmp_path / "whole.csv", shard_size=settings.shard_size), tmp_path
    )
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_incremental_and_retry_failed_work_as_without_dask(
    two_workers: Cluster, images: Path, model: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(images, tmp_path / "images"))
    settings = settings_for(own, model, tmp_path / "t.csv")
    classify_folder(settings, tmp_path)
    shutil.copy(own / "0" / "0000.png", own / "1" / "0001.png")
    shutil.copy(own / "0" / "0000.png", own / "2" / "notes.txt")

    tried = run_on_dask(settings.model_copy(update={"retry_failed": True}), tmp_path, two_workers.address)
    assert (tried.result()["error"], tried.result()["found"]) == (4, NUM_FILES)

    renewed = run_on_dask(settings.model_copy(update={"incremental": True}), tmp_path, two_workers.address)
    assert (renewed.result()["unchanged"], renewed.result()["error"]) == (NUM_FILES - 5, 4)

    classify_folder(settings_for(own, model, tmp_path / "again.csv"), tmp_path)
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "again.csv").read_bytes()


def test_without_a_scheduler_a_cluster_is_started_on_this_machine_and_ended(
    prefect_server: None, images: Path, model: Path, table: bytes, tmp_path: Path
) -> None:
    before = {*children()}

    state = run_on_dask(settings_for(images, model, tmp_path / "t.csv"), tmp_path, None)

    assert state.result()["found"] == NUM_FILES
    assert (tmp_path / "t.csv").read_bytes() == table
    assert {*children()} <= before


def has_rows(job: Path, number: int) -> bool:
    """Return whether a job file is larger than the names of its files, and some rows, can make it.

    It is locked, so it can only be looked at from outside.
    """
    return job.exists() and job.stat().st_size > 160 * NUM_FILES * 30 + number * 80


def children() -> Iterator[str]:
    """Yield the processes that this one has started and that still run, all the way down, but Python's own helper."""
    parents = [os.getpid()]
    while parents:
        for file in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            for pid in file.read_text().split():
                if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text():
                    parents.append(int(pid))
                    yield pid


def test_a_scheduler_that_is_lost_in_the_middle_ends_the_run_with_one_line(
    prefect_server: None, many_images: Path, model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = settings_for(many_images, model, tmp_path / "t.csv", shard_size=1500)

    with Cluster(tmp_path_factory.mktemp("lost")).with_workers(1) as lost:

        def kill() -> None:
            while not has_rows(tmp_path / "t.csv.job", 1500):
                time.sleep(0.01)
            lost.scheduler.kill()

        threading.Thread(target=kill, daemon=True).start()
        state = run_on_dask(settings, tmp_path, lost.address)

    with pytest.raises(ServerError, match="the connection to the Dask scheduler was lost; finished rows are kept"):
        state.result()
    summary = classify_folder(settings, tmp_path)
    assert summary.resumed >= 1500
    assert summary.found == 160 * NUM_FILES


def test_a_scheduler_that_is_lost_before_a_result_has_come_is_told() -> None:
    from distributed.comm import CommClosedError

    def result() -> None:
        raise CommClosedError("Connection reset by peer")

    with pytest.raises(ServerError, match="the connection to the Dask scheduler was lost"):
        dask._fetch_state(SimpleNamespace(result=result))


def test_an_address_where_no_scheduler_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_SECONDS_TO_CONNECT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"no Dask scheduler answers at {address}"):
            connect(address)
        silent.listen()  # from here on somebody takes the call, and says nothing
        with pytest.raises(ServerError, match="no answer in 0 s"):
            connect(address)


def connect(address: str) -> None:
    with dask.cluster_task_runner(address, classify_shard):
        pytest.fail("nobody was there")


def test_a_worker_that_lacks_the_package_is_told(prefect_server: None, tmp_path: Path) -> None:
    hidden = tmp_path / "flows.py"  # found before the package, in the folder that the worker runs in
    hidden.write_text("")
    told = r"worker at tcp://.* cannot load cnnpipe: No module named 'flows\.classify_flow'.*; install the same cnnpipe"
    with Cluster(tmp_path).with_workers(1, tmp_path) as other, pytest.raises(ServerError, match=told):
        connect(other.address)


def test_a_cluster_that_gets_no_workers_is_told(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dask, "SECONDS_WITHOUT_WORKERS", 0.5)
    with Cluster(tmp_path) as idle, pytest.raises(ServerError, match=f"no workers .* `dask worker {idle.address}`"):
        connect(idle.address)


@pytest.mark.parametrize("scheduler", ["localhost:8786", "http://localhost:4200", "tcp://localhost", "tcp:// a:1"])
def test_an_address_that_can_be_none_is_refused(scheduler: str) -> None:
    with pytest.raises(UsageError, match=r"--scheduler must be the address .* received"):
        check_runner("dask", scheduler)


def test_a_scheduler_without_dask_is_a_usage_error() -> None:
    command = [sys.executable, "-m", "flows.classify", str(ROOT), "--scheduler", "tcp://localhost:8786"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: --scheduler is for --runner dask, received 'tcp://localhost:8786' with --runner local\n"
    )


def test_the_flow_loads_no_dask_until_it_is_asked_for() -> None:
    code = "import flows.classify, sys; print({'dask', 'distributed', 'prefect_dask'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"


def test_dask_that_is_not_installed_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    check_runner("local", None)
    with pytest.raises(ConfigError, match=r"`make setup` brings it, elsewhere: pip install 'cnnpipe\[dask\]'"):
        check_runner("dask", None)


def do(classification: Classification, shard: Shard, digests: list[str]) -> Any:
    """Do a shard as a worker does it."""
    files = b"".join(os.fsencode(path) + b"\0" for path in shard.paths)
    return run_shard(classification.job.to_json(), shard.number, files, digests, 1)


def test_shards_done_by_other_processes_in_any_order_make_the_same_table(
    images: Path, model: Path, table: bytes, tmp_path: Path
) -> None:
    with open_classification(settings_for(images, model, tmp_path / "t.csv"), tmp_path) as classification:
        shards = list(classification.plan())
        for shard, digests in reversed(shards):
            classification.add(shard, *do(classification, shard, digests))
        summary = classification.finish()
    assert [shard.number for shard, _ in shards] == list(range(5))
    assert summary.found == NUM_FILES
    assert (tmp_path / "t.csv").read_bytes() == table


@pytest.mark.parametrize("changed", [False, True])
def test_shards_that_are_left_over_are_done_in_this_process(
    images: Path, model: Path, table: bytes, tmp_path: Path, changed: bool
) -> None:
    own = Path(shutil.copytree(images, tmp_path / "images"))
    settings = settings_for(own, model, tmp_path / "t.csv")
    with open_classification(settings, tmp_path) as classification:
        for shard, digests in classification.plan():
            if shard.number in (1, 3):
                classification.add(shard, *do(classification, shard, digests))
    if changed:  # what comes after the list was made is not in the table
        shutil.copy(own / "0" / "0000.png", own / "0" / "new.png")
    summary = classify_folder(settings, tmp_path)
    assert summary.resumed == 2 * SHARD_SIZE
    assert (tmp_path / "t.csv").read_bytes() == table


def test_a_worker_that_does_not_see_the_model_says_so(images: Path, model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(model, tmp_path / "model.onnx"))
    with open_classification(settings_for(images, own, tmp_path / "t.csv"), tmp_path) as classification:
        shard, digests = next(classification.plan())
        own.unlink()
        with pytest.raises(PredictionsError, match=rf"there is no model {own} on .* all workers must see the images"):
            do(classification, shard, digests)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_worker_that_does_not_see_the_images_says_so(
    mounted: bool, images: Path, model: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(images, tmp_path / "images"))
    with open_classification(settings_for(own, model, tmp_path / "t.csv"), tmp_path) as classification:
        shard, digests = next(classification.plan())
        own.rename(tmp_path / "elsewhere")
        if mounted:
            own.mkdir()
        with pytest.raises(PredictionsError, match=f"images in {own} cannot be found on {socket.gethostname()}"):
            do(classification, shard, digests)


def test_a_worker_with_other_versions_or_another_model_is_refused(images: Path, model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(model, tmp_path / "model.onnx"))
    with open_classification(settings_for(images, own, tmp_path / "t.csv"), tmp_path) as classification:
        shard, digests = next(classification.plan())
        own.write_bytes(write_model(tmp_path / "other.onnx", scale=1 / 128).read_bytes())
        with pytest.raises(PredictionsError, match="is not the model that the classification was begun with"):
            do(classification, shard, digests)
        job = replace(classification.job, versions={**classification.job.versions, "pillow": "1.0"})
        with pytest.raises(PredictionsError, match=r"has pillow .* where the classification was begun with 1\.0"):
            run_shard(job.to_json(), 0, b"a.png\0", [""], 1)
