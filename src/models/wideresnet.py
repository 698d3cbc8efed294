"""The wide residual network, WRN-28-10.

Source: Zagoruyko and Komodakis 2016, "Wide residual networks".
"""

import torch
from torch import nn
from torch.nn import functional as F

from src.models.network import Network, kaiming_fan_out_, stem_padding


class WideBlock(nn.Module):
    """Pre-activation block: BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3, plus a shortcut, no dropout.

    Where the widths differ, the shortcut is a 1x1 convolution without normalisation, and it too starts from the
    activated input; else it is the raw input.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = in_channels == width
        self.shortcut = None if same else nn.Conv2d(in_channels, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, width, h / stride, w / stride)``."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNetBody(nn.Module):
    """Stem of 16 channels, three groups of blocks with strides 1, 2, 2, BN-ReLU, average over positions.

    Args:
        depth: Number of layers, 6 k + 4 for k blocks in a group.
        widen: Factor by which the widths 16, 32, 64 grow.
        in_channels: Channels of the images; the stem pads 3 for one channel.
    """

    def __init__(self, depth: int, widen: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=stem_padding(in_channels), bias=False)
        blocks, channels = [], 16
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for step in (stride, *[1] * ((depth - 4) // 6 - 1)):
                blocks.append(WideBlock(channels, width, step))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.out_features = channels
        kaiming_fan_out_(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images ``(n, c, h, w)`` as ``(n, out_features)``."""
        x = self.blocks(self.conv1(images))
        x = F.relu(self.bn(x))
        # 8x8 maps from 32x32 images, as in the paper; the average adapts to any other size.
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def build_wideresnet(num_classes: int, in_channels: int, depth: int = 28, widen: int = 10) -> Network:
    """A wide residual network of any depth and width; the head's bias starts at 0."""
    body = WideResNetBody(depth, widen, in_channels)
    head = nn.Linear(body.out_features, num_classes)
    nn.init.zeros_(head.bias)
    return Network(body, head)


def wideresnet(num_classes: int, in_channels: int, image_size: int) -> Network:
    """WRN-28-10: four blocks in each group, widths 160, 320, 640; the same network for every image size."""
    return build_wideresnet(num_classes, in_channels)
