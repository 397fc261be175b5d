"""Evaluation of frozen features: nearest neighbours and linear probes, also with few labels.

Shapes: B batch, C classes, F features, L learning rates, N images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.config import schema
from src.config.schema import View
from src.data.augment import ViewMaker, normalise
from src.data.batches import epoch_batches
from src.data.splits import Split, class_balanced_subset
from src.errors import Diverged
from src.models import autocast
from src.support.search import Search
from src.system.seeding import mix, seed_everything

BLOCK = 4096  # images that are scored at a time
PROBE = 1  # keeps the probe's random numbers apart from those of the training steps
CROP_AND_FLIP = View(
    crop_scale=[0.08, 1.0],
    flip=0.5,
    jitter=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grey=0.0,
    blur=0.0,
    blur_sigma=[0.1, 2.0],
    solarize=0.0,
)


class Features(NamedTuple):
    """A network's features of a split, or a classifier's logits, and the split's labels."""

    x_NF: Tensor  # float32
    labels_N: Tensor  # int64

    def take(self, rows: Tensor) -> Features:
        return Features(self.x_NF[rows], self.labels_N[rows])

    def logits(self, classifier: Callable[[Tensor], Tensor]) -> Iterator[Features]:
        """Compute a classifier's logits of blocks of images so small that they take little memory."""
        blocks = zip(self.x_NF.split(BLOCK), self.labels_N.split(BLOCK), strict=True)
        return (Features(classifier(x_BF), labels_B) for x_BF, labels_B in blocks)


