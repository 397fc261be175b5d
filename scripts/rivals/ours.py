"""This project as a contender: the training loop itself, with the default settings."""

from __future__ import annotations

from scripts.rivals import PREDICTOR, Images, Pace, Setting
from scripts.workbench import compose, dataset, fill, train
from src.training.state import TrainState


def run(method: str, setting: Setting, images: Images, pace: Pace, *, compiled: bool = False) -> None:
    """Train ``simclr``, ``nnclr`` or ``kmclr``."""
    size = {"kmclr": f"k={setting.support}", "nnclr": f"queue_size={setting.support}"}
    published = ["objective=published", f"objective.predictor_hidden={PREDICTOR}"]  # the rivals' loss
    support = [size[method], *published] if method in size else []
    cfg = compose(
        "data.final=true",
        f"method={method}",
        *support,
        f"backbone={setting.backbone}",
        f"batch_size={setting.batch_size}",
        f"compile={str(compiled).lower()}",
        "checkpoint.every=1000000",
        "checkpoint.minutes=1000000",
    )
    state = TrainState(cfg, dataset(images))
    fill(state)
    train(state, dataset(images), pace)
