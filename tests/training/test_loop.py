import contextlib
import copy
import errno
import functools
import importlib
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from src import build, cli, models
from src.config.parse import parse
from src.config.schema import Tracking
from src.errors import CannotWrite, Collapsed, Diverged, UsageError
from src.evaluation.diagnostics import alignment, uniformity
from src.evaluation.encoder import read_encoder
from src.evaluation.probes import FrozenEncoder
from src.methods.base import Method, Output
from src.methods.contrast import Contrast
from src.reporting import curves
from src.reporting.comparison import comparable
from src.reporting.rows import summarise
from src.runs import checkpoint
from src.runs import directory as run_directory
from src.runs.query import read_runs
from src.runs.record import Record
from src.runs.tracker import Tracker
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.sweeps import optuna_study
from src.system.stopping import PRUNED, Stopper
from src.training import collapse, loop
from src.training import run as run_module
from src.training.checks import check_batch_fits, warn_of_doubtful_settings
from src.training.state import TrainState
from tests.config.test_schema import composed, parsed
from tests.conftest import CIFAR100, ELSEWHERE, PROJECT
from tests.data.layouts import LAYOUTS, random_image, write_set
from tests.training.small_net import SMALL_NET, SmallNet

CONTRAST = {"simclr": ["method=simclr"], "nnclr": ["method=nnclr", "queue_size=100"], "kmclr": ["method=kmclr", "k=7"]}
TEACHER = ["method=nnclr", "objective=teacher", "queue_size=100", "objective.neighbours=3"]
METHODS = CONTRAST | {"mnn": TEACHER}
RELATION = ["method=kmclr", "objective=relation", "k=7", "objective.decorrelation=0.02"]
EVOLVING = ["support=evolving", "support.size=12", "support.start=6", "support.every=2"]
ALL = METHODS | {"relation": RELATION, "evolving": EVOLVING}  # with each part of a loss that there is
# DESIGN's names: what every run logs.
METRICS = {
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/alignment",
    "train/uniformity",
    "val/effective_rank",
    "val/online_top1",
    "val/online_top5",
    "val/knn_top1",
    "val/linear_top1",
    "test/linear_top1",
    "test/linear_top5",
    "test/knn_top1",
    *(f"{part}/knn_k" for part in ("val", "test", "untrained/test")),
    *(f"untrained/{key}" for key in ("val/knn_top1", "val/linear_top1")),
    *(f"untrained/test/{key}" for key in ("knn_top1", "linear_top1", "linear_top5")),
    "time/epoch_seconds",
    "time/images_per_second",
    "time/support_fraction",
    "memory/peak_gib",
}
OF_ENTRIES = {f"support/{name}" for name in ("label_agreement", "self_hit", "perplexity", "dead", "age_steps")}
OF_PROTOTYPES = {f"support/{name}" for name in ("purity", "nmi", "drift")}
OF_METHOD = {"simclr": set(), "nnclr": OF_ENTRIES, "kmclr": OF_ENTRIES | OF_PROTOTYPES, "mnn": OF_ENTRIES}
OF_METHOD["evolving"] = OF_METHOD["kmclr"] | {"support/size", "support/peak_size"}


composed_once = functools.cache(composed)


@pytest.fixture
def run(tmp_path, monkeypatch, small):
    """Train in this process; returns the run's directory.

    Composing and drawing take longer than so small a training: a line that is typed again is not composed again, and
    the curves are drawn where they are asked for. With ``net=[]`` the network is the ResNet of `small`.
    """
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*overrides, directory="run", draw=False, net=SMALL_NET):
        cfg = copy.deepcopy(composed_once(*small, *net, "tracking=jsonl", f"output_dir={directory}", *overrides))
        with monkeypatch.context() as patch:
            if not draw:
                patch.setattr(curves, "plot", lambda directory: directory)
            cli.pretrain(cfg)
        return tmp_path / directory

    yield run
    torch.set_num_threads(threads)


def history(directory):
    """Everything logged except what it took: {(metric, step): value}."""
    return {
        (key, step): value
        for key, (steps, values) in curves.read(directory).items()
        if not key.startswith(("time/", "memory/"))
        for step, value in zip(steps, values, strict=True)
    }


def assert_same_run(one, other):
    assert history(one) == history(other)
    for key, value in load_file(one / "encoder.safetensors").items():
        assert torch.equal(value, load_file(other / "encoder.safetensors")[key]), key
    ours, theirs = (checkpoint.load_latest(each / "checkpoints")[1] for each in (one, other))
    for part in ("model", "classifier", "optimizer", "classifier_optimizer"):
        assert_equal(ours[part], theirs[part], part)


def assert_equal(one, other, where):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other, where


@pytest.mark.parametrize("method", OF_METHOD)
def test_a_run_leaves_what_it_promises(run, method, capsys):
    directory = run(*ALL[method], "evaluation.pictures=true", draw=True, net=[])
    record = Record.load(directory)
    assert record.status == "FINISHED"
    assert record.metrics.keys() == METRICS | OF_METHOD[method]
    assert all(value == value for value in record.metrics.values())
    size = {"simclr": 0, "nnclr": 100, "kmclr": 7, "mnn": 100, "evolving": 12}[method]
    assert record.params["support_set_size"] == str(size)
    assert record.params["support_bytes"] == str(size * 16 * 4)
    parameters = sum(parameter.numel() for parameter in models.ResNetTiny("small").parameters())
    assert record.params["encoder_parameters"] == str(parameters)
    assert record.tags["config_hash"]
    assert "support_unused" not in record.tags
    figures = read_encoder(directory)[1]["figures"]
    assert figures == {key: record.metrics[key] for key in record.metrics if key.startswith(("val/", "test/"))}
    for name in ("config.yaml", "encoder.safetensors", "curves.png", "metrics.jsonl"):
        assert (directory / name).stat().st_size > 0
    drawn = {path.name for path in directory.glob("*.png")} - {"curves.png"}
    prototypes = {"prototypes.png"} if method in ("kmclr", "evolving") else set()
    assert drawn == ({"positives.png", "map.png"} | prototypes if size else set())
    assert {Path(name).name for name in record.artifacts if name.startswith("pictures/")} == {
        f"{name.removesuffix('.png')}-epoch-{epoch:04}.png" for name in drawn - {"map.png"} for epoch in (1, 2)
    }
    assert len(list((directory / "checkpoints").glob("*.pt"))) <= 2
    steps, _ = curves.read(directory)["train/loss"]
    assert steps == list(range(6))  # 2 epochs of 200 images in batches of 64
    finished, *pictures = capsys.readouterr().out.splitlines()[-2 - len(drawn) :]
    assert finished.startswith("run: finished; test/knn_top1 ")
    assert pictures == [f"picture: run/{name}" for name in sorted({*drawn, "curves.png"})]


