"""Residual networks with the CIFAR stem: resnet18, resnet50 and the narrow resnet20, resnet8.

Source: He et al. 2016, "Deep residual learning for image recognition". The blocks are torchvision's; their forward
passes are written anew so that nothing happens in place and each activation is its own call. A shortcut is the
identity, or, where the stride is not 1 or the widths differ, a 1x1 convolution followed by batch normalisation (the
paper's option B, also in the narrow ones). Convolutions have no bias. resnet18 and resnet50 start from PyTorch's
default weights, as in the SAMIS experiments; the narrow ones from Kaiming's normal (fan out).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from src._torchvision import torchvision
from src.models.network import Network, kaiming_fan_out_


class BasicBlock(torchvision.models.resnet.BasicBlock):
    """Two 3x3 convolutions and a shortcut; the stride is the first one's."""

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(in_channels, width, stride, downsample)
        del self.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, width, h / stride, w / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)


class Bottleneck(torchvision.models.resnet.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is the 3x3 one's."""

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(in_channels, width, stride, downsample)
        del self.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, 4 width, h / stride, w / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + shortcut)


class ResNetBody(nn.Module):
    """Stem (3x3, stride 1, no max-pool), stages of blocks, average over positions.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: Blocks of each stage. The first block of every stage but the first has stride 2.
        widths: Width of each stage; the stem has the first.
        in_channels: Channels of the images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        channels = widths[0]
        for depth, width in zip(depths, widths, strict=True):
            strides = [2 if len(self.stages) else 1, *[1] * (depth - 1)]
            stage = nn.Sequential()
            for stride in strides:
                out_channels = width * block.expansion
                stage.append(block(channels, width, stride, _shortcut(channels, out_channels, stride)))
                channels = out_channels
            self.stages.append(stage)
        self.out_features = channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images ``(n, c, h, w)`` as ``(n, out_features)``."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.stages(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _network(body: ResNetBody, num_classes: int) -> Network:
    return Network(body, nn.Linear(body.out_features, num_classes))


def resnet18(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-18: basic blocks 2-2-2-2, widths 64 to 512; the same network for every image size."""
    return _network(ResNetBody(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), in_channels), num_classes)


def resnet50(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-50: bottlenecks 3-4-6-3, widths 64 to 512 times 4; the same network for every image size."""
    return _network(ResNetBody(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), in_channels), num_classes)


def resnet20(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-20: basic blocks 3-3-3, widths 16-32-64, projection shortcuts (option B)."""
    return _network(kaiming_fan_out_(ResNetBody(BasicBlock, (3, 3, 3), (16, 32, 64), in_channels)), num_classes)


def resnet8(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-8: basic blocks 1-1-1, widths 16-32-64, projection shortcuts (option B)."""
    return _network(kaiming_fan_out_(ResNetBody(BasicBlock, (1, 1, 1), (16, 32, 64), in_channels)), num_classes)
