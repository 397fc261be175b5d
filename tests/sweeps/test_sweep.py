import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from src.errors import CannotWrite
from src.runs.directory import is_held
from src.runs.record import Record
from src.sweeps.grid import GridSweeper, alternatives
from src.sweeps.jobs import Job
from src.sweeps.sweep import Sweep
from src.system.stopping import is_stop
from tests.composing import options, parsed
from tests.conftest import ELSEWHERE
from tests.sweeps.test_dry_run import ran

UNION = [
    {"method": ["simclr"]},
    {"method": ["nnclr"], "queue_size": ["64", "256"]},
    {"method": ["kmclr"], "k": ["50"]},
]
SMALL_SWEEP = ("+sweep=support_size", "method=nnclr,kmclr", "queue_size=64", "seed=0")
PROTOTYPES = ("+sweep=support_size", "method=kmclr", "k=10,20", "seed=0")


def grids(given, params=None):
    return list(alternatives(UNION, params or {}, given, [grid["method"] for grid in UNION]))


def test_alternatives_are_not_multiplied_with_each_other():
    assert [grid.get("method") for grid in grids({})] == [["simclr"], ["nnclr"], ["kmclr"]]
    assert grids({}, {"seed": ["0", "1"]})[2] == {"seed": ["0", "1"], "method": ["kmclr"], "k": ["50"]}


def test_the_command_line_replaces_values_where_they_belong():
    simclr, nnclr, kmclr = grids({"k": ["7"], "seed": ["3"]}, {"seed": ["0", "1"]})
    assert kmclr["k"] == ["7"]
    assert "k" not in simclr | nnclr
    assert {tuple(grid["seed"]) for grid in (simclr, nnclr, kmclr)} == {("3",)}


@pytest.mark.parametrize(
    ("given", "k", "seed"),
    [
        ({"++k": ["7"], "++seed": ["3"]}, ["7"], ["3"]),
        ({"k": ["20", "30"], "++k": ["7"]}, ["7"], ["0", "1"]),
        ({"++k": ["7"], "k": ["20", "30"]}, ["20", "30"], ["0", "1"]),
    ],
)
def test_a_key_with_plus_signs_replaces_values_too(given, k, seed):
    simclr, _, kmclr = grids(given, {"seed": ["0", "1"]})
    assert kmclr == {"method": ["kmclr"], "k": k, "seed": seed}
    assert simclr == {"method": ["simclr"], "seed": seed}


def test_the_command_line_chooses_among_methods():
    assert [grid["method"] for grid in grids({"method": ["kmclr", "simclr"]})] == [["simclr"], ["kmclr"]]


def test_a_key_by_its_former_name_replaces_the_values_of_the_present_one():
    union = [{"method": ["kmclr"], "objective.support_weight": ["0.1", "0.5"]}, {"method": ["simclr"]}]
    kmclr, simclr = alternatives(union, {}, {"method.support_weight": ["1"]}, [["kmclr"], ["simclr"]])
    assert kmclr == {"objective.support_weight": ["1"], "method": ["kmclr"]}
    assert simclr == {"method": ["simclr"]}
    new, old = {"objective.temperature": ["0.5"]}, {"method.temperature": ["0.2"]}
    assert list(alternatives([{}], new, old, [[]])) == [{"objective.temperature": ["0.2"]}]
    assert list(alternatives([{}], old, new, [[]])) == [new]
    assert list(alternatives([old], {}, new, [[]])) == [new]


def test_an_experiment_keeps_its_method():
    union = [{"experiment": ["original_nnclr"]}, {"experiment": ["original_kmclr"], "k": ["400"]}]
    (kmclr,) = alternatives(union, {}, {"method": ["kmclr"]}, [["nnclr"], ["kmclr"]])
    assert kmclr == {"experiment": ["original_kmclr"], "k": ["400"]}


@pytest.mark.parametrize(("status", "stop"), [(0, False), (1, False), (2, False), (75, True), (76, False), (143, True)])
def test_which_statuses_continue(status, stop):
    """A job that was told to stop ends the sweep; one that failed or was pruned does not."""
    assert is_stop(status) == stop


