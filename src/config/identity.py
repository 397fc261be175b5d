"""The identity of a run: which settings make two runs the same experiment, their hash, and the run's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from src.config import outside
from src.config.renamed import flatten, modern
from src.config.schema import OBJECTIVES, SUPPORTS, Config, KMeans
from src.errors import UsageError
from src.system.redact import hide_in_settings

# Settings that may differ between two runs of the same experiment: where it is stored, tracked, resumed and computed,
# and what is merely measured. Those of BY_CONTENT count through `origin` or `data.fingerprint` instead.
BY_CONTENT = ("init", "data.root", "data.background", "data.draft")
NOT_IN_HASH = (
    *BY_CONTENT,
    *("output_dir", "resume", "max_minutes", "jobs", "dry_run", "device", "tracking", "checkpoint", "evaluation"),
    *("on_collapse", "data.cache_dir", "data.on_error"),
    *("method.label", "method.colour", "support.label", "support.colour"),
)
LOG_SIZE = "support_set_size_log10"  # a param for MLflow only, whose charts cannot take the logarithm of a param
SHARDS = "support.shards"  # of a built-in support set: where its vectors lie
# Settings of how stored vectors enter the loss; they have no effect if nothing is stored.
NEED_STORED_VECTORS = tuple(
    f"objective.{key}" for key in ("same_prototype", "neighbours", "teacher_temperature", "student_temperature")
)
DERIVED = (  # params that are not settings, but computed from them or from the data
    "support_set_size",
    LOG_SIZE,
    "support_bytes",
    "encoder_parameters",
    "encoder_features",
    "skipped_images",
)


def support_set_size(cfg: Config) -> int:
    """The number of stored vectors: 0, the queue's size, or k plus the window that ``support.refit=faiss`` stores."""
    window = cfg.support.refit_window if isinstance(cfg.support, KMeans) and cfg.support.refit == "faiss" else 0
    stored: int = cfg.k or cfg.queue_size or getattr(cfg.support, "size", 0) or 0
    return stored + window


def flat(cfg: Config) -> dict[str, Any]:
    """Flatten the whole config to dotted keys, without those that are None."""
    return flatten(asdict(cfg))


def without_neutral(node: Any) -> dict[str, Any]:
    """A config as a nested dict without the fields at their neutral default; this form is saved and hashed."""
    kept = {}
    for each in fields(node):
        value = getattr(node, each.name)
        if value != _default(each):
            kept[each.name] = without_neutral(value) if is_dataclass(value) else value
    return kept


def _default(each: Field) -> Any:
    """A field's default, or MISSING if it has none."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def with_neutral(params: Mapping[str, str]) -> dict[str, str]:
    """Add to a record's params the neutral defaults of the settings that did not exist when the record was written."""
    return _neutral(params.get("support.name", ""), params.get("objective.name", "")) | dict(params)


@cache
def _neutral(support: str, objective: str) -> dict[str, str]:
    """The neutral default of every setting, as text by dotted key; parts from outside this project have no defaults."""
    chosen = {"support": SUPPORTS.get(support), "objective": OBJECTIVES.get(objective)}

    def defaults(node: type, prefix: str) -> Iterator[tuple[str, str]]:
        hints = get_type_hints(node) | (chosen if node is Config else {})
        for each in fields(node):
            key = f"{prefix}{each.name}"
            default = _default(each)
            if is_dataclass(kind := hints[each.name]):
                yield from defaults(cast(type, kind), f"{key}.")
            elif default not in (MISSING, None, {}):
                yield key, str(default)

    return dict(defaults(Config, ""))


def _texts(cfg: Config) -> dict[str, str]:
    """The whole config as a record has it: values as text by dotted key, without those that are None."""
    return {key: str(value) for key, value in flat(cfg).items()}


def inert(params: Mapping[str, str]) -> set[str]:
    """The dotted keys of settings that have no effect because of other settings.

    Args:
        params: all settings of a run, as `_texts` or as a record has them.
    """

    def is_off(key: str) -> bool:
        return params.get(key) in ("0", "0.0")

    keys: set[str] = set()
    support = params.get("support.name", "")
    optimizer = {"lars": ("momentum", "trust_coefficient", "clip_trust"), "sgd": ("momentum",), "adamw": ("betas",)}
    own = optimizer.get(params.get("optimizer.name", ""), ())
    keys |= {f"optimizer.{key}" for each in optimizer.values() for key in each if key not in own}
    if is_off("optimizer.weight_decay"):  # without weight decay LARS does not adapt its learning rate either
        keys |= {"optimizer.decay_all", "optimizer.trust_coefficient", "optimizer.clip_trust"}
    if params.get("data.final") == "True":
        keys |= {"data.val_fraction", *(() if "data.limit" in params else ("data.split_seed",))}
    if params.get("schedule.name", "step") != "step":
        keys |= {"schedule.milestones", "schedule.gamma"}
    if "support._target_" not in params:  # a class from outside may have settings of any name, all of which count
        choices = {"forget_every": ("forget", "reset"), "half_life": ("forget", "decay")}
        choices |= {"refit_every": ("refit", "faiss"), "refit_window": ("refit", "faiss")}
        keys |= {
            f"support.{key}" for key, (by, value) in choices.items() if params.get(f"support.{by}", value) != value
        }
        keys.add(SHARDS)
        keys.update({"none": NEED_STORED_VECTORS, "queue": ("objective.same_prototype",)}.get(support, ()))
    if is_off("objective.decorrelation"):
        keys.add("objective.off_diagonal")
    if support == "none":
        keys |= {"search.name", "search.index", "search.nprobe", "search.refresh_every"}
    keys.add("objective.name")  # only a preset of the other settings of the objective
    if "method._target_" in params:  # a method from outside does not receive the objective
        keys |= {key for key in params if key.startswith("objective.")}
    for view in ("augment.view1", "augment.view2"):
        of = {"jitter": ("brightness", "contrast", "saturation", "hue"), "blur": ("blur_sigma",)}
        keys |= {f"{view}.{key}" for by, each in of.items() if is_off(f"{view}.{by}") for key in each}
    return keys


