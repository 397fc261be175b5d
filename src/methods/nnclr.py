"""NNCLR: the positive is the other view's nearest neighbour among past embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import with_support
from src.methods.base import Outcome
from src.support.base import SupportSet


class NNCLR(nn.Module):
    """Encoder and projector; each view is pulled towards its other view's nearest neighbour, and towards that view.

    View 1 enters the queue, after the optimizer's step, when the loop says so.

    Source: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, section 3.2, equations 3 and 4 (symmetric
    form), which is ``support_weight=1`` with a predictor. Deviations: a lower weight; no predictor, where neighbours
    stand in NT-Xent (`with_support`); until the queue is full the positive is the other view.

    Args:
        encoder: images [B, 3, S, S] to features.
        projector: features to embeddings [B, D].
        predictor: embeddings to embeddings, of the other view's neighbour; None: there is none.
        support: the queue; None: nothing is stored, and the positive stays the other view, without a gradient.
        temperature: of the loss.
        support_weight: the neighbours' share of the loss (`with_support`); the rest is the views'.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module | None,
        support: SupportSet | None,
        *,
        temperature: float,
        support_weight: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.support = support
        self.temperature = temperature
        self.support_weight = support_weight

    def forward(self, view1: Tensor, view2: Tensor) -> Outcome:
        """Two views [B, 3, S, S] of the same images, in the same order."""
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        predictions = None if self.predictor is None else (self.predictor(z1), self.predictor(z2))

        positives, ids = torch.cat([z1, z2]).detach(), None
        if self.support is not None and self.support.ready:
            with self.support.stopwatch:
                positives, ids = self.support.lookup(positives)
        q1, q2 = positives.chunk(2)

        loss = with_support((z1, z2), predictions, (q1, q2), self.temperature, self.support_weight)
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
