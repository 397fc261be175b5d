import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.config.schema import Tracking
from src.evaluation.diagnostics import alignment, uniformity
from src.methods.base import Method, Output
from src.methods.contrast import Contrast
from src.reporting import curves
from src.runs import checkpoint
from src.runs.record import Record
from src.runs.tracker import Tracker
from src.support.base import Neighbors
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.sweeps import optuna_study
from src.system.stopping import PRUNED
from src.training import loop
from src.training.state import TrainState
from tests.training.small_net import SMALL_NET, SmallNet
from tests.training.training_runs import ALL, METHODS, assert_same_run, clocked, history, losses


def test_the_untrained_encoder_is_that_of_step_0_and_a_seeds_whatever_the_method(run):
    """Its metrics depend on the seed and not on the method; its kNN accuracy is that of the validation at step 0.

    A run that starts from another run's weights has no such metrics.
    """
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


@pytest.mark.parametrize(
    ("method", "plain"),
    [*itertools.product(METHODS, ["search", "layout", "precision"]), ("relation", "precision")],
)
def test_what_makes_a_step_fast_leaves_the_loss_curve(run, monkeypatch, method, plain):
    """A run with the speed-up has the losses of the run without it.

    The search must agree bit for bit, the memory layout within 0.3%, bfloat16 within 5%. The learning rate is small,
    because on such small feature maps rounding errors grow up to tenfold a step at the usual one.
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
def test_a_compiled_run_has_the_loss_curve_of_a_plain_one_and_resumes_exactly(run, stopped):
    """A teacher has all the networks that are compiled. Their states have the keys that they have without it."""
    overrides = [*ALL["relation"], "optimizer.lr=0.0003"]
    plain = run(*overrides, directory="plain", net=[])
    compiled = run(*overrides, "compile=true", directory="compiled", net=[])
    assert losses(compiled) == pytest.approx(losses(plain), abs=0, rel=0.003)
    states = [checkpoint.load_latest(each / "checkpoints")[1]["model"] for each in (plain, compiled)]
    assert states[0].keys() == states[1].keys()
    stopped(2, *overrides, "compile=true", directory="broken", net=[])
    assert_same_run(compiled, run(*overrides, "compile=true", directory="broken", net=[]))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ALL)
def test_cuda_graphs_leave_the_loss_curve(run, method, monkeypatch):
    """Six steps are compared: the first ones are recorded as a graph, the others replay it.

    They are few, and in full float32. On a CPU, convolutions rounded to TF32 (PyTorch's default on a GPU) change
    KMCLR's loss by 1.2% at the sixth step and 2.6% at the tenth, since other prototypes become the nearest; rounded to
    21 of float32's 23 bits, they change no method's loss by more than 0.2% in six steps.
    """
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
    """The queue holds the previous batch at a lookup, so within an epoch no entry is of the query's own image."""
    directory = run("method=nnclr", "queue_size=64", "epochs=1", "data.limit=640")
    assert curves.read(directory)["support/self_hit"][1] == [0.0]


def test_a_view_that_finds_its_own_image_is_a_hit_and_of_its_label(run):
    """The queue holds all images, and these look the same in every epoch to an encoder that does not learn."""
    plain = [f"augment.view{n}.{key}" for n in (1, 2) for key in ("crop_scale=[1,1]", "jitter=0")]
    directory = run("method=nnclr", "queue_size=64", "data.limit=64", "optimizer.lr=1e-12", *plain)
    metrics = Record.load(directory).metrics
    assert metrics["support/self_hit"] == metrics["support/label_agreement"] == 1


def test_a_support_set_may_look_up_by_the_anchors_image(run, monkeypatch):
    """The queue holds all images, and returns each anchor's own."""

    def own(queue, z):
        found = queue.nearest(z, 1).first()
        if queue.anchors is None:
            return found
        ids = (queue.images_N == queue.anchors.images[:, None]).int().argmax(1)
        return Neighbors(queue.ring.rows_ND[ids], ids)

    monkeypatch.setattr(Queue, "lookup", own)
    metrics = Record.load(run("method=nnclr", "queue_size=64", "data.limit=64")).metrics
    assert metrics["support/self_hit"] == metrics["support/label_agreement"] == 1
    assert metrics["val/right_positives"] < 100


def test_the_labels_reach_no_encoder_whose_features_are_not_detached(run, monkeypatch):
    """The loop detaches what a method returns, so the online classifier's loss gives the encoder no gradient."""

    def attached(self, view1, view2):
        h = torch.cat([self.encoder(view1), self.encoder(view2)])
        return Output(0 * h.sum(), h, self.projector(h).chunk(2)[0].detach(), None)

    monkeypatch.setattr(Contrast, "forward", attached)
    directory = run(*METHODS["simclr"], "epochs=1", "tracking.log_every=1")
    assert {norm for (key, _), norm in history(directory).items() if key == "train/grad_norm"} == {0.0}


def test_the_last_step_is_logged_whatever_its_number(run):
    """Otherwise the last loss of a run of a few steps would be that of the untrained network."""
    directory = run(*METHODS["simclr"], "epochs=2", "tracking.log_every=4")
    steps, _ = curves.read(directory)["train/loss"]
    last = int(curves.read(directory)["val/knn_top1"][0][-1]) - 1
    assert steps == [*range(0, last, 4), last]
    assert last % 4, "else it would be logged anyway"


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
    """The epoch's time and the support set's fraction of it are right, by a clock that only these calls move."""
    calls = {(Queue, lookup): 1, (Queue, "update"): 2, (SmallNet, "forward"): 4 / networks}
    clocked(monkeypatch, calls)
    logged = curves.read(run("method=nnclr", "queue_size=64", *objective))
    assert logged["time/epoch_seconds"] == ([3, 6], [20, 21])  # the first step has nothing to look up
    assert logged["time/support_fraction"][1] == [8 / 20, 9 / 21]
    assert logged["time/images_per_second"][1] == [3 * 64 / 20, 3 * 64 / 21]


def test_an_epochs_metrics_of_the_support_set_are_of_its_own_lookups(run, monkeypatch):
    monkeypatch.setattr(Queue, "stats", lambda queue: {"support/hits": float(queue.hits_N.sum())})
    logged = curves.read(run("method=nnclr", "queue_size=64"))
    assert logged["support/hits"][1] == [2 * 128, 3 * 128]  # the first step has nothing to look up


def test_every_step_has_the_learning_rates_of_its_place(run, monkeypatch):
    """There are six steps; half an epoch of three, rounded to two steps, is warm-up."""
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
    clocked(monkeypatch, {(SmallNet, "forward"): 1, (TrainState, "save"): 100})
    logged = curves.read(run("method=simclr", "checkpoint.minutes=1e-9"))
    assert logged["time/epoch_seconds"][1] == [2 * 3] * 2


def test_a_step_logs_how_its_features_lie_and_says_how_far_it_is(run, monkeypatch):
    """A step logs alignment and uniformity, and tells the method which fraction of all steps is done."""
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
    """The order of the images depends on seed and epoch, and every random draw on seed and step."""
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
    """The other four trials report an impossible accuracy of 101% after their second epoch."""
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


def test_validations_and_checkpoints_come_every_few_epochs_and_at_the_end(run, monkeypatch):
    """The rows are synced to the disk before each checkpoint."""
    done, log, sync, save = [], Tracker.log, Tracker.sync, TrainState.save
    monkeypatch.setattr(Tracker, "log", lambda self, *rest, **more: done.append("log") or log(self, *rest, **more))
    monkeypatch.setattr(Tracker, "sync", lambda self: done.append("sync") or sync(self))
    monkeypatch.setattr(TrainState, "save", lambda self, *rest: done.append(self.step) or save(self, *rest))
    directory = run("method=simclr", "epochs=5", "checkpoint.every=2", "evaluation.every=2")
    assert curves.read(directory)["val/knn_top1"][0] == [0, 6, 12, 15]
    saves = [place for place, each in enumerate(done) if isinstance(each, int)]
    assert [done[place] for place in saves] == [6, 12, 15]
    assert [done[place - 1] for place in saves] == ["sync"] * 3


def test_time_makes_checkpoints_too_also_within_an_epoch(run, monkeypatch):
    steps, save = [], TrainState.save
    monkeypatch.setattr(TrainState, "save", lambda state, *where: (steps.append(state.step), save(state, *where)))
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


def test_what_a_support_set_draws_between_epochs_is_of_seed_and_step(run, stopped, monkeypatch):
    """A run that is stopped after any step and continued draws the same numbers at the start of an epoch."""
    drawn = []
    monkeypatch.setattr(Queue, "start_epoch", lambda *_: drawn.append(float(torch.rand(1))))
    run(*ALL["nnclr"], "epochs=2", directory="unbroken")
    first, second = drawn
    assert first != second
    for steps in range(1, 6):  # one of these stops is at the end of the first epoch
        stopped(steps, *ALL["nnclr"], "epochs=2", directory=f"after{steps}")
        run(*ALL["nnclr"], "epochs=2", directory=f"after{steps}")
    assert set(drawn) == {first, second}