def is_setting(key: str) -> bool:
    """Whether a dotted key is one of the settings that make two runs the same experiment."""
    return key not in DERIVED and not any(key == skip or key.startswith(f"{skip}.") for skip in NOT_IN_HASH)


def unhashed(one: Config, other: Config) -> list[str]:
    """The dotted keys in which two configs of one hash differ, without those by which they name the same images."""
    a, b = flat(one), flat(other)
    differ = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return [key for key in differ if key == SHARDS or not (is_setting(key) or key in BY_CONTENT)]


def is_protocol(key: str) -> bool:
    """Whether a dotted key affects how the final metrics are measured, and not only what is watched during training."""
    besides = ("every", "online_lr", "bank", "pictures", "teacher")
    return key.startswith("evaluation.") and key.removeprefix("evaluation.") not in besides


def is_of_validation(key: str) -> bool:
    """Whether a dotted key affects the kNN accuracy on validation images."""
    return key in ("evaluation.knn_k", "evaluation.knn_temperature", "evaluation.bank")


def settings(cfg: Config) -> dict[str, Any]:
    """The settings that are hashed, by dotted key: those not neutral, not without effect and not in `NOT_IN_HASH`."""
    counted, without = flatten(without_neutral(cfg)), inert(_texts(cfg))
    kept = {key: value for key, value in counted.items() if is_setting(key) and key not in without}
    return kept | ({"search.name": "auto"} if cfg.support.name == "none" else {})  # keeps existing hashes valid


def check_same(saved: Mapping[str, Any], cfg: Config, where: Path, saved_hash: str = "") -> None:
    """Check that the config with which a run was started describes the same experiment as the present one.

    Args:
        saved: the run's config, nested, or flat with values as text; in one from a record, secrets are hidden.
        cfg: the present config.
        where: the file that ``saved`` was read from.
        saved_hash: the run's `config_hash`, which was computed before secrets were hidden.

    Raises:
        UsageError: they are not the same experiment; the message names the keys that differ.
    """
    if saved_hash == config_hash(cfg) and not has_other_defaults(saved, cfg):
        return
    before, now, counted, without = modern(flatten(saved)), flat(cfg), settings(cfg), inert(_texts(cfg))
    shown_before, shown = hide_in_settings(before), hide_in_settings(now)

    def differs(key: str) -> bool:
        return str(before[key]) not in (str(now[key]), str(shown[key])) if key in before else key in counted

    keys = [key for key in now if differs(key)]
    keys += [key for key in before if key not in now]
    keys = [key for key in keys if is_setting(key) and key not in without]
    if keys:
        differences = ", ".join(f"{key} was {shown_before.get(key)} and is {shown.get(key)}" for key in keys[:4])
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        raise UsageError(f"{where} is of another configuration ({differences}{more}): set another output_dir")


def has_other_defaults(saved: Mapping[str, Any], cfg: Config) -> bool:
    """Whether a run of the same hash has other settings, because defaults of a class from outside have changed.

    The hash leaves defaults out: those of this project never change, but anybody may edit a class of their own. A
    setting that the saved config (nested or flat) lacks is a new parameter, whose default stands for the former code.
    """
    parts = {"method": cfg.method, "support": cfg.support}
    theirs = {f"{group}.{key}" for group, part in parts.items() if part._target_ for key in outside.settings(part)}
    before, now = flatten(saved), flat(cfg)
    shown = hide_in_settings(now)
    keys = [key for key in before if ".".join(key.split(".")[:2]) in theirs and is_setting(key)]
    return any(str(before[key]) not in (str(now.get(key)), str(shown.get(key))) for key in keys)


def same_images(saved: Mapping[str, Any], cfg: Config) -> bool:
    """Whether a run with the saved config (nested) trained on the same images in the same rows as ``cfg`` does."""
    before, now, without = flatten(saved), flatten(without_neutral(cfg)), inert(_texts(cfg))
    keys = {f"data.{key}" for key in ("fingerprint", "limit", "val_fraction", "split_seed", "final")} - without
    return all(before.get(key) == now.get(key) for key in keys)


def config_hash(cfg: Config) -> str:
    """Eight hex digits, equal for two runs if and only if they are the same experiment (up to collisions)."""
    return hashlib.sha256(json.dumps(settings(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_name(cfg: Config) -> str:
    """A readable name of a run, such as ``kmclr-k400-cifar100-resnet18-seed0``."""
    if cfg.k:
        size = f"k{cfg.k}"
    elif cfg.queue_size:
        size = f"queue{cfg.queue_size}"
    else:
        size = str(support_set_size(cfg) or "")
    parts = (cfg.method.name, size, cfg.data.name, cfg.backbone.name, f"seed{cfg.seed}")
    return "-".join(filter(None, parts))
