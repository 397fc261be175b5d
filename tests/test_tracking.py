"""The log of a run: the files, delivery to MLflow, kills, outages, and reading runs back."""

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from src import tracking
from src.config import Tracking
from src.errors import UsageError
from src.tracking import Record, Tracker

ROOT = Path(__file__).parent.parent
JSONL = Tracking("jsonl", "exp", 10)
MLFLOW = Tracking("mlflow", "exp", 10)


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory):
    """A store as `prepare_store` creates it. The migrations take seconds: tests copy the result."""
    pytest.importorskip("mlflow")
    directory = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.prepare_store()
    return directory / "mlflow.db"


@pytest.fixture
def client(fresh_store, tmp_path, monkeypatch):
    """The current folder is an empty one with a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    return tracking.prepare_store()


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / tracking.METRICS).read_text().splitlines()]


def history(client, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every point that the store has, repeats included."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def warnings(caplog) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.name == "src.tracking"]
    assert not any("\n" in message for message in messages)
    return messages


def break_store(client, monkeypatch, *methods: str) -> None:
    def fail(*args, **kwargs):
        raise ConnectionError("the store is down\nand this is its traceback")

    for method in methods:
        monkeypatch.setattr(type(client), method, fail)


@pytest.mark.parametrize("name", ["mlflow", "jsonl"])
def test_the_config_files_fit_the_schema(name):
    loaded = OmegaConf.merge(OmegaConf.structured(Tracking), OmegaConf.load(ROOT / f"conf/tracking/{name}.yaml"))
    assert OmegaConf.to_object(loaded) == Tracking(name, "support-sets", 10)


# --- the files


def test_rows_and_record(tmp_path):
    before = time.time_ns() // 1_000_000
    tracker = Tracker(tmp_path, JSONL, "kmclr-50", {"k": 50, "method.projector.hidden": [64, 64]}, {"device": "cpu"})
    tracker.log({"train/loss": 2.0}, 0)
    tracker.log({"train/loss": 1.5, "train/lr": 0.1}, 10)
    assert [(row["step"], row["metrics"]) for row in rows(tmp_path)] == [
        (0, {"train/loss": 2.0}),
        (10, {"train/loss": 1.5, "train/lr": 0.1}),
    ], "a row is in the file before it is flushed: a kill loses none"
    tracker.close("FINISHED")
    after = time.time_ns() // 1_000_000

    record = json.loads((tmp_path / "run.json").read_text())
    assert record["run_id"] == tracker.run_id
    assert (record["name"], record["experiment"], record["status"]) == ("kmclr-50", "exp", "FINISHED")
    assert record["params"] == {"k": "50", "method.projector.hidden": "[64, 64]"}
    assert record["tags"] == {"device": "cpu", "output_dir": str(tmp_path.resolve())}
    assert record["metrics"] == {"train/loss": 1.5, "train/lr": 0.1}
    assert before <= record["start_time"] <= rows(tmp_path)[0]["time"] <= record["end_time"] <= after


@given(value=st.floats())
def test_every_number_comes_back(tmp_path_factory, value):
    directory = tmp_path_factory.mktemp("floats")
    tracker = Tracker(directory, JSONL, "run", {}, {})
    tracker.log({"x": value}, 0)
    tracker.close("FAILED")
    strict = json.loads((directory / tracking.METRICS).read_text(), parse_constant=pytest.fail)
    (run,) = tracking.read_runs("exp", "jsonl", directory)
    for read in (float(strict["metrics"]["x"]), run.metrics["x"]):
        assert read == value or (math.isnan(read) and math.isnan(value))


def train(tracker: Tracker, steps: range) -> None:
    """A deterministic run: every 3rd step, and one metric less often than the other."""
    for step in steps:
        if step % 3 == 0:
            tracker.log({"train/loss": 1 / (1 + step)} | ({"val/knn": step / 100} if step % 6 == 0 else {}), step)


@given(data=st.data())
def test_killed_anywhere_and_resumed_from_any_checkpoint_the_rows_are_those_of_one_run(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("kill")
    tracker = Tracker(directory, JSONL, "run", {}, {})
    train(tracker, range(40))
    tracker.flush()  # and no close: it is killed
    whole = [(row["step"], row["metrics"]) for row in rows(directory)]

    path = directory / tracking.METRICS
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size), label="bytes written before the kill"))
    logged = path.read_bytes().count(b"\n")
    checkpoint = data.draw(st.integers(0, 3 * logged), label="the step to go on from")
    resumed = Tracker(directory, JSONL, "another name", {}, {})
    train(resumed, range(checkpoint, 40))
    resumed.close("FINISHED")

    assert [(row["step"], row["metrics"]) for row in rows(directory)] == whole
    assert resumed.run_id == tracker.run_id
    assert resumed.record.name == "run"


def test_a_finished_run_may_be_evaluated_again(tmp_path):
    for value in (0.5, 0.6):
        tracker = Tracker(tmp_path, JSONL, "run", {}, {})
        tracker.log({"test/linear_top1": value}, 100)
        tracker.close("FINISHED")
    assert [row["metrics"]["test/linear_top1"] for row in rows(tmp_path)] == [0.5, 0.6]
    assert tracking.read_runs("exp", "jsonl", tmp_path)[0].metrics == {"test/linear_top1": 0.6}


def test_params_stay_and_tags_are_replaced_on_resume(tmp_path):
    Tracker(tmp_path, JSONL, "run", {"k": 50}, {"git_commit": "a", "device": "cpu"}).close("KILLED")
    Tracker(tmp_path, JSONL, "run", {"k": 51, "seed": 0}, {"git_commit": "b"}).close("FINISHED")
    (run,) = tracking.read_runs("exp", "jsonl", tmp_path)
    assert run.params == {"k": "50", "seed": "0"}
    assert run.tags == {"git_commit": "b", "device": "cpu", "output_dir": str(tmp_path.resolve())}


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"uuid": 1, "colour": "red"}'])
def test_a_foreign_record_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json is not the record of a run") as error:
        Tracker(tmp_path, JSONL, "run", {}, {})
    assert "\n" not in str(error.value)


def test_a_row_damaged_in_the_middle_is_named(tmp_path):
    (tmp_path / tracking.METRICS).write_text('{"step": 0, "time": 0, "met\n{"step": 1, "time": 0, "metrics": {}}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl holds a damaged row"):
        Tracker(tmp_path, JSONL, "run", {}, {})


def test_without_mlflow_jsonl_works_and_mlflow_is_one_line(tmp_path):
    code = """
