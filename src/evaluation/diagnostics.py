"""Figures that explain an accuracy: how features are spread.

Shapes: B batch, F features, N images. All arithmetic is float32 or better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.support.clusters import entropy


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
    """Exponential of the entropy of the features' singular values: 1 (a line) to min(N, F) (all directions alike).

    Source: Roy and Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007. Deviation: the
    features' mean is taken off first, since a common offset tells no two images apart.
    """
    centred_NF = (x_NF - x_NF.mean(0)).double()
    squared_singular = torch.linalg.eigvalsh(centred_NF.T @ centred_NF)
    return float(entropy(squared_singular.clamp(min=0).sqrt()).exp())