def test_a_sweep_says_once_that_finished_jobs_were_evaluated_otherwise(
    as_hydra_does, cache_dir, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.sweeps.sweep.summarise", lambda records: ([], []))
    given = ["data=digits", "tracking=jsonl", f"data.cache_dir={cache_dir}", "k=10,20"]
    for more in ([], ["evaluation.epochs=9"]):
        sweeper = as_hydra_does(GridSweeper(params={}))
        sweeper.launcher, sweeper.prepare = Mock(at_a_time=1, status=0, **{"run.return_value": []}), lambda: None
        if not more:
            for job in sweeper.jobs(given):
                ran(job.cfg, 1)
        with pytest.raises(SystemExit):
            sweeper.sweep([*given, *more])
        said = [line for line in caplog.messages if "otherwise" in line]
        assert len(said) == len(more)
    assert said[0].startswith("2 finished jobs were evaluated otherwise (evaluation.epochs was 100 and is 9): ")


@pytest.fixture
def a_sweep(tmp_path, monkeypatch):
    """A sweep without jobs, in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return Sweep("grid", ["identity"], [], parsed("tracking=jsonl").tracking)


def test_what_a_disk_refuses_a_sweep_is_said_and_continues(a_sweep):
    """A sweep that cannot write ends with one line, marks itself failed, and lets its folder and signals go."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CannotWrite, match="Is a directory; mend that, and the same command continues"), a_sweep:
        a_sweep.directory.open("w")
    assert Record.load(a_sweep.directory).status == "FAILED"
    assert not is_held(a_sweep.directory)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["größe", "it's a sweep", "demo"])
def test_hydra_takes_a_sweeps_folder_of_any_name(name):
    told = Sweep(name, [], [], parsed("tracking=jsonl").tracking)
    (given,) = OverridesParser.create().parse_overrides(told.overrides(Job([], None, Path())))
    value = given.value()
    assert getattr(value, "text", value) == str(told.directory)


def test_a_table_that_finds_no_room_is_said_too(a_sweep, monkeypatch):
    monkeypatch.setattr(a_sweep, "_conclude", lambda: a_sweep.directory.write_text(""))
    with pytest.raises(CannotWrite, match="Is a directory"), a_sweep:
        pass


def folders(path, prefix=""):
    return [d for d in sorted((path / "multirun").glob(f"{prefix}*")) if d.is_dir()]


def sweep_of(path):
    (folder,) = folders(path, "sweep-")
    return folder, Record.load(folder)


def in_store(path, query):
    with sqlite3.connect(path / "mlflow.db") as store:
        return store.execute(query).fetchall()


JOBS = {"demo": 6, "support_size": 42, "original_table": 5, "forgetting": 15, "ablations": 49}
JOBS |= {"cpu_study": 51, "cpu_study_long": 27, "teacher_study": 15, "gpu_study": 114}


@pytest.mark.parametrize("name", [each for each in options("sweep") if each != "optuna"])  # which is no grid
def test_every_sweep_that_comes_with_the_project_composes(command, tmp_path, name):
    done = command("src.train", "--multirun", f"+sweep={name}", "+data.fingerprint=abc", "dry_run=true")
    assert done.returncode == 0, done.stderr
    listed = [line.split() for line in done.stdout.splitlines()]
    assert listed[-1][:2] == [str(JOBS[name]), "jobs,"]
    assert len({line[4] for line in listed[:-1]}) == JOBS[name]
    assert not list(tmp_path.iterdir())


def test_a_method_chooses_among_the_alternatives_also_those_that_are_experiments(command):
    done = command("src.train", "--multirun", "+sweep=cpu_study", "method=nnclr", "seed=0", "dry_run=true")
    names = [line.split()[4] for line in done.stdout.splitlines()[:-1]]
    assert ["-".join(name.split("-")[:2]).removeprefix("nnclr-") for name in names] == [
        "nothing_stored-cifar100",
        *["queue400", "queue4096", "queue16384"],
        "nothing_stored-cifar100",
        *["queue400", "queue4096", "queue16384"],
        "queue16384",
    ]


