"""The loop: data, views, method, step, support set, log; validation in between, and the final evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from src import build
from src.data import Dataset
from src.data.batches import epoch_batches
from src.evaluation import protocol
from src.evaluation.diagnostics import alignment, uniformity
from src.evaluation.encoder import save_encoder
from src.evaluation.probes import FrozenEncoder
from src.methods.base import Method, Output
from src.runs.record import ENCODER, UNUSED
from src.runs.tracker import Tracker
from src.support.base import NEED_LABELS
from src.support.sharded import in_shards
from src.system.measure import peak_gib
from src.system.seeding import seed_everything
from src.system.stopping import Stopped, Stopper, is_signal
from src.training import collapse
from src.training.progress import Progress
from src.training.state import TrainState

logger = logging.getLogger(__name__)

SAVE = 1  # below every status with which a run stops

# Of a sweep's folder, a trial's number, an epoch and its metrics.
ShouldPrune = Callable[[str | None, int | None, int, Mapping[str, float]], bool]
# Of a method, its frozen encoder, the data, the run's folder, the epochs done and whether these are all: files to log.
Illustrate = Callable[[Method, FrozenEncoder, Dataset, Path, int, bool], list[Path]]


def no_pictures(*_: object) -> list[Path]:
    """Draws nothing."""
    return []


def pretrain(
    state: TrainState,
    data: Dataset,
    tracker: Tracker,
    stopper: Stopper,
    directory: Path,
    should_prune: ShouldPrune,
    illustrate: Illustrate = no_pictures,
) -> None:
    """The loop.

    Raises:
        Stopped: before its end; there is a checkpoint of where it stopped, unless no step had been taken.
        Diverged: the loss, the gradient, the weights or the features stopped being finite.
        Collapsed: the features of different images became alike, and ``on_collapse=stop``.
    """
    cfg = state.cfg
    with Progress(cfg.epochs, len(data.train) // state.batch_size, state.batch_size) as progress:
        _train(state, data, tracker, stopper, directory, should_prune, illustrate, progress)


def _train(
    state: TrainState,
    data: Dataset,
    tracker: Tracker,
    stopper: Stopper,
    directory: Path,
    should_prune: ShouldPrune,
    illustrate: Illustrate,
    progress: Progress,
) -> None:
    cfg, device, method, ranks = state.cfg, state.device, state.method, state.ranks
    support = method.support
    rows = ranks.rows(state.batch_size)
    view1, view2 = build.views(cfg, data, ranks.part)
    steps_per_epoch = len(data.train) // state.batch_size
    saved, wished = time.monotonic(), 0
    loss = grad_norm = math.nan
    outcome: Output | None = None

    def check_weights() -> None:
        if not math.isfinite(state.weight_norm()):
            raise state.diverged(loss, grad_norm)

    def stop_if_signalled() -> None:
        """A time limit waits for the end of a validation instead, so that each stay gets on, however short it is."""
        nonlocal wished
        wished = max(wished, ranks.agree(stopper.signal and stopper.status))
        if is_signal(wished):
            raise Stopped(wished)

    state.frozen.before_block = stop_if_signalled

    def validate() -> dict[str, float]:
        check_weights()
        return protocol.validation(state.frozen, state.classifier, data, cfg.evaluation, state.search)

    def look() -> None:
        if outcome is not None and ranks.first:  # None where a run that was stopped in a validation goes on with that
            collapse.look(outcome, state.step, tracker, cfg.on_collapse)

    def save() -> None:
        nonlocal saved
        check_weights()
        model = ranks.whole_state(method)  # to which every rank may contribute
        if ranks.first:
            tracker.sync()  # no checkpoint is ahead of the rows
            state.save(directory / "checkpoints", model, tracker.written)
        saved = time.monotonic()

    def wish() -> int:
        """A reason to stop, or that a checkpoint is due by the first rank's clock, so that all ranks save together."""
        nonlocal saved
        due = ranks.first and time.monotonic() >= saved + 60 * cfg.checkpoint.minutes
        if due:  # is wished for once, and may be granted a step later
            saved = time.monotonic()
        return stopper.status or (SAVE if due else 0)

    if state.step == 0:
        tracker.log(validate(), step=0)

    # A run that was stopped in a validation takes that up first.
    for epoch in range((state.step - (not state.validated)) // steps_per_epoch, cfg.epochs):
        start, wished = state.step - epoch * steps_per_epoch, 0
        if support is not None and start == 0:
            support.start_epoch(epoch)
            support.clear_stats()
        clock = time.perf_counter()
        for images, labels, ids, aspects in epoch_batches(
            data.train, state.batch_size, cfg.seed, epoch, device, start, rows
        ):
            if cfg.compile:  # compiled parts may overwrite what they returned; the compiler takes seconds to import
                torch.compiler.cudagraph_mark_step_begin()
            seed_everything(cfg.seed, state.step)
            lr = state.set_lr(steps_per_epoch)

            with torch.autocast(device.type, state.dtype, enabled=state.dtype != torch.float32):
                outcome = method(view1(images, aspects), view2(images, aspects))
            logits = state.classifier(outcome.features.float())
            online_loss = F.cross_entropy(logits, labels.repeat(2))

            state.optimizer.zero_grad()
            state.classifier_optimizer.zero_grad()
            (outcome.loss + online_loss).backward()
            ranks.sum_gradients(method.encoder)
            log_now = state.step % cfg.tracking.log_every == 0
            if log_now or device.type == "cpu":  # reading makes the host wait for a GPU; `save` never keeps a bad step
                loss, grad_norm = torch.stack([outcome.loss.detach(), state.grad_norm()]).tolist()
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise state.diverged(loss, grad_norm)
            state.optimizer.step()
            state.classifier_optimizer.step()
            method.after_step((state.step + 1) / (cfg.epochs * steps_per_epoch))

            if support is not None:
                if outcome.ids is not None:
                    state.served = True
                    support.record(outcome.ids, ids.repeat(2), labels.repeat(2))
                with support.stopwatch:
                    support.update(outcome.embeddings, ids, labels)
            if log_now:
                spread = {
                    "train/alignment": alignment(*outcome.features.chunk(2)),
                    "train/uniformity": uniformity(outcome.features.chunk(2)[0]),
                }
                tracker.log({"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr} | spread, state.step)
            state.step += 1
            progress.step(state.step, loss)
            wished = ranks.agree(wish())
            if state.step % steps_per_epoch and wished:
                state.seconds += time.perf_counter() - clock
                save()
                if wished > SAVE:
                    raise Stopped(wished)
                clock = time.perf_counter()

        if device.type == "cuda":  # the clock stops when the work is done, not when it has been handed over
            torch.cuda.synchronize(device)
        state.seconds += time.perf_counter() - clock
        ranks.check_same(method, state.classifier)
        last = epoch + 1 == cfg.epochs
        evaluates = last or (epoch + 1) % cfg.evaluation.every == 0
        state.validated = not evaluates
        try:
            validation = validate() if evaluates else {}
        except Stopped:
            save()
            look()
            raise
        state.validated = True
        metrics = state.pop_times(steps_per_epoch) | {"memory/peak_gib": peak_gib(device)}
        if support is not None:
            known = support.stats()
            metrics |= {key: known[key] for key in known if data.labelled or key not in NEED_LABELS}
        metrics |= validation
        # To draw is to look up, which one rank alone cannot do where the support set is in shards.
        draws = evaluates and cfg.evaluation.pictures and ranks.first and not in_shards(method)
        pictures = illustrate(method, state.frozen_here, data, directory, epoch + 1, last) if draws else []
        if not last and ranks.first:
            stopper.pruned = should_prune(cfg.tracking.parent, cfg.tracking.trial, epoch + 1, metrics)
        tracker.log(metrics, state.step)
        for picture in pictures:
            tracker.artifact(picture)
        progress.epoch(epoch, loss, metrics)
        if evaluates:
            look()
        wished = max(wished, ranks.agree(wish(), wait=True))
        if last or wished or (epoch + 1) % cfg.checkpoint.every == 0:
            save()
        if wished > SAVE:
            raise Stopped(wished)
        tracker.flush()


def finish(state: TrainState, data: Dataset, tracker: Tracker, directory: Path, draw: Callable[[Path], Path]) -> None:
    """The final evaluation, and the files that stay."""
    cfg = state.cfg
    if state.method.support is not None and cfg.method._target_ is None and not state.served:  # it may be an outsider's
        tracker.record.tags[UNUSED] = "true"
        logger.warning("%s: the support set was never filled, so reports leave the run out", directory)
    if data.classes:
        print("evaluating on the test images", flush=True)
    tracker.log(protocol.final(state.frozen, data, cfg.evaluation, state.search, cfg.seed), state.step)
    if cfg.evaluation.teacher:
        tracker.log(protocol.of_teacher(state.teacher(), data, cfg.evaluation, state.search, cfg.seed), state.step)
    if cfg.init is None:  # else a run starts from what another has learned
        tracker.log(protocol.untrained(state.untrained(), data, cfg.evaluation, state.search, cfg.seed), step=0)
    if not state.ranks.first:
        return
    tracker.sync()  # as before each save
    figures = {key: value for key, value in tracker.record.metrics.items() if key.startswith(("val/", "test/"))}
    save_encoder(
        *(directory / ENCODER, state.encoder_weights(), cfg, data.mean, data.std, data.classes),
        *(figures, tracker.record.tags.get("git_commit", "")),
    )
    draw(directory)
    for name in ("config.yaml", ENCODER, "curves.png"):
        tracker.artifact(directory / name)
