"""Models of the Memory-Perturbation Equation compared with slow layers, closed forms and published values."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from src.errors import ArgumentError
from src.models import build_model
from src.models.base import FilterResponseNorm, SamePad, same_conv, same_max_pool, same_padding
from src.models.resnet import FRNBlock, build_resnet_frn


def windows(x, kernel, stride):
    """All windows of TensorFlow's SAME padding, sliced one by one: (n, c, kernel, kernel, rows, columns)."""
    n, c, *size = x.shape
    out = [(s + stride - 1) // stride for s in size]
    before = [max((o - 1) * stride + kernel - s, 0) // 2 for o, s in zip(out, size, strict=True)]
    found = x.new_zeros(n, c, kernel, kernel, *out)
    for row in range(out[0]):
        for column in range(out[1]):
            for i in range(kernel):
                for j in range(kernel):
                    y, z = row * stride - before[0] + i, column * stride - before[1] + j
                    if 0 <= y < size[0] and 0 <= z < size[1]:
                        found[:, :, i, j, row, column] = x[:, :, y, z]
    return found


def slow_conv(x, weight, bias, stride=1):
    cut = windows(x, weight.shape[-1], stride)
    return torch.einsum("ncijrs,ocij->nors", cut, weight) + bias[:, None, None]


def slow_valid_conv(x, weight, bias):
    kernel = weight.shape[-1]
    side = x.shape[-1] - kernel + 1
    columns = F.unfold(x, kernel)  # (n, c * kernel^2, positions)
    return (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, (side, side))


def slow_pool(x):
    return windows(x, 3, 2).amax((2, 3))


def slow_norm(x, tau, beta, gamma):
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            scaled = x[n, c] / ((x[n, c] ** 2).sum() / x[n, c].numel() + 1e-6) ** 0.5
            out[n, c] = (gamma[0, c] * scaled + beta[0, c]).clamp(min=tau[0, c].item())
    return out


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
    assert pool(-x.abs() - 1)[..., -1, -1].eq(0).all()  # the last window always extends beyond the feature map


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
    # later rows have no effect
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
        norm.tau[0, 0] = norm.beta[0, 0]  # at x = 0, both arguments of the maximum are equal and share the gradient
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
    """Predictive variances of a diagonal posterior, from full Jacobians, for a model with 43 weights."""
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


def test_layers_of_cnn_deepobs_are_the_published_ones():
    network = build_model("cnn_deepobs", 10, 3, 32, seed=0)
    sizes = [p.numel() for p in network.parameters()]
    assert len(sizes) == 12
    assert [sum(sizes[k : k + 2]) for k in range(0, 12, 2)] == [4864, 55392, 110720, 590336, 131328, 2570]


def maps_of(network, channels, size):
    """Shapes after every convolution and pool, without running them."""
    shapes, handles = [], []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | FRNBlock):
            handles.append(module.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:3]))))
    network(torch.empty(1, channels, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return shapes


@pytest.mark.parametrize(
    ("size", "sides"), [(32, (28, 14, 12, 6, 6, 3)), (28, (24, 12, 10, 5, 5, 3)), (8, (21, 11, 9, 5, 5, 3))]
)
def test_maps_of_cnn_deepobs(size, sides):
    with torch.device("meta"):
        network = build_model("cnn_deepobs", 10, 1, size, seed=0)
    assert maps_of(network, 1, size) == list(zip((64, 64, 96, 96, 128, 128), sides, strict=True))


@pytest.mark.parametrize("size", [1, 8, 24, 25, 28, 31, 33, 64])
def test_cnn_deepobs_has_the_same_parameters_at_every_size(size):
    with torch.device("meta"):
        network = build_model("cnn_deepobs", 10, 3, size, seed=0)
    assert sum(p.numel() for p in network.parameters()) == 895210
    assert (maps_of(network, 3, size)[-1] == (128, 3)) == (size <= 32)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 24), (3, 25), (3, 28), (3, 32)])
