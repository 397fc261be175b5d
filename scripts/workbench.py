"""Helpers of the benchmark scripts: a run's config, images, the training loop step by step, a line on the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from scripts.rivals import Images
from src import cli
from src.config import schema
from src.config.chosen import settled
from src.config.parse import parse
from src.data import Dataset, load
from src.data.cache import Cache
from src.data.splits import Split
from src.runs.tracker import NoTracker
from src.system.environment import CONF
from src.system.stopping import Stopper
from src.training import loop
from src.training.distributed import Ranks
from src.training.state import TrainState

CIFAR100 = Path(os.environ.get("CIFAR100_ROOT", "../shared/data/cifar100"))
# Overrides of a run that neither saves nor ends.
ENDLESS = ("data.final=true", "checkpoint.every=1000000", "checkpoint.minutes=1000000", "epochs=1000000")
MEAN, STD = [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]  # of CIFAR-100, for pixels in [0, 1]


def compose(*overrides: str) -> schema.Config:
    """Compose the config of ``python -m src.train OVERRIDES``."""
    with hydra.initialize_config_dir(str(CONF), **cli.VERSION_BASE):
        composed = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
        return parse(settled(composed, GlobalHydra.instance().config_loader()))


def config_of(run: Path, data: Path | None) -> schema.Config:
    """Load the config of the run in a folder, for use on the CPU; ``data`` replaces its ``data.root`` if given."""
    composed = cast(DictConfig, OmegaConf.load(run / "config.yaml"))
    composed.compile = False
    composed.device = "cpu"
    if data is not None:
        composed.data.root = str(data)
    return parse(composed)


def images() -> Images:
    """CIFAR-100's training images if the folder ``CIFAR100_ROOT`` exists, else uniform noise of the same shape."""
    if CIFAR100.is_dir():
        split = load(compose("data.final=true", f"data.root={CIFAR100}").data).train
        return Images(split, f"CIFAR-100, {len(split.labels):,} images")
    return noise()


def noise(count: int = 50_000) -> Images:
    """Images of uniform noise in the shape of CIFAR-100's."""
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return Images(Split(pixels, torch.arange(count) % 100), f"uniform noise, {count:,} images of 32 x 32")


def dataset(measured_on: Images) -> Dataset:
    """Wrap images as the data set of a run, without validation and test."""
    names = [str(label) for label in range(100)]
    return Dataset("benchmark", names, MEAN, STD, measured_on.split, None, 0, cast(Cache, None))


class EnoughError(Exception):
    """Raised by ``pace`` to end the loop."""


class Paced(Stopper):
    """A `Stopper` that calls ``pace`` once a step, when the loop asks it whether to stop."""

    def __init__(self, pace: Callable[[], None]) -> None:
        super().__init__(max_minutes=None)
        self.pace = pace

    @property
    def status(self) -> int:
        self.pace()
        return 0


def train(state: TrainState, data: Dataset, pace: Callable[[], None]) -> None:
    """Run the training loop without tracking or a folder; call ``pace`` once a step, until it raises `EnoughError`."""
    nowhere = Path(os.devnull)
    with suppress(EnoughError):
        tracker = NoTracker(nowhere, state.cfg.tracking)
        loop.Pretraining(state, data, tracker, Paced(pace), loop.Hooks(lambda path: path)).run()


def fill(state: TrainState) -> None:
    """Fill the support set with random vectors, so that searches cost as much as late in a run."""
    support = state.method.support
    if support is None:
        return
    size, dim = support.size, state.cfg.projector.out
    vectors = torch.randn(size, dim, device=state.device)
    rows = torch.arange(size, device=state.device)
    support.update(vectors, rows, rows % state.classifier.out_features)


def filled(cfg: schema.Config, data: Dataset, ranks: Ranks | None = None) -> TrainState:
    """The state of a run that begins, with a full support set."""
    state = TrainState(cfg, data, ranks)
    fill(state)
    return state


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its queued work, so that timings include it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> str:
    """Describe processor or GPU, cores, versions and date in a line for the foot of a table."""
    names = ("torch", "torchvision", "lightly", "scikit-learn", "faiss-cpu", "faiss-gpu", "timm")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    python = f"Python {platform.python_version()}"
    return f"{device}, {os.cpu_count()} cores, {python}, {', '.join(versions)}; {date.today()}"


def publish(out: Path, lines: Iterable[str]) -> None:
    """Write a page of results, and print it."""
    page = "\n".join(lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{page}\n")
    print(page)


def shown(module: str, arguments: Sequence[str]) -> str:
    """The command line for the foot of a table, without the path of the images."""
    elsewhere = ["data.root=DIR" if each.startswith("data.root=") else each for each in arguments]
    return shlex.join(["python", "-m", module, *elsewhere])


def processor() -> str:
    """The processor's name, and whether it has bfloat16 instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    bfloat16 = any(feature in line for line in lines for feature in ("avx512_bf16", "amx_bf16"))
    return (named[0] if named else platform.processor()) + (" with bfloat16" if bfloat16 else "")
