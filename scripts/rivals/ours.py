"""This project: `src.train.pretrain` itself, with the settings that a user gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch

from scripts.rivals import PREDICTOR, Images, Pace, Setting
from scripts.workbench import compose, dataset
from src.runs.tracker import Tracker
from src.system.stopping import Stopper
from src.training import loop
from src.training.state import TrainState


class Paced(Stopper):
    """A `Stopper` that paces the loop, which asks it once a step whether to go on."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(max_minutes=None)
        self.pace = pace

    @property
    def status(self) -> int:
        self.pace()
        return 0


class Unlogged:
    """In place of the `Tracker`."""

    def log(self, *_: Any, **__: Any) -> None:
        pass

    flush = sync = log


def run(method: str, setting: Setting, images: Images, pace: Pace, *, compiled: bool = False) -> None:
    """Train ``simclr``, ``nnclr`` or ``kmclr``."""
    size = {"kmclr": f"k={setting.support}", "nnclr": f"queue_size={setting.support}"}
    published = ["objective=published", f"objective.predictor_hidden={PREDICTOR}"]  # the rivals' loss
    support = [size[method], *published] if method in size else []
    cfg = compose(
        "data.final=true",
        f"method={method}",
        *support,
        f"backbone={setting.backbone}",
        f"batch_size={setting.batch_size}",
        f"compile={str(compiled).lower()}",
        "checkpoint.every=1000000",
        "checkpoint.minutes=1000000",
    )
    state = TrainState(cfg, dataset(images))
    fill(state)
    loop.pretrain(
        state,
        dataset(images),
        cast(Tracker, Unlogged()),
        Paced(pace),
        Path(os.devnull),
        lambda *_: False,
    )


def fill(state: TrainState) -> None:
    """Fill the support set, so that its search costs from the first step what it costs from some epoch on."""
    support = state.method.support
    if support is None:
        return
    size, dim = support.size, state.cfg.projector.out
    vectors = torch.randn(size, dim, device=state.device)
    rows = torch.arange(size, device=state.device)
    support.update(vectors, rows, rows % state.classifier.out_features)
