"""Metrics that help to explain an accuracy: how features are spread.

Shapes: B batch, F features, N images. All arithmetic is float32 or better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.support.clusters import entropy

# Features count as constant if their distance from the mean is at most this fraction of their norm; bfloat16 rounds a
# number by up to 0.004 of it.
CONSTANT_TOLERANCE = 0.01
COLLAPSED_RANK = 1.5  # features with a lower effective rank have collapsed; two equally used directions have 2
MIN_ROWS_FOR_RANK = 8  # with fewer columns, or fewer rows beyond the first, an effective rank means nothing


def alignment(x_BF: Tensor, y_BF: Tensor) -> float:
    """Mean squared distance between the unit features of two views of the same images: 0 (identical) to 4.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020, equation 7 with alpha = 2.
    """
    x_BF, y_BF = F.normalize(x_BF.float(), dim=1), F.normalize(y_BF.float(), dim=1)
    return float((x_BF - y_BF).square().sum(1).mean())


def uniformity(x_BF: Tensor) -> float:
    """Log of the mean Gaussian potential of all pairs of unit features: 0 (one point) down to about -4 (spread evenly).

    Source: Wang and Isola, ICML 2020, equation 8 with t = 2.

    Args:
        x_BF: at least two rows.
    """
    x_BF = F.normalize(x_BF.float(), dim=1)
    squared_distances = torch.pdist(x_BF).square()
    return float((-2 * squared_distances).exp().mean().log())


def effective_rank(x_NF: Tensor) -> float:
    """Exponential of the entropy of the features' singular values: 1 (a line) to min(N, F) (all directions equal).

    Source: Roy and Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007. Deviation: the
    features' mean is subtracted first, since a common offset does not tell images apart.
    """
    return _rank((x_NF - x_NF.mean(0)).double())


def collapsed_rank(x_NF: Tensor) -> float | None:
    """The effective rank of features that have collapsed onto a line, 0 if they are constant; None: not collapsed.

    Features with few rows or columns always have a low rank, so they never count as collapsed.
    """
    images, width = x_NF.shape
    if min(images - 1, width) < MIN_ROWS_FOR_RANK:
        return None
    x_NF = x_NF.double()
    centred_NF = x_NF - x_NF.mean(0)
    if centred_NF.norm() <= CONSTANT_TOLERANCE * x_NF.norm():
        return 0.0
    rank = _rank(centred_NF.T if images < width else centred_NF)
    return rank if rank < COLLAPSED_RANK else None


def _rank(centred_NF: Tensor) -> float:
    squared_singular = torch.linalg.eigvalsh(centred_NF.T @ centred_NF)
    return float(entropy(squared_singular.clamp(min=0).sqrt()).exp())
