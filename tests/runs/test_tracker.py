"""The log of a run: delivery to MLflow, kills and outages."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from omegaconf import OmegaConf

from src.config.schema import Tracking
from src.errors import UsageError
from src.reporting import mlflow_charts
from src.runs import delivery, mlflow_store, query, record
from src.runs import directory as run_directory
from src.runs import tracker as tracking
from src.runs.record import Record
from src.runs.tracker import Tracker
from tests.composing import composed
from tests.conftest import PROJECT
from tests.stores import JSONL, MLFLOW, break_store, history, impatient, rows, start, train, warnings


@pytest.mark.parametrize("name", ["mlflow", "jsonl"])
def test_the_config_files_fit_the_schema(name):
    loaded = OmegaConf.merge(OmegaConf.structured(Tracking), composed(f"tracking={name}").tracking)
    assert OmegaConf.to_object(loaded) == Tracking(name, "support-sets", 10)


def test_system_metrics_are_measured_by_mlflow_until_the_end_where_they_are_asked_for(client, tmp_path, monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    processor = "system/cpu_utilization_percentage"
    steps = [0]
    for _ in range(2):  # the second session continues the steps of the first
        tracker = Tracker(tmp_path / "run", replace(MLFLOW, system_metrics=True), {}, {})
        tracker.watch_system()
        tracker.log({"train/loss": 1.0}, 0)
        while len(history(client, tracker.run_id, processor)) < len(steps) + 2:
            time.sleep(0.05)
        tracker.close("KILLED")
        assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
        before, steps = len(steps), [step for step, _ in history(client, tracker.run_id, processor)]
        assert steps == list(range(len(steps)))
        assert len(steps) >= before
    assert {key for row in rows(tmp_path / "run") for key in row["metrics"]} == {"train/loss"}

    plain = Tracker(tmp_path / "plain", MLFLOW, {}, {})
    plain.watch_system()
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    plain.close("FINISHED")


def test_a_store_that_is_away_gets_no_system_metrics_and_the_run_goes_on(client, tmp_path, monkeypatch, caplog):
    break_store(client, monkeypatch, "log_batch", "create_run")
    tracker = Tracker(tmp_path / "run", replace(MLFLOW, system_metrics=True), {}, {})
    tracker.watch_system()
    tracker.close("FINISHED")
    assert any("no system metrics of this session" in warning for warning in warnings(caplog))
    assert Record.load(tmp_path / "run").status == "FINISHED"


def test_a_finished_run_may_be_evaluated_again(tmp_path):
    for value in (0.5, 0.6):
        tracker = Tracker(tmp_path, JSONL, {}, {})
        tracker.log({"test/linear_top1": value}, 100)
        tracker.close("FINISHED")
    assert [row["metrics"]["test/linear_top1"] for row in rows(tmp_path)] == [0.5, 0.6]
    assert query.read_runs("exp", "jsonl", tmp_path)[0].metrics == {"test/linear_top1": 0.6}


def test_params_stay_and_tags_are_replaced_on_resume(tmp_path):
    Tracker(tmp_path, JSONL, {"k": 50}, {"git_commit": "a", "device": "cpu"}).close("KILLED")
    Tracker(tmp_path, JSONL, {"k": 51, "seed": 0}, {"git_commit": "b"}).close("FINISHED")
    (run,) = query.read_runs("exp", "jsonl", tmp_path)
    assert run.params == {"k": "50", "seed": "0"}
    assert run.tags == {"git_commit": "b", "device": "cpu", "output_dir": str(tmp_path.resolve())}


def test_without_mlflow_jsonl_works_and_mlflow_is_one_line(tmp_path):
    code = """
import sys
from pathlib import Path
sys.modules["mlflow"] = None  # what an import finds when there is no such package
from src.config.schema import Tracking
from src.errors import UsageError
from src.runs.query import find_run_directory, read_runs
from src.runs.tracker import Tracker
tracker = Tracker(Path("multirun/a"), Tracking("jsonl", "exp", 10), {}, {})
tracker.log({"x": 1.0}, 0)
tracker.close("FINISHED")
assert read_runs("exp", "jsonl")[0].metrics == {"x": 1.0}
assert find_run_directory(tracker.run_id) == Path("multirun/a")
try:
    Tracker(Path("b"), Tracking("mlflow", "exp", 10), {}, {})
