"""Layers and initial weights that several families share.

SAME padding is TensorFlow's, for models whose published results were made with it. Along an axis of ``size``
positions a layer of this kernel and stride has ``ceil(size / stride)`` outputs. What their windows need beyond the
axis is filled with zeros, half of it (rounded down) before and the rest after. PyTorch's own padding is the same on
both sides, so it cannot express this wherever that number is odd.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# From this size on, vgg19 and inception are torchvision's ImageNet models.
IMAGENET_SIZE = 224


def stem_padding(in_channels: int) -> int:
    """Padding of a first 3x3 convolution: 3 for one channel, which turns 28x28 into 32x32, else 1."""
    return 3 if in_channels == 1 else 1


def center_pad(image_size: int, target: int) -> nn.Module:
    """A layer that pads square images with zeros to ``target`` pixels, the odd row and column last."""
    missing = max(target - image_size, 0)
    before, after = missing // 2, missing - missing // 2
    return nn.ZeroPad2d((before, after, before, after)) if missing else nn.Identity()


def make_out_of_place(network: nn.Module) -> nn.Module:
    """Switch off ``inplace`` in every layer that has it, so that hooks see outputs that nobody overwrites."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return network


def kaiming_fan_out_(network: nn.Module) -> nn.Module:
    """Draw the weights of all convolutions from Kaiming's normal (fan out, ReLU) and zero their biases.

    Source: He et al. 2015, "Delving deep into rectifiers"; torchvision's choice for ResNet.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalization, ReLU.

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


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis.

    Args:
        size: Positions along the axis.
        kernel: Width of the layer's window.
        stride: Step between windows.

    Returns:
        How many zeros before the first position, and how many after the last.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SamePad(nn.Module):
    """Pads with zeros ahead of a layer that has this kernel and stride and no padding of its own.

    Args:
        kernel: Height and width of the layer's window.
        stride: The layer's stride.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad ``(n, c, h, w)``; the layer then gives ``ceil(h / stride)`` x ``ceil(w / stride)`` outputs."""
        top, bottom = same_padding(x.shape[-2], self.kernel, self.stride)
        left, right = same_padding(x.shape[-1], self.kernel, self.stride)
        return F.pad(x, (left, right, top, bottom))


def same_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with bias under SAME padding: one layer where PyTorch's own padding can do it, else two."""
    # An odd kernel of stride 1 needs (kernel - 1) / 2 on either side at every size; one of 1x1 needs nothing.
    if kernel % 2 and (stride == 1 or kernel == 1):
        return [nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)]
    return [SamePad(kernel, stride), nn.Conv2d(in_channels, out_channels, kernel, stride)]


def same_max_pool() -> list[nn.Module]:
    """Maximum over 3x3 windows of stride 2 under SAME padding; the zeros take part, which is harmless after ReLU."""
    return [SamePad(3, 2), nn.MaxPool2d(3, 2)]


class FilterResponseNorm(nn.Module):
    """Divides each map by its root mean square, then scales, shifts and thresholds it.

    With ``x`` the map of one example and channel: ``max(gamma * x / sqrt(mean(x^2) + eps) + beta, tau)``, the mean
    over positions. Examples do not meet, so training and evaluation are the same. Where both sides of the maximum
    are equal, each takes half of the gradient.

    Attributes:
        tau: Threshold ``(1, channels, 1, 1)``, from 0.
        beta: Shift ``(1, channels, 1, 1)``, from 0.
        gamma: Scale ``(1, channels, 1, 1)``, from 1.
        eps: 1e-6, not learned.
    """

    eps = 1e-6

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.tau = nn.Parameter(torch.zeros(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, channels, h, w)`` to the same shape."""
        scale = self.gamma * torch.rsqrt(
            x.square().mean(dim=(-2, -1), keepdim=True) + self.eps
        )  # (n, channels, 1, 1)
        return torch.maximum(x * scale + self.beta, self.tau)
