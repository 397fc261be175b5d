"""A run is delivered to each MLflow experiment that requests it, also after experiments were renamed or deleted."""

import json
import shutil
import time

import pytest

from src.config.identity import LOG_SIZE
from src.config.schema import Tracking
from src.errors import UsageError
from src.reporting import mlflow_charts
from src.reporting.comparison import compared_settings
from src.runs import delivery, mlflow_store, query
from src.runs.record import TAG_CHARTS, TAG_NOTE, Record
from src.runs.tracker import Tracker
from tests.stores import JSONL, MLFLOW, break_store, history, train, warnings

OTHER = Tracking("mlflow", "other", 10)
STEPS = [0, 3, 6, 9]
NAMED = "MLflow no longer has {} (deleted, or another store); deliver again with: python -m src.tracking"


def ended(directory, config=MLFLOW, status="FINISHED", tags=None):
    """Train, or continue, a run of ten steps and close it; returns its id."""
    train(tracker := Tracker(directory, config, {"k": 50}, tags or {}), range(10))
    tracker.close(status)
    return tracker.run_id


def listed(client, experiment):
    """{name: (status, steps)} of every run that an experiment shows."""
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {
        run.info.run_name: (run.info.status, [step for step, _ in history(client, run.info.run_id, "train/loss")])
        for run in found
    }


def rename(client, old, new):
    client.rename_experiment(client.get_experiment_by_name(old).experiment_id, new)


@pytest.mark.parametrize("before", [MLFLOW, JSONL])
def test_a_finished_run_is_delivered_to_the_experiment_that_it_is_asked_for_under(client, tmp_path, before):
    directory = tmp_path / "multirun/run"
    first = ended(directory, before)
    for _ in range(2):
        delivery.catch_up(directory, OTHER)
        assert listed(client, "other") == {"run": ("FINISHED", STEPS)}
    for backend in ("mlflow", "jsonl"):
        assert [run.run_id for run in query.read_runs("other", backend)] == [Record.load(directory).run_id]
        if (backend, before) != ("mlflow", JSONL):
            assert [run.run_id for run in query.read_runs("exp", backend)] == [first]
    assert query.find_run_directory(first) == query.find_run_directory(Record.load(directory).run_id)


def test_without_mlflow_a_finished_run_is_listed_under_the_experiment_that_it_is_asked_for_under(
    client, tmp_path, monkeypatch
):
    directory = tmp_path / "multirun/run"
    ended(directory, JSONL)
    monkeypatch.setattr(mlflow_store, "prepare", lambda *_: pytest.fail("nobody asked for MLflow"))
    delivery.catch_up(directory, Tracking("jsonl", "other", 10))
    assert len(query.read_runs("other", "jsonl")) == len(query.read_runs("exp", "jsonl")) == 1
    delivery.main(mlflow_charts.publish_again, [])


def test_where_mlflow_is_away_the_other_experiment_waits(client, tmp_path, monkeypatch, caplog, capsys):
    directory = tmp_path / "multirun/run"
    ended(directory)
    with monkeypatch.context() as patch:
        break_store(client, patch, "log_batch")
        delivery.catch_up(directory, OTHER)
    assert "try again later" in warnings(caplog)[0]
    delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out.count("delivered as run") == 1
    assert listed(client, "other") == listed(client, "exp") == {"run": ("FINISHED", STEPS)}


def test_a_run_is_continued_wherever_its_experiment_has_been_renamed_to(client, tmp_path):
    directory = tmp_path / "run"
    first = ended(directory, status="KILLED")
    rename(client, "exp", "renamed")
    assert ended(directory) == first
    delivery.catch_up(directory, MLFLOW)
    assert delivery.deliver(directory, again=True).run_ids == [first]
    assert listed(client, "renamed") == {"run": ("FINISHED", STEPS)}
    assert client.get_experiment_by_name("exp") is None
    delivery.catch_up(directory, Tracking("mlflow", "renamed", 10))
    assert Record.load(directory).run_id == first, "it is asked for by the new name too"


@pytest.mark.parametrize("status", ["FINISHED", "KILLED"])
def test_a_new_experiment_of_the_old_name_gets_the_run_too(client, tmp_path, status):
    directory = tmp_path / "run"
    first = ended(directory, status=status, tags={"device": "cpu"})
    rename(client, "exp", "renamed")
    ended(tmp_path / "stranger")  # creates a new experiment of the old name
    if status == "KILLED":
        assert ended(directory) != first
    else:
        delivery.catch_up(directory, MLFLOW)
    assert listed(client, "exp") == {"run": ("FINISHED", STEPS), "stranger": ("FINISHED", STEPS)}
    assert listed(client, "renamed") == {"run": ("FINISHED", STEPS)}


