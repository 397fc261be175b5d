import pytest
import torch
from omegaconf import OmegaConf

from src import cli
from src.config.parse import parse
from src.runs import checkpoint
from tests.config.test_schema import composed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's directory, and the digits' cache beside it."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    cfg = composed(
        "experiment=demo", "method=kmclr", "k=5", "epochs=1", "data.limit=200", "batch_size=64",
        f"data.cache_dir={folder}/cache", f"output_dir={folder}/run", "tracking=jsonl", "precision=float32",
        "projector.hidden=[32]", "projector.out=16", "evaluation.epochs=5", "evaluation.knn_k=[10,20,50,200]",
        "data.image_size=8", "evaluation.pictures=false",
    )  # fmt: skip
    cli.pretrain(cfg)
    return folder / "run"


def load_config(directory):
    return parse(OmegaConf.create(checkpoint.load_latest(directory / "checkpoints")[1]["config"]))