import sys
from pathlib import Path
sys.modules["mlflow"] = None  # what an import finds when there is no such package
from src.config import Tracking
from src.errors import UsageError
from src.tracking import Tracker, find_run_directory, read_runs
tracker = Tracker(Path("multirun/a"), Tracking("jsonl", "exp", 10), "run", {}, {})
tracker.log({"x": 1.0}, 0)
tracker.close("FINISHED")
assert read_runs("exp", "jsonl")[0].metrics == {"x": 1.0}
assert find_run_directory(tracker.run_id) == Path("multirun/a")
try:
    Tracker(Path("b"), Tracking("mlflow", "exp", 10), "run", {}, {})
except UsageError as error:
    print(error)
assert not Path("b").exists()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, **TEXT
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "tracking=jsonl" in line
    assert "make setup" in line


TEXT = {"capture_output": True, "text": True}


# --- delivery to MLflow


def test_the_store_drops_exact_repeats(client):
    """What makes delivery idempotent is a property of MLflow's SQL store. A new version of it must keep this."""
    from mlflow.entities import Metric

    run_id = client.create_run("0").info.run_id
    metrics = [Metric("x", value, 1000 + step, step) for step, value in enumerate([1.0, math.nan, math.inf, -0.0])]
    for batch in (metrics[:2], metrics, [*metrics[1:], Metric("x", 5.0, 2000, 4)], metrics):
        client.log_batch(run_id, batch)
    assert sorted(metric.step for metric in client.get_metric_history(run_id, "x")) == [0, 1, 2, 3, 4]
    assert client.get_run(run_id).data.metrics["x"] == 5.0, "the last value is that of the highest step"


