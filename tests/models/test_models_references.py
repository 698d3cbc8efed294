"""Each architecture compared with functional operations or with torchvision's model."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from src.models import build_model
from src.models.inception import block_a, block_b, block_c, block_d, block_e
from src.models.mobilenet import InvertedResidual
from src.models.resnet import build_wideresnet


class Reader:
    """Applies a model's layers functionally, in the order of its state dict."""

    def __init__(self, network):
        self.modules = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]

    def _next(self, kind, shape=None):
        module = self.modules.pop(0)
        assert isinstance(module, kind)
        assert shape is None or tuple(module.weight.shape) == shape
        return module

    def conv(self, x, padding=0, stride=1, shape=None):
        module = self._next(nn.Conv2d, shape)
        return F.conv2d(x, module.weight, module.bias, stride, padding)

    def norm(self, x):
        module = self._next(nn.BatchNorm2d)
        scale = module.weight / (module.running_var + 1e-5).sqrt()
        return (x - module.running_mean[:, None, None]) * scale[:, None, None] + module.bias[:, None, None]

    def linear(self, x):
        module = self._next(nn.Linear)
        return x @ module.weight.T + module.bias

    def unit(self, x, out, kernel, padding=0, stride=1):
        return F.relu(self.norm(self.conv(x, padding, stride, (out, x.shape[1], *kernel))))


def copy_state(source, target):
    """Copy weights and statistics in order, ignoring names."""
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    for ours, theirs in pairs:
        theirs.copy_(ours)
    return target.to(torch.float64).eval()


@pytest.mark.parametrize(
    ("name", "activation", "hidden"),
    [("mlp", F.relu, 2), ("small_mlp", torch.tanh, 2), ("large_mlp", torch.tanh, 2)],
)
def test_perceptrons(name, activation, hidden, fill, images):
    network, x = fill(build_model(name, 5, 1, 6, seed=0)), images(1, 6)
    read, h = Reader(network), x.reshape(2, -1)
    for _ in range(hidden):
        h = activation(read.linear(h))
    torch.testing.assert_close(network(x), read.linear(h))
    assert not read.modules


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 27), (1, 28), (3, 28), (3, 32), (1, 40), (3, 64)])
def test_lenet(channels, size, fill, images):
    network, x = fill(build_model("lenet", 5, channels, size, seed=0)), images(channels, size)
    read, h = Reader(network), x
    if size < 28:
        before = (28 - size) // 2
        h = torch.zeros(2, channels, 28, 28, dtype=x.dtype)
        h[:, :, before : before + size, before : before + size] = x
    h = F.avg_pool2d(torch.tanh(read.conv(h, padding=0 if size == 32 else 2)), 2)
    h = F.avg_pool2d(torch.tanh(read.conv(h)), 2)
    h = torch.tanh(read.conv(h)).mean((2, 3))
    h = torch.tanh(read.linear(h))
    torch.testing.assert_close(network(x), read.linear(h))


def test_resnet8(fill, images):
    network, x = fill(build_model("resnet8", 5, 3, 12, seed=0)), images(3, 12)
    read = Reader(network)
    h = F.relu(read.norm(read.conv(x, 1, shape=(16, 3, 3, 3))))
    for stride, narrow, wide in ((1, 16, 16), (2, 16, 32), (2, 32, 64)):
        out = F.relu(read.norm(read.conv(h, 1, stride, shape=(wide, narrow, 3, 3))))
        out = read.norm(read.conv(out, 1, shape=(wide, wide, 3, 3)))
        shortcut = h if narrow == wide else read.norm(read.conv(h, 0, stride, shape=(wide, narrow, 1, 1)))
        h = F.relu(out + shortcut)
    torch.testing.assert_close(network(x), read.linear(h.mean((2, 3))))
    assert not read.modules


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions_with_another_stem(name, fill, images):
    network, x = fill(build_model(name, 5, 1, 9, seed=0)), images(1, 9)
    reference = getattr(torchvision.models, name)(num_classes=5)
    reference.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    reference = copy_state(network, reference.to(torch.float64))
    torch.testing.assert_close(network(x), reference(x))
    # in training mode, too: the same batch statistics and the same gradients
    for model in (network, reference):
        F.cross_entropy(model.train()(x), torch.tensor([0, 3])).backward()
    torch.testing.assert_close(network.body.conv1.weight.grad, reference.conv1.weight.grad, rtol=1e-6, atol=1e-9)


