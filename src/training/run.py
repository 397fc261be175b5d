"""A run from its command to its result: pre-train, evaluate the frozen features, log.

One configuration has one directory, ``multirun/NAME-HASH``. The same command, given again, resumes the run there or
says that it is finished. Everything random is a pure function of the seed and the step (src/system/seeding.py), so on a
CPU a resumed run ends with exactly the numbers of an unbroken one.
"""

from __future__ import annotations

import logging
import math
import sys
from contextlib import nullcontext
from pathlib import Path

from omegaconf import OmegaConf

from src.config import identity
from src.config.names import TEACHER, colour_of
from src.config.outside import code_digests
from src.config.schema import Config
from src.data import Dataset, load
from src.errors import Diverged, UsageError
from src.evaluation.protocol import check_neighbours, refuse_too_few
from src.models import dtype_name
from src.runs import directory as run_directory
from src.runs import mlflow_store, origin
from src.runs.delivery import catch_up
from src.runs.links import how_to_open, page_of
from src.runs.record import (
    CHECKPOINTS,
    CODE,
    CONFIG,
    METRICS,
    TAG_CODE,
    TAG_COLOUR,
    TAG_CONFIG_HASH,
    TAG_DIVERGED,
    TAG_DTYPE,
    TAG_ERROR,
    TAG_EVALUATION_CHANGED,
    TAG_INIT_TAKEN,
    TAG_PRUNED,
    Record,
)
from src.runs.tracker import NoTracker, Status, Tracker
from src.system.atomic_write import write_whole
from src.system.environment import conditions, environment_tags, project_digest
from src.system.extras import require
from src.system.redact import hide_in_settings, one_line
from src.system.stopping import Stopped, Stopper
from src.training import distributed, loop
from src.training.checks import (
    refuse_large_batch,
    refuse_unfillable,
    refuse_unset_gradients,
    warn_of_doubtful_settings,
    warn_of_late_filling,
)
from src.training.distributed import Ranks
from src.training.state import TrainState

logger = logging.getLogger(__name__)


def run(cfg: Config, hooks: loop.Hooks) -> float:
    """Run one configuration from its start, or from where it was stopped, to its result.

    Args:
        cfg: what `src.config.parse.parse` returned.
        hooks: decide on pruning, and draw pictures.

    Returns:
        The last ``val/knn_top1`` in percent, which a sweep may optimise; NaN with ``data.final``, since there is no
        validation then, and on every rank but the first.

    Raises:
        UsageError: a mistake in the configuration or the data; most are found before anything is written.
        Diverged: the loss, the gradient, the weights or the features stopped being finite, in this session or before.
        Collapsed: the features of different images became alike, and ``on_collapse=stop``.
        CannotWrite: the disk is full or broken; the last checkpoint is kept.
        Stopped: by a signal (128 + its number), ``max_minutes`` (75) or pruning (76); the same command continues.
    """
    ranks = distributed.join(cfg.device)  # before images are decoded, because it refuses a GPU that does not exist
    data = load(cfg.data).to_if_it_fits(ranks.device)
    cfg.data.fingerprint = data.fingerprint  # the images are a part of the run's identity
    state, tags = start(cfg, data, ranks)
    directory = ranks.broadcast(run_directory.path_of(cfg))
    if cfg.tracking.name == "mlflow" and ranks.first:
        mlflow_store.check(cfg.tracking.experiment)  # before the directory is made, because it may refuse the store
    # Only the first rank looks into the folder: if machines share it, the others may see an older state.
    hold = run_directory.exclusive(directory, run_directory.LOCK_TIMEOUT_S) if ranks.first else nullcontext()
    with hold, Stopper(cfg.max_minutes) as stopper, distributed.announcing_rank_lost():
        if not ranks.broadcast(ranks.first and run_directory.is_finished(directory, cfg)):
            train(state, data, tags, stopper, directory, hooks)
        elif ranks.first:
            deliver_again(directory, cfg)
        return say_result(directory) if ranks.first else math.nan