def test_a_queue_of_none_stores_nothing(run):
    record = Record.load(run("method=nnclr", "queue_size=0"))
    assert record.metrics.keys() == METRICS | OF_METHOD["simclr"]
    assert record.params["support_set_size"] == record.params["support_bytes"] == "0"


def test_the_untrained_encoder_is_that_of_step_0_and_a_seeds_whatever_the_method(run):
    """Its kNN, measured when the run has ended, is the one that validation measured before the first step."""
    figures = {}
    for method, overrides in METHODS.items():
        history_ = history(run(*overrides, directory=method))
        assert history_["untrained/val/knn_top1", 0] == history_["val/knn_top1", 0]
        figures[method] = {key: value for (key, step), value in history_.items() if key.startswith("untrained/")}
    assert figures["simclr"] == figures["nnclr"] == figures["kmclr"] == figures["mnn"]
    assert figures["simclr"] != {
        key: value
        for (key, _), value in history(run("method=simclr", "seed=1", directory="1")).items()
        if key in figures["simclr"]
    }
    started_from_another = Record.load(run("method=simclr", "init=simclr", directory="2")).metrics
    assert not figures["simclr"].keys() & started_from_another.keys()


def losses(directory):
    return curves.read(directory)["train/loss"][1]


@pytest.mark.parametrize(
    ("method", "plain"),
    [*itertools.product(METHODS, ["search", "layout", "precision"]), ("relation", "precision")],
)
def test_what_makes_a_step_fast_leaves_the_loss_curve(run, monkeypatch, method, plain):
    """Against the run without it: search bit for bit, memory layout within 0.3%, bfloat16 within 5%.

    At a small learning rate: on such small maps rounding grows up to tenfold a step at the usual one.
    """
    rate, tolerance = {"search": (0.001, 0), "layout": (0.0003, 0.003), "precision": (0.001, 0.05)}[plain]
    overrides, net = [*ALL[method], f"optimizer.lr={rate}"], SMALL_NET if plain == "search" else []
    fast = losses(run(*overrides, *(["precision=bfloat16"] if plain == "precision" else []), directory="fast", net=net))
    if plain == "layout":
        monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    slow = losses(run(*overrides, "search=faiss" if plain == "search" else "search=torch", directory="slow", net=net))
    assert len(set(slow)) == len(slow)
    assert fast == pytest.approx(slow, abs=0, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kmclr", "relation", "evolving"])
def test_a_compiled_run_has_the_loss_curve_of_a_plain_one_and_resumes_exactly(run, monkeypatch, method):
    overrides = [*ALL[method], "optimizer.lr=0.0003"]
    plain = run(*overrides, directory="plain", net=[])
    compiled = run(*overrides, "compile=true", directory="compiled", net=[])
    assert losses(compiled) == pytest.approx(losses(plain), abs=0, rel=0.003)
    for steps in (2, 100):
        monkeypatch.setattr(run_module, "Stopper", lambda _, steps=steps: StopAfter(steps))
        with contextlib.suppress(SystemExit):
            run(*overrides, "compile=true", directory="broken", net=[])
    assert_same_run(compiled, compiled.parent / "broken")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ALL)
def test_cuda_graphs_leave_the_loss_curve(run, method, monkeypatch):
    """Six steps: the first of a graph are recorded, the others replayed.

    Few, and in full float32: on a CPU, convolutions rounded to TF32 (PyTorch's default on a GPU) change KMCLR's loss by
    1.2% at the sixth step and 2.6% at the tenth, since other prototypes become the nearest. Rounded to 21 bits of
    float32's 23, they change no method's by more than 0.2% in six steps.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    overrides = [*ALL[method], "optimizer.lr=0.0003", "epochs=2", "device=cuda", "precision=float32"]
    plain = run(*overrides, directory="plain", net=[])
    graphed = run(*overrides, "compile=true", directory="graphed", net=[])
    assert losses(graphed) == pytest.approx(losses(plain), abs=0, rel=0.005)


def test_reviving_without_asking_the_device_leaves_the_loss_curve(run, monkeypatch):
    overrides = ["method=kmclr", "k=40", "support.revive_after=1", "support.forget=none", "epochs=4"]
    fast = run(*overrides, directory="fast")
    revived = []

    def revive(self, points, images, labels):
        dead = (self.idle_K >= self.revive_after * self.size).nonzero()[:, 0][: len(points)]
        rows = torch.randperm(len(points))[: len(dead)]
        self._place(dead, points[rows], images[rows], labels[rows])
        revived.append(len(dead))

    monkeypatch.setattr(KMeans, "_revive", revive)
    assert_same_run(fast, run(*overrides, directory="slow"))
    assert sum(revived) > 0


def test_positives_are_described_as_they_were_when_they_served(run):
    """The queue holds exactly the batch before; within an epoch none of its images can be the anchor's own."""
    directory = run("method=nnclr", "queue_size=64", "epochs=1", "data.limit=640")
    assert curves.read(directory)["support/self_hit"][1] == [0.0]


def test_a_view_that_finds_its_own_image_is_a_hit_and_of_its_label(run):
    """The queue holds the one batch of all images, which look alike each time, to an encoder that does not learn."""
    plain = [f"augment.view{n}.{key}" for n in (1, 2) for key in ("crop_scale=[1,1]", "jitter=0")]
    directory = run("method=nnclr", "queue_size=64", "data.limit=64", "optimizer.lr=1e-12", *plain)
    metrics = Record.load(directory).metrics
    assert metrics["support/self_hit"] == metrics["support/label_agreement"] == 1


def test_the_labels_reach_no_encoder_whose_features_are_not_detached(run, monkeypatch):
    def attached(self, view1, view2):
        h = torch.cat([self.encoder(view1), self.encoder(view2)])
        return Output(0 * h.sum(), h, self.projector(h).chunk(2)[0].detach(), None)

    monkeypatch.setattr(Contrast, "forward", attached)
    directory = run(*METHODS["simclr"], "epochs=1", "tracking.log_every=1")
    assert {norm for (key, _), norm in history(directory).items() if key == "train/grad_norm"} == {0.0}


def test_the_online_classifier_learns(run):
    rates = ["optimizer.lr=1e-12", "evaluation.online_lr=3", "schedule.warmup_epochs=0"]
    directory = run("method=simclr", "epochs=12", "evaluation.every=12", *rates)
    assert Record.load(directory).metrics["val/online_top1"] > 50


