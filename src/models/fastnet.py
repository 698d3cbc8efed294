"""fastnet: a small, wide residual network for good accuracy per second on small images.

Follows the fast networks of the CIFAR speed records: Page 2019, "How to train your ResNet" (the nine-layer residual
network, and the scale of its logits), and Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"
(arXiv:2404.00498; a strided stem). The stem halves the resolution of the first feature map, which takes most of the
time in both.
"""

import torch
from torch import nn

from src.models.base import Network, kaiming_fan_out_

WIDTHS = (64, 128, 256)
LOGIT_SCALE = 0.125


def _unit(in_channels: int, width: int, kernel: int = 3, stride: int = 1, *, pool: bool = False) -> nn.Sequential:
    """Convolution, optional 2x2 max-pooling, batch normalization, ReLU."""
    convolution = nn.Conv2d(in_channels, width, kernel, stride, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(convolution, *pooling, nn.BatchNorm2d(width), nn.ReLU())


class _Residual(nn.Module):
    """Two 3x3 units with an identity shortcut around both, activations included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.units = nn.Sequential(_unit(width, width), _unit(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, width, h, w)`` to the same shape."""
        return x + self.units(x)


class _Scale(nn.Module):
    """Multiply by a constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``x``."""
        return LOGIT_SCALE * x


def fastnet(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Stem 4x4 with stride 2, then twice a pooled 3x3 unit and a residual block, global max-pooling.

    The widths are 64, 128, and 256. The embedding is scaled by 0.125, which keeps the first logits small. Feature
    maps of 32x32 images have 16, 8, and 4 pixels. Images must have at least 8x8 pixels.
    """
    stem, middle, last = WIDTHS
    body = nn.Sequential(
        _unit(in_channels, stem, kernel=4, stride=2),
        _unit(stem, middle, pool=True),
        _Residual(middle),
        _unit(middle, last, pool=True),
        _Residual(last),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        _Scale(),
    )
    return Network(kaiming_fan_out_(body), nn.Linear(last, num_classes))