except UsageError as error:
    print(error)
assert not Path("b").exists()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PROJECT)}, **TEXT
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "tracking=jsonl" in line
    assert "make setup" in line


TEXT = {"capture_output": True, "text": True}


def test_a_run_is_delivered(client, tmp_path):
    directory = tmp_path / "run"
    params = {f"group.key{i}": i for i in range(250)} | {"k": 50, "long": "x" * 7000}
    tracker = Tracker(directory, MLFLOW, params, {"device": "cpu"})
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    for step in range(700):
        tracker.log({"train/loss": step / 7, "val/knn_top1": -step}, step)  # more than one request takes
    (directory / "encoder.txt").write_text("weights")
    tracker.artifact(directory / "encoder.txt")
    tracker.log({"support/perplexity": math.nan}, 700)
    tracker.close("FINISHED")

    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
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
    tracker = Tracker(directory, MLFLOW, {"k": 50, "long": "x" * 7000}, {})
    train(tracker, range(20))
    tracker.flush()
    train(tracker, range(20, 31))  # logged, but not delivered
    with (directory / record.METRICS).open("a") as file:
        file.write('{"step": 33, "ti')  # then it is killed

    resumed = Tracker(directory, MLFLOW, {"k": 50, "long": "x" * 7000}, {})
    assert client.get_run(resumed.run_id).info.status == "RUNNING"
    train(resumed, range(10, 60))
    resumed.close("FINISHED")

    assert resumed.run_id == tracker.run_id
    assert history(client, resumed.run_id, "train/loss") == [(step, 1 / (1 + step)) for step in range(0, 60, 3)]
    assert history(client, resumed.run_id, "val/knn") == [(step, step / 100) for step in range(0, 60, 6)]
    assert client.get_run(resumed.run_id).info.status == "FINISHED"


