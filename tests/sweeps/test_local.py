import os
import sys
import time
from pathlib import Path

import pytest

from src.sweeps import local
from src.sweeps.local import LocalLauncher
from tests.sweeps.launching import jobs_of, run


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_job_ends_in_its_own_way(program, jobs):
    given = jobs_of(
        "k=a status=0", "k=b status=2", "k=c status=kill", "k=d status=76", "k=e status=143", "k=f status=0"
    )
    assert len(list(run(LocalLauncher(jobs), given))) == 6
    assert [(job.error, job.status) for job in given] == [
        ("", 0),
        ("no such thing", 2),
        ("its process was ended by SIGKILL; is there enough memory?", -9),
        ("pruned", 76),
        ("stopped; the same command continues", 143),
        ("", 0),
    ]
    assert {path.name for path in (program / "sweep").iterdir()} == {f"{number}.log" for number in range(6)}


def test_what_jobs_of_an_earlier_command_have_said_stays(program, capsys):
    """A log is never overwritten: the next command's log of job 0 is 0.2.log."""
    for line in ("k=a status=2", "k=b status=0", "k=c status=2"):
        (job,) = run(LocalLauncher(2), jobs_of(line))
    assert job.error == "no such thing"
    said = {path.name: path.read_text() for path in (program / "sweep").iterdir()}
    assert said == {"0.log": "error: no such thing\n", "0.2.log": "a word\n", "0.3.log": "error: no such thing\n"}
    assert "job 0 starts: k=c (sweep/0.3.log)" in capsys.readouterr().out


def test_a_signal_without_a_name_ends_a_job_too(program):
    (job,) = run(LocalLauncher(1), jobs_of("k=a status=0"))
    launcher = LocalLauncher(1)
    launcher.numbers = {job: 0}
    launcher.conclude(job, -37, "", Path("log"))
    assert job.error == "its process was ended by signal 37"


def test_more_jobs_at_a_time_than_anybody_has_are_started_at_once(program):
    assert [job.status for job in run(LocalLauncher(10**12), jobs_of("k=a status=0"))] == [0]


def test_a_job_is_announced_by_what_is_swept(program, capsys):
    given = jobs_of("k=a status=0 width=3 lr=1", "k=b status=0 width=4 lr=1")
    list(run(LocalLauncher(None), given, swept=("k", "width")))
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if "starts" in line] == [
        *("k=a width=3 (sweep/0.log)", "k=b width=4 (sweep/1.log)")
    ]


def test_jobs_share_threads_and_take_gpus_in_turn(program, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    list(run(LocalLauncher(3), jobs_of("k=a status=0", "k=b status=0", "k=c status=0")))
    assert [(program / name).read_text() for name in "abc"] == ["2 4", "2 7", "2 4"]
    list(run(LocalLauncher(1), jobs_of("k=alone status=0")))
    assert (program / "alone").read_text() == "8 4,7"


@pytest.mark.parametrize(
    ("told", "threads"), [("6", 6), ("3,2", 3), (" 5 ", 5), ("0", 2), ("-4", 2), ("x", 2), ("", 2)]
)
def test_the_threads_to_share_are_what_openmp_would_use(monkeypatch, told, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert local._threads() == threads


def test_a_job_has_tracebacks_only_where_the_user_asks_for_them(program, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # cli.py sets it for its own process
    (program / "src" / "train.py").write_text("import os; open('said', 'w').write(os.environ['HYDRA_FULL_ERROR'])")
    list(run(LocalLauncher(1), jobs_of("k=a")))
    assert (program / "said").read_text() == "0"


def test_when_the_time_is_up_no_other_starts(program, monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    launcher = LocalLauncher(1)
    first, second = jobs_of("k=a status=75", "k=b status=0")
    for job in run(launcher, [first, second], max_minutes=1):
        ended.append(job)
        now[0] += 60
    assert ended == [first]
    assert launcher.status == first.status == 75
    assert not os.path.exists("b")


def test_a_job_is_asked_for_when_another_has_ended(program):
    known, done = [], []

    def proposals():
        for job in jobs_of("k=a status=0 after=go", "k=b status=0", "k=c status=0", "k=d status=0"):
            known.append([each.overrides[0] for each in done])
            yield job

    for job in run(LocalLauncher(2), proposals()):
        done.append(job)
        if job.overrides[0] == "k=d":
            Path("go").touch()
    assert known == [[], [], ["k=b"], ["k=b", "k=c"]]
    assert done[-1].overrides[0] == "k=a"


def test_gpus_are_counted_where_there_is_a_driver(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local._visible_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint('GPU 0: one')\nprint('GPU 1: other')\n")
    tool.chmod(0o755)
    assert local._visible_gpus() == ["0", "1"]
