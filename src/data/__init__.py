"""Images to train and evaluate on: sources, the cache of decoded uint8 images, splits and batches.

Importing the package does not wait for torch: a sweep's own process wants nothing but the images' fingerprints.

dataset = load(cfg.data)
for images, labels, ids in epoch_batches(dataset.on(device).train, cfg.batch_size, cfg.seed, epoch, device):
    ...
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from src.config.schema import Data
from src.data.cache import Cache, cached
from src.errors import UsageError

if TYPE_CHECKING:
    import torch

    from src.data.splits import Split


@dataclass(frozen=True)
class Dataset:
    """A data set as a run sees it.

    ``mean`` and ``std`` are those of each channel over all training images, validation included, for pixels in [0, 1].
    The deviation of a channel that is constant counts as 1.
    """

    name: str
    classes: list[str]
    mean: list[float]
    std: list[float]
    train: Split
    val: Split | None  # None with data.final
    skipped: int  # images that could not be read, with data.on_error=skip
    _cache: Cache = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Which images these are: `src.data.cache.fingerprint`."""
        return self._cache.fingerprint

    @property
    def test(self) -> Split:
        """The test split, for the final evaluation and nothing else. It is not read before it is asked for."""
        return self._cache.part("test")

    def on(self, device: torch.device) -> Dataset:
        """The data set with its training and validation images on a GPU, if they take little of its free memory.

        Otherwise they stay where they are, and `epoch_batches` streams them.
        """
        from src.data.batches import room

        if device.type == "cpu" or self.train.nbytes + (self.val.nbytes if self.val else 0) > room(device):
            return self
        return replace(self, train=self.train.to(device), val=self.val.to(device) if self.val else None)


def load(cfg: Data) -> Dataset:
    """Decodes the images unless the cache has them, then splits them.

    The validation images are cut off first and ``limit`` applies to the rest, so that every limit validates on the same
    images. No image is copied: all splits, and all processes that use the cache, share its memory-mapped pages.

    Raises:
        UsageError: If the source is missing or damaged, its images are others than ``cfg.fingerprint`` says, or the
            splits cannot be made.
    """
    import torch

    from src.data.splits import class_balanced_subset, stratified_split

    cache = cached(cfg)
    images = cache.part("train")
    rows, val = torch.arange(len(images)), None
    if not cfg.final:
        rows, val_rows = stratified_split(images.labels, cfg.val_fraction, cfg.split_seed)
        if not len(val_rows):
            raise UsageError(
                f"data.val_fraction={cfg.val_fraction}: no image to validate on; raise it, or data.final=true"
            )
        val = images.take(val_rows)
    if cfg.limit is not None:
        labels = images.labels[rows]
        _check_limit(cfg.limit, labels)
        rows = rows[class_balanced_subset(labels, cfg.limit, cfg.split_seed)]
    return Dataset(cfg.name, cache.classes, cache.mean, cache.std, images.take(rows), val, len(cache.skipped), cache)


def _check_limit(limit: int, labels: torch.Tensor) -> None:
    images, classes = len(labels), len(labels.unique())
    if not classes <= limit <= images:
        raise UsageError(
            f"data.limit={limit}: set it between {classes}, one image a class, and {images}, "
            "all training images left after validation"
        )
