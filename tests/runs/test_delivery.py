"""Delivery of long runs: rows are sent in blocks, each row once, and an attempt goes on where the last one ended."""

import json

import pytest

from src.config.schema import Tracking
from src.errors import UsageError
from src.runs import delivery, metrics_file, mlflow_store, record
from src.runs.record import Record
from src.runs.tracker import Tracker
from tests.stores import MLFLOW, break_store, history, rows, train, warnings

OTHER = Tracking("mlflow", "other", 10)


class Counting:
    """What the store has been sent, and how many more values it takes before it fails."""

    def __init__(self):
        self.sent, self.takes = [], 10_000


@pytest.fixture
def counting(client, monkeypatch):
    """Counts what is given to the client's `log_batch`; a block is about one row."""
    counting, log_batch = Counting(), type(client).log_batch

    def count(self, run_id, metrics=(), **more):
        if len(metrics) > counting.takes:
            raise TimeoutError("the store takes no more")
        counting.takes -= len(metrics)
        counting.sent += [(run_id, each.key, each.step) for each in metrics]
        return log_batch(self, run_id, metrics, **more)

    monkeypatch.setattr(type(client), "log_batch", count)
    monkeypatch.setattr(metrics_file, "BLOCK_BYTES", 1)
    return counting


def waiting(client, monkeypatch, directory, steps=20, configs=(MLFLOW,)):
    """Leave a run of which MLflow has nothing yet; returns the steps of its rows."""
    with monkeypatch.context() as patch:
        break_store(client, patch, "search_runs", "create_run", "log_batch")
        for config in configs:
            train(tracker := Tracker(directory, config, {"k": 50}, {}), range(steps))
            tracker.close("KILLED")
    return [step for step in range(steps) if step % 3 == 0]


def test_attempts_that_run_out_of_time_deliver_all_of_a_long_run_and_no_row_twice(
    client, counting, tmp_path, monkeypatch
):
    steps = waiting(client, monkeypatch, tmp_path / "run", configs=(MLFLOW, OTHER))
    for counting.takes in [4] * 6:  # rows have two values and one value in turn
        with pytest.raises(UsageError, match="the store takes no more"):
            delivery.deliver(tmp_path / "run")
    counting.takes = 4
    delivery.deliver(tmp_path / "run")
    assert len(counting.sent) == len(set(counting.sent)) == 2 * (len(steps) + len(steps[::2]))
    for entry in Record.load(tmp_path / "run").copies.values():
        assert [step for step, _ in history(client, entry.run_id, "train/loss")] == steps
        assert client.get_run(entry.run_id).info.status == "KILLED"


def test_a_deadline_is_for_a_block_and_what_is_there_by_then_is_written_down(client, counting, tmp_path, monkeypatch):
    """The store's timeout holds for each block of rows; the record notes how far delivery came after each block."""
    steps = waiting(client, monkeypatch, tmp_path / "run")
    noted = []

    def within(seconds, step):
        noted.append((Record.load(tmp_path / "run").entry.rows or [0])[0])
        return step()

    monkeypatch.setattr(mlflow_store, "within", within)
    delivery.deliver(tmp_path / "run")
    ends = [0]
    for line in (tmp_path / "run/metrics.jsonl").read_bytes().splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    assert len(ends) == 1 + len(steps)
    assert sorted(set(noted)) == ends


def test_a_run_that_is_continued_sends_what_is_new(counting, tmp_path):
    for steps in (range(20), range(40)):
        counting.sent.clear()
        train(tracker := Tracker(tmp_path / "run", MLFLOW, {}, {}), steps)
        tracker.close("KILLED")
    assert {step for _, _, step in counting.sent} == set(range(21, 40, 3))


def cut(path):
    """Lose all rows but three; the continued run then logs more rows than there were."""
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:3]))


def edit(path):
    path.write_bytes(path.read_bytes().replace(b'"step": 3,', b'"step": 4,'))


@pytest.mark.parametrize("change", [cut, edit])
def test_rows_that_have_been_cut_or_changed_since_are_sent_from_the_first_on(client, counting, tmp_path, change):
    train(Tracker(tmp_path / "run", MLFLOW, {}, {}), range(20))
    train(tracker := Tracker(tmp_path / "run", MLFLOW, {}, {}), range(0))
    tracker.close("KILLED")
    change(tmp_path / "run/metrics.jsonl")
    counting.sent.clear()
    train(tracker := Tracker(tmp_path / "run", MLFLOW, {}, {}), range(40))
    tracker.close("FINISHED")
    there = {(key, row["step"]) for row in rows(tmp_path / "run") for key in row["metrics"]}
    assert {(key, step) for _, key, step in counting.sent} == there
    assert set(range(0, 40, 3)) <= {step for step, _ in history(client, tracker.run_id, "train/loss")}


