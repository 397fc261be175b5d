"""KMCLR: the positive is the prototype nearest to the other view."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import with_support
from src.methods.base import Outcome
from src.support.base import SupportSet


class KMCLR(nn.Module):
    """Encoder and projector; each view is pulled towards its other view's nearest prototype, and towards that view.

    View 1 moves the prototypes, after the optimizer's step, when the loop says so. With fewer prototypes than rows many
    rows share one; ``mask_shared`` leaves two rows that have the same positive out of each other's negatives.

    Source: the study whose figures README.md names, which replaces NNCLR's queue by online k-means; its loss is
    ``support_weight=1`` with a predictor. Deviations: a lower weight; no predictor, where prototypes stand in NT-Xent
    (`with_support`); ``mask_shared``; until the prototypes are seeded the positive is the other view.

    Args:
        encoder: images [B, 3, S, S] to features.
        projector: features to embeddings [B, D].
        predictor: embeddings to embeddings, of the other view's prototype; None: there is none.
        support: the prototypes.
        temperature: of the loss.
        support_weight: the prototypes' share of the loss (`with_support`); the rest is the views'.
        mask_shared: see above.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module | None,
        support: SupportSet,
        *,
        temperature: float,
        support_weight: float,
        mask_shared: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.support = support
        self.temperature = temperature
        self.support_weight = support_weight
        self.mask_shared = mask_shared

    def forward(self, view1: Tensor, view2: Tensor) -> Outcome:
        """Two views [B, 3, S, S] of the same images, in the same order."""
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        predictions = None if self.predictor is None else (self.predictor(z1), self.predictor(z2))

        positives, ids = torch.cat([z1, z2]).detach(), None
        if self.support.ready:
            with self.support.stopwatch:
                positives, ids = self.support.lookup(positives)
        q1, q2 = positives.chunk(2)

        groups = ids if self.mask_shared else None
        loss = with_support((z1, z2), predictions, (q1, q2), self.temperature, self.support_weight, groups)
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
