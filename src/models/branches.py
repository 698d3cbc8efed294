"""What Inception networks are made of: units of convolution, normalisation and ReLU, and branches side by side."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        **options: Further arguments of ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **options)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, out_channels, h', w')``."""
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.ModuleList):
    """Modules that all read the same input; their outputs are concatenated over channels, in order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, c, h, w)`` to the concatenated outputs ``(n, sum of channels, h', w')``."""
        return torch.cat([branch(x) for branch in self], dim=1)


def same(in_channels: int, out_channels: int, height: int, width: int | None = None) -> ConvUnit:
    """A unit of stride 1 that keeps the size of its input; the kernel is square unless ``width`` is given."""
    kernel = (height, height if width is None else width)
    padding = (kernel[0] // 2, kernel[1] // 2)
    return ConvUnit(in_channels, out_channels, kernel_size=kernel, padding=padding)


def halve(in_channels: int, out_channels: int) -> ConvUnit:
    """A 3x3 unit of stride 2 without padding."""
    return ConvUnit(in_channels, out_channels, kernel_size=3, stride=2)
