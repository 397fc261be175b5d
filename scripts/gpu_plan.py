"""Train the runs of a plan, which answer one question, in turn in one process on one GPU within a time limit.

    python -m scripts.gpu_plan --plan teacher --out results/gpu --minutes 9 -- data.root=DIR

The arguments after ``--`` are passed to every run and override the plan's own settings. The same command continues: it
skips finished runs, and resumes a stopped run if its folder in multirun/ still exists. After each run, OUT/PLAN holds
the report, the record and metrics of each run, and log.md, an entry for results/LOG.md. Exit status 75: the time is up;
otherwise the status of the last run that failed.

The numbers of epochs fit an H100: an epoch of 45,000 images at batch 512 takes 1.85 s with a teacher (2.2 s with a
queue in addition) and, judging by another GPU, 1.3 s without one; 40 s pass before the first step, and each run takes
another 16 s for its start and evaluation (results/gpu/teacher). ``epochs=N`` asks for longer runs, over several calls.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from hydra.errors import HydraException

from scripts.workbench import compose, machine, shown
from src import cli
from src.config import identity
from src.config.explain import explain_composition
from src.config.schema import Config
from src.data.cache import fingerprint
from src.errors import Diverged, RunFailed, UsageError
from src.reporting import curves, table
from src.reporting.rows import TABLE_METRICS, summarise
from src.runs import directory as run_directory
from src.runs import origin
from src.runs.record import METRICS, RECORD, TAG_DIVERGED, TAG_ERROR, Record, records_below
from src.system.atomic_write import write_whole
from src.system.stopping import TIME_IS_UP, Stopped, is_stop
from src.training.loop import Hooks
from src.training.run import run

RESERVE = 30.0  # seconds kept for a last evaluation, which the time limit does not interrupt
FAST = [
    *("batch_size=512", "evaluation.every=20", "evaluation.pictures=false", "tracking.log_every=50"),
    *("checkpoint.every=1000", "checkpoint.minutes=3"),  # a run also saves when it stops and at its end
]
# The recipe is for batch 256. An epoch here has half as many steps, so the teacher's average must move twice as fast.
# Source: Busbridge et al., "How to Scale Your EMA", NeurIPS 2023: raise the momentum to the ratio of the batch sizes.
TEACHER = ["experiment=teacher", *FAST, "objective.momentum=0.98"]
NOTHING, PROTOTYPES, QUEUE = ["support=none"], ["support=kmeans"], ["support=queue"]
OF_FIVE = ["objective.neighbours=5"]  # five stored vectors are mixed into the teacher's target
CONTRAST = ["method=kmclr", *FAST]
DECORRELATION = ["projector.hidden=[2048,2048]", "projector.out=256", "objective.decorrelation=0.02"]
# Settings that help only in long training: published recipes of 200 and more epochs have them, and runs of 25 to 80
# epochs cannot rank them.
# Sources: solo-learn's scripts/pretrain/cifar (temperature, weight decay); pc-cp/MNN and its benchmark (crops).
AT_LENGTH = [
    *("objective.temperature=0.2", "optimizer.weight_decay=1e-4"),
    *("augment.view1.crop_scale=[0.2,1]", "augment.view2.crop_scale=[0.2,1]"),
]
# For short runs: the product of learning rate and weight decay is the recipe's, but with its small learning rate the
# weights would not shrink in so few epochs, and steps would stay small relative to them.
QUICK_TEACHER = [*TEACHER, "optimizer.lr=0.3", "optimizer.weight_decay=1e-4"]
# The settings of `long` and `curve`; edit them if the validation accuracies of `screen` favour others.
BEST = [*CONTRAST, *DECORRELATION, *AT_LENGTH]
# MNN with its authors' settings except for the batch size; batch norm still uses parts of 32 images.
MNN = ["experiment=mnn", *FAST, "objective.momentum=0.98", "backbone.bn_splits=16"]

Overrides = list[str]


@dataclass(frozen=True)
class Plan:
    """A question, the default time limit of one call in minutes, and the runs, the most important first."""

    question: str
    minutes: float
    runs: Sequence[Overrides]


PLANS = {
    "teacher": Plan(
        "With a teacher, what is storing worth, and do 400 prototypes equal a queue of 4,096?",
        9,
        [
            [*TEACHER, *stored, "epochs=70"]
            for stored in (NOTHING, [*QUEUE, *OF_FIVE, "queue_size=4096"], [*PROTOTYPES, "k=400"])
        ],
    ),
    "screen": Plan(
        "Beside KMCLR 400 after 80 epochs, and a teacher with 400 prototypes after 60: which ingredient gains a point?",
        9,
        [
            [*CONTRAST, *DECORRELATION, "k=400", "epochs=80"],
            [*CONTRAST, *AT_LENGTH, "k=400", "epochs=80"],
            [*QUICK_TEACHER, *DECORRELATION, *PROTOTYPES, "k=400", "epochs=60"],
            # This and the following runs need a second call. Prototypes leave negatives out of the loss, which nothing
            # stored does not; without the mask, what is stored is the only difference between the two.
            [*CONTRAST, "objective.same_prototype=negative", "k=400", "epochs=80"],
            [*CONTRAST, *DECORRELATION, *AT_LENGTH, "k=400", "epochs=80"],
            [*CONTRAST, *DECORRELATION, *NOTHING, "epochs=80"],
            [*QUICK_TEACHER, "objective=relation", *PROTOTYPES, "k=400", "epochs=60"],
            [*QUICK_TEACHER, "backbone.bn_splits=16", *PROTOTYPES, "k=400", "epochs=60"],
            [*CONTRAST, "support=evolving", "epochs=80"],
        ],
    ),
    "long": Plan(
        "How far does the best come in 300 epochs of all images, and MNN in its 200?",
        10,
        [
            [*BEST, "k=400", "data.final=true", "epochs=300"],
            [*MNN, "data.final=true", "evaluation.teacher=true", "epochs=200"],
        ],
    ),
    "curve": Plan(
        "How many vectors must be stored?",
        10,
        [
            [*BEST, *stored, "epochs=60", f"seed={seed}"]
            for seed, stored in itertools.product(
                range(3),
                (
                    NOTHING,
                    *([*PROTOTYPES, f"k={k}"] for k in (400, 50, 100, 200, 800, 1600)),
                    *([*QUEUE, f"queue_size={size}"] for size in (4096, 400, 1024, 16384, 65536, 98304)),
                ),
            )
        ],
    ),
    "published": Plan(
        "What do the published loss and the original study's settings give?",
        10,
        [
            [*CONTRAST, "k=400", "objective=published", "epochs=80"],
            [*CONTRAST, *NOTHING, "objective=published", "epochs=80"],
            ["method=nnclr", "queue_size=98304", *FAST, "objective=published", "epochs=80"],
            # Its 500 epochs need several calls; the linear probe replaces the original one, which would take minutes.
            ["experiment=original_kmclr", "k=400", *FAST, "batch_size=64", "evaluation=linear"],
        ],
    ),
}


def configurations(plan: Plan, overrides: Overrides) -> list[Config]:
    """Compose all distinct runs of a plan before the first one starts, so that no mistake costs time on the GPU.

    Raises:
        UsageError: a setting does not fit one of the runs, or the images are missing.
    """
    found: dict[str, Config] = {}
    for settings in plan.runs:
        try:
            cfg = configuration([*settings, *overrides])
        except (UsageError, HydraException) as error:
            raise UsageError(f"{explain_composition(error)} (in the plan's run {' '.join(settings)})") from None
        found.setdefault(identity.config_hash(cfg), cfg)
    return list(found.values())


def configuration(overrides: Overrides) -> Config:
    """Compose a run's config and add what else identifies the run: its images and its initial weights."""
    cfg = compose(*overrides)
    cfg.data.fingerprint = fingerprint(cfg.data)
    origin.identify(cfg)
    return cfg


