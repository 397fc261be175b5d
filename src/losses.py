"""Contrastive losses: pure functions.

Shapes: B batch, D dimensions. Inputs may have any norm and precision; the arithmetic is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # one tensor for view 1, one for view 2


def nt_xent(
    z1_BD: Tensor, z2_BD: Tensor, temperature: float, positives: Pair | None = None, mask_ids: Tensor | None = None
) -> Tensor:
    """Normalised temperature-scaled cross entropy over the 2B views of a batch.

    For view i with other view j, and s = cosine similarity / temperature::

        l(i, j) = -log( exp s(i, j) / sum over all views m except i of exp s(i, m) )

    Args:
        z1_BD: projections of view 1.
        z2_BD: projections of view 2 of the same images.
        temperature: above 0.
        positives: optional targets [B, D] for view 1 and for view 2: view i is pulled towards the target of j instead
            of j itself. The negatives are unchanged.
        mask_ids: [2B] ids of view 1, then of view 2. A view m with the same id as j is left out of i's sum, unless it
            is j itself. So i is not pushed away from other views that share the target that it is pulled towards.

    Returns:
        The mean over all 2B ordered pairs, a scalar.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, equation 1.
    Deviations: ``positives`` and ``mask_ids``.
    """
    z = F.normalize(torch.cat([z1_BD, z2_BD]).float(), dim=1)
    views = torch.arange(len(z), device=z.device)
    others = views.roll(len(z1_BD))
    logits = _products(z, z) / temperature
    if mask_ids is not None:
        alike = mask_ids[others, None] == mask_ids
        logits = logits.masked_fill(alike & (others[:, None] != views), float("-inf"))
    if positives is not None:
        q = F.normalize(torch.cat(positives).float(), dim=1)
        own = (z * q[others]).sum(1, keepdim=True) / temperature
        logits = logits.scatter(1, others[:, None], own)
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, others)


def info_nce(
    positives_BD: Tensor, predictions_BD: Tensor, temperature: float, mask_ids_B: Tensor | None = None
) -> Tensor:
    """Cross entropy of each positive against the predictions of the whole batch.

    With q = positives and p = predictions, both normalised::

        l(i) = -log( exp(q_i . p_i / temperature) / sum over k of exp(q_i . p_k / temperature) )

    Args:
        positives_BD: the vectors that the support set returned for one view.
        predictions_BD: the predictor's output for the other view.
        temperature: above 0.
        mask_ids_B: ids of the positives; rows with the same id are left out of each other's sums. Otherwise, if q_i
            and q_k are the same vector, row i would pull it towards p_i and away from p_k, and row k the reverse.

    Returns:
        The mean over the rows, a scalar.

    Source: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, equation 3. Deviation: ``mask_ids_B``.
    """
    q = F.normalize(positives_BD.float(), dim=1)
    p = F.normalize(predictions_BD.float(), dim=1)
    logits = _products(q, p) / temperature
    rows = torch.arange(len(q), device=q.device)
    if mask_ids_B is not None:
        alike = mask_ids_B[:, None] == mask_ids_B
        logits = logits.masked_fill(alike & (rows[:, None] != rows), float("-inf"))
    return F.cross_entropy(logits, rows)


def support_contrast(
    projections: Pair,
    predictions: Pair | None,
    positives: Pair,
    temperature: float,
    weight: float,
    mask_ids: Tensor | None = None,
) -> Tensor:
    """Weighted sum of NT-Xent between a batch's views and a term that uses positives from a support set.

    With z the projections of view 1 and 2, q their positives, p their predictions::

        (1 - weight) * nt_xent(z1, z2)  +  weight * term

        term = nt_xent(z1, z2, positives=(q1, q2))                without predictions
        term = (info_nce(q1, p2) + info_nce(q2, p1)) / 2          with predictions

    Args:
        projections, predictions, positives: [B, D] each, for view 1 and for view 2.
        temperature: of both summands, above 0.
        weight: 0 to 1; a summand of weight 0 is not computed.
        mask_ids: [2B] ids of view 1, then of view 2, for the term with the positives.

    Returns:
        A scalar.

    Source: weight 1 with predictions is NNCLR's loss in its symmetric form (Dwibedi et al., ICCV 2021, equations 3 and
    4). Deviations: NT-Xent of the views may be added, and predictions are optional. Li et al., "Prototypical
    Contrastive Learning of Unsupervised Representations", ICLR 2021, equation 11, also adds up two such terms.
    """
    if weight == 0:
        return nt_xent(*projections, temperature)
    if predictions is None:
        loss = weight * nt_xent(*projections, temperature, positives, mask_ids)
    else:
        (p1, p2), (q1, q2) = predictions, positives
        ids1, ids2 = (None, None) if mask_ids is None else mask_ids.chunk(2)
        loss = weight * (info_nce(q1, p2, temperature, ids1) + info_nce(q2, p1, temperature, ids2)) / 2
    if weight < 1:
        loss = loss + (1 - weight) * nt_xent(*projections, temperature)
    return loss


def byol(predictions_BD: Tensor, targets_BD: Tensor) -> Tensor:
    """Mean over the rows of 2 - 2 * cosine similarity, the squared distance between the unit vectors: 0 to 4.

    Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, equation 2.
    """
    return (2 - 2 * F.cosine_similarity(predictions_BD.float(), targets_BD.float())).mean()


def mnn(predictions_BD: Tensor, targets_BD: Tensor, neighbours_BKD: Tensor, shares_B: Tensor) -> Tensor:
    """Squared distance of predictions to a teacher's embeddings, plus that to mixtures of these and their neighbours.

    With p = predictions, t = targets, n = the K neighbours of t, all normalised, and s = the row's share::

        l(i) = 2 - 2 p_i . t_i  +  mean over k of (2 - 2 p_i . (s_i n_ik + (1 - s_i) t_i))

    Args:
        predictions_BD: predictions of one view; the rows may stack both directions.
        targets_BD: the teacher's embeddings of the other view, row by row, without a gradient.
        neighbours_BKD: the stored vectors nearest to each target.
        shares_B: weight of the neighbours in each row's mixture, 0 to 1.

    Returns:
        The mean over the rows, a scalar.

    Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, equation 2 (the first term). The second term is
    MNN's, as in its authors' code (https://github.com/pc-cp/MNN), which does not normalise the mixture again.
    """
    p, t = F.normalize(predictions_BD.float(), dim=1), F.normalize(targets_BD.float(), dim=1)
    n = F.normalize(neighbours_BKD.float(), dim=2).mean(1)
    mixed = torch.lerp(t, n, shares_B[:, None])
    return (4 - 2 * (p * (t + mixed)).sum(1)).mean()


def ressl(
    predictions_BD: Tensor,
    targets_BD: Tensor,
    stored_ND: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross entropy between the teacher's and the student's distributions of similarity to the stored vectors.

    With p = predictions and t = targets, both normalised, and v the stored vectors::

        l(i) = -sum over n of softmax_n(t_i . v_n / teacher_temperature) log softmax_n(p_i . v_n / student_temperature)

    Args:
        predictions_BD: predictions of one view; the rows may stack both directions.
        targets_BD: the teacher's embeddings of the other view, row by row, without a gradient.
        stored_ND: unit vectors.
        student_temperature: above 0.
        teacher_temperature: above 0; lower than the student's, so that the teacher's distribution is sharper.

    Returns:
        The mean over the rows, a scalar.

    Source: Zheng et al., "ReSSL: Relational Self-Supervised Learning with Weak Augmentation", NeurIPS 2021, equations
    3 to 5. Deviation: the student is represented by the predictor's output; the original has no predictor.
    """
    p, t = F.normalize(predictions_BD.float(), dim=1), F.normalize(targets_BD.float(), dim=1)
    wanted_BN = (_products(t, stored_ND) / teacher_temperature).softmax(1)
    return F.cross_entropy(_products(p, stored_ND) / student_temperature, wanted_BN)


def barlow_twins(z1_BD: Tensor, z2_BD: Tensor, off_diagonal: float) -> Tensor:
    """Distance between the identity and the correlations of the dimensions of two views' projections.

    With c the D x D matrix of correlations between dimensions of view 1 and of view 2 over the batch::

        l = sum over i of (1 - c_ii)^2  +  off_diagonal * sum over i != j of c_ij^2

    Returns:
        A scalar, of the order of D.

    Source: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, equation 1.
    """
    z1, z2 = (F.batch_norm(z.float(), None, None, training=True) for z in (z1_BD, z2_BD))
    c = _products(z1.T, z2.T) / len(z1)
    own = c.diagonal()
    return (1 - own).square().sum() + off_diagonal * (c.square().sum() - own.square().sum())


def _products(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Products of every row of ``a`` with every row of ``b`` in float32, for which autocast would use bfloat16."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD @ b_BD.T