def test_a_run_killed_between_its_record_and_mlflow_is_told_when_it_is_looked_at_again(
    client, tmp_path, monkeypatch, caplog
):
    """When its command is typed again, MLflow learns of the end that only the run's record knew."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    directory = tmp_path / "run"
    tracker = Tracker(directory, MLFLOW, {}, {})
    train(tracker, range(7))
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store.Delivery, "push", kill)
        with pytest.raises(Killed):
            tracker.close("FINISHED")
    assert Record.load(directory).status == "FINISHED"
    assert client.get_run(tracker.run_id).info.status == "RUNNING"

    with monkeypatch.context() as patch:
        break_store(client, patch, "log_batch")
        delivery.catch_up(directory, MLFLOW)
    assert "try again later" in warnings(caplog)[0]
    delivery.catch_up(directory, MLFLOW)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert [step for step, _ in history(client, tracker.run_id, "train/loss")] == [0, 3, 6]
    monkeypatch.setattr(mlflow_store.Delivery, "steps", lambda _: pytest.fail("MLflow has all of it already"))
    delivery.catch_up(directory, MLFLOW)
    assert len(warnings(caplog)) == 1


def test_a_failed_run_that_is_continued_runs_again(client, tmp_path):
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    ends = {"error": "why", "pruned": "true"}
    tracker.record.tags |= ends
    tracker.close("FAILED")
    assert client.get_run(tracker.run_id).info.status == "FAILED"
    assert ends.items() <= client.get_run(tracker.run_id).data.tags.items()
    resumed = Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    assert not ends.keys() & client.get_run(tracker.run_id).data.tags.keys()
    resumed.close("KILLED")
    assert not ends.keys() & Record.load(tmp_path / "run").tags.keys()
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_run_whose_creator_was_killed_before_it_knew_the_id_is_found(client, tmp_path):
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    tracker.record.entry.run_id = ""  # as the record was at that moment
    tracker.record.save(tmp_path / "run")
    again = Tracker(tmp_path / "run", MLFLOW, {}, {})
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [again.run_id]


def test_a_run_that_the_store_lost_is_delivered_whole_again(client, fresh_store, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    tracker = Tracker(directory, MLFLOW, {"k": 50}, {})
    (directory / "a.txt").write_text("a")
    tracker.artifact(directory / "a.txt")
    train(tracker, range(20))
    tracker.close("KILLED")
    shutil.copy(fresh_store, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    client = mlflow_store.prepare()

    resumed = Tracker(directory, MLFLOW, {"k": 50}, {})
    train(resumed, range(20, 40))
    resumed.close("FINISHED")
    assert resumed.run_id != tracker.run_id
    assert [step for step, _ in history(client, resumed.run_id, "train/loss")] == list(range(0, 40, 3))
    assert [file.path for file in client.list_artifacts(resumed.run_id)] == ["a.txt"]


def test_an_outage_does_not_stop_training_and_nothing_is_lost(client, tmp_path, monkeypatch, caplog):
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
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

    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(type(client), "log_batch", hang)
    for _ in range(50):
        tracker.flush()
        clock[0] += 10.0
    assert calls == [0.0, 220.0, 440.0]


def test_a_store_that_is_down_from_start_to_end_gets_the_run_later(client, tmp_path, monkeypatch, caplog):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_store(client, patch, "search_runs", "create_run", "log_batch", "update_run", "set_terminated")
        tracker = Tracker(directory, MLFLOW, {"k": 50}, {"device": "cpu"})
        train(tracker, range(40))
        tracker.close("FINISHED")
    assert f"python -m src.tracking {directory}" in warnings(caplog)[-1]
    assert query.read_runs("exp", "jsonl", tmp_path)[0].status == "FINISHED"

    run_ids = {*delivery.deliver(directory, again=True).run_ids, *delivery.deliver(directory, again=True).run_ids}
    (run,) = query.read_runs("exp", "mlflow")
    assert run_ids == {run.run_id}
    assert (run.status, run.params) == ("FINISHED", {"k": "50"})
    assert [step for step, _ in history(client, run.run_id, "train/loss")] == list(range(0, 40, 3))
    assert client.get_run(run.run_id).info.end_time == tracker.record.end_time


def test_runs_of_jsonl_are_delivered_by_command(client, tmp_path, capsys):
    for name in ("a", "b"):
        tracker = Tracker(tmp_path / name, JSONL, {}, {})
        tracker.log({"x": 1.0}, 0)
        tracker.close("KILLED")
    delivery.main(mlflow_charts.publish_again, [str(tmp_path / "a"), str(tmp_path / "b")])
    found = {run.name: run for run in query.read_runs("exp", "mlflow")}
    assert found["a"].metrics == found["b"].metrics == {"x": 1.0}
    assert found["a"].status == "KILLED"
    assert found["b"].run_id in capsys.readouterr().out.splitlines()[1]
    with pytest.raises(UsageError, match="there is no such run"):
        delivery.main(mlflow_charts.publish_again, [str(tmp_path)])


@pytest.mark.slow
def test_a_locked_database_is_waited_for_or_passed_over(client, tmp_path, caplog, monkeypatch):
    """The tracker warns of the lock, goes on, and delivers the row once the lock is gone."""
    impatient(monkeypatch)
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    tracker.log({"x": 1.0}, 0)
    tracker.flush()
    assert "database is locked" in warnings(caplog)[0]
    other.rollback()
    tracker.close("FINISHED")
    assert history(client, tracker.run_id, "x") == [(0, 1.0)]


SERVER = """
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(client, tmp_path, monkeypatch):
    """MLflow's tracking server on the store of `client`, in a process of its own."""
    from mlflow.server import constants

    variables = {constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{tmp_path}/mlflow.db"}
    variables |= {constants.ARTIFACT_ROOT_ENV_VAR: str(tmp_path / "mlruns")}
    process = start(SERVER, tmp_path, **variables)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{int(process.stdout.readline())}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
    monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 300.0)
    yield process
    process.kill()
    process.communicate()


