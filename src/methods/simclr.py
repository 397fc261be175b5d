"""SimCLR: the positive is the other view, and nothing is stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.losses import nt_xent
from src.methods.base import Outcome


class SimCLR(nn.Module):
    """Encoder and projector under NT-Xent.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, section 2.
    """

    support = None

    def __init__(self, encoder: nn.Module, projector: nn.Module, *, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.temperature = temperature

    def forward(self, view1: Tensor, view2: Tensor) -> Outcome:
        """Two views [B, 3, S, S] of the same images, in the same order."""
        h1, h2 = self.encoder(view1), self.encoder(view2)
        z1, z2 = self.projector(h1), self.projector(h2)
        loss = nt_xent(z1, z2, self.temperature)
        return Outcome(loss, torch.cat([h1, h2]).detach(), z1.detach(), None)
