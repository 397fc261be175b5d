"""MLflow's store: created once, refused in one line if it cannot be used, with the properties that delivery needs."""

import contextlib
import math
import os
import shutil
import sqlite3
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from src.config.schema import Tracking
from src.errors import UsageError
from src.evaluation.encoder import load_encoder
from src.runs import mlflow_store, query
from src.runs.delivery import deliver
from src.runs.tracker import Tracker
from tests.evaluation.test_export import write_run
from tests.stores import MLFLOW, RUN, break_store, history, start


def test_the_store_drops_exact_repeats(client):
    """Delivery is idempotent because MLflow's SQL store has this property; a new version of MLflow must keep it."""
    from mlflow.entities import Metric

    run_id = client.create_run("0").info.run_id
    metrics = [Metric("x", value, 1000 + step, step) for step, value in enumerate([1.0, math.nan, math.inf, -0.0])]
    for batch in (metrics[:2], metrics, [*metrics[1:], Metric("x", 5.0, 2000, 4)], metrics):
        client.log_batch(run_id, batch)
    assert sorted(metric.step for metric in client.get_metric_history(run_id, "x")) == [0, 1, 2, 3, 4]
    assert client.get_run(run_id).data.metrics["x"] == 5.0, "the last value is that of the highest step"


def test_a_store_is_created_once_where_mlflow_ui_looks(fresh_store):
    assert {path.name for path in fresh_store.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_group_that_may_write_new_files_may_write_the_store(tmp_path):
    """A file that SQLite itself creates can be written by its owner only."""

    def create(uri):
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            database.execute("CREATE TABLE a (b)")

    umask = os.umask(0o002)
    try:
        mlflow_store._create(tmp_path / "mlflow.db", create)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "mlflow.db").stat().st_mode) == 0o664


def test_the_store_is_in_the_current_folder_whatever_that_is_called(fresh_store, tmp_path, monkeypatch):
    """Left to itself, MLflow creates another folder beside this one, with %20 for each space in its name."""
    strange = tmp_path / "me@uni.edu" / "My Projects (1), k=400 + 20% é"
    strange.mkdir(parents=True)
    monkeypatch.chdir(strange)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match="there is no MLflow store at"):
        mlflow_store.existing()
    shutil.copy(fresh_store, strange)
    run = Tracker(strange / "run", MLFLOW, {}, {})
    mlflow_store.watch_system(run.run_id)()
    (strange / "run" / "note.txt").write_text("whole")
    run.client().log_artifact(run.run_id, str(strange / "run" / "note.txt"))
    run.close("FINISHED")
    client = mlflow_store.existing()
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["note.txt"]
    assert Path(client.download_artifacts(run.run_id, "note.txt")).read_text() == "whole"
    assert [run.name for run in query.read_runs("exp", "mlflow")] == ["run"]
    assert [each.name for each in tmp_path.iterdir()] == ["me@uni.edu"]
    assert [each.name for each in strange.parent.iterdir()] == [strange.name]


def test_a_store_in_a_folder_that_cannot_be_written_can_be_read(client, tmp_path):
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}, "only to create one takes a lock"


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
def test_a_uri_that_is_no_address_or_a_folder_is_one_line_at_once(fresh_store, monkeypatch, uri):
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
    """A stub of MLflow's client refuses the second process as PostgreSQL does."""
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
    monkeypatch.setattr(mlflow_store, "OPEN_ATTEMPTS", 2)
    with pytest.raises(UsageError, match="does not open"):
        mlflow_store.prepare()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("encoder") / "run", "backbone=resnet_tiny") / "encoder.safetensors"


def log_encoder(directory, encoder):
    """Deliver a finished run with metrics and an encoder; returns its id."""
    sizes = {"data.name": "digits", "data.fingerprint": "ab" * 20, "data.image_size": 32, "encoder_features": 128}
    tracker = Tracker(directory, MLFLOW, sizes, {})
    tracker.log({"train/loss": 2.0, "val/knn_top1": 50.0}, 7)
    tracker.log({"test/linear_top1": 60.0}, 7)
    shutil.copy(encoder, directory)
    tracker.artifact(directory / encoder.name)
    tracker.close("FINISHED")
    return tracker.run_id


