"""This project as a contender: the training loop itself, with the default settings."""

from __future__ import annotations

from scripts.rivals import PREDICTOR, Images, Pace, Setting
from scripts.workbench import ENDLESS, compose, dataset, filled, train


def run(setting: Setting, images: Images, pace: Pace) -> None:
    """Train SimCLR, NNCLR or KMCLR."""
    size = {"kmclr": f"k={setting.support}", "nnclr": f"queue_size={setting.support}"}
    published = ["objective=published", f"objective.predictor_hidden={PREDICTOR}"]  # the rivals' loss
    support = [size[setting.method], *published] if setting.method in size else []
    cfg = compose(
        *ENDLESS,
        f"method={setting.method}",
        *support,
        f"backbone={setting.backbone}",
        f"batch_size={setting.batch_size}",
        f"compile={str(setting.compiled).lower()}",
    )
    train(filled(cfg, dataset(images)), dataset(images), pace)
