"""What ``${name:arguments}`` in a config stands for, registered alike with every version of OmegaConf."""

import warnings
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf


def register(name: str, resolver: Callable[..., Any]) -> None:
    """Let ``${name:...}`` be what the function returns, also where there is such a name already."""
    with warnings.catch_warnings():  # OmegaConf 2.4 gives this a new name, under which 2.3 has something else
        warnings.simplefilter("ignore")
        OmegaConf.register_new_resolver(name, resolver, replace=True)
