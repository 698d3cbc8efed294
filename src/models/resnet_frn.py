"""ResNet-20 with filter response normalization, as in the Memory-Perturbation Equation's experiments.

Sources: He et al. 2016, "Deep residual learning for image recognition"; Singh and Krishnan 2020, "Filter response
normalization layer: eliminating batch dependence in the training of deep neural networks", equations 1 to 3. It
differs from ``resnet20`` in more than the normalization: convolutions have biases, SAME padding (at stride 2 an even
map gets its zeros at the bottom and the right only) and PyTorch's initial weights. No operation mixes examples.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from src.models.network import Network
from src.models.same_padding import same_conv


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

    def extra_repr(self) -> str:
        """What a printed network says of this layer."""
        return f"{self.tau.shape[1]}"


def frn_unit(in_channels: int, width: int, kernel: int, stride: int, *, activate: bool) -> nn.Sequential:
    """SAME convolution with bias, filter response normalisation and, if ``activate``, ReLU."""
    norm = [FilterResponseNorm(width)]
    return nn.Sequential(*same_conv(in_channels, width, kernel, stride), *norm, *([nn.ReLU()] if activate else []))


class FRNBlock(nn.Module):
    """Two 3x3 units and a shortcut; ReLU after the first unit and after the sum.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output.
        stride: Stride of the first unit and of the shortcut, which is a 1x1 unit where the shape changes, else the
            identity.
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
    """A network of any depth and width.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depths: Blocks of each stack. The first block of every stack but the first has stride 2.
        widths: Width of each stack; the stem has the first.
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

    The same network for every image size: the average over positions takes 8x8 maps at 32x32 and whatever is left
    at another size. Images need 5 pixels.
    """
    return build_resnet_frn(num_classes, in_channels, (3, 3, 3), (16, 32, 64))
