"""What the tests of the launchers share: jobs without a config, run in the current folder."""

from pathlib import Path
from types import SimpleNamespace

from omegaconf import OmegaConf

from src.sweeps.jobs import Job

OURS = "hydra_plugins.support_sets.GridSweeper"


def jobs_of(*lines):
    return [Job(line.split(), None, Path(line.split()[0])) for line in lines]


def run(launcher, jobs, at_a_time=None, max_minutes=None, swept=("k",), **settings):
    """Run jobs with a launcher; yields them in the order in which they end."""
    hydra = {"job": {"config_name": "train"}, "runtime": {"config_sources": []}, "overrides": {"hydra": []}}
    config = {"max_minutes": max_minutes, **settings, "hydra": {**hydra, "sweeper": {"_target_": OURS}}}
    launcher.setup(hydra_context=None, task_function=None, config=OmegaConf.create(config))
    sweep = SimpleNamespace(directory=Path("sweep"), jobs=jobs, overrides=lambda job: [])
    yield from launcher.run(sweep, jobs, set(swept), at_a_time or launcher.at_a_time)