def kept(out: Path, cfg: Config) -> Path:
    """The folder that keeps a copy of a run's record and metrics."""
    return out / "runs" / run_directory.path_of(cfg).name


def train(cfg: Config, minutes: float) -> int:
    """Train one run as ``python -m src.train`` does; return its exit status.

    A failure does not end this process, so that the plan's other runs can follow.
    """
    cfg.max_minutes = minutes
    try:
        run(cfg, Hooks(curves.plot))
    except Stopped as stopped:
        return int(stopped.code or 0)
    except (RunFailed, UsageError) as error:
        print(f"{identity.run_name(cfg)}: {error}", file=sys.stderr, flush=True)
        return error.status if isinstance(error, RunFailed) else 2
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        if cfg.compile:  # without a reset, torch counts the next run as a recompilation, of which it allows eight
            torch.compiler.reset()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0


def follow(name: str, minutes: float, out: Path, overrides: Overrides, command: str) -> int:
    """Train the plan's runs in order until the time is up; return the exit status."""
    end, status = time.monotonic() + 60 * minutes, 0
    for cfg in configurations(PLANS[name], overrides):
        if is_done(kept(out, cfg), cfg):
            if (record := Record.load(kept(out, cfg))).outcome == TAG_DIVERGED:
                print(f"{record.name}: {record.tags.get(TAG_ERROR, TAG_DIVERGED)}", file=sys.stderr)
                status = status or Diverged.status
            continue
        left = end - time.monotonic() - RESERVE
        ended = train(cfg, left / 60) if left > 0 else TIME_IS_UP
        keep(run_directory.path_of(cfg), kept(out, cfg))
        try:
            report(name, out, command)
        except Exception:  # training goes on, because a table can be made later and GPU time is lost
            traceback.print_exc()
        status = ended or status
        if is_stop(ended):
            break
    return status


