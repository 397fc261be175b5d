"""Which configurations are legal: the typed schema of every config group, and the checks across fields.

Hydra composes plain YAML from ``conf/`` in struct mode, so that a key which a group does not have is an error. `parse`
then turns the composed config into the dataclasses below, which checks every type, and `check` tests ranges and
combinations. Both run before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

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
    support_weight: float
    queue_precision: str


@dataclass
class KMCLR:
    name: str
    temperature: float
    projector: Projector
    predictor_hidden: int
    support_weight: float
    same_prototype: str
    metric: str
    forget: str
    forget_every: int
    half_life: float
    revive_after: int
    refit: str
    refit_every: int
    refit_window: int


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
    on_error: str = "raise"
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
    index: str | None = None
    nprobe: int | None = None
    refresh_every: int | None = None


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
    parent: str | None = None  # the folder of the sweep that the run is a job of
    trial: int | None = None  # its number in the sweep's Optuna study


@dataclass
class Checkpoint:
    every: int
    minutes: float = 10


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
    max_minutes: float | None
    jobs: int
    dry_run: bool
    k: int | None = None
    queue_size: int | None = None


METHODS: dict[str, type] = {"simclr": SimCLR, "nnclr": NNCLR, "kmclr": KMCLR}
SUPPORT_KEYS = {"kmclr": "k", "nnclr": "queue_size"}


def parse(composed: DictConfig) -> Config:
    """Turn a composed config into typed dataclasses and check it.

    Raises:
        UsageError: a value has the wrong type or is out of range; the line names the key and the remedy.
    """
    try:
        method = OmegaConf.select(composed, "method.name")
        if method not in METHODS:
            raise UsageError(f"method.name={method}: choose one of {', '.join(METHODS)}")
        schema = OmegaConf.structured(Config)
        schema.method = OmegaConf.structured(METHODS[method])
        config: Config = OmegaConf.to_object(OmegaConf.merge(schema, composed))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UsageError(_explain(error)) from error
    check(config)
    return config


def _explain(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key)
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no default; give it a value"
    reason = str(error.msg or error).splitlines()[0]
    return f"{key}={error.value}: {reason}" if error.value is not None else f"{key}: {reason}"


def check(cfg: Config) -> None:
    """Test ranges and combinations.

    Raises:
        UsageError: for the first value that cannot work.
    """
    method = cfg.method

    def one_of(key: str, value: str, *choices: str) -> None:
        if value not in choices:
            raise UsageError(f"{key}={value}: choose one of {', '.join(choices)}")

    def at_least(key: str, value: float | None, least: float) -> None:
        if value is not None and not least <= value < 2**63:  # what torch and JSON hold of an integer
            raise UsageError(f"{key}={value}: must be {least} or more{', and finite' if value > least else ''}")

    def below_one(key: str, value: float) -> None:
        if not 0 <= value < 1:
            raise UsageError(f"{key}={value}: must lie between 0 and 1, 1 excluded")

    def positive(key: str, value: float) -> None:
        if not 0 < value < float("inf"):
            raise UsageError(f"{key}={value}: must be above 0")

    def fraction(key: str, value: float) -> None:
        if not 0 <= value <= 1:
            raise UsageError(f"{key}={value}: must lie between 0 and 1")

    def share(key: str, value: float) -> None:
        if not 0 < value <= 1:
            raise UsageError(f"{key}={value}: must be above 0, and 1 at most; method=simclr has no support set")

    for owner, key in SUPPORT_KEYS.items():
        if getattr(cfg, key) is not None and owner != method.name:
            raise UsageError(f"{key}={getattr(cfg, key)}: method={method.name} does not have it, method={owner} does")
    at_least("k", cfg.k, 1)
    at_least("queue_size", cfg.queue_size, 0)
    at_least("seed", cfg.seed, 0)
    at_least("epochs", cfg.epochs, 1)
    at_least("batch_size", cfg.batch_size, 2)
    at_least("jobs", cfg.jobs, 1)
    if cfg.max_minutes is not None:
        positive("max_minutes", cfg.max_minutes)
    one_of("device", cfg.device.split(":")[0], "auto", "cpu", "cuda")
    one_of("precision", cfg.precision, "auto", "float32", "bfloat16")
    one_of("resume", cfg.resume, "auto", "never")
    positive("method.temperature", method.temperature)
    for width in [*method.projector.hidden, method.projector.out]:
        at_least("method.projector", width, 1)
    if isinstance(method, NNCLR | KMCLR):
        at_least("method.predictor_hidden", method.predictor_hidden, 0)
        share("method.support_weight", method.support_weight)
    if isinstance(method, NNCLR):
        one_of("method.queue_precision", method.queue_precision, "float32", "bfloat16")
    if isinstance(method, KMCLR):
        one_of("method.same_prototype", method.same_prototype, "mask", "negative")
        one_of("method.metric", method.metric, "spherical", "euclidean")
        one_of("method.forget", method.forget, "reset", "decay", "none")
        one_of("method.refit", method.refit, "online", "faiss")
        at_least("method.forget_every", method.forget_every, 1)
        positive("method.half_life", method.half_life)
        at_least("method.revive_after", method.revive_after, 0)
        at_least("method.refit_every", method.refit_every, 1)
        if cfg.k == 1 and method.same_prototype == "mask":
            raise UsageError("k=1: all images share the one prototype, so none would be a negative; choose 2 or more")
        if method.refit == "faiss" and cfg.k is not None and method.refit_window < cfg.k:
            raise UsageError(f"method.refit_window={method.refit_window}: must hold k={cfg.k} embeddings or more")
    if cfg.backbone.stem is not None:
        one_of("backbone.stem", cfg.backbone.stem, "small", "small_padded", "large")
    one_of("optimizer.name", cfg.optimizer.name, "lars", "sgd", "adamw")
    positive("optimizer.lr", cfg.optimizer.lr)
    below_one("optimizer.momentum", cfg.optimizer.momentum)
    if len(cfg.optimizer.betas) != 2:
        raise UsageError(f"optimizer.betas={cfg.optimizer.betas}: give two numbers")
    for beta in cfg.optimizer.betas:
        below_one("optimizer.betas", beta)
    positive("optimizer.trust_coefficient", cfg.optimizer.trust_coefficient)
    at_least("optimizer.weight_decay", cfg.optimizer.weight_decay, 0)
    one_of("schedule.name", cfg.schedule.name, "cosine", "step", "constant")
    at_least("schedule.warmup_epochs", cfg.schedule.warmup_epochs, 0)
    positive("schedule.gamma", cfg.schedule.gamma)
    for milestone in cfg.schedule.milestones:
        fraction("schedule.milestones", milestone)
    one_of("search.name", cfg.search.name, "auto", "faiss", "torch", "ivf")
    if cfg.search.name == "ivf" and not isinstance(method, NNCLR):
        raise UsageError(f"search=ivf: only NNCLR's queue can use it; choose search=auto for method={method.name}")
    at_least("search.nprobe", cfg.search.nprobe, 1)
    at_least("search.refresh_every", cfg.search.refresh_every, 1)
    at_least("data.image_size", cfg.data.image_size, 8)
    at_least("data.limit", cfg.data.limit, 1)
    at_least("data.split_seed", cfg.data.split_seed, 0)
    one_of("data.on_error", cfg.data.on_error, "raise", "skip")
    if not 0 < cfg.data.val_fraction < 1:
        raise UsageError(f"data.val_fraction={cfg.data.val_fraction}: must lie between 0 and 1, both excluded")
    one_of("augment.interpolation", cfg.augment.interpolation, "bicubic", "bilinear")
    for number, view in (("1", cfg.augment.view1), ("2", cfg.augment.view2)):
        for name in ("flip", "jitter", "grey", "blur", "solarize"):
            fraction(f"augment.view{number}.{name}", getattr(view, name))
        for name in ("brightness", "contrast", "saturation"):
            at_least(f"augment.view{number}.{name}", getattr(view, name), 0)
        if not 0 <= view.hue <= 0.5:
            raise UsageError(f"augment.view{number}.hue={view.hue}: must lie between 0 and 0.5")
        for name, most in (("crop_scale", 1.0), ("blur_sigma", float("inf"))):
            pair = getattr(view, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or pair[1] == float("inf"):
                raise UsageError(
                    f"augment.view{number}.{name}={pair}: give [low,high] with 0 < low <= high <= {most:g}"
                )
    one_of("evaluation.name", cfg.evaluation.name, "linear", "original")
    at_least("evaluation.every", cfg.evaluation.every, 1)
    at_least("evaluation.knn_k", cfg.evaluation.knn_k, 1)
    at_least("evaluation.epochs", cfg.evaluation.epochs, 1)
    at_least("evaluation.batch_size", cfg.evaluation.batch_size, 1)
    positive("evaluation.knn_temperature", cfg.evaluation.knn_temperature)
    if not cfg.evaluation.lr:
        raise UsageError("evaluation.lr=[]: give one learning rate or more")
    for lr in cfg.evaluation.lr:
        positive("evaluation.lr", lr)
    positive("evaluation.online_lr", cfg.evaluation.online_lr)
    one_of("tracking.name", cfg.tracking.name, "mlflow", "jsonl")
    if not cfg.tracking.experiment.strip():
        raise UsageError("tracking.experiment: is empty; give it a name")
    at_least("tracking.log_every", cfg.tracking.log_every, 1)
    at_least("checkpoint.every", cfg.checkpoint.every, 1)
    at_least("checkpoint.minutes", cfg.checkpoint.minutes, 0)
