"""TensorFlow's SAME padding, for networks whose published results were made with it.

Along an axis of ``size`` positions a layer of this kernel and stride has ``ceil(size / stride)`` outputs. What their
windows need beyond the axis is filled with zeros, half of it (rounded down) before and the rest after. PyTorch's own
padding is the same on both sides, so it cannot say this wherever that number is odd.
"""

import torch
from torch import nn
from torch.nn import functional as F


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis.

    Args:
        size: Positions along the axis.
        kernel: Width of the layer's window.
        stride: Step between windows.

    Returns:
        How many zeros stand before the first position, and how many after the last.
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

    def extra_repr(self) -> str:
        """What a printed network says of this layer."""
        return f"kernel={self.kernel}, stride={self.stride}"


def same_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with bias under SAME padding: one layer where PyTorch's own padding can do it, else two."""
    # An odd kernel of stride 1 needs (kernel - 1) / 2 on either side at every size; one of 1x1 needs nothing.
    if kernel % 2 and (stride == 1 or kernel == 1):
        return [nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)]
    return [SamePad(kernel, stride), nn.Conv2d(in_channels, out_channels, kernel, stride)]


def same_max_pool() -> list[nn.Module]:
    """Maximum over 3x3 windows of stride 2 under SAME padding; the zeros take part, which is harmless after ReLU."""
    return [SamePad(3, 2), nn.MaxPool2d(3, 2)]