def test_a_run_is_delivered(client, tmp_path):
    directory = tmp_path / "run"
    params = {f"group.key{i}": i for i in range(250)} | {"k": 50, "long": "x" * 7000}
    tracker = Tracker(directory, MLFLOW, "kmclr-50", params, {"device": "cpu"})
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    for step in range(700):
        tracker.log({"train/loss": step / 7, "val/knn_top1": -step}, step)  # more than one request takes
    (directory / "encoder.txt").write_text("weights")
    tracker.artifact(directory / "encoder.txt")
    tracker.log({"support/perplexity": math.nan}, 700)
    tracker.close("FINISHED")

    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("kmclr-50", "FINISHED")
    assert run.info.start_time == tracker.record.start_time
    assert run.info.end_time == tracker.record.end_time
    assert run.data.params.keys() == params.keys()
    assert run.data.params["k"] == "50"
    assert run.data.tags["device"] == "cpu"
    assert run.data.tags["output_dir"] == str(directory.resolve())
    assert history(client, tracker.run_id, "train/loss") == [(step, step / 7) for step in range(700)]
    assert math.isnan(run.data.metrics["support/perplexity"])
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["encoder.txt"]
    assert {row.timestamp for row in client.get_metric_history(tracker.run_id, "train/loss")} <= {
        row["time"] for row in rows(directory)
    }


def test_a_killed_run_is_continued_in_mlflow_without_gaps_or_repeats(client, tmp_path):
    directory = tmp_path / "run"
    tracker = Tracker(directory, MLFLOW, "run", {"k": 50, "long": "x" * 7000}, {})
    train(tracker, range(20))
    tracker.flush()
    train(tracker, range(20, 31))  # in the file only
    with (directory / tracking.METRICS).open("a") as file:
        file.write('{"step": 33, "ti')  # and killed

    resumed = Tracker(directory, MLFLOW, "run", {"k": 50, "long": "x" * 7000}, {})
    assert client.get_run(resumed.run_id).info.status == "RUNNING"
    train(resumed, range(10, 60))
    resumed.close("FINISHED")

    assert resumed.run_id == tracker.run_id
    assert history(client, resumed.run_id, "train/loss") == [(step, 1 / (1 + step)) for step in range(0, 60, 3)]
    assert history(client, resumed.run_id, "val/knn") == [(step, step / 100) for step in range(0, 60, 6)]
    assert client.get_run(resumed.run_id).info.status == "FINISHED"


def test_a_failed_run_that_is_continued_runs_again(client, tmp_path):
    tracker = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    tracker.close("FAILED")
    assert client.get_run(tracker.run_id).info.status == "FAILED"
    resumed = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    resumed.close("KILLED")
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_run_whose_creator_was_killed_before_it_knew_the_id_is_found(client, tmp_path):
    tracker = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    tracker.record.run_id = tracker.record.uuid  # what the file said at that moment
    tracker.record.save(tmp_path / "run")
    again = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [again.run_id]


def test_a_run_that_the_store_lost_is_delivered_whole_again(client, tmp_path):
    directory = tmp_path / "run"
    tracker = Tracker(directory, MLFLOW, "run", {"k": 50}, {})
    (directory / "a.txt").write_text("a")
    tracker.artifact(directory / "a.txt")
    train(tracker, range(20))
    tracker.close("KILLED")
    client.delete_run(tracker.run_id)

    resumed = Tracker(directory, MLFLOW, "run", {"k": 50}, {})
    train(resumed, range(20, 40))
    resumed.close("FINISHED")
    assert resumed.run_id != tracker.run_id
    assert [step for step, _ in history(client, resumed.run_id, "train/loss")] == list(range(0, 40, 3))
    assert [file.path for file in client.list_artifacts(resumed.run_id)] == ["a.txt"]


def test_an_outage_does_not_stop_training_and_nothing_is_lost(client, tmp_path, monkeypatch, caplog):
    tracker = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    train(tracker, range(10))
    with monkeypatch.context() as patch:
        break_store(client, patch, "log_batch")
        for step in range(10, 40):
            train(tracker, range(step, step + 1))
            tracker.flush()
        (tmp_path / "run/a.txt").write_text("a")
        tracker.artifact(tmp_path / "run/a.txt")
        assert history(client, tracker.run_id, "train/loss") == []
    (warning,) = warnings(caplog)
    assert "the store is down" in warning
    assert "metrics.jsonl" in warning

    tracker.close("FINISHED")
    assert [step for step, _ in history(client, tracker.run_id, "train/loss")] == list(range(0, 40, 3))
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["a.txt"]
    assert len(warnings(caplog)) == 1


