"""The original study's algorithm, rebuilt from its description: KMCLR, and the NNCLR on which it builds.

A DataLoader with Pillow transforms one image at a time. The network computes in float32, with a forward pass for each
view, and LARS optimizes it. KMCLR uses scikit-learn's MiniBatchKMeans in float64 on the CPU; NNCLR's queue is
normalised at every lookup. Left out, which makes the rival faster, are the padding of 2 in the study's stem (27% more
arithmetic), the third layer of its projector, and the classifier that it trains beside the encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from timm.optim import Lars
from torch import Tensor, nn
from torchvision import transforms

from scripts.rivals import EMBEDDING, PREDICTOR, PROJECTOR, TEMPERATURE, Images, Pace, Setting, encoder, loader
from src import models
from src.losses import info_nce


def view(solarize: float) -> transforms.Compose:
    """The study's transforms (``conf/experiment/original.yaml``) without blur, as in this project's timed runs."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomSolarize(128, p=solarize),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
        ]
    )


class TwoViews:
    """Makes an image's two views, as in conf/augment/asymmetric.yaml."""

    def __init__(self) -> None:
        self.views = view(solarize=0.0), view(solarize=0.2)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return self.views[0](image), self.views[1](image)


class Prototypes:
    """The centres of a MiniBatchKMeans, on the CPU in float64; a lookup returns the nearest ones."""

    def __init__(self, k: int) -> None:
        self.kmeans = MiniBatchKMeans(k, n_init=1, random_state=0)
        self.update(torch.randn(2 * k, EMBEDDING))

    def lookup(self, z_BD: Tensor) -> Tensor:
        ids = self.kmeans.predict(z_BD.double().numpy())
        return torch.from_numpy(self.kmeans.cluster_centers_[ids]).float()

    def update(self, z_BD: Tensor) -> None:
        self.kmeans.partial_fit(z_BD.double().numpy())


class Queue:
    """The last embeddings, normalised at every lookup; a lookup returns the nearest ones."""

    def __init__(self, size: int) -> None:
        self.rows_ND = torch.randn(size, EMBEDDING)
        self.next = 0

    def lookup(self, z_BD: Tensor) -> Tensor:
        bank_ND = F.normalize(self.rows_ND, dim=1)
        return bank_ND[(F.normalize(z_BD, dim=1) @ bank_ND.T).argmax(1)]

    def update(self, z_BD: Tensor) -> None:
        slots = (torch.arange(len(z_BD)) + self.next) % len(self.rows_ND)
        self.rows_ND[slots] = z_BD
        self.next = int(slots[-1]) + 1


def run(setting: Setting, images: Images, pace: Pace) -> None:
    """Train NNCLR or KMCLR."""
    backbone, features = encoder(setting.backbone)
    projector = models.projector(features, [PROJECTOR], EMBEDDING)
    predictor = models.predictor(EMBEDDING, PREDICTOR)
    support = Prototypes(setting.support) if setting.method == "kmclr" else Queue(setting.support)
    optimizer = Lars(
        nn.ModuleList([backbone, projector, predictor]).parameters(), lr=0.2, momentum=0.9, weight_decay=1e-6
    )
    batches = loader(images, TwoViews(), setting)
    while True:
        for view1, view2 in batches:
            z1, z2 = projector(backbone(view1)), projector(backbone(view2))
            p1, p2 = predictor(z1), predictor(z2)
            with torch.no_grad():
                q1, q2 = support.lookup(z1.detach()), support.lookup(z2.detach())
                support.update(z1.detach())
            loss = (info_nce(q1, p2, TEMPERATURE) + info_nce(q2, p1, TEMPERATURE)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pace()
