"""KMCLR: the positive is the other view's nearest prototype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import info_nce
from src.methods import Outcome
from src.support import SupportSet


class KMCLR(nn.Module):
    """Encoder, projector and predictor; each view's nearest prototype should predict the other view.

    With fewer prototypes than rows many rows share one. ``mask_shared`` leaves them out of each other's negatives; the
    original study counts them as negatives of each other.

    Source: the study whose figures README.md names, which replaces NNCLR's queue by online k-means. Deviations:
    ``mask_shared``; until the prototypes are seeded the positive is the other view.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        support: SupportSet,
        *,
        temperature: float,
        mask_shared: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.support = support
        self.temperature = temperature
        self.mask_shared = mask_shared

    def forward(self, view1: Tensor, view2: Tensor) -> Outcome:
        """Two views [B, 3, S, S] of the same images, in the same order."""
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        p1, p2 = self.predictor(z1), self.predictor(z2)

        positives, ids = torch.cat([z1, z2]).detach(), None
        if self.support.ready:
            with self.support.stopwatch:
                positives, ids = self.support.lookup(positives)
        q1, q2 = positives.chunk(2)
        shared1, shared2 = ids.chunk(2) if self.mask_shared and ids is not None else (None, None)

        loss = (info_nce(q1, p2, self.temperature, shared1) + info_nce(q2, p1, self.temperature, shared2)) / 2
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
