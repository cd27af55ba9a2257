"""The flows under a real Prefect server: states, caching of finished stages, artifacts, logs, parameters; a flow run
crashes if its process is killed, and goes on if its progress cannot be sent.
"""

from __future__ import annotations

import csv
import inspect
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from unittest import mock
from uuid import UUID, uuid4

import httpx
import numpy as np
import prefect.flow_engine
import pytest
from PIL import Image
from prefect import Flow, State, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import ObjectNotFound, ParameterTypeError, Pause
from prefect.flow_engine import run_flow
from prefect.server.services import pause_expirations
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Completed, Failed, Late, Pending, Running, Scheduled
from tiny_models import write_digits, write_model

import flows.classify_flow
from cnnpipe.classify.run import classify_folder
from cnnpipe.clean import retention
from cnnpipe.doctor import examine
from cnnpipe.errors import DatasetError, FailureBudgetError, StorageError
from cnnpipe.nightly import server_pidfile
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.progress import ProgressCallback
from cnnpipe.registry import champion_run, list_runs, summarize_runs
from cnnpipe.settings import ClassifySettings, PrepareSettings, PromoteSettings, TrainSettings
from flows import flow_runs
from flows.artifacts import _code, _text
from flows.classify_flow import classify
from flows.flow_runs import (
    crash_silent_runs,
    progress_artifact,
    training_slot,
    wait_for_approval,
    wait_for_turn,
)
from flows.retrain_flow import retrain, train_model

pytestmark = pytest.mark.usefixtures("prefect_server")

ENDLESS_RUN: Final = """
import time
from prefect import flow, runtime

@flow(name="retrain")
def retrain():
    print(runtime.flow_run.id, flush=True)
    time.sleep(3600)

retrain()
"""


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


def run_retrain(**parameters: Any) -> State[Any]:
    state: State[Any] = retrain(**parameters, return_state=True)
    return state


def run_classify(settings: ClassifySettings, artifacts: Path) -> State[Any]:
    state: State[Any] = classify(settings, artifacts=str(artifacts), return_state=True)
    return state


def flow_run_id(state: State[Any]) -> UUID:
    identifier = state.state_details.flow_run_id
    assert identifier is not None
    return identifier


def artifacts_of(client: SyncPrefectClient, state: State[Any]) -> dict[str, Any]:
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id(state)]))
    )
    return {artifact.key: artifact.data for artifact in found if artifact.key}


def task_states(client: SyncPrefectClient, state: State[Any]) -> dict[str, list[str]]:
    """Return the names of the states of each task's runs, by the task's name."""
    runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id(state)])))
    states: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda each: each.expected_start_time or each.created):  # type: ignore[arg-type,return-value]
        states.setdefault(run.name.rsplit("-", 1)[0], []).append(run.state_name or "")
    return states


@dataclass(frozen=True)
class Retried:
    """A retraining whose last stage failed, and which was then retried; its run folder, and its files before that."""

    failed: State[Any]
    retried: State[Any]
    artifacts: Path
    before: dict[str, int]
    """Time of modification of each file of the run folder, in nanoseconds."""

    @property
    def run(self) -> Path:
        (run,) = list_runs(self.artifacts, "digits")
        return run

    def files(self) -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in self.run.iterdir()}


def retry(work: Flow[..., Any], failed: State[Any]) -> State[Any]:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id(failed), AwaitingRetry(), force=True)
        state = run_flow(work, flow_run=client.read_flow_run(flow_run_id(failed)), return_type="state")
    assert isinstance(state, State)
    return state


