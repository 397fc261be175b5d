import copy
import functools

import pytest
import torch

from src import cli
from src.reporting import curves
from src.training import run as run_module
from tests.composing import composed
from tests.training.small_net import SMALL_NET
from tests.training.training_runs import StopAfter

composed_once = functools.cache(composed)


@pytest.fixture
def run(tmp_path, monkeypatch, small):
    """A function that trains in this process and returns the run's directory.

    Composing a config and drawing curves take longer than so small a training. So the config of a repeated command line
    is not composed again, and curves are drawn only with ``draw=True``. With ``net=[]`` the network is the tiny ResNet.
    """
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*overrides, directory="run", draw=False, net=SMALL_NET):
        cfg = copy.deepcopy(composed_once(*small, *net, "tracking=jsonl", f"output_dir={directory}", *overrides))
        with monkeypatch.context() as patch:
            if not draw:
                patch.setattr(curves, "plot", lambda directory: directory)
            cli.pretrain(cfg)
        return tmp_path / directory

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def stopped(run, monkeypatch):
    """A function that trains as ``run`` does and is stopped after so many steps, as by a time limit."""

    def train(steps, *overrides, **how):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "Stopper", lambda _: StopAfter(steps))
            with pytest.raises(SystemExit):
                run(*overrides, **how)

    return train
