"""lightly's NNCLR, assembled from its modules as in its own example, with this project's network and layer widths."""

from __future__ import annotations

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import NNCLRPredictionHead, NNMemoryBankModule, SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import nn

from scripts.rivals import EMBEDDING, PREDICTOR, PROJECTOR, TEMPERATURE, Images, Pace, Setting, encoder, loader


def run(setting: Setting, images: Images, pace: Pace) -> None:
    """Train NNCLR; ``setting.support`` is the size of its memory bank."""
    backbone, features = encoder(setting.backbone)
    projector = SimCLRProjectionHead(features, PROJECTOR, EMBEDDING)  # two layers as in this project; NNCLR's has three
    predictor = NNCLRPredictionHead(EMBEDDING, PREDICTOR, EMBEDDING)
    bank = NNMemoryBankModule(size=(setting.support, EMBEDDING))
    criterion = NTXentLoss(temperature=TEMPERATURE)
    optimizer = torch.optim.SGD(nn.ModuleList([backbone, projector, predictor]).parameters(), lr=0.06)
    # lightly advises this colour strength, and no blur, for small images.
    batches = loader(images, SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0), setting)
    while True:
        for view1, view2 in batches:
            z1, z2 = projector(backbone(view1)), projector(backbone(view2))
            p1, p2 = predictor(z1), predictor(z2)
            q1, q2 = bank(z1.detach(), update=False), bank(z2.detach(), update=True)
            loss = 0.5 * (criterion(q1, p2) + criterion(q2, p1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pace()
