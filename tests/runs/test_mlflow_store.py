"""MLflow's store: made once, refused in one line, and what delivery rests on."""

import math
import time

import pytest

from src.config.schema import Tracking
from src.errors import UsageError
from src.runs import mlflow_store, query
from src.runs.tracker import Tracker
from tests.stores import MLFLOW, RUN, history, start


def test_the_store_drops_exact_repeats(client):
    """What makes delivery idempotent is a property of MLflow's SQL store. A new version of it must keep this."""
    from mlflow.entities import Metric

    run_id = client.create_run("0").info.run_id
    metrics = [Metric("x", value, 1000 + step, step) for step, value in enumerate([1.0, math.nan, math.inf, -0.0])]
    for batch in (metrics[:2], metrics, [*metrics[1:], Metric("x", 5.0, 2000, 4)], metrics):
        client.log_batch(run_id, batch)
    assert sorted(metric.step for metric in client.get_metric_history(run_id, "x")) == [0, 1, 2, 3, 4]
    assert client.get_run(run_id).data.metrics["x"] == 5.0, "the last value is that of the highest step"


def test_a_store_is_created_once_where_mlflow_ui_looks(fresh_store):
    assert {path.name for path in fresh_store.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_file_that_is_no_store_is_one_line_and_nothing_is_written(fresh_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/notes.db")
    (tmp_path / "notes.db").write_text("not a database, " * 100)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    with pytest.raises(UsageError, match=r"notes\.db does not open") as error:
        Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_uri_of_no_known_kind_is_one_line(fresh_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://example.org")
    with pytest.raises(UsageError, match="gopher") as error:
        Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["http://[::1", "sqlite:////"])
def test_a_uri_that_is_no_address_or_a_folder_is_one_line_at_once(fresh_store, tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI") as error:
        mlflow_store.prepare()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:mlruns", "file:///tmp/mlruns"])
def test_a_folder_of_files_is_refused(fresh_store, tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(UsageError, match="a folder of files") as error:
        Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_and_values_arrive(client, tmp_path):
    long = Tracker(tmp_path / ("r" * 255), Tracking("mlflow", "e" * 500, 10), {"p": "v" * 10_000}, {"t": "v" * 10_000})
    long.log({"x": 1.0}, 0)
    long.close("FINISHED")
    assert client.get_run(long.run_id).data.metrics == {"x": 1.0}


def test_two_that_create_the_tables_of_a_database_together_both_get_it(fresh_store, monkeypatch):
    """As PostgreSQL refuses the second of them: a stub in the place of MLflow's client."""
    calls = []

    def client(uri):
        calls.append(uri)
        if len(calls) < 3:
            raise RuntimeError("(psycopg2.errors.UniqueViolation) duplicate key value violates a unique constraint")
        return "the client"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://somewhere/db")
    monkeypatch.setattr("mlflow.MlflowClient", client)
    monkeypatch.setattr(mlflow_store.time, "sleep", lambda _: None)
    assert mlflow_store.prepare() == "the client"
    calls.clear()
    monkeypatch.setattr(mlflow_store, "ATTEMPTS", 2)
    with pytest.raises(UsageError, match="does not open"):
        mlflow_store.prepare()


def test_a_deleted_experiment_is_one_line(client, tmp_path):
    client.delete_experiment(client.create_experiment("exp"))
    with pytest.raises(UsageError, match="mlflow experiments restore"):
        Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_may_start_together_in_an_empty_folder(tmp_path, monkeypatch):
    """`scripts/reliability/together.py` does it over and over."""
    pytest.importorskip("mlflow")
    processes = [start(RUN, tmp_path, NAME=f"run{i}") for i in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "", ""), "and none of MLflow's chatter"

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = mlflow_store.prepare()
    found = query.read_runs("exp", "mlflow")
    assert sorted(run.name for run in found) == [f"run{i}" for i in range(4)]
    for run in found:
        assert run.status == "FINISHED"
        assert [step for step, _ in history(client, run.run_id, "train/loss")] == list(range(50))


@pytest.mark.slow
def test_a_kill_while_the_store_is_created_leaves_none_or_a_whole_one(tmp_path):
    pytest.importorskip("mlflow")
    aside = tmp_path / "mlflow.db.new"
    for tenths in (8, 1):
        aside.unlink(missing_ok=True)
        process = start("from src.runs import mlflow_store; mlflow_store.prepare()", tmp_path)
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
