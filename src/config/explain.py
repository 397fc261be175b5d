"""A mistake in a command line or a config, in one line for people: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from src.config import schema
from src.config.renamed import new_name

OWNERS = {"k": "support=kmeans (method=kmclr)", "queue_size": "support=queue (method=nnclr)"}
LONGEST_VALUE = 100  # characters of it in a message, whose end says what is wrong
BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "finite_number": "must be finite",
    "string_pattern_mismatch": "is not of the form {pattern}",
    "string_too_long": "is longer than {max_length} characters",
    "too_short": "give {min_length} or more",
    "too_long": "give {max_length} at most",
    "value_error": "{error}",
}


def explain_composition(error: Exception) -> str:
    """What Hydra says in several lines of a command line that it cannot compose."""
    message = str(error)
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return f"a config file is not YAML in UTF-8: {message}"
    if missing := re.search(r"Could not find '([\w./-]+)/([^']*)'", message):
        group, option = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
        return f"{group}={option}: there is no such option; choose one of {', '.join(options)}"
    if unknown := re.search(r"Could not (?:override|append to config)[^']*'([\w.@/-]+)'", message):
        return explain_key(unknown.group(1), _beside(unknown.group(1), error.__cause__))
    if several := re.search(r"Ambiguous value for argument '([^']+)'", message):
        return f"{several.group(1)}: several values; add --multirun to run each of them"
    return f"{_first_line(message) or type(error).__name__} (--help shows what can be set)"


def explain_key(key: str, there: Iterable[str] = ()) -> str:
    """A key that the composed config does not have; of those that it has, the ones that may have been meant."""
    if key in OWNERS:
        return f"{key}: only {OWNERS[key]} has it; the chosen support set does not"
    if renamed := new_name(key):
        return f"{key}: is now {renamed}, which the chosen options do not have (--help lists them)"
    group, _, setting = key.partition(".")
    if setting and key in known_keys():
        return f"{key}: the chosen options do not have it; choose {group}=... first (--help lists them)"
    keys = [each for each in (*there, *known_keys()) if each != key]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}: unknown key, or one that the chosen options do not have; {hint}(--help shows what can be set)"


def _beside(key: str, error: BaseException | None) -> list[str]:
    """The dotted keys beside one that OmegaConf did not find, the settings of somebody's own part among them."""
    found = getattr(error, "parent_node", None)
    prefix = "".join(key.rpartition(".")[:2])
    return [prefix + str(each) for each in found] if isinstance(found, DictConfig) else []


def _first_line(message: str) -> str:
    return (message.splitlines() or [""])[0].removeprefix("UsageError raised while resolving interpolation: ")


def explain_type(error: OmegaConfBaseException) -> str:
    """A value that is missing, or of the wrong type."""
    key = str(error.full_key or error.key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return explain_key(key, _beside(key, error))
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no default; give it a value"
    reason = _first_line(str(error.msg or error))
    return f"{key}={error.value}: {reason}" if error.value is not None else f"{key}: {reason}"


def explain_violation(prefix: str, error: ValidationError) -> str:
    """A value of the right type that breaks its field's constraint.

    Args:
        prefix: the dotted key of the node, with its dot.
        error: of the node's fields.
    """
    first = error.errors(include_url=False)[0]
    bound = BOUNDS.get(first["type"])
    what = bound.format(**first.get("ctx", {})) if bound else first["msg"][:1].lower() + first["msg"][1:]
    given = str(first["input"])
    given = given if len(given) <= LONGEST_VALUE else f"{given[:LONGEST_VALUE]}..."
    return f"{prefix}{first['loc'][0]}={given}: {what}"


def known_keys() -> list[str]:
    """Every dotted key that some composition can have."""
    keys: list[str] = []
    unions: dict[str, list[Any]] = {
        "support": list(schema.SUPPORTS.values()),
        "objective": list(dict.fromkeys(schema.OBJECTIVES.values())),
        "method": [schema.Method],
    }

    def visit(prefix: str, node: type) -> None:
        hints = get_type_hints(node)
        for each in fields(node):
            key = f"{prefix}{each.name}"
            keys.append(key)
            kinds: list[Any] = unions.get(key, [hints[each.name]])
            for kind in kinds:
                if is_dataclass(kind):
                    visit(f"{key}.", cast(type, kind))

    visit("", schema.Config)
    return [key for key in dict.fromkeys(keys) if not key.endswith("_target_")]
