import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf

from src import models
from src.errors import UsageError
from src.evaluation.encoder import read_encoder
from src.methods.base import Method, Output
from src.reporting import curves
from src.reporting.rows import summarise
from src.runs import checkpoint
from src.runs import directory as run_directory
from src.runs.query import read_runs
from src.runs.record import Record
from src.support.kmeans import KMeans
from tests.conftest import CIFAR100, PROJECT
from tests.data.layouts import LAYOUTS, random_image, write_set
from tests.training.small_net import SMALL_NET
from tests.training.training_runs import ALL, METHODS, METRICS, OF_METHOD, history, trained_on


@pytest.mark.parametrize("method", OF_METHOD)
def test_a_run_leaves_what_it_promises(run, method, capsys):
    """A finished run has all its metrics, params, files and pictures, and prints its result."""
    directory = run(*ALL[method], "evaluation.pictures=true", draw=True, net=[])
    record = Record.load(directory)
    assert record.status == "FINISHED"
    assert record.metrics.keys() == METRICS | OF_METHOD[method]
    assert all(value == value for value in record.metrics.values())
    size = {"simclr": 0, "nnclr": 100, "kmclr": 7, "mnn": 100, "evolving": 12}[method]
    assert record.params["support_set_size"] == str(size)
    assert record.params["support_bytes"] == str(size * 16 * 4)
    parameters = sum(parameter.numel() for parameter in models.ResNetTiny("small").parameters())
    assert record.params["encoder_parameters"] == str(parameters)
    assert record.tags["config_hash"]
    assert "support_unused" not in record.tags
    figures = read_encoder(directory)[1]["figures"]
    assert figures == {key: record.metrics[key] for key in record.metrics if key.startswith(("val/", "test/"))}
    for name in ("config.yaml", "encoder.safetensors", "curves.png", "metrics.jsonl"):
        assert (directory / name).stat().st_size > 0
    drawn = {path.name for path in directory.glob("*.png")} - {"curves.png"}
    prototypes = {"prototypes.png"} if method in ("kmclr", "evolving") else set()
    assert drawn == ({"positives.png", "map.png"} | prototypes if size else set())
    assert {Path(name).name for name in record.artifacts if name.startswith("pictures/")} == {
        f"{name.removesuffix('.png')}-epoch-{epoch:04}.png" for name in drawn - {"map.png"} for epoch in (1, 2)
    }
    assert len(list((directory / "checkpoints").glob("*.pt"))) <= 2
    steps, _ = curves.read(directory)["train/loss"]
    assert steps == list(range(6))  # 2 epochs of 200 images in batches of 64
    finished, *pictures = capsys.readouterr().out.splitlines()[-2 - len(drawn) :]
    assert finished.startswith("run: finished; test/knn_top1 ")
    assert pictures == [f"picture: run/{name}" for name in sorted({*drawn, "curves.png"})]


def test_without_epochs_the_weights_of_init_are_evaluated_as_they_are(run):
    trained = run("method=simclr", directory="trained")
    (trained / "encoder.safetensors").rename("start.safetensors")
    given = run("method=simclr", "epochs=0", "init=start.safetensors", directory="given", draw=True)
    before, after = Record.load(trained).metrics, Record.load(given).metrics
    evaluated = {"val/knn_top1", "val/knn_k", "val/linear_top1", "val/effective_rank", "test/knn_top1", "test/knn_k"}
    evaluated |= {"test/linear_top1", "test/linear_top5"}
    assert after == {key: before[key] for key in evaluated}
    assert not (given / "curves.png").exists()
    (weights, _), (start, _) = read_encoder(given), read_encoder(Path("start.safetensors"))
    assert all(torch.equal(weights.state_dict()[name], tensor) for name, tensor in start.state_dict().items())
    (saved,) = (given / "checkpoints").glob("*.pt")
    assert saved.name == "step-00000000.pt"  # for python -m src.evaluate


def test_a_queue_of_none_stores_nothing(run):
    record = Record.load(run("method=nnclr", "queue_size=0"))
    assert record.metrics.keys() == METRICS | OF_METHOD["simclr"]
    assert record.params["support_set_size"] == record.params["support_bytes"] == "0"