@pytest.mark.parametrize(
    ("objective", "lookup", "networks"),
    [
        ([], "lookup", 2),
        (["objective=teacher", "objective.neighbours=3"], "nearest", 4),
        (["objective=relation"], "lookup", 4),
    ],
)
def test_an_epoch_takes_its_steps_and_the_support_set_its_share(run, monkeypatch, objective, lookup, networks):
    """By a clock that only a network, a lookup and an update move."""
    now = [0.0]

    def taking(seconds, function):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    for owner, name, seconds in ((Queue, lookup, 1), (Queue, "update", 2), (SmallNet, "forward", 4 / networks)):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    logged = curves.read(run("method=nnclr", "queue_size=64", *objective))
    assert logged["time/epoch_seconds"] == ([3, 6], [20, 21])  # the first step has nothing to look up
    assert logged["time/support_fraction"][1] == [8 / 20, 9 / 21]
    assert logged["time/images_per_second"][1] == [3 * 64 / 20, 3 * 64 / 21]


def test_every_step_has_the_learning_rates_of_its_place(run, monkeypatch):
    """Six steps, of which half an epoch, two when rounded, warm up."""
    used, norm = [], TrainState.grad_norm

    def noting(state):
        optimizers = state.optimizer, state.classifier_optimizer
        used.append([max(group["lr"] for group in each.param_groups) for each in optimizers])
        return norm(state)

    monkeypatch.setattr(TrainState, "grad_norm", noting)
    rates = ["optimizer.lr=0.4", "optimizer.scale_lr=true", "evaluation.online_lr=0.5", "schedule.warmup_epochs=0.5"]
    logged = curves.read(run("method=simclr", *rates))["train/lr"][1]
    factors = [0.5, 1.0, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
    assert logged == pytest.approx([0.4 * 64 / 256 * factor for factor in factors])
    assert used == [[rate, pytest.approx(0.5 * factor)] for rate, factor in zip(logged, factors, strict=True)]


def test_what_a_checkpoint_takes_is_no_time_of_an_epoch(run, monkeypatch):
    now, forward, save = [0.0], SmallNet.forward, TrainState.save

    def taking(seconds, function):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    monkeypatch.setattr(SmallNet, "forward", taking(1, forward))
    monkeypatch.setattr(TrainState, "save", taking(100, save))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    logged = curves.read(run("method=simclr", "checkpoint.minutes=1e-9"))
    assert logged["time/epoch_seconds"][1] == [2 * 3] * 2


def test_a_run_that_goes_on_within_an_epoch_counts_what_it_took_before(run, monkeypatch):
    now, forward = [0.0], SmallNet.forward

    def second(*args):
        now[0] += 1
        return forward(*args)

    monkeypatch.setattr(SmallNet, "forward", second)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run_module, "Stopper", lambda _: StopAfter(1))
    with pytest.raises(SystemExit):
        run("method=simclr")
    monkeypatch.setattr(run_module, "Stopper", Stopper)
    assert curves.read(run("method=simclr"))["time/epoch_seconds"][1] == [2 * 3] * 2


def test_a_run_that_is_stopped_in_the_final_evaluation_has_used_its_support_set_all_the_same(run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run("method=nnclr", "queue_size=64")
    assert "support_unused" not in Record.load(run("method=nnclr", "queue_size=64")).tags


def test_a_step_logs_how_its_features_lie_and_says_how_far_it_is(run, monkeypatch):
    forward, features, progress = SmallNet.forward, [], []

    def noting(self, images):
        out = forward(self, images)
        features.extend([out.detach()] if self.training else [])
        return out

    monkeypatch.setattr(SmallNet, "forward", noting)
    monkeypatch.setattr(Method, "after_step", lambda self, done: progress.append(done))
    logged = curves.read(run("method=simclr"))
    assert progress == [step / 6 for step in range(1, 7)]
    views = list(zip(features[::2], features[1::2], strict=True))
    assert logged["train/alignment"][1] == pytest.approx([alignment(one, other) for one, other in views])
    assert logged["train/uniformity"][1] == pytest.approx([uniformity(one) for one, _ in views])


def test_order_and_draws_are_of_the_runs_seed(run, monkeypatch):
    drawn, ordered, seed_everything, epoch_batches = [], [], loop.seed_everything, loop.epoch_batches

    def batches(split, batch_size, seed, epoch, *rest):
        ordered.append((seed, epoch))
        return epoch_batches(split, batch_size, seed, epoch, *rest)

    monkeypatch.setattr(loop, "seed_everything", lambda *numbers: drawn.append(numbers) or seed_everything(*numbers))
    monkeypatch.setattr(loop, "epoch_batches", batches)
    run("method=nnclr", "queue_size=64", "seed=3")
    start = loop.EPOCH_START
    assert drawn == [(3, 0, start), (3, 0), (3, 1), (3, 2), (3, 3, start), (3, 3), (3, 4), (3, 5)]
    assert ordered == [(3, 0), (3, 1)]


def test_the_norm_of_the_gradient_is_that_of_all_parameters_together():
    method = torch.nn.Linear(2, 1)
    method.weight.grad, method.bias.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0])
    assert TrainState.grad_norm(SimpleNamespace(method=method)) == 7


def test_a_trial_behind_the_median_stops_as_pruned(run, tmp_path, capsys):
    """The others were better than can be, after their second epoch."""
    Tracker(Path("sweep"), Tracking("jsonl", "exp", 10), {}, {"sweep_id": "0a"})
    study = optuna_study.Study(Path("sweep"), {"k": optuna_study.numbers(1, 50)}, "median", seed=0)
    for _ in range(4):
        other = study.propose()
        optuna_study.should_prune("sweep", other, 2, {"val/knn_top1": 101.0})
        study.conclude(other, "COMPLETE", 101.0)
    with pytest.raises(SystemExit) as end:
        run("method=simclr", "epochs=4", "tracking.parent=sweep", f"tracking.trial={study.propose()}")
    assert end.value.code == PRUNED
    record = Record.load(tmp_path / "run")
    assert (record.status, record.tags["pruned"]) == ("KILLED", "true")
    assert "stopped at step 6; pruned: other trials are far better" in capsys.readouterr().out


def test_no_trial_is_judged_after_its_last_epoch(run, monkeypatch):
    asked = []
    monkeypatch.setattr(optuna_study, "should_prune", lambda *given: asked.append(given[2]))
    run("method=simclr", "epochs=3")
    assert asked == [1, 2]


