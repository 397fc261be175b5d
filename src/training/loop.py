"""The training loop: data, views, method, step, support set, log; validation in between; the final evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from src import build
from src.data import Dataset
from src.data.batches import Batch, epoch_batches
from src.evaluation.diagnostics import alignment, uniformity
from src.evaluation.encoder import save_encoder
from src.evaluation.probes import FrozenEncoder
from src.evaluation.protocol import Protocol
from src.methods.base import Method, Output
from src.models import autocast
from src.runs.record import CHECKPOINTS, CONFIG, ENCODER, TAG_SUPPORT_UNUSED
from src.runs.tracker import Tracker
from src.support.base import NEED_LABELS
from src.support.sharded import in_shards
from src.system.measure import peak_gib
from src.system.seeding import seed_everything
from src.system.stopping import TIME_IS_UP, Stopped, Stopper, is_signal
from src.training import collapse
from src.training.progress import Progress
from src.training.state import TrainState

logger = logging.getLogger(__name__)

SAVE = 1  # requests a checkpoint without stopping; below every status with which a run stops
EPOCH_START = 2  # keeps the random numbers drawn between two epochs apart from those of the steps


@dataclass(frozen=True)
class Hooks:
    """Functions through which a run uses the packages above it, reports and sweeps, without importing them.

    Args:
        draw_curves: draws the curves of a run into its folder, which is the argument, and returns the picture's path.
        illustrate: called after each validation, draws what the support set returns. The arguments are the method, its
            frozen encoder, the data, the run's folder, the number of epochs done, and whether these are all; it
            returns the files to log.
        should_prune: called after each epoch but the last, with the sweep's folder, the trial's number, the epoch and
            its metrics; returns whether the trial lags so far behind others that it should stop.
    """

    draw_curves: Callable[[Path], Path]
    illustrate: Callable[[Method, FrozenEncoder, Dataset, Path, int, bool], list[Path]] = lambda *_: []
    should_prune: Callable[[str | None, int | None, int, Mapping[str, float]], bool] = lambda *_: False


class Pretraining:
    """The training loop of a run.

    Args:
        state: the method and everything else that training changes.
        data: the images to train on and to validate on.
        tracker: logs the metrics, and has the run's folder.
        stopper: asked after each step whether to stop.
        hooks: decide on pruning, and draw pictures.
    """

    def __init__(self, state: TrainState, data: Dataset, tracker: Tracker, stopper: Stopper, hooks: Hooks) -> None:
        self.state, self.data, self.tracker, self.stopper = state, data, tracker, stopper
        self.directory, self.hooks = tracker.directory, hooks
        self.cfg, self.ranks, self.support = state.cfg, state.ranks, state.method.support
        self.views = build.views(state.cfg, data, state.ranks.part)
        self.protocol = Protocol(data, state.cfg.evaluation, state.search, state.cfg.seed)
        self.steps_per_epoch = len(data.train) // state.batch_size
        self.saved, self.requested = time.monotonic(), 0
        self.loss = self.grad_norm = math.nan
        self.output: Output | None = None  # of the last step that this process took
        state.frozen.before_block = self._stop_if_signalled

    def run(self) -> None:
        """Train from the state's current step to the last.

        Raises:
            Stopped: the run was told to stop; there is a checkpoint of where it stopped, unless no step was taken.
            Diverged: the loss, the gradient, the weights or the features stopped being finite.
            Collapsed: the features of different images became alike, and ``on_collapse=stop``.
        """
        state, epochs = self.state, self.cfg.epochs
        began = state.step
        with Progress(epochs, self.steps_per_epoch, state.batch_size) as self.progress:
            if state.step == 0:
                self.tracker.log(self._validate(), step=0)
            # A run that was stopped in a validation begins with that: the epoch before counts as not finished.
            ended = state.step if state.validated else state.step - 1
            for epoch in range(ended // self.steps_per_epoch, epochs):
                self._train_epoch(epoch)
                self._finish_epoch(epoch)
            # Nothing was trained: the weights of ``init`` are evaluated as they are, or only the final evaluation was
            # missing, whose settings may be others than those of the last checkpoint.
            if state.step == began:
                self._save()

    def finish(self) -> None:
        """Run the final evaluation, and write the encoder and the curves."""
        state, cfg, data, tracker, protocol = self.state, self.cfg, self.data, self.tracker, self.protocol
        if self.support is not None and not state.support_used:
            if cfg.method._target_ is None:
                tracker.record.tags[TAG_SUPPORT_UNUSED] = "true"
                logger.warning("%s: the support set was never filled, so reports leave the run out", self.directory)
            else:  # a method from another package may use its support set without returning ids
                logger.warning(
                    "%s: the method returned no ids: nothing tells whether it used its support set", self.directory
                )
        if data.classes:
            print("evaluating on the test images", flush=True)
        tracker.log(protocol.final(state.frozen, classifier=self._online_classifier), state.step)
        if cfg.evaluation.teacher:
            tracker.log(protocol.of_teacher(state.teacher()), state.step)
        if cfg.init is None:  # otherwise the run has started from trained weights
            tracker.log(protocol.untrained(state.untrained()), step=0)
        if not self.ranks.first:
            return
        tracker.sync()  # as before each save
        figures = {key: value for key, value in tracker.record.metrics.items() if key.startswith(("val/", "test/"))}
        save_encoder(
            self.directory / ENCODER,
            state.encoder_weights(),
            cfg,
            mean=data.mean,
            std=data.std,
            classes=data.classes,
            figures=figures,
            commit=tracker.record.tags.get("git_commit", ""),
        )
        curves = [self.hooks.draw_curves(self.directory)] if cfg.epochs else []
        for path in (self.directory / CONFIG, self.directory / ENCODER, *curves):
            tracker.artifact(path)

    def _train_epoch(self, epoch: int) -> None:
        """Take the steps of an epoch that are left."""
        state, cfg, ranks = self.state, self.cfg, self.ranks
        start, self.requested = state.step - epoch * self.steps_per_epoch, 0
        if self.support is not None and start == 0:
            seed_everything(cfg.seed, state.step, EPOCH_START)  # a support set may draw random numbers here
            self.support.start_epoch(epoch)
            self.support.clear_stats()
        clock = time.perf_counter()
        rows = ranks.rows(state.batch_size)
        for batch in epoch_batches(self.data.train, state.batch_size, cfg.seed, epoch, state.device, start, rows):
            self._train_step(batch)
            self.progress.step(state.step, self.loss)
            self.requested = ranks.max_status(self._requested_status())
            if state.step % self.steps_per_epoch and self.requested:
                state.seconds += time.perf_counter() - clock
                self._save()
                if self.requested > SAVE:
                    raise Stopped(self.requested)
                clock = time.perf_counter()
        if state.device.type == "cuda":  # the clock stops when the work is done, not when it is queued
            torch.cuda.synchronize(state.device)
        state.seconds += time.perf_counter() - clock
        ranks.check_same(state.method, state.classifier)

    def _train_step(self, batch: Batch) -> None:
        state, cfg, device, method, support = self.state, self.cfg, self.state.device, self.state.method, self.support
        images, labels, ids, aspects = batch
        view1, view2 = self.views
        if cfg.compile:  # lets compiled parts overwrite earlier outputs; only then, since the import takes seconds
            torch.compiler.cudagraph_mark_step_begin()
        seed_everything(cfg.seed, state.step)
        lr = state.set_lr(self.steps_per_epoch)

        anchors = ids.repeat(2), labels.repeat(2)
        with autocast(device, state.dtype), support.looked_up_for(*anchors) if support is not None else nullcontext():
            output = method(view1(images, aspects), view2(images, aspects))
        output.check(len(labels))  # the labels are those of all ranks, as the features are
        features = output.features.detach()  # in case the method does not: no label may reach the encoder
        self.output = output._replace(features=features)
        logits = state.classifier(features.float())
        online_loss = F.cross_entropy(logits, anchors[1])

        state.optimizer.zero_grad()
        state.classifier_optimizer.zero_grad()
        (output.loss + online_loss).backward()
        self.ranks.sum_gradients(method.encoder)
        steps = cfg.epochs * self.steps_per_epoch
        log_now = state.step % cfg.tracking.log_every == 0 or state.step + 1 == steps
        # Not every step on a GPU, because reading makes the host wait; `_save` checks the weights in any case.
        if log_now or device.type == "cpu":
            self.loss, self.grad_norm = torch.stack([output.loss.detach(), state.grad_norm()]).tolist()
            if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):
                raise state.diverged(self.loss, self.grad_norm)
        state.optimizer.step()
        state.classifier_optimizer.step()
        method.after_step((state.step + 1) / steps)

        if support is not None:
            if output.ids is not None:
                state.support_used = True
                support.record(output.ids, *anchors)
            with support.stopwatch:
                support.update(output.embeddings, ids, labels)
        if log_now:
            spread = {
                "train/alignment": alignment(*features.chunk(2)),
                "train/uniformity": uniformity(features.chunk(2)[0]),
            }
            figures = {"train/loss": self.loss, "train/grad_norm": self.grad_norm, "train/lr": lr}
            self.tracker.log(figures | spread, state.step)
        state.step += 1

    def _finish_epoch(self, epoch: int) -> None:
        """Do what follows an epoch's last step: validate, draw pictures, log and save a checkpoint."""
        state, cfg, ranks, tracker = self.state, self.cfg, self.ranks, self.tracker
        last = epoch + 1 == cfg.epochs
        evaluates = last or (epoch + 1) % cfg.evaluation.every == 0
        state.validated = not evaluates
        try:
            validation = self._validate() if evaluates else {}
        except Stopped:
            self._save()
            self._check_collapse()
            raise
        state.validated = True
        metrics = state.pop_times(self.steps_per_epoch) | {"memory/peak_gib": peak_gib(state.device)}
        if self.support is not None:
            known = self.support.stats()
            metrics |= {key: known[key] for key in known if self.data.labelled or key not in NEED_LABELS}
        metrics |= validation
        pictures: list[Path] = []
        # Drawing needs lookups, which one rank alone cannot do if the support set is in shards.
        if evaluates and cfg.evaluation.pictures and ranks.first and not in_shards(state.method):
            pictures = self.hooks.illustrate(
                state.method, state.frozen_here, self.data, self.directory, epoch + 1, last
            )
        if not last and ranks.first:
            self.stopper.pruned = self.hooks.should_prune(cfg.tracking.parent, cfg.tracking.trial, epoch + 1, metrics)
        tracker.log(metrics, state.step)
        for picture in pictures:
            tracker.artifact(picture)
        self.progress.epoch(epoch, self.loss, metrics)
        if evaluates:
            self._check_collapse()
        self.requested = max(self.requested, ranks.max_status(self._requested_status(), wait=True))
        if last or self.requested or (epoch + 1) % cfg.checkpoint.every == 0:
            self._save()
        # After the last epoch a time limit does not stop the run, so that the final evaluation follows.
        if self.requested > SAVE and not (last and self.requested == TIME_IS_UP):
            raise Stopped(self.requested)
        tracker.flush()

    def _validate(self) -> dict[str, float]:
        self._check_weights()
        return self.protocol.validation(self.state.frozen, self._online_classifier, self.state.method)

    @property
    def _online_classifier(self) -> nn.Module | None:
        """The classifier that learns beside the encoder; None in a run that trains nothing."""
        return self.state.classifier if self.cfg.epochs else None

    def _check_weights(self) -> None:
        if not math.isfinite(self.state.weight_norm()):
            raise self.state.diverged(self.loss, self.grad_norm)

    def _check_collapse(self) -> None:
        if self.output is not None and self.ranks.first:  # None if a resumed run has only repeated a validation
            collapse.check(self.output, self.state.step, self.tracker, self.cfg.on_collapse)

    def _save(self) -> None:
        self._check_weights()
        model = self.ranks.full_state_dict(self.state.method)  # every rank has to call this
        if self.ranks.first:
            self.tracker.sync()  # so that no checkpoint is ahead of the rows
            self.state.save(self.directory / CHECKPOINTS, model, self.tracker.written)
        self.saved = time.monotonic()

    def _requested_status(self) -> int:
        """The status to stop with, or `SAVE` if a checkpoint is due by the first rank's clock, else 0."""
        due = self.ranks.first and time.monotonic() >= self.saved + 60 * self.cfg.checkpoint.minutes
        if due:  # requested only once; all ranks save together, perhaps a step later
            self.saved = time.monotonic()
        return self.stopper.status or (SAVE if due else 0)

    def _stop_if_signalled(self) -> None:
        """Stop a validation at once on a signal. A time limit waits for its end, so that every session progresses."""
        self.requested = max(self.requested, self.ranks.max_status(self.stopper.signal_status))
        if is_signal(self.requested):
            raise Stopped(self.requested)
