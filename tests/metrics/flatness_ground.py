"""Shared by the tests of both flatness scores: batches of tensors, a small model, and a linear test vector."""

import torch
from torch import nn

from src.datasets import Batch


def batches(images, labels, size, indices=None):
    indices = torch.arange(len(labels)) if indices is None else indices
    for rows in torch.arange(len(labels)).split(size):
        yield Batch(images[rows], labels[rows], indices[rows], torch.ones(len(rows)))


def linear_model():
    """The model, image and label of the test vector."""
    net = nn.Linear(4, 3).double()
    with torch.no_grad():
        net.weight.copy_(0.1 * torch.arange(12.0).view(3, 4) - 0.5)
        net.bias.copy_(torch.tensor([0.1, 0.0, -0.1]))
    return net, torch.tensor([[0.5, -0.2, 0.1, 0.3]], dtype=torch.float64), torch.tensor([1])


def small_network(seed=0):
    """A convolution, BatchNorm with nontrivial statistics, in-place ReLU, dropout and LayerNorm, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, 3),
        ).double()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)
    return net


def examples(count=9, seed=3):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=draw, dtype=torch.float64)
    return images, torch.randint(3, (count,), generator=draw)