def test_cnn_deepobs(channels, size, fill, images):
    network, x = fill(build_model("cnn_deepobs", 5, channels, size, seed=0)), images(channels, size, 1)
    weights, h = list(network.parameters()), x
    if size < 25:
        before = (25 - size) // 2
        h = torch.zeros(1, channels, 25, 25, dtype=x.dtype)
        h[:, :, before : before + size, before : before + size] = x
    h = slow_pool(slow_valid_conv(h, *weights[0:2]).clamp(min=0))
    h = slow_pool(slow_valid_conv(h, *weights[2:4]).clamp(min=0))
    h = slow_pool(slow_conv(h, *weights[4:6]).clamp(min=0)).reshape(1, -1)
    h = (h @ weights[6].T + weights[7]).clamp(min=0)
    h = (h @ weights[8].T + weights[9]).clamp(min=0)
    torch.testing.assert_close(network.features(x), h)
    torch.testing.assert_close(network(x), h @ weights[10].T + weights[11])


def test_larger_maps_of_cnn_deepobs_are_averaged(fill, images):
    network, x = fill(build_model("cnn_deepobs", 5, 1, 48, seed=0)), images(1, 48, 1)
    flatten = next(k for k, layer in enumerate(network.body) if isinstance(layer, nn.Flatten))
    maps = network.body[: flatten - 1](x)
    assert maps.shape == (1, 128, 5, 5)
    averaged = torch.empty(1, 128, 3, 3, dtype=x.dtype)
    for row, (top, bottom) in enumerate([(0, 2), (1, 4), (3, 5)]):
        for column, (left, right) in enumerate([(0, 2), (1, 4), (3, 5)]):
            averaged[:, :, row, column] = maps[:, :, top:bottom, left:right].mean((2, 3))
    torch.testing.assert_close(network.features(x), network.body[flatten:](averaged))


def test_cnn_deepobs_starts_from_xavier_after_torchs_own_draws():
    network = build_model("cnn_deepobs", 10, 3, 32, seed=4)
    torch.manual_seed(4)
    shapes = [(3, 64, 5), (64, 96, 3), (96, 128, 3)], [(1152, 512), (512, 256), (256, 10)]
    layers = [nn.Conv2d(*shape) for shape in shapes[0]] + [nn.Linear(*shape) for shape in shapes[1]]
    for layer, weight, bias in zip(layers, *[list(network.parameters())[k::2] for k in (0, 1)], strict=True):
        draw = nn.init.xavier_normal_ if isinstance(layer, nn.Conv2d) else nn.init.xavier_uniform_
        assert torch.equal(draw(layer.weight), weight)
        assert not bias.any()


def units_of_resnet20():
    """(in, out, kernel) of the 21 units in the order of their parameters."""
    units = [(3, 16, 3)]
    for narrow, wide in ((16, 16), (16, 32), (32, 64)):
        units += [(narrow, wide, 3), (wide, wide, 3)] + ([(narrow, wide, 1)] if narrow != wide else [])
        units += [(wide, wide, 3)] * 4
    return units


def test_resnet20_frn_starts_from_torchs_own_draws():
    network = build_model("resnet20_frn", 10, 3, 32, seed=4)
    torch.manual_seed(4)
    fresh = [nn.Conv2d(*unit) for unit in units_of_resnet20()] + [nn.Linear(64, 10)]
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module, reference in zip(layers, fresh, strict=True):
        assert torch.equal(reference.weight, module.weight)
        assert torch.equal(reference.bias, module.bias)


def test_parameters_of_resnet20_frn_are_the_published_ones_in_order():
    network = build_model("resnet20_frn", 10, 3, 32, seed=0)
    units = units_of_resnet20()
    assert len(units) == 21
    expected = []
    for narrow, wide, kernel in units:
        expected += [("weight", (wide, narrow, kernel, kernel)), ("bias", (wide,))]
        expected += [(name, (1, wide, 1, 1)) for name in ("tau", "beta", "gamma")]
    expected += [("weight", (10, 64)), ("bias", (10,))]
    found = [(name.rsplit(".", 1)[1], tuple(p.shape)) for name, p in network.named_parameters()]
    assert found == expected
    assert len(found) == 107
    count = dict.fromkeys((nn.Conv2d, FilterResponseNorm, nn.Linear), 0)
    for module in network.modules():
        if type(module) in count:
            count[type(module)] += sum(p.numel() for p in module.parameters())
    assert list(count.values()) == [271040, 2352, 650]
    assert not list(network.buffers())


