"""Measure what a support set alone costs: a lookup, an update and memory, for queues and prototypes.

    python -m scripts.support_set [--batch B] [--repeats N] [--out DIR]

A lookup has both views of a batch as queries (2B queries of 256 dimensions). The search backends take turns in every
repeat; the numbers are minima. ``torch bfloat16`` searches vectors stored in bfloat16; the table says how often it
finds another neighbour than float32 does. Writes support_set.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from scripts.workbench import machine, publish, shown, wait_for
from src import build
from src.reporting.table import markdown
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import FaissSearch, Search, TorchSearch

QUEUES = [2**n for n in range(10, 21, 2)] + [98_304]
PROTOTYPES = [50, 100, 200, 400, 800, 1_600, 6_400]
DIM = 256
TIMES = ("lookup faiss", "lookup torch", "lookup torch bfloat16", "update")
OUT = Path("results/benchmarks")


def vectors(count: int, device: torch.device) -> Tensor:
    """Unit vectors [count, DIM] in clusters, as embeddings form them: 1,000 random directions with added noise."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1_000, DIM, generator=generator)
    rows = torch.randint(1_000, (count,), generator=generator)
    return F.normalize(centres[rows] + 0.7 * torch.randn(count, DIM, generator=generator), dim=1).to(device)


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - started


def measure(
    support: Queue | KMeans, searches: dict[str, Search], batch: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Measure the milliseconds of a lookup with each backend and of an update, and the MiB of the stored vectors."""
    everything = vectors(support.size + 2 * batch, device)
    rows = torch.arange(support.size, device=device)
    support.update(everything[: support.size], rows, rows % 100)
    queries, rows = everything[support.size :], torch.arange(batch, device=device)
    bank = support.ring.rows_ND if isinstance(support, Queue) else support.centroids_KD
    halved, halved_queries = bank.bfloat16(), queries.bfloat16()
    exact, rounded = TorchSearch()(queries, bank), TorchSearch()(halved_queries, halved)
    lost = (exact[0] - (queries * bank[rounded[1][:, 0]]).sum(1, keepdim=True)).clamp(min=0)
    actions: dict[str, Callable[[], Any]] = {
        **{f"lookup {name}": partial(search, queries, bank) for name, search in searches.items()},
        "lookup torch bfloat16": partial(TorchSearch(), halved_queries, halved),
        "update": partial(support.update, queries[:batch], rows, rows % 100),
    }
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            taken[name].append(seconds(action, device))
    return {name: 1000 * min(each[1:]) for name, each in taken.items()} | {
        "mib": support.stored_bytes / 2**20,
        "other neighbour": float((exact[1] != rounded[1]).float().mean()),
        "cosine lost": float(lost.mean()),
    }


def table(results: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    heads = ["", "vectors", *(f"{name} (ms)" for name in TIMES), "MiB", "other neighbour", "cosine lost"]
    lines = []
    for kind, rows in results.items():
        for size, each in rows.items():
            times = [f"{each[name]:.2f}" for name in TIMES]
            effect = [f"{each['mib']:.1f}", f"{each['other neighbour']:.1%}", f"{each['cosine lost']:.5f}"]
            lines.append([kind, f"{size:,}", *times, *effect])
    return markdown(heads, lines)


def figure(results: dict[str, dict[int, dict[str, Any]]], batch: int) -> Figure:
    """Plot lookup and update times against the number of stored vectors, both on logarithmic axes."""
    picture = Figure(figsize=(10, 4), layout="constrained")
    for axes, (kind, rows) in zip(picture.subplots(1, 2, sharey=True), results.items(), strict=True):
        sizes = sorted(rows)
        for name, style in zip(TIMES, "os^x", strict=True):
            axes.loglog(sizes, [rows[size][name] for size in sizes], f"{style}-", markersize=4, label=name)
        axes.set(xlabel="stored vectors", title=kind)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    picture.axes[0].set_ylabel(f"ms, batch {batch}")
    return picture


def main() -> None:
    """Measure all support sets, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    device = build.device("auto")
    searches: dict[str, Search] = {"faiss": FaissSearch(device), "torch": TorchSearch()}
    sets: dict[str, Sequence[Queue | KMeans]] = {
        "queue": [Queue(size, DIM, TorchSearch()) for size in sorted(QUEUES)],
        "prototypes": [KMeans(k, DIM, 100, TorchSearch(), revive_after=50) for k in PROTOTYPES],
    }
    results = {
        kind: {each.size: measure(each.to(device), searches, args.batch, args.repeats, device) for each in some}
        for kind, some in sets.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "support_set.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(results, args.batch).savefig(args.out / "support_set.png", dpi=120)
    lines = [
        "# The support set by itself",
        "",
        f"Lookups of both views of a batch of {args.batch}, {DIM} dimensions, unit vectors in 1,000 clusters;",
        f"minima of {args.repeats} repeats, back ends in turn. The last two columns are of bfloat16: how often it",
        "finds another neighbour than float32, and how much less similar that one is.",
        "",
        *table(results),
        "",
        "![times](support_set.png)",
        "",
        f"{machine()}.",
        "",
        f"    {shown('scripts.support_set', sys.argv[1:])}",
    ]
    publish(args.out / "support_set.md", lines)


if __name__ == "__main__":
    main()
