import pytest
import torch

from src.models import build_model

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
    "cnn_deepobs": (895210, None, None, None, None),
    "resnet20_frn": (274042, None, None, None, None),
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
