"""Weights and images that are identical on every machine and in every version of torch."""

import pytest
import torch
from torch import nn


def spread(*shape: int, start: int = 0) -> torch.Tensor:
    """Float64 values in [-0.5, 0.5): fractional parts of squares times the golden ratio, which look random."""
    count = torch.Size(shape).numel()
    steps = torch.arange(start + 1, start + count + 1, dtype=torch.float64)
    return ((steps**2 * 0.6180339887498949) % 1 - 0.5).reshape(shape)


def fill(network: nn.Module) -> nn.Module:
    """Convert a model to float64 and eval mode, with fixed weights and BatchNorm statistics of unit scale."""
    network = network.to(torch.float64).eval()
    with torch.no_grad():
        for k, (name, tensor) in enumerate(network.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            values = spread(*tensor.shape, start=7 * k)
            if tensor.dim() > 1:
                tensor.copy_(values * (24 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("weight", "running_var")):
                tensor.copy_(1 + 0.8 * values)
            else:
                tensor.copy_(0.2 * values)
    return network


@pytest.fixture(name="spread")
def spread_fixture():
    return spread


@pytest.fixture(name="fill")
def fill_fixture():
    return fill


@pytest.fixture
def images():
    def make(channels: int, size: int, count: int = 2) -> torch.Tensor:
        return 3 * spread(count, channels, size, size)

    return make
