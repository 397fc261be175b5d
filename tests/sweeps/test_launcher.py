"""Batches of jobs, as the sweepers of Hydra and of plugins, such as hydra-optuna-sweeper, have them launched."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.utils import JobStatus
from omegaconf import flag_override

from src.errors import RunFailed, UsageError
from src.sweeps.jobs import OBJECTIVE, Job
from src.sweeps.launcher import JobLauncher
from src.system.stopping import is_signal


class AtOnce(JobLauncher):
    """Ends each job when it is started, with the status that ``ends`` has for its k, or 0."""

    at_a_time, pause = None, 0

    def __init__(self, fixed, ends):
        self.fixed, self.ends, self.started, self.over = fixed, ends, [], []

    def propose(self, *lines):
        """Launch a batch with these overrides, and the fixed ones, which a sweeper passes on too."""
        return self.launch([[*self.fixed, *line.split()] for line in lines], len(self.started))

    def start(self, jobs, stopper):
        for job in jobs:
            self.conclude(job, self.ends.get(job.cfg.k, 0), "why", Path("log"))
        self.started += jobs
        self.over += jobs
        if any(is_signal(job.status) for job in jobs):
            os.kill(os.getpid(), signal.SIGTERM)

    def ended(self, stopper):
        over, self.over = self.over, []
        return over


@pytest.fixture
def launcher(as_hydra_does, tmp_path, cache_dir, monkeypatch):
    """A function that sets a launcher up for a command of hydra-optuna-sweeper, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def set_up(*overrides, direction="maximize", ends=(), sweeps=(), seed=0):
        sweeper = ("hydra/sweeper=optuna", f"hydra.sweeper.direction={direction}", f"hydra.sweeper.sampler.seed={seed}")
        fixed = ("data=digits", "tracking=jsonl", f"data.cache_dir={cache_dir}")
        found = as_hydra_does(AtOnce([*fixed, *overrides], dict(ends)), *sweeper, *fixed, *overrides, *sweeps)
        with flag_override(found.config.hydra, "readonly", False):
            found.config.hydra.overrides.hydra = list(sweeper)
        context = SimpleNamespace(config_loader=found.composer.loader)
        found.setup(hydra_context=context, task_function=None, config=found.config)
        return found

    return set_up


@pytest.fixture
def measured(monkeypatch):
    """Every job that ended well has k for its result, on the metric that a search maximises."""

    def result(job):
        if job.status:
            return None
        tags = {"support_unused": "true"} if job.cfg.k == 9 else {}
        return SimpleNamespace(metrics={OBJECTIVE: float(job.cfg.k or 0)}, params={"support_set_size": "7"}, tags=tags)

    monkeypatch.setattr(Job, "result", property(result))


@pytest.mark.usefixtures("measured")
def test_a_batch_returns_what_each_job_is_judged_by(launcher, capsys):
    found = launcher(ends={3: 1})
    five, same, failed, impossible = found.propose("k=5", "k=5", "k=3", "k=0")
    assert five.status == same.status == JobStatus.COMPLETED
    assert five.return_value == same.return_value == 5
    with pytest.raises(RunFailed, match=r"kmclr-k3-.*: why"):
        _ = failed.return_value
    with pytest.raises(RunFailed, match="k=0: must be 1 or more"):
        _ = impossible.return_value
    later, unused = found.propose("k=8", "k=9")
    assert later.return_value == 8
    with pytest.raises(RunFailed, match=r"kmclr-k9-.*: its support set was never filled"):
        _ = unused.return_value
    assert [job.cfg.k for job in found.started] == [5, 3, 8, 9]  # equal proposals are one job
    assert len(list(Path("multirun").glob("sweep-optuna-*"))) == 1  # all batches are one sweep
    assert "job 2 finished" in capsys.readouterr().out


@pytest.mark.usefixtures("measured")
def test_a_search_in_two_directions_learns_of_the_vectors_too(launcher):
    (returned,) = launcher(direction="[maximize,minimize]").propose("k=5")
    assert returned.return_value == (5, 7)


@pytest.mark.usefixtures("measured")
def test_all_batches_share_the_time(launcher):
    found = launcher()
    found.max_minutes = 60
    found.propose("k=5")
    assert 0 < found.max_minutes < 60
    found.max_minutes = -0.1
    with pytest.raises(SystemExit) as end:
        found.propose("k=6")
    assert end.value.code == 75
    assert len(found.started) == 1


@pytest.mark.usefixtures("measured")
def test_a_job_that_is_stopped_stops_the_sweeper_too(launcher, capsys):
    with pytest.raises(SystemExit) as end:
        launcher(ends={5: 143}).propose("k=5")
    assert end.value.code == 143
    assert "run again just what is missing" in capsys.readouterr().err


