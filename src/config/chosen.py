"""What a command line chooses beside an experiment, whose file may have settings for other options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from omegaconf import DictConfig, flag_override

from src.config.parse import GROUPS, kind_of
from src.config.schema import SIZES, SUPPORTS
from src.errors import UsageError

# What makes a method, whatever an experiment chooses beside it. NNCLR and KMCLR have several objectives.
PRESETS = {
    "simclr": {"support": "none", "objective": "nt_xent"},
    "nnclr": {"support": "queue"},
    "kmclr": {"support": "kmeans"},
}


def settle(composed: DictConfig, overrides: Sequence[str], options: Mapping[str, str]) -> None:
    """Remove an experiment's settings for a support set or an objective that the command line replaces by another.

    So ``experiment=original_nnclr support=none`` is the control of that experiment. What is typed stays, and is refused
    by `src.config.parse.parse` if the chosen option does not have it.

    Args:
        composed: the config, which is changed in place.
        overrides: the command line.
        options: Hydra's choice for each group.

    Raises:
        UsageError: the experiment makes another method of the one that is typed.
    """
    typed = {key.lstrip("+"): value for key, _, value in (each.partition("=") for each in overrides)}
    method = typed.get("method", "")
    for group, option in PRESETS.get(method, {}).items():
        if typed.get("experiment") and group not in typed and options[group] != option:
            there = f"experiment={typed['experiment']} chooses {group}={options[group]}"
            raise UsageError(f"method={method}: {there}; type {group}={option} too, or leave method out")
    with flag_override(composed, "struct", False):
        for group, own in GROUPS.items():
            if group in typed:
                known = {each.name for each in fields(kind_of(group, composed, *own))}
                for key in map(str, list(composed[group])):
                    if key not in known and f"{group}.{key}" not in typed:
                        del composed[group][key]
        for key, owner in SIZES.items():
            if "support" in typed and key not in typed and SUPPORTS.get(composed.support.get("name")) is not owner:
                composed.pop(key, None)


def settled(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Settle a config that was composed together with Hydra's own part, and remove that part."""
    with flag_override(composed, ["struct", "readonly"], False):
        settle(composed, overrides, composed.hydra.runtime.choices)
        del composed["hydra"]
    return composed