def test_the_same_command_again_trains_nothing_and_reports(run, capsys):
    directory = run("method=simclr")
    before = (directory / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run("method=simclr")
    assert (directory / "metrics.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert "finished" in out
    assert "started" not in out


class StopAfter(Stopper):
    """Asks to stop, as a time limit does, once so many steps were looked at."""

    def __init__(self, steps):
        super().__init__(None)
        self.left = steps

    @property
    def status(self):
        self.left -= 1
        return 75 if self.left < 0 else 0


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("simclr", []),
        ("nnclr", []),
        ("mnn", []),
        ("relation", []),
        ("evolving", []),
        ("evolving", ["objective=teacher", "objective.neighbours=2", "support.every=1"]),
        ("nnclr", ["support.precision=bfloat16"]),
        ("nnclr", ["search=ivf", "search.index='IVF4,Flat'", "search.nprobe=1", "search.refresh_every=3"]),
        ("kmclr", ["support.forget_every=1"]),
        ("kmclr", ["support.forget=decay", "support.half_life=3", "support.revive_after=2"]),
        ("kmclr", ["support.refit=faiss", "support.refit_every=2", "support.refit_window=100"]),
    ],
)
def test_stopped_anywhere_and_continued_it_is_the_unbroken_run(run, monkeypatch, method, extra):
    overrides = [*ALL[method], *extra, "epochs=3"]
    unbroken = run(*overrides, directory="unbroken")
    stops = 0
    for steps in (2, 1, 2, 1, 100):
        monkeypatch.setattr(run_module, "Stopper", lambda _, steps=steps: StopAfter(steps))
        try:
            run(*overrides, directory="broken")
        except SystemExit:
            stops += 1
            assert Record.load(unbroken.parent / "broken").status == "KILLED"
    assert stops >= 3
    assert_same_run(unbroken, unbroken.parent / "broken")


def test_another_evaluation_starts_no_training_anew_and_is_said(run, monkeypatch, tmp_path, caplog):
    overrides = ["method=simclr", "epochs=2"]
    monkeypatch.setattr(run_module, "Stopper", lambda _: StopAfter(4))
    with pytest.raises(SystemExit):
        run(*overrides)
    monkeypatch.setattr(run_module, "Stopper", Stopper)
    directory = tmp_path / "run"
    assert Record.load(directory).status == "KILLED"

    run(*overrides, "evaluation.every=2", "evaluation.knn_k=5")
    record = Record.load(directory)
    assert record.status == "FINISHED"
    assert record.tags["evaluation_changed"].startswith("evaluation.knn_k was 20 and is 5 at step ")
    assert "every" not in record.tags["evaluation_changed"]
    assert "rows logged so far keep the former evaluation (evaluation.knn_k was 20 and is 5)" in caplog.text

    caplog.clear()
    run(*overrides, "evaluation.knn_k=5")
    assert "otherwise" not in caplog.text  # the last session's evaluation is the one that counts
    run(*overrides, "evaluation.knn_k=9")
    assert "was evaluated otherwise (evaluation.knn_k was 5 and is 9)" in caplog.text
    assert f"python -m src.evaluate run={directory.relative_to(tmp_path)}" in caplog.text
    rows, notes = summarise([record])
    assert [each.params["evaluation.knn_k"] for row in rows for each in row.runs] == ["5", "5"]  # untrained, trained
    assert any("evaluation.knn_k was 20 and is 5 at step 4" in note for note in notes)


def test_another_evaluation_is_said_of_a_run_that_lost_its_checkpoints_and_of_one_that_returns_to_the_first(
    run, monkeypatch, tmp_path
):
    overrides, directory = ["method=simclr", "epochs=2"], tmp_path / "run"
    for steps, more in [(2, []), (1, ["evaluation.knn_k=5"]), (1, ["evaluation.bank=30"])]:
        monkeypatch.setattr(run_module, "Stopper", lambda _, steps=steps: StopAfter(steps))
        with pytest.raises(SystemExit):
            run(*overrides, *more)
        if not more:
            shutil.rmtree(directory / "checkpoints")
    tags = Record.load(directory).tags
    assert (tags["evaluation.knn_k"], tags["evaluation.bank"]) == ("20", "30")
    first, second = tags["evaluation_changed"].split("; ")
    assert first == "evaluation.knn_k was 20 and is 5 at step 0"
    assert second == "evaluation.bank was 50000 and is 30, evaluation.knn_k was 5 and is 20 at step 2"


def test_what_an_evaluation_no_longer_has_is_no_setting_of_the_run(run, monkeypatch, tmp_path):
    overrides, directory = ["method=simclr", "epochs=2"], tmp_path / "run"
    monkeypatch.setattr(run_module, "Stopper", lambda _: StopAfter(2))
    with pytest.raises(SystemExit):
        run(*overrides, "evaluation=fewshot")
    monkeypatch.setattr(run_module, "Stopper", Stopper)
    run(*overrides, "evaluation.bank=null")
    record = Record.load(directory)
    assert record.tags["evaluation.fewshot.draws"] == record.tags["evaluation.bank"] == "null"
    of_now = comparable(record)
    assert of_now["evaluation.name"] == "linear"
    assert not [key for key in of_now if key.startswith("evaluation.fewshot") or key == "evaluation.bank"]


