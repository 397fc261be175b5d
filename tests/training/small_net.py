"""A backbone of two layers, for tests of all that is not the network.

Two ranks exchange messages for each of its batch norms: `resnet_tiny` has 12, this has two.
"""

from torch import nn

SMALL_NET = ["backbone.name=small_net", "+backbone._target_=tests.training.small_net.SmallNet"]


class SmallNet(nn.Sequential):
    def __init__(self):
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
