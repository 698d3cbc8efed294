"""Residual networks: ResNets with the CIFAR stem, wide ResNets, and ResNets with filter response normalization.

Sources: He et al. 2016, "Deep residual learning for image recognition"; Zagoruyko and Komodakis 2016, "Wide residual
networks"; Singh and Krishnan 2020, "Filter response normalization layer: eliminating batch dependence in the training
of deep neural networks".

resnet18, resnet50, resnet20, and resnet8: a shortcut is the identity, or a 1x1 convolution followed by batch
normalization if the stride is not 1 or the widths differ (option B of the first paper, also for the narrow models).
Convolutions have no bias. resnet18 and resnet50 use PyTorch's default initialization, as in the SAMIS experiments;
resnet20 and resnet8 use Kaiming normal initialization (fan-out). Parameter names in the blocks match torchvision's.

resnet20_frn, the model of the Memory-Perturbation Equation experiments, differs from resnet20 in more than the
normalization: convolutions have biases, SAME padding (for stride 2, an even map is padded only at the bottom and
right), and PyTorch's default initialization. No operation mixes examples.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from src.models.base import FilterResponseNorm, Network, kaiming_fan_out_, same_conv, stem_padding


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first convolution has the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, width, h / stride, w / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, and 1x1 convolutions and a shortcut; the 3x3 convolution has the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, 4 width, h / stride, w / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + shortcut)


class ResNetBody(nn.Module):
    """Stem (3x3, stride 1, no max-pooling), stages of blocks, and average pooling over all positions.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: Number of blocks per stage. The first block of every stage except the first has stride 2.
        widths: Width of each stage; the stem has the first width.
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
                shortcut = None
                if stride != 1 or channels != out_channels:
                    projection = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
                stage.append(block(channels, width, stride, shortcut))
                channels = out_channels
            self.stages.append(stage)
        self.out_features = channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images ``(n, c, h, w)`` as ``(n, out_features)``."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.stages(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _with_head(body: ResNetBody, num_classes: int) -> Network:
    return Network(body, nn.Linear(body.out_features, num_classes))


def resnet18(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-18: basic blocks 2-2-2-2, widths 64 to 512; the same architecture for every image size."""
    return _with_head(ResNetBody(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), in_channels), num_classes)


def resnet50(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-50: bottleneck blocks 3-4-6-3, widths 64 to 512, times 4; the same architecture for every image size."""
    return _with_head(ResNetBody(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), in_channels), num_classes)


def resnet20(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-20: basic blocks 3-3-3, widths 16-32-64, projection shortcuts (option B)."""
    return _with_head(kaiming_fan_out_(ResNetBody(BasicBlock, (3, 3, 3), (16, 32, 64), in_channels)), num_classes)


def resnet8(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-8: basic blocks 1-1-1, widths 16-32-64, projection shortcuts (option B)."""
    return _with_head(kaiming_fan_out_(ResNetBody(BasicBlock, (1, 1, 1), (16, 32, 64), in_channels)), num_classes)


class WideBlock(nn.Module):
    """Pre-activation block: BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3, plus a shortcut, without dropout.

    If the widths differ, the shortcut is a 1x1 convolution of the activated input, without normalization. Otherwise,
    it is the raw input.
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
    """Stem with 16 channels, three groups of blocks with strides 1, 2, 2, BN-ReLU, and global average pooling.

    Args:
        depth: Number of layers, 6 k + 4 for k blocks per group.
        widen: Factor that multiplies the widths 16, 32, 64.
        in_channels: Channels of the images; the stem has padding 3 for one channel.
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
        # 32x32 images give 8x8 maps, as in the paper; adaptive pooling handles any other size.
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def build_wideresnet(num_classes: int, in_channels: int, depth: int = 28, widen: int = 10) -> Network:
    """Build a wide residual network of any depth and width; the head's bias is initialized to 0."""
    body = WideResNetBody(depth, widen, in_channels)
    head = nn.Linear(body.out_features, num_classes)
    nn.init.zeros_(head.bias)
    return Network(body, head)


def wideresnet(num_classes: int, in_channels: int, image_size: int) -> Network:
    """WRN-28-10: four blocks per group, widths 160, 320, 640; the same architecture for every image size."""
    return build_wideresnet(num_classes, in_channels)


def frn_unit(in_channels: int, width: int, kernel: int, stride: int, *, activate: bool) -> nn.Sequential:
    """SAME convolution with bias, filter response normalization, and ReLU if ``activate`` is set."""
    norm = [FilterResponseNorm(width)]
    return nn.Sequential(*same_conv(in_channels, width, kernel, stride), *norm, *([nn.ReLU()] if activate else []))


class FRNBlock(nn.Module):
    """Two 3x3 units and a shortcut, with ReLU after the first unit and after the sum.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output.
        stride: Stride of the first unit and of the shortcut. The shortcut is a 1x1 unit if the shape changes,
            otherwise the identity.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.unit1 = frn_unit(in_channels, width, 3, stride, activate=True)
        self.unit2 = frn_unit(width, width, 3, 1, activate=False)
        changes = stride != 1 or in_channels != width
        self.unit3 = frn_unit(in_channels, width, 1, stride, activate=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, width, ceil(h / stride), ceil(w / stride))``."""
        shortcut = x if self.unit3 is None else self.unit3(x)
        return F.relu(self.unit2(self.unit1(x)) + shortcut)


def build_resnet_frn(num_classes: int, in_channels: int, depths: Sequence[int], widths: Sequence[int]) -> Network:
    """Build a ResNet with filter response normalization, of any depth and width.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depths: Number of blocks per stack. The first block of every stack except the first has stride 2.
        widths: Width of each stack; the stem has the first width.
    """
    body = nn.Sequential(frn_unit(in_channels, widths[0], 3, 1, activate=True))
    channels = widths[0]
    for k, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        strides = [2 if k else 1, *[1] * (depth - 1)]
        stack = nn.Sequential()
        for stride in strides:
            stack.append(FRNBlock(channels, width, stride))
            channels = width
        body.append(stack)
    body.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    return Network(body, nn.Linear(channels, num_classes))


def resnet20_frn(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ResNet-20 with FRN: blocks 3-3-3, widths 16-32-64.

    The architecture is the same for every image size: global average pooling takes 8x8 maps for 32x32 images, and
    maps of other sizes otherwise. Images must have at least 5x5 pixels.
    """
    return build_resnet_frn(num_classes, in_channels, (3, 3, 3), (16, 32, 64))
