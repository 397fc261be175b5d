"""Checks of a run's settings against the images that it trains on."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.config import schema
from src.config.outside import target
from src.config.schema import Config
from src.data import Dataset
from src.data.batches import check_batch_size, images_a_step
from src.errors import UsageError
from src.models import feature_dim

LARGEST_FOR_SMALL_STEM = 64  # pixels a side
SMALLEST_BATCH = 2  # images; a single one has no negative

logger = logging.getLogger(__name__)


def refuse_large_batch(cfg: Config, data: Dataset, ranks: int = 1) -> None:
    """Refuse a batch that is larger than the training split and that cannot shrink to it.

    Raises:
        UsageError: the batch is larger than the training split, and has to divide into equal parts or would shrink
            below 2.
    """
    if ranks > 1 or cfg.backbone.bn_splits > 1 or len(data.train) < SMALLEST_BATCH:
        check_batch_size(cfg.batch_size, data.train)


class Filling(NamedTuple):
    """How many embeddings a support set needs to be filled, and how many steps there are to fill it."""

    setting: str  # the name of the setting that gives `size`
    size: int
    period: str  # the name of the setting that gives `epochs`, after which the set is emptied or the run ends
    epochs: int
    steps: int  # in these epochs
    batch_size: int

    @property
    def seen(self) -> int:
        """Number of embeddings before the last batch of these steps."""
        return (self.steps - 1) * self.batch_size

    @classmethod
    def of(cls, cfg: Config, images: int, filled: bool) -> Filling | None:
        """What the config's support set needs; None if there is nothing to be filled."""
        support, period, epochs = cfg.support, "epochs", cfg.epochs
        if isinstance(support, schema.KMeans) and support.forget == "reset" and support.forget_every < epochs:
            period, epochs = "support.forget_every", support.forget_every
        name, size = ("k", cfg.k) if cfg.k is not None else ("queue_size", cfg.queue_size)
        if support._target_ is not None:
            setting = getattr(target(support._target_, "support"), "filled_by", "")  # a function has none
            name, size = f"support.{setting}", getattr(support, setting, None)
        if size is None or (filled and period == "epochs"):
            return None
        batch_size = images_a_step(cfg.batch_size, images)
        return cls(name, size, period, epochs, images // batch_size * epochs, batch_size)


def refuse_unfillable(cfg: Config, images: int, filled: bool = False) -> None:
    """Refuse a support set that is never filled, since such a run would be the control under another name.

    A window of embeddings that are never re-clustered is refused, too.

    Args:
        cfg: the run's config.
        images: number of training images.
        filled: whether another run's weights have already filled the support set; then only a reset empties it.

    Raises:
        UsageError: the support set needs more embeddings than there are before the last batch or between two resets;
            or the window is not full at any step at which a re-clustering is due.
    """
    if (filling := Filling.of(cfg, images, filled)) is None or filling.size <= filling.seen:
        _refuse_idle_refit(cfg, images, filled)
        return
    epochs, seen = filling.epochs, filling.seen
    why = f"only {seen} embeddings are seen before the last batch of epochs={epochs}"
    if filling.period != "epochs":
        often = "epoch" if epochs == 1 else f"{epochs} epochs"
        why = (
            f"prototypes start anew every {often} ({filling.period}), and only {seen} embeddings are seen in that time"
        )
    lower = f"{filling.setting} lower" if seen else "batch_size lower"
    raise UsageError(
        f"{filling.setting}={filling.size}: is never filled, because {why}; set {lower} or {filling.period} higher"
    )


def _refuse_idle_refit(cfg: Config, images: int, filled: bool) -> None:
    """Refuse a window of embeddings that are never re-clustered: without it, the same run stores less.

    Raises:
        UsageError: the window is not full at any step at which a re-clustering is due.
    """
    support, filling = cfg.support, Filling.of(cfg, images, filled)
    if filling is None or not isinstance(support, schema.KMeans) or support.refit != "faiss":
        return
    period, epochs, steps, batch_size = filling.period, filling.epochs, filling.steps, filling.batch_size
    due = range(support.refit_every - 1, steps // epochs * cfg.epochs, support.refit_every)
    if not any((step % steps + 1) * batch_size >= support.refit_window for step in due):
        raise UsageError(
            f"support.refit_window={support.refit_window}: is not full at any step at which "
            f"support.refit_every={support.refit_every} would re-cluster ({steps * batch_size} embeddings are seen in "
            f"{period}={epochs}); set one of the two lower, {period} higher, or support.refit=online"
        )


def warn_of_late_filling(cfg: Config, images: int, filled: bool) -> None:
    """Warn of a support set that is full in less than half of the steps; the arguments are `refuse_unfillable`'s."""
    filling = Filling.of(cfg, images, filled)
    if filling is not None and (idle := math.ceil(filling.size / filling.batch_size)) > filling.steps / 2:
        logger.warning(
            "%s=%d: is filled after %d of the %d steps of %s=%d; until then the positive is the other view",
            *(filling.setting, filling.size, idle, filling.steps, filling.period, filling.epochs),
        )


def refuse_unset_gradients(encoder: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse images that leave a single pixel for a convolution with a stride, in bfloat16 on a CPU.

    In this case torch (2.15) leaves the weights' gradient uninitialised where it should be 0.

    Raises:
        UsageError: a convolution with a stride sees a single pixel.
    """
    if (device.type, dtype) != ("cpu", torch.bfloat16):
        return
    single: list[nn.Module] = []  # the convolutions that see one pixel

    def look(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-2:].numel() == 1:
            single.append(convolution)

    strided = [
        each
        for each in encoder.modules()
        if isinstance(each, nn.Conv2d) and max(each.stride) > 1 and max(each.kernel_size) > 1
    ]
    hooks = [each.register_forward_pre_hook(look) for each in strided]
    with torch.compiler.set_stance("force_eager"):  # so that nothing is compiled for the shape of this one image
        feature_dim(encoder, image_size)
    for hook in hooks:
        hook.remove()
    if single:
        raise UsageError(
            f"data.image_size={image_size}: one pixel is left for a convolution with a stride, whose gradient "
            "torch does not compute in bfloat16 on a CPU; set precision=float32, or data.image_size higher"
        )


def warn_of_doubtful_settings(cfg: Config, images: int) -> None:
    """Warn of valid settings that are hardly intended, such as a queue that holds more than all images."""
    if cfg.schedule.warmup_epochs >= cfg.epochs > 0:
        logger.warning(
            "schedule.warmup_epochs=%g: not shorter than epochs=%d, so the learning rate only ever warms up",
            cfg.schedule.warmup_epochs,
            cfg.epochs,
        )
    if cfg.batch_size > images:
        logger.warning(
            "batch_size=%d: more than the %d training images, so each step takes all of them", cfg.batch_size, images
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
    if cfg.k is not None and cfg.k > images:
        logger.warning("k=%d: more prototypes than the %d training images; most will be single images", cfg.k, images)
