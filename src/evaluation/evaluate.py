"""Repeat the final evaluation of a finished run: ``python -m src.evaluate run=NAME`` (or ``checkpoint=PATH``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from src import build
from src.config import identity, schema
from src.config.parse import chooses_data, chosen_data, parse
from src.data import load
from src.errors import UsageError
from src.evaluation.probes import FrozenEncoder
from src.evaluation.protocol import Protocol, check_neighbours, refuse_too_few
from src.models import dtype_name
from src.runs import checkpoint, mlflow_store
from src.runs import directory as run_directory
from src.runs.query import named_run
from src.runs.record import CHECKPOINTS, ENCODER, RECORD, TAG_DTYPE, TAG_EVALUATED, Record, newest_checkpoint
from src.runs.tracker import Tracker

RUNS_OWN = "the run's own settings"

logger = logging.getLogger(__name__)


def main(composed: DictConfig) -> dict[str, float]:
    """Evaluate the encoder of a finished run, on its own data or on another data set, and log to the run.

    Protocol and precision are the run's own unless the command line says otherwise. If both are, metrics keep their
    names. Otherwise the protocol becomes part of the name: ``test_original/...``, and for a teacher
    ``teacher_original/test/...``. On another data set ``transfer/NAME-FINGERPRINT/`` comes first, with eight digits of
    the fingerprint. A tag records the settings that differ from the run's. A checkpoint outside its run's directory
    can be evaluated too, and one that is not its run's last; their metrics are only printed.

    Raises:
        UsageError: there is no such checkpoint, its run is not finished, the run's own images have changed, or the
            settings do not fit.
    """
    path, saved = _checkpoint(composed)
    directory = path.parent.parent
    record = _record_of_finished(directory)

    with checkpoint.understood(path):
        before = parse(OmegaConf.create(saved["config"]))
        cfg = _merged(saved["config"], composed)
    device = build.device(cfg.device)
    data = load(cfg.data).to_if_it_fits(device)
    check_neighbours(replace(cfg.evaluation, bank=None), data)  # all training images vote in the final evaluation
    if not data.classes:
        raise UsageError(f"data={cfg.data.name}: no image has a label to evaluate with; choose other images with data=")
    refuse_too_few(data)
    dtype = build.precision(cfg.precision, device)
    protocol = Protocol(data, cfg.evaluation, build.search(cfg.search, device), cfg.seed)
    metrics = protocol.final(_frozen("encoder", path, saved, cfg, device, dtype))
    if cfg.evaluation.teacher:
        metrics |= protocol.of_teacher(_frozen("teacher_encoder", path, saved, cfg, device, dtype))
    arithmetic = dtype_name(dtype)
    is_other = record is not None and record.tags.get(TAG_DTYPE, arithmetic) != arithmetic
    if _final_protocol(cfg) != _final_protocol(before) or is_other:
        metrics = {key.replace("/", f"_{cfg.evaluation.name}/", 1): value for key, value in metrics.items()}
    if chooses_data(composed):
        metrics = {f"transfer/{cfg.data.name}-{data.fingerprint[:8]}/{key}": value for key, value in metrics.items()}
    newest = newest_checkpoint(path.parent)
    is_last = record is not None and newest is not None and newest.samefile(path)
    _print(str(directory if is_last else path), metrics)
    if record and is_last:  # a report would take those of an earlier one for the finished run's
        chosen = " ".join([*_chosen(cfg, before), *([f"precision={arithmetic}"] if is_other else [])])
        _log(directory, record, cfg.tracking, metrics, chosen, saved["step"])
    else:
        print("written nowhere: this is not the last checkpoint of a run")
    return metrics


def _log(
    directory: Path, record: Record, tracking: schema.Tracking, metrics: dict[str, float], chosen: str, step: int
) -> None:
    """Add metrics to a run, in its folder and in MLflow if it is there; ``chosen`` is explained at `_tags`."""
    with run_directory.exclusive(directory):
        name = "mlflow" if record.entry.for_mlflow else "jsonl"
        if name == "mlflow" and (path := mlflow_store.missing()):  # MLflow has the run elsewhere
            logger.warning(
                "there is no MLflow store at %s: change to the project root, or set MLFLOW_TRACKING_URI, and deliver "
                "this with: python -m src.tracking %s",
                path,
                directory.resolve(),
            )
            name = "jsonl"
        tracking = replace(tracking, name=name, experiment=record.experiment, parent=None)
        tracker = Tracker(directory, tracking, {}, {}, reopens=True)
        tracker.record.tags |= _tags(tracker.record, metrics, chosen)  # saved together with the metrics, never before
        tracker.log(metrics, step)
        if ENCODER in tracker.record.artifacts:
            tracker.artifact(directory / ENCODER)  # again, since the encoder's model in MLflow has the run's figures
        tracker.close("FINISHED")
    entry = tracker.record.entry
    taken = entry.for_mlflow and entry.has == tracker.record.state(record.experiment)
    print(f"written to {directory / RECORD}{' and MLflow' if taken else ''}")


def _tags(record: Record, metrics: Mapping[str, float], chosen: str) -> dict[str, str]:
    """Tags that say with which settings metrics were measured.

    There is a tag for each family of metrics, such as ``test``, and one for each of the family's older metrics that was
    measured with other settings.

    Args:
        record: the run's record before this evaluation.
        metrics: the metrics of this evaluation.
        chosen: the settings that differ from the run's; empty if none does.
    """
    now, tags = chosen or RUNS_OWN, dict[str, str]()
    for family in {key.rpartition("/")[0] for key in metrics}:
        tag = f"{TAG_EVALUATED}/{family}"
        before = record.tags.get(tag, RUNS_OWN)
        if not chosen and tag not in record.tags:
            continue
        tags[tag] = now
        older = {key for key in record.metrics if key.rpartition("/")[0] == family}
        if before != now and older & metrics.keys():
            logger.warning("%s: was with %s; its figures are now with %s", tag, before, now)
        for key in older:
            own = f"{TAG_EVALUATED}/{key}"
            if key not in metrics and before != now:
                tags[own] = record.tags.get(own, before)
            elif key in metrics and own in record.tags:
                tags[own] = now
    return tags


def _print(whose: str, metrics: dict[str, float]) -> None:
    width = max(map(len, metrics))
    print(f"{whose}:")
    for key, value in metrics.items():
        print(f"    {key:{width}} {value:6.{0 if key.endswith('/knn_k') else 2}f}")


def _frozen(
    part: str, path: Path, saved: dict[str, Any], cfg: schema.Config, device: torch.device, dtype: torch.dtype
) -> FrozenEncoder:
    """Restore an encoder, which is one part of a saved method."""
    encoder, _ = build.encoder(cfg.backbone, cfg.data.image_size)
    with checkpoint.understood(path):
        checkpoint.restore(encoder, checkpoint.part_of(saved["model"], part), path)
        mean, std = ([float(each) for each in saved[key]] for key in ("mean", "std"))
        if not len(mean) == len(std) == 3:
            raise ValueError(f"mean and std of {len(mean)} and {len(std)} channels")
    encoder.to(device).to(memory_format=torch.channels_last)
    return FrozenEncoder(encoder, mean, std, device, dtype)


def _chosen(cfg: schema.Config, before: schema.Config) -> list[str]:
    """The settings in which this evaluation differs from the one at the end of its run, as they are typed."""
    then, now = identity.flat(before), identity.flat(cfg)
    of_images = {key for key in now | then if key.startswith("data.") and identity.is_setting(key)}
    # The fingerprint is left out, because it is in the metrics' names.
    counted = of_images - {"data.fingerprint"} | set(filter(identity.is_protocol, now | then))
    return [f"{key}={now.get(key, 'null')}" for key in sorted(counted) if now.get(key) != then.get(key)]


def _final_protocol(cfg: schema.Config) -> dict[str, Any]:
    """The settings of the final evaluation, without those that matter only during training."""
    return {key: value for key, value in identity.flat(cfg).items() if identity.is_protocol(key)}


def _merged(saved: dict[str, Any], composed: DictConfig) -> schema.Config:
    """The run's config with the settings that this command line has chosen."""
    cfg = OmegaConf.create(saved)
    for key in ("search", "device", "precision"):
        if composed.get(key):
            cfg[key] = composed[key]
    chosen = {key: value for key, value in composed.evaluation.items() if value is not None}
    cfg.evaluation = chosen if "name" in chosen else {**cfg.evaluation, **chosen}
    cfg.data = chosen_data(composed, cfg.data)
    return parse(cfg)


def _record_of_finished(directory: Path) -> Record | None:
    """The record of the run in a folder; None if there is no run.

    Raises:
        UsageError: the run has not finished. Test metrics of a run in progress could guide its choices, and logging
            them here would change its status.
    """
    record = Record.find(directory)
    if record and record.status != "FINISHED":
        raise UsageError(f"{directory}: {record.unfinished('run its training command again first')}")
    return record


def _checkpoint(composed: DictConfig) -> tuple[Path, dict[str, Any]]:
    given = [key for key in ("run", "checkpoint", "run_id") if composed[key] is not None]
    if len(given) != 1:
        raise UsageError("give one of run=NAME and checkpoint=PATH")
    named = str(composed[given[0]])
    path = Path(named).expanduser()
    if path.is_file():
        return path, checkpoint.load(path)
    path = path if path.is_dir() else named_run(named, given[0])
    directory = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    newest = newest_checkpoint(directory)  # metrics of an earlier one would be taken for the finished run's
    if newest is None:
        _record_of_finished(directory.parent)
        raise UsageError(f"{directory}: there is no checkpoint; give a checkpoint's file or its run's folder")
    return newest, checkpoint.load(newest)
