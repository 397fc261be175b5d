"""Registration of the sweepers and launchers with Hydra, whose plugins must live in its namespace package."""

from __future__ import annotations

import sys

from hydra.core.plugins import Plugins

from src.sweeps.grid import GridSweeper
from src.sweeps.local import LocalLauncher
from src.sweeps.ray_jobs import RayLauncher
from src.sweeps.slurm import SlurmLauncher
from src.sweeps.study_sweeper import StudySweeper

PACKAGE = "hydra_plugins.support_sets"


def register() -> None:
    """Let Hydra find the sweepers and launchers under the names that conf/hydra gives as their ``_target_``."""
    sys.modules[PACKAGE] = sys.modules[__name__]
    for plugin in (GridSweeper, StudySweeper, LocalLauncher, SlurmLauncher, RayLauncher):
        plugin.__module__ = PACKAGE
        Plugins.instance().register(plugin)
