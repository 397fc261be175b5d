"""The files of a run, its record and its rows: what is read back after kills, damage and edits."""

import hashlib
import json
import math
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UsageError
from src.runs import metrics_file, query, record
from src.runs.metrics_file import begins_with, digest_of, read_blocks, read_rows
from src.runs.record import Record
from src.runs.tracker import Tracker
from tests.stores import JSONL, rows, train


def test_rows_and_record(tmp_path):
    """These are the contents of ``metrics.jsonl`` and ``run.json``."""
    before = time.time_ns() // 1_000_000
    tracker = Tracker(tmp_path, JSONL, {"k": 50, "projector.hidden": [64, 64]}, {"device": "cpu"})
    tracker.log({"train/loss": 2.0}, 0)
    tracker.log({"train/loss": 1.5, "train/lr": 0.1}, 10)
    assert [(row["step"], row["metrics"]) for row in rows(tmp_path)] == [
        (0, {"train/loss": 2.0}),
        (10, {"train/loss": 1.5, "train/lr": 0.1}),
    ], "a row is in the file before it is flushed: a kill loses none"
    tracker.close("FINISHED")
    after = time.time_ns() // 1_000_000

    record = json.loads((tmp_path / "run.json").read_text())
    assert record["uuid"] == tracker.run_id
    assert record["copies"]["exp"] == {
        "run_id": "",
        "has": "",
        "tags": {},
        "for_mlflow": False,
        "experiment_id": "",
        "rows": None,
    }
    assert (record["name"], record["experiment"], record["status"]) == (tmp_path.name, "exp", "FINISHED")
    assert record["params"] == {"k": "50", "projector.hidden": "[64, 64]"}
    assert record["tags"] == {"device": "cpu", "output_dir": str(tmp_path.resolve())}
    assert record["metrics"] == {"train/loss": 1.5, "train/lr": 0.1}
    assert before <= record["start_time"] <= rows(tmp_path)[0]["time"] <= record["end_time"] <= after


@given(value=st.floats())
def test_every_number_comes_back(tmp_path_factory, value):
    directory = tmp_path_factory.mktemp("floats")
    tracker = Tracker(directory, JSONL, {}, {})
    tracker.log({"x": value}, 0)
    tracker.close("FAILED")
    strict = json.loads((directory / record.METRICS).read_text(), parse_constant=pytest.fail)
    (run,) = query.read_runs("exp", "jsonl", directory)
    for read in (float(strict["metrics"]["x"]), run.metrics["x"]):
        assert read == value or (math.isnan(read) and math.isnan(value))


@given(data=st.data())
def test_killed_anywhere_and_resumed_from_any_checkpoint_the_rows_are_those_of_one_run(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("kill")
    tracker = Tracker(directory, JSONL, {}, {})
    train(tracker, range(40))
    tracker.flush()  # and no close: it is killed
    whole = [(row["step"], row["metrics"]) for row in rows(directory)]

    path = directory / record.METRICS
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size), label="bytes written before the kill"))
    logged = path.read_bytes().count(b"\n")
    checkpoint = data.draw(st.integers(0, 3 * logged), label="the step to go on from")
    resumed = Tracker(directory, JSONL, {}, {})
    train(resumed, range(checkpoint, 40))
    resumed.close("FINISHED")

    assert [(row["step"], row["metrics"]) for row in rows(directory)] == whole
    assert resumed.run_id == tracker.run_id
    assert resumed.record.name == directory.name


def finished(folder):
    tracker = Tracker(folder, JSONL, {"k": 50}, {})
    tracker.log({"train/loss": 2.0}, 0)
    tracker.close("FINISHED")
    return folder


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 600


STRANGE = [
    None,
    [],
    {},
    "text",
    -1,
    True,
    math.nan,
    math.inf,
    10**400,
    "../../x",
    "/etc/hostname",
    "\0",
    ["/x"],
    [None],
]
NOT_JSON = [
    b"",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"null",
    b"{}",
    b'{"uuid": 1, "colour": "red"}',
    b"NaN",
]