def test_a_dry_run_names_what_is_not_possible(command):
    done = command("src.train", "--multirun", "method=kmclr", "k=50,0", "dry_run=true")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("1 job, 1 to run")
    assert done.stderr.startswith("not possible: k=0: must be 1 or more")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_sweep_with_a_bad_value_then_again(command, small, tmp_path):
    """The other jobs finish, and the corrected command finds them finished and reports the same table."""
    arguments = ["--multirun", *small, *SMALL_SWEEP, "k=10,abc", "jobs=2"]
    done = command("src.train", *arguments)
    assert done.returncode == 1
    assert "no result: k=abc: Value 'abc'" in done.stderr
    assert "run again" not in done.stderr  # it would end the same way
    assert "Traceback" not in done.stderr
    folder, record = sweep_of(tmp_path)
    assert record.status == "FAILED"
    assert record.metrics["sweep/finished"] == 2
    assert record.metrics["sweep/failed"] == 1
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [(row["method"], row["support_set_size"]) for row in rows] == [
        ("untrained", 0),
        ("nnclr", 64),
        ("kmclr", 10),
    ]
    nested = in_store(tmp_path, "select value from tags where key = 'mlflow.parentRunId'")
    assert nested == [(record.run_id,)] * 2
    assert in_store(tmp_path, f"select status from runs where run_uuid = '{record.run_id}'") == [("FAILED",)]
    assert {name for _, _, names in os.walk(tmp_path / "mlruns") for name in names} >= {
        "table.csv",
        "plot.png",
        "results.html",
    }

    before = (folder / "table.csv").read_bytes()
    again = command("src.train", "--multirun", *small, *SMALL_SWEEP, "k=10", "jobs=2")
    assert again.returncode == 0, again.stderr
    assert "2 jobs, 2 finished already" in again.stdout
    assert "starts" not in again.stdout
    assert sweep_of(tmp_path)[1].status == "FINISHED"
    assert (folder / "table.csv").read_bytes() == before
    preview = command("src.train", "--multirun", *small, *SMALL_SWEEP, "k=10,30", "dry_run=true")
    assert preview.stdout.count("finished") == 2
    assert "3 jobs, 1 to run, about" in preview.stdout
    report = command("src.report", f"sweep={record.tags['sweep_id']}", "out=report")
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "report" / "table.csv").read_bytes() == before


def start(interpreter, path, *arguments):
    environment = os.environ | ELSEWHERE
    line = [interpreter, "-m", "src.train", "--multirun", *arguments]
    return subprocess.Popen(line, cwd=path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition):
    for _ in range(6000):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it never came")


def jobs_of(small):
    """Process ids of the jobs that use this test's cache, which no other test uses at the same time."""
    (cache,) = [each for each in small if each.startswith("data.cache_dir=")]
    return subprocess.run(["pgrep", "-f", f"{cache}.*tracking.parent"], capture_output=True).stdout


def finished(path):
    return [d for d in folders(path) if (d / "run.json").exists() and Record.load(d).status == "FINISHED"]


@pytest.mark.slow
def test_killed_with_its_jobs_and_run_again_it_ends_as_an_unbroken_one(python, command, small, tmp_path):
    arguments = [*small, *PROTOTYPES, "tracking=jsonl"]
    (tmp_path / "unbroken").mkdir()
    unbroken = start(python, tmp_path / "unbroken", *arguments)
    process = start(sys.executable, tmp_path, *arguments)
    wait_for(lambda: finished(tmp_path))
    process.kill()
    process.wait()
    assert unbroken.wait(600) == 0
    # The kernel signals the jobs when their sweep dies, so they save and stop.
    wait_for(lambda: not jobs_of(small))
    done = command("src.train", "--multirun", *arguments)
    assert done.returncode == 0, done.stderr
    tables = [
        json.loads((sweep_of(place)[0] / "table.json").read_text()) for place in (tmp_path / "unbroken", tmp_path)
    ]
    for table in tables:
        for row in table["rows"]:
            del row["runs"]
    assert tables[0] == tables[1]
    assert {Record.load(d).status for d in folders(tmp_path)} == {"FINISHED"}


@pytest.mark.slow
def test_a_lost_terminal_stops_the_jobs_and_no_other_starts(python, small, tmp_path):
    process = start(python, tmp_path, *small, *SMALL_SWEEP, "k=10,20", "jobs=2", "epochs=20000", "tracking=jsonl")
    running = wait_for(
        lambda: [d for d in folders(tmp_path) if (d / "metrics.jsonl").exists() and "sweep" not in d.name]
    )
    process.send_signal(signal.SIGHUP)
    assert process.wait(600) == 128 + signal.SIGHUP
    assert sweep_of(tmp_path)[1].status == "KILLED"
    assert len(folders(tmp_path)) <= 3
    assert Record.load(running[0]).status == "KILLED"


