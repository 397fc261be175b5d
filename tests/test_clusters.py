"""Launchers for clusters: what a scheduler does to a job, on submitit's local executor."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import PROJECT

pytest.importorskip("submitit")
pytestmark = pytest.mark.slow


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("multirun/kmclr-*/run.json"))]


def test_two_jobs_finish(command, tmp_path, small):
    done = command(
        *("src.train", "--multirun", *small, "method=kmclr", "k=10,20", "epochs=1", "tracking=jsonl"),
        "hydra/launcher=submitit_local",
    )
    assert done.returncode == 0, done.stderr
    assert [(run["status"], run["params"]["k"]) for run in records(tmp_path)] == [
        ("FINISHED", "10"),
        ("FINISHED", "20"),
    ]


def test_a_preempted_job_is_queued_again_and_continues(tmp_path, small):
    arguments = ["method=kmclr", "k=10", "epochs=8", "checkpoint.every=1000", "tracking=jsonl"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "src.train", "--multirun", *small, *arguments, "hydra/launcher=submitit_local"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
    )
    # The worker takes SIGUSR2 for preemption from before its first step.
    while not any(path.read_bytes().count(b"\n") > 4 for path in tmp_path.glob("multirun/kmclr-*/metrics.jsonl")):
        assert sweep.poll() is None
        time.sleep(0.05)
    (job,) = tmp_path.glob("multirun/sweep-*/.submitit/*/*_submitted.pkl")
    controller = job.parent.name
    (worker,) = subprocess.check_output(["pgrep", "-P", controller], text=True).split()
    os.kill(int(worker), signal.SIGUSR2)
    assert sweep.wait(timeout=300) == 0
    (said,) = job.parent.glob("*_log.out")
    assert "Requeued job" in said.read_text()
    assert re.search(": continued at step [1-9]", said.read_text()), "it saved before it was put back"
    (run,) = records(tmp_path)
    assert run["status"] == "FINISHED"


def test_the_slurm_preset_composes(command):
    done = command(
        *("src.train", "hydra/launcher=slurm", "hydra.launcher.array_parallelism=2"),
        *("hydra.launcher.partition=gpu", "--cfg", "hydra", "--package", "hydra.launcher"),
    )
    assert done.returncode == 0, done.stderr
    assert "submitit_launcher.SlurmLauncher" in done.stdout
    assert "gpus_per_node: 1" in done.stdout
    assert "partition: gpu" in done.stdout
