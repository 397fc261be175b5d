"""BYOL, MNN and ReSSL: no negatives; a momentum teacher gives the targets, to which a support set may add others."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.config import schema
from src.losses import barlow_twins, byol, mnn, ressl
from src.methods.base import Method, Output, Parts
from src.models import SplitBatchNorm, predictor
from src.support.base import SupportSet


class MomentumTeacher(Method):
    """Pull each view's prediction towards a teacher's embedding of the other view; subclasses add a support set.

    The teacher is an exponential moving average of encoder and projector; it has no gradient, and its own batch
    statistics. Until the support set is filled, and if nothing is stored, the loss is BYOL's. The teacher's embeddings
    are looked up in the support set, and those of view 2, the weak one, are added to it. The returned features are the
    student's.

    Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, section 3.1, with a constant momentum.

    Args:
        parts: encoder, projector, support set.
        objective: settings of the loss.
    """

    def __init__(self, parts: Parts, objective: schema.MomentumTeacher) -> None:
        super().__init__(parts)
        self.objective = objective
        self.predictor = predictor(parts.dim, objective.predictor_hidden)
        self.teacher_encoder = copy.deepcopy(parts.encoder).requires_grad_(False)
        self.teacher_projector = copy.deepcopy(parts.projector).requires_grad_(False)
        self.shuffles = any(isinstance(each, SplitBatchNorm) for each in parts.encoder.modules())
        self._average = get_ema_multi_avg_fn(objective.momentum)

    @property
    def lookup_networks(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        return self.teacher_encoder, self.teacher_projector

    @property
    def networks(self) -> list[torch.nn.Module]:
        return [*super().networks, self.teacher_encoder, self.teacher_projector]

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        predictions = torch.cat([self.predictor(z2), self.predictor(z1)])  # each row predicts that row of the targets
        with torch.no_grad():
            targets = torch.cat([self._targets(view) for view in (view1, view2)])

        if self.support is not None and self.support.ready:
            loss, ids = self.loss_with_support(self.support, predictions, targets)
        else:
            loss, ids = self.loss_without_support(predictions, targets), None
        if self.objective.decorrelation:
            loss = loss + self.objective.decorrelation * barlow_twins(z1, z2, self.objective.off_diagonal)
        return Output(loss, torch.cat([h1, h2]).detach(), targets.chunk(2)[1], ids)

    def _targets(self, view: Tensor) -> Tensor:
        """The teacher's embeddings of a view.

        With split batch norm the images are shuffled, so that the teacher's parts hold other images than the student's.

        Source: He et al., "Momentum Contrast", CVPR 2020, section 3.3 ("shuffling BN"), as in MNN's code.
        """
        if not self.shuffles:
            return self.teacher_projector(self.teacher_encoder(view))
        order = torch.randperm(len(view)).to(view.device, non_blocking=True)
        return self.teacher_projector(self.teacher_encoder(view[order]))[order.argsort()]

    @abstractmethod
    def loss_with_support(self, support: SupportSet, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss with a support set, and the id [2B] of the stored vector nearest to each target.

        Args:
            support: a support set that is ready.
            predictions: [2B, D] predictions from view 2, then from view 1.
            targets: [2B, D] the teacher's embeddings of view 1, then of view 2.
        """

    @abstractmethod
    def loss_without_support(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """The loss if nothing is stored, or if the support set is not filled yet."""

    def after_init(self, taken: Collection[str]) -> None:
        """Copy the weights that the student has been given to the teacher, unless it has been given its own."""
        for name in ("encoder", "projector"):
            if name in taken and f"teacher_{name}" not in taken:
                getattr(self, f"teacher_{name}").load_state_dict(getattr(self, name).state_dict())

    def after_step(self, progress: float) -> None:  # noqa: ARG002
        """Move the teacher towards the student."""
        for slow, fast in ((self.teacher_encoder, self.encoder), (self.teacher_projector, self.projector)):
            self._average(list(slow.parameters()), list(fast.parameters()), 0)


class MNN(MomentumTeacher):
    """MNN, and BYOL where nothing is stored.

    Predictions are also pulled towards mixtures of the target and its nearest stored vectors. At every step the weight
    of these neighbours in the mixtures is drawn once for each direction.

    Source: MNN, https://github.com/pc-cp/MNN. Deviation: a queue is not used until it is full, while the original
    starts from random vectors.
    """

    objective: schema.MNN

    def loss_with_support(self, support: SupportSet, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with support.stopwatch:
            neighbours, ids = support.nearest(targets, self.objective.neighbours)
        weights = torch.rand(2).repeat_interleave(len(targets) // 2).to(targets.device, non_blocking=True)
        return mnn(predictions, targets, neighbours, weights), ids[:, 0]

    def loss_without_support(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return 2 * byol(predictions, targets)  # `mnn` with each target in place of its neighbours


class ReSSL(MomentumTeacher):
    """ReSSL: the prediction's similarities to all stored vectors are also trained to match the target's.

    Source: ReSSL, see `src.losses.ressl`. Deviations: both directions are trained, while the original's teacher sees
    only the weak view; the heads are BYOL's; BYOL's pull towards the target is added.
    """

    objective: schema.ReSSL

    def loss_with_support(self, support: SupportSet, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with support.stopwatch:
            ids, stored = support.lookup(targets).ids, support.vectors_ND
        temperatures = self.objective.student_temperature, self.objective.teacher_temperature
        return byol(predictions, targets) + ressl(predictions, targets, stored, *temperatures), ids

    def loss_without_support(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return byol(predictions, targets)