def is_done(copy: Path, cfg: Config) -> bool:
    """Whether the copy of a run's record says that the run has finished or diverged, which it would do again."""
    record = Record.find(copy)
    return record is not None and (run_directory.is_finished(copy, cfg) or TAG_DIVERGED in record.tags)


def keep(directory: Path, copy: Path) -> None:
    """Copy a run's record and metrics to the folder ``copy``, if they exist."""
    for file in (METRICS, RECORD):
        if (directory / file).is_file():
            copy.mkdir(parents=True, exist_ok=True)
            write_whole(copy / file, (directory / file).read_bytes())


def report(name: str, out: Path, command: str) -> None:
    """Write the table with its plots, and the entry for results/LOG.md."""
    records = sorted((record for _, record in records_below(out / "runs")), key=lambda record: record.start_time)
    rows, notes = summarise(records)
    if rows:
        table.write(rows, notes, name, out)
        header, *body = table.table(rows)
        test, val = (header.index(TABLE_METRICS[metric]) for metric in ("test/linear_top1", "val/linear_top1"))
        accuracies = [f"{row.title} {line[test]} ({line[val]})" for row, line in zip(rows, body, strict=True)]
        seconds = sum(record.seconds for record in records)
        text = f"test linear (validation linear): {'; '.join(accuracies)}. In {seconds:.0f} s on {machine()}."
        unfinished = [f"{record.name} ({record.outcome})" for record in records if record.status != "FINISHED"]
        text += f" Not finished: {', '.join(unfinished)}." if unfinished else ""
        came_out = textwrap.fill(f"*Asked:* {PLANS[name].question} *Came out,* {text}", 120)
        entry = f"## {date.today()}: the plan `{name}` (`{out}/`)\n\n{came_out}\n\n    {command}\n"
        (out / "log.md").write_text(entry)


def main(arguments: Sequence[str]) -> int:
    """Follow the plan of the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_plan", description="Runs for one GPU, by plan.")
    parser.add_argument("--plan", choices=list(PLANS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="stop cleanly after so many minutes; default: the plan's own")
    parser.add_argument("overrides", nargs="*", help="settings of every run")
    asked = parser.parse_args(arguments)
    out = asked.out / asked.plan
    minutes = PLANS[asked.plan].minutes if asked.minutes is None else asked.minutes
    out.mkdir(parents=True, exist_ok=True)
    try:
        status = follow(asked.plan, minutes, out, asked.overrides, shown("scripts.gpu_plan", arguments))
    except UsageError as error:
        cli.fail(str(error))
    for page in (out / "table.md", out / "log.md"):
        if page.is_file():
            print(page.read_text())
    if status == TIME_IS_UP:
        print("the time is up; the same command continues", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