def test_delivery_to_a_server_is_idempotent_too(client, server, tmp_path):
    assert mlflow_store.prepare().tracking_uri.startswith("http://")
    directory = tmp_path / "remote"
    train(Tracker(directory, MLFLOW, {"k": 50}, {}), range(10))  # then it is killed
    remote = Tracker(directory, MLFLOW, {"k": 50}, {})
    train(remote, range(20))
    remote.log({"support/perplexity": math.nan}, 20)
    (directory / "a.txt").write_text("a")
    remote.artifact(directory / "a.txt")
    remote.close("FINISHED")
    for _ in range(2):
        assert delivery.deliver(directory, again=True).run_ids == [remote.run_id]
    assert history(client, remote.run_id, "train/loss") == [(step, 1 / (1 + step)) for step in range(0, 20, 3)]
    assert len(client.get_metric_history(remote.run_id, "support/perplexity")) == 1
    assert client.get_run(remote.run_id).info.status == "FINISHED"
    assert [run.run_id for run in query.read_runs("exp", "mlflow")] == [remote.run_id]


def test_a_server_that_is_not_there_does_not_stop_training(fresh_store, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port, where nothing listens
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker(tmp_path, MLFLOW, {}, {})
    train(tracker, range(10))
    tracker.close("FINISHED")
    assert "python -m src.tracking" in warnings(caplog)[-1]
    assert len(rows(tmp_path)) == 4
    with pytest.raises(UsageError, match="does not answer"):
        query.read_runs("exp", "mlflow")


class Slow(BaseHTTPRequestHandler):
    """Answers that no read timeout ends: a byte at a time for ever, or a request to try again much later."""

    drips = True

    def do_GET(self):
        self.send_response(200 if self.drips else 503)
        self.send_header("Retry-After", "100")
        self.send_header("Content-Length", "10000" if self.drips else "0")
        self.end_headers()
        with contextlib.suppress(OSError):
            while self.drips:
                self.wfile.write(b" ")
                time.sleep(0.1)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def slow_server(monkeypatch):
    pytest.importorskip("mlflow")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    monkeypatch.setattr(Slow, "drips", False)
    server.shutdown()


@pytest.mark.parametrize("drips", [True, False])
def test_a_server_that_never_comes_to_an_end_holds_no_run(slow_server, tmp_path, monkeypatch, caplog, drips):
    monkeypatch.setattr(Slow, "drips", drips)
    monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 1.0 if drips else 50.0)
    started = time.monotonic()
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    train(tracker, range(10))
    tracker.flush()
    tracker.close("FINISHED")
    assert time.monotonic() - started < (300 if drips else 90)
    first, last = warnings(caplog)
    assert "MLflow does not take rows, they are kept in metrics.jsonl" in first
    assert re.search(r"no answer in \d+ s", first) or not drips
    assert "python -m src.tracking" in last
    assert (Record.load(tmp_path / "run").status, len(rows(tmp_path / "run"))) == ("FINISHED", 4)


def test_who_is_told_to_stop_waits_for_no_server(slow_server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "STOPPING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 1000.0)
    started = time.monotonic()
    told_at = started + 1
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {}, is_stopping=lambda: time.monotonic() > told_at)
    tracker.close("KILLED")
    assert time.monotonic() - started < 300
    assert Record.load(tmp_path / "run").status == "KILLED"


def test_a_slow_store_gets_no_more_than_a_tenth_of_the_time_and_all_in_the_end(client, tmp_path, monkeypatch):
    clock, pushed, push = [0.0], [], mlflow_store.Delivery.push

    def push_slowly(delivery):
        pushed.append(clock[0])
        clock[0] += 20.0
        push(delivery)

    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    monkeypatch.setattr(tracking, "SLOW_DELIVERY_S", 19.0)
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(mlflow_store.Delivery, "push", push_slowly)
    for step in range(50):
        tracker.log({"x": step}, step)
        tracker.flush()
        clock[0] += 10.0
    assert pushed == [0.0, 220.0, 440.0]
    tracker.close("KILLED")
    assert history(client, tracker.run_id, "x") == [(step, step) for step in range(50)]
    assert client.get_run(tracker.run_id).info.status == "KILLED"


def test_rows_are_on_the_disk_before_mlflow_is_told_of_them(client, tmp_path, monkeypatch):
    tracker, order = Tracker(tmp_path, MLFLOW, {}, {}), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(mlflow_store.Delivery, "push", lambda _: order.append("push"))
    tracker.log({"x": 1.0}, 0)
    tracker.flush()
    assert order.index((tmp_path / record.METRICS).stat().st_ino) < order.index("push")


