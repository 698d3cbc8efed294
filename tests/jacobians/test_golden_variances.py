"""Curvature, variances and covariances of four tiny models agree with independently computed numbers."""

import pytest
import torch
from torch import nn

from src.jacobians import OutputVariances, ggn_diagonal, kronecker_factors
from src.models.base import FilterResponseNorm

DELTA = 2.0
DIGITS = {"rtol": 0.0, "atol": 1.1e-8}


def linear():
    return nn.Linear(2, 3), (2,)


def perceptron():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), (2,)


def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), (1, 3, 3)


def filter_response():
    return nn.Sequential(nn.Conv2d(1, 2, 2), FilterResponseNorm(2), nn.Flatten(), nn.Linear(8, 3)), (1, 3, 3)


def prepared(build):
    """Entry k of all parameters, counted from 1, is sin(k)/2; entry j of image n is cos(10 n + j)."""
    net, shape = build()
    net = net.double()
    first = 1
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(first, first + p.numel(), dtype=torch.float64).sin().view_as(p) / 2)
            first += p.numel()
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return net, torch.stack([(10 * n + places).cos().view(shape) for n in range(3)])


def covariance(net, images, posterior):
    with OutputVariances(net, posterior, full=True) as engine:
        return engine(images)


GOLDEN = {
    linear: (
        3.36729214,
        (0.93371935, 0.92377936, 0.96097952, 0.67376002, 0.66432933, 0.69424137, 0.59071009, 0.58185596, 0.60665207),
        (0.94440910, 0.93032226, 0.96149064, 0.69327269, 0.68237357, 0.70648884, 0.61150340, 0.60321107, 0.62155858),
    ),
    perceptron: (
        4.26553356,
        (1.05792381, 1.02380988, 1.06216513, 0.84191122, 0.78058183, 0.79094842, 0.77694323, 0.73050225, 0.75940907),
        (1.02951153, 0.99659992, 1.03389158, 0.82437655, 0.77034105, 0.77949662, 0.76411972, 0.72414897, 0.75170218),
    ),
    convolution: (
        9.06386386,
        (2.56099185, 2.17993240, 2.50410539, 2.13150578, 1.96690646, 2.10349614, 2.24729439, 2.24492410, 2.24476857),
        (2.25187467, 1.99679537, 2.23773051, 1.94337704, 1.79921248, 1.92330092, 2.07318724, 1.96969374, 2.06273597),
    ),
    filter_response: (
        12.52429132,
        (1.97389964, 2.12027746, 1.95813934, 2.03423119, 2.34141053, 2.09097441, 1.87365235, 2.08184765, 1.83987661),
        None,
    ),
}


@pytest.mark.parametrize("build", GOLDEN, ids=lambda build: build.__name__)
def test_golden_values(build):
    net, images = prepared(build)
    total, diagonal, kronecker = GOLDEN[build]
    curvature = ggn_diagonal(net, images.split(2))
    assert sum(d.sum().item() for d in curvature.diagonals.values()) == pytest.approx(total, abs=1.1e-8)
    found = covariance(net, images, curvature.posterior(DELTA))[1].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.tensor(diagonal, dtype=torch.float64).view(3, 3), **DIGITS)
    if kronecker is not None:
        curvature = kronecker_factors(net, images.split(2))
        assert curvature.diagonals == {}
        found = covariance(net, images, curvature.posterior(DELTA))[1].diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(found, torch.tensor(kronecker, dtype=torch.float64).view(3, 3), **DIGITS)


def test_covariances_of_the_linear_network():
    net, images = prepared(linear)
    posterior = kronecker_factors(net, images.split(2)).posterior(DELTA)
    logits, found = covariance(net, images, posterior)
    torch.testing.assert_close(
        logits[0], torch.tensor([0.99487654, 0.36078806, -0.34888731], dtype=torch.float64), **DIGITS
    )
    off_diagonal = torch.stack([found[0, 0, 1], found[0, 0, 2], found[0, 1, 2]])
    expected = torch.tensor([0.11636129, 0.08519290, 0.09927974], dtype=torch.float64)
    torch.testing.assert_close(off_diagonal, expected, **DIGITS)
    # the curvature is zero along a shift of all logits, so that direction keeps the prior's variance
    gauge = (images[0].square().sum() + 1.0) / DELTA
    assert gauge.item() == pytest.approx(1.14596329, abs=1e-8)
    torch.testing.assert_close(found[0].sum(1), gauge.expand(3), rtol=1e-12, atol=0.0)
