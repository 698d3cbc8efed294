"""The Memory-Perturbation Equation's convolutional networks: counts, order, initial weights, explicit slow twins."""

import pytest
import torch
from slow_layers import slow_conv, slow_norm, slow_pool, slow_valid_conv
from torch import nn
from torch.nn import functional as F

from src.errors import FlagError
from src.models import build_model
from src.models.layers import FilterResponseNorm
from src.models.resnet import FRNBlock, build_resnet_frn


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
    for module, twin in zip(layers, fresh, strict=True):
        assert torch.equal(twin.weight, module.weight)
        assert torch.equal(twin.bias, module.bias)


@pytest.mark.parametrize(("name", "value"), [("cnn_deepobs", 0.0202136096), ("resnet20_frn", 0.0991624519)])
def test_first_weight_of_seed_1_is_the_published_one(name, value):
    torch.manual_seed(3)
    weight = next(build_model(name, 10, 3, 32, seed=1).parameters())
    assert weight.flatten()[0].item() == pytest.approx(value, abs=1e-9)


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
    with pytest.raises(FlagError, match=r"^model resnet20_frn: .*5x5[^\n]*$"):
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