def start(cfg: Config, data: Dataset, ranks: Ranks) -> tuple[TrainState, dict[str, str]]:
    """Build the state that is trained; returns it with the tags that say which weights it starts from.

    Raises:
        UsageError: the configuration is impossible, by itself or with these images.
    """
    ranks.refuse_unsupported(cfg)
    refuse_large_batch(cfg, data, ranks.world_size)
    refuse_too_few(data)
    state = TrainState(cfg, data, ranks)
    refuse_unset_gradients(state.method.encoder, cfg.data.image_size, state.device, state.dtype)
    warn_of_doubtful_settings(cfg, len(data.train))
    check_neighbours(cfg.evaluation, data)
    source = origin.identify(cfg)
    tags = {TAG_INIT_TAKEN: state.start_from(source)} if source else {}
    filled = state.method.support is not None and state.method.support.ready
    filled = filled or (cfg.init is not None and not source)  # weights that are gone may have filled it
    refuse_unfillable(cfg, len(data.train), filled)
    warn_of_late_filling(cfg, len(data.train), filled)
    if cfg.tracking.system_metrics:
        require("psutil", "system", "tracking.system_metrics=true")
    return state, tags


def deliver_again(directory: Path, cfg: Config) -> None:
    """Deliver to MLflow what it lacks of a finished run, and warn of evaluation settings that differ from the run's."""
    catch_up(directory, cfg.tracking)
    if changes := run_directory.changed_protocol(cfg, Record.load(directory)):
        add = f"python -m src.evaluate run={directory}, with these settings, adds other figures"
        logger.warning("%s was evaluated otherwise (%s): %s", directory, ", ".join(changes.values()), add)


