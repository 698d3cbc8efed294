"""Every model: the interface, published parameter counts, and logits for fixed weights."""

import pytest
import torch
from torch.nn import functional as F

from src.errors import ArgumentError
from src.models import MODELS, build_model
from src.models.resnet import build_wideresnet
from src.models.vgg import build_small_vgg
from src.models.vit import ViT

# The large models at reduced depth and width, built by the same functions.
REDUCED = {
    "vit": lambda size: ViT(10, 3, size, layers=2, heads=2, width=8, mlp_width=16),
    "wideresnet": lambda size: build_wideresnet(10, 3, depth=10, widen=1),
}
SMALL = [name for name in MODELS if name not in ("resnet50", "inception", "vgg19", "mobile_large")]


def build(name, size=32):
    return REDUCED[name](size) if name in REDUCED else build_model(name, 10, 3, size, seed=1)


def test_every_model_of_the_project_is_registered():
    expected = (
        "resnet18 resnet50 vgg19 wideresnet inception mobile_small mobile_large vit mlp lenet small_inception "
        "resnet20 resnet8 small_mlp large_mlp cnn_deepobs resnet20_frn"
    )
    assert set(expected.split()) <= set(MODELS)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 28), (3, 32), (1, 64), (3, 64)])
@pytest.mark.parametrize("name", MODELS)
def test_any_size_and_channel_count_gives_logits_or_one_clear_line(name, channels, size):
    with torch.device("meta"):
        if size < MODELS[name].smallest(channels):
            with pytest.raises(ArgumentError, match=rf"^model {name}: needs images of at least"):
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


def test_only_inception_refuses_tiny_color_images():
    assert [name for name in MODELS if MODELS[name].smallest(3) > 8] == ["inception"]
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
    ("name", "channels", "size", "value"),
    [
        ("large_mlp", 1, 28, 0.0184022579),
        ("small_mlp", 1, 28, 0.0184022579),
        ("lenet", 1, 28, 0.1030526385),
        ("cnn_deepobs", 3, 32, 0.0202136096),
        ("resnet20_frn", 3, 32, 0.0991624519),
    ],
)
def test_first_weight_of_seed_1_is_the_published_one(name, channels, size, value):
    weight = next(build_model(name, 10, channels, size, seed=1).parameters())
    assert weight.flatten()[0].item() == pytest.approx(value, abs=1e-9)


def test_unknown_name_lists_the_names():
    with pytest.raises(ArgumentError, match=r"^model 'resnet19': .*resnet18"):
        build_model("resnet19", 10, 3, 32, seed=0)


def test_pretrained_weights_are_refused_where_there_are_none():
    with pytest.raises(ArgumentError, match=r"^pretrained: .*use vit, timm:NAME or torchvision:NAME$"):
        build_model("resnet18", 10, 3, 32, seed=0, pretrained=True)


@pytest.mark.parametrize(("channels", "size", "flag"), [(0, 32, "in_channels"), (3, 0, "image_size")])
def test_impossible_sizes_are_refused(channels, size, flag):
    with pytest.raises(ArgumentError, match=flag):
        build_model("mlp", 10, channels, size, seed=0)


# Columns: CIFAR-10, CIFAR-100, Fashion-MNIST, Tiny-ImageNet, ImageNet; None where the publication has no number.
DATA = ((10, 3, 32), (100, 3, 32), (10, 1, 28), (200, 3, 64), (1000, 3, 224))
PUBLISHED = {
    "resnet18": (11173962, 11220132, 11172810, 11271432, 11681832),
    "resnet50": (23520842, 23705252, 23519690, 23910152, 25549352),
    "vgg19": (20040522, 20086692, 20039370, None, 143678248),
    "wideresnet": (36479194, 36536884, 36478906, None, None),
    "inception": (22133738, 22318148, 22133162, None, 27161264),
    "mobile_small": (1528106, 1620356, 1527818, None, 2542856),
    "mobile_large": (4214842, 4330132, 4214554, None, 5483032),
    "vit": (85658890, 85728100, 85263370, 85814216, 86567656),
    "mlp": (411146, 422756, 118282, None, None),
    "lenet": (62006, 69656, 61706, None, None),
    "small_inception": (1895786, None, None, None, None),
    "large_mlp": (None, None, 545810, None, None),
    "small_mlp": (None, None, 25818, None, None),
    "logistic": (None, None, 7850, None, None),
    "cnn_deepobs": (895210, None, None, None, None),
    "resnet20_frn": (274042, None, None, None, None),
    # stem 3072 + 128, units 73728 + 256 and 294912 + 512, residual blocks 2 (147456 + 256) and 2 (589824 + 512), head
    "fastnet": (1851274, None, None, None, None),
    # 269,722 with identity shortcuts, plus the projections 16-32 and 32-64 with their norms (576 + 2,176)
    "resnet20": (272474, None, None, None, None),
}
CASES = [
    (name, *data, count)
    for name, row in PUBLISHED.items()
    for data, count in zip(DATA, row, strict=True)
    if count is not None
]
EMBEDDINGS = {
    "resnet18": 512,
    "resnet50": 2048,
    "vgg19": 512,
    "wideresnet": 640,
    "inception": 2048,
    "mobile_small": 1024,
    "mobile_large": 1280,
    "vit": 768,
    "lenet": 84,
    "small_inception": 336,
    "cnn_deepobs": 256,
    "resnet20_frn": 64,
    "fastnet": 256,
}