def test_a_slow_failing_store_is_left_alone_for_ten_times_what_it_cost(client, tmp_path, monkeypatch):
    clock = [0.0]
    calls = []

    def hang(*args, **kwargs):
        calls.append(clock[0])
        clock[0] += 20.0
        raise TimeoutError

    tracker = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(type(client), "log_batch", hang)
    for _ in range(500):
        tracker.flush()
        clock[0] += 1.0
    assert calls == [0.0, 220.0, 440.0]


def test_a_store_that_is_down_from_start_to_end_gets_the_run_later(client, tmp_path, monkeypatch, caplog):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_store(client, patch, "search_runs", "create_run", "log_batch", "update_run", "set_terminated")
        tracker = Tracker(directory, MLFLOW, "run", {"k": 50}, {"device": "cpu"})
        train(tracker, range(40))
        tracker.close("FINISHED")
    assert f"python -m src.tracking {directory}" in warnings(caplog)[-1]
    assert tracking.read_runs("exp", "jsonl", tmp_path)[0].status == "FINISHED"

    run_ids = {tracking.deliver(directory) for _ in range(2)}
    (run,) = tracking.read_runs("exp", "mlflow")
    assert run_ids == {run.run_id}
    assert (run.status, run.params) == ("FINISHED", {"k": "50"})
    assert [step for step, _ in history(client, run.run_id, "train/loss")] == list(range(0, 40, 3))
    assert client.get_run(run.run_id).info.end_time == tracker.record.end_time


def test_runs_of_jsonl_are_delivered_by_command(client, tmp_path, capsys):
    for name in ("a", "b"):
        tracker = Tracker(tmp_path / name, JSONL, name, {}, {})
        tracker.log({"x": 1.0}, 0)
        tracker.close("KILLED")
    tracking.main([str(tmp_path / "a"), str(tmp_path / "b")])
    runs = {run.name: run for run in tracking.read_runs("exp", "mlflow")}
    assert runs["a"].metrics == runs["b"].metrics == {"x": 1.0}
    assert runs["a"].status == "KILLED"
    assert runs["b"].run_id in capsys.readouterr().out.splitlines()[1]
    with pytest.raises(UsageError, match="not the record of a run"):
        tracking.main([str(tmp_path)])


@pytest.mark.slow
def test_a_locked_database_is_waited_for_or_passed_over(client, tmp_path, caplog):
    tracker = Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    tracker.log({"x": 1.0}, 0)
    tracker.flush()
    assert "database is locked" in warnings(caplog)[0]
    other.rollback()
    tracker.close("FINISHED")
    assert history(client, tracker.run_id, "x") == [(0, 1.0)]


# --- the store


