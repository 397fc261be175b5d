"""Reading runs and sweeps back from MLflow and from their folders."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from src.config.schema import Tracking
from src.errors import UsageError
from src.reporting import mlflow_charts, report
from src.runs import delivery, links, mlflow_store, query
from src.runs.delivery import catch_up, deliver
from src.runs.links import newest_charts
from src.runs.record import TAG_CHARTS, Record
from src.runs.tracker import Tracker
from src.training.run import say_result
from tests.stores import JSONL, MLFLOW, break_store


def test_both_back_ends_list_the_same_runs(client, tmp_path, monkeypatch):
    for i, status in enumerate(["FINISHED", "FAILED", "KILLED"]):
        tracker = Tracker(tmp_path / "multirun" / f"run{2 - i}", MLFLOW, {"k": i}, {"device": "cpu"})
        tracker.log({"val/knn_top1": 0.1 * i}, 7)
        tracker.close(status)
        time.sleep(0.002)  # they are listed by their start, in milliseconds
    Tracker(tmp_path / "multirun/sweep", MLFLOW, {}, {"sweep_id": "0a"}).close("FINISHED")  # not listed: no run
    Tracker(tmp_path / "multirun/other", Tracking("mlflow", "other", 10), {}, {}).close("FINISHED")
    search = type(client).search_runs
    monkeypatch.setattr(type(client), "search_runs", lambda *args, **kw: search(*args, **({"max_results": 2} | kw)))

    stored, local = query.read_runs("exp", "mlflow"), query.read_runs("exp", "jsonl")
    assert [run.name for run in stored] == ["run2", "run1", "run0"]
    for a, b in zip(stored, local, strict=True):
        for name in ("run_id", "name", "status", "params", "metrics", "directory", "start_time"):
            assert getattr(a, name) == getattr(b, name)
        assert b.tags.items() <= a.tags.items()

    for backend in ("mlflow", "jsonl"):
        with pytest.raises(UsageError, match=r"experiment=expp .*choose from .*exp, other"):
            query.read_runs("expp", backend)


def test_a_copy_of_a_runs_folder_is_no_second_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        tracker = Tracker(Path("multirun") / name, JSONL, {}, {})
        tracker.close("FINISHED")
        for copy in ("0", "z"):
            shutil.copytree(tracker.directory, Path("multirun") / f"{copy}-{name}")
        record = Record.load(tracker.directory)
        record.metrics["test/fewshot_1pct_top1"] = 9.0  # evaluated later, in the run's own folder
        record.save(tracker.directory)
        time.sleep(0.002)
    found = query.read_runs(JSONL.experiment, "jsonl")
    assert [run.directory.name for run in found] == ["b", "a"]
    assert all(run.metrics for run in found)


def test_a_folder_without_a_store_is_not_given_one_by_reading(fresh_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for read in (lambda: query.read_runs("exp", "mlflow"), lambda: query.find_run_directory("0" * 32)):
        with pytest.raises(UsageError, match="no MLflow store"):
            read()
    assert not list(tmp_path.iterdir())


def test_a_run_is_found_by_its_id(client, tmp_path, monkeypatch):
    directory = tmp_path / "multirun/a"
    tracker = Tracker(directory, MLFLOW, {}, {})
    tracker.close("FINISHED")
    for root in (Path("multirun"), Path("elsewhere")):  # found by its record, then by its tag in MLflow
        monkeypatch.setattr(query, "ROOT", root)
        assert query.find_run_directory(tracker.run_id).resolve() == directory.resolve()
    shutil.rmtree(directory)
    with pytest.raises(UsageError, match="has no folder here"):
        query.find_run_directory(tracker.run_id)
    foreign = client.create_run("0").info.run_id
    for run_id, reason in ((foreign, "has no folder here"), ("0" * 32, "not in MLflow"), ("../x", "not in MLflow")):
        with pytest.raises(UsageError, match=reason) as error:
            query.find_run_directory(run_id)
        assert "\n" not in str(error.value)


ASKING = {
    "an experiment": lambda: report.main(["experiment=exp"]),
    "a sweep": lambda: report.main(["sweep=0123abcd"]),
    "a run": lambda: query.find_run_directory("0" * 32),
    "delivery": lambda: delivery.main(mlflow_charts.publish_again, ["run"]),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_command_waits_for_no_store_that_opens_only_after_minutes(fresh_store, tmp_path, monkeypatch, ask):
    monkeypatch.chdir(tmp_path)
    Tracker(Path("run"), JSONL, {}, {}).close("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:it's-Xhunter2@127.0.0.1:9/db")
    monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 0.2)
    opens = threading.Event()
    monkeypatch.setattr("mlflow.MlflowClient", lambda _: opens.wait(600))
    with pytest.raises(UsageError, match=r"postgresql://.*gives no answer in \d+ s.*MLFLOW_TRACKING_URI") as error:
        ask()
    opens.set()
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("ask", list(ASKING.values())[:3], ids=list(ASKING)[:3])
@pytest.mark.parametrize("hangs", [True, False])
def test_a_store_that_opens_and_answers_no_request_is_one_line(client, monkeypatch, ask, hangs):
    requests = ("get_experiment_by_name", "search_experiments", "search_runs", "get_run")
    monkeypatch.setattr(mlflow_store, "existing", lambda: client)
    break_store(client, monkeypatch, *requests)
    answers = threading.Event()
    if hangs:
        monkeypatch.setattr(mlflow_store, "STORE_TIMEOUT_S", 0.2)
        for name in requests:
            monkeypatch.setattr(type(client), name, lambda *_, **__: answers.wait(600))
    with pytest.raises(UsageError, match="does not answer.*" + ("no answer in" if hangs else "store is down")):
        ask()
    answers.set()


def test_pages_that_repeat_themselves_come_to_an_end(client, tmp_path, monkeypatch):
    Tracker(tmp_path / "run", MLFLOW, {}, {}).close("FINISHED")
    search = type(client).search_runs

    def again(*arguments, **more):
        found = search(*arguments)
        found.token = "again"
        assert len(pages) < 9
        return pages.append(more) or found

    pages = []
    monkeypatch.setattr(type(client), "search_runs", again)
    assert {run.name for run in query.read_runs("exp", "mlflow")} == {"run"}
    assert pages == [{}, {"page_token": "again"}]


def test_of_many_experiments_all_are_known(client, tmp_path, monkeypatch):
    for place, name in enumerate(("first", "second", "third")):
        Tracker(tmp_path / name, Tracking("mlflow", name, 10), {}, {"sweep_id": f"{place:08}"}).close("FINISHED")
    search = type(client).search_experiments
    small = lambda *args, **kw: search(*args, **({"max_results": 1} | kw))  # noqa: E731
    monkeypatch.setattr(type(client), "search_experiments", small)
    for place in range(3):
        assert query.read_sweep(f"{place:08}", "mlflow") == (f"sweep-{place:08}", [])
    with pytest.raises(UsageError, match=r"choose from .*first, second, third"):
        query.read_runs("fourth", "mlflow")


def test_how_a_page_is_opened(monkeypatch):
    """A local store needs ``mlflow ui``, a server is named by its address, and no link shows a password."""
    for uri in ("", "sqlite:///mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert links.how_to_open("#/a") == "mlflow ui, then http://127.0.0.1:5000/#/a"
    for uri in ("https://mlflow.example/", "https://mlflow.example"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert links.how_to_open("#/a") == links.link_to("#/a") == "https://mlflow.example/#/a"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p@ss/word@host:5000/base/")
    assert "p@ss" not in links.how_to_open("#/a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p@ss@host:5000/base/")
    assert links.how_to_open("#/a") == "http://host:5000/base/#/a"


def test_a_run_has_a_page_where_mlflow_has_it_and_none_where_it_is_deleted(client, tmp_path, capsys):
    Tracker(tmp_path / "files", JSONL, {}, {}).close("FINISHED")
    assert links.page_of(Record.load(tmp_path / "files")) == ""
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    tracker.close("FINISHED")
    (found,) = client.search_runs([client.get_experiment_by_name(MLFLOW.experiment).experiment_id])
    page = f"#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}?workflowType=machine_learning"
    assert links.page_of(Record.load(tmp_path / "run")) == page

    client.delete_run(found.info.run_id)
    catch_up(tmp_path / "run", MLFLOW)
    assert links.page_of(Record.load(tmp_path / "run")) == ""
    deliver(tmp_path / "run", again=True)
    assert links.page_of(Record.load(tmp_path / "run")) == page
    say_result(tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[-1] == f"MLflow: mlflow ui, then http://127.0.0.1:5000/{page}"


def test_the_newest_sweeps_charts(tmp_path, monkeypatch):
    """`newest_charts` is the link to the charts of the newest sweep in a folder, or empty if there is none."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert newest_charts(tmp_path) == ""
    for name, at, tags in [("old", 1, {TAG_CHARTS: "#/old"}), ("new", 2, {TAG_CHARTS: "#/new"}), ("run", 3, {})]:
        (tmp_path / name).mkdir()
        record = Record.new(name, "study")
        record.start_time, record.tags = at, tags
        record.save(tmp_path / name)
    assert newest_charts(tmp_path) == "http://127.0.0.1:5000/#/new"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert newest_charts(tmp_path) == "https://mlflow.example/#/new"