@pytest.mark.parametrize("content", NOT_JSON)
def test_a_foreign_record_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"run\.json is not the record of a run .*: move it away, or name another folder"
    ) as error:
        Tracker(tmp_path, JSONL, {}, {})
    assert one_line(error)


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
@pytest.mark.parametrize("old", [False, True])
def test_a_record_with_something_else_in_a_place_is_read_or_named(tmp_path, strange, old):
    """A strange value in any field of a record is read, or refused in one line."""
    content = json.loads((finished(tmp_path) / "run.json").read_text())
    if old:
        del content["copies"]
        content |= {"run_id": "", "for_mlflow": True, "delivered_status": "FINISHED"}
        content |= {"delivered_bytes": 0, "delivered_artifacts": 0}
    for key in content:
        (tmp_path / "run.json").write_text(json.dumps(content | {key: strange}))
        try:
            read = Record.load(tmp_path)
        except UsageError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1  # to read the record would be as good
            continue
        read.state(read.experiment)
        read.save(tmp_path)
        assert Record.load(tmp_path) == read


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    """A pipe or a folder in the place of a run's file is refused; reading a pipe would wait for ever."""
    for name in ("run.json", "metrics.jsonl"):
        folder = finished(tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UsageError, match=f"{name}.* regular file"):
            Tracker(folder, JSONL, {}, {})
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(UsageError, match=name):
            Tracker(folder, JSONL, {}, {})


def test_rows_that_are_a_link_are_left_alone(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("no newline")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(notes)
    with pytest.raises(UsageError, match="is a link"):
        Tracker(tmp_path / "run", JSONL, {}, {})
    assert notes.read_text() == "no newline"


@pytest.mark.parametrize("row", ["{}", "[]", "text", "null", "1", "[" * 100_000, '{"step": 0, "time": 0, "met', "\x00"])
def test_a_row_damaged_in_the_middle_is_named(tmp_path, row):
    path = finished(tmp_path) / record.METRICS
    path.write_text(f"{row}\n{path.read_text()}")
    with pytest.raises(UsageError, match=r"metrics\.jsonl holds a damaged row") as error:
        Tracker(tmp_path, JSONL, {}, {})
    assert one_line(error)


def test_a_damaged_record_hides_no_other(tmp_path, caplog):
    for name in ("good", "bad"):
        finished(tmp_path / name)
    (tmp_path / "bad/run.json").write_text("[]")
    assert [directory.name for directory, _ in record.records_below(tmp_path)] == ["good"]
    assert f"{tmp_path}/bad/run.json is not the record of a run" in caplog.text


def test_a_run_behind_a_link_is_found_and_each_run_once(tmp_path):
    root, elsewhere = tmp_path / "multirun", tmp_path / "disk"
    for folder in (root / "here", elsewhere / "there"):
        finished(folder)
    (root / "there").symlink_to(elsewhere / "there")
    (root / "again").symlink_to(root / "here")
    (root / "here/loop").symlink_to(root)
    (root / "nowhere").symlink_to(tmp_path / "gone")
    found = [each.directory for _, each in record.records_below(root)]
    assert sorted(found) == [elsewhere / "there", root / "here"]


def test_values_logged_just_before_a_kill_are_in_the_record_of_the_continued_run(tmp_path):
    killed = Tracker(tmp_path, JSONL, {}, {})
    killed.log({"test/linear_top1": 12.5, "val/knn_top1": math.nan}, 7)  # in the file, not in run.json yet
    assert "test/linear_top1" not in Record.load(tmp_path).metrics
    continued = Tracker(tmp_path, JSONL, {}, {})
    continued.log({"test/linear_top1": 12.5}, 7)  # computed again
    continued.close("FINISHED")
    assert Record.load(tmp_path).metrics["test/linear_top1"] == 12.5
    assert math.isnan(Record.load(tmp_path).metrics["val/knn_top1"])
    assert len(rows(tmp_path)) == 1


def test_rows_that_lack_nothing_but_the_last_newline_are_those_that_were_there(tmp_path):
    """`begins_with` accepts a missing last newline and rows that were added later, but no lost character."""
    path, whole = tmp_path / "rows", b'{"a": 1}\n'
    digest = hashlib.sha256(whole).hexdigest()
    for content, same in (
        (whole, True),
        (whole[:-1], True),
        (whole + b"more", True),
        (whole[:-2], False),
        (b"", False),
    ):
        path.write_bytes(content)
        assert begins_with(path, len(whole), digest) == same


@given(data=st.data())
def test_rows_are_read_by_blocks_from_where_one_of_them_ends(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("blocks") / record.METRICS
    line = '{"step": %d, "time": 1, "metrics": {"x": 1.5}}\n'
    content = "".join(line % step for step in range(20)).encode()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)), label="bytes written before the kill")])
    whole, size = read_rows(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "BLOCK_BYTES", data.draw(st.integers(1, 300), label="bytes of a block"))
        blocks = list(read_blocks(path))
        assert all(len(block) < metrics_file.BLOCK_BYTES + len(line) for _, block in blocks), "the last row is whole"
        first = data.draw(st.integers(0, len(blocks)), label="blocks that have been read before")
        assert list(read_blocks(path, sum(len(block) for _, block in blocks[:first]))) == blocks[first:]
        assert digest_of(path, size).digest() == hashlib.sha256(content[:size]).digest()
    assert [row for rows, _ in blocks for row in rows] == whole
    assert [row["step"] for row in whole] == list(range(content[:size].count(b"\n")))


