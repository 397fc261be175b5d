"""Which configurations are legal: the typed schema of every config group, and the checks across fields.

Hydra composes plain YAML from ``conf/`` in struct mode, so that a key which a group does not have is an error. `parse`
then turns the composed config into the dataclasses below, which checks every type, and `check` tests ranges and
combinations. Both run before any work starts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import UsageError


@dataclass
class Projector:
    hidden: list[int]
    out: int


@dataclass
class SimCLR:
    name: str
    temperature: float
    projector: Projector


@dataclass
class NNCLR:
    name: str
    temperature: float
    projector: Projector
    predictor_hidden: int


@dataclass
class KMCLR:
    name: str
    temperature: float
    projector: Projector
    predictor_hidden: int
    metric: str
    forget: str
    forget_every: int
    half_life: float
    revive_after: int
    refit: str
    refit_every: int
    refit_window: int
    same_prototype: str


@dataclass
class Backbone:
    name: str
    stem: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Schedule:
    name: str
    warmup_epochs: float
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1


@dataclass
class Optimizer:
    name: str
    lr: float
    scale_lr: bool
    weight_decay: float
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    trust_coefficient: float = 0.001
    clip_trust: bool = False


@dataclass
class Data:
    name: str
    image_size: int
    cache_dir: str
    val_fraction: float
    split_seed: int
    limit: int | None
    final: bool
    root: str | None = None
    image_column: str | None = None
    label_column: str | None = None


@dataclass
class View:
    crop_scale: list[float]
    flip: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: float
    blur: float
    blur_sigma: list[float]
    solarize: float


@dataclass
class Augment:
    name: str
    interpolation: str
    view1: View
    view2: View


@dataclass
class Search:
    name: str


@dataclass
class Evaluation:
    name: str
    every: int
    knn_k: int
    knn_temperature: float
    online_lr: float
    epochs: int
    batch_size: int
    lr: list[float]


@dataclass
class Tracking:
    name: str
    experiment: str
    log_every: int


@dataclass
class Checkpoint:
    every: int


@dataclass
class Config:
    """Everything a run is told. Exactly one of ``k`` and ``queue_size`` is set, by the method that has it, or none."""

    method: Any
    backbone: Backbone
    schedule: Schedule
    optimizer: Optimizer
    data: Data
    augment: Augment
    search: Search
    evaluation: Evaluation
    tracking: Tracking
    checkpoint: Checkpoint
    seed: int
    epochs: int
    batch_size: int
    device: str
    precision: str
    compile: bool
    resume: str
    output_dir: str | None
    k: int | None = None
    queue_size: int | None = None