def test_a_run_that_is_continued_under_another_experiment_ends_in_both(client, tmp_path):
    directory = tmp_path / "run"
    first = ended(directory, status="KILLED")
    train(resumed := Tracker(directory, OTHER, {}, {}), range(20))
    assert client.get_run(first).info.status == "KILLED"
    resumed.close("FINISHED")
    for experiment in ("exp", "other"):
        assert listed(client, experiment) == {"run": ("FINISHED", [*STEPS, 12, 15, 18])}
    client.delete_run(first)
    ended(directory, OTHER)
    assert listed(client, "exp") == {}, "what was deleted elsewhere stays so"


def test_a_deleted_run_is_named_and_its_folder_brings_it_back(client, tmp_path, caplog, capsys):
    directory, waiting = tmp_path / "multirun/run", tmp_path / "multirun/waiting"
    run_id = ended(directory)
    client.delete_run(run_id)
    client.delete_run(ended(waiting, status="KILLED"))
    record = Record.load(waiting)
    record.close("FAILED", "and MLflow was not told")
    record.save(waiting)

    delivery.catch_up(directory, MLFLOW)
    assert warnings(caplog) == [f"{NAMED.format('this run')} {directory}"]
    delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out == f"{NAMED.format('2 runs')} multirun/run multirun/waiting\n"
    assert listed(client, "exp") == {}

    delivery.main(mlflow_charts.publish_again, ["run", "multirun/waiting"])  # by name, or by folder
    assert f"multirun/run: delivered as run {run_id}\n" in capsys.readouterr().out
    assert listed(client, "exp") == {"run": ("FINISHED", STEPS), "waiting": ("FAILED", STEPS)}
    delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out == "nothing waits to be delivered\n"


def test_a_deleted_run_that_is_continued_is_restored(client, tmp_path):
    client.delete_run(run_id := ended(tmp_path / "run", status="KILLED"))
    assert ended(tmp_path / "run") == run_id
    assert listed(client, "exp") == {"run": ("FINISHED", STEPS)}


