"""Filter response normalisation, with the thresholded linear unit.

Source: Singh and Krishnan 2020, "Filter response normalization layer: eliminating batch dependence in the training
of deep neural networks", equations 1 to 3.
"""

import torch
from torch import nn


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