class FrozenEncoder:
    """An encoder as it will be used: in evaluation mode, without gradients, with the normalisation it was trained with.

    Args:
        encoder: images [B, 3, S, S] to features [B, F].
        mean, std: of each channel, for images between 0 and 1.
        device: the device that the encoder is on.
        dtype: of the encoder's arithmetic; the features are float32.
    """

    def __init__(
        self, encoder: nn.Module, mean: list[float], std: list[float], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.encoder = encoder
        self.mean, self.std = mean, std
        self.device, self.dtype = device, dtype
        self.before_block: Callable[[], object] = lambda: None  # called before each block of images; may raise to stop

    def of(self, encoder: nn.Module) -> FrozenEncoder:
        """Wrap another encoder, which is used in the same way on the same device."""
        other = type(self)(encoder, self.mean, self.std, self.device, self.dtype)
        other.before_block = self.before_block
        return other

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Compute features [B, F] of normalised images [B, 3, S, S]."""
        training = self.encoder.training
        self.encoder.eval()
        # Not compiled: the shapes differ from training's, and compiling for them would cost more than it saves.
        eager = torch.compiler.set_stance("force_eager")
        with eager, autocast(self.device, self.dtype):
            features = self.encoder(images.to(self.device, memory_format=torch.channels_last))
        self.encoder.train(training)
        return features.float()

    def features(self, split: Split, batch_size: int = 512) -> Features:
        """Compute features of all images of a split, in order and without augmentation.

        Raises:
            Diverged: some features are not finite.
        """
        x_NF = self._encoded(split, batch_size)
        if lost := sum(int((~block.isfinite().all(1)).sum()) for block in x_NF.split(BLOCK)):
            raise Diverged(
                f"the features of {lost} of {len(x_NF)} images are not finite: the encoder's weights are too large; "
                "lower optimizer.lr or raise schedule.warmup_epochs"
            )
        return Features(x_NF, split.labels.to(self.device))

    def _encoded(self, split: Split, batch_size: int) -> Tensor:
        blocks = []
        for block in split.blocks(batch_size):
            self.before_block()
            blocks.append(self.encode(normalise(block.squares(self.device), self.mean, self.std)))
        return torch.cat(blocks)


def topk_hits(scores_NC: Tensor, labels_N: Tensor, k: int) -> int:
    """The number of rows whose label is among the k highest scores."""
    top_NK = scores_NC.topk(min(k, scores_NC.shape[1]), dim=1).indices
    return int((top_NK == labels_N[:, None]).any(1).sum())


def topk_percent(blocks: Iterable[Features], *ks: int) -> list[float]:
    """Share of images whose label is among the k highest logits, in percent, for each k.

    The logits come in blocks of images, so that memory need not hold those of all images at once.
    """
    hits, images = [0] * len(ks), 0
    for logits_BC, labels_B in blocks:
        hits = [before + topk_hits(logits_BC, labels_B, k) for before, k in zip(hits, ks, strict=True)]
        images += len(labels_B)
    return [100 * each / images for each in hits]


def knn_percent(
    bank: Features, queries: Features, classes: int, ks: Sequence[int], temperature: float, search: Search
) -> list[float]:
    """Top-1, in percent, by the votes of the k nearest bank images, for each k.

    A vote weighs exp(cosine / temperature). A k larger than the bank means the whole bank.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, sec. 3.4.
    """
    most = min(max(ks), len(bank.x_NF))
    cosine_NK, ids_NK = search(F.normalize(queries.x_NF, dim=1), F.normalize(bank.x_NF, dim=1), most)
    # Relative to the nearest image, so that no temperature overflows; the ranking of the classes stays the same.
    votes_NK = ((cosine_NK - cosine_NK[:, :1]) / temperature).exp()
    hits = [0] * len(ks)
    for rows in torch.arange(len(ids_NK), device=ids_NK.device).split(BLOCK):
        labels_BK, nothing_BC = bank.labels_N[ids_NK[rows]], votes_NK.new_zeros(len(rows), classes)
        for place, k in enumerate(ks):
            scores_BC = nothing_BC.scatter_add(1, labels_BK[:, :k], votes_NK[rows, :k])
            hits[place] += topk_hits(scores_BC, queries.labels_N[rows], 1)
    return [100 * each / len(ids_NK) for each in hits]


class LinearHeads:
    """L linear classifiers trained side by side on the same features, one for each learning rate.

    Args:
        center_F: subtracted from the features before anything else.
        scale_F: divides the centred features.
    """

    def __init__(self, classes: int, lrs: list[float], center_F: Tensor, scale_F: Tensor) -> None:
        self.lrs_L = torch.tensor(lrs, device=center_F.device)
        self.center_F = center_F
        self.scale_F = scale_F
        self.weight_LFC = center_F.new_zeros(len(lrs), len(center_F), classes)
        self.bias_LC = center_F.new_zeros(len(lrs), classes)

    def __call__(self, x_BF: Tensor) -> Tensor:
        """Logits [L, B, C]."""
        x_BF = (x_BF - self.center_F) / self.scale_F
        return x_BF @ self.weight_LFC + self.bias_LC[:, None]

    @torch.no_grad()
    def fit(self, batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]], epochs: int, steps: int) -> None:
        """Minimise the cross entropy by SGD with momentum 0.9 and no weight decay; rates fall to 0 by a half cosine.

        Args:
            batches: returns the batches of features [B, F] and labels [B] of an epoch, given its number.
            epochs: number of epochs.
            steps: number of batches in an epoch.
        """
        velocity_LFC, velocity_LC = torch.zeros_like(self.weight_LFC), torch.zeros_like(self.bias_LC)
        step = 0
        for epoch in range(epochs):
            for x_BF, labels_B in batches(epoch):
                # The gradient of the mean cross entropy with respect to the logits: softmax minus one-hot, over B.
                error_LBC = self(x_BF).softmax(dim=2)
                error_LBC[:, torch.arange(len(labels_B), device=labels_B.device), labels_B] -= 1
                error_LBC /= len(labels_B)
                velocity_LFC.mul_(0.9).add_(((x_BF - self.center_F) / self.scale_F).T @ error_LBC)
                velocity_LC.mul_(0.9).add_(error_LBC.sum(1))
                rates_L = self.lrs_L * (1 + math.cos(math.pi * step / (epochs * steps))) / 2
                self.weight_LFC -= rates_L[:, None, None] * velocity_LFC
                self.bias_LC -= rates_L[:, None] * velocity_LC
                step += 1

    @torch.no_grad()
    def topk_percent(self, features: Features, head: int, *ks: int) -> list[float]:
        """Share of images whose label is among the k highest logits of one head, in percent, for each k."""
        weight_FC, bias_C = self.weight_LFC[head], self.bias_LC[head]
        logits = features.logits(lambda x_BF: (x_BF - self.center_F) / self.scale_F @ weight_FC + bias_C)
        return topk_percent(logits, *ks)

    def best(self, held_out: Features) -> int:
        """The head with the highest top-1 on held-out features; the first one if several tie."""
        accuracy = [self.topk_percent(held_out, head, 1)[0] for head in range(len(self.lrs_L))]
        return accuracy.index(max(accuracy))


def cached_heads(
    train: Features,
    classes: int,
    lrs: list[float],
    epochs: int,
    batch_size: int,
    seed: int,
    standard_NF: Tensor | None = None,
) -> LinearHeads:
    """Train heads on features that were extracted once, standardised by the features' mean and standard deviation.

    The standardisation is part of the (affine) classifier, so the probe stays linear; it makes one range of learning
    rates fit every encoder.

    Args:
        standard_NF: the features that give mean and standard deviation; None: the training features.
    """
    scale_F, center_F = torch.std_mean(train.x_NF if standard_NF is None else standard_NF, dim=0)
    heads = LinearHeads(classes, lrs, center_F, scale_F.clamp(min=1e-6))
    batch_size = min(batch_size, len(train.x_NF))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        order = torch.randperm(len(train.x_NF), generator=generator).to(train.x_NF.device)
        for rows in order.split(batch_size):
            yield train.x_NF[rows], train.labels_N[rows]

    heads.fit(batches, epochs, math.ceil(len(train.x_NF) / batch_size))
    return heads


def few_shot(
    train: Features,
    held_out: Features,
    test: Features,
    classes: int,
    probe: schema.Evaluation,
    cfg: schema.Fewshot,
    seed: int,
) -> dict[str, float]:
    """Test top-1 of linear probes that learn from a fraction of the labels: mean and deviation over draws, in percent.

    A draw is balanced over the classes, with at least one image of each. It depends on its number alone, so that all
    encoders learn from the same images. Only labels are withheld: features are standardised by those of all training
    images.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, section 6
    (1% and 10% of the labels, balanced over the classes). Deviations: the encoder stays frozen, as in Assran et al.,
    "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022; the learning rate is chosen on held-out images.

    Args:
        train: the features from which the labelled images are drawn.
        held_out: the features on which the learning rate is chosen.
        test: the features on which each draw is measured once.
        classes: C.
        probe: learning rates, epochs and batch size.
        cfg: the fractions, and the number of draws of each.
        seed: seed of the order in which a probe sees its images.

    Returns:
        For 1%, ``test/fewshot_1pct_top1`` and, as the sample standard deviation, ``test/fewshot_1pct_top1_std``.
    """
    labels_N = train.labels_N.cpu()
    metrics: dict[str, float] = {}
    for fraction in cfg.fractions:
        count, top1 = max(len(labels_N.unique()), round(fraction * len(labels_N))), list[float]()
        for draw in range(cfg.draws):
            few = train.take(class_balanced_subset(labels_N, count, draw).to(train.x_NF.device))
            heads = cached_heads(few, classes, probe.lr, probe.epochs, probe.batch_size, seed, train.x_NF)
            top1 += heads.topk_percent(test, heads.best(held_out), 1)
        name = f"test/fewshot_{100 * fraction:g}pct_top1"
        metrics |= {name: statistics.fmean(top1), f"{name}_std": statistics.stdev(top1)}
    return metrics


def cropped_batches(
    frozen: FrozenEncoder, train: Split, batch_size: int, seed: int
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Return a function that gives an epoch's batches: crops (8% to 100% of the area) with flips, and their labels.

    Shapes: crops [B, 3, S, S], labels [B].
    """
    crop_and_flip = ViewMaker(CROP_AND_FLIP, "bilinear", train.size, frozen.mean, frozen.std)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed_everything(seed, epoch, PROBE)
        for batch in epoch_batches(train, batch_size, seed, epoch, frozen.device):
            yield crop_and_flip(batch.images, batch.aspects), batch.labels

    return batches


def augmented_heads(
    frozen: FrozenEncoder, train: Split, classes: int, lrs: list[float], epochs: int, batch_size: int, seed: int
) -> LinearHeads:
    """Train heads on the features of random crops (8% to 100% of the area) and flips, which change every epoch.

    Source: the original study's ``linear_eval.py`` (https://github.com/mwritescode/nnclr-cifar100).
    """
    batch_size = min(batch_size, len(train))
    cropped = cropped_batches(frozen, train, batch_size, seed)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((frozen.encode(views), labels_B) for views, labels_B in cropped(epoch))

    one_F = frozen.features(train.take(torch.arange(1))).x_NF[0]
    heads = LinearHeads(classes, lrs, torch.zeros_like(one_F), torch.ones_like(one_F))
    heads.fit(batches, epochs, len(train) // batch_size)
    return heads
