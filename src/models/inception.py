"""Inception models: Inception-v3, and the small Inception of the memorization studies.

Sources: Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision"; Feldman and Zhang 2020,
"What neural networks memorize and why"; Zhang et al. 2017, "Understanding deep learning requires rethinking
generalization".

For images of 224x224 and above, inception is torchvision's Inception-v3. For smaller images, the stem has stride 1
and there is no auxiliary head. Unlike torchvision's, the small-image model has a 3x3 convolution in the pooling
branch of block A, 7x1 before 1x7 in block C, average pooling in block D, and PyTorch's defaults for normalization.
"""

from functools import partial

from torch import nn

from src.models.base import IMAGENET_SIZE, Branches, ConvUnit, Network, halve, same, stem_padding

Seq = nn.Sequential


def _average() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, stride=1, padding=1)


def block_a(c: int, pooled: int) -> Branches:
    """Preserves the size; outputs 224 + ``pooled`` channels."""
    return Branches(
        [
            same(c, 64, 1),
            Seq(same(c, 48, 1), same(48, 64, 5)),
            Seq(same(c, 64, 1), same(64, 96, 3), same(96, 96, 3)),
            Seq(_average(), same(c, pooled, 3)),
        ]
    )


def block_b(c: int) -> Branches:
    """Halves the size; outputs ``c`` + 480 channels."""
    return Branches([halve(c, 384), Seq(same(c, 64, 1), same(64, 96, 3), halve(96, 96)), nn.MaxPool2d(3, 2)])


def block_c(c: int, inner: int) -> Branches:
    """Preserves the size; outputs 768 channels. Factorized 7x7 convolutions have ``inner`` channels."""
    return Branches(
        [
            same(c, 192, 1),
            Seq(same(c, inner, 1), same(inner, inner, 7, 1), same(inner, 192, 1, 7)),
            Seq(
                same(c, inner, 1),
                same(inner, inner, 7, 1),
                same(inner, inner, 1, 7),
                same(inner, inner, 7, 1),
                same(inner, 192, 1, 7),
            ),
            Seq(_average(), same(c, 192, 1)),
        ]
    )


def block_d(c: int) -> Branches:
    """Halves the size; outputs ``c`` + 512 channels."""
    return Branches(
        [
            Seq(same(c, 192, 1), halve(192, 320)),
            Seq(same(c, 192, 1), same(192, 192, 1, 7), same(192, 192, 7, 1), halve(192, 192)),
            nn.AvgPool2d(3, 2),
        ]
    )


def block_e(c: int) -> Branches:
    """Preserves the size; outputs 2048 channels."""
    return Branches(
        [
            same(c, 320, 1),
            Seq(same(c, 384, 1), Branches([same(384, 384, 1, 3), same(384, 384, 3, 1)])),
            Seq(same(c, 448, 1), same(448, 384, 3), Branches([same(384, 384, 1, 3), same(384, 384, 3, 1)])),
            Seq(_average(), same(c, 192, 1)),
        ]
    )


def _build_small_inception_v3(num_classes: int, in_channels: int) -> Network:
    """Inception-v3 for small images: 30x30, 14x14, and 6x6 maps from 32x32 images, average pooling, dropout 0.5."""
    body = Seq(
        ConvUnit(in_channels, 32, kernel_size=3, padding=stem_padding(in_channels)),
        same(32, 32, 3),
        same(32, 64, 3),
        same(64, 80, 1),
        ConvUnit(80, 192, kernel_size=3),
        *(block_a(192, 32), block_a(256, 64), block_a(288, 64)),
        block_b(288),
        *(block_c(768, inner) for inner in (128, 160, 160, 192)),
        block_d(768),
        *(block_e(1280), block_e(2048)),
        nn.AdaptiveAvgPool2d(1),
        nn.Dropout2d(0.5),
        nn.Flatten(),
    )
    return Network(body, nn.Linear(2048, num_classes))


class ImageNetInception(Network):
    """torchvision's Inception-v3 with an unused auxiliary head.

    ``forward`` returns one tensor, so the auxiliary head is never called. Its weights stay in the state dict, frozen,
    so that the parameters match those of the published model.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        from src._torchvision import torchvision

        names = [f"Inception{part}" for part in ("A", "B", "C", "D", "E", "Aux")]
        blocks = [partial(getattr(torchvision.models.inception, name), conv_block=ConvUnit) for name in names]
        body = torchvision.models.Inception3(num_classes, inception_blocks=[ConvUnit, *blocks], init_weights=True)
        first = ConvUnit(in_channels, 32, kernel_size=3, stride=2)
        nn.init.trunc_normal_(first.conv.weight, std=0.1, a=-2, b=2)
        body.Conv2d_1a_3x3 = first
        auxiliary, head = body.AuxLogits, body.fc
        body.aux_logits, body.AuxLogits, body.fc = False, None, nn.Identity()
        super().__init__(body, head)
        self.auxiliary = auxiliary.requires_grad_(False)


def inception(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Inception-v3: the small-image version, or, for 224x224 and above, torchvision's with a frozen auxiliary head.

    Blocks B and D halve the size without padding, so block B needs maps of at least 7 pixels, and the stem removes 2
    pixels. Images with three channels therefore need 9 pixels, and images with one channel, which the stem pads by 3,
    need 5.
    """
    if image_size >= IMAGENET_SIZE:
        return ImageNetInception(num_classes, in_channels)
    return _build_small_inception_v3(num_classes, in_channels)


# Per stage: the channels of the 1x1 and 3x3 branch of each block, and the channels of the downsampling convolution.
STAGES = (
    (((32, 32), (32, 48)), 160),
    (((112, 48), (96, 64), (80, 80), (48, 96)), 240),
    (((176, 160), (176, 160)), None),
)


def small_inception(num_classes: int, in_channels: int, image_size: int) -> Network:
    """A 3x3 unit with 96 channels, three stages of two-branch blocks, global max-pooling, and one linear layer.

    Convolutions have no bias and are followed by BN and ReLU. Between stages, a 3x3 convolution with stride 2 and
    padding 1 halves the maps. The architecture is the same for every image size.
    """
    body = nn.Sequential(same(in_channels, 96, 3))
    channels = 96
    for pairs, halved in STAGES:
        for one, three in pairs:
            body.append(Branches([same(channels, one, 1), same(channels, three, 3)]))
            channels = one + three
        if halved is not None:
            body.append(ConvUnit(channels, halved, kernel_size=3, stride=2, padding=1))
            channels = halved
    body.extend([nn.AdaptiveMaxPool2d(1), nn.Flatten()])
    return Network(body, nn.Linear(channels, num_classes))
