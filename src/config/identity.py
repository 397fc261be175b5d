"""When two runs are the same experiment: the settings that count, their hash, and the name of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.config.schema import KMCLR, SUPPORT_KEYS, Config
from src.errors import UsageError

# What may differ between two runs that are the same experiment.
NOT_IN_HASH = (
    *("output_dir", "resume", "max_minutes", "jobs", "dry_run", "device", "tracking", "checkpoint"),
    *("data.root", "data.cache_dir", "data.on_error"),
)
DERIVED = ("support_set_size", "support_bytes", "encoder_parameters")  # params that follow from the settings


def support_set_size(cfg: Config) -> int:
    """How many vectors the method stores: 0, the queue's size, or k and what it is re-clustered from."""
    window = cfg.method.refit_window if isinstance(cfg.method, KMCLR) and cfg.method.refit == "faiss" else 0
    return (cfg.k or cfg.queue_size or 0) + window


def flatten(cfg: Config | dict[str, Any]) -> dict[str, Any]:
    """The config as one level of dotted keys, without those that do not apply (None)."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        elif value is not None:
            flat[prefix] = value

    visit("", cfg if isinstance(cfg, dict) else asdict(cfg))
    return flat


def is_setting(key: str) -> bool:
    """Whether a dotted key belongs to what makes two runs the same experiment."""
    return not any(key == skip or key.startswith(skip + ".") for skip in NOT_IN_HASH)


def check_same(saved: dict[str, Any], cfg: Config, where: Path) -> None:
    """Compare the config that a run was started with (nested, or flat and as text) with the present one.

    Raises:
        UsageError: they are not the same experiment; the line names the keys that differ.
    """
    before, now = flatten(saved), flatten(cfg)
    keys = [key for key in now if is_setting(key) and str(before.get(key)) != str(now[key])]
    keys += [key for key in before if is_setting(key) and key not in now and key not in (*DERIVED, "skipped_images")]
    if keys:
        differences = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in keys[:4])
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        raise UsageError(f"{where} is of another configuration ({differences}{more}): set another output_dir")


def config_hash(cfg: Config) -> str:
    """Eight hex digits that two runs share exactly when they are the same experiment.

    Where it is stored, tracked or resumed, and on which device it runs, do not count.
    """
    counted = {key: value for key, value in flatten(cfg).items() if is_setting(key)}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]


def run_name(cfg: Config) -> str:
    """For people: ``kmclr-k400-cifar100-resnet18-seed0``."""
    key = SUPPORT_KEYS.get(cfg.method.name)
    size = f"-{key.split('_')[0]}{getattr(cfg, key)}" if key else ""
    return f"{cfg.method.name}{size}-{cfg.data.name}-{cfg.backbone.name}-seed{cfg.seed}"
