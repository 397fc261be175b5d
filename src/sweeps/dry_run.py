"""``dry_run=true``: which jobs there are, which of them are finished, and how long the others may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config import identity
from src.config.schema import Config
from src.errors import UsageError
from src.runs import directory as run_directory
from src.runs.record import Record, records_below


def preview(cfgs: Sequence[Config], at_a_time: int, settings: Sequence[str] = ()) -> str:
    """List the jobs, their states, and how long the unfinished ones may take, judged by finished runs like them.

    The directory of a job is not known before its images have been decoded; until then the job is listed by its name.

    Args:
        cfgs: the configs of the jobs.
        at_a_time: how many jobs run at once.
        settings: for each job, the overrides that its line shows beside its name; empty: none.
    """
    lines, lasts, done, hopeless = [], list[float](), list[tuple[Config, Record]](), 0
    finished = _seconds_an_epoch()
    for number, (cfg, beside) in enumerate(zip(cfgs, settings or [""] * len(cfgs), strict=True)):
        directory = run_directory.path_of(cfg) if cfg.data.fingerprint else Path(identity.run_name(cfg))
        try:
            record = Record.find(directory) if cfg.data.fingerprint else None
            state, estimate = record.outcome if record else "to do", ""
        except UsageError:
            record, state, estimate = None, "damaged", ""
        if record and record.status == "FINISHED":
            done.append((cfg, record))
        elif record and run_directory.is_hopeless(record, cfg):
            hopeless += 1
        else:
            alike = _alike(identity.flat(cfg))
            rate = finished.get((cfg.method.name, *alike)) or finished.get(("", *alike))
            if rate is not None and cfg.epochs:  # a run without epochs takes as long as its evaluation
                lasts.append(max(rate * cfg.epochs - (record.seconds if record else 0.0), 0.0))
                estimate = f"about {_duration(lasts[-1])}"
        place = f"{number:4}  {state:9} {identity.support_set_size(cfg):7,}  {directory.name}"
        lines.append("  ".join(filter(None, [place, beside, estimate])))
    run_directory.warn_of_other_protocol(done)
    todo = len(cfgs) - len(done) - hopeless
    total = f"{len(cfgs)} {'job' if len(cfgs) == 1 else 'jobs'}, {todo} to run"
    if lasts:  # a job is not split, so all jobs together take at least as long as the longest
        total += f", about {_duration(max(sum(lasts) / at_a_time, *lasts))} with jobs={at_a_time}"
    if unknown := todo - len(lasts):
        total += f"; no time known for {unknown}: none like them has finished yet"
    return "\n".join([*lines, total])


def _alike(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings, besides the method, on which the duration of an epoch depends."""
    keys = ("backbone.name", "data.name", "data.limit", "data.val_fraction", "batch_size", "compile", "device")
    return tuple(str(params.get(key)) for key in keys)


def _seconds_an_epoch() -> dict[tuple[str, ...], float]:
    """Mean wall time of an epoch of finished runs in seconds, by method and `_alike`; '' stands for all methods."""
    samples: dict[tuple[str, ...], list[float]] = {}
    for _, record in records_below(run_directory.ROOT):
        epochs = record.params.get("epochs", "")
        if record.status == "FINISHED" and epochs.isdecimal() and int(epochs) and record.seconds:
            for method in ("", record.params.get("method.name", "")):
                rates = samples.setdefault((method, *_alike(record.params)), [])
                rates.append(record.seconds / int(epochs))
    return {key: sum(rates) / len(rates) for key, rates in samples.items()}


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
