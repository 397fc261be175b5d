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


class Filling(NamedTuple):
    """What it takes to fill a support set."""

    setting: str  # that says how many vectors
    size: int
    period: str  # the setting that says in how many epochs: after those it is emptied, or the run ends
    epochs: int
    steps: int  # of these epochs
    batch_size: int

    @property
    def seen(self) -> int:
        """Embeddings before the last batch."""
        return (self.steps - 1) * self.batch_size

    @classmethod
    def of(cls, cfg: Config, images: int, filled: bool) -> Filling | None:
        """None where nothing is stored that has to be filled."""
        support = cfg.support
        period, epochs = _period(cfg)
        name, size = ("k", cfg.k) if cfg.k is not None else ("queue_size", cfg.queue_size)
        if support._target_ is not None:
            setting = getattr(target(support._target_, "support"), "filled_by", "")  # a function has none
            name, size = f"support.{setting}", getattr(support, setting, None)
        if size is None or (filled and period == "epochs"):
            return None
        batch_size = images_a_step(cfg.batch_size, images)
        return cls(name, size, period, epochs, images // batch_size * epochs, batch_size)


def _period(cfg: Config) -> tuple[str, int]:
    """The setting that says in how many epochs prototypes are reset or, where they are not, the run ends; its value."""
    support = cfg.support
    if isinstance(support, schema.KMeans) and support.forget == "reset" and support.forget_every < cfg.epochs:
        return "support.forget_every", support.forget_every
    return "epochs", cfg.epochs


def refuse_unfillable(cfg: Config, images: int, filled: bool = False) -> None:
    """Refuse a support set that is never filled, since such a run would be the control under another name.

    A window of which nothing is ever re-clustered is refused, too.

    Args:
        cfg: the run's config.
        images: that it trains on.
        filled: whether it is full already, with another run's weights; then only a reset empties it.

    Raises:
        UsageError: there are fewer embeddings before the last batch, or between two resets, than it holds; or the
            window is full at no step at which a re-clustering is due.
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
    """Refuse to store a window of which nothing is ever re-clustered: without it, the same run stores less.

    Raises:
        UsageError: at no step at which a re-clustering is due is the window full.
    """
    support = cfg.support
    if not isinstance(support, schema.KMeans) or support.refit != "faiss":
        return
    period, epochs = _period(cfg)
    if filled and period == "epochs":
        return
    batch_size = images_a_step(cfg.batch_size, images)
    steps = images // batch_size  # an epoch
    due = range(support.refit_every - 1, steps * cfg.epochs, support.refit_every)
    if not any((step % (steps * epochs) + 1) * batch_size >= support.refit_window for step in due):
        raise UsageError(
            f"support.refit_window={support.refit_window}: is not full at any step at which "
            f"support.refit_every={support.refit_every} would re-cluster ({steps * epochs * batch_size} embeddings are "
            f"seen in {period}={epochs}); set one of the two lower, {period} higher, or support.refit=online"
        )


def warn_of_late_filling(cfg: Config, images: int, filled: bool) -> None:
    """Warn of a support set that is filled in less than half of the steps; arguments as of `refuse_unfillable`."""
    filling = Filling.of(cfg, images, filled)
    if filling is not None and (idle := math.ceil(filling.size / filling.batch_size)) > filling.steps / 2:
        logger.warning(
            "%s=%d: is filled after %d of the %d steps of %s=%d; until then the positive is the other view",
            *(filling.setting, filling.size, idle, filling.steps, filling.period, filling.epochs),
        )


def refuse_unset_gradients(encoder: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse images of which a single pixel is left for a convolution with a stride, in bfloat16 on a CPU.

    There torch (2.15) leaves the weights' gradient as the memory was, where it should be 0.

    Raises:
        UsageError: it is so.
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
    with torch.compiler.set_stance("force_eager"):  # of one image, for which nothing is to be compiled
        feature_dim(encoder, image_size)
    for hook in hooks:
        hook.remove()
    if single:
        raise UsageError(
            f"data.image_size={image_size}: one pixel is left for a convolution with a stride, whose gradient "
            "torch does not compute in bfloat16 on a CPU; set precision=float32, or backbone.stem=small"
        )


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
    if cfg.k is not None and cfg.k > images:
        logger.warning("k=%d: more prototypes than the %d training images; most will be single images", cfg.k, images)
