"""Gradients of all classes in one pass: models that cannot be vectorized, and FRN's short backward pass."""

import pytest
import torch
from full_jacobians import covariances, loop_jacobians, random_posterior
from torch import nn
from torch.utils.checkpoint import checkpoint

from src.jacobians import OutputVariances, Posterior
from src.models.base import FilterResponseNorm

EXACT = {"rtol": 1e-10, "atol": 1e-13}


class _Cube(torch.autograd.Function):
    """A function without a `torch.func` rule, whose backward pass depends on values."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g if g.abs().sum().item() > 0 else torch.zeros_like(x)


class Cube(nn.Module):
    def forward(self, x):
        return _Cube.apply(x)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def built(middle):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = (
            nn.Sequential(nn.Conv2d(2, 3, 3), FilterResponseNorm(3), middle, nn.Flatten(), nn.Linear(48, 4))
            .double()
            .eval()
        )
        for p in net.parameters():
            nn.init.normal_(p, std=0.5)
        images = torch.randn(3, 2, 6, 6, dtype=torch.float64)
        posterior = Posterior(random_posterior(net, rotated=False))
    return net, images, posterior


@pytest.mark.parametrize("middle", [Cube, nn.Tanh], ids=["row by row", "in one pass"])
def test_networks_of_both_ways_are_exact(middle):
    net, images, posterior = built(middle())
    expected = covariances(loop_jacobians(net, images), posterior)
    with OutputVariances(net, posterior, full=True, memory_mb=1e-6) as engine:  # more than one cut
        found = engine(images)[1]
        assert engine._capture._vectorizes is (middle is nn.Tanh)
        torch.testing.assert_close(engine(images)[1], found, **EXACT)
        assert set(engine.routes.values()) == {"captured"}
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.ReLU(inplace=True),  # applied to the normalization's output
        lambda: Checkpointed(nn.Tanh(), FilterResponseNorm(3), nn.Conv2d(3, 3, 1)),
        lambda: nn.Sequential(*[FilterResponseNorm(3)] * 2),  # one normalization, two calls
    ],
    ids=["in place", "checkpointed", "called twice"],
)
def test_filter_response_norm_in_any_place(middle):
    net, images, posterior = built(middle())
    net[1].gamma.data[0, 0] = 0.0
    expected = covariances(loop_jacobians(net, images), posterior)
    with OutputVariances(net, posterior, full=True) as engine:
        found = engine(images)[1]
        assert "fallback" not in engine.routes.values()
    torch.testing.assert_close(found, expected, **EXACT)


def test_filter_response_norm_whose_input_needs_no_gradient_and_a_frozen_one():
    net, images, _ = built(nn.Tanh())
    for p in (*net[0].parameters(), net[1].beta):
        p.requires_grad_(False)
    posterior = Posterior(random_posterior(net, rotated=False))
    posterior = Posterior({n: b for n, b in posterior.blocks.items() if net.get_parameter(n).requires_grad})
    expected = covariances(loop_jacobians(net, images), posterior)
    with OutputVariances(net, posterior, full=True) as engine:
        torch.testing.assert_close(engine(images)[1], expected, **EXACT)
    assert all(p.grad is None for p in net.parameters())
