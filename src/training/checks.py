"""Checks of a run's settings against the images that it trains on."""

from __future__ import annotations

import logging

from src.config import schema
from src.config.schema import Config
from src.data import Dataset
from src.data.batches import check_batch_size, images_a_step
from src.errors import UsageError

LARGEST_FOR_SMALL_STEM = 64  # pixels a side
SMALLEST_BATCH = 2  # images; one alone has no negative

logger = logging.getLogger(__name__)


def check_batch_fits(cfg: Config, data: Dataset, exact: bool) -> None:
    """Refuse a batch of more images than there are, or, where the size need not be exact, say that it becomes smaller.

    Raises:
        UsageError: there are fewer images, and the size was asked for, or must have equal parts.
    """
    if exact or cfg.backbone.bn_splits > 1 or len(data.train) < SMALLEST_BATCH:
        check_batch_size(cfg.batch_size, data.train)
    elif cfg.batch_size > len(data.train):
        logger.warning(
            "batch_size=%d: more than the %d training images, so each step takes all of them",
            cfg.batch_size,
            len(data.train),
        )


def refuse_unfillable(cfg: Config, images: int, filled: bool = False) -> None:
    """Refuse a support set that is never filled, since such a run would be the control under another name.

    Args:
        cfg: the run's config.
        images: that it trains on.
        filled: whether it is full already, with another run's weights; then only a reset empties it.

    Raises:
        UsageError: there are fewer embeddings before the last batch, or between two resets, than it holds.
    """
    epochs, key = cfg.epochs, "epochs"
    if isinstance(cfg.support, schema.KMeans) and cfg.support.forget == "reset" and cfg.support.forget_every < epochs:
        epochs, key = cfg.support.forget_every, "support.forget_every"
    batch_size = images_a_step(cfg.batch_size, images)
    seen = (images // batch_size * epochs - 1) * batch_size
    name, size = ("k", cfg.k) if cfg.k is not None else ("queue_size", cfg.queue_size)
    if cfg.support.name == "evolving":
        name, size = "support.start", getattr(cfg.support, "start", None)
    if size is not None and size > seen and not (filled and key == "epochs"):
        why = f"only {seen} embeddings are seen before the last batch of epochs={epochs}"
        if key != "epochs":
            often = "epoch" if epochs == 1 else f"{epochs} epochs"
            why = f"prototypes start anew every {often} ({key}), and only {seen} embeddings are seen in that time"
        lower = f"{name} lower" if seen else "batch_size lower"
        raise UsageError(f"{name}={size}: is never filled, because {why}; set {lower} or {key} higher")


def warn_of_doubtful_settings(cfg: Config, images: int) -> None:
    """Warn of a legal setting that can hardly be meant, such as a queue that holds more than all images."""
    if cfg.schedule.warmup_epochs >= cfg.epochs:
        logger.warning(
            "schedule.warmup_epochs=%g: not shorter than epochs=%d, so the learning rate only ever warms up",
            cfg.schedule.warmup_epochs,
            cfg.epochs,
        )
    if cfg.data.image_size > LARGEST_FOR_SMALL_STEM and cfg.backbone.stem in ("small", "small_padded"):
        logger.warning(
            "backbone.stem=%s: keeps all %d x %d pixels, 16 times the work of backbone.stem=large",
            cfg.backbone.stem,
            cfg.data.image_size,
            cfg.data.image_size,
        )
    if cfg.queue_size is not None and cfg.queue_size > images:
        logger.warning(
            "queue_size=%d: more than the %d training images, so many positives will be old embeddings of the anchor's "
            "own image (support/self_hit tells)",
            cfg.queue_size,
            images,
        )
    if isinstance(cfg.support, schema.KMeans) and (cfg.support.refit, cfg.support.forget) == ("faiss", "reset"):
        batch_size = images_a_step(cfg.batch_size, images)
        between = images // batch_size * batch_size * cfg.support.forget_every
        if between < cfg.support.refit_window:
            logger.warning(
                "support.refit_window=%d: %d embeddings between two resets never fill it, so nothing is re-clustered",
                cfg.support.refit_window,
                between,
            )
    if cfg.k is not None and cfg.k > images:
        logger.warning("k=%d: more prototypes than the %d training images; most will be single images", cfg.k, images)
