"""What Hydra says of a line that it cannot compose, in one line for people."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from src.config import schema


def explain(message: str) -> str:
    """One line that says what Hydra's several say, and what to do."""
    if re.search(r"Could not (find|load) 'hydra/launcher/submitit_(slurm|local)'", message):
        return "hydra/launcher: SLURM needs submitit: pip install --constraint constraints.txt '.[slurm]'"
    if "hydra_plugins.hydra_ray_launcher" in message:
        return (
            "hydra/launcher=ray: needs Ray and its launcher: pip install --constraint constraints.txt '.[ray]' && "
            "pip install --no-deps hydra-ray-launcher==1.2.2"
        )
    if missing := re.search(r"Could not find '([\w./-]+)/([^']*)'", message):
        group, option = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
        return f"{group}={option}: there is no such option; choose one of {', '.join(options)}"
    if unknown := re.search(r"Could not (?:override|append to config)[^']*'([\w.@/-]+)'", message):
        return _unknown_key(unknown.group(1))
    if several := re.search(r"Ambiguous value for argument '([^']+)'", message):
        return f"{several.group(1)}: several values; add --multirun to run each of them"
    return f"{message.splitlines()[0]} (--help shows what can be set)"


def _unknown_key(key: str) -> str:
    for method, root_key in schema.SUPPORT_KEYS.items():
        if key == root_key:
            others = [f"method={name} has {other}" for name, other in schema.SUPPORT_KEYS.items() if name != method]
            return f"{key}: only method={method} has it ({', '.join(others)}; simclr stores nothing)"
    group, _, setting = key.partition(".")
    if setting and key in known_keys():
        return f"{key}: the chosen options do not have it; choose {group}=... first (--help lists them)"
    near = difflib.get_close_matches(key, [each for each in known_keys() if each != key], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}: unknown key, or one that the chosen options do not have; {hint}(--help shows what can be set)"


def known_keys() -> list[str]:
    """Every dotted key that some composition can have."""
    keys: list[str] = []

    def visit(prefix: str, node: type) -> None:
        hints = get_type_hints(node)
        for each in fields(node):
            key = f"{prefix}{each.name}"
            keys.append(key)
            kinds = schema.METHODS.values() if key == "method" else [hints[each.name]]
            for kind in kinds:
                if is_dataclass(kind):
                    visit(f"{key}.", kind)

    visit("", schema.Config)
    return list(dict.fromkeys(keys))
