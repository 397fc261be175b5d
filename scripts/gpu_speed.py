"""Measure training speed on a device: images a second, seconds an epoch, and the fraction of the matrix ceiling.

    python -m scripts.gpu_speed --out results/gpu --batches 256 512 1024 --minutes 9 -- data.root=DIR

The numbers come from real runs of ``src.train``, including the loading of data, which time their own epochs. The
arguments after ``--`` are passed to every run. A finished run is not repeated. Writes speed.json and speed.md. Exit
status 75: the time is up, and the same command continues.

The ceiling is the best rate of a large matrix product in the precision of the runs. A run's fraction of it counts only
the FLOPs of encoder and heads, forward and backward, by torch's counter; views, lookups and optimizer are overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.workbench import compose, machine, shown, wait_for
from src import build
from src.config import identity, schema
from src.config.schema import Config
from src.data.cache import fingerprint
from src.models import dtype_name
from src.reporting import curves
from src.reporting.table import markdown
from src.runs import directory as run_directory
from src.runs.record import Record
from src.system.stopping import TIME_IS_UP

METHODS = (["method=kmclr", "k=400"], ["method=nnclr", "queue_size=98304"], ["method=simclr"])
# Five epochs fill a queue of 98,304. Only the last two are timed; the evaluation is not timed, and so kept short.
TIMED = ["epochs=5", "schedule.warmup_epochs=1", "evaluation.every=5", "evaluation.epochs=1", "checkpoint.every=5"]
COUNTED = 2
EPOCH = 50_000  # images in an epoch of the table: all of CIFAR's training split


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The TFLOP/s of a square matrix product, the best of 20."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(20):
        wait_for(device)
        clock = time.perf_counter()
        a @ a
        wait_for(device)
        seconds.append(time.perf_counter() - clock)
    return 2 * size**3 / min(seconds) / 1e12


def flop_an_image(cfg: Config, classes: int) -> float:
    """The floating-point operations for the two views of one image, forward and backward."""
    cpu, batch = torch.device("cpu"), 8
    method, _ = build.method(cfg, classes, build.search(schema.Search("torch"), cpu), cpu)
    views = torch.randn(2, batch, 3, cfg.data.image_size, cfg.data.image_size)
    with FlopCounterMode(display=False) as counter:
        method(*views).loss.backward()
    return counter.get_total_flops() / batch


def timed_run(cfg: Config, overrides: list[str], minutes: float) -> tuple[Path, int]:
    """Train a run unless it is finished; return its folder and the exit status."""
    cfg.data.fingerprint = fingerprint(cfg.data)  # part of the run's hash
    directory = run_directory.ROOT / f"speed-{identity.run_name(cfg)}-b{cfg.batch_size}-{identity.config_hash(cfg)}"
    if run_directory.is_finished(directory, cfg):
        return directory, 0
    command = ["-m", "src.train", *overrides, f"output_dir={directory}", f"max_minutes={minutes:.3f}"]
    return directory, subprocess.run([sys.executable, *command]).returncode


def row(directory: Path, cfg: Config, ceiling_flop: float, image_flop: float) -> dict[str, Any]:
    record, history = Record.load(directory), curves.read(directory)
    seconds = statistics.median(history["time/epoch_seconds"][1][-COUNTED:])
    rate = statistics.median(history["time/images_per_second"][1][-COUNTED:])
    return {
        "method": cfg.method.name,
        "vectors": identity.support_set_size(cfg),
        "backbone": cfg.backbone.name,
        "batch": cfg.batch_size,
        "images_per_second": rate,
        "seconds_an_epoch": EPOCH / rate,
        "timed_epoch_seconds": seconds,
        "share_of_ceiling": rate * image_flop / ceiling_flop,
        "support_fraction": history["time/support_fraction"][1][-1],
        "run": record.name,
    }


def page(result: dict[str, Any]) -> str:
    """The content of speed.md."""
    header = ["method", "vectors", "backbone", "batch", "images/s", "s an epoch", "of the ceiling"]
    body = [
        [
            *(each["method"], f"{each['vectors']:,}", each["backbone"], str(each["batch"])),
            *(f"{each['images_per_second']:,.0f}", f"{each['seconds_an_epoch']:.2f}"),
            *(f"{each['share_of_ceiling']:.1%}", f"{each['support_fraction']:.1%}"),
        ]
        for each in result["rows"]
    ]
    lines = [
        f"{result['machine']}; {result['precision']}, matrix ceiling {result['ceiling_tflops']:.1f} TFLOP/s. An epoch "
        f"is {EPOCH:,} images, two views each.",
        "",
        f"    {result['command']}",
        "",
        *markdown([*header, "support set's share"], body),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_speed", description="Speed table of a device.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, required=True, help="stop cleanly after so many minutes")
    parser.add_argument("overrides", nargs="*", help="settings of every run")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes

    cfg = compose(*arguments.overrides)
    device = build.device(cfg.device)
    dtype = build.precision(cfg.precision, device)
    peak = ceiling(device, dtype)
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine(),
        "precision": dtype_name(dtype),
        "ceiling_tflops": peak,
        "command": shown("scripts.gpu_speed", sys.argv[1:]),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    image_flop = {tuple(method): flop_an_image(compose(*method, *arguments.overrides), 100) for method in METHODS}
    for batch in arguments.batches:
        for method in METHODS:
            overrides = [*TIMED, *method, f"batch_size={batch}", *arguments.overrides]
            cfg = compose(*overrides)
            directory, status = timed_run(cfg, overrides, (end - time.monotonic()) / 60)
            if status:
                return status
            rows.append(row(directory, cfg, peak * 1e12, image_flop[tuple(method)]))
            (arguments.out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
            (arguments.out / "speed.md").write_text(page(result))
            if time.monotonic() > end:
                return TIME_IS_UP
    print(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
