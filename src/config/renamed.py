"""Keys that once had another name: old command lines, configs and records keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from src.errors import UsageError

# Before the support set and the objective had their own groups, all their settings belonged to the method.
RENAMED = {
    **{f"method.{key}": f"objective.{key}" for key in ("temperature", "support_weight", "predictor_hidden")},
    "method.prototype_weight": "objective.support_weight",
    "method.same_prototype": "objective.same_prototype",
    "method.queue_precision": "support.precision",
    **{f"method.{key}": f"support.{key}" for key in ("metric", "forget", "forget_every", "half_life", "revive_after")},
    **{f"method.{key}": f"support.{key}" for key in ("refit", "refit_every", "refit_window")},
    "method.projector": "projector",
    "data_root": "data.root",  # a key of src.evaluate and src.embed
}
SUPPORT_OF_METHOD = {"simclr": "none", "nnclr": "queue", "kmclr": "kmeans"}


def objective_name(support_weight: float, predictor_hidden: float) -> str:
    """The name of the contrastive objective with these settings, whichever preset they were typed with."""
    if support_weight == 0:
        return "nt_xent"
    return "published" if support_weight == 1 and predictor_hidden else "mixed"


def new_name(key: str) -> str | None:
    """The present name of a dotted key; None if the key has not been renamed."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def modern(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings of an old flat record their present names; a present-day record is returned unchanged.

    Raises:
        UsageError: the old record is damaged.
    """
    if "support.name" in flat or flat.get("method.name") not in SUPPORT_OF_METHOD:
        return dict(flat)
    settings = {new_name(key) or key: value for key, value in flat.items()}
    if flat["method.name"] != "simclr":  # before support_weight existed, stored vectors were the only positives
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
    """Give the settings of an old nested config their present names; a present-day config is returned unchanged."""
    if "support" in composed or str(OmegaConf.select(composed, "method.name")) not in SUPPORT_OF_METHOD:
        return composed
    nested, settings = OmegaConf.create({}), cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    for key, value in modern(flatten(settings)).items():
        OmegaConf.update(nested, key, value, force_add=True)
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to one level of dotted keys, without those whose value is None."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
