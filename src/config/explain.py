"""One-line messages about mistakes in a command line or a config: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_type_hints

from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from src.config import schema
from src.config.renamed import new_name
from src.errors import UsageError

OWNERS = {"k": "support=kmeans (method=kmclr)", "queue_size": "support=queue (method=nnclr)"}
MEANT = {"model": "backbone", "arch": "backbone", "encoder": "backbone", "loss": "objective"}  # other projects' names
MAX_SUGGESTIONS = 4  # if more keys end in the typed word, none of them is suggested
MAX_VALUE_CHARS = 100  # a longer value is cut in a message, so that the reason after it stays in sight
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


def explain_composition(error: Exception, known: Collection[str] | None = None) -> str:
    """Explain in one line why a command line cannot be composed, in place of Hydra's several lines.

    Args:
        error: Hydra's error, or a `UsageError`, whose message is returned unchanged.
        known: every dotted key that the command can have; None: those of a training run.
    """
    message = str(error)
    if isinstance(error, UsageError):
        return message
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return f"a config file is not YAML in UTF-8: {message}"
    if missing := re.search(r"Could not find '([\w./-]+)/([^']*)'", message):
        group, option = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
        beside = f"; tracking.experiment={option} names an MLflow experiment" if group == "experiment" else ""
        return f"{group}={option}: there is no such option; choose one of {', '.join(options)}{beside}"
    if there := re.search(r"Could not append to config\. An item is already at '([\w.@/-]+)'", message):
        return f"{there.group(1)}: is there already; leave out the plus"
    if unknown := re.search(r"Could not (?:override|append to config)[^']*'([\w.@/-]+)'", message):
        return explain_key(unknown.group(1), _siblings(unknown.group(1), error.__cause__), known)
    if several := re.search(r"Ambiguous value for argument '([^']+)'", message):
        return f"{several.group(1)}: several values; add --multirun to run each of them"
    if isinstance(error, OverrideParseException):
        return _explain_override(error.override)
    if made := re.search(r"^full_key: (hydra\.\w+)", message, re.MULTILINE):  # a sweeper's or launcher's own settings
        return f"{made.group(1)}: {_first_line(str(error.__cause__ or message))}"
    return f"{_first_line(message) or type(error).__name__} (--help shows what can be set)"


def _explain_override(override: str) -> str:
    """Explain an argument that Hydra cannot read as an override."""
    if override.endswith(","):
        return f"{override}: ends in a comma; write several values without blanks, as in k=10,20"
    if "=" not in override:
        return f"{override}: is no setting; write key=value"
    return f"{override}: cannot be read; write key=value, and put what has special characters between quotes"


def explain_key(key: str, there: Iterable[str] = (), known: Collection[str] | None = None) -> str:
    """Explain a key that the composed config does not have, and suggest keys that may have been meant.

    Args:
        key: the dotted key.
        there: the dotted keys that the composed config has in the same node.
        known: every dotted key that the command can have; None: those of a training run.
    """
    if key == "sweep" and known is None:
        return "sweep: write +sweep=NAME, and add --multirun (--help lists the sweeps)"
    known, there = known_keys() if known is None else known, list(there)
    if key in OWNERS and key in known:
        return f"{key}: only {OWNERS[key]} has it; the chosen support set does not"
    if (renamed := new_name(key)) in known:
        return f"{key}: is now {renamed}; write that, if the chosen options have it (--help lists them)"
    group, _, setting = key.partition(".")
    if setting and key in known:
        choose = f"another {group}=..." if f"{group}.name" in there else f"{group}=... first"
        return f"{key}: the chosen options do not have it; choose {choose} (--help lists them)"
    meant = _suggestions(key, [each for each in dict.fromkeys((*there, *known)) if each != key])
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return f"{key}: unknown key, or one that the chosen options do not have{hint} (--help shows what can be set)"


def _suggestions(key: str, keys: list[str]) -> list[str]:
    """Find those keys that a misspelt key, or a key without its group, may have meant."""
    if MEANT.get(key) in keys:
        return [MEANT[key]]
    ends = [each for each in keys if each.endswith(f".{key}")]
    return ends if 0 < len(ends) <= MAX_SUGGESTIONS else difflib.get_close_matches(key, keys, n=1, cutoff=0.6)


def _siblings(key: str, error: BaseException | None) -> list[str]:
    """The dotted keys in the node in which OmegaConf did not find ``key``, including those of a class from outside."""
    found = getattr(error, "parent_node", None)
    prefix = "".join(key.rpartition(".")[:2])
    return [prefix + str(each) for each in found] if isinstance(found, DictConfig) else []


def _first_line(message: str) -> str:
    return (message.splitlines() or [""])[0].removeprefix("UsageError raised while resolving interpolation: ")


def explain_type(error: OmegaConfBaseException) -> str:
    """Explain a value that is missing or has the wrong type."""
    key = str(error.full_key or error.key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return explain_key(key, _siblings(key, error))
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: has no default; give it a value"
    reason = _first_line(str(error.msg or error))
    if "is not a ListConfig" in reason and not isinstance(error.value, dict):
        return f"{key}={error.value}: give a list, {key}=[{error.value}]"
    return f"{key}={error.value}: {reason}" if error.value is not None else f"{key}: {reason}"


def explain_violation(prefix: str, error: ValidationError) -> str:
    """Explain a value of the right type that violates its field's constraint.

    Args:
        prefix: the dotted key of the node, with a dot at its end.
        error: pydantic's error on the fields of that node.
    """
    first = error.errors(include_url=False)[0]
    bound = BOUNDS.get(first["type"])
    what = bound.format(**first.get("ctx", {})) if bound else first["msg"][:1].lower() + first["msg"][1:]
    given = str(first["input"])
    given = given if len(given) <= MAX_VALUE_CHARS else f"{given[:MAX_VALUE_CHARS]}..."
    return f"{prefix}{first['loc'][0]}={given}: {what}"


def keys_of(config: Mapping[str, Any]) -> list[str]:
    """List every dotted key that a command other than training can have.

    Args:
        config: the command's config file, parsed; it shares some groups with the training's.
    """
    groups = [each for entry in config["defaults"] if isinstance(entry, Mapping) for each in entry]
    own = [key for key in config if key not in ("defaults", "hydra")]
    return [*own, *(key for key in known_keys() if key.split(".")[0] in groups)]


def known_keys() -> list[str]:
    """List every dotted key that a training run can have with some choice of options."""
    return list(dict.fromkeys(key for key, _ in _settings("", schema.Config) if not key.endswith("_target_")))


def whole_numbers() -> set[str]:
    """The dotted keys of all settings that hold an integer, over all options."""
    return {key for key, kind in _settings("", schema.Config) if kind in (int, int | None)}


def _settings(prefix: str, node: type) -> Iterator[tuple[str, Any]]:
    """Yield every dotted key that some composition can have, with its type; again for each option that has the key."""
    unions: dict[str, Iterable[Any]] = {
        "support": schema.SUPPORTS.values(),
        "objective": schema.OBJECTIVES.values(),
        "method": [schema.Method],
    }
    hints = get_type_hints(node)
    for each in fields(node):
        key = f"{prefix}{each.name}"
        for kind in unions.get(key, [hints[each.name]]):
            yield key, kind
            if is_dataclass(kind):
                yield from _settings(f"{key}.", cast(type, kind))