def test_the_same_command_again_trains_nothing_and_reports(run, capsys):
    directory = run("method=simclr")
    before = (directory / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run("method=simclr")
    assert (directory / "metrics.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert "finished" in out
    assert "started" not in out


def test_final_trains_on_the_validation_images_too(run):
    directory = run("method=simclr", "data.limit=null", "data.final=true", "epochs=1")
    metrics = Record.load(directory).metrics
    assert not [key for key in metrics if key.startswith("val/")]
    assert metrics["test/linear_top1"] > 0
    assert max(step for _, step in history(directory)) == 1437 // 64


def test_the_original_protocol_and_timm_run_too(run):
    directory = run(
        "method=simclr", "epochs=1", "evaluation=original", "evaluation.epochs=1", "data.limit=128",
        "backbone=timm", "backbone.name=resnet10t", net=[],
    )  # fmt: skip
    assert 0 < Record.load(directory).metrics["test/linear_top1"] < 100


def test_another_configuration_in_the_same_directory_is_refused(run):
    run("method=kmclr", "k=7")
    with pytest.raises(UsageError, match="k was 7 and is 8"):
        run("method=kmclr", "k=8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_its_settings_and_its_images_wherever_they_lie(run, tmp_path, capsys, layout):
    a, b = (write_set(layout, tmp_path / name, seed) for seed, name in enumerate("ab"))
    assert trained_on(run, layout, a) == 1
    assert trained_on(run, layout, b) == 2
    capsys.readouterr()
    a = a.rename(tmp_path / "moved")
    assert trained_on(run, layout, a) == 2
    out = capsys.readouterr().out
    assert "finished" in out
    assert "started" not in out
    if layout == "image_folder":
        random_image(99).save(a / "train/a/new.png")
    else:
        shutil.copy(b / "train-0.parquet", a / "train-1.parquet")
    assert trained_on(run, layout, a) == 3

    trained_on(run, layout, b, "seed=8")
    experiment = Record.load(next((tmp_path / "multirun").iterdir())).experiment
    table, _ = summarise(read_runs(experiment, "jsonl"))
    assert sorted(len(row.runs) for row in table if row.method != "untrained") == [1, 1, 2]
    for directory in (tmp_path / "multirun").iterdir():
        fingerprint = Record.load(directory).params["data.fingerprint"]
        assert OmegaConf.load(directory / "config.yaml").data.fingerprint == fingerprint
        assert checkpoint.load_latest(directory / "checkpoints")[1]["config"]["data"]["fingerprint"] == fingerprint


def test_resume_never_starts_beside_what_is_there(run, tmp_path, capsys):
    run("method=simclr", "epochs=1")
    with pytest.raises(SystemExit):
        run("method=simclr", "epochs=1", "resume=never", "max_minutes=0.00001")
    assert "run.2: stopped at step 1; output_dir=run.2 resume=auto continues" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run.2")
    run("method=simclr", "epochs=1", "resume=never")
    assert Record.load(tmp_path / "run").run_id != Record.load(tmp_path / "run.2").run_id
    assert history(tmp_path / "run") == history(tmp_path / "run.2")


def test_a_directory_in_use_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UsageError, match="another process is using it"):
        run("method=simclr")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_system_metrics_without_psutil_are_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(UsageError, match=r"^tracking.system_metrics=true: needs psutil: pip install .*\[system\]'$"):
        run("method=simclr", "tracking=mlflow", "tracking.system_metrics=true")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_support_set_was_never_filled_is_not_reported_as_what_it_is_not(run, monkeypatch, caplog):
    """Reports leave it out. It may have a user's support set, of which nobody knows beforehand how it is filled."""
    monkeypatch.setattr(KMeans, "ready", property(lambda _: False))
    record = Record.load(run("method=kmclr", "k=7", "epochs=1"))
    assert "the support set was never filled, so reports leave the run out" in caplog.text
    rows, notes = summarise([record])
    assert rows == []
    assert notes == ["left out: run (its support set was never filled)"]


class Silent(Method):
    """A user's method that never uses its support set."""

    def forward(self, view1, view2):
        h = self.encoder(torch.cat([view1, view2]))
        z = self.projector(h)
        return Output(z.square().mean(), h.detach(), z.detach()[: len(view1)], None)


def test_a_method_that_does_not_say_whether_it_uses_its_support_set_is_warned_of(run, caplog):
    own = "+method._target_=tests.training.test_run.Silent"
    record = Record.load(run("method=nnclr", "queue_size=64", "epochs=1", own))
    assert "the method returned no ids: nothing tells whether it used its support set" in caplog.text
    assert "support_unused" not in record.tags


@pytest.mark.slow
def test_neither_mlflow_nor_faiss_is_needed(command, small, tmp_path):
    """A run trains where importing either of them fails."""
    for name in ("mlflow", "faiss"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    shadowed = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    run = [*small, "method=kmclr", "k=7", "epochs=1", "output_dir=run", "tracking=jsonl", "search=torch"]
    done = command("src.train", *run, environment=shadowed, anew=True)
    assert done.returncode == 0, done.stderr
    assert Record.load(tmp_path / "run").metrics.keys() >= METRICS


def test_without_mlflow_the_other_tracking_is_named_and_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="tracking=jsonl"):
        run("method=simclr", "tracking=mlflow")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.xdist_group("cifar")  # one worker runs all tests of this group, and decodes the images once
def test_real_images_and_mlflow(command, cache_dir, tmp_path, monkeypatch):
    """On CIFAR-100, every metric of KMCLR, which has the most, arrives in MLflow."""
    done = command(
        "src.train",
        *METHODS["kmclr"],
        f"data.root={CIFAR100}",
        f"data.cache_dir={cache_dir}",
        *SMALL_NET,
        "data.limit=500",
        "batch_size=100",
        "epochs=2",
        "evaluation.epochs=5",
        "tracking.experiment=cifar",
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (found,) = read_runs("cifar", "mlflow")
    assert found.status == "FINISHED"
    assert found.metrics.keys() == METRICS | OF_METHOD["kmclr"]
    assert found.params["support_set_size"] == "7"
