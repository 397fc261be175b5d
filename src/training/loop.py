"""Pre-train, evaluate the frozen features, log.

One configuration has one directory, ``multirun/NAME-HASH``. The same command again continues there, or says that the
run is finished. Everything random is a pure function of the seed and the step (src/system/seeding.py), so on a CPU a
resumed run ends with the very numbers of an unbroken one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file

from src import build
from src.config import identity, schema
from src.config.names import colour_of
from src.config.schema import Config
from src.data import Dataset, load
from src.data.batches import check_batch_size, epoch_batches
from src.errors import Diverged
from src.evaluation import protocol
from src.evaluation.diagnostics import alignment, uniformity
from src.runs import directory as run_directory
from src.runs import mlflow_store, origin
from src.runs.record import Record
from src.runs.tracker import COLOUR_TAG, Tracker, catch_up
from src.system.atomic_write import write_whole
from src.system.environment import environment_tags
from src.system.measure import peak_gib
from src.system.redact import one_line, redact
from src.system.seeding import seed_everything
from src.system.stopping import Stopped, Stopper
from src.training.progress import Progress
from src.training.state import TrainState

ShouldPrune = Callable[[str | None, int | None, int, Mapping[str, float]], bool]

logger = logging.getLogger(__name__)


def run(cfg: Config, should_prune: ShouldPrune, draw: Callable[[Path], Path]) -> float:
    """Take one configuration from its start, or from where it was stopped, to its result.

    Args:
        cfg: what `src.config.schema.parse` returned.
        should_prune: told the folder of the sweep, the number of the trial, the epoch and its metrics; whether the
            trial lags so far behind others as to stop it.
        draw: makes the picture of a run in its folder, and returns its path.

    Returns:
        The last ``val/knn_top1`` in percent, what a sweep may optimise; NaN with ``data.final``: no validation.

    Raises:
        UsageError: a mistake in the configuration or the data; nothing has been written then.
        Diverged: the loss, the gradient or the weights stopped being finite, now or when it was last run.
        CannotWrite: the disk is full or broken; the last checkpoint is kept.
        Stopped: by a signal (128 + its number) or by ``max_minutes`` (75); the same command continues.
    """
    device = build.device(cfg.device)  # refuses a GPU that is not there before images are decoded
    data = load(cfg.data).on(device)
    cfg.data.fingerprint = data.fingerprint  # a run is its settings and its images
    check_batch_size(cfg.batch_size, data.train)
    state = TrainState(cfg, data)
    warn_of_doubtful(cfg, len(data.train))
    origin.identify(cfg)
    tags = {"init.taken": state.start_from(origin.locate(cfg.init))} if cfg.init is not None else {}

    directory = run_directory.choose(cfg)
    if cfg.tracking.name == "mlflow":
        mlflow_store.check(cfg.tracking.experiment)  # refuses what is no store before the directory is made
    with run_directory.exclusive(directory), Stopper(cfg.max_minutes) as stopper:
        if run_directory.is_finished(directory, cfg):
            catch_up(directory, cfg.tracking)
            if changes := changed_protocol(cfg, directory):
                logger.warning(
                    "%s was evaluated otherwise (%s): python -m src.evaluate checkpoint=%s adds other figures",
                    *(directory, changes, directory),
                )
            return report(directory)
        run_directory.refuse_diverged(directory)
        resumed = state.resume(directory / "checkpoints")
        if resumed and (changes := changed_protocol(cfg, directory)):
            tags["evaluation_changed"] = f"{changes} at step {state.step}"
            logger.warning("%s: rows logged so far keep the former evaluation (%s)", directory, changes)
        kept = redact(OmegaConf.to_yaml(OmegaConf.create(identity.without_neutral(cfg))))
        write_whole(directory / "config.yaml", kept.encode())
        config = identity.flat(cfg)
        tracker = Tracker(
            directory,
            cfg.tracking,
            params=config | state.sizes() | {"skipped_images": data.skipped},
            tags=environment_tags(str(state.device))
            | {
                "dtype": str(state.dtype).removeprefix("torch."),
                "config_hash": identity.config_hash(cfg),
                COLOUR_TAG: colour_of(config),
            }
            | tags,
        )
        started = f"started from {cfg.init} ({tags['init.taken']})," if cfg.init is not None else "started"
        print(f"{directory}: {'continued' if resumed else started} at step {state.step}", flush=True)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            pretrain(state, data, tracker, stopper, directory, should_prune)
            with stopper.at_once():
                finish(state, data, tracker, directory, draw)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            if stopper.pruned:
                tracker.record.tags["pruned"] = "true"
            raise
        except Exception as error:
            tracker.record.tags["error"] = one_line(error)
            if isinstance(error, Diverged):
                tracker.record.tags[run_directory.DIVERGED] = "true"
            raise
        finally:
            tracker.close(status)
            if status == "KILLED":
                then = "pruned: other trials are far better" if stopper.pruned else "the same command continues"
                print(f"{directory}: stopped at step {state.step}; {then}", flush=True)
        return report(directory)


def pretrain(
    state: TrainState,
    data: Dataset,
    tracker: Tracker,
    stopper: Stopper,
    directory: Path,
    should_prune: ShouldPrune,
) -> None:
    """The loop.

    Raises:
        Stopped: before its end; there is a checkpoint of where it stopped.
    """
    cfg, device, method = state.cfg, state.device, state.method
    support = method.support
    view1, view2 = build.views(cfg, data)
    steps_per_epoch = len(data.train) // cfg.batch_size
    progress = Progress(cfg.epochs, steps_per_epoch)
    saved = time.monotonic()
    loss = grad_norm = math.nan

    def check_weights() -> None:
        if not math.isfinite(state.weight_norm()):
            raise state.diverged(loss, grad_norm)

    def validate() -> dict[str, float]:
        check_weights()
        return protocol.validation(state.frozen, state.classifier, data, cfg.evaluation, state.search)

    def save() -> None:
        nonlocal saved
        check_weights()
        tracker.sync()  # no checkpoint is ahead of the rows
        state.save(directory / "checkpoints")
        saved = time.monotonic()

    if state.step == 0:
        tracker.log(validate(), step=0)

    for epoch in range(state.step // steps_per_epoch, cfg.epochs):
        start = state.step % steps_per_epoch
        if support is not None and start == 0:
            support.start_epoch(epoch)
            support.clear_stats()
        clock = time.perf_counter()
        for images, labels, ids in epoch_batches(data.train, cfg.batch_size, cfg.seed, epoch, device, start):
            torch.compiler.cudagraph_mark_step_begin()  # compiled parts may overwrite what they returned
            seed_everything(cfg.seed, state.step)
            lr = state.set_lr(steps_per_epoch)

            with torch.autocast(device.type, state.dtype, enabled=state.dtype != torch.float32):
                outcome = method(view1(images), view2(images))
            logits = state.classifier(outcome.features.float())
            online_loss = F.cross_entropy(logits, labels.repeat(2))

            state.optimizer.zero_grad()
            state.classifier_optimizer.zero_grad()
            (outcome.loss + online_loss).backward()
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
            stopping, overdue = stopper.status, time.monotonic() >= saved + 60 * cfg.checkpoint.minutes
            if state.step % steps_per_epoch and (stopping or overdue):
                state.seconds += time.perf_counter() - clock
                save()
                if stopping:
                    raise Stopped(stopping)
                clock = time.perf_counter()

        if device.type == "cuda":  # the clock stops when the work is done, not when it has been handed over
            torch.cuda.synchronize(device)
        state.seconds += time.perf_counter() - clock
        metrics = state.pop_times(steps_per_epoch) | {"memory/peak_gib": peak_gib(device)}
        if support is not None:
            metrics |= support.stats()
        last = epoch + 1 == cfg.epochs
        if last or (epoch + 1) % cfg.evaluation.every == 0:
            metrics |= validate()
        if not last:
            stopper.pruned = should_prune(cfg.tracking.parent, cfg.tracking.trial, epoch + 1, metrics)
        tracker.log(metrics, state.step)
        progress.epoch(epoch, loss, metrics)
        stopping, overdue = stopper.status, time.monotonic() >= saved + 60 * cfg.checkpoint.minutes
        if last or stopping or overdue or (epoch + 1) % cfg.checkpoint.every == 0:
            save()
        if stopping:
            raise Stopped(stopping)
        tracker.flush()


def finish(state: TrainState, data: Dataset, tracker: Tracker, directory: Path, draw: Callable[[Path], Path]) -> None:
    """The final evaluation, and the files that stay."""
    cfg = state.cfg
    print("evaluating on the test images", flush=True)
    tracker.log(protocol.final(state.frozen, data, cfg.evaluation, state.search, cfg.seed), state.step)
    save_file(state.encoder_weights(), directory / "encoder.safetensors")
    draw(directory)
    for name in ("config.yaml", "encoder.safetensors", "curves.png"):
        tracker.artifact(directory / name)


def changed_protocol(cfg: Config, directory: Path) -> str:
    """How the evaluation that is asked for differs from the record's; empty where it does not.

    It is no part of a run's identity: another one starts no training anew.
    """
    record, now = Record.find(directory), identity.flat(cfg)
    before = (
        {key: value for key, value in record.params.items() if key in now and identity.is_protocol(key)}
        if record
        else {}
    )
    changed = [key for key, value in before.items() if value != str(now.get(key))]
    return ", ".join(f"{key} was {before[key]} and is {now[key]}" for key in changed)


def report(directory: Path) -> float:
    """Print a finished run's figures."""
    metrics = Record.load(directory).metrics
    figures = [f"{key} {metrics[key]:.2f}" for key in sorted(metrics) if key.startswith(("val/", "test/"))]
    print(f"{directory}: finished; {', '.join(figures)}", flush=True)
    return metrics.get("val/knn_top1", math.nan)


