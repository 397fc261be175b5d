"""KMCLR: prototypes tell which images belong together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import info_nce, nt_xent
from src.methods import Outcome
from src.support import SupportSet


class KMCLR(nn.Module):
    """Encoder, projector and, where prototypes serve as positives, a predictor.

    The loss has two terms, w = ``prototype_weight``::

        (1 - w) * NT-Xent of the views  +  w * InfoNCE of each view's nearest prototype and the other's prediction

    With fewer prototypes than rows many rows share one. ``mask_shared`` leaves them out of each other's negatives: in
    the first term two images that share a prototype in both views, in the second two rows that have the same positive.

    Source: w = 1 without ``mask_shared`` is the study whose figures README.md names, which replaces NNCLR's queue by
    online k-means. Deviations: the first term, ``mask_shared``; until the prototypes are seeded, the second term's
    positive is the other view.

    Args:
        encoder: images [B, 3, S, S] to features.
        projector: features to embeddings [B, D].
        predictor: embeddings to embeddings; None where w is 0.
        support: the prototypes.
        temperature: of both terms.
        prototype_weight: w, from 0 to 1.
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
        prototype_weight: float,
        mask_shared: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.support = support
        self.temperature = temperature
        self.prototype_weight = prototype_weight
        self.mask_shared = mask_shared

    def forward(self, view1: Tensor, view2: Tensor) -> Outcome:
        """Two views [B, 3, S, S] of the same images, in the same order."""
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)

        positives, ids, alike1, alike2 = torch.cat([z1, z2]).detach(), None, None, None
        if self.support.ready:
            with self.support.stopwatch:
                positives, ids = self.support.lookup(positives)
            if self.mask_shared:
                alike1, alike2 = (each[:, None] == each for each in ids.chunk(2))

        loss = z1.new_zeros((), dtype=torch.float32)
        if self.prototype_weight < 1:
            alike = None if alike1 is None or alike2 is None else alike1 & alike2
            loss = (1 - self.prototype_weight) * nt_xent(z1, z2, self.temperature, alike)
        if self.predictor is not None:
            q1, q2 = positives.chunk(2)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            crossed = info_nce(q1, p2, self.temperature, alike1) + info_nce(q2, p1, self.temperature, alike2)
            loss = loss + self.prototype_weight * crossed / 2
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
