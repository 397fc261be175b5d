"""NNCLR: the positive is the other view's nearest neighbour among past embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import info_nce
from src.methods import Outcome
from src.support import SupportSet


class NNCLR(nn.Module):
    """Encoder, projector and predictor; each view's nearest neighbour should predict the other view.

    The loss is symmetric in the views; view 1 enters the queue, after the optimizer's step, when the loop says so.

    Source: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, section 3.2, equations 3 and 4 (symmetric
    form). Deviation: until the queue is full the positive is the other view.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, support: SupportSet, *, temperature: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.support = support
        self.temperature = temperature

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

        loss = (info_nce(q1, p2, self.temperature) + info_nce(q2, p1, self.temperature)) / 2
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
