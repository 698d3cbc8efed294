"""Logits under fixed weights: a change of any architecture shows here.

The weights are arithmetic, not random (``fill`` of the conftest), so the numbers hold for every version of torch.
"""

import pytest
import torch

from src.models import build_model
from src.models.resnet import build_wideresnet
from src.models.vgg import build_small_vgg
from src.models.vit import ViT

# The first image's three logits of each network on (channels, size), the large ones at reduced width and depth.
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


def build(name, channels, size):
    if name == "wideresnet":
        return build_wideresnet(3, channels, depth=16, widen=2)
    if name == "vit":
        return ViT(3, channels, size, layers=2, heads=2, width=16, mlp_width=32)
    if name == "vgg19":
        return build_small_vgg(3, channels, size, layout=(8, "M", 12, 12, "M", 16, "M", 16, "M", 16, "M"))
    return build_model(name, 3, channels, size, seed=0)


@pytest.mark.parametrize(("name", "channels", "size"), GOLDEN)
def test_logits(name, channels, size, fill, images):
    network = fill(build(name, channels, size))
    with torch.no_grad():
        logits = network(images(channels, size))
    assert logits[0].tolist() == pytest.approx(GOLDEN[name, channels, size], rel=1e-6)
    assert not torch.allclose(logits[0], logits[1], rtol=1e-3)
