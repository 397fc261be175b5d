"""Compare decoding, start-up and loading with torchvision's ImageFolder and DataLoader: ``results/benchmarks/data.md``.

    python -m scripts.data_benchmark DIR [--images N] [--rounds R] [--out FILE]

Makes N JPEGs of 500x375 pixels and 52 kB each in DIR, and removes DIR at the end. The images are random crops of at
least half the area of scikit-learn's two sample photographs, some of them mirrored, at quality 90. To compare decoding,
contenders take turns on the same images in each round, so that other load on the machine affects all alike; ratios are
computed within a round. Start-up and loading are each measured in a separate process. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from scripts.workbench import EnoughError, compose, machine, publish, train
from src.config.schema import Data
from src.data import folders, load
from src.data.batches import epoch_batches
from src.data.cache import cached
from src.data.sources import find
from src.system.environment import environment_tags
from src.system.measure import peak_gib
from src.system.threads import cores, in_threads
from src.training import loop
from src.training.state import TrainState

OUT = Path("results/benchmarks/data.md")
IMAGENET = 1_281_167
GROUPS = 10  # folders of images; each round uses another one
CORES = cores()


def make(root: Path, count: int) -> None:
    """Write the images into a folder for each group, which has a folder for each of two classes."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]

    def crop(i: int) -> None:
        photo, random = photos[i % 2], np.random.default_rng(i)
        width = int(random.uniform(0.71, 1) * min(photo.width, photo.height * 4 / 3))  # 0.71 of a side: half the area
        height = width * 3 // 4
        left, top = (int(random.integers(room + 1)) for room in (photo.width - width, photo.height - height))
        image = photo.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = root / f"group{i % GROUPS:02}" / "ab"[i // GROUPS % 2] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)

    for _ in in_threads(crop, range(count), 64):
        pass


def config(folder: Path, images: str, size: int, draft: bool) -> Data:
    options = [f"data.root={folder / images}", f"data.image_size={size}", f"data.draft={draft}"]
    return compose("data=image_folder", f"data.cache_dir={folder / 'cache'}", *options).data


def first(cfg: Data) -> dict[str, float]:
    """Measure the seconds until all images are decoded."""
    folders.MANY = 1  # treats these files like a million: later starts look only at their folders
    began = time.perf_counter()
    cached(cfg)
    return {"seconds": time.perf_counter() - began}


def second(cfg: Data) -> dict[str, float]:
    """Measure the seconds to load decoded images, the seconds to check every file, and images a second in an epoch."""
    began = time.perf_counter()
    dataset = load(cfg)
    seconds, began = time.perf_counter() - began, time.perf_counter()
    find(cfg)
    looked, began = time.perf_counter() - began, time.perf_counter()
    for each in epoch_batches(dataset.train, 256, seed=0, epoch=0, device="cpu"):
        each.images.float().mean()  # every byte is read
    rate = len(dataset.train) // 256 * 256 / (time.perf_counter() - began)
    return {"seconds": seconds, "looked": looked, "rate": rate}


def loader(cfg: Data, interpolation: str = "bilinear") -> Any:
    """A DataLoader over torchvision's ImageFolder, with as many worker processes as there are cores."""
    from torchvision import datasets, transforms

    size = cfg.image_size
    resize = transforms.Resize(size, transforms.InterpolationMode(interpolation))
    steps = transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
    images = datasets.ImageFolder(str(cfg.root), steps)
    return torch.utils.data.DataLoader(images, 32, num_workers=CORES, persistent_workers=True)


def loader_start(cfg: Data) -> dict[str, float]:
    """Measure the seconds until the first batch, and the workers' memory in MiB (proportional set size)."""
    began = time.perf_counter()
    batches = iter(loader(cfg))
    next(batches)
    seconds, processes = time.perf_counter() - began, multiprocessing.active_children()
    rollups = [Path(f"/proc/{each.pid}/smaps_rollup").read_text() for each in processes]
    return {"seconds": seconds, "workers": sum(int(text.split("Pss:")[1].split()[0]) for text in rollups) / 1024}


def waiting(cfg: Data) -> dict[str, float]:
    """Measure the fraction of a step of resnet_tiny that is spent waiting for the batch, and its images a second."""
    dataset, waited, ended = load(cfg), [0.0], [0.0]

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        batches = epoch_batches(*args, **kwargs)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waited.append(time.perf_counter() - began)
            if batch is None:
                return
            yield batch

    def pace() -> None:
        ended.append(time.perf_counter())
        if len(ended) == 12:
            raise EnoughError

    loop.epoch_batches = timed
    state = TrainState(compose("backbone=resnet_tiny", "batch_size=128", "k=20", "checkpoint.minutes=100000"), dataset)
    train(state, dataset, pace)
    step = median(np.diff(ended[2:]))
    return {"share": median(waited[3:]) / step, "rate": 128 / step}


class Turn(NamedTuple):
    """One contender's speed on the images of one group."""

    rate: float  # images a second
    cost: float  # CPU milliseconds an image, summed over all cores


LOADERS = ("bilinear", "bicubic")
CONTENDERS = {
    "bilinear": "ImageFolder and DataLoader, bilinear (the default)",
    "bicubic": "ImageFolder and DataLoader, bicubic",
    "ours": "this project, bicubic, once",
    "draft": "this project, `data.draft=true`, once",
}


def rounds(folder: Path, size: int, count: int) -> Iterator[dict[str, Turn]]:
    """In each round, let all contenders decode the images of one group; yield their turns by name."""
    for i in range(count):
        whole, draft = (config(folder, f"images/group{i:02}", size, each) for each in (False, True))
        turns: dict[str, Callable[[], object]] = {
            name: partial(deque[Any], loader(whole, name), maxlen=0) for name in LOADERS
        }
        for start in turns.values():  # a first pass starts the workers
            start()
        turns |= {"ours": partial(cached, whole), "draft": partial(cached, draft)}
        images = len(list(Path(str(whole.root)).rglob("*.jpg")))
        done = {}
        for name in list(turns)[:: 1 if i % 2 else -1]:
            began, spent = time.perf_counter(), processor_seconds()
            turns[name]()
            seconds, spent = time.perf_counter() - began, processor_seconds() - spent
            done[name] = Turn(images / seconds, 1000 * spent / images)
        yield done


def processor_seconds() -> float:
    """CPU seconds that this process and its workers have used so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    stats = [Path(f"/proc/{each.pid}/stat").read_text().rsplit(")", 1)[1] for each in multiprocessing.active_children()]
    ticks = sum(int(field) for text in stats for field in text.split()[11:13])
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


MEASURES = {each.__name__: each for each in (first, second, loader_start, waiting)}


def measure(name: str, folder: Path, size: int, draft: bool = False) -> dict[str, float]:
    """Run one of `MEASURES` in a separate process; return its numbers, and its peak memory in MiB as ``peak``."""
    command = [sys.executable, "-m", "scripts.data_benchmark", str(folder), "--measure", name, str(size), str(draft)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name, size, draft, numbers, flush=True)
    return numbers


def _measured(folder: Path, name: str, size: str, draft: str) -> None:
    numbers = MEASURES[name](config(folder, "images", int(size), draft == "True"))
    peak = 1024 * peak_gib(torch.device("cpu"))
    print(json.dumps(numbers | {"peak": peak + numbers.get("workers", 0)}))


def spread(values: list[float], digits: int) -> str:
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def report(folder: Path, images: int, count: int) -> Iterator[str]:
    """Measure everything, and yield the results page in pieces."""
    files = [path.stat().st_size for path in (folder / "images").rglob("*.jpg")]
    yield f"""# Decoding, start-up and loading

{images:,} JPEGs of 500x375 pixels, {np.mean(files) / 1000:.0f} kB each: random crops of scikit-learn's two sample
photographs. {machine()}, commit {environment_tags("cpu")["git_commit"][:7]}.
What else a machine does makes the rates vary. The ratios, taken round by round on the same images, say more.
The files are in the page cache.

**Decoding**, median and range of {count} rounds of {images // GROUPS} images. The DataLoader has {CORES} workers on
{CORES} cores; its transforms are Resize and CenterCrop, and it does the same again in every epoch. This project resizes
bicubically, counts, hashes and writes to the disk, once. The ratios are to the two DataLoaders' rates in the same
round. Processor time depends least on what else the machine does. A bilinear resize reads half as many pixels for each
that it makes as a bicubic one.

| pixels | decoded by | images a second | to bilinear | to bicubic | processor, ms an image |
| --- | --- | --- | --- | --- | --- |"""
    slowest = {}
    for size in (64, 224):
        turns = list(rounds(folder, size, count))
        print(size, turns, flush=True)
        for name, text in CONTENDERS.items():
            rates, costs = [each[name].rate for each in turns], [each[name].cost for each in turns]
            ratios = [
                "1" if name == other else spread([each[name].rate / each[other].rate for each in turns], 2)
                for other in LOADERS
            ]
            yield f"| {size} | {text} | {spread(rates, 0)} | {' | '.join(ratios)} | {spread(costs, 2)} |"
        slowest[size] = median(each["ours"].rate for each in turns)
    whole, again = measure("first", folder, 64), [measure("second", folder, 64) for _ in range(3)]
    rivals = [measure("loader_start", folder, 64) for _ in range(3)]
    start, looked = (min(each[name] for each in again) for name in ("seconds", "looked"))
    theirs = min(each["seconds"] for each in rivals)
    peak = max(each["peak"] for each in (whole, *again))
    yield f"""
**Start-up** on all images at 64 pixels, without the imports, and an epoch of batches of 256; the best of three:

| | this project | ImageFolder and DataLoader |
| --- | --- | --- |
| first start | {whole["seconds"]:,.0f} s ({images / whole["seconds"]:.0f} images/s) | {theirs:.1f} s to a batch |
| second start, if only folders are looked at (100,000 files and more) | {start:.2f} s | {theirs:.1f} s |
| second start, if each file is looked at | {start + looked:.2f} s | |
| an epoch, images a second | {max(each["rate"] for each in again):,.0f} | as decoding |
| peak memory, with the mapped pages of the cache | {peak:,.0f} MiB | {max(each["peak"] for each in rivals):,.0f} MiB |
| disk, beside {sum(files) / 1e9:.1f} GB of JPEGs | {images * 3 * 64**2 / 1e9:.2f} GB | nothing |

**Waiting.** Of a step of `resnet_tiny` (KMCLR, batch 128, on these cores) getting the batch takes

| pixels | share of the step | images a second |
| --- | --- | --- |"""
    measure("first", folder, 32, draft=True)
    for size, draft_too in ((32, True), (64, False)):
        waited = measure("waiting", folder, size, draft_too)
        yield f"| {size} | {waited['share']:.2%} | {waited['rate']:,.0f} |"
    yield f"""
**ImageNet's {IMAGENET:,} images**, extrapolated from these figures:

| pixels | decoding, once | disk |
| --- | --- | --- |"""
    for size, rate in slowest.items():
        yield f"| {size} | {IMAGENET / rate / 3600:.1f} hours | {IMAGENET * 3 * size**2 / 1e9:,.0f} GB |"
    yield f"""
Looking at each file would take {looked * IMAGENET / images:.0f} s at every start, so of 100,000 files and more only
the folders are looked at. Disk breaks first: at 224 pixels the cache is larger than the JPEGs are. Memory is next:
where the cache is larger than what is free, an epoch reads the disk at random, an image at a time.

    python -m scripts.data_benchmark DIR --images {images} --rounds {count}"""


def main() -> None:
    """Make the images, measure, and write the results page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, GROUPS + 1), metavar="R")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        _measured(args.folder, *args.measure)
        return
    args.folder.mkdir(parents=True)
    try:
        make(args.folder / "images", args.images)
        lines = list(report(args.folder, args.images, args.rounds))
    finally:
        shutil.rmtree(args.folder)
    publish(args.out, lines)


if __name__ == "__main__":
    main()