@pytest.mark.slow
def test_mlflow_ui_without_options_shows_the_runs(client, tmp_path, monkeypatch):
    if not socket.socket().connect_ex(("127.0.0.1", 5000)):
        pytest.skip("something else uses the port of `mlflow ui`")
    train(local := Tracker(tmp_path / "local", MLFLOW, {}, {}), range(10))
    local.close("FINISHED")

    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTEST_"))}
    env |= {"MLFLOW_WORKERS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # 16 processes would take longer
    ui = subprocess.Popen([sys.executable, "-m", "mlflow", "ui"], env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while socket.socket().connect_ex(("127.0.0.1", 5000)):
            assert ui.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
        monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 300.0)
        assert [run.run_id for run in query.read_runs("exp", "mlflow")] == [local.run_id]
    finally:
        if ui.poll() is None:
            os.killpg(ui.pid, signal.SIGTERM)  # its workers too
        ui.wait()


def test_one_command_delivers_all_that_waits_and_no_dead_run_stays_running(client, tmp_path, monkeypatch, capsys):
    root = tmp_path / "multirun"
    with monkeypatch.context() as patch:
        break_store(client, patch, "search_runs", "create_run", "log_batch")
        for name in ("late", "later"):
            train(tracker := Tracker(root / name, MLFLOW, {}, {}), range(10))
            tracker.close("FINISHED")
    train(Tracker(root / "killed", MLFLOW, {}, {}), range(10))  # by SIGKILL: nobody closes it
    Tracker(root / "here", MLFLOW, {}, {}).close("FINISHED")
    Tracker(root / "not meant", JSONL, {}, {}).close("FINISHED")
    train(Tracker(root / "at work", MLFLOW, {}, {}), range(10))
    with run_directory.exclusive(root / "at work"):
        delivery.main(mlflow_charts.publish_again, [])
    said = [line.split(": delivered as run ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"multirun/{name}" for name in ("late", "later", "killed")]
    status = {run.name: run.status for run in query.read_runs("exp", "mlflow")}
    assert status == {
        "late": "FINISHED",
        "later": "FINISHED",
        "killed": "KILLED",
        "here": "FINISHED",
        "at work": "RUNNING",
    }
    for name in ("late", "killed"):
        run_id = Record.load(root / name).run_id
        assert [step for step, _ in history(client, run_id, "train/loss")] == [0, 3, 6, 9]


def test_a_run_that_mlflow_refuses_keeps_no_other_back(client, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_store(client, patch, "search_runs", "create_run", "log_batch")
        for name in "abcdef":
            train(tracker := Tracker(tmp_path / "multirun" / name, MLFLOW, {}, {}), range(10))
            tracker.close("FINISHED")
    for name in "abcd":
        (tmp_path / f"multirun/{name}/link").symlink_to("/etc/hostname")
        values = json.loads((tmp_path / f"multirun/{name}/run.json").read_text())
        (tmp_path / f"multirun/{name}/run.json").write_text(json.dumps(values | {"artifacts": ["link"]}))
    for named in ([], list("abcdef")):
        with pytest.raises(UsageError, match="multirun/a/link is not a file of the run's own folder"):
            delivery.main(mlflow_charts.publish_again, named)
        said = [line.split(": delivered as run ")[0] for line in capsys.readouterr().out.splitlines()]
        assert said == ["multirun/e", "multirun/f"]


def test_runs_of_which_mlflow_refuses_a_value_keep_no_other_back(client, tmp_path, capsys):
    for name in "abcd":
        tracker = Tracker(tmp_path / "multirun" / name, JSONL, {}, {})
        tracker.log({"loss" if name == "d" else "loss%": 1.0}, 0)
        tracker.record.entry.for_mlflow = True
        tracker.close("FINISHED")
    with pytest.raises(UsageError, match=r"does not take multirun/a .*change that in the run's files"):
        delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out.startswith("multirun/d: delivered as run ")


def test_where_the_store_takes_nothing_not_every_run_is_tried(client, tmp_path, monkeypatch, caplog):
    asked = []

    def refuse(directory, again=False):
        asked.append(directory)
        raise mlflow_store.StoreError("MLflow takes nothing")

    for name in "abcde":
        Tracker(tmp_path / "multirun" / name, MLFLOW, {}, {}).close("FINISHED")
    monkeypatch.setattr(delivery, "deliver", refuse)
    for named in ([], list("abcde")):
        with pytest.raises(UsageError, match="takes nothing"):
            delivery.main(mlflow_charts.publish_again, named)
    assert len(asked) == 2 * delivery.MAX_FAILURES
    (untried,) = [each for each in warnings(caplog) if "not tried" in each]
    assert untried == "the store has failed 3 times in a row, so these were not tried: multirun/d multirun/e"


def test_the_next_step_is_after_all_that_were_logged(client, tmp_path):
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert tracker.next_step == 0
    tracker.log({"a": 1.0}, 3)
    tracker.log({"b": 1.0}, 2)
    assert tracker.next_step == 4
    tracker.close("KILLED")
    assert Tracker(tmp_path / "run", MLFLOW, {}, {}).next_step == 4


def test_a_run_that_is_worked_on_is_not_delivered(client, tmp_path):
    Tracker(tmp_path / "run", MLFLOW, {}, {})
    with (
        run_directory.exclusive(tmp_path / "run"),
        pytest.raises(UsageError, match=f"process {os.getpid()} on .* is using it"),
    ):
        delivery.deliver(tmp_path / "run", again=True)


def test_the_command_of_a_sweeps_job_runs_where_the_sweep_is_not(tmp_path):
    assert tracking.parent_tags(None, "exp") == tracking.parent_tags(str(tmp_path / "sweep"), "exp") == {}
    Tracker(tmp_path / "sweep", JSONL, {}, {"sweep_id": "0a"}).close("FINISHED")
    assert tracking.parent_tags(str(tmp_path / "sweep"), "exp") == {"sweep.0a": "true"}
    Tracker(tmp_path / "run", JSONL, {}, {}).close("FINISHED")
    with pytest.raises(UsageError, match="is not the folder of a sweep; leave it out"):
        tracking.parent_tags(str(tmp_path / "run"), "exp")


def test_a_sweep_leaves_the_record_of_a_run_that_is_worked_on_alone(tmp_path):
    parent = Tracker(tmp_path / "sweep", JSONL, {"sweep": "grid"}, {"sweep_id": "0a"})
    folders = [tmp_path / name for name in ("ended", "going")]
    for folder in folders:
        Tracker(folder, JSONL, {}, {}).close("FINISHED")
    before = (folders[1] / "run.json").read_bytes()
    with run_directory.exclusive(folders[1]):
        delivery.attach_children(parent, folders)
        assert (folders[1] / "run.json").read_bytes() == before
    assert Record.load(folders[0]).entry.tags["sweep.0a"] == "true"


def test_a_store_that_is_locked_at_the_start_gets_the_run_later(client, tmp_path, monkeypatch, caplog):
    impatient(monkeypatch)
    monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 600.0)  # with a busy machine
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    with monkeypatch.context() as patch:  # another address of the store, which MLflow has not opened so far
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db?timeout=0.2")
        tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
        for step in range(5):
            tracker.log({"train/loss": 1.0}, step)
            tracker.flush()
        tracker.close("FINISHED")
    assert sum("database is locked" in each for each in warnings(caplog)) == 1
    other.rollback()
    delivery.deliver(tmp_path / "run", again=True)
    (run,) = query.read_runs("exp", "mlflow")
    assert [step for step, _ in history(client, run.run_id, "train/loss")] == list(range(5))


@pytest.mark.parametrize(
    "name", ["../private.txt", "/etc/hostname", "link", "linked/private.txt", "pipe", "folder", ".."]
)
def test_nothing_but_files_of_its_own_folder_goes_to_mlflow(client, tmp_path, name):
    (tmp_path / "private.txt").write_text("private")
    directory = tmp_path / "multirun" / "run"
    tracker = Tracker(directory, MLFLOW, {}, {})
    tracker.close("FINISHED")
    (directory / "link").symlink_to(tmp_path / "private.txt")
    (directory / "linked").symlink_to(tmp_path)
    (directory / "folder").mkdir()
    os.mkfifo(directory / "pipe")
    values = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps(values | {"artifacts": [name]}))
    with pytest.raises(UsageError, match="folder") as error:
        delivery.deliver(directory, again=True)
    assert "\n" not in str(error.value)
    assert not client.list_artifacts(tracker.run_id)