def build_without_weights(name, num_classes, channels, size):
    with torch.device("meta"):
        return build_model(name, num_classes, channels, size, seed=0)


@pytest.mark.parametrize(("name", "num_classes", "channels", "size", "count"), CASES)
def test_parameter_count_is_the_published_one(name, num_classes, channels, size, count):
    network = build_without_weights(name, num_classes, channels, size)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("name", "width"), EMBEDDINGS.items())
def test_embedding_has_the_published_width(name, width):
    assert build_without_weights(name, 10, 3, 32).head.in_features == width


def test_imagenet_vgg_embeds_in_4096():
    assert build_without_weights("vgg19", 1000, 3, 224).head.in_features == 4096


def test_lenet_layers_are_the_published_ones():
    network = build_without_weights("lenet", 10, 1, 28)
    sizes = [p.numel() for p in network.parameters()]
    assert [sum(sizes[k : k + 2]) for k in range(0, 10, 2)] == [156, 2416, 48120, 10164, 850]


def test_auxiliary_head_of_imagenet_inception_is_frozen():
    network = build_without_weights("inception", 1000, 3, 224)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    # 1x1 768-128 and 5x5 128-768 with their norms, and a linear layer 768-1000
    assert frozen == 768 * 128 + 2 * 128 + 25 * 128 * 768 + 2 * 768 + 769 * 1000


# Logits for fixed weights detect any change of an architecture. The weights are computed, not random (see ``fill`` in
# conftest.py), so the numbers are the same in every version of torch.
# The three logits of the first image for each model on (channels, size); large models at reduced width and depth.
GOLDEN = {
    ("resnet18", 3, 8): (10.41778, 2.6418002, -11.658828),
    ("resnet50", 1, 8): (-211.03148, -228.23537, -86.508143),
    ("resnet20", 3, 8): (-3.2710522, 4.5873513, 2.6587638),
    ("resnet8", 1, 8): (1.6410565, -1.9923088, 1.4393205),
    ("wideresnet", 1, 8): (-3.7756358, -1.7543451, -0.41067352),
    ("wideresnet", 3, 8): (-1.3362528, -1.7487319, 0.13558053),
    ("inception", 3, 9): (-0.019757412, 0.033292233, 0.055684147),
    ("inception", 1, 6): (-0.020123902, 0.036945007, 0.054017817),
    ("vgg19", 3, 32): (-0.29946599, 1.5363058, -0.23107361),
    ("vgg19", 1, 8): (-0.25912513, 0.034543485, -0.14839735),
    ("mobile_small", 3, 16): (0.017509102, 0.12436311, -0.13940871),
    ("mobile_large", 1, 16): (-21.014165, -0.95213945, -16.723806),
    ("vit", 3, 32): (-1.0297438, -0.47287369, -0.37267008),
    ("vit", 1, 28): (-1.9058612, 0.26478429, -1.2301017),
    ("vit", 3, 8): (-1.7528491, -0.9543309, -0.71298528),
    ("lenet", 1, 8): (0.23059969, -0.036693849, -0.19372944),
    ("lenet", 1, 28): (0.039636314, -0.56405919, 0.26719123),
    ("lenet", 3, 32): (-0.15450922, 0.23355208, 0.41976341),
    ("lenet", 3, 40): (0.23895809, 0.0039623357, -0.16954401),
    ("mlp", 1, 8): (-0.081146572, 1.0480105, -0.1121403),
    ("small_mlp", 1, 8): (-0.47616441, 0.096619595, 0.28942536),
    ("large_mlp", 3, 8): (2.28429, 0.35400917, 1.1343809),
    ("small_inception", 3, 8): (0.76230305, 0.51870046, 0.48416122),
    ("small_inception", 1, 9): (0.57494129, 2.4790909, 0.49460088),
    ("cnn_deepobs", 1, 8): (2.7852151, -1.5100084, 0.029843679),
    ("cnn_deepobs", 1, 28): (3.204965, -0.57142248, -0.57431561),
    ("cnn_deepobs", 3, 32): (4.1810392, -1.8699569, -0.50258936),
    ("cnn_deepobs", 3, 40): (3.3327917, -0.5363102, -0.411567),
    ("resnet20_frn", 1, 8): (-0.34166302, 0.030276774, 0.15371062),
    ("resnet20_frn", 3, 9): (-0.46129946, 0.060052412, 0.13465117),
    ("resnet20_frn", 3, 32): (-0.54823779, 0.097461499, 0.1393867),
}


def build_golden(name, channels, size):
    if name == "wideresnet":
        return build_wideresnet(3, channels, depth=16, widen=2)
    if name == "vit":
        return ViT(3, channels, size, layers=2, heads=2, width=16, mlp_width=32)
    if name == "vgg19":
        return build_small_vgg(3, channels, size, layout=(8, "M", 12, 12, "M", 16, "M", 16, "M", 16, "M"))
    return build_model(name, 3, channels, size, seed=0)


@pytest.mark.parametrize(("name", "channels", "size"), GOLDEN)
def test_logits(name, channels, size, fill, images):
    network = fill(build_golden(name, channels, size))
    with torch.no_grad():
        logits = network(images(channels, size))
    assert logits[0].tolist() == pytest.approx(GOLDEN[name, channels, size], rel=1e-6)
    assert not torch.allclose(logits[0], logits[1], rtol=1e-3)
