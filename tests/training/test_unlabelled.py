"""Images without labels can be trained on; what needs labels is left out, from the first line to the report."""

import json

import pytest

from src import cli
from src.runs.metrics_file import read_rows
from src.runs.record import METRICS, Record
from src.training.run import say_result
from tests.composing import composed
from tests.data.layouts import write_flat, write_folder

LABELS = ("knn", "linear", "online", "agreement", "purity", "nmi")


@pytest.mark.slow
def test_a_flat_folder_is_trained_on_and_reported(command, small, tmp_path):
    root = write_flat(tmp_path / "photos", 100)
    small = [each for each in small if not each.startswith("batch_size=")]  # the default is larger than the data set
    images = ["data=image_folder", f"data.root={root}", "data.limit=null", "tracking=jsonl", "output_dir=multirun/flat"]
    done = command("src.train", *small, *images, "method=nnclr", "queue_size=64", "evaluation.pictures=true")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no image has a label: accuracy, and whatever else needs labels, is left out") == 1
    assert done.stderr.count("batch_size=128: more than the 70 training images, so each step takes all of them") == 1
    assert "test images" not in done.stdout
    record = Record.load(tmp_path / "multirun/flat")
    assert record.params["batch_size"] == "70"
    assert max(row["step"] for row in read_rows(tmp_path / "multirun/flat" / METRICS)[0]) == 2, "an epoch is one step"
    metrics = record.metrics
    assert not [key for key in metrics if any(each in key for each in LABELS)]
    assert {"train/loss", "train/uniformity", "val/effective_rank", "support/self_hit"} <= metrics.keys()
    assert {"encoder.safetensors", "curves.png", "positives.png", "map.png"} <= {
        path.name for path in (tmp_path / "multirun/flat").iterdir()
    }

    report = command("src.report", "experiment=demo", "tracking=jsonl", "out=report")
    assert report.returncode == 0, report.stderr
    assert "| method | vectors | bytes | of largest queue | seeds |\n" in (tmp_path / "report/table.md").read_text()
    unmeasured = "val kNN, val linear top-1, test kNN, test linear top-1, test linear top-5"
    assert f"note: no run has {unmeasured}\n" in report.stdout
    (figures,) = json.loads((tmp_path / "report/table.json").read_text())["rows"]
    assert figures["test/linear_top1_mean"] is None

    refused = command("src.evaluate", "checkpoint=multirun/flat")
    assert refused.returncode == 2
    assert "no image has a label to evaluate with" in refused.stderr


def test_a_run_without_a_figure_to_say_is_finished_and_no_more(tmp_path, capsys):
    Record.new("run", "demo").save(tmp_path)
    say_result(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}: finished\n"


@pytest.mark.parametrize("method", [["method=kmclr", "k=5"], ["method=simclr"]])
def test_labelled_images_beside_them_are_for_the_probes(small, tmp_path, caplog, method):
    """With unlabelled training images, the probes learn from the labelled validation images."""
    root = write_folder(tmp_path / "photos", {"val/a": 20, "val/b": 20, "test/a": 10, "test/b": 10})
    write_flat(root / "train", 100)
    images = ["data=image_folder", f"data.root={root}", "data.limit=null", "data.image_size=8"]
    cli.pretrain(composed(*small, *images, *method, "tracking=jsonl", f"output_dir={tmp_path}/run"))
    assert caplog.text.count("the probes learn from the split validation") == 1
    metrics = Record.load(tmp_path / "run").metrics
    assert {"val/knn_top1", "val/linear_top1", "test/knn_top1", "test/linear_top1"} <= metrics.keys()
    assert not [key for key in metrics if any(each in key for each in ("online", "agreement", "purity", "nmi"))]
