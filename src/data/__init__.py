"""Images to train and evaluate on: sources, the cache of decoded uint8 images, splits and batches.

Importing this package does not import torch, because the main process of a sweep needs only the images' fingerprints.
A training run uses the package like this::

    dataset = load(cfg.data)
    for batch in epoch_batches(dataset.to_if_it_fits(device).train, cfg.batch_size, cfg.seed, epoch, device):
        ...
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import yaml

from src.config.schema import Data
from src.data.cache import Cache, cached, image_names
from src.errors import UsageError
from src.system.environment import CONF

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from src.data.splits import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A data set as a run sees it.

    ``mean`` and ``std`` are per channel, for pixels in [0, 1], over the training images and, unless it is cut from the
    probe images, the validation split. A constant channel has a std of 1.
    """

    name: str
    classes: list[str]  # empty if no image has a label; then nothing that needs labels is evaluated
    mean: list[float]
    std: list[float]
    train: Split
    val: Split | None  # None with data.final
    skipped: int  # how many images were left out because they cannot be read (data.on_error=skip)
    _cache: Cache = field(repr=False)
    probe_only: Split | None = None  # labelled images for the probes, if those of ``train`` have no labels

    @property
    def fingerprint(self) -> str:
        """The digest that identifies the images, as `src.data.cache.fingerprint` computes it."""
        return self._cache.fingerprint

    @property
    def labelled(self) -> bool:
        """Whether the training images have labels."""
        return bool(self.classes) and self.probe_only is None

    @property
    def probe(self) -> Split:
        """The labelled images on which linear probes and nearest-neighbour classifiers are fitted."""
        return self.train if self.probe_only is None else self.probe_only

    @property
    def test(self) -> Split:
        """The test split, for the final evaluation only. It is opened when this property is first used, not before."""
        return self._cache.part("test")

    def names(self, cfg: Data) -> dict[str, Iterator[tuple[str, str]]]:
        """The split and the name of each image, listed for each part of the cache: `src.data.cache.image_names`."""
        return image_names(cfg, self._cache)

    def to_if_it_fits(self, device: torch.device) -> Dataset:
        """Copy the training, validation and probe images to a GPU if they fit into a quarter of its free memory.

        Otherwise return the data set as it is; `epoch_batches` then streams the images.
        """
        from src.data.batches import room

        others = [split for split in (self.val, self.probe_only) if split is not None]
        if device.type == "cpu" or sum(split.nbytes for split in (self.train, *others)) > room(device):
            return self
        val, probe_only = (None if split is None else split.to(device) for split in (self.val, self.probe_only))
        return replace(self, train=self.train.to(device), val=val, probe_only=probe_only)


def load(cfg: Data) -> Dataset:
    """Decode the images unless the cache has them, then split them.

    If the source has no validation split, a part of the labelled images is held out for validation. ``limit`` applies
    to the training images that remain, so that runs with different limits validate on the same images. No image is
    copied: all splits, and all processes that use the cache, share its memory-mapped pages.

    Raises:
        UsageError: the source is missing or damaged, its images are not those that ``cfg.fingerprint`` names, or the
            splits cannot be made.
    """
    import torch

    from src.data.splits import class_balanced_subset

    cache = cached(cfg)
    train, probe, val = cache.part("train"), cache.part("probe"), None
    if not cfg.final and (held_out := cache.counts["val"]):
        _warn_of_unused_cut_settings(cfg)
        train, val = train.take(torch.arange(len(train))[:-held_out]), train.take(torch.arange(len(train))[-held_out:])
    elif not cfg.final and len(probe):
        probe, val = _cut_off_validation(probe, cfg)
    elif not cfg.final:
        train, val = _cut_off_validation(train, cfg)
    if cfg.limit is not None:
        _check_limit(cfg.limit, train.labels)
        train = train.take(class_balanced_subset(train.labels, cfg.limit, cfg.split_seed))
    probe_only = probe if len(probe) else None
    return Dataset(cfg.name, cache.classes, cache.mean, cache.std, train, val, len(cache.skipped), cache, probe_only)


def _cut_off_validation(split: Split, cfg: Data) -> tuple[Split, Split]:
    from src.data.splits import stratified_split

    rest, held_out = stratified_split(split.labels, cfg.val_fraction, cfg.split_seed)
    if not len(held_out):
        raise UsageError(f"data.val_fraction={cfg.val_fraction}: no image to validate on; raise it, or data.final=true")
    return split.take(rest), split.take(held_out)


def _warn_of_unused_cut_settings(cfg: Data) -> None:
    """Warn if settings of the validation cut are changed that have no effect here except on the run's hash."""
    usual = yaml.safe_load((CONF / "shared" / "data.yaml").read_text())
    changed = [key for key in ("val_fraction", "split_seed") if getattr(cfg, key) != usual[key]]
    if cfg.limit is not None and "split_seed" in changed:  # the seed still chooses the subset of data.limit
        changed.remove("split_seed")
    if changed:
        typed = ", ".join(f"data.{key}={getattr(cfg, key)}" for key in changed)
        logger.warning("%s: no effect, because the data have a validation split of their own", typed)


def _check_limit(limit: int, labels: torch.Tensor) -> None:
    images, classes = len(labels), len(labels.unique())
    if not classes <= limit <= images:
        raise UsageError(
            f"data.limit={limit}: set it between {classes}, one image a class, and {images}, "
            "all training images left after validation"
        )