def train(
    state: TrainState, data: Dataset, tags: dict[str, str], stopper: Stopper, directory: Path, hooks: loop.Hooks
) -> None:
    """Train from the newest checkpoint, or from the start, to the end of the run; its record says how that ended."""
    cfg, ranks = state.cfg, state.ranks
    before = Record.find(directory) if ranks.first else None
    if before:
        run_directory.refuse_hopeless(before, cfg)
    resumed = state.resume(directory / CHECKPOINTS, directory / METRICS)
    if cfg.init is not None and TAG_INIT_TAKEN not in tags and not resumed:
        raise UsageError(f"init={cfg.init}: names no weights any more, and {directory} has no checkpoint to go on with")
    dtype = dtype_name(state.dtype)
    code = {f"{TAG_CODE}{module}": digest for module, digest in code_digests(cfg).items()}
    now = conditions(str(state.device), dtype) | {"processes": str(ranks.world_size), CODE: project_digest()} | code
    if before:
        steps = cfg.epochs * (len(data.train) // state.batch_size)
        if resumed and state.step == steps and state.validated and data.val is not None:
            refuse_other_validation(cfg, before, directory)
        tags |= note_changed_protocol(cfg, before, directory, state.step)
        if resumed:
            warn_of_other_conditions(before, directory, now, state.step)
    ranks.check_same(state.method, images=data.fingerprint, step=state.step)
    config = identity.flat(cfg)
    own = {TAG_DTYPE: dtype, TAG_CONFIG_HASH: identity.config_hash(cfg), TAG_COLOUR: colour_of(config)}
    tracker = (Tracker if ranks.first else NoTracker)(
        directory,
        cfg.tracking,
        params=config | state.sizes() | {"skipped_images": data.skipped},
        tags=environment_tags(str(state.device)) | code | own | tags,
        is_stopping=lambda: stopper.status,
    )
    status: Status = "FAILED"
    ranks_in_step = trained = False  # whether all ranks stop at the same step
    try:
        tracker.record.continue_under(now, state.step)
        kept = OmegaConf.to_yaml(OmegaConf.create(hide_in_settings(identity.without_neutral(cfg))))
        if ranks.first:
            write_whole(directory / CONFIG, kept.encode())
        started = f"started from {cfg.init} ({tags[TAG_INIT_TAKEN]})," if TAG_INIT_TAKEN in tags else "started"
        print(f"{directory}: {'continued' if resumed else started} at step {state.step}", flush=True)
        tracker.watch_system()
        training = loop.Pretraining(state, data, tracker, stopper, hooks)
        training.run()
        trained = True
        with stopper.at_once():
            training.finish()
        status, ranks_in_step = "FINISHED", True
    except (KeyboardInterrupt, SystemExit) as end:
        status, ranks_in_step = "KILLED", isinstance(end, Stopped) and not trained
        if stopper.pruned:
            tracker.record.tags[TAG_PRUNED] = "true"
        raise
    except Exception as error:
        tracker.record.tags[TAG_ERROR] = one_line(error)
        if isinstance(error, Diverged):
            tracker.record.tags[TAG_DIVERGED] = "true"
        raise
    finally:
        tracker.close(status)
        if status == "KILLED":
            go_on = run_directory.how_to_continue(cfg, directory)
            then = "pruned: other trials are far better" if stopper.pruned else go_on
            print(f"{directory}: stopped at step {state.step}; {then}", flush=True)
        if ranks_in_step:
            ranks.final_barrier()


def note_changed_protocol(cfg: Config, record: Record, directory: Path, step: int) -> dict[str, str]:
    """Warn if evaluation settings have changed since the last session; returns the tags that record the changes."""
    changes = run_directory.changed_protocol(cfg, record)
    if not changes:
        return {}
    config, text = identity.flat(cfg), ", ".join(changes.values())
    earlier = record.tags.get(TAG_EVALUATION_CHANGED)
    logger.warning("%s: rows logged so far keep the former evaluation (%s)", directory, text)
    tags = {key: str(config.get(key, "null")) for key in changes}
    return tags | {TAG_EVALUATION_CHANGED: "; ".join(filter(None, [earlier, f"{text} at step {step}"]))}


def refuse_other_validation(cfg: Config, record: Record, directory: Path) -> None:
    """Refuse to end a trained run by another evaluation than that of its last validation, beside which it would stand.

    Raises:
        UsageError: a setting on which validations depend has changed.
    """
    changes = run_directory.changed_protocol(cfg, record)
    if others := [text for key, text in changes.items() if identity.is_of_validation(key)]:
        raise UsageError(
            f"{directory}: is trained, and its last validation had other settings ({', '.join(others)}): repeat those "
            "here; when the run has finished, python -m src.evaluate adds figures by these"
        )


def say_result(directory: Path) -> float:
    """Print a finished run's metrics, its pictures and its MLflow page; returns ``val/knn_top1``, or NaN."""
    record = Record.load(directory)
    metrics = record.metrics
    of = ("val/", "test/", f"{TEACHER}/")
    shown = [key for key in sorted(metrics) if key.startswith(of) and not key.endswith("/knn_k")]
    figures = [f"{key} {metrics[key]:.2f}" for key in shown]
    print("; ".join(filter(None, [f"{directory}: finished", ", ".join(figures)])))
    for picture in sorted(directory.glob("*.png")):
        print(f"picture: {picture}")
    if page := page_of(record):
        print(f"MLflow: {how_to_open(page)}")
    sys.stdout.flush()
    return metrics.get("val/knn_top1", math.nan)


def warn_of_other_conditions(record: Record, directory: Path, now: dict[str, str], step: int) -> None:
    """Warn if the run continues under conditions that may change its bits: another version of torch, other code.

    Raises:
        UsageError: the precision differs, which changes more than rounding.
    """
    if (before := record.tags.get(TAG_DTYPE, now["precision"])) != now["precision"]:
        raise UsageError(
            f"{directory}: was computed in {before} up to step {step}, and precision=auto means {now['precision']} on "
            f"this machine: continue on one like the first, or start another run with precision={now['precision']}"
        )
    if changes := record.changes(now):
        logger.warning("%s: %s, so the end may differ from that of an unbroken run", directory, changes)