def test_every_change_of_conditions_is_kept_with_its_step():
    run = Record.new("a", "study")
    for step, torch in ((0, "1"), (5, "1"), (8, "2"), (12, "3")):
        run.continue_under({"torch": torch}, step)
    assert [each["step"] for each in run.conditions] == ["0", "8", "12"]
    assert run.tags["conditions_changed"] == (
        "torch was 1 and is 2 from step 8 on; torch was 2 and is 3 from step 12 on"
    )


def test_a_run_of_before_the_code_was_noted_is_continued_by_another():
    """If a record has no digest of the code, the code counts as changed until a session has noted it."""
    run = Record.new("a", "study")
    run.continue_under({"torch": "1"}, 0)
    assert run.changes({"torch": "1", "code": "ab"}) == "code was another and is ab"
    run.continue_under({"torch": "1", "code": "ab"}, 5)
    assert run.changes({"torch": "1", "code": "ab"}) == ""


def test_a_figure_that_has_been_changed_since_is_not_read_without_a_word(tmp_path, caplog):
    tracker = Tracker(tmp_path, JSONL, {"k": 50}, {})
    tracker.log({"val/knn_top1": 51.5}, 0)
    tracker.close("FINISHED")
    Record.load(tmp_path)
    assert not caplog.messages
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace("51.5", "61.5"))
    assert Record.load(tmp_path).metrics == {"val/knn_top1": 61.5}
    assert [said.startswith(f"{path} has been changed") for said in caplog.messages] == [True]


def test_rows_that_have_been_changed_or_cut_since_are_not_used_without_a_word(tmp_path, caplog):
    for name, change in {"changed": lambda text: text.replace(b"2.5", b"7.5"), "cut": lambda text: text[:-30]}.items():
        tracker = Tracker(tmp_path / name, JSONL, {}, {})
        train(tracker, range(3))
        tracker.log({"x": 2.5}, 3)
        tracker.close("KILLED")
        path = tmp_path / name / record.METRICS
        path.write_bytes(change(path.read_bytes()))
        Record.load(tmp_path / name)
        assert [said.startswith(f"{path} has been changed") for said in caplog.messages] == [True]
        caplog.clear()


def test_who_looks_through_many_runs_reads_no_rows_and_says_where_some_are_gone(tmp_path, caplog, monkeypatch):
    """Listing runs compares the sizes of their rows only; an edit that keeps the size is found by loading the run."""
    for name in ("whole", "edited", "cut"):
        tracker = Tracker(tmp_path / name, JSONL, {}, {})
        train(tracker, range(20))
        tracker.close("FINISHED")
    path = tmp_path / "edited" / record.METRICS
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.27"))
    os.truncate(tmp_path / "cut" / record.METRICS, 100)
    with monkeypatch.context() as patch:
        patch.setattr(metrics_file, "open_regular", lambda path: pytest.fail(f"{path} is read"))
        assert len(list(record.records_below(tmp_path))) == 3
    assert [said.startswith(f"{tmp_path}/cut/metrics.jsonl has been changed") for said in caplog.messages] == [True]
    Record.load(tmp_path / "edited")
    assert caplog.messages[-1].startswith(f"{path} has been changed")


def test_rows_that_a_kill_added_to_those_of_the_record_are_no_change(tmp_path, caplog):
    tracker = Tracker(tmp_path, JSONL, {}, {})
    train(tracker, range(3))
    tracker.flush()
    tracker.log({"x": 1.0}, 3)  # then it is killed, while writing the next row
    with (tmp_path / record.METRICS).open("a") as file:
        file.write('{"step": 4, "ti')
    Tracker(tmp_path, JSONL, {}, {}).close("FINISHED")
    assert not caplog.messages
