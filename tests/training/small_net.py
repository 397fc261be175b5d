"""A backbone of two layers, for tests of all that is not the network.

Two ranks exchange messages for each of its batch norms: `resnet_tiny` has 12, this has two.
"""

import os

from torch import nn

SMALL_NET = ["backbone.name=small_net", "+backbone._target_=tests.training.small_net.SmallNet"]


class SmallNet(nn.Sequential):
    """With ``ENDS="RANK SIGNAL CALL"`` that rank, ``-`` where there are none, signals itself at a call of training.

    A step has two calls. From outside, a signal may come after a run of seconds has ended.
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
