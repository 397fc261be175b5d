"""The typed schema of every config group: each setting's type, its constraint beside it, and its neutral default.

A default in this file is *neutral*: it gives the behaviour from before the field existed, and it never changes. A
config saved before then keeps its meaning and its hash (`src.config.identity`). Recipes live in ``conf/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from src.config.names import COLOUR

INT64_BOUND = 2**63  # the smallest positive integer that does not fit torch's int64

Count = Annotated[int, Field(ge=1, lt=INT64_BOUND)]
Several = Annotated[int, Field(ge=2, lt=INT64_BOUND)]
Pixels = Annotated[int, Field(ge=8, lt=INT64_BOUND)]
Natural = Annotated[int, Field(ge=0, lt=INT64_BOUND)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rates = Annotated[list[Positive], Field(min_length=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


def one_of(*choices: str) -> AfterValidator:
    """The constraint that a value is one of a few words."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


def interval(most: float) -> AfterValidator:
    """The constraint that a value is a finite ``[low, high]`` with 0 < low <= high <= most."""

    def check(pair: list[float]) -> list[float]:
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or pair[1] == float("inf"):
            raise ValueError(f"give [low,high] with 0 < low <= high <= {most:g}")
        return pair

    return AfterValidator(check)


def _device(name: str) -> str:
    if name.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError("choose one of auto, cpu, cuda")
    return name


def _counts(value: Any) -> Any:
    each = value if isinstance(value, list) else [value]
    if not each or not all(type(count) is int and 1 <= count < INT64_BOUND for count in each):
        raise ValueError("give a number of 1 or more, or a list of several")
    return value


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give it a name")
    return text


@dataclass(kw_only=True)
class Named:
    """The settings of every method and support set; one from outside adds the parameters of its class."""

    name: str
    label: str | None = None  # the name in tables and plots
    colour: Annotated[str, Field(pattern=f"^{COLOUR}$")] | None = None
    _target_: str | None = None  # the class of a method or support set from outside this project


@dataclass(kw_only=True)
class Support(Named):
    """A support set, from which a built-in method takes its label and colour."""


@dataclass(kw_only=True)
class Stored(Support):
    shards: Annotated[str, one_of("none", "ranks")] = "none"


@dataclass(kw_only=True)
class Queue(Stored):
    precision: Annotated[str, one_of("float32", "bfloat16")] = "float32"


@dataclass(kw_only=True)
class KMeans(Stored):
    metric: Annotated[str, one_of("spherical", "euclidean")]
    forget: Annotated[str, one_of("reset", "decay", "none")]
    forget_every: Count
    half_life: Positive
    revive_after: Natural
    refit: Annotated[str, one_of("online", "faiss")]
    refit_every: Count
    refit_window: Count


@dataclass
class Objective:
    """The settings of every objective."""

    name: str
    decorrelation: NotNegative = field(default=0.0, kw_only=True)
    off_diagonal: Positive = field(default=0.08, kw_only=True)


@dataclass
class Contrast(Objective):
    """The contrastive loss; ``nt_xent``, which sets only the temperature, is ``mixed`` with ``support_weight=0``."""

    temperature: Positive
    support_weight: Fraction = 0.0
    predictor_hidden: Natural = 0
    same_prototype: Annotated[str, one_of("mask", "negative")] = "mask"


@dataclass
class MomentumTeacher(Objective):
    momentum: Fraction
    predictor_hidden: Count


@dataclass
class MNN(MomentumTeacher):
    neighbours: Count


@dataclass
class ReSSL(MomentumTeacher):
    teacher_temperature: Positive
    student_temperature: Positive


@dataclass(kw_only=True)
class Method(Named):
    """A method. A built-in one takes its settings from the objective group.

    A method from outside this project adds its own settings here and ignores the objective group.
    """


@dataclass
class Projector:
    hidden: list[Count]
    out: Count
    final_norm: bool = True


RESNET_TINY = "resnet_tiny"
RESNETS = ("resnet18", "resnet34", "resnet50", RESNET_TINY)


@dataclass
class Backbone:
    name: str
    stem: Annotated[str, one_of("small", "small_padded", "large")] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    _target_: str | None = None  # the function or class that makes a backbone from outside this project of the options
    bn_splits: Count = 1

    @property
    def is_timm(self) -> bool:
        """Whether it is a model of timm, which may have the name of one of ours; ours always have a stem."""
        return self._target_ is None and (self.stem is None or self.name not in RESNETS)


@dataclass
class Schedule:
    name: Annotated[str, one_of("cosine", "step", "constant")]
    warmup_epochs: NotNegative
    milestones: list[Fraction] = field(default_factory=list)
    gamma: Positive = 0.1


@dataclass
class Optimizer:
    name: Annotated[str, one_of("lars", "sgd", "adamw")]
    lr: Positive
    scale_lr: bool
    weight_decay: NotNegative
    momentum: BelowOne = 0.9
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    trust_coefficient: Positive = 0.001
    clip_trust: bool = False
    decay_all: bool = False


