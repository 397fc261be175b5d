"""Refusal of secrets in settings, because settings end up in names, folders and files that others can see."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from omegaconf.resolvers import oc

from src.config.renamed import flatten
from src.config.resolvers import register
from src.config.schema import Config
from src.errors import UsageError
from src.system.redact import named_secret_in, names_a_secret

# Settings that are free text; all others are numbers or one of a few words.
_TEXTS = (
    *("output_dir", "init", "tracking.experiment", "data.root", "data.repo", "data.cache_dir"),
    *("method.label", "support.label"),
)
_REMEDY = "it would be written to the run's files; leave it out (code that needs it may read the environment)"


def refuse_secrets(cfg: Config) -> None:
    """Refuse a name, path or option that contains the value of a secret environment variable.

    Raises:
        UsageError: the message names the setting and the variable, not the value.
    """
    for key, value in flatten(asdict(cfg)).items():
        if (key in _TEXTS or ".options." in key) and (name := named_secret_in(str(value))):
            raise UsageError(f"{key}: holds the value of {name}, which looks secret; {_REMEDY}")


def _environment(name: str, *default: Any) -> Any:
    """Resolve ``${oc.env:NAME}`` as OmegaConf does, but refuse variables whose name looks secret."""
    if names_a_secret(name):
        raise UsageError(f"${{oc.env:{name}}} looks secret; {_REMEDY}")
    return oc.env(name, *default)


register("oc.env", _environment)
