"""VGG-19 with batch normalization.

Source: Simonyan and Zisserman 2015, "Very deep convolutional networks". The layers are torchvision's, with PyTorch's
default initialization, as in the SAMIS experiments.
"""

from collections.abc import Sequence

from torch import nn

from src._torchvision import torchvision
from src.models.base import IMAGENET_SIZE, Network, make_out_of_place, stem_padding

LAYOUT: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M")


def _fitting(layout: Sequence[int | str], size: int) -> list[int | str]:
    """The layout without the max-pooling layers ("M") that would get 1x1 maps, for images of ``size`` pixels."""
    kept: list[int | str] = []
    for entry in layout:
        if entry == "M" and size < 2:
            continue
        kept.append(entry)
        size = size // 2 if entry == "M" else size
    return kept


def _convolutions(layout: Sequence[int | str], in_channels: int, padding: int, image_size: int) -> nn.Sequential:
    layers = torchvision.models.vgg.make_layers(_fitting(layout, image_size + 2 * (padding - 1)), batch_norm=True)
    layers[0] = nn.Conv2d(in_channels, layout[0], 3, padding=padding)
    return layers


def build_small_vgg(
    num_classes: int, in_channels: int, image_size: int, layout: Sequence[int | str] = LAYOUT
) -> Network:
    """VGG for small images: 3x3 convolutions with bias, BN, and ReLU; 2x2 max-pooling; one linear layer.

    The first convolution has padding 3 for one channel, which turns 28x28 into 32x32. Max-pooling layers that would
    get 1x1 maps are omitted (for example, for 8x8 images). Larger final maps (64x64 images) are averaged over
    positions.
    """
    layers = _convolutions(layout, in_channels, stem_padding(in_channels), image_size)
    head = nn.Linear(layout[-2] if layout[-1] == "M" else layout[-1], num_classes)
    return Network(make_out_of_place(nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())), head)


def _build_imagenet_vgg(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Torchvision's VGG-19-BN: average pooling to 7x7, then 4096-4096-C with dropout 0.5."""
    body = torchvision.models.VGG(_convolutions(LAYOUT, in_channels, 1, image_size), num_classes, init_weights=False)
    head = body.classifier[-1]
    body.classifier[-1] = nn.Identity()
    return Network(make_out_of_place(body), head)


def vgg19(num_classes: int, in_channels: int, image_size: int) -> Network:
    """VGG-19-BN: one linear layer after the convolutions, or torchvision's 4096-4096 head at 224x224 and above."""
    build = _build_imagenet_vgg if image_size >= IMAGENET_SIZE else build_small_vgg
    return build(num_classes, in_channels, image_size)