def warn_of_doubtful(cfg: Config, images: int) -> None:
    """Say so where a legal setting can hardly be meant, such as a support set that the images cannot fill."""
    if cfg.schedule.warmup_epochs >= cfg.epochs:
        logger.warning(
            "schedule.warmup_epochs=%g: not shorter than epochs=%d, so the learning rate only ever warms up",
            *(cfg.schedule.warmup_epochs, cfg.epochs),
        )
    if cfg.queue_size is not None and cfg.queue_size > images * cfg.epochs:
        logger.warning(
            "queue_size=%d: %d images in %d epochs never fill it, so every positive will be the other view",
            *(cfg.queue_size, images, cfg.epochs),
        )
    elif cfg.queue_size is not None and cfg.queue_size > images:
        logger.warning(
            "queue_size=%d: more than the %d training images, so many positives will be old embeddings of the anchor's "
            "own image (support/self_hit tells)",
            *(cfg.queue_size, images),
        )
    if isinstance(cfg.support, schema.KMeans) and (cfg.support.refit, cfg.support.forget) == ("faiss", "reset"):
        between = images // cfg.batch_size * cfg.batch_size * cfg.support.forget_every
        if between < cfg.support.refit_window:
            logger.warning(
                "support.refit_window=%d: %d embeddings between two resets never fill it, so nothing is re-clustered",
                *(cfg.support.refit_window, between),
            )
    if cfg.k is not None and cfg.k > images:
        logger.warning("k=%d: more prototypes than the %d training images; most will be single images", cfg.k, images)
