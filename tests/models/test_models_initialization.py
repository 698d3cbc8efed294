"""The initial weights of every layer have the distributions of the SAMIS paper's models."""

import math

import pytest
import torch
from torch import nn

from src.models import MODELS, build_model
from src.models.resnet import build_wideresnet
from src.models.vit import ViT

PAPER = ("resnet18", "resnet50", "wideresnet", "inception", "vgg19", "mobile_small", "mobile_large", "vit")

# The largest models at reduced depth and width, built by the same functions.
REDUCED = {
    "vit": lambda: ViT(10, 3, 32, layers=2, heads=2, width=128, mlp_width=256),
    "wideresnet": lambda: build_wideresnet(10, 3, depth=16, widen=4),
}


def is_zero(values):
    assert not values.any()


def is_one(values):
    assert values.eq(1).all()


def uniform(bound):
    """A check for the uniform distribution on [-bound, bound]."""

    def check(values):
        assert values.abs().max() <= bound * (1 + 1e-6)
        check_moments(values, bound / math.sqrt(3), kurtosis=1.8)

    return check


def normal(std):
    """A check for the normal distribution with mean 0."""

    def check(values):
        if values.numel() > 500:  # beyond the range of a uniform distribution with this standard deviation
            assert values.abs().max() > 2 * std
        check_moments(values, std, kurtosis=3)

    return check


def check_moments(values, std, kurtosis):
    """Mean and standard deviation within six standard errors, enough for these few hundred layers."""
    scaled, n = values.double() / std, values.numel()
    assert abs(scaled.mean().item()) < 6 / math.sqrt(n)
    assert abs(scaled.square().mean().sqrt().item() - 1) < 6 * math.sqrt((kurtosis - 1) / (4 * n))


def default(module):
    """PyTorch's default for convolutions and linear layers: weight and bias uniform up to 1 / sqrt(fan in)."""
    check = uniform(module.weight[0].numel() ** -0.5)
    return check, check


def expected(name, module):
    """The expected distributions of the weight and bias of a model's layer."""
    if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        return is_one, is_zero
    convolution = isinstance(module, nn.Conv2d)
    if convolution and name in ("wideresnet", "mobile_small", "mobile_large"):
        out, _, height, width = module.weight.shape
        return normal(math.sqrt(2 / (height * width * out))), is_zero
    if name == "wideresnet":
        return default(module)[0], is_zero
    if name in ("mobile_small", "mobile_large"):
        return normal(0.01), is_zero
    if name == "vit" and not convolution:
        return uniform(math.sqrt(6 / sum(module.weight.shape))), normal(1e-6)
    return default(module)


@pytest.mark.parametrize("name", PAPER)
def test_every_layer_starts_as_published(name):
    torch.manual_seed(1)
    network, seen = REDUCED[name]() if name in REDUCED else build_model(name, 10, 3, 32, seed=1), set()
    with torch.no_grad():
        for module in network.modules():
            if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
                continue
            checks = expected(name, module)
            for parameter, check in zip((module.weight, module.bias), checks, strict=True):
                if parameter is not None:
                    check(parameter)
                    seen.add(parameter)
        if name == "vit":
            seen |= check_attention_and_tokens(network)
    assert {key for key, p in network.named_parameters() if p not in seen} == set()


def check_attention_and_tokens(network):
    """The parameters of a vision transformer that are not part of a layer."""
    encoder, seen = network.body, set()
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            for projection in module.in_proj_weight.chunk(3):
                uniform(math.sqrt(6 / sum(projection.shape)))(projection)
            normal(1e-6)(module.in_proj_bias)
            seen |= {module.in_proj_weight, module.in_proj_bias}
    is_zero(encoder.class_token)
    normal(0.02)(encoder.encoder.pos_embedding)
    return seen | {encoder.class_token, encoder.encoder.pos_embedding}


def test_the_imagenet_head_of_vgg_starts_from_the_default_too():
    with torch.random.fork_rng(devices=[]):
        network = build_model("vgg19", 10, 3, 224, seed=1)
    for module in (network.body.features[0], network.body.classifier[3], network.head):
        for parameter, check in zip((module.weight, module.bias), default(module), strict=True):
            check(parameter.detach())


@pytest.mark.parametrize(("name", "norm"), [("resnet18", 39.98), ("resnet50", 94.07), ("vgg19", 42.82)])
def test_norm_of_all_convolution_weights(name, norm):
    """Kaiming normal (fan out), used by an earlier version, gives 87.6, 212.2 and 99.9."""
    weights = [p.detach() for p in build_model(name, 10, 3, 32, seed=1).parameters() if p.ndim == 4]
    exact = math.sqrt(sum(w.shape[0] / 3 for w in weights))  # n weights of variance 1 / (3 fan in)
    found = math.sqrt(sum(w.double().square().sum().item() for w in weights))
    assert found == pytest.approx(exact, rel=2e-3)
    assert found == pytest.approx(norm, abs=0.01)


# Sum of the absolute values of all parameters (seed 1, 10 classes, 3x32x32) before the initialization of the paper's
# models was fixed. The initial weights of the other models have not changed.
UNCHANGED = {
    "resnet20": 15477.03006372841,
    "resnet8": 4769.01443656944,
    "wideresnet": 626643.7162287029,
    "inception": 314806.8080199985,
    "mobile_small": 84422.21088938936,
    "mobile_large": 208231.09426794673,
    "lenet": 1836.5456386012472,
    "mlp": 4325.070760263093,
    "small_mlp": 953.306695889595,
    "large_mlp": 17292.834167227265,
    "small_inception": 28719.002467370326,
    "cnn_deepobs": 28244.694070218127,
    "resnet20_frn": 7632.69493978261,
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_the_other_networks_start_from_the_same_numbers_as_before(name):
    parameters = build_model(name, 10, 3, 32, seed=1).parameters()
    total = sum(p.detach().double().abs().sum().item() for p in parameters)
    # CPUs round differently; a different distribution or order of draws changes far more
    assert total == pytest.approx(UNCHANGED[name], rel=1e-6)
    assert MODELS[name].settings == {}


def test_the_record_says_which_networks_start_differently_than_before():
    changed = {name for name, entry in MODELS.items() if entry.settings == {"initialization": "default"}}
    assert changed == {"resnet18", "resnet50", "vgg19", "vit"}
    assert changed | set(UNCHANGED) | {"fastnet", "logistic"} == set(MODELS)  # these two are newer