@pytest.fixture(scope="module")
def retrained(prefect_server: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Retried:
    """The one training of these tests."""
    artifacts = tmp_path_factory.mktemp("retrained")
    lock = artifacts / "digits" / ".lock"
    lock.mkdir(parents=True)  # a folder where a file should be: only the last stage meets it
    promote = PromoteSettings(min_accuracy=1.0)
    failed = run_retrain(train=TrainSettings(epochs=1), promote=promote, data=str(data), artifacts=str(artifacts))
    before = Retried(failed, failed, artifacts, {}).files()
    lock.rmdir()
    return Retried(failed, retry(retrain, failed), artifacts, before)


def test_a_failed_run_that_is_retried_repeats_no_finished_stage_and_may_end_unpromoted(retrained: Retried) -> None:
    with pytest.raises(StorageError, match="Is a directory"):
        retrained.failed.result()

    state = retrained.retried
    assert (state.type.value, state.name) == ("COMPLETED", "NotPromoted")
    assert "below the floor of 1.0000" in (state.message or "")
    assert state.result()["run"] == str(retrained.run)
    assert champion_run(retrained.artifacts, "digits") is None
    after = retrained.files()
    assert set(after) - set(retrained.before) == {"promotion.json", "manifest.json"}
    assert after.items() >= retrained.before.items()


def test_retrain_chains_every_stage_and_shows_it_in_the_ui(client: SyncPrefectClient, retrained: Retried) -> None:
    state = retrained.retried
    stages = {"prepare", "compare", "train", "evaluate", "plot", "export", "promote", "clean"}
    assert set(task_states(client, state)) == stages
    flow_run = client.read_flow_run(flow_run_id(state))
    assert flow_run.name == f"digits-{flow_run.expected_start_time:%Y-%m-%d-%H%M}"

    shown = artifacts_of(client, state)
    keys = {"dataset", "metrics", "training-report", "confusion-matrix", "promotion-decision", "training-progress"}
    assert keys <= set(shown)
    assert shown["training-report"].count("](data:image/webp;base64,") == 4
    assert shown["confusion-matrix"].count("](data:image/webp;base64,") == 1
    assert shown["promotion-decision"].startswith("# Not promoted\n\nTest accuracy ")
    assert [cells(line)[0] for line in shown["promotion-decision"].splitlines() if line.startswith("| fp32")] == [
        "fp32"
    ]
    assert shown["training-progress"] == 100.0


def test_a_night_whose_cleaning_fails_is_red_there_and_ends_as_it_was_decided(
    client: SyncPrefectClient, retrained: Retried, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("cannot write /full: No space left on device; free some space")

    monkeypatch.setattr(retention, "clean_up", fail)
    state = retry(retrain, retrained.retried)
    assert state.name == "NotPromoted"
    assert "; the stage clean failed: " in (state.message or "")
    assert "No space left on device" in (state.message or "")
    assert task_states(client, state)["clean"] == ["Failed", "Completed", "Failed"]  # the first met the folder, too


def test_library_logs_are_in_the_runs_log(client: SyncPrefectClient, retrained: Retried) -> None:
    own = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id(retrained.retried)]))
    text, deadline = "", time.monotonic() + 20
    while "not promoted:" not in text and time.monotonic() < deadline:
        time.sleep(0.5)  # logs are sent in batches, every two seconds
        text = "\n".join(log.message for log in client.read_logs(log_filter=own, limit=200))
    assert "319,178" in text
    assert "epoch 1/1" in text
    assert "test: accuracy" in text


def test_a_night_on_which_nothing_changed_is_skipped_without_tensorflow_and_says_which_run_it_would_repeat(
    retrained: Retried, data: Path
) -> None:
    places = ["--data", str(data), "--artifacts", str(retrained.artifacts), "--json"]
    command = ["-m", "flows.retrain", "--epochs", "1", "--min-accuracy", "1", *places]
    result = call(["-X", "importtime", *command])

    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    reason = f"nothing changed since {retrained.run.name}, which was refused: test accuracy 0.* --force trains all"
    assert re.match(reason, values["reason"])
    assert (values["state"], values["run"], values["promoted"]) == ("Unchanged", str(retrained.run), False)
    assert values["accuracy"] == retrained.retried.result()["accuracy"]
    assert not re.search(r"\| +(tensorflow|keras)$", result.stderr, re.MULTILINE)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(values["ui"].rpartition("/")[2]))
        assert (run.state_name, run.state.message if run.state else None) == ("Unchanged", values["reason"])


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the server of these tests."""
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


KILLED_IN_A_STAGE: Final = """
import importlib, json, os, signal, sys
from cnnpipe.settings import RetrainSettings
from flows.retrain_flow import retrain