@pytest.mark.slow
def test_time_for_all_jobs_together(command, small, tmp_path):
    """``max_minutes`` of a sweep limits the time of all its jobs together."""
    done = command("src.train", "--multirun", *small, *PROTOTYPES, "epochs=200", "tracking=jsonl", "max_minutes=0.02")
    assert done.returncode == 75
    assert "2 of 2" not in done.stdout
    assert sweep_of(tmp_path)[1].status == "KILLED"


@pytest.mark.slow
def test_a_search_of_a_space_with_fewer_points_than_trials_tries_them_all_and_says_so(command, small, tmp_path):
    """The two points run side by side while a third one is asked for, which does not exist."""
    fixed = ["objective.temperature=0.2", "support.forget_every=3", "optimizer.lr=1", "epochs=1", "tracking=jsonl"]
    arguments = ["+sweep=optuna", "k=5,6", "hydra.sweeper.trials=9", "jobs=3"]
    done = command("src.train", "--multirun", *small, *arguments, *fixed)
    assert done.returncode == 2
    (best,) = re.findall(r"^best: val/knn_top1 [\d.]+ with k=[56]$", done.stdout, re.MULTILINE)
    assert done.stdout.index("KMCLR") < done.stdout.index(best)
    assert re.search("^error: .*no other point", done.stderr, re.MULTILINE), done.stderr
    assert len(finished(tmp_path)) == 2


@pytest.mark.slow
def test_a_search_killed_and_run_again(python, command, small, tmp_path):
    """The repeated command completes the trials."""
    arguments = [*small, "+sweep=optuna", "k=int(interval(5,60))", "hydra.sweeper.trials=2", "tracking=jsonl"]
    process = start(python, tmp_path, *arguments)
    wait_for(lambda: finished(tmp_path))
    process.kill()
    process.wait()
    wait_for(lambda: not jobs_of(small))
    done = command("src.train", "--multirun", *arguments)
    assert done.returncode == 0, done.stderr
    folder, record = sweep_of(tmp_path)
    assert record.status == "FINISHED"
    with sqlite3.connect(folder / "study.db") as study:
        states = [state for (state,) in study.execute("select state from trials order by number")]
        points = study.execute("select trial_id, param_name, param_value from trial_params").fetchall()
        values = study.execute("select value from trial_values").fetchall()
    assert sorted(values) == sorted((Record.load(each).metrics["val/knn_top1"],) for each in folders(tmp_path, "kmclr"))
    assert len(states) == 2
    assert set(states) <= {"COMPLETE", "PRUNED"}
    by_trial = {}
    for trial, name, value in points:
        by_trial.setdefault(trial, set()).add((name, value))
    assert len({frozenset(point) for point in by_trial.values()}) == 2
    assert len(folders(tmp_path, "kmclr")) == 2


@pytest.mark.slow
def test_the_demo_learns(command, cache_dir, tmp_path):
    """Two rows of the demo, trained for a fifth of its epochs, are each far above the untrained encoder."""
    line = [
        "--multirun",
        "+sweep=demo",
        "method=simclr,kmclr",
        "k=50",
        "epochs=12",
        "evaluation.pictures=false",
        "jobs=2",
        f"data.cache_dir={cache_dir}",
    ]
    done = command("src.train", *line, "precision=float32")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^plot: multirun/sweep-demo-\w+/plot.png$", done.stdout, re.MULTILINE)
    assert re.search(r"^page: multirun/sweep-demo-\w+/results.html$", done.stdout, re.MULTILINE)
    (link,) = re.findall(r"^charts: mlflow ui, then (http\S+)$", done.stdout, re.MULTILINE)
    assert command("src.report", "charts").stdout == f"the newest sweep's charts: {link}\n"

    (written,) = tmp_path.glob("multirun/sweep-demo-*/table.json")
    untrained, *trained = json.loads(written.read_text())["rows"]
    assert untrained["method"] == "untrained"
    assert [row["method"] for row in trained] == ["simclr", "kmclr"]
    for row in trained:
        for figure in ("val/knn_top1_mean", "val/linear_top1_mean"):
            assert row[figure] > untrained[figure] + 3, (row["method"], figure)