def test_a_store_is_created_once_where_mlflow_ui_looks(fresh_store):
    assert {path.name for path in fresh_store.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_file_that_is_no_store_is_one_line_and_nothing_is_written(fresh_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/notes.db")
    (tmp_path / "notes.db").write_text("not a database, " * 100)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    with pytest.raises(UsageError, match=r"notes\.db does not open") as error:
        Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_uri_of_no_known_kind_is_one_line(fresh_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://example.org")
    with pytest.raises(UsageError, match="gopher") as error:
        Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    assert "\n" not in str(error.value)


def test_a_deleted_experiment_is_one_line(client, tmp_path):
    client.delete_experiment(client.create_experiment("exp"))
    with pytest.raises(UsageError, match="mlflow experiments restore"):
        Tracker(tmp_path / "run", MLFLOW, "run", {}, {})
    assert not (tmp_path / "run").exists()


def start(code: str, directory: Path, **environment: str) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=directory, env=env, **pipes)


RUN = """
import os
from pathlib import Path
from src.config import Tracking
from src.tracking import Tracker
name = os.environ["NAME"]
tracker = Tracker(Path(name), Tracking("mlflow", "exp", 10), name, {"k": 50}, {})
for step in range(50):
    tracker.log({"train/loss": 1 / (1 + step), "val/knn": step}, step)
    tracker.flush()
tracker.close("FINISHED")
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_eight_processes_may_start_together_in_an_empty_folder(tmp_path, monkeypatch, attempt):
    pytest.importorskip("mlflow")
    processes = [start(RUN, tmp_path, NAME=f"run{i}") for i in range(8)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "", ""), "and none of MLflow's chatter"

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = tracking.prepare_store()
    runs = tracking.read_runs("exp", "mlflow")
    assert sorted(run.name for run in runs) == [f"run{i}" for i in range(8)]
    for run in runs:
        assert run.status == "FINISHED"
        assert [step for step, _ in history(client, run.run_id, "train/loss")] == list(range(50))


@pytest.mark.slow
def test_a_kill_while_the_store_is_created_leaves_none_or_a_whole_one(tmp_path):
    pytest.importorskip("mlflow")
    aside = tmp_path / "mlflow.db.new"
    for tenths in (12, 8, 4, 1):
        aside.unlink(missing_ok=True)
        process = start("from src.tracking import prepare_store; prepare_store()", tmp_path)
        while not aside.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(tenths / 10)
        process.kill()
        process.communicate()
        if (tmp_path / "mlflow.db").exists():  # it was faster than the kill
            (tmp_path / "mlflow.db").unlink()
    assert aside.exists(), "the last kill left a torn one"
    process = start(RUN, tmp_path, NAME="run")
    assert process.communicate() == ("", "")
    assert process.returncode == 0


SERVER = """
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(client, tmp_path, monkeypatch):
    """MLflow's tracking server on the store of `client`, by itself."""
    from mlflow.server import constants

    store = {constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{tmp_path}/mlflow.db"}
    store |= {constants.ARTIFACT_ROOT_ENV_VAR: str(tmp_path / "mlruns")}
    process = start(SERVER, tmp_path, **store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{int(process.stdout.readline())}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield process
    process.kill()
    process.communicate()


def test_delivery_to_a_server_is_idempotent_too(client, server, tmp_path):
    assert tracking.prepare_store().tracking_uri.startswith("http://")
    directory = tmp_path / "remote"
    train(Tracker(directory, MLFLOW, "remote", {"k": 50}, {}), range(10))  # and killed
    remote = Tracker(directory, MLFLOW, "remote", {"k": 50}, {})
    train(remote, range(20))
    remote.log({"support/perplexity": math.nan}, 20)
    (directory / "a.txt").write_text("a")
    remote.artifact(directory / "a.txt")
    remote.close("FINISHED")
    for _ in range(2):
        assert tracking.deliver(directory) == remote.run_id
    assert history(client, remote.run_id, "train/loss") == [(step, 1 / (1 + step)) for step in range(0, 20, 3)]
    assert len(client.get_metric_history(remote.run_id, "support/perplexity")) == 1
    assert client.get_run(remote.run_id).info.status == "FINISHED"
    assert [run.run_id for run in tracking.read_runs("exp", "mlflow")] == [remote.run_id]


def test_a_server_that_is_not_there_does_not_stop_training(fresh_store, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port, where nothing listens
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker(tmp_path, MLFLOW, "run", {}, {})
    train(tracker, range(10))
    tracker.close("FINISHED")
    assert "python -m src.tracking" in warnings(caplog)[-1]
    assert len(rows(tmp_path)) == 4
    with pytest.raises(UsageError, match="does not answer"):
        tracking.read_runs("exp", "mlflow")


@pytest.mark.slow
def test_mlflow_ui_without_options_shows_the_runs(client, tmp_path, monkeypatch):
    if not socket.socket().connect_ex(("127.0.0.1", 5000)):
        pytest.skip("something else uses the port of `mlflow ui`")
    train(local := Tracker(tmp_path / "local", MLFLOW, "local", {}, {}), range(10))
    local.close("FINISHED")

    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTEST_"))}
    ui = subprocess.Popen([sys.executable, "-m", "mlflow", "ui"], env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", 5000)):
            assert ui.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert [run.run_id for run in tracking.read_runs("exp", "mlflow")] == [local.run_id]
    finally:
        if ui.poll() is None:
            os.killpg(ui.pid, signal.SIGTERM)  # it has workers
        ui.wait()


# --- reading back


def test_both_back_ends_list_the_same_runs(client, tmp_path, monkeypatch):
    for i, status in enumerate(["FINISHED", "FAILED", "KILLED"]):
        tracker = Tracker(tmp_path / "multirun" / str(i), MLFLOW, f"run{i}", {"k": i}, {"device": "cpu"})
        tracker.log({"val/knn_top1": 0.1 * i}, 7)
        tracker.close(status)
        time.sleep(0.002)  # they are listed by their start, in milliseconds
    Tracker(tmp_path / "multirun/other", Tracking("mlflow", "other", 10), "other", {}, {}).close("FINISHED")
    search = type(client).search_runs
    monkeypatch.setattr(type(client), "search_runs", lambda *args, **kw: search(*args, **({"max_results": 2} | kw)))

    stored, local = tracking.read_runs("exp", "mlflow"), tracking.read_runs("exp", "jsonl")
    assert [run.name for run in stored] == ["run0", "run1", "run2"]
    for a, b in zip(stored, local, strict=True):
        for name in ("run_id", "name", "status", "params", "metrics", "directory", "start_time"):
            assert getattr(a, name) == getattr(b, name)
        assert b.tags.items() <= a.tags.items()

    for backend in ("mlflow", "jsonl"):
        with pytest.raises(UsageError, match=r"experiment=expp .*choose from .*exp, other"):
            tracking.read_runs("expp", backend)


def test_a_folder_without_a_store_is_not_given_one_by_reading(fresh_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for read in (lambda: tracking.read_runs("exp", "mlflow"), lambda: tracking.find_run_directory("0" * 32)):
        with pytest.raises(UsageError, match="no MLflow store"):
            read()
    assert not list(tmp_path.iterdir())


def test_a_run_is_found_by_its_id(client, tmp_path):
    directory = tmp_path / "multirun/a"
    tracker = Tracker(directory, MLFLOW, "run", {}, {})
    tracker.close("FINISHED")
    for root in (Path("multirun"), Path("elsewhere")):  # by its record, by its tag in MLflow
        assert tracking.find_run_directory(tracker.run_id, root).resolve() == directory.resolve()
    shutil.rmtree(directory)
    with pytest.raises(UsageError, match="has no folder here"):
        tracking.find_run_directory(tracker.run_id)
    foreign = client.create_run("0").info.run_id
    for run_id, reason in ((foreign, "has no folder here"), ("0" * 32, "not in MLflow"), ("../x", "not in MLflow")):
        with pytest.raises(UsageError, match=reason) as error:
            tracking.find_run_directory(run_id)
        assert "\n" not in str(error.value)


def test_the_environment_names_code_versions_and_device(monkeypatch):
    import torch

    monkeypatch.setattr(sys, "argv", ["src/train.py", "k=50", "a b"])
    tags = tracking.environment_tags("cpu")
    assert tags["torch"] == torch.__version__.partition("+")[0] or tags["torch"] == torch.__version__
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert tags["command"] == "src/train.py k=50 'a b'"
    assert tags["device"] == f"cpu ({torch.get_num_threads()} threads)"
    assert not any(socket.gethostname() in value for value in tags.values())


def test_the_commit_and_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("no git")
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "src/tracking.py"))
    assert "git_commit" not in tracking.environment_tags("cpu"), "an unpacked archive has none"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, **TEXT).stdout.strip()

    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    (tmp_path / "results.txt").write_text("not code")
    tags = tracking.environment_tags("cpu")
    assert (tags["git_commit"], tags["git_dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "src/a.py").write_text("b")
    assert tracking.environment_tags("cpu")["git_dirty"] == "true"


def test_values_logged_just_before_a_kill_are_in_the_record_of_the_continued_run(tmp_path):
    killed = Tracker(tmp_path, JSONL, "run", {}, {})
    killed.log({"test/linear_top1": 12.5, "val/knn_top1": math.nan}, 7)  # in the file, not in run.json yet
    assert "test/linear_top1" not in Record.load(tmp_path).metrics
    continued = Tracker(tmp_path, JSONL, "run", {}, {})
    continued.log({"test/linear_top1": 12.5}, 7)  # computed again
    continued.close("FINISHED")
    assert Record.load(tmp_path).metrics["test/linear_top1"] == 12.5
    assert math.isnan(Record.load(tmp_path).metrics["val/knn_top1"])
    assert len(rows(tmp_path)) == 1
