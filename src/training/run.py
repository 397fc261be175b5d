"""A run from its command to its result: pre-train, evaluate the frozen features, log.

One configuration has one directory, ``multirun/NAME-HASH``. The same command again continues there, or says that the
run is finished. Everything random is a pure function of the seed and the step (src/system/seeding.py), so on a CPU a
resumed run ends with the very numbers of an unbroken one.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from omegaconf import OmegaConf

from src.config import identity, schema
from src.config.names import TEACHER, colour_of
from src.config.renamed import modern
from src.config.schema import Config
from src.data import Dataset, load
from src.data.batches import check_batch_size, images_a_step
from src.errors import Diverged, UsageError
from src.evaluation.protocol import refuse_too_few, warn_of_few_neighbours
from src.runs import directory as run_directory
from src.runs import mlflow_store, origin
from src.runs.delivery import catch_up
from src.runs.links import how_to_open, page_of
from src.runs.record import METRICS, Record
from src.runs.tracker import COLOUR_TAG, NoTracker, Status, Tracker
from src.support.sharded import in_shards
from src.system.atomic_write import write_whole
from src.system.environment import conditions, environment_tags
from src.system.extras import require
from src.system.redact import hide_in_settings, one_line
from src.system.stopping import Stopped, Stopper
from src.training import distributed, loop
from src.training.state import TrainState

LARGEST_FOR_SMALL_STEM = 64  # pixels a side
SMALLEST_BATCH = 2  # images; one alone has no negative

logger = logging.getLogger(__name__)


def run(
    cfg: Config,
    should_prune: loop.ShouldPrune,
    draw: Callable[[Path], Path],
    illustrate: loop.Illustrate = loop.no_pictures,
    exact_batch: bool = True,
) -> float:
    """Take one configuration from its start, or from where it was stopped, to its result.

    Args:
        cfg: what `src.config.parse.parse` returned.
        should_prune: told the folder of the sweep, the number of the trial, the epoch and its metrics; whether the
            trial lags so far behind others as to stop it.
        draw: makes the picture of a run in its folder, and returns its path.
        illustrate: draws what the support set gives, after each validation.
        exact_batch: whether ``batch_size`` was asked for; a default gives way to a data set of fewer images.

    Returns:
        The last ``val/knn_top1`` in percent, what a sweep may optimise; NaN with ``data.final``: no validation.

    Raises:
        UsageError: a mistake in the configuration or the data; nothing has been written then.
        Diverged: the loss, the gradient or the weights stopped being finite, now or when it was last run.
        Collapsed: the features of different images became alike, and ``on_collapse=stop``.
        CannotWrite: the disk is full or broken; the last checkpoint is kept.
        Stopped: by a signal (128 + its number) or by ``max_minutes`` (75); the same command continues.
    """
    ranks = distributed.join(cfg.device)  # refuses a GPU that is not there before images are decoded
    data = load(cfg.data).on(ranks.device)
    cfg.data.fingerprint = data.fingerprint  # a run is its settings and its images
    ranks.refuse_unsupported(cfg)
    refuse_large_batch(cfg, data, exact_batch or ranks.count > 1)
    refuse_too_few(data)
    state = TrainState(cfg, data, ranks)
    warn_of_doubtful(cfg, len(data.train))
    warn_of_few_neighbours(cfg.evaluation, data)
    origin.identify(cfg)
    tags = {"init.taken": state.start_from(origin.locate(cfg.init))} if cfg.init is not None else {}
    refuse_unfillable(cfg, len(data.train), filled=state.method.support is not None and state.method.support.ready)

    directory = ranks.broadcast(run_directory.choose(cfg))
    if cfg.tracking.system_metrics:
        require("psutil", "system", "tracking.system_metrics=true")
    if cfg.tracking.name == "mlflow" and ranks.first:
        mlflow_store.check(cfg.tracking.experiment)  # refuses what is no store before the directory is made
    hold = run_directory.exclusive(directory, run_directory.PATIENCE) if ranks.first else nullcontext()
    with hold, Stopper(cfg.max_minutes) as stopper, distributed.announcing_rank_lost():
        if ranks.broadcast(run_directory.is_finished(directory, cfg)):
            if ranks.first:
                catch_up(directory, cfg.tracking)
            if changes := changed_protocol(cfg, directory):
                add = f"python -m src.evaluate run={directory}, with these settings, adds other figures"
                logger.warning("%s was evaluated otherwise (%s): %s", directory, ", ".join(changes.values()), add)
            return say_result(directory)
        run_directory.refuse_hopeless(directory, cfg)
        with ranks.one_rank_at_a_time() if in_shards(state.method) else nullcontext():
            resumed = state.resume(directory / "checkpoints", directory / METRICS)
        config = identity.flat(cfg)
        if changes := changed_protocol(cfg, directory):
            text = ", ".join(changes.values())
            earlier = Record.load(directory).tags.get("evaluation_changed")
            tags |= {key: str(config.get(key, "null")) for key in changes}
            tags["evaluation_changed"] = "; ".join(filter(None, [earlier, f"{text} at step {state.step}"]))
            logger.warning("%s: rows logged so far keep the former evaluation (%s)", directory, text)
        dtype = str(state.dtype).removeprefix("torch.")
        now = conditions(str(state.device), dtype) | {"processes": str(ranks.count)}
        if resumed:
            warn_of_other_conditions(directory, now, state.step)
        ranks.check_same(state.method, images=data.fingerprint, step=state.step)
        own = {"dtype": dtype, "config_hash": identity.config_hash(cfg), COLOUR_TAG: colour_of(config)}
        tracker = (Tracker if ranks.first else NoTracker)(
            directory,
            cfg.tracking,
            params=config | state.sizes() | {"skipped_images": data.skipped},
            tags=environment_tags(str(state.device)) | own | tags,
            is_stopping=lambda: stopper.status,
        )
        status: Status = "FAILED"
        ranks_in_step = trained = False  # whether all ranks end at one place
        try:
            tracker.record.continue_under(now, state.step)
            kept = OmegaConf.to_yaml(OmegaConf.create(hide_in_settings(identity.without_neutral(cfg))))
            if ranks.first:
                write_whole(directory / "config.yaml", kept.encode())
            started = f"started from {cfg.init} ({tags['init.taken']})," if cfg.init is not None else "started"
            print(f"{directory}: {'continued' if resumed else started} at step {state.step}", flush=True)
            tracker.watch_system()
            loop.Pretraining(state, data, tracker, stopper, directory, should_prune, illustrate).run()
            trained = True
            with stopper.at_once():
                loop.finish(state, data, tracker, directory, draw)
            status, ranks_in_step = "FINISHED", True
        except (KeyboardInterrupt, SystemExit) as end:
            status, ranks_in_step = "KILLED", isinstance(end, Stopped) and not trained
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
                go_on = run_directory.how_to_continue(cfg, directory)
                then = "pruned: other trials are far better" if stopper.pruned else go_on
                print(f"{directory}: stopped at step {state.step}; {then}", flush=True)
            if ranks_in_step:
                ranks.final_barrier()
        return say_result(directory)


def changed_protocol(cfg: Config, directory: Path) -> dict[str, str]:
    """In which settings of the evaluation this session differs from the last one, and how.

    They are no part of a run's identity: others start no training anew. A record keeps the first session's params, as
    MLflow does, so that a tag with a param's name holds the value of now.
    """
    if (record := Record.find(directory)) is None:
        return {}
    before, now = identity.with_neutral(modern(record.params)) | record.tags, identity.flat(cfg)
    besides = {"evaluation.teacher", "evaluation.bank"} & before.keys()
    asked = sorted({key for key in before | now if identity.is_protocol(key)} | besides)
    found = {key: (before.get(key, "null"), str(now.get(key, "null"))) for key in asked}
    return {key: f"{key} was {was} and is {now}" for key, (was, now) in found.items() if was != now}


def say_result(directory: Path) -> float:
    """Print a finished run's figures, its pictures, and where MLflow shows it."""
    record = Record.load(directory)
    metrics = record.metrics
    of = ("val/", "test/", f"{TEACHER}/")
    shown = [key for key in sorted(metrics) if key.startswith(of) and not key.endswith("/knn_k")]
    figures = [f"{key} {metrics[key]:.2f}" for key in shown]
    print(f"{directory}: finished; {', '.join(figures)}")
    for picture in sorted(directory.glob("*.png")):
        print(f"picture: {picture}")
    if page := page_of(record):
        print(f"MLflow: {how_to_open(page)}")
    sys.stdout.flush()
    return metrics.get("val/knn_top1", math.nan)


