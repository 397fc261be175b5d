"""SimCLR, NNCLR and KMCLR: one loss, whose positives come from the other view or from a support set."""

from __future__ import annotations

import torch
from torch import Tensor

from src.config import schema
from src.losses import barlow_twins, support_contrast
from src.methods.base import Method, Output, Parts
from src.models import predictor


class Contrast(Method):
    """Pull each view towards the other view of its image, and towards the stored vector nearest to that other view.

    SimCLR stores nothing and uses only the first pull; NNCLR stores a queue, and KMCLR prototypes. Until the support
    set is filled, and if nothing is stored, the other view replaces the stored vector, without a gradient. The loop
    adds the embeddings of view 1 to the support set after the optimizer's step.

    Source: SimCLR: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
    section 2. NNCLR: Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, section 3.2, equations 3 and 4
    (symmetric form). KMCLR: https://github.com/mwritescode/nnclr-cifar100, which replaces NNCLR's queue by online
    k-means. The losses of the last two are ``objective=published``. Deviations: those of `support_contrast` and
    `info_nce`; a support set is not used before it is filled; batch norms see one view at a time, while SimCLR's code
    passes both as one batch.

    Args:
        parts: encoder, projector, support set.
        objective: settings of the loss.
    """

    def __init__(self, parts: Parts, objective: schema.Contrast) -> None:
        super().__init__(parts)
        self.objective = objective
        self.predictor = predictor(parts.dim, objective.predictor_hidden) if objective.predictor_hidden else None

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        predictions = None if self.predictor is None else (self.predictor(z1), self.predictor(z2))

        positives, ids, mask_ids = torch.cat([z1, z2]).detach(), None, None
        if self.support is not None and self.support.ready:
            with self.support.stopwatch:
                positives, ids = self.support.lookup(positives)
            if self.support.shared and self.objective.same_prototype == "mask":
                mask_ids = ids
        q1, q2 = positives.chunk(2)

        loss = support_contrast(
            (z1, z2), predictions, (q1, q2), self.objective.temperature, self.objective.support_weight, mask_ids
        )
        if self.objective.decorrelation:
            loss = loss + self.objective.decorrelation * barlow_twins(z1, z2, self.objective.off_diagonal)
        return Output(loss, torch.cat([h1, h2]).detach(), z1.detach(), ids)
