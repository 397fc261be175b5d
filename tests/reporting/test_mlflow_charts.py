"""The view of a sweep, which is saved as a tag; test_browser.py tests what MLflow's pages make of it."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.config.schema import Tracking
from src.reporting.mlflow_charts import (
    MAX_LEFT_OUT,
    OPENING,
    SweepCharts,
    describe_experiment,
    describe_sweep,
    show_sweep,
    sweep_view,
)
from src.reporting.rows import ACCURACY, summarise
from src.runs.mlflow_store import prepare
from src.runs.record import TAG_SUPPORT_UNUSED, Record
from src.runs.tracker import Tracker
from tests.made_up_runs import STUDY, run


def decode(view) -> tuple[dict, dict]:
    envelope = json.loads(view.value)
    return envelope, json.loads(envelope["state"])


@given(name=st.text(max_size=100), created=st.integers(0, 2**42))
def test_the_envelope_is_what_the_pages_ask_for(name, created):
    view = sweep_view("7", "abc", name, created, left_out=["f" * 32] * (MAX_LEFT_OUT + 1))
    envelope, _ = decode(view)
    assert (envelope["name"], envelope["createdAt"]) == (name, created)
    assert len(view.value) < 20000, "MLflow refuses a longer tag"


def test_the_link_names_the_tag():
    view = sweep_view("7", "abc", "sweep", 0)
    assert view.path.startswith("#/experiments/7/runs?")
    _, _, share_key = view.key.partition("mlflow.sharedViewState.")
    assert f"viewStateShareKey={share_key}&" in view.path
    assert sweep_view("7", "abd", "sweep", 0).key != view.key, "a sweep has its own view"


def test_every_chart_is_in_a_section_that_is_open():
    _, state = decode(sweep_view("7", "abc", "sweep", 0))
    shown = {section["uuid"] for section in state["compareRunSections"] if section["display"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == shown
    identities = [chart["uuid"] for chart in state["compareRunCharts"]]
    assert len(set(identities)) == len(identities)


def test_a_sweep_without_validation_images_has_no_empty_chart():
    _, state = decode(sweep_view("7", "abc", "sweep", 0, {ACCURACY, "train/loss"}))
    size, parallel, course = state["compareRunCharts"]
    assert size["yaxis"]["key"] == ACCURACY
    assert parallel["selectedMetrics"] == [ACCURACY]
    assert course["metricKey"] == "train/loss"
    assert state["orderByKey"] == f"metrics.`{ACCURACY}`"


def test_mlflow_takes_the_tag_and_its_filter_finds_the_jobs_best_first(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = Tracking("mlflow", "exp", 10)

    def log(name: str, tags: dict[str, str], accuracy: float, status: str = "FINISHED", **overridden: int) -> str:
        params = {"support_set_size": 0, "support_bytes": 0, "epochs": 1, "method.name": "simclr", "seed": accuracy}
        tracker = Tracker(tmp_path / name, config, params | overridden, tags)
        tracker.log({"val/linear_top1": accuracy, "test/linear_top1": 100 - accuracy}, 1)
        tracker.close(status)
        return tracker.run_id

    sweep, other = log("sweep", {}, 90), log("other", {}, 80)
    jobs = [log(f"job-{accuracy}", {"mlflow.parentRunId": sweep}, accuracy) for accuracy in (50, 60, 40)]
    log("stranger", {"mlflow.parentRunId": other}, 70)
    for status in ("FAILED", "KILLED"):  # such as one that has diverged, or was pruned
        log(f"job-{status}", {"mlflow.parentRunId": sweep}, 65, status)

    log("job-unused", {"mlflow.parentRunId": sweep, TAG_SUPPORT_UNUSED: "true"}, 75)
    for accuracy in (20, 30):  # the same job twice, by resume=never
        time.sleep(0.002)  # so that one started later
        jobs.append(log(f"job-{accuracy}", {"mlflow.parentRunId": sweep}, accuracy, seed=7))

    client = prepare()
    show_sweep(client, Record.load(tmp_path / "sweep"))
    experiment = client.get_experiment_by_name("exp")
    state = json.loads(json.loads(experiment.tags[f"mlflow.sharedViewState.{sweep}"])["state"])
    order = [f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"]
    found = client.search_runs([experiment.experiment_id], state["searchFilter"], order_by=order)
    assert [run.info.run_id for run in found] == [jobs[1], jobs[0], jobs[2], jobs[4]]


def test_a_sweep_is_described_by_its_table():
    text = describe_sweep("study", summarise(STUDY)[0])
    assert text.startswith(OPENING)
    assert "| NNCLR | 98,304 | 3 |" in text
    assert "in the sweep study: CIFAR-100, ResNet-18, 500 epochs, mean ± standard deviation over 3 seeds." in text
    assert "Best" not in text
    assert "\nBest: val/knn_top1 81.25 with k=268.\n" in describe_sweep(
        "s", summarise(STUDY)[0], "val/knn_top1 81.25 with k=268"
    )


def test_a_description_that_is_too_long_says_how_many_rows_it_leaves_out():
    many = [run("kmclr", k) for k in range(2, 300)]
    text = describe_sweep("many", summarise(many)[0])
    assert len(text) <= 8000, "MLflow cuts a longer one"
    shown = text.count("| KMCLR |")
    assert 50 < shown < len(many)
    assert f"{len(many) - shown} more rows are in the artifact table.md." in text


def test_the_first_paragraph_of_an_experiment_leads_to_the_newest_charts():
    text = describe_experiment([SweepCharts("new", "#/new", "| table |\n"), SweepCharts("old", "#/old", "| other |")])
    assert text.startswith(OPENING)
    assert text.split("\n\n")[0].endswith("[Charts of the newest sweep, new](#/new)")
    assert "| table |" in text
    assert "| other |" not in text
    assert "[old](#/old)" in text