def test_images_without_labels_judge_no_job(launcher, monkeypatch):
    monkeypatch.setattr(Job, "result", SimpleNamespace(metrics={}, params={"support_set_size": "0"}))
    (returned,) = launcher().propose("k=5")
    with pytest.raises(RunFailed, match="data: without labels there is no val/knn_top1"):
        _ = returned.return_value


def test_a_dry_run_lists_the_first_batch(launcher, capsys):
    found = launcher("dry_run=true")
    with pytest.raises(SystemExit) as end:
        found.propose("k=5", "k=6")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "2 jobs, 2 to run" in said
    assert "this is the first batch; hydra/sweeper=optuna proposes the others" in said
    assert not found.started
    assert not Path("multirun").exists()


@pytest.mark.parametrize(
    ("proposed", "says"),
    [
        ("k=5 data.final=true", "data.final=true: leaves no validation images"),
        ("k=5 queue_size=9", "queue_size: only support=queue"),
        ("k=5 output_dir=out", "output_dir: each job of a sweep has a folder of its own"),
        ("k=5 resume=never", "resume=never: a search goes on from its trials"),
        ("k=0", "k=0: must be 1 or more"),
    ],
)
def test_what_no_sweeper_can_judge_is_refused_before_anything_runs(launcher, proposed, says):
    found = launcher()
    with pytest.raises(UsageError, match=says):
        found.propose(proposed)
    assert not found.started
    assert not Path("multirun").exists()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("hydra.sweep.dir=elsewhere", "hydra.sweep: a sweep's folder is"),
        ("evaluation.knn_k=choice(1,50)", "evaluation.knn_k=.*: makes no other run"),
        ("seed=choice(0,1)", "seed=.*: a search would choose the luckiest seed"),
        ("seed=range(0,3)", "seed=.*: a search would choose the luckiest seed"),
        ("data.final=choice(false,true)", "data.final=true: leaves no validation images"),
        ("seed=0,1", "seed=0,1: a search would choose the luckiest seed"),
    ],
)
def test_a_command_that_no_sweep_can_have_is_refused(launcher, typed, says):
    found = launcher(sweeps=[typed])
    with pytest.raises(UsageError, match=says):
        found.propose("k=5")
    assert not found.started


@pytest.mark.usefixtures("measured")
def test_an_impossible_trial_of_a_later_batch_fails_alone(launcher):
    found = launcher()
    found.propose("k=5")
    (impossible,) = found.propose("k=0")
    assert impossible.status == JobStatus.FAILED
    assert found.propose("k=6")[0].return_value == 6


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("seed", ["null", 0])
def test_a_search_without_a_seed_does_not_say_that_its_command_repeats_it(launcher, capsys, seed):
    found = launcher(seed=seed, ends={5: 1})
    found.propose("k=5")
    assert ("run again just what is missing" in capsys.readouterr().err) == (seed == 0)


@pytest.mark.usefixtures("measured")
def test_a_key_that_only_some_swept_options_have_is_skipped_by_the_others(launcher):
    found = launcher(sweeps=["method=simclr,kmclr"])
    found.propose("method=simclr k=5", "method=kmclr k=5")
    assert [job.cfg.method.name for job in found.started] == ["simclr", "kmclr"]


def test_a_key_that_no_swept_option_has_is_refused(launcher):
    found = launcher(sweeps=["method=simclr,kmclr"])
    with pytest.raises(UsageError, match=r"optimizer\.momentumm: unknown key.*did you mean optimizer\.momentum"):
        found.propose("method=simclr k=5 optimizer.momentumm=0.5")
    assert not found.started


@pytest.mark.parametrize("direction", ["minimize", "[minimize,minimize]"])
def test_a_search_for_the_worst_is_refused(launcher, direction):
    with pytest.raises(UsageError, match=r"hydra\.sweeper\.direction=maximize: is missing"):
        launcher(direction=direction)


@pytest.mark.slow
def test_hydra_optuna_sweeper_searches_for_accuracy_and_few_vectors(command, small, tmp_path):
    """Its study judges each trial by what the trial's record says, and the same command trains nothing again."""
    search = [
        *("--multirun", "hydra/sweeper=optuna", "hydra/sweeper/sampler=nsgaii", "hydra.sweeper.sampler.seed=0"),
        *("hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.n_trials=2", "jobs=2"),
        *("k=int(interval(5,60))", *small, "epochs=1", "schedule.warmup_epochs=0", "tracking=jsonl"),
    ]
    done = command("src.train", *search)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("multirun/kmclr-*/run.json")]
    judged = [[record["metrics"][OBJECTIVE], int(record["params"]["support_set_size"])] for record in records]
    assert len(judged) == 2
    best = yaml.safe_load((tmp_path / "multirun" / "optimization_results.yaml").read_text())["solutions"]
    assert best
    assert all(each["values"] in judged for each in best)
    assert all(each["params"]["k"] == each["values"][1] for each in best)
    again = command("src.train", *search)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 jobs finished" in again.stdout
    assert "starts" not in again.stdout
