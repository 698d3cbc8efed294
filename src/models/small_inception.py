"""The small Inception network of the memorisation studies.

Source: Feldman and Zhang 2020, "What neural networks memorize and why"; Zhang et al. 2017, "Understanding deep
learning requires rethinking generalization".
"""

from torch import nn

from src.models.branches import Branches, ConvUnit, same
from src.models.network import Network

# Channels of the 1x1 and the 3x3 branch of each block, by stage; then the channels of the convolution that halves.
STAGES = (
    (((32, 32), (32, 48)), 160),
    (((112, 48), (96, 64), (80, 80), (48, 96)), 240),
    (((176, 160), (176, 160)), None),
)


def small_inception(num_classes: int, in_channels: int, image_size: int) -> Network:
    """A 3x3 unit of 96 channels, three stages of two-branch blocks, maximum over positions, one linear layer.

    Every convolution has no bias and is followed by BN and ReLU. Between stages a 3x3 convolution of stride 2 and
    padding 1 halves the maps. The same network for every image size.
    """
    body = nn.Sequential(same(in_channels, 96, 3))
    channels = 96
    for pairs, halved in STAGES:
        for one, three in pairs:
            body.append(Branches([same(channels, one, 1), same(channels, three, 3)]))
            channels = one + three
        if halved is not None:
            body.append(ConvUnit(channels, halved, kernel_size=3, stride=2, padding=1))
            channels = halved
    body.extend([nn.AdaptiveMaxPool2d(1), nn.Flatten()])
    return Network(body, nn.Linear(channels, num_classes))