@dataclass
class Data:
    name: str
    image_size: Pixels
    cache_dir: str
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Natural
    limit: Count | None = None
    final: bool = False
    on_error: Annotated[str, one_of("raise", "skip")] = "raise"
    root: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    resize: Annotated[str, one_of("crop", "squash", "pad")] = "crop"
    background: Annotated[str, one_of("white", "grey", "black")] | None = None  # null: transparency is dropped
    # Store whole images, squeezed into squares with this many pixels a side; null: store squares of image_size.
    keep: Pixels | None = None
    draft: bool = False  # decode JPEGs at a half, quarter or eighth with at least twice the stored pixels a side
    repo: str | None = None  # OWNER/NAME on the Hugging Face hub
    revision: str | None = None  # a branch, tag or commit of the repo; null: main
    config: str | None = None  # the configuration of a parquet data set that has several
    train_split: str | None = None  # null: train, or else unlabeled
    test_split: str | None = None  # null: test, or else validation, or else a fifth of the labelled images
    options: dict[str, Any] = field(default_factory=dict)
    _target_: str | None = None  # the function that makes a source from outside this project of the options
    fingerprint: str | None = None  # identifies the images; filled in when they are found

    @property
    def stored_size(self) -> int:
        """Pixels a side of an image in the cache."""
        return self.keep or self.image_size


@dataclass
class View:
    crop_scale: Annotated[list[float], interval(1)]
    flip: Fraction
    jitter: Fraction
    brightness: NotNegative
    contrast: NotNegative
    saturation: NotNegative
    hue: Annotated[float, Field(ge=0, le=0.5)]
    grey: Fraction
    blur: Fraction
    blur_sigma: Annotated[list[float], interval(float("inf"))]
    solarize: Fraction


@dataclass
class Augment:
    name: str
    interpolation: Annotated[str, one_of("bicubic", "bilinear")]
    view1: View
    view2: View


@dataclass
class Search:
    name: Annotated[str, one_of("auto", "faiss", "torch", "ivf")]
    index: str | None = None
    nprobe: Count | None = None
    refresh_every: Count | None = None


@dataclass
class Finetune:
    """Fine-tuning of the whole network on labels; the learning rate is chosen on the validation images."""

    epochs: Count
    batch_size: Several
    lr: Rates


@dataclass
class Fewshot:
    """Linear probes on fractions of the labels, with several random draws of each fraction."""

    fractions: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    draws: Several


@dataclass
class Evaluation:
    name: Annotated[str, one_of("linear", "original", "finetune", "fewshot")]
    every: Count
    knn_k: Annotated[Any, AfterValidator(_counts)]  # a number, or a list from which the validation images choose
    knn_temperature: Positive
    online_lr: Positive
    epochs: Count
    batch_size: Count
    lr: Rates
    bank: Count | None = None  # training images in the k-NN bank of a validation; None: all, as in the final evaluation
    pictures: bool = False
    finetune: Finetune | None = None  # in addition to the linear probe
    fewshot: Fewshot | None = None  # in addition to the linear probe
    teacher: bool = False


@dataclass
class Tracking:
    name: Annotated[str, one_of("mlflow", "jsonl")]
    experiment: Annotated[str, Field(max_length=500), AfterValidator(_not_blank)]  # MLflow's limit of a name
    log_every: Count
    parent: str | None = None  # the folder of the sweep, if the run is a job of one
    trial: int | None = None  # the run's trial number in the sweep's Optuna study
    system_metrics: bool = False  # MLflow's system metrics: processor, memory, disk, network, GPU


@dataclass
class Checkpoint:
    every: Count
    minutes: NotNegative = 10


@dataclass
class Config:
    """All settings of a run. ``k`` belongs to ``support=kmeans``, ``queue_size`` to ``support=queue``."""

    support: Any
    objective: Any
    method: Any
    projector: Projector
    backbone: Backbone
    schedule: Schedule
    optimizer: Optimizer
    data: Data
    augment: Augment
    search: Search
    evaluation: Evaluation
    tracking: Tracking
    checkpoint: Checkpoint
    seed: Natural
    epochs: Natural  # 0: the weights of ``init`` are evaluated as they are
    batch_size: Several
    device: Annotated[str, AfterValidator(_device)]
    precision: Annotated[str, one_of("auto", "float32", "bfloat16")]
    compile: bool
    resume: Annotated[str, one_of("auto", "never")]
    dry_run: bool
    on_collapse: Annotated[str, one_of("warn", "stop")] = "warn"
    output_dir: str | None = None
    max_minutes: Positive | None = None
    jobs: Count | None = None
    k: Count | None = None
    queue_size: Natural | None = None
    init: str | None = None  # the folder of a run, a checkpoint or an encoder file to start from
    origin: str | None = None  # identifies the weights of ``init``; filled in when they are found


SUPPORTS: dict[str, type[Support]] = {"none": Support, "queue": Queue, "kmeans": KMeans}
SIZES: dict[str, type[Support]] = {
    "k": KMeans,
    "queue_size": Queue,
}  # the support set that each of these is the size of
OBJECTIVES: dict[str, type[Objective]] = {
    "nt_xent": Contrast,
    "mixed": Contrast,
    "published": Contrast,
    "teacher": MNN,
    "relation": ReSSL,
}
