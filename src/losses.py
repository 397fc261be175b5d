"""Contrastive losses: pure functions.

Shapes: B batch, D dimensions. Inputs may have any norm and precision; the arithmetic is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, temperature: float, alike_BB: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross entropy over the 2B views of a batch.

    For view i with other view j, and s = cosine similarity / temperature::

        l(i, j) = -log( exp s(i, j) / sum over all views m except i of exp s(i, m) )

    Args:
        z1_BD: projections of view 1.
        z2_BD: of view 2 of the same images.
        temperature: above 0.
        alike_BB: true where two images are left out of each other's sums; symmetric, its diagonal does not matter.

    Returns:
        The mean over all 2B ordered pairs, a scalar.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, equation 1.
    Deviation: ``alike_BB``.
    """
    z = F.normalize(torch.cat([z1_BD, z2_BD]).float(), dim=1)
    logits = _products(z, z) / temperature
    logits.fill_diagonal_(float("-inf"))
    batch = len(z1_BD)
    if alike_BB is not None:
        logits.masked_fill_(_off_diagonal(alike_BB).repeat(2, 2), float("-inf"))
    other_view = torch.arange(2 * batch, device=z.device).roll(batch)
    return F.cross_entropy(logits, other_view)


def info_nce(
    positives_BD: Tensor, predictions_BD: Tensor, temperature: float, alike_BB: Tensor | None = None
) -> Tensor:
    """Cross entropy of each positive against the predictions of the whole batch.

    With q = positives and p = predictions, both normalised::

        l(i) = -log( exp(q_i . p_i / temperature) / sum over k of exp(q_i . p_k / temperature) )

    Args:
        positives_BD: what the support set returned for view 1, say.
        predictions_BD: the predictor's output for view 2.
        temperature: above 0.
        alike_BB: true where column k is left out of row i's sum; its diagonal does not matter. Where q_i and q_k are
            the same vector, q_i would otherwise be asked to be near p_i and far from p_k, and q_k the reverse.

    Returns:
        The mean over the rows, a scalar.

    Source: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, equation 3. Deviation: ``alike_BB``.
    """
    q = F.normalize(positives_BD.float(), dim=1)
    p = F.normalize(predictions_BD.float(), dim=1)
    logits = _products(q, p) / temperature
    rows = torch.arange(len(q), device=q.device)
    if alike_BB is not None:
        logits = logits.masked_fill(_off_diagonal(alike_BB), float("-inf"))
    return F.cross_entropy(logits, rows)


def _products(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Every row of one with every row of the other, in float32, which autocast would make bfloat16."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD @ b_BD.T


def _off_diagonal(alike_BB: Tensor) -> Tensor:
    return alike_BB & ~torch.eye(len(alike_BB), dtype=torch.bool, device=alike_BB.device)
