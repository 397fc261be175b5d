"""Configs of overrides, as they are typed, and the options of a group."""

from hydra import compose, initialize_config_dir

from src.config.parse import parse
from src.system.environment import CONF


def composed(*overrides, name="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def parsed(*overrides):
    return parse(composed(*overrides))


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
