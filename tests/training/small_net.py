"""A backbone of two convolutions, for tests in which the network does not matter.

Two ranks exchange messages for every batch norm: `resnet_tiny` has 12 of them, this network has two.
"""

import os

from torch import nn

SMALL_NET = ["backbone.name=small_net", "+backbone._target_=tests.training.small_net.SmallNet"]


class SmallNet(nn.Sequential):
    """A network that can send its own process a signal at a chosen moment.

    With the environment variable ``ENDS="RANK SIGNAL CALL"``, that rank (``-``: the only process) signals itself when
    the network is called for the CALLth time in training; a step calls it twice. A signal from another process might
    come too late, after a run of a few seconds has ended.
    """

    def __init__(self):
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        rank, number, call = os.environ.get("ENDS", "- 0 0").split()
        if self.training and os.environ.get("RANK", "-") == rank and self.calls == int(call):
            os.kill(os.getpid(), int(number))
        return super().forward(images)
