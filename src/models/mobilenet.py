"""MobileNetV3, small and large.

Source: Howard et al. 2019, "Searching for MobileNetV3". The block configurations are torchvision's. Changes: batch
normalization uses PyTorch's defaults (eps 1e-5, momentum 0.1); in expanded blocks, squeeze-and-excitation comes
before the second activation; the stem has padding 3 for one channel; no operation is in-place. The strides are the
ImageNet ones, so 32x32 images shrink to 1x1 before the head, and batch normalization then needs at least two images
in training.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from src._torchvision import torchvision
from src.models.base import Network, kaiming_fan_out_, make_out_of_place, stem_padding


class InvertedResidual(nn.Module):
    """Expansion (1x1), depthwise convolution, squeeze-and-excitation, projection (1x1), and a shortcut.

    Args:
        config: torchvision's configuration of the block.
        norm_layer: Builds a normalization layer for a number of channels.
    """

    def __init__(
        self, config: torchvision.models.mobilenetv3.InvertedResidualConfig, norm_layer: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        wide = config.expanded_channels
        activation = nn.Hardswish if config.use_hs else nn.ReLU
        unit = partial(torchvision.ops.Conv2dNormActivation, norm_layer=norm_layer, activation_layer=None)
        expanded = wide != config.input_channels
        expansion = [unit(config.input_channels, wide, kernel_size=1), activation()] if expanded else []
        depthwise = unit(wide, wide, kernel_size=config.kernel, stride=config.stride, groups=wide)
        squeezed = config.adjust_channels(wide // 4, 1.0)
        excite = partial(torchvision.ops.SqueezeExcitation, scale_activation=nn.Hardsigmoid)
        excitation = [excite(wide, squeezed)] if config.use_se else []
        middle = [*excitation, activation()] if expanded else [activation(), *excitation]
        projection = unit(wide, config.out_channels, kernel_size=1)
        self.block = nn.Sequential(*expansion, depthwise, *middle, projection)
        self.shortcut = config.stride == 1 and config.input_channels == config.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, input_channels, h, w)`` to ``(n, out_channels, h / stride, w / stride)``."""
        out = self.block(x)
        return out + x if self.shortcut else out


def _network(factory: Callable[..., torchvision.models.MobileNetV3], num_classes: int, in_channels: int) -> Network:
    body = factory(num_classes=num_classes, block=InvertedResidual, norm_layer=nn.BatchNorm2d)
    stem = body.features[0]
    padding = stem_padding(in_channels)
    stem[0] = nn.Conv2d(in_channels, stem[0].out_channels, 3, stride=2, padding=padding, bias=False)
    kaiming_fan_out_(stem)
    head = body.classifier[-1]
    body.classifier[-1] = nn.Identity()
    return Network(make_out_of_place(body), head)


def mobile_small(num_classes: int, in_channels: int, image_size: int) -> Network:
    """MobileNetV3-small: 11 blocks, 576 channels, 1024 hidden units; the same architecture for every image size."""
    return _network(torchvision.models.mobilenet_v3_small, num_classes, in_channels)


def mobile_large(num_classes: int, in_channels: int, image_size: int) -> Network:
    """MobileNetV3-large: 15 blocks, 960 channels, 1280 hidden units; the same architecture for every image size."""
    return _network(torchvision.models.mobilenet_v3_large, num_classes, in_channels)
