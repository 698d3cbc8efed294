"""Small problems shared by the tests in this folder."""

import torch
from torch import nn

from mpe.posterior import Predictions
from src.jacobians import OutputVariances, ggn_diagonal


def network(dtype=torch.float64, seed=0):
    """A small convolutional model for images (2, 6, 6) and four classes, with weights that depend on ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4)
        )
    return net.to(dtype)


def examples(n=7, dtype=torch.float64, seed=1):
    """Images (n, 2, 6, 6) and labels (n,)."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 2, 6, 6, generator=draw, dtype=torch.float64).to(dtype)
    return images, torch.randint(4, (n,), generator=draw)


def batches(images, labels, size=3):
    """Batches of at most ``size`` examples; the last one is smaller."""
    return list(zip(images.split(size), labels.split(size), strict=True))


def random_predictions(n=6, c=4, scale=0.3, seed=2, full=True):
    """Predictions with random positive definite covariances of size ``scale``."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=draw, dtype=torch.float64)
    root = torch.randn(n, c, c, generator=draw, dtype=torch.float64)
    variances = scale * root @ root.mT / c
    labels = torch.randint(c, (n,), generator=draw)
    variances = variances if full else variances.diagonal(dim1=1, dim2=2).clone()
    return Predictions(torch.arange(n), labels, logits, variances)


def diagonal_variances(net, images, labels, delta, full=False):
    """This project's engine: logits and variances under the diagonal Laplace posterior."""
    posterior = ggn_diagonal(net, batches(images, labels)).posterior(delta)
    with OutputVariances(net, posterior, full=full) as engine:
        return engine(images)
