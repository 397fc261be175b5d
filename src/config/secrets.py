"""No secret in a setting: settings become names, folders and files that others see."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from omegaconf.resolvers import oc

from src.config.renamed import flatten
from src.config.resolvers import register
from src.config.schema import Config
from src.errors import UsageError
from src.system.redact import named_secret_in, names_a_secret

# Settings that are free text; all others choose among words, or are numbers.
_TEXTS = (
    *("output_dir", "init", "tracking.experiment", "data.root", "data.repo", "data.cache_dir"),
    *("method.label", "support.label"),
)
_REMEDY = "it would be written to the run's files; leave it out (code that needs it may read the environment)"


def refuse_secrets(cfg: Config) -> None:
    """Refuse a name, a path or an option in which a secret of the environment stands, however it came there.

    Raises:
        UsageError: the line names the setting and the variable, not the value.
    """
    for key, value in flatten(asdict(cfg)).items():
        if (key in _TEXTS or ".options." in key) and (name := named_secret_in(str(value))):
            raise UsageError(f"{key}: holds the value of {name}, which looks secret; {_REMEDY}")


def _environment(name: str, *default: Any) -> Any:
    """``${oc.env:NAME}``, which OmegaConf offers for any variable."""
    if names_a_secret(name):
        raise UsageError(f"${{oc.env:{name}}} looks secret; {_REMEDY}")
    return oc.env(name, *default)


register("oc.env", _environment)