def test_runs_of_a_store_that_is_gone_are_named_and_not_all_delivered_to_the_next(
    client, fresh_store, tmp_path, monkeypatch, capsys
):
    run_id = ended(tmp_path / "multirun/run", status="KILLED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    shutil.copy(fresh_store, tmp_path / "other.db")
    delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out.endswith("python -m src.tracking multirun/run\n")
    delivery.main(mlflow_charts.publish_again, ["multirun/run"])
    assert listed(mlflow_store.prepare(), "exp") == {"run": ("KILLED", STEPS)}
    assert Record.load(tmp_path / "multirun/run").run_id != run_id
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert ended(tmp_path / "multirun/run") == run_id
    assert listed(client, "exp") == {"run": ("FINISHED", STEPS)}


def test_a_deleted_experiment_keeps_no_other_run_waiting(client, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_store(client, patch, "log_batch")
        ended(tmp_path / "multirun/a")
        ended(tmp_path / "multirun/b", OTHER)
    client.delete_experiment(client.get_experiment_by_name("exp").experiment_id)
    delivery.main(mlflow_charts.publish_again, [])
    delivered, deleted = capsys.readouterr().out.splitlines()
    assert delivered.startswith("multirun/b: delivered")
    assert deleted.endswith("python -m src.tracking multirun/a")
    with pytest.raises(UsageError, match=r"^the experiment 'exp' has been deleted .*mlflow experiments restore -x \d"):
        delivery.main(mlflow_charts.publish_again, ["multirun/a"])


def sweep_under(config, directory, children, note=""):
    sweep = Tracker(directory, config, {"sweep": "grid"}, {"sweep_id": directory.name})
    delivery.attach_children(sweep, children)
    sweep.record.tags |= {TAG_NOTE: note} if note else {}
    mlflow_charts.publish(sweep)
    sweep.close("FINISHED")
    return sweep.run_id, sweep.record.tags.get(TAG_CHARTS)


def described(client):
    return client.get_experiment_by_name("exp").tags.get(TAG_NOTE)


def test_an_experiment_is_described_by_its_sweeps_the_newest_first(client, tmp_path):
    one, two = tmp_path / "multirun/0a", tmp_path / "multirun/0b"
    _, old = sweep_under(MLFLOW, one, [], "the old table")
    assert f"[Charts of the newest sweep, 0a]({old})\n\nthe old table" in described(client)
    time.sleep(0.01)
    _, new = sweep_under(MLFLOW, two, [], "the new table")
    text = described(client)
    assert f"[Charts of the newest sweep, 0b]({new})\n\nthe new table" in text
    assert f"[0a]({old})" in text
    assert "the old table" not in text

    delivery.main(mlflow_charts.publish_again, [str(one)])
    assert described(client) == text, "an older sweep that is delivered again is not the newest"
    home = client.get_experiment_by_name("exp").experiment_id
    client.set_experiment_tag(home, TAG_NOTE, "somebody's own")
    delivery.main(mlflow_charts.publish_again, [str(two)])
    assert described(client) == "somebody's own"


def test_a_sweep_of_jsonl_that_is_delivered_later_has_its_charts(client, tmp_path):
    directory = tmp_path / "multirun/0a"
    assert sweep_under(JSONL, directory, [], "the table")[1] is None
    assert client.get_experiment_by_name("exp") is None
    for _ in range(2):
        delivery.main(mlflow_charts.publish_again, [str(directory)])
        record = Record.load(directory)
        assert f"]({record.tags[TAG_CHARTS]})\n\nthe table" in described(client)
        assert client.get_run(record.run_id).data.tags[TAG_CHARTS] == record.tags[TAG_CHARTS]
        assert client.get_run(record.run_id).info.status == "FINISHED"


def test_a_sweeps_charts_are_of_what_its_jobs_have_measured(client, tmp_path):
    """A job that has not finished in MLflow does not count, because figures of it may be on their way."""
    job = tmp_path / "multirun/job"
    for status, drawn in (("KILLED", "val/knn_top1"), ("FINISHED", "train/loss")):
        ended(job, status=status)  # has a loss and no accuracy
        run_id, _ = sweep_under(MLFLOW, tmp_path / "multirun/0a", [job])
        view = client.get_experiment_by_name("exp").tags[f"mlflow.sharedViewState.{run_id}"]
        charts = json.loads(json.loads(view)["state"])["compareRunCharts"]
        assert [chart["metricKey"] for chart in charts if chart["type"] == "LINE"] == [drawn]


def test_a_view_that_the_store_did_not_take_is_made_by_the_next_delivery(client, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        break_store(client, patch, "set_experiment_tag")
        assert sweep_under(MLFLOW, tmp_path / "multirun/0a", [], "the table")[1] is None
    assert "MLflow does not take the view" in warnings(caplog)[0]
    assert described(client) is None
    delivery.main(mlflow_charts.publish_again, [])
    assert "the table" in described(client)
    again = Record.load(tmp_path / "multirun/0a")
    delivery.main(mlflow_charts.publish_again, [])
    assert Record.load(tmp_path / "multirun/0a") == again


@pytest.mark.parametrize(("size", "shown"), [(0, "0.000"), (1, "0.000"), (400, "2.602"), (98304, "4.993")])
def test_mlflow_is_told_the_logarithm_of_the_size_and_a_report_ignores_it(client, tmp_path, size, shown):
    run = Tracker(tmp_path / "run", MLFLOW, {"support_set_size": size}, {})
    run.close("FINISHED")
    assert client.get_run(run.run_id).data.params[LOG_SIZE] == shown
    assert LOG_SIZE not in Record.load(tmp_path / "run").params
    assert LOG_SIZE not in compared_settings(query.read_runs("exp", "mlflow")[0])


def nested(client, experiment, parent):
    found = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([found], f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(run.info.run_name for run in runs)


def test_a_sweep_shows_finished_jobs_of_other_experiments_and_takes_them_from_none(client, tmp_path, caplog):
    jobs = [tmp_path / "multirun" / name for name in ("a", "b")]
    for job in jobs:
        ended(job)
    one, _ = sweep_under(MLFLOW, tmp_path / "multirun/0a", jobs)
    two, _ = sweep_under(OTHER, tmp_path / "multirun/0b", jobs)
    assert nested(client, "exp", one) == nested(client, "other", two) == ["a", "b"]
    assert listed(client, "other").keys() == {"0b", "a", "b"}
    for backend in ("mlflow", "jsonl"):
        for name in ("0a", "0b"):
            assert [run.name for run in query.read_sweep(name, backend)[1]] == ["a", "b"]

    client.delete_run(Record.load(jobs[0]).run_id)
    sweep_under(OTHER, tmp_path / "multirun/0b", jobs)
    assert warnings(caplog) == [f"{NAMED.format('this run')} {jobs[0]}"]
    delivery.deliver(jobs[0], again=True)
    assert nested(client, "exp", one) == nested(client, "other", two) == ["a", "b"]


def test_a_sweeps_new_jobs_are_where_its_experiment_was_renamed_to(client, tmp_path):
    jobs = [tmp_path / "multirun" / name for name in ("a", "b")]
    ended(jobs[0])
    sweep, _ = sweep_under(MLFLOW, tmp_path / "multirun/0a", jobs[:1])
    rename(client, "exp", "renamed")
    ended(jobs[1], Tracking("mlflow", "exp", 10, parent=str(tmp_path / "multirun/0a")))
    again, path = sweep_under(MLFLOW, tmp_path / "multirun/0a", jobs)
    assert again == sweep
    assert f"/{client.get_experiment_by_name('renamed').experiment_id}/" in path
    assert nested(client, "renamed", sweep) == ["a", "b"]
    assert client.get_experiment_by_name("exp") is None


def test_a_job_with_an_experiment_of_its_own_is_there_and_in_the_sweeps(client, tmp_path):
    """An experiment that MLflow does not have yet is not taken for the sweep's under a former name."""
    job, sweep = tmp_path / "multirun/a", tmp_path / "multirun/0a"
    sweep_under(MLFLOW, sweep, [])
    ended(job, Tracking("mlflow", "other", 10, parent=str(sweep)))
    run_id, _ = sweep_under(MLFLOW, sweep, [job])
    assert listed(client, "other").keys() == {"a"}
    assert nested(client, "exp", run_id) == ["a"]
    for backend in ("mlflow", "jsonl"):
        assert [run.name for run in query.read_runs("other", backend)] == ["a"]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_record_from_when_a_run_had_one_experiment_is_read(client, tmp_path, missing, capsys):
    directory = tmp_path / "multirun/run"
    run_id = ended(directory, tags={"device": "cpu"})
    values = json.loads((directory / "run.json").read_text())
    del values["copies"]
    values["tags"] |= {"sweep.0a": "true", "mlflow.parentRunId": "0" * 32}
    values |= {"run_id": run_id, "for_mlflow": True, "delivered_status": "FINISHED", "delivered_artifacts": 0}
    values |= {"delivered_bytes": (directory / "metrics.jsonl").stat().st_size - missing, "of_the_future": 1}
    (directory / "run.json").write_text(json.dumps(values))

    record = Record.load(directory)
    assert record.run_id == run_id
    assert record.tags == {"device": "cpu", "output_dir": str(directory)}
    delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out.count("delivered as run") == missing
    delivery.main(mlflow_charts.publish_again, [])
    assert capsys.readouterr().out == "nothing waits to be delivered\n"
    assert [run.name for run in query.read_runs("exp", "jsonl")] == ["run"]
    assert client.get_run(run_id).data.tags.get("sweep.0a") == ("true" if missing else None)


@pytest.mark.slow
def test_finished_under_another_name_of_the_experiment_as_a_user_sees_it(client, command, small, tmp_path):
    """A finished run is shown in another experiment when its command, or a sweep, names that experiment."""
    arguments = [*small, "k=7", "schedule.warmup_epochs=0"]
    assert command("src.train", *arguments).returncode == 0
    again = command("src.train", *arguments, "tracking.experiment=other")
    assert (again.returncode, again.stderr) == (0, "")
    for backend in ("mlflow", "jsonl"):
        assert len(query.read_runs("other", backend)) == 1
    swept = command("src.train", "--multirun", *arguments, "tracking.experiment=third")
    assert (swept.returncode, swept.stderr) == (0, "")
    (sweep,) = (tmp_path / "multirun").glob("sweep-*")
    (job,) = query.read_runs("third", "mlflow")
    assert job.tags["mlflow.parentRunId"] == Record.load(sweep).run_id


@pytest.mark.parametrize(
    ("params", "kind", "where"),
    [
        ({"data.root": "photos"}, "local", {"uri": "photos"}),
        ({"data.repo": "a/b", "data.revision": "v2"}, "hugging_face", {"path": "a/b", "revision": "v2"}),
        ({}, "code", {"tags": {"mlflow.source.name": "cifar100"}}),
        ({"data._target_": "mine.images"}, "code", {"tags": {"mlflow.source.name": "mine.images"}}),
    ],
)
def test_the_data_set_is_an_input_of_the_run_once(client, tmp_path, params, kind, where):
    mlflow = pytest.importorskip("mlflow")
    params |= {"data.name": "cifar100", "data.fingerprint": "abc123"}
    run = Tracker(tmp_path / "run", MLFLOW, params, {})
    run.close("FINISHED")
    delivery.main(mlflow_charts.publish_again, [str(tmp_path / "run")])
    (found,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest, found.dataset.source_type) == ("cifar100", "abc123", kind)
    assert where.items() <= mlflow.data.get_source(found.dataset).to_dict().items()
    other = Tracker(tmp_path / "other", MLFLOW, {"data.name": "cifar100"}, {})
    other.close("FINISHED")
    assert not client.get_run(other.run_id).inputs.dataset_inputs
