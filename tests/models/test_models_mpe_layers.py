"""SAME padding and filter response normalisation against slow twins, closed forms and published values."""

import pytest
import torch
from slow_layers import slow_conv, slow_norm, slow_pool
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from src.models.layers import FilterResponseNorm, SamePad, same_conv, same_max_pool, same_padding


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (28, 3, 2, (0, 1)),
        (12, 3, 2, (0, 1)),
        (6, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (1, 3, 2, (1, 1)),
        (32, 3, 1, (1, 1)),
        (5, 4, 1, (1, 2)),
        (6, 1, 2, (0, 0)),
        (7, 1, 2, (0, 0)),
        (7, 2, 3, (0, 1)),
        (9, 2, 4, (0, 1)),
        (8, 2, 5, (0, 0)),
    ],
)
def test_same_padding_of_an_axis(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_same_convolutions_of_stride_1_are_torchs(kernel, images, spread):
    x = images(2, 6)
    weight = spread(3, 2, kernel, kernel)
    found = F.conv2d(SamePad(kernel, 1)(x), weight)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding="same"))


@pytest.mark.parametrize("shape", [(2, 2, 6, 6), (2, 2, 7, 7), (1, 2, 5, 8), (1, 2, 1, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_same_conv_is_the_slow_one(shape, stride, kernel, fill, spread):
    layers, x = fill(nn.Sequential(*same_conv(2, 4, kernel, stride))), 3 * spread(*shape)
    found = layers(x)
    assert found.shape[2:] == tuple(-(-size // stride) for size in shape[2:])
    torch.testing.assert_close(found, slow_conv(x, layers[-1].weight, layers[-1].bias, stride))


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7])
def test_same_max_pool_is_the_slow_one_and_zeros_take_part(size, images):
    pool, x = nn.Sequential(*same_max_pool()), images(2, size)
    torch.testing.assert_close(pool(x), slow_pool(x))
    assert pool(-x.abs() - 1)[..., -1, -1].eq(0).all()  # the last window always reaches beyond the map


def random_norm(channels, spread):
    norm = FilterResponseNorm(channels).double()
    with torch.no_grad():
        for k, parameter in enumerate(norm.parameters()):
            parameter.copy_(spread(*parameter.shape, start=9 * k + 2))
    return norm


def test_norm_is_the_formula(images, spread):
    norm, x = random_norm(5, spread), images(5, 4, 3)
    torch.testing.assert_close(norm(x), slow_norm(x, *norm.parameters()), rtol=1e-12, atol=1e-12)
    assert torch.equal(norm(x), norm.eval()(x))
    # the rows that follow change nothing
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]), rtol=1e-12, atol=1e-12)


def test_norm_starts_as_published():
    norm = FilterResponseNorm(3)
    assert [name for name, _ in norm.named_parameters()] == ["tau", "beta", "gamma"]
    assert {tuple(p.shape) for p in norm.parameters()} == {(1, 3, 1, 1)}
    assert not norm.tau.any()
    assert not norm.beta.any()
    assert norm.gamma.eq(1).all()
    assert norm.eps == 1e-6


def test_norm_gradients_are_the_closed_forms(images, spread):
    norm, x = random_norm(2, spread), images(2, 4)
    with torch.no_grad():
        norm.tau[0, 0] = norm.beta[0, 0]  # at x = 0 both sides of the maximum are equal, and share the gradient
        x[0, 0, 1, 1:3] = 0
    g = spread(*x.shape, start=5)
    (norm(x) * g).sum().backward()
    scaled = x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()
    y = norm.gamma * scaled + norm.beta
    mask = (y > norm.tau).double() + 0.5 * (y == norm.tau)
    assert (mask == 0.5).sum() == 2
    for parameter, expected in ((norm.tau, g * (1 - mask)), (norm.beta, g * mask), (norm.gamma, g * mask * scaled)):
        torch.testing.assert_close(parameter.grad, expected.sum((0, 2, 3)).reshape(1, 2, 1, 1))


def test_norm_has_exact_gradients(spread):
    norm = random_norm(2, spread)
    x = (3 * spread(2, 2, 3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *norm.parameters()))


def test_norm_of_an_empty_map_is_finite():
    norm, x = FilterResponseNorm(1), torch.zeros(2, 1, 3, 3, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()


def test_norm_forgets_the_scale_of_a_map(images, spread):
    norm, x = random_norm(2, spread), images(2, 4)
    torch.testing.assert_close(norm(1000 * x), norm(x), rtol=1e-4, atol=1e-4)


def test_variances_through_the_norm_are_the_published_ones():
    """Predictive variances of a diagonal posterior, from whole Jacobians, on a network of 43 weights."""
    network = nn.Sequential(nn.Conv2d(1, 2, 2), FilterResponseNorm(2), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        first = 1
        for p in network.parameters():
            p.copy_((torch.arange(first, first + p.numel(), dtype=torch.float64).sin() / 2).reshape(p.shape))
            first += p.numel()
    assert first == 44
    x = torch.stack([(10 * n + torch.arange(9, dtype=torch.float64)).cos() for n in range(3)]).reshape(3, 1, 3, 3)
    parameters = dict(network.named_parameters())
    jacobians = jacrev(lambda weights: functional_call(network, weights, x))(parameters)
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], 2)  # (n, classes, weights)
    p = network(x).softmax(1)
    curvature = torch.einsum("nc,ncw->w", p, jacobian**2) - torch.einsum("nc,ncw->nw", p, jacobian).square().sum(0)
    assert curvature.sum().item() == pytest.approx(12.52429132, abs=1e-8)
    variances = torch.einsum("ncw,w->nc", jacobian**2, 1 / (curvature + 2))
    published = [
        [1.97389964, 2.12027746, 1.95813934],
        [2.03423119, 2.34141053, 2.09097441],
        [1.87365235, 2.08184765, 1.83987661],
    ]
    torch.testing.assert_close(variances, torch.tensor(published, dtype=torch.float64), rtol=0, atol=1e-8)
