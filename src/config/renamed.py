"""Keys that had another name once: command lines, configs and records of then still mean what they meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from src.errors import UsageError

# Until the support set and the objective had groups of their own, a method held everything.
RENAMED = {
    **{f"method.{key}": f"objective.{key}" for key in ("temperature", "support_weight", "predictor_hidden")},
    "method.prototype_weight": "objective.support_weight",
    "method.same_prototype": "objective.same_prototype",
    "method.queue_precision": "support.precision",
    **{f"method.{key}": f"support.{key}" for key in ("metric", "forget", "forget_every", "half_life", "revive_after")},
    **{f"method.{key}": f"support.{key}" for key in ("refit", "refit_every", "refit_window")},
    "method.projector": "projector",
    "data_root": "data.root",  # of src.evaluate and src.embed
}
SUPPORT_OF_METHOD = {"simclr": "none", "nnclr": "queue", "kmclr": "kmeans"}


def objective_name(support_weight: float, predictor_hidden: float) -> str:
    """What a loss with these settings is called, whichever way they were typed."""
    if support_weight == 0:
        return "nt_xent"
    return "published" if support_weight == 1 and predictor_hidden else "mixed"


def new_name(key: str) -> str | None:
    """What a dotted key is called now; None where it has always had its name."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def modern(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat record of settings under the names of now. One of today passes unchanged.

    Raises:
        UsageError: an old one is damaged.
    """
    if "support.name" in flat or flat.get("method.name") not in SUPPORT_OF_METHOD:
        return dict(flat)
    settings = {new_name(key) or key: value for key, value in flat.items()}
    if flat["method.name"] != "simclr":  # before stored positives had a weight, they had all of it
        settings.setdefault("objective.support_weight", 1.0)
    weight, hidden = (_number(settings, f"objective.{key}") for key in ("support_weight", "predictor_hidden"))
    settings["support.name"] = SUPPORT_OF_METHOD[flat["method.name"]]
    settings["objective.name"] = objective_name(weight, hidden)
    if str(flat.get("queue_size")) == "0":
        settings |= {"support.name": "none", "method.name": "nothing_stored"}
        settings = {key: value for key, value in settings.items() if key not in ("queue_size", "support.precision")}
    return settings


def _number(settings: Mapping[str, Any], key: str) -> float:
    try:
        return float(settings.get(key, 0))
    except (TypeError, ValueError):
        raise UsageError(f"{key}={settings[key]}: is not a number") from None


def modernised(composed: DictConfig) -> DictConfig:
    """The same of a nested config."""
    if "support" in composed or str(OmegaConf.select(composed, "method.name")) not in SUPPORT_OF_METHOD:
        return composed
    nested, settings = OmegaConf.create({}), cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    for key, value in modern(flatten(settings)).items():
        OmegaConf.update(nested, key, value, force_add=True)
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of dotted keys, without those that do not apply (None)."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
