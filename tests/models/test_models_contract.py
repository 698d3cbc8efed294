import pytest
import torch
from torch.nn import functional as F

from src.errors import FlagError
from src.models import MODELS, build_model, model_names
from src.models.resnet import build_wideresnet
from src.models.vit import ViT

# The large networks stand here at reduced depth and width, built by the same functions.
REDUCED = {
    "vit": lambda size: ViT(10, 3, size, layers=2, heads=2, width=8, mlp_width=16),
    "wideresnet": lambda size: build_wideresnet(10, 3, depth=10, widen=1),
}
SMALL = [name for name in model_names() if name not in ("resnet50", "inception", "vgg19", "mobile_large")]


def build(name, size=32):
    return REDUCED[name](size) if name in REDUCED else build_model(name, 10, 3, size, seed=1)


def test_every_model_of_the_project_is_registered():
    expected = (
        "resnet18 resnet50 vgg19 wideresnet inception mobile_small mobile_large vit mlp lenet small_inception "
        "resnet20 resnet8 small_mlp large_mlp cnn_deepobs resnet20_frn"
    )
    assert set(expected.split()) <= set(model_names())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 28), (3, 32), (1, 64), (3, 64)])
@pytest.mark.parametrize("name", model_names())
def test_any_size_and_channel_count_gives_logits_or_one_clear_line(name, channels, size):
    with torch.device("meta"):
        if size < MODELS[name].smallest(channels):
            with pytest.raises(FlagError, match=rf"^model {name}: needs images of at least"):
                build_model(name, 7, channels, size, seed=0)
            return
        network = build_model(name, 7, channels, size, seed=0).eval()
        with torch.no_grad():
            assert network(torch.empty(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "inception", "mobile_large", "vit", "wideresnet"])
def test_imagenet_sized_images_give_logits(name):
    with torch.device("meta"):
        network = build_model(name, 1000, 3, 224, seed=0).eval()
        with torch.no_grad():
            assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_only_inception_refuses_tiny_colour_images():
    assert [name for name in model_names() if MODELS[name].smallest(3) > 8] == ["inception"]
    assert MODELS["inception"].smallest(3) == 9
    assert MODELS["inception"].smallest(1) == 5


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_head_of_features(name):
    network, images = build(name).eval(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, embedding = network(images), network.features(images)
        torch.testing.assert_close(F.linear(embedding, network.head.weight, network.head.bias), logits)


@pytest.mark.parametrize("name", SMALL)
def test_hooks_see_outputs_once_and_unchanged_and_gradients_reach_all(name):
    network, outputs = build(name), {}

    def keep(module, _, output):
        assert module not in outputs, f"{module} is called twice"
        outputs[module] = output, output.detach().clone()

    for module in network.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            continue  # its output is a tuple
        module.register_forward_hook(keep)
        module.register_full_backward_hook(lambda *_: None)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    F.cross_entropy(network(images), torch.arange(4)).backward()
    assert len(outputs) > 3
    assert all(torch.equal(output, copy) for output, copy in outputs.values())
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "inception", "mobile_large"])
def test_large_networks_have_no_layer_in_place(name):
    with torch.device("meta"):
        for size in (32, 224):
            network = build_model(name, 10, 3, size, seed=0)
            assert not [module for module in network.modules() if getattr(module, "inplace", False)]


@pytest.mark.parametrize("name", ["resnet8", "lenet", "mlp", "mobile_small", "small_inception"])
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(5)
    first = build_model(name, 10, 3, 32, seed=3).state_dict()
    torch.manual_seed(6)
    again = build_model(name, 10, 3, 32, seed=3).state_dict()
    other = build_model(name, 10, 3, 32, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_global_generator_is_left_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    build_model("resnet8", 10, 3, 32, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "value"), [("large_mlp", 0.0184022579), ("small_mlp", 0.0184022579), ("lenet", 0.1030526385)]
)
def test_first_weight_of_seed_1_is_the_published_one(name, value):
    weight = next(build_model(name, 10, 1, 28, seed=1).parameters())
    assert weight.flatten()[0].item() == pytest.approx(value, abs=1e-9)


def test_unknown_name_lists_the_names():
    with pytest.raises(FlagError, match=r"^model 'resnet19': unknown; choose from .*resnet18.*$"):
        build_model("resnet19", 10, 3, 32, seed=0)


def test_pretrained_weights_are_refused_where_there_are_none():
    with pytest.raises(FlagError, match=r"^pretrained: .* for resnet18; only for vit$"):
        build_model("resnet18", 10, 3, 32, seed=0, pretrained=True)


@pytest.mark.parametrize(("channels", "size", "flag"), [(0, 32, "in_channels"), (3, 0, "image_size")])
def test_impossible_sizes_are_refused(channels, size, flag):
    with pytest.raises(FlagError, match=flag):
        build_model("mlp", 10, channels, size, seed=0)


def test_wideresnet_starts_as_published():
    network = build_wideresnet(10, 3, depth=10, widen=4)
    weight = network.body.blocks[2].conv2.weight  # 256 channels of 3x3
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert not network.head.bias.any()
    assert network.body.bn.weight.eq(1).all()
    assert not network.body.bn.bias.any()


def test_mobilenet_starts_as_published():
    network = build_model("mobile_small", 10, 3, 32, seed=0)
    for weight in (network.body.features[0][0].weight, network.body.features[-1][0].weight):
        out, _, k, _ = weight.shape
        assert weight.std().item() == pytest.approx((2 / (k * k * out)) ** 0.5, rel=0.15)
    assert network.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not network.head.bias.any()