def test_the_encoder_is_a_model_of_the_run_with_its_signature_and_figures(client, tmp_path, encoder):
    mlflow = pytest.importorskip("mlflow")
    run_id = log_encoder(tmp_path / "run", encoder)
    run = client.get_run(run_id)
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.status, model.source_run_id) == ("encoder", "READY", run_id)
    assert {figure.key: figure.value for figure in model.metrics} == {"test/linear_top1": 60.0}
    assert {(figure.dataset_name, figure.dataset_digest) for figure in model.metrics} == {
        (each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs
    }
    assert "uint8 [-1, 3, 32, 32]" in model.tags["mlflow.note.content"]
    assert not client.list_artifacts(run_id), "the weights are stored once"
    copy = Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/encoder/{encoder.name}"))
    assert copy.read_bytes() == encoder.read_bytes()

    loaded = mlflow.pyfunc.load_model(f"runs:/{run_id}/encoder")
    (takes,), (gives,) = loaded.metadata.signature.inputs, loaded.metadata.signature.outputs
    assert (takes.type, takes.shape, gives.type, gives.shape) == (np.uint8, (-1, 3, 32, 32), np.float32, (-1, 128))
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    features = torch.from_numpy(loaded.predict(images.numpy()))
    torch.testing.assert_close(features, load_encoder(encoder)(images).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["log_model_artifact", "log_outputs", "finalize_logged_model"])
def test_a_model_that_was_cut_off_is_completed_and_not_made_twice(client, tmp_path, monkeypatch, encoder, method):
    with monkeypatch.context() as patch:
        break_store(client, patch, method)
        run_id = log_encoder(tmp_path / "run", encoder)
    for _ in range(2):
        assert deliver(tmp_path / "run", again=True).run_ids == [run_id]
    (model,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert model.status == "READY"
    assert [(each.key, each.step, each.value) for each in model.metrics] == [("test/linear_top1", 7, 60.0)]
    assert {file.path for file in client.list_logged_model_artifacts(model.model_id)} == {"MLmodel", encoder.name}
    assert [each.model_id for each in client.get_run(run_id).outputs.model_outputs] == [model.model_id]
    assert history(client, run_id, "test/linear_top1") == [(7, 60.0)]


def test_a_server_that_knows_no_models_gets_the_encoder_as_a_file(client, tmp_path, monkeypatch, encoder):
    """A stub of the client's method answers as a server of MLflow 2 does."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def unknown(*args, **kwargs):
        raise MlflowException("404", ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(type(client), "search_logged_models", unknown)
    run_id = log_encoder(tmp_path / "run", encoder)
    assert [file.path for file in client.list_artifacts(run_id)] == [encoder.name]


def test_a_deleted_experiment_is_one_line(client, tmp_path):
    client.delete_experiment(client.create_experiment("exp"))
    with pytest.raises(UsageError, match="mlflow experiments restore"):
        Tracker(tmp_path / "run", MLFLOW, {}, {})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_may_start_together_in_an_empty_folder(tmp_path, monkeypatch):
    """`scripts/reliability/together.py` repeats this many times."""
    pytest.importorskip("mlflow")
    processes = [start(RUN, tmp_path, NAME=f"run{i}") for i in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert (process.returncode, out, err) == (0, "", ""), "and none of MLflow's chatter"

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = mlflow_store.prepare()
    found = query.read_runs("exp", "mlflow")
    assert sorted(run.name for run in found) == [f"run{i}" for i in range(3)]
    for run in found:
        assert run.status == "FINISHED"
        assert [step for step, _ in history(client, run.run_id, "train/loss")] == list(range(50))


@pytest.mark.slow
def test_a_kill_while_the_store_is_created_leaves_none_or_a_whole_one(tmp_path):
    pytest.importorskip("mlflow")
    aside = tmp_path / "mlflow.db.new"
    stays_there = (
        "import time; from src.runs import mlflow_store; mlflow_store.os.replace = lambda *_: time.sleep(600); "
        "mlflow_store.prepare()"
    )
    for tenths in (8, 1, 0):
        aside.unlink(missing_ok=True)
        process = start(stays_there, tmp_path)
        while not aside.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(tenths / 10)
        process.kill()
        process.communicate()
    assert aside.exists(), "the last kill left a torn one"
    process = start(RUN, tmp_path, NAME="run")
    assert process.communicate() == ("", "")
    assert process.returncode == 0
