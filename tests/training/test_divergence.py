import math
import re
from types import SimpleNamespace

import pytest
import torch

from src.errors import Diverged
from src.runs import checkpoint
from src.runs.record import Record
from src.training import run as run_module
from tests.training.small_net import SMALL_NET
from tests.training.training_runs import history

DIVERGES = ["method=simclr", "optimizer=sgd", "schedule.warmup_epochs=0"]


def test_a_loss_that_is_not_finite_stops_before_the_step(run, tmp_path):
    with pytest.raises(Diverged) as first:
        run(*DIVERGES, "optimizer.lr=1e25")
    pattern = (
        r"diverged at step 1: loss nan, norm of the gradient nan, of the weights \S+, learning rate \S+e\+24; lower"
    )
    assert re.match(pattern, str(first.value))
    record = Record.load(tmp_path / "run")
    assert (record.status, record.tags["error"]) == ("FAILED", str(first.value))
    assert [step for key, step in history(tmp_path / "run") if key == "train/loss"] == [0]

    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(Diverged) as second:  # the same command reports the divergence without training again
        run(*DIVERGES, "optimizer.lr=1e25")
    assert str(second.value) == str(first.value)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("step", "dtype", "remedy"),
    [
        (0, torch.bfloat16, "before the first update, so no learning rate is the cause: set precision=float32 ("),
        (0, torch.float32, "lower optimizer.lr or raise schedule.warmup_epochs ("),
        (1, torch.bfloat16, "lower optimizer.lr or raise schedule.warmup_epochs ("),
    ],
)
def test_no_learning_rate_is_blamed_for_what_comes_before_the_first_update(step, dtype, remedy):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    state = SimpleNamespace(step=step, dtype=dtype, optimizer=optimizer, weight_norm=lambda: 1.0)
    assert f"learning rate 0.1; {remedy}" in str(run_module.TrainState.diverged(state, 7.0, math.inf))


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(run, tmp_path, monkeypatch):
    """The loss would show it only at the next step, but the weights are saved after this one, the last of its epoch."""
    real, calls = run_module.TrainState.grad_norm, []

    def poisoned(state):
        calls.append(state.step)
        if state.step == 5:  # the last of the second epoch
            next(state.method.parameters()).grad[0] = math.inf
        return real(state)

    monkeypatch.setattr(run_module.TrainState, "grad_norm", poisoned)
    with pytest.raises(Diverged, match=r"at step 5: loss [0-9.]+, norm of the gradient inf, of the weights [0-9.]+,"):
        run("method=simclr", "checkpoint.every=1")
    state = checkpoint.load_latest(tmp_path / "run/checkpoints")[1]
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(("at", "saving", "kept"), [(5, "checkpoint.every=1", 3), (1, "checkpoint.minutes=1e-9", 1)])
def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch, at, saving, kept):
    real = run_module.TrainState.set_lr
    rates = {at: 1e38}  # the gradient is finite, and the step makes the weights infinite

    def rate(state, steps):
        lr = real(state, steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rates.get(state.step, group["lr"])
        return lr

    monkeypatch.setattr(run_module.TrainState, "set_lr", rate)
    with pytest.raises(Diverged, match="of the weights inf"):
        run("method=simclr", "optimizer=sgd", saving)
    assert checkpoint.load_latest(tmp_path / "run/checkpoints")[1]["step"] == kept


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_65(command, small):
    diverged = command("src.train", *small, *SMALL_NET, "method=simclr", "tracking=jsonl", "optimizer.lr=1e30")
    assert diverged.returncode == 65
    assert diverged.stderr.splitlines()[-1].startswith("error: diverged at step ")
