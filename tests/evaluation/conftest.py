import pytest
import torch
from omegaconf import OmegaConf

from src import cli
from src.config.parse import parse
from src.runs import checkpoint
from tests.composing import composed


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """A finished run's directory, and the digits' cache beside it."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = ["k=5", "epochs=1", "tracking=jsonl", "evaluation.knn_k=[10,20,50,200]"]
    cli.pretrain(composed(*small, *own, f"data.cache_dir={folder}/cache", f"output_dir={folder}/run"))
    yield folder / "run"
    torch.set_num_threads(threads)


def load_config(directory):
    return parse(OmegaConf.create(checkpoint.load_latest(directory / "checkpoints")[1]["config"]))