def test_a_row_whose_newline_a_kill_cut_off_is_sent_once(client, counting, tmp_path):
    train(Tracker(tmp_path / "run", MLFLOW, {}, {}), range(10))
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    delivery.deliver(tmp_path / "run")
    train(tracker := Tracker(tmp_path / "run", MLFLOW, {}, {}), range(20))
    tracker.close("FINISHED")
    assert len(counting.sent) == len(set(counting.sent))
    assert [step for step, _ in history(client, tracker.run_id, "train/loss")] == list(range(0, 20, 3))


def forget(client, directory):
    """Remove the progress of the delivery, which an earlier version did not note, from the record."""
    values = json.loads((directory / "run.json").read_text())
    for entry in values["copies"].values():
        del entry["rows"]
    (directory / "run.json").write_text(json.dumps(values | {"status": "FAILED"}))


def delete(client, directory):
    client.delete_run(Record.load(directory).run_id)


@pytest.mark.parametrize(("before", "again"), [(forget, False), (delete, True), (lambda *_: None, True)])
def test_where_progress_is_not_known_or_all_is_asked_for_all_is_sent(client, counting, tmp_path, before, again):
    train(tracker := Tracker(tmp_path / "run", MLFLOW, {}, {}), range(20))
    tracker.close("KILLED")
    whole = set(counting.sent)
    before(client, tmp_path / "run")
    counting.sent.clear()
    delivery.deliver(tmp_path / "run", again=again)
    assert set(counting.sent) == whole


def test_a_run_that_was_deleted_and_is_continued_is_sent_whole(client, counting, tmp_path):
    for steps in (range(20), range(0)):
        counting.sent.clear()
        train(tracker := Tracker(tmp_path / "run", MLFLOW, {}, {}), steps)
        tracker.close("KILLED")
        delete(client, tmp_path / "run")
    assert {step for _, _, step in counting.sent} == set(range(0, 20, 3))


def test_a_run_of_a_sweep_that_the_store_does_not_take_keeps_no_other_back(
    client, counting, tmp_path, monkeypatch, caplog
):
    jobs = [tmp_path / name for name in ("a", "b", "c")]
    for job in jobs:
        waiting(client, monkeypatch, job, steps=5)
    sweep = Tracker(tmp_path / "sweep", MLFLOW, {"sweep": "grid"}, {"sweep_id": "0a"})
    (jobs[0] / "link").symlink_to("/etc/hostname")
    refused = Record.load(jobs[0])
    refused.artifacts.append("link")
    refused.save(jobs[0])
    caplog.clear()
    delivery.attach_children(sweep, jobs)
    (warning,) = warnings(caplog)
    assert f"MLflow could not be told which runs belong to {sweep.directory}: " in warning
    for job in jobs[1:]:
        assert client.get_run(Record.load(job).run_id).data.tags["mlflow.parentRunId"] == sweep.run_id


def test_a_store_that_takes_no_run_of_a_sweep_is_not_asked_for_each(client, tmp_path, monkeypatch, caplog):
    jobs = [tmp_path / name for name in ("a", "b", "c", "d", "e")]
    for job in jobs:
        waiting(client, monkeypatch, job, steps=5)
    sweep = Tracker(tmp_path / "sweep", MLFLOW, {"sweep": "grid"}, {"sweep_id": "0a"})
    break_store(client, monkeypatch, "log_batch")
    caplog.clear()
    delivery.attach_children(sweep, jobs)
    assert len([each for each in warnings(caplog) if "which runs belong to" in each]) == delivery.MAX_FAILURES


def test_a_flush_looks_only_at_the_artifacts_that_are_not_there_yet(client, tmp_path, monkeypatch):
    looks, lexists = [], record.os.path.lexists
    tracker = Tracker(tmp_path / "run", MLFLOW, {}, {})
    monkeypatch.setattr(record.os.path, "lexists", lambda path: looks.append(str(path)) or lexists(path))
    for number in range(5):
        (tmp_path / f"run/{number}.png").touch()
        tracker.artifact(tmp_path / f"run/{number}.png")
        tracker.flush()
    pictures = [path for path in looks if path.endswith(".png")]
    assert sorted(pictures) == [str(tmp_path / f"run/{number}.png") for number in range(5)]
    assert len(client.list_artifacts(tracker.run_id)) == 5
    tracker.close("FINISHED")
