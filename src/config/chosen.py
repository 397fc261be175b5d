"""What a command line chooses beside an experiment, whose file may have settings for other options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from src.config.parse import GROUPS
from src.config.schema import SIZES
from src.errors import UsageError

# What makes a method, whatever an experiment chooses beside it. NNCLR and KMCLR have several objectives.
PRESETS = {
    "simclr": {"support": "none", "objective": "nt_xent"},
    "nnclr": {"support": "queue"},
    "kmclr": {"support": "kmeans"},
}


def settle(composed: DictConfig, hydra: Any, loader: ConfigLoader) -> None:
    """Give a support set or an objective that is typed in place of an experiment's what it has without the experiment.

    So ``experiment=original_nnclr support=none`` is the control of that experiment. Values that are typed stay, and
    `src.config.parse.parse` refuses those that the chosen option does not have.

    Args:
        composed: the config, which is changed in place.
        hydra: Hydra's own part of it, with the command line and the choice for each group.
        loader: Hydra's config loader.

    Raises:
        UsageError: the experiment, or a main config of one's own, makes another method of the one that is typed.
    """
    name, options = hydra.job.config_name, hydra.runtime.choices
    typed = OverridesParser.create(config_loader=loader).parse_overrides(list(hydra.overrides.task))
    chosen = {each.key_or_group: str(each.input_line) for each in typed if _is_choice(each)}
    others = [each for each in typed if not _is_choice(each)]
    experiment = next((str(each.input_line) for each in others if each.key_or_group == "experiment"), "")
    if not experiment and options.get("experiment"):  # of a main config of one's own
        experiment = f"experiment={options['experiment']}"
    if "method" in chosen:
        _refuse_other_method(options, chosen, experiment or f"--config-name={name}")
    if not experiment or not chosen.keys() & GROUPS:
        return
    # Hydra's other settings, as of a sweeper, do not fit a config that lacks the options they belong to.
    base = [each for each in hydra.overrides.hydra if each.startswith("hydra.searchpath=")]
    rest = [str(each.input_line) for each in others]
    its_own = loader.compute_defaults_list(name, [*base, *rest], RunMode.RUN).overrides.known_choices
    replaced = [group for group in GROUPS if group in chosen and options.get(group) != its_own.get(group)]
    if not replaced:
        return
    keys = [*replaced, *(SIZES if "support" in replaced else ())]
    without = loader.load_configuration(name, [*base, *chosen.values(), "~experiment"], RunMode.RUN)
    with flag_override(composed, ["struct", "readonly"], False):
        for key in composed.keys() & keys:
            del composed[key]
        composed.merge_with(OmegaConf.masked_copy(without, keys))
        for each in others:
            if each.key_or_group.split(".")[0] in keys:
                _apply(composed, each)


def settled(composed: DictConfig, loader: ConfigLoader) -> DictConfig:
    """Settle a config that was composed together with Hydra's own part, and remove that part."""
    settle(composed, composed.hydra, loader)
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed


def _is_choice(override: Override) -> bool:
    """Whether an override chooses the method or one of its parts; ``support={...}`` gives values instead."""
    return override.key_or_group in ("method", *GROUPS) and not isinstance(override.value(), dict)


def _refuse_other_method(options: Mapping[str, str], chosen: Mapping[str, str], where: str) -> None:
    """Raise a `UsageError` if a part that is not typed is not that of the method; ``where`` says what chooses it."""
    for group, option in PRESETS.get(options.get("method", ""), {}).items():
        if group not in chosen and options.get(group) != option:
            there = f"{where} chooses {group}={options.get(group)}"
            raise UsageError(f"method={options['method']}: {there}; type {group}={option} too, or leave method out")


def _apply(composed: DictConfig, override: Override) -> None:
    """Set or delete a value as Hydra does; keys that the chosen option does not have are left to parsing."""
    if not override.is_delete():
        OmegaConf.update(composed, override.key_or_group, override.value(), merge=True, force_add=True)
        return
    parent, _, key = override.key_or_group.rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    if isinstance(node, DictConfig):
        node.pop(key, None)