stage, renames, parameters = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
module, _, function = stage.rpartition(".")
module = importlib.import_module(module)
work, rename = getattr(module, function), os.replace

def die(source, target):
    global renames
    renames -= 1
    if not renames:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

def work_until_killed(*arguments, **keywords):
    os.replace = die
    return work(*arguments, **keywords)

setattr(module, function, work_until_killed)
retrain(**parameters)
"""

MANIFEST_AND_ALIAS: Final = {"manifest.json", "promotion.json", "champion", "promotions.jsonl"}


@pytest.mark.parametrize(
    ("stage", "renames"),
    [
        ("cnnpipe.promote.gate.conclude_run", 3),  # the run is complete, and not yet the champion
        *(
            pytest.param(*stage, marks=pytest.mark.slow)
            for stage in (
                ("cnnpipe.prepare.dataset.prepare_dataset", 1),
                ("cnnpipe.train.stage.train_run", 4),
                ("cnnpipe.evaluate.evaluation.evaluate_run", 2),
                ("cnnpipe.plot.plots.plot_run", 2),
                ("cnnpipe.export.onnx.export_run", 2),
                ("cnnpipe.promote.gate.conclude_run", 1),
                ("cnnpipe.promote.gate.conclude_run", 2),
                ("cnnpipe.promote.gate.conclude_run", 4),
            )
        ),
    ],
)
def test_killed_in_a_stage_it_goes_on_from_the_last_finished_one_when_the_command_is_repeated(
    stage: str, renames: int, artifacts: Path, data: Path, tmp_path: Path
) -> None:
    (run,) = list_runs(artifacts, "digits")
    options = ["--epochs", "3", "--seed", "1", "--artifacts", str(artifacts)]
    parameters: dict[str, Any] = {"train": {"epochs": 3, "seed": 1}, "artifacts": str(artifacts), "data": str(data)}
    if stage.startswith(("cnnpipe.prepare", "cnnpipe.train")):
        parameters |= {"force": True, "data": str(tmp_path / "data")}
        options.append("--force")
    else:  # its training is finished
        for name in MANIFEST_AND_ALIAS:
            next(iter((*run.glob(name), *run.parents[1].glob(name)))).unlink()
    champion = champion_run(artifacts, "digits")
    weights = (run / "model.keras").stat().st_mtime_ns
    options += ["--data", parameters["data"]]

    killed = call(["-c", KILLED_IN_A_STAGE, stage, str(renames), json.dumps(parameters)])
    assert killed.returncode == -9, killed.stderr
    assert champion_run(artifacts, "digits") == champion
    others = [each.state for each in summarize_runs(artifacts, "digits") if each.run_id != run.name]
    assert others in ([], ["incomplete"])

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        # A server takes the slot of a killed training back after two minutes; the harness does not.
        client.delete_global_concurrency_limit_by_name("training")
    repeated = call(["-m", "flows.retrain", *options, "--json"])
    assert repeated.returncode == 0, repeated.stderr
    values = json.loads(repeated.stdout.splitlines()[-1])
    assert values["state"] in ("Promoted", "Unchanged")
    assert Path(values["run"]) == list_runs(artifacts, "digits")[-1]
    assert champion_run(artifacts, "digits") == run  # of two equal models the first one
    assert (run / "model.keras").stat().st_mtime_ns == weights
    assert "resuming" in repeated.stderr or stage.startswith(("cnnpipe.prepare", "cnnpipe.promote"))
    assert not list(run.glob(".*.????????????????.*"))


def write_photos(root: Path, digits: PreparedDataset, names: list[str], per_class: int) -> None:
    """Write test digits as a folder dataset of classes with these names."""
    images, labels = digits.images("test"), digits.labels("test")
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in np.flatnonzero(labels == label)[:per_class]:
            Image.fromarray(images[index]).save(root / name / f"{index:03d}.png")


def cells(line: str) -> list[str]:
    """Return the cells of a line of a markdown table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_dataset_that_a_gate_stops_is_shown_with_its_warnings_as_plain_text(
    client: SyncPrefectClient, digits: PreparedDataset, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    write_photos(root, digits, ["re d\n|x", "<b>"], per_class=15)
    (root / "<b>" / "![](http:x).png").write_bytes(b"spoilt")
    prepare = PrepareSettings(dataset=str(root), max_unreadable_fraction=0.0)

    state = run_retrain(prepare=prepare, data=str(tmp_path / "data"), artifacts=str(tmp_path / "artifacts"))

    with pytest.raises(DatasetError, match="1 of 31 files are unreadable, more than 0 "):
        state.result()
    shown = artifacts_of(client, state)["dataset"]
    table = [cells(line) for line in shown.splitlines() if line.startswith("|")]
    assert table[0] == ["class", "train", "val", "test"]
    assert [row[0] for row in table[2:]] == [r"\<b\>", r"re d \|x", "all"]
    assert {len(row) for row in table} == {4}
    warnings = [line for line in shown.splitlines() if line.startswith("- ")]
    left_out = r"- 1 of 31 files are unreadable and were left out: \<b\>/\!\[\](http:x).png (not_an_image)"
    assert warnings[0] == left_out
    assert "fewer than 50 images" in warnings[1]
    assert "Nothing to warn about" not in shown


def test_code_in_a_report_is_code_whatever_is_in_it() -> None:
    assert [_code(text) for text in ("a b", "a``b", "`a\nb`")] == ["`a b`", "``` a``b ```", "`` `a b` ``"]


def test_text_in_a_report_begins_no_markup() -> None:
    assert _text(r"a*b `c` __init__ not_an_image \d &lt; [x](y)") == (
        r"a\*b \`c\` \_\_init\_\_ not_an_image \\d \&lt; \[x\](y)"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", {"epochs": 0}),
        ("train", {"epoch": 3}),
        ("prepare", {"val_fraction": 2}),
        ("promote", {"min_accuracy": 50}),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(name: str, value: dict[str, Any], tmp_path: Path) -> None:
    state = run_retrain(**{name: value}, artifacts=str(tmp_path))

    with pytest.raises(ParameterTypeError, match=next(iter(value))):
        state.result()
    assert not list(tmp_path.iterdir())


def test_the_form_offers_every_setting_with_its_description() -> None:
    schema = retrain.parameters
    names = ["prepare", "train", "evaluate", "export", "promote", "clean", "force", "data", "artifacts"]
    assert list(schema.properties) == names
    assert not schema.required
    fields = schema.definitions["TrainSettings"]["properties"]
    assert set(fields) == set(TrainSettings.model_fields)
    assert all(field.get("description") for field in fields.values())
    assert set(classify.parameters.definitions["ClassifySettings"]["properties"]) == set(ClassifySettings.model_fields)
    assert classify.parameters.properties["runner"]["enum"] == ["local", "dask"]
    assert all(field.get("description") for field in classify.parameters.properties.values())


def test_classify_shows_its_summary(
    client: SyncPrefectClient, retrained: Retried, photos: Path, tmp_path: Path
) -> None:
    report = tmp_path / "sheet.html"
    settings = ClassifySettings(
        folder=str(photos),
        model=str(retrained.run),
        output=str(tmp_path / "table.csv"),
        min_probability=1.0,
        report=str(report),
    )

    state = run_classify(settings, tmp_path)

    summary = state.result()
    assert summary["found"] == 13
    with (tmp_path / "table.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 13
    shown = artifacts_of(client, state)
    assert shown["classification-progress"] == 100.0
    text = shown["classification-summary"]
    assert text.startswith("# 13 files of")
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert rows[2:5] == [["classified", "12"], ["failed", "1"], ["found", "13"]]
    assert [f"uncertain: a probability below {1:g}", str(summary["uncertain"])] in rows
    assert all([name, str(count)] in rows for name, count in summary["classes"].items())
    assert ["not_an_image", "1"] in rows
    assert rows[-1] == ["in all (stages overlap)", f"{summary['seconds']['total']:,.2f}"]
    assert f"in {summary['precision']}; slowest stage: {summary['slowest_stage']}." in text
    assert f"Contact sheet, with thumbnails of each class and of the errors: `{report}`." in text


def test_a_failed_classification_that_is_retried_goes_on_from_its_shards(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path / "model.onnx")
    write_digits(tmp_path / "images", range(75))
    settings = ClassifySettings(folder=str(tmp_path / "images"), model=str(model), shard_size=16, workers=1)
    unbroken = settings.model_copy(update={"output": str(tmp_path / "unbroken.csv")})
    classify_folder(unbroken, tmp_path)
    monkeypatch.setattr(flow_runs, "_SECONDS_BETWEEN_UPDATES", 0.05)
    monkeypatch.setattr(flow_runs, "_SECONDS_BETWEEN_LINES", 0.0)

    with monkeypatch.context() as context:
        context.setattr(flows.classify_flow, "progress_artifact", progress_until_the_disk_is_full)
        failed = run_classify(settings, tmp_path / "artifacts")
    with pytest.raises(StorageError, match="the disk is full"):
        failed.result()
    assert 0 < artifacts_of(client, failed)["classification-progress"] < 100
    assert re.search(r"classify: 0 failed: \d+/75 images, \d+ %, [\d,]+ images/s, [\d:]+ left", caplog.text)

    retried = retry(classify, failed)

    summary = retried.result()
    assert (summary["found"], summary["resumed"] % 16, summary["resumed"] >= 16) == (75, 0, True)
    assert Path(summary["table"]).read_bytes() == (tmp_path / "unbroken.csv").read_bytes()
    shown = artifacts_of(client, retried)["classification-summary"]
    assert ["resumed: made by an attempt that was interrupted", str(summary["resumed"])] in map(
        cells, shown.splitlines()
    )


@contextmanager
def progress_until_the_disk_is_full(key: str) -> Iterator[ProgressCallback]:
    with flow_runs.progress_artifact(key) as update:

        def fail(what: str, done: int, total: int) -> None:
            time.sleep(0.1)  # the files are counted meanwhile
            update(what, done, total)
            if done >= 40:
                raise StorageError("the disk is full")

        yield fail


def test_too_many_failures_fail_the_run_but_leave_table_and_summary(
    client: SyncPrefectClient, retrained: Retried, photos: Path, tmp_path: Path
) -> None:
    settings = ClassifySettings(
        folder=str(photos), model=str(retrained.run), output=str(tmp_path / "table.csv"), max_failure_rate=0.0
    )

    state = run_classify(settings, tmp_path)

    assert state.type.value == "FAILED"
    with pytest.raises(FailureBudgetError, match="1 of 13 files failed") as caught:
        state.result()
    summary = pickle.loads(pickle.dumps(caught.value)).summary
    assert json.loads(json.dumps(summary)) == json.loads((tmp_path / "table.csv.summary.json").read_bytes())
    assert (tmp_path / "table.csv").exists()
    assert "classification-summary" in artifacts_of(client, state)


@flow(name="somebody else's")
def foreign() -> None:
    pass


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def test_a_run_whose_process_is_killed_crashes_and_no_other_one_does() -> None:
    crash_silent_runs(timedelta(seconds=10))  # Prefect takes no less
    with get_client(sync_client=True) as client:
        settings = {"settings": {"folder": "photos"}}
        pending = client.create_flow_run(classify, parameters=settings, state=Pending()).id
        other = client.create_flow_run(foreign, state=Pending()).id
        finished = client.create_flow_run(retrain, state=Pending()).id
        client.set_flow_run_state(finished, Running())
        client.set_flow_run_state(finished, Completed(name="Promoted"))

        def has_heartbeat(run: UUID) -> bool:
            wanted = {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "any_resource": {"id": [f"prefect.flow-run.{run}"]},
            }
            return bool(client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"])

        environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""}
        command = [sys.executable, "-c", ENDLESS_RUN]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            killed = UUID(process.stdout.readline().strip())
            _wait_for(lambda: has_heartbeat(killed))
            assert client.read_flow_run(killed).state_name == "Running"
            process.kill()

        _wait_for(lambda: all(client.read_flow_run(each).state_name == "Crashed" for each in (killed, pending)))
        states = [client.read_flow_run(each).state_name for each in (other, finished)]
        # One that goes on, because it was the server that was away, still ends in its own state.
        client.set_flow_run_state(pending, Completed(name="Promoted"))
        assert client.read_flow_run(pending).state_name == "Promoted"
    assert states == ["Pending", "Promoted"]


def test_trainings_of_several_names_take_turns_and_retrainings_of_one_name_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cnnpipe")
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "other trainings have the machine; waiting for a slot of the limit training": lambda: training_slot("cpu"),
        "another retraining of digits is under way; waiting until it ends": lambda: wait_for_turn(tmp_path, "digits"),
    }
    for message, slot in ways.items():
        entered = threading.Event()

        def enter(slot: Callable[[], AbstractContextManager[None]] = slot, entered: threading.Event = entered) -> None:
            with slot():
                entered.set()

        second = threading.Thread(target=enter)
        with slot():
            second.start()
            _wait_for(lambda message=message: message in caplog.text)  # type: ignore[misc]
            assert not entered.is_set()
        second.join(timeout=60)
        assert entered.is_set()
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name("training")
        assert (limit.limit, limit.active_slots) == (1, 0)
        client.upsert_global_concurrency_limit_by_name("training", 2)  # a person's choice
        with training_slot("cpu"):
            pass
        assert client.read_global_concurrency_limit_by_name("training").limit == 2


def test_a_run_of_a_deployment_goes_on_when_the_server_has_given_its_slot_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keep = vars(prefect.flow_engine)["maintain_concurrency_lease"]  # as the engine calls it; it would raise otherwise
    with keep(uuid4(), 300, raise_on_lease_renewal_failure=True):
        _wait_for(lambda: "Execution will continue" in caplog.text)
        time.sleep(0.1)


def test_a_slot_that_cannot_be_given_back_ends_no_work_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    @flow
    def work() -> str:
        slot = ExitStack()
        slot.enter_context(training_slot("cpu"))
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
            slot.close()
        return "done"

    assert work() == "done"
    assert "the slot of the limit training was not given back: " in caplog.text


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_a_run_of_a_deployment_waits_for_a_persons_answer(client: SyncPrefectClient, answer: str) -> None:
    @flow(persist_result=True)
    def ask() -> State[str]:
        given = wait_for_approval("artifacts/digits/runs/1", "better", hours=1.0)
        return Completed(name="Promoted" if given.approve == "yes" else "NotPromoted", message=given.reason)

    deployment = client.create_deployment(client.create_flow(ask), "nightly")
    run = client.create_flow_run_from_deployment(deployment, state=Pending())
    with pytest.raises(Pause):
        run_flow(ask, flow_run=run)
    waiting = client.read_flow_run(run.id).state
    assert waiting is not None
    assert (waiting.type.value, waiting.name) == ("PAUSED", "AwaitingApproval")
    assert waiting.message == "better; resume this run within 1 hours to approve or refuse it"
    assert client.resume_flow_run(run.id, {"approve": "maybe"}).status.value == "REJECT"

    client.resume_flow_run(run.id, {"approve": answer, "reason": "seen"})
    client.set_flow_run_state(run.id, Pending())
    run_flow(ask, flow_run=client.read_flow_run(run.id))
    ended = client.read_flow_run(run.id).state
    assert ended is not None
    assert (ended.name, ended.message) == ("Promoted" if answer == "yes" else "NotPromoted", "seen")


def test_a_run_that_nobody_approves_in_time_ends_as_not_promoted(client: SyncPrefectClient) -> None:
    @flow(name="retrain")
    def ask() -> None:
        wait_for_approval("artifacts/digits/runs/1", "better", hours=1.0)

    deployment = client.create_deployment(client.create_flow(ask), "nightly")
    run = client.create_flow_run_from_deployment(deployment, state=Pending())
    with pytest.raises(Pause):
        run_flow(ask, flow_run=run)

    # As the server's service does, which the harness does not start.
    message = "The flow was paused and never resumed."
    assert f'states.Failed(message="{message}")' in inspect.getsource(pause_expirations)
    client.set_flow_run_state(run.id, Failed(message=message), force=True)
    _wait_for(lambda: client.read_flow_run(run.id).state_name == "NotPromoted")
    ended = client.read_flow_run(run.id).state
    assert ended is not None
    assert ended.message == "nobody approved the model in time"


def test_only_an_error_that_may_pass_is_retried() -> None:
    def is_retried(error: Exception) -> bool:
        condition = train_model.retry_condition_fn
        assert condition is not None
        run = TaskRun(task_key="train", dynamic_key="0")
        return bool(condition(train_model, run, Failed(data=error, message=str(error))))

    assert all(map(is_retried, (httpx.ConnectError("lost"), MemoryError(), OSError("stale file handle"))))
    assert not any(map(is_retried, (DatasetError("too few"), StorageError("full"), ValueError("shape"))))


def test_progress_that_cannot_be_sent_ends_no_work_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flow_runs, "_SECONDS_BETWEEN_UPDATES", 0.05)
    attempts = threading.Semaphore(0)

    def lose(*_: object) -> None:
        attempts.release()
        raise OSError("no route to the server")

    monkeypatch.setattr(flow_runs, "update_progress_artifact", lose)

    @flow
    def work() -> str:
        with progress_artifact("work-progress") as update:
            for done in range(3):
                update("train", done, 10)
                assert attempts.acquire(timeout=30)
        return "done"

    assert work() == "done"
    assert caplog.text.count("the server does not take the progress of this run: no route to the server") == 1


def test_doctor_tells_a_night_that_failed_and_one_that_nobody_will_run(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    flow_id = client.create_flow_from_name("retrain")
    deployment, unnamed = (client.create_deployment(flow_id, name) for name in ("digits-nightly", "nightly"))
    failed = client.create_flow_run_from_deployment(deployment, state=Failed(message="no space"))
    soon: State[Any] = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=1))
    for each in (deployment, unnamed):
        client.create_flow_run_from_deployment(each, state=soon)
    late = client.create_flow_run_from_deployment(unnamed, state=Late(scheduled_time=datetime.now(UTC)))
    home = tmp_path / ".prefect"
    server = server_pidfile(home)
    assert server.acquire()  # from here on this process counts as the server
    try:
        server.write(os.getpid(), PREFECT_API_URL.value() or "")
        with mock.patch.dict(os.environ, {"PREFECT_HOME": str(home)}):
            problems = {check.name: check.text for check in examine(tmp_path)[2] if not check.ok}
    finally:
        client.delete_flow_run(failed.id)
        for each in (deployment, unnamed):
            client.delete_deployment(each)
    assert sorted(problems) == ["last nights", "schedule"]
    told, links = problems["last nights"].split("; look at ")
    assert set(told.split(", ")) == {f"{failed.name} Failed", f"{late.name} Late"}
    assert {link.rpartition("/")[2] for link in links.split(", ")} == {str(failed.id), str(late.id)}
    assert re.match(r"scheduler not running, next run .*; start what is missing", problems["schedule"])
