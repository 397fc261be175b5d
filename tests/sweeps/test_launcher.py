import os
import sys

import pytest
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from src.sweeps import launcher
from src.sweeps.launcher import LocalLauncher


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Jobs are a program of ours in the place of src.train: it writes down its environment and ends as it is told."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text(
        "import os, signal, sys, time\n"
        "given = dict(argument.split('=') for argument in sys.argv[1:])\n"
        "keys = ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')\n"
        "open(given['k'], 'w').write(' '.join(os.environ.get(key, '-') for key in keys))\n"
        "print('error: no such thing' if given['status'] == '2' else 'a word', file=sys.stderr)\n"
        "time.sleep(float(given.get('sleep', 0)))\n"
        "os.kill(os.getpid(), signal.SIGKILL) if given['status'] == 'kill' else sys.exit(int(given['status']))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def launch(jobs, *overrides, max_minutes=None):
    local = LocalLauncher(jobs)
    hydra = {"sweep": {"dir": "sweep"}, "runtime": {"config_sources": []}}
    config = OmegaConf.create({"max_minutes": max_minutes, "hydra": hydra})
    local.setup(hydra_context=None, task_function=None, config=config)
    return local.launch([each.split() for each in overrides], initial_job_idx=5)


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_job_ends_in_its_own_way(program, jobs):
    done = launch(
        jobs, "k=a status=0", "k=b status=2", "k=c status=kill", "k=d status=76", "k=e status=143", "k=f status=0"
    )
    assert [one.status == JobStatus.COMPLETED for one in done] == [True, False, False, False, False, True]
    reasons = [(str(one._return_value), one._return_value.status) for one in done[1:5]]
    assert reasons == [
        ("no such thing", 2),
        ("its process was ended by SIGKILL; is there enough memory?", -9),
        ("pruned", 76),
        ("stopped; the same command continues", 143),
    ]
    assert {path.name for path in (program / "sweep").iterdir()} == {f"{number}.log" for number in range(5, 11)}


def test_a_job_is_announced_by_all_in_which_it_differs(program, capsys):
    launch(1, "k=a status=0 width=3 sleep=0", "k=b status=0 width=4 sleep=0")
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if "starts" in line] == [
        *("k=a width=3 (sweep/5.log)", "k=b width=4 (sweep/6.log)")
    ]


def test_jobs_share_threads_and_take_gpus_in_turn(program, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    launch(3, "k=a status=0 sleep=1", "k=b status=0 sleep=1", "k=c status=0 sleep=1")
    assert [(program / name).read_text() for name in "abc"] == ["2 4", "2 7", "2 4"]
    launch(1, "k=alone status=0")
    assert (program / "alone").read_text() == "8 4,7"


def test_when_the_time_is_up_no_other_starts(program):
    first, second = launch(1, "k=a status=75 sleep=0.3", "k=b status=0", max_minutes=0.002)
    assert first._return_value.status == second._return_value.status == 75
    assert not os.path.exists("b")
    assert "not started" in str(second._return_value)


def test_gpus_are_counted_where_there_is_a_driver(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher._visible_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint('GPU 0: one')\nprint('GPU 1: other')\n")
    tool.chmod(0o755)
    assert launcher._visible_gpus() == ["0", "1"]
