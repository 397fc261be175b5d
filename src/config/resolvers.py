"""Registration of OmegaConf resolvers, ``${name:arguments}`` in a config, in one way for every version of OmegaConf."""

import warnings
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf


def register(name: str, resolver: Callable[..., Any]) -> None:
    """Make ``${name:...}`` stand for what the function returns, replacing any resolver of that name."""
    with warnings.catch_warnings():  # OmegaConf 2.4 deprecates this function for one that means something else in 2.3
        warnings.simplefilter("ignore")
        OmegaConf.register_new_resolver(name, resolver, replace=True)