def test_a_crash_loses_at_most_the_steps_since_the_checkpoint(run, monkeypatch):
    """The steps are computed again, and logged once."""
    unbroken = run("method=kmclr", "k=7", "epochs=3", "checkpoint.every=1", directory="unbroken")
    real, calls = loop.seed_everything, []

    def crash(*numbers):
        calls.append(numbers)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        real(*numbers)

    monkeypatch.setattr(loop, "seed_everything", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run("method=kmclr", "k=7", "epochs=3", "checkpoint.every=1", directory="broken")
    assert Record.load(unbroken.parent / "broken").status == "FAILED"
    monkeypatch.setattr(loop, "seed_everything", real)
    assert_same_run(unbroken, run("method=kmclr", "k=7", "epochs=3", "checkpoint.every=1", directory="broken"))


DAMAGES = {
    "the last row is gone": (lambda lines: lines[:-1], 3),
    "a row in the middle is gone": (lambda lines: [*lines[:-2], lines[-1]], None),
    "all rows but two are gone": (lambda lines: lines[:2], None),
    "the last row has lost its newline": (lambda lines: [*lines[:-1], lines[-1][:-1]], 4),
}


def test_after_so_many_epochs_and_at_the_end_there_are_validations_and_checkpoints_which_follow_their_rows(
    run, monkeypatch
):
    done, log, sync, save = [], Tracker.log, Tracker.sync, TrainState.save
    monkeypatch.setattr(Tracker, "log", lambda self, *rest, **more: done.append("log") or log(self, *rest, **more))
    monkeypatch.setattr(Tracker, "sync", lambda self: done.append("sync") or sync(self))
    monkeypatch.setattr(TrainState, "save", lambda self, *rest: done.append(self.step) or save(self, *rest))
    directory = run("method=simclr", "epochs=5", "checkpoint.every=2", "evaluation.every=2")
    assert curves.read(directory)["val/knn_top1"][0] == [0, 6, 12, 15]
    saves = [place for place, each in enumerate(done) if isinstance(each, int)]
    assert [done[place] for place in saves] == [6, 12, 15]
    assert [done[place - 1] for place in saves] == ["sync"] * 3


def test_rows_that_a_checkpoint_rests_on_are_missed(run, tmp_path, monkeypatch, caplog, capsys):
    """There are checkpoints of steps 3 and 4, and the last row is that of the fourth step."""
    overrides = ["method=kmclr", "k=7"]
    unbroken = run(*overrides, directory="unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Stopper", lambda _: StopAfter(4))
        with pytest.raises(SystemExit):
            run("checkpoint.minutes=0", *overrides, directory="stopped")
    for name, (damage, goes_on_from) in DAMAGES.items():
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        metrics = tmp_path / name / "metrics.jsonl"
        metrics.write_bytes(b"".join(damage(metrics.read_bytes().splitlines(keepends=True))))
        caplog.clear()
        if goes_on_from is None:
            with pytest.raises(UsageError, match=r"metrics\.jsonl lacks rows from before step-00000004\.pt: put the"):
                run(*overrides, directory=f"'{name}'")
            continue
        assert_same_run(unbroken, run(*overrides, directory=f"'{name}'").with_name(name))
        assert f"continued at step {goes_on_from}" in capsys.readouterr().out
        assert ("trying the checkpoint before" in caplog.text) == (goes_on_from == 3)


@pytest.mark.parametrize("by_another", [False, True])
def test_a_folder_that_is_taken_away_is_missed_and_what_is_put_there_stays(run, tmp_path, monkeypatch, by_another):
    real = loop.seed_everything

    def remove_at_step_4(*numbers):
        if numbers[1:] == (4,):
            shutil.rmtree(tmp_path / "run")
            if by_another:
                (tmp_path / "run").mkdir()
                (tmp_path / "run/metrics.jsonl").write_text("another's\n")
        real(*numbers)

    monkeypatch.setattr(loop, "seed_everything", remove_at_step_4)
    with pytest.raises(CannotWrite, match="run: was removed or replaced while the run worked in it"):
        run("method=simclr", "checkpoint.every=1")
    left = [path.name for path in (tmp_path / "run").glob("*")]
    assert left == (["metrics.jsonl"] if by_another else [])
    if by_another:
        assert (tmp_path / "run/metrics.jsonl").read_text() == "another's\n"


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
    with pytest.raises(Diverged) as second:  # the same command does not train to the same end
        run(*DIVERGES, "optimizer.lr=1e25")
    assert str(second.value) == str(first.value)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(run, tmp_path, monkeypatch):
    """The loss alone would not show it before the next step, and the last step of an epoch is saved."""
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
    rates = {at: 1e38}  # a finite gradient, and a step into nowhere

    def rate(state, steps):
        lr = real(state, steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rates.get(state.step, group["lr"])
        return lr

    monkeypatch.setattr(run_module.TrainState, "set_lr", rate)
    with pytest.raises(Diverged, match="of the weights inf"):
        run("method=simclr", "optimizer=sgd", saving)
    assert checkpoint.load_latest(tmp_path / "run/checkpoints")[1]["step"] == kept


def test_a_collapse_is_said_once_and_tagged_or_ends_the_run(run, tmp_path, monkeypatch, caplog):
    real = models.ResNetTiny.forward

    def collapsed(encoder, images):
        features = real(encoder, images)
        return features.mean(1, keepdim=True) * torch.arange(features.shape[1])

    monkeypatch.setattr(models.ResNetTiny, "forward", collapsed)
    said = r"collapsed at step 3: features of different images are alike \(effective rank 1\.00 of 128\); lower optim"
    record = Record.load(run("method=simclr", net=[]))
    assert len(re.findall(said, caplog.text)) == caplog.text.count("collapsed at step") == 1
    assert record.tags["collapsed"].startswith("at step 3: features of different images are alike")

    with pytest.raises(Collapsed, match=said):
        run("method=simclr", "on_collapse=stop", directory="stopped", net=[])
    with pytest.raises(Collapsed, match="on_collapse=warn trains on"):  # without another epoch
        run("method=simclr", "on_collapse=stop", directory="stopped", net=[])
    assert Record.load(tmp_path / "stopped").status == "FAILED"
    assert max(step for _, step in history(tmp_path / "stopped")) == 3


@pytest.mark.parametrize("part", ["features", "embeddings"])
def test_features_and_embeddings_are_looked_at_for_a_collapse(part):
    parts = {"features": torch.randn(128, 16), "embeddings": torch.randn(64, 16)}
    tracker = SimpleNamespace(record=SimpleNamespace(tags={}))
    collapse.check(Output(torch.zeros(()), ids=None, **parts), 7, tracker, "stop")
    assert tracker.record.tags == {}
    parts[part] = torch.ones_like(parts[part])
    with pytest.raises(Collapsed, match=f"at step 7: {part} of different images are alike"):
        collapse.check(Output(torch.zeros(()), ids=None, **parts), 7, tracker, "stop")


@pytest.mark.parametrize(("where", "write"), [("rows", "log"), ("checkpoint", "whole"), ("record", "write_whole")])
def test_a_full_disk_stops_the_run_and_when_there_is_room_it_is_the_unbroken_one(
    run, tmp_path, monkeypatch, where, write
):
    overrides = ["method=kmclr", "k=7", "epochs=3", "checkpoint.every=1"]
    unbroken = run(*overrides, directory="unbroken")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if where == "rows":
            patch.setattr(run_module, "Tracker", FullAtStep5)
        else:
            writes = importlib.import_module(f"src.runs.{where}")
            patch.setattr(writes, write, failing(getattr(writes, write), full, after=2))
        with pytest.raises(CannotWrite, match=r"run(/metrics\.jsonl)?: No space left on device; mend that, and"):
            run(*overrides)
    assert Record.load(tmp_path / "run").status in ("FAILED", "RUNNING")  # the latter where not even that could be said
    assert_same_run(unbroken, run(*overrides))


def test_a_disk_that_fills_up_before_the_first_step_leaves_no_run_that_seems_to_go_on(run, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(run_module, "write_whole", failing(run_module.write_whole, full, after=0))
    with pytest.raises(CannotWrite, match="No space left on device") as error:
        run("method=simclr")
    assert error.value.status == 74  # of the command
    assert Record.load(tmp_path / "run").status == "FAILED"


def failing(function, error, after):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise error
        return function(*arguments)

    return fail


class FullAtStep5(Tracker):
    """Takes a part of the row, as a disk does that is full."""

    def log(self, metrics, step):
        if step == 5:
            rows = self._rows
            self._rows = SimpleNamespace(write=lambda row: rows.write(row[:10]), fileno=rows.fileno, close=rows.close)
        super().log(metrics, step)


def test_time_makes_checkpoints_too_also_within_an_epoch(run, tmp_path, monkeypatch):
    steps, save = [], run_module.TrainState.save
    monkeypatch.setattr(
        run_module.TrainState, "save", lambda state, *where: (steps.append(state.step), save(state, *where))
    )
    unbroken = run("method=kmclr", "k=7", "checkpoint.minutes=0", directory="often")
    assert steps == [1, 2, 3, 4, 5, 6]
    steps.clear()
    assert_same_run(unbroken, run("method=kmclr", "k=7", directory="seldom"))
    assert steps == [6]


@pytest.mark.parametrize(("seconds", "status"), [(110, 0), (130, loop.SAVE)])
def test_a_checkpoint_is_due_after_its_minutes(seconds, status):
    after_two = SimpleNamespace(checkpoint=SimpleNamespace(minutes=2))
    saved = {"cfg": after_two, "saved": time.monotonic() - seconds, "ranks": SimpleNamespace(first=True)}
    running = SimpleNamespace(**saved, stopper=SimpleNamespace(status=0))
    assert loop.Pretraining._requested_status(running) == status


def test_a_signal_in_the_final_evaluation_is_not_kept_waiting(run, tmp_path, monkeypatch):
    unbroken = run("method=simclr", directory="unbroken")

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Protocol, "final", interrupted)
        with pytest.raises(SystemExit) as end:
            run("method=simclr")
    assert end.value.code == 128 + signal.SIGTERM
    assert Record.load(tmp_path / "run").status == "KILLED"
    assert_same_run(unbroken, run("method=simclr"))


def test_a_signal_in_a_validation_is_looked_at_between_its_blocks(run, tmp_path, monkeypatch):
    """Each command is told to stop in the second validation that it comes to; the end is that of a run that was not."""
    arguments = ["method=kmclr", "k=7", "evaluation.every=1", "epochs=2"]
    unbroken = run(*arguments, directory="unbroken")
    validate, encode, counts = loop.Protocol.validation, FrozenEncoder.encode, []

    def counted(frozen, images):
        counts[-1] += 1
        if len(counts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(frozen, images)

    def interrupted(*given):
        counts.append(0)
        return validate(*given)

    for step in (3, 6):
        counts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(FrozenEncoder, "encode", counted)
            patch.setattr(loop.Protocol, "validation", interrupted)
            with pytest.raises(SystemExit) as end:
                run(*arguments)
        assert end.value.code == 128 + signal.SIGTERM
        assert counts == [2, 1]  # of the validation images, and of the bank
        assert Record.load(tmp_path / "run").status == "KILLED"
        assert checkpoint.load_latest(tmp_path / "run/checkpoints")[1]["step"] == step
    assert_same_run(unbroken, run(*arguments))


def test_a_whole_checkpoint_that_no_run_wrote_is_refused(run, tmp_path):
    run("method=simclr", "epochs=1")
    (tmp_path / "run/run.json").unlink()
    _, state = checkpoint.load_latest(tmp_path / "run/checkpoints")
    for broken in ({}, state | {"config": "none"}, state | {"optimizer": {}}, state | {"seconds": 1}):
        checkpoint.save(tmp_path / "run/checkpoints", state["step"], broken)
        with pytest.raises(UsageError, match=r"is not the checkpoint of a run|is of another") as error:
            run("method=simclr", "epochs=1")
        assert "\n" not in str(error.value)


def test_final_trains_on_the_validation_images_too(run):
    directory = run("method=simclr", "data.limit=null", "data.final=true", "epochs=1")
    metrics = Record.load(directory).metrics
    assert not [key for key in metrics if key.startswith("val/")]
    assert metrics["test/linear_top1"] > 0
    assert max(step for _, step in history(directory)) == 1437 // 64


def test_the_original_protocol_and_timm_run_too(run):
    directory = run(
        "method=simclr", "epochs=1", "evaluation=original", "evaluation.epochs=1", "data.limit=128",
        "backbone=timm", "backbone.name=resnet10t", net=[],
    )  # fmt: skip
    assert 0 < Record.load(directory).metrics["test/linear_top1"] < 100


def test_another_configuration_in_the_same_directory_is_refused(run):
    run("method=kmclr", "k=7")
    with pytest.raises(UsageError, match="k was 7 and is 8"):
        run("method=kmclr", "k=8")


def trained_on(run, layout, root, *overrides):
    """Trains on the set in a folder, unless it has been done; returns how many runs there are beside the folder."""
    own = ["output_dir=null", "method=simclr", "epochs=1", "data.limit=null", "batch_size=8", "evaluation.epochs=1"]
    run(*own, f"data={layout}", f"data.root={root}", *overrides)
    return len(list((root.parent / "multirun").glob("simclr-*")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_its_settings_and_its_images_wherever_they_lie(run, tmp_path, capsys, layout):
    a, b = (write_set(layout, tmp_path / name, seed) for seed, name in enumerate("ab"))
    assert trained_on(run, layout, a) == 1
    assert trained_on(run, layout, b) == 2
    capsys.readouterr()
    a = a.rename(tmp_path / "moved")
    assert trained_on(run, layout, a) == 2
    out = capsys.readouterr().out
    assert "finished" in out
    assert "started" not in out
    if layout == "image_folder":
        random_image(99).save(a / "train/a/new.png")
    else:
        shutil.copy(b / "train-0.parquet", a / "train-1.parquet")
    assert trained_on(run, layout, a) == 3

    trained_on(run, layout, b, "seed=8")
    experiment = Record.load(next((tmp_path / "multirun").iterdir())).experiment
    table, _ = summarise(read_runs(experiment, "jsonl"))
    assert sorted(len(row.runs) for row in table if row.method != "untrained") == [1, 1, 2]
    for directory in (tmp_path / "multirun").iterdir():
        fingerprint = Record.load(directory).params["data.fingerprint"]
        assert OmegaConf.load(directory / "config.yaml").data.fingerprint == fingerprint
        assert checkpoint.load_latest(directory / "checkpoints")[1]["config"]["data"]["fingerprint"] == fingerprint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_was_stopped_continues_on_its_own_images_only(run, tmp_path, monkeypatch, layout):
    a, b = (write_set(layout, tmp_path / name, seed) for seed, name in enumerate("ab"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Stopper", lambda _: StopAfter(2))
        with pytest.raises(SystemExit):
            trained_on(run, layout, a, "output_dir=run")
    record = (tmp_path / "run/run.json").read_bytes()
    for remove in (False, True):  # the checkpoint alone says it too
        if remove:
            (tmp_path / "run/run.json").unlink()
        with pytest.raises(UsageError, match=r"data\.fingerprint was [0-9a-f]{16} and is [0-9a-f]{16}"):
            trained_on(run, layout, b, "output_dir=run")
    (tmp_path / "run/run.json").write_bytes(record)
    trained_on(run, layout, a.rename(tmp_path / "moved"), "output_dir=run")
    assert Record.load(tmp_path / "run").status == "FINISHED"


def test_what_a_support_set_draws_between_epochs_is_of_seed_and_step(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(Queue, "start_epoch", lambda *_: drawn.append(float(torch.rand(1))))
    run(*ALL["nnclr"], "epochs=2", directory="unbroken")
    first, second = drawn
    assert first != second
    for steps in range(1, 6):  # one of these stops is at the end of the first epoch
        monkeypatch.setattr(run_module, "Stopper", lambda _, steps=steps: StopAfter(steps))
        with contextlib.suppress(SystemExit):
            run(*ALL["nnclr"], "epochs=2", directory=f"after{steps}")
        monkeypatch.setattr(run_module, "Stopper", lambda _: StopAfter(100))
        run(*ALL["nnclr"], "epochs=2", directory=f"after{steps}")
    assert set(drawn) == {first, second}


def test_resume_never_starts_beside_what_is_there(run, tmp_path, capsys):
    run("method=simclr", "epochs=1")
    with pytest.raises(SystemExit):
        run("method=simclr", "epochs=1", "resume=never", "max_minutes=0.00001")
    assert "run.2: stopped at step 1; output_dir=run.2 resume=auto continues" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run.2")
    run("method=simclr", "epochs=1", "resume=never")
    assert Record.load(tmp_path / "run").run_id != Record.load(tmp_path / "run.2").run_id
    assert history(tmp_path / "run") == history(tmp_path / "run.2")


def test_a_directory_in_use_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UsageError, match="another process is using it"):
        run("method=simclr")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_doubtful_settings_are_warned_of(run, caplog):
    run("method=nnclr", "queue_size=201", "epochs=2", directory="large")
    assert "queue_size=201: more than the 200 training images" in caplog.text
    run("method=kmclr", "k=201", "epochs=2", directory="other")
    assert "k=201: more prototypes than the 200 training images" in caplog.text
    run("method=kmclr", "k=7", "epochs=1", "support.refit=faiss", directory="refit")
    assert "support.refit_window=16384: 576 embeddings between two resets never fill it" in caplog.text
    assert "schedule.warmup_epochs=2: not shorter than epochs=1" in caplog.text


REFIT = ["method=kmclr", "k=7", "batch_size=64", "support.refit=faiss", "support.forget=reset"]
REFIT += ["support.forget_every=2"]


@pytest.mark.parametrize(
    ("overrides", "images", "warns"),
    [
        (["method=nnclr", "queue_size=200"], 199, True),
        (["method=nnclr", "queue_size=200"], 200, False),
        (["method=kmclr", "k=200"], 199, True),
        (["method=kmclr", "k=200"], 200, False),
        (["method=simclr", "epochs=5", "schedule.warmup_epochs=5"], 200, True),
        (["method=simclr", "epochs=5", "schedule.warmup_epochs=4.9"], 200, False),
        ([*REFIT, "support.refit_window=641"], 383, True),  # 2 epochs of 5 batches
        ([*REFIT, "support.refit_window=640"], 320, False),
    ],
)
def test_settings_are_doubtful_from_an_exact_bound_on(caplog, overrides, images, warns):
    warn_of_doubtful_settings(parsed(*overrides), images)
    assert bool(caplog.text) == warns


def test_a_batch_that_was_asked_for_or_has_parts_is_never_made_smaller(caplog):
    data = SimpleNamespace(train=range(180))
    check_batch_fits(parsed("batch_size=180"), data, exact=True)
    assert not caplog.text
    check_batch_fits(parsed(), data, exact=False)
    assert "batch_size=256: more than the 180 training images, so each step takes all of them" in caplog.text
    for cfg, exact in ((parsed(), True), (parsed("backbone.bn_splits=8"), False)):
        with pytest.raises(UsageError, match="batch_size=256 is larger than the 180 training images"):
            check_batch_fits(cfg, data, exact)


@pytest.mark.parametrize(("size", "stem", "warns"), [(224, "small", True), (224, "large", False), (64, "small", False)])
def test_a_stem_that_keeps_every_pixel_of_a_large_image_is_warned_of(caplog, size, stem, warns):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        cfg = parse(compose("train", overrides=[f"data.image_size={size}", f"backbone.stem={stem}"]))
    warn_of_doubtful_settings(cfg, 50_000)
    assert ("backbone.stem=small: keeps all 224 x 224 pixels, 16 times the work" in caplog.text) == warns


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["method=nnclr", "queue_size=321"],
            "queue_size=321: is never filled, because only 320 embeddings are seen before the last batch of epochs=2",
        ),
        (
            ["method=kmclr", "k=129", "support.forget_every=1"],
            "k=129: .* prototypes start anew every epoch .*, and only 128 embeddings are seen in that time",
        ),
        (["epochs=1", "batch_size=200", "k=5"], "only 0 embeddings .*; set batch_size lower or epochs higher"),
        (["method=kmclr", "k=321", "support.forget_every=5"], "k=321: is never filled"),
        (["method=kmclr", "k=321", "support.forget=none"], "k=321: is never filled"),
        (["method=kmclr", "k=321", "support.forget_every=2"], "before the last batch of epochs=2"),
        (["support=evolving", "support.start=321"], "support.start=321: is never filled"),
    ],
)
def test_a_support_set_that_is_never_filled_is_refused(run, tmp_path, overrides, says):
    """Two epochs of three batches of 64 of 200 images: the last batch comes after 320 embeddings."""
    with pytest.raises(UsageError, match=says):
        run(*overrides)
    assert not (tmp_path / "run").exists()


def test_system_metrics_without_psutil_are_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(UsageError, match=r"^tracking.system_metrics=true: needs psutil: pip install .*\[system\]'$"):
        run("method=simclr", "tracking=mlflow", "tracking.system_metrics=true")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "largest", [["method=nnclr", "queue_size=320"], ["method=kmclr", "k=128", "support.forget_every=1"]]
)
def test_a_support_set_that_is_filled_in_the_last_moment_is_used(run, largest):
    assert 1 <= Record.load(run(*largest)).metrics["support/perplexity"] <= 64  # of the one batch that asked


def test_a_run_whose_support_set_was_never_filled_is_not_reported_as_what_it_is_not(run, monkeypatch, caplog):
    """As of a support set from outside, of which nobody knows how it is filled."""
    monkeypatch.setattr(KMeans, "ready", property(lambda _: False))
    record = Record.load(run("method=kmclr", "k=7", "epochs=1"))
    assert "the support set was never filled, so reports leave the run out" in caplog.text
    rows, notes = summarise([record])
    assert rows == []
    assert notes == ["left out: run (its support set was never filled)"]


class Silent(Method):
    """A method of one's own that never asks its support set."""

    def forward(self, view1, view2):
        h = self.encoder(torch.cat([view1, view2]))
        z = self.projector(h)
        return Output(z.square().mean(), h.detach(), z.detach()[: len(view1)], None)


def test_a_method_that_does_not_say_whether_it_uses_its_support_set_is_warned_of(run, caplog):
    own = "+method._target_=tests.training.test_loop.Silent"
    record = Record.load(run("method=nnclr", "queue_size=64", "epochs=1", own))
    assert "the method returned no ids: nothing tells whether it used its support set" in caplog.text
    assert "support_unused" not in record.tags


def test_other_conditions_on_resume_are_said_and_another_precision_is_refused(run, tmp_path, monkeypatch, caplog):
    overrides = ["method=simclr", "precision=auto", "epochs=1"]
    monkeypatch.setattr(build, "precision", lambda *_: torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Stopper", lambda _: StopAfter(1))
        with pytest.raises(SystemExit):
            run(*overrides)
    before = Record.load(tmp_path / "run").conditions
    assert [(each["step"], each["precision"], each["threads"]) for each in before] == [("0", "float32", "1")]

    with monkeypatch.context() as patch:
        patch.setattr(build, "precision", lambda *_: torch.bfloat16)
        with pytest.raises(UsageError, match="computed in float32 up to step 2, and precision=auto means bfloat16 on"):
            run(*overrides)
    assert Record.load(tmp_path / "run").conditions == before

    torch.set_num_threads(2)
    run(*overrides)
    assert "run: threads was 1 and is 2, so the end differs from that of an unbroken run" in caplog.text
    record = Record.load(tmp_path / "run")
    assert [(each["step"], each["threads"]) for each in record.conditions] == [("0", "1"), ("2", "2")]
    assert "run was continued under other conditions: threads was 1 and is 2 from step 2 on" in summarise([record])[1]


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(command, run, small, tmp_path):
    """The real command line, killed twice and then left alone; `scripts/reliability/kills.py` does it at random.

    With the method that has most to save; `test_stopped_anywhere_and_continued_it_is_the_unbroken_run` has them all.
    """
    overrides = [*METHODS["kmclr"], "epochs=8", "checkpoint.every=1"]
    unbroken = run(*overrides, directory="unbroken")
    arguments = [*small, *SMALL_NET, *overrides, "tracking=jsonl", "output_dir=broken"]
    for ends, status in (("- 9 3", -signal.SIGKILL), ("- 9 12", -signal.SIGKILL), ("- 0 0", 0)):
        assert command("src.train", *arguments, environment={"ENDS": ends}).returncode == status
    assert_same_run(unbroken, tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGXCPU])
def test_a_signal_stops_the_run_cleanly(command, small, tmp_path, number):
    """In its fifth step, which is the last; SIGXCPU is what comes at a limit of processor time (``ulimit -S -t``)."""
    arguments = [*small, *SMALL_NET, "method=kmclr", "k=7", "tracking=jsonl", "output_dir=run"]
    stopped = command("src.train", *arguments, environment={"ENDS": f"- {number:d} 9"})
    assert stopped.returncode == 128 + number
    assert Record.load(tmp_path / "run").status == "KILLED"
    assert curves.read(tmp_path / "run")["train/loss"][0] == list(range(5))
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]["step"] == 5


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_65(command, small):
    diverged = command("src.train", *small, *SMALL_NET, "method=simclr", "tracking=jsonl", "optimizer.lr=1e30")
    assert diverged.returncode == 65
    assert diverged.stderr.splitlines()[-1].startswith("error: diverged at step ")


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_stops_as_by_a_signal(small, tmp_path):
    arguments = " ".join([*small, "method=simclr", "tracking=jsonl", "epochs=1000", "output_dir=run"])
    line = f"{sys.executable} -m src.train {arguments} | head -1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | ELSEWHERE
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGPIPE, "run: started at step 0\n")
    assert "Error" not in done.stderr
    assert Record.load(tmp_path / "run").status == "KILLED"


@pytest.mark.slow
def test_max_minutes_stops_resumably(command, small, tmp_path):
    arguments = [*small, "method=simclr", "tracking=jsonl", "output_dir=run", "epochs=1000", "max_minutes=0.002"]
    first = command("src.train", *arguments)
    assert (first.returncode, Record.load(tmp_path / "run").status) == (75, "KILLED")
    assert "the same command continues" in first.stdout
    assert "continued at step" in command("src.train", *arguments).stdout


def test_a_time_that_is_up_after_the_last_step_leaves_the_final_evaluation(run, tmp_path):
    run("method=simclr", "epochs=1", "batch_size=64", "data.limit=80", "max_minutes=0.00001")
    assert Record.load(tmp_path / "run").status == "FINISHED"


@pytest.mark.slow
def test_neither_mlflow_nor_faiss_is_needed(command, small, tmp_path):
    """As on a machine where importing either fails."""
    for name in ("mlflow", "faiss"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    shadowed = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    run = [*small, "method=kmclr", "k=7", "epochs=1", "output_dir=run", "tracking=jsonl", "search=torch"]
    done = command("src.train", *run, environment=shadowed, anew=True)
    assert done.returncode == 0, done.stderr
    assert Record.load(tmp_path / "run").metrics.keys() >= METRICS


def test_without_mlflow_the_other_tracking_is_named_and_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="tracking=jsonl"):
        run("method=simclr", "tracking=mlflow")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.xdist_group("cifar")  # whoever runs all such tests decodes the images once
def test_real_images_and_mlflow(command, cache_dir, tmp_path, monkeypatch):
    """On CIFAR-100, every metric is in MLflow, of the method that has most of them."""
    done = command(
        "src.train",
        *METHODS["kmclr"],
        f"data.root={CIFAR100}",
        f"data.cache_dir={cache_dir}",
        *SMALL_NET,
        "data.limit=500",
        "batch_size=100",
        "epochs=2",
        "evaluation.epochs=5",
        "tracking.experiment=cifar",
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (found,) = read_runs("cifar", "mlflow")
    assert found.status == "FINISHED"
    assert found.metrics.keys() == METRICS | OF_METHOD["kmclr"]
    assert found.params["support_set_size"] == "7"
