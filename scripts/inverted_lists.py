"""Measure recall and cost of inverted lists in a large queue: ``search=ivf`` against exact search.

    python -m scripts.inverted_lists RUN [--data DIR] [--sizes N ...] [--out FILE]

RUN is the folder of a finished run. The vectors are its encoder's features of augmented training images, so that
neighbourhoods are realistic; beyond 2^17 vectors, the features repeat with added noise. Recall is the fraction of 512
queries, which are features of other views, for which the lists find a neighbour as near as exact search does.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.workbench import config_of, machine, publish
from src import build
from src.data import load
from src.evaluation.encoder import load_encoder
from src.reporting.table import markdown
from src.support.queue import Queue
from src.support.search import FaissSearch, InvertedLists, TorchSearch

REAL = 2**17  # the largest number of different features; larger queues repeat them with noise
NOISE = 0.33  # the Euclidean norm of that noise
TIE = 1e-3  # smallest difference in cosine that counts as a loss; 16-bit numbers do not resolve less
QUERIES = 512
NPROBES = (1, 4, 16, 64)
OUT = Path("results/benchmarks/inverted_lists.md")


class Row(NamedTuple):
    """The measurements of one queue with one index and one number of probed lists."""

    size: int
    lists: str
    nprobe: int
    recall: float
    cosine_lost: float
    ms: float
    exact_ms: float
    train_s: float
    gib: float


@torch.inference_mode()
def features(run: Path, count: int, data: Path | None) -> Tensor:
    """Unit-norm features [count, F], bfloat16, of random views of a run's training images."""
    cfg = config_of(run, data)
    images = load(cfg.data)
    encoder = load_encoder(run).backbone.to(memory_format=torch.channels_last)
    view, _ = build.views(cfg, images)
    torch.manual_seed(0)
    batches = []
    for first in range(0, count, 1024):
        rows = torch.arange(first, min(first + 1024, count)) % len(images.train)
        with torch.autocast("cpu", build.precision("auto", torch.device("cpu"))):
            batches.append(F.normalize(encoder(view(images.train.take(rows).images)).float(), dim=1).bfloat16())
    return torch.cat(batches)


def queue_of(size: int, real: Tensor) -> Queue:
    """Make a full queue that stores bfloat16."""
    queue = Queue(size, real.shape[1], TorchSearch(), dtype=torch.bfloat16)
    torch.manual_seed(1)
    for first in range(0, size, 2**16):
        rows = torch.arange(first, min(first + 2**16, size))
        vectors = real[rows % len(real)].float()
        if first >= len(real):
            vectors += NOISE * F.normalize(torch.randn_like(vectors), dim=1)
        queue.update(vectors, rows, rows % 100)
    return queue


def timed(action: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Run an action three times; return its result, and the shortest time in milliseconds."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        result = action()
        taken.append(1000 * (time.perf_counter() - started))
    return result, min(taken)


def measure(size: int, real: Tensor, queries: Tensor) -> list[Row]:
    """Measure one queue with several numbers of probed lists."""
    queue = queue_of(size, real)
    exact = FaissSearch(torch.device("cpu"))(queries, queue.ring.rows_ND)[1][:, 0]  # float32, as bfloat16 has ties
    _, exact_ms = timed(lambda: queue.lookup(queries).ids)
    best = (queries * queue.ring.rows_ND[exact].float()).sum(1)
    factory = f"IVF{2 ** round(math.log2(size**0.5))},SQfp16"
    queue.lists = lists = InvertedLists(size, real.shape[1], factory, 1)
    started = time.perf_counter()
    lists.train(queue.ring)
    train_s = time.perf_counter() - started
    rows = []
    for nprobe in NPROBES:
        lists.nprobe = nprobe
        found, ms = timed(lambda: queue.lookup(queries).embeddings)
        lost = (best - (queries * found).sum(1)).clamp(min=0)
        recall, cosine_lost = float((lost < TIE).float().mean()), float(lost.mean())
        gib = queue.stored_bytes / 2**30
        rows.append(Row(size, factory, nprobe, recall, cosine_lost, ms, exact_ms, train_s, gib))
    return rows


def main() -> None:
    """Measure all sizes, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**16, 2**18, 2**20, 10**7])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    real = features(args.run, min(max(args.sizes), REAL) + QUERIES, args.data)
    real, queries = real[:-QUERIES], real[-QUERIES:].float()
    queries = F.normalize(queries, dim=1)
    rows: list[Row] = []
    for size in args.sizes:
        rows += measure(size, real, queries)
        publish(args.out, report(rows, real))  # after each size, because the largest takes long


def report(rows: list[Row], real: Tensor) -> list[str]:
    """The lines of the results page in Markdown."""
    sizes = " ".join(dict.fromkeys(str(r.size) for r in rows))
    heads = ["vectors", "index", "probed", "recall", "cosine lost", "lookup (ms)", "exact (ms)", "training (s)", "GiB"]
    body = [
        [
            *(f"{r.size:,}", r.lists, str(r.nprobe), f"{r.recall:.1%}", f"{r.cosine_lost:.4f}"),
            *(f"{r.ms:.1f}", f"{r.exact_ms:.1f}", f"{r.train_s:.1f}", f"{r.gib:.2f}"),
        ]
        for r in rows
    ]
    return [
        "# Inverted lists",
        "",
        f"`search=ivf` beside exact search of the same queue, which is in bfloat16 and in {real.shape[1]} dimensions:",
        f"lookups of {QUERIES} queries, minima of 3. `SQfp16` lists hold a second copy in 16 bits. The vectors are",
        f"features of augmented CIFAR-100 images; above {len(real):,} they repeat, with noise of length {NOISE}.",
        "Training comes once in `search.refresh_every` steps.",
        "",
        *markdown(heads, body),
        "",
        f"{machine()}.",
        "",
        f"    python -m scripts.inverted_lists RUN --sizes {sizes}",
    ]


if __name__ == "__main__":
    main()