def warn_of_other_conditions(directory: Path, now: dict[str, str], step: int) -> None:
    """Says so where the run goes on under conditions in which it would have come to other bits.

    Raises:
        UsageError: the precision is another one, which is more than a rounding.
    """
    record = Record.find(directory)
    if record is None:
        return
    if (before := record.tags.get("dtype", now["precision"])) != now["precision"]:
        raise UsageError(
            f"{directory}: was computed in {before} up to step {step}, and precision=auto means {now['precision']} on "
            f"this machine: continue on one like the first, or start another run with precision={now['precision']}"
        )
    if changes := record.changes(now):
        logger.warning("%s: %s, so the end differs by roundings from that of an unbroken run", directory, changes)


def refuse_large_batch(cfg: Config, data: Dataset, exact: bool) -> None:
    """Keeps an epoch from being without a batch: where the size need not be exact, all images are one batch.

    Raises:
        UsageError: there are fewer images, and the size was asked for, or must have equal parts.
    """
    if exact or cfg.backbone.bn_splits > 1 or len(data.train) < SMALLEST_BATCH:
        check_batch_size(cfg.batch_size, data.train)
    elif cfg.batch_size > len(data.train):
        logger.warning(
            "batch_size=%d: more than the %d training images, so each step takes all of them",
            *(cfg.batch_size, len(data.train)),
        )


