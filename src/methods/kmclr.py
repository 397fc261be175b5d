"""KMCLR: the positive is the prototype nearest to the other view."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import with_support
from src.methods import Outcome
from src.support import SupportSet


class KMCLR(nn.Module):
    """Encoder, projector and predictor; each view's nearest prototype should predict the other view.

    View 1 moves the prototypes, after the optimizer's step, when the loop says so. With fewer prototypes than rows many
    rows share one; ``mask_shared`` leaves two rows that have the same positive out of each other's negatives.

    Source: the study whose figures README.md names, which replaces NNCLR's queue by online k-means. Deviations:
    ``support_weight`` below 1, ``mask_shared``; until the prototypes are seeded the positive is the other view.

    Args:
        encoder: images [B, 3, S, S] to features.
        projector: features to embeddings [B, D].
        predictor: embeddings to embeddings.
        support: the prototypes.
        temperature: of the loss.
        support_weight: the prototypes' share of the loss (`with_support`); the rest is the views'.
        mask_shared: see above.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
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
        p1, p2 = self.predictor(z1), self.predictor(z2)

        positives, ids, alike1, alike2 = torch.cat([z1, z2]).detach(), None, None, None
        if self.support.ready:
            with self.support.stopwatch:
                positives, ids = self.support.lookup(positives)
            if self.mask_shared:
                alike1, alike2 = (each[:, None] == each for each in ids.chunk(2))
        q1, q2 = positives.chunk(2)

        loss = with_support((z1, z2), (p1, p2), (q1, q2), self.temperature, self.support_weight, alike=(alike1, alike2))
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