def test_vgg_is_torchvisions_with_one_linear_layer(fill, images):
    network, x = fill(build_model("vgg19", 5, 3, 64, seed=0)), images(3, 64, 1)
    with torch.device("meta"):
        reference = torchvision.models.vgg19_bn().features
    reference = copy_state(network.body, reference.to_empty(device="cpu").to(torch.float64))
    maps = reference(x)
    assert maps.shape == (1, 512, 2, 2)
    torch.testing.assert_close(network.features(x), maps.mean((2, 3)))


@pytest.mark.parametrize(("channels", "size", "pools"), [(3, 8, 3), (1, 8, 3), (1, 28, 5), (3, 28, 4), (3, 32, 5)])
def test_vgg_keeps_the_pools_that_fit(channels, size, pools):
    with torch.device("meta"):
        network = build_model("vgg19", 5, channels, size, seed=0)
    assert len([m for m in network.modules() if isinstance(m, nn.MaxPool2d)]) == pools
    first = network.body[0][0]
    assert first.padding == ((3, 3) if channels == 1 else (1, 1))


@pytest.mark.parametrize(("channels", "depth"), [(3, 10), (1, 16)])
def test_wideresnet(channels, depth, fill, images):
    network, x = fill(build_wideresnet(5, channels, depth, widen=2)), images(channels, 8)
    stem = network.body.conv1
    h = F.conv2d(x, stem.weight, padding=3 if channels == 1 else 1)
    for k, block in enumerate(network.body.blocks):
        read = Reader(block)
        first = k % (len(network.body.blocks) // 3) == 0
        stride = 2 if first and k else 1
        active = F.relu(read.norm(h))
        out = read.conv(active, 1, stride)
        out = read.conv(F.relu(read.norm(out)), 1)
        h = out + (read.conv(active, 0, stride) if first else h)
        assert not read.modules
    h = F.relu(Reader(network.body.bn).norm(h))
    torch.testing.assert_close(network(x), Reader(network.head).linear(h.mean((2, 3))))


@pytest.mark.parametrize("name", ["mobile_small", "mobile_large"])
def test_mobilenet_is_torchvisions_where_excitation_does_nothing(name, fill, images):
    network, x = fill(build_model(name, 5, 3, 32, seed=0)), images(3, 32)
    reference = getattr(torchvision.models, "mobilenet_v3_" + name.removeprefix("mobile_"))(
        num_classes=5, norm_layer=nn.BatchNorm2d
    )
    excitations = [m for m in network.modules() if isinstance(m, torchvision.ops.SqueezeExcitation)]
    assert len(excitations) == {"mobile_small": 9, "mobile_large": 8}[name]
    with torch.no_grad():
        for module in excitations:
            module.fc2.weight.zero_()
            module.fc2.bias.fill_(4)  # the hard sigmoid is 1 from 3 on
        torch.testing.assert_close(network(x), copy_state(network, reference.to(torch.float64))(x))


@pytest.mark.parametrize("expanded", [True, False])
def test_mobilenet_excitation_stands_before_the_second_activation(expanded, fill, images):
    config = torchvision.models.mobilenetv3.InvertedResidualConfig(
        8, 3, 32 if expanded else 8, 8, True, "HS", 1, 1, 1.0
    )
    block, x = fill(InvertedResidual(config, nn.BatchNorm2d)), images(8, 5)
    convolutions = Reader(block)
    h = F.hardswish(convolutions.norm(convolutions.conv(x))) if expanded else x
    depthwise = convolutions.modules.pop(0)
    h = convolutions.norm(F.conv2d(h, depthwise.weight, padding=1, groups=h.shape[1]))
    first, second = convolutions.modules.pop(0), convolutions.modules.pop(0)
    assert first.out_channels == 8

    def excite(h):
        scale = F.conv2d(F.relu(F.conv2d(h.mean((2, 3), keepdim=True), first.weight, first.bias)), second.weight)
        return h * F.relu6(scale + second.bias[:, None, None] + 3) / 6

    h = F.hardswish(excite(h)) if expanded else excite(F.hardswish(h))
    torch.testing.assert_close(block(x), x + convolutions.norm(convolutions.conv(h)))


def _average(x):
    return F.avg_pool2d(x, 3, 1, 1)


def _reference_a(r, x):
    one = r.unit(x, 64, (1, 1))
    five = r.unit(r.unit(x, 48, (1, 1)), 64, (5, 5), 2)
    double = r.unit(r.unit(r.unit(x, 64, (1, 1)), 96, (3, 3), 1), 96, (3, 3), 1)
    return one, five, double, r.unit(_average(x), 5, (3, 3), 1)


def _reference_b(r, x):
    three = r.unit(x, 384, (3, 3), 0, 2)
    double = r.unit(r.unit(r.unit(x, 64, (1, 1)), 96, (3, 3), 1), 96, (3, 3), 0, 2)
    return three, double, F.max_pool2d(x, 3, 2)


def _reference_c(r, x):
    one = r.unit(x, 192, (1, 1))
    seven = r.unit(r.unit(r.unit(x, 6, (1, 1)), 6, (7, 1), (3, 0)), 192, (1, 7), (0, 3))
    h = r.unit(r.unit(x, 6, (1, 1)), 6, (7, 1), (3, 0))
    h = r.unit(r.unit(h, 6, (1, 7), (0, 3)), 6, (7, 1), (3, 0))
    return one, seven, r.unit(h, 192, (1, 7), (0, 3)), r.unit(_average(x), 192, (1, 1))


def _reference_d(r, x):
    three = r.unit(r.unit(x, 192, (1, 1)), 320, (3, 3), 0, 2)
    h = r.unit(r.unit(r.unit(x, 192, (1, 1)), 192, (1, 7), (0, 3)), 192, (7, 1), (3, 0))
    return three, r.unit(h, 192, (3, 3), 0, 2), F.avg_pool2d(x, 3, 2)


def _reference_e(r, x):
    def split(h):
        return r.unit(h, 384, (1, 3), (0, 1)), r.unit(h, 384, (3, 1), (1, 0))

    one = r.unit(x, 320, (1, 1))
    three = split(r.unit(x, 384, (1, 1)))
    double = split(r.unit(r.unit(x, 448, (1, 1)), 384, (3, 3), 1))
    return one, *three, *double, r.unit(_average(x), 192, (1, 1))


@pytest.mark.parametrize(
    ("block", "reference"),
    [
        (lambda: block_a(4, 5), _reference_a),
        (lambda: block_b(4), _reference_b),
        (lambda: block_c(4, 6), _reference_c),
        (lambda: block_d(4), _reference_d),
        (lambda: block_e(4), _reference_e),
    ],
    ids="abcde",
)
def test_inception_blocks(block, reference, fill, images):
    block, x = fill(block()), images(4, 7)
    read = Reader(block)
    torch.testing.assert_close(block(x), torch.cat(reference(read, x), 1))
    assert not read.modules


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_inception_maps_have_the_published_shapes(channels, size):
    with torch.device("meta"):
        network = build_model("inception", 10, channels, size, seed=0).eval()
        h, shapes = torch.empty(2, channels, size, size), []
        for layer in network.body:
            h = layer(h)
            shapes.append(tuple(h.shape[1:3]))
    assert shapes[:5] == [(32, 32), (32, 32), (64, 32), (80, 32), (192, 30)]
    assert shapes[5:9] == [(256, 30), (288, 30), (288, 30), (768, 14)]
    assert shapes[9:16] == [(768, 14)] * 4 + [(1280, 6)] + [(2048, 6)] * 2


def test_imagenet_inception_is_torchvisions(fill, images):
    with torch.device("meta"):
        network = build_model("inception", 10, 3, 224, seed=0)
        reference = torchvision.models.inception_v3(num_classes=10, init_weights=False, aux_logits=False)
    network, reference = (
        fill(network.to_empty(device="cpu")),
        reference.to_empty(device="cpu").to(torch.float64).eval(),
    )
    reference.load_state_dict(
        {k.removeprefix("body."): v for k, v in network.state_dict().items() if k.startswith("body.")}
        | {"fc.weight": network.head.weight, "fc.bias": network.head.bias}
    )
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    x = images(3, 80, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), reference(x))


def test_small_inception(fill, images):
    network, x = fill(build_model("small_inception", 5, 3, 8, seed=0)), images(3, 8)
    read = Reader(network)
    h = read.unit(x, 96, (3, 3), 1)
    stages = ([(32, 32), (32, 48)], [(112, 48), (96, 64), (80, 80), (48, 96)], [(176, 160), (176, 160)])
    for pairs, halved in zip(stages, (160, 240, None), strict=True):
        for one, three in pairs:
            h = torch.cat([read.unit(h, one, (1, 1)), read.unit(h, three, (3, 3), 1)], 1)
        h = read.unit(h, halved, (3, 3), 1, 2) if halved else h
    torch.testing.assert_close(network(x), read.linear(h.amax((2, 3))))
    assert not read.modules