def refuse_unfillable(cfg: Config, images: int, filled: bool = False) -> None:
    """Keeps a run from being the control where it is named after a support set, which would never be filled.

    One that is ``filled`` already, by another run's weights, must be fillable only where it is ever seeded anew.

    Raises:
        UsageError: the support set has not had enough embeddings when it is asked for the last time.
    """
    epochs, key = cfg.epochs, "epochs"
    if isinstance(cfg.support, schema.KMeans) and cfg.support.forget == "reset" and cfg.support.forget_every < epochs:
        epochs, key = cfg.support.forget_every, "support.forget_every"
    batch_size = images_a_step(cfg.batch_size, images)
    seen = (images // batch_size * epochs - 1) * batch_size
    name, size = ("k", cfg.k) if cfg.k is not None else ("queue_size", cfg.queue_size)
    if cfg.support.name == "evolving":
        name, size = "support.start", getattr(cfg.support, "start", None)
    if size is not None and size > seen and not (filled and key == "epochs"):
        why = f"only {seen} embeddings are seen before the last batch of epochs={epochs}"
        if key != "epochs":
            often = "epoch" if epochs == 1 else f"{epochs} epochs"
            why = f"prototypes start anew every {often} ({key}), and only {seen} embeddings are seen in that time"
        lower = f"{name} lower" if seen else "batch_size lower"
        raise UsageError(f"{name}={size}: is never filled, because {why}; set {lower} or {key} higher")


def warn_of_doubtful(cfg: Config, images: int) -> None:
    """Say so where a legal setting can hardly be meant, such as a support set that the images cannot fill."""
    if cfg.schedule.warmup_epochs >= cfg.epochs:
        logger.warning(
            "schedule.warmup_epochs=%g: not shorter than epochs=%d, so the learning rate only ever warms up",
            *(cfg.schedule.warmup_epochs, cfg.epochs),
        )
    if cfg.data.image_size > LARGEST_FOR_SMALL_STEM and cfg.backbone.stem in ("small", "small_padded"):
        logger.warning(
            "backbone.stem=%s: keeps all %d x %d pixels, 16 times the work of backbone.stem=large",
            *(cfg.backbone.stem, cfg.data.image_size, cfg.data.image_size),
        )
    if cfg.queue_size is not None and cfg.queue_size > images:
        logger.warning(
            "queue_size=%d: more than the %d training images, so many positives will be old embeddings of the anchor's "
            "own image (support/self_hit tells)",
            *(cfg.queue_size, images),
        )
    if isinstance(cfg.support, schema.KMeans) and (cfg.support.refit, cfg.support.forget) == ("faiss", "reset"):
        batch_size = images_a_step(cfg.batch_size, images)
        between = images // batch_size * batch_size * cfg.support.forget_every
        if between < cfg.support.refit_window:
            logger.warning(
                "support.refit_window=%d: %d embeddings between two resets never fill it, so nothing is re-clustered",
                *(cfg.support.refit_window, between),
            )
    if cfg.k is not None and cfg.k > images:
        logger.warning("k=%d: more prototypes than the %d training images; most will be single images", cfg.k, images)