@pytest.mark.parametrize("size", [32, 28])
def test_maps_of_resnet20_frn(size):
    with torch.device("meta"):
        network = build_model("resnet20_frn", 10, 3, size, seed=0)
        blocks = [module for module in network.modules() if isinstance(module, FRNBlock)]
        h, shapes = network.body[0](torch.empty(1, 3, size, size)), []
        for block in blocks:
            h = block(h)
            shapes.append(tuple(h.shape[1:3]))
    assert shapes == [(16, size)] * 3 + [(32, size // 2)] * 3 + [(64, size // 4)] * 3


def slow_resnet_frn(network, x, depths, widths):
    weights = list(network.parameters())

    def unit(h, stride=1, activate=True):
        weight, bias, *norm = [weights.pop(0) for _ in range(5)]
        h = slow_norm(slow_conv(h, weight, bias, stride), *norm)
        return h.clamp(min=0) if activate else h

    h = unit(x)
    for stack, depth in enumerate(depths):
        for block in range(depth):
            changes = block == 0 and stack > 0
            out = unit(unit(h, 2 if changes else 1), activate=False)
            h = (out + (unit(h, 2, activate=False) if changes else h)).clamp(min=0)
    assert h.shape[1] == widths[-1]
    weight, bias = weights
    return h.mean((2, 3)) @ weight.T + bias


@pytest.mark.parametrize(
    ("channels", "size", "depths", "widths"),
    [(3, 8, (2, 2), (3, 4)), (1, 7, (1, 1, 1), (2, 4, 5)), (3, 6, (1, 2), (4, 4))],
)
def test_resnet_frn(channels, size, depths, widths, fill, images):
    network, x = fill(build_resnet_frn(5, channels, depths, widths)), images(channels, size)
    torch.testing.assert_close(network(x), slow_resnet_frn(network, x, depths, widths))


def test_resnet20_frn_is_the_slow_one(fill, images):
    network, x = fill(build_model("resnet20_frn", 5, 1, 5, seed=0)), images(1, 5, 1)
    torch.testing.assert_close(network(x), slow_resnet_frn(network, x, (3, 3, 3), (16, 32, 64)))


def test_images_too_small_for_resnet20_frn_are_refused_in_one_line():
    with pytest.raises(ArgumentError, match=r"^model resnet20_frn: .*5x5[^\n]*$"):
        build_model("resnet20_frn", 10, 3, 4, seed=0)


@pytest.mark.parametrize("name", ["cnn_deepobs", "resnet20_frn"])
def test_gradients_flow_and_no_example_meets_another(name, images):
    network, x = build_model(name, 4, 3, 9, seed=0).double(), images(3, 9, 4)
    labels = torch.arange(4)
    F.cross_entropy(network(x), labels, reduction="sum").backward()
    together = {key: p.grad.clone() for key, p in network.named_parameters()}
    assert all(g.isfinite().all() for g in together.values())
    assert all(g.any() for key, g in together.items() if not key.endswith("tau"))
    assert any(g.any() for key, g in together.items() if key.endswith("tau")) == (name == "resnet20_frn")
    network.zero_grad()
    for k in range(4):
        F.cross_entropy(network(x[k : k + 1]), labels[k : k + 1]).backward()
    for key, p in network.named_parameters():
        torch.testing.assert_close(p.grad, together[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["cnn_deepobs", "resnet20_frn"])
def test_a_few_steps_learn(name):
    network = build_model(name, 3, 1, 8, seed=0)
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(6, 1, 8, 8, generator=draw), torch.arange(6) % 3
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=2e-3), []
    for _ in range(12):
        losses.append(F.cross_entropy(network(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
