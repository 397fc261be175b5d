"""BYOL and MNN: no negatives; a slow copy of the networks gives the targets, and a support set mixes into them."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.config import schema
from src.losses import cosine_distance, teacher_regression
from src.methods.base import Method, Output, Parts
from src.models import predictor
from src.support.base import SupportSet


class Teacher(Method):
    """Each view's prediction is pulled towards the teacher's embedding of the other view, and towards a mixture.

    The mixture is of that embedding and of what the support set finds nearest to it, in shares drawn anew at every step
    for either direction. The teacher is a running mean of encoder and projector: it has no gradient, and batch
    statistics of its own. Until a support set is filled, and where nothing is stored, the mixture is the embedding
    itself, and the loss is BYOL's. The support set takes in the teacher's embeddings of view 2, the weak one. Features
    are the student's.

    Source: BYOL: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, section 3.1, with a constant momentum. MNN:
    https://github.com/pc-cp/MNN. Deviation: batch norm is over the whole batch, and the queue starts empty, not random.

    Args:
        parts: encoder, projector, support set.
        objective: the loss's settings.
    """

    def __init__(self, parts: Parts, objective: schema.Teacher) -> None:
        super().__init__(parts)
        self.objective = objective
        self.predictor = predictor(parts.dim, objective.predictor_hidden)
        self.teacher_encoder = copy.deepcopy(parts.encoder).requires_grad_(False)
        self.teacher_projector = copy.deepcopy(parts.projector).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(objective.momentum)

    @property
    def networks(self) -> list[torch.nn.Module]:
        return [*super().networks, self.teacher_encoder, self.teacher_projector]

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        """Two views [B, 3, S, S] of the same images, in the same order."""
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        predictions = torch.cat([self.predictor(z2), self.predictor(z1)])  # of the other view, beside its target
        with torch.no_grad():
            targets = torch.cat([self.teacher_projector(self.teacher_encoder(view)) for view in (view1, view2)])

        if self.support is not None and self.support.ready:
            loss, ids = self.with_stored(self.support, predictions, targets)
        else:
            loss, ids = 2 * cosine_distance(predictions, targets), None
        return Output(loss, torch.cat([h1, h2]).detach(), targets.chunk(2)[1], ids)

    def with_stored(self, support: SupportSet, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss where the support set has a say, and the stored vector [2B] nearest to each target.

        Args:
            support: is ready.
            predictions: [2B, D] of view 2, then of view 1.
            targets: [2B, D] the teacher's embeddings of view 1, then of view 2.
        """
        with support.stopwatch:
            neighbours, ids = support.nearest(targets, self.objective.neighbours)
        shares = torch.rand(2).repeat_interleave(len(targets) // 2).to(targets.device, non_blocking=True)
        return teacher_regression(predictions, targets, neighbours, shares), ids[:, 0]

    def after_init(self, taken: Collection[str]) -> None:
        """Start the teacher as a copy of what the student has been given, unless it has been given weights itself."""
        for name in ("encoder", "projector"):
            if name in taken and f"teacher_{name}" not in taken:
                getattr(self, f"teacher_{name}").load_state_dict(getattr(self, name).state_dict())

    def after_step(self, progress: float) -> None:  # noqa: ARG002
        """Move the teacher towards the student."""
        for slow, fast in ((self.teacher_encoder, self.encoder), (self.teacher_projector, self.projector)):
            self._average(list(slow.parameters()), list(fast.parameters()), 0)
