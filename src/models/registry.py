"""The registry of models and their one builder. Only the builders import torch.

A new model is a function ``(num_classes, in_channels, image_size) -> Network`` in the file of its family, and one
entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.artifacts.io import file_digest
from src.cli import check_options, option
from src.errors import ArgumentError
from src.lazy import later

if TYPE_CHECKING:
    from src.models.base import Network


@dataclass(frozen=True)
class ModelEntry:
    """One model.

    Attributes:
        name: The value of ``--model``.
        build: ``(num_classes, in_channels, image_size) -> Network``, drawing from torch's global generator.
        note: One line for users.
        channels_last: Whether float32 training on a CPU measured faster with channels-last memory.
        smallest: The smallest image size, by number of channels, that the architecture takes.
        pretrain: Fills a built model with pre-trained weights; None where there are none.
        initialization: What runs record of the starting weights, where an earlier version of this project drew them
            differently, so that results from before and after are not mixed; None where they never changed.
    """

    name: str
    build: Callable[[int, int, int], Network]
    note: str
    channels_last: bool = False
    smallest: Callable[[int], int] = lambda in_channels: 1
    pretrain: Callable[[Network, bool | str | Path], None] | None = None
    initialization: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What the settings of a run contain about the model, besides its name."""
        return {} if self.initialization is None else {"initialization": self.initialization}


MODELS: dict[str, ModelEntry] = {}


def _add(name: str, file: str, **facts: Any) -> None:
    """Add the model that function ``name`` of ``file`` builds; the facts are those of ``ModelEntry``."""
    MODELS[name] = ModelEntry(name, later(f"src.models.{file}", name), **facts)


# The order here is the order in which names are listed to users: the papers' large models first.
_add("resnet18", "resnet", channels_last=True, initialization="default", note="ResNet-18 with the CIFAR stem")
_add("resnet50", "resnet", channels_last=True, initialization="default", note="ResNet-50 with the CIFAR stem")
_add("resnet20", "resnet", channels_last=True, note="CIFAR's ResNet-20, widths 16-32-64")
_add("resnet8", "resnet", channels_last=True, note="CIFAR-style ResNet-8, widths 16-32-64, for work on a CPU")
_add("wideresnet", "resnet", note="WRN-28-10")
_add(
    "inception",
    "inception",
    channels_last=True,
    smallest=lambda in_channels: 5 if in_channels == 1 else 9,
    note="Inception-v3 for small images; from 224x224 on torchvision's",
)
_add(
    "vgg19",
    "vgg",
    channels_last=True,
    initialization="default",
    note="VGG-19 with batch normalization; from 224x224 on with the ImageNet head",
)
_add("mobile_small", "mobilenet", channels_last=True, note="MobileNetV3, small")
_add("mobile_large", "mobilenet", channels_last=True, note="MobileNetV3, large")
_add(
    "vit",
    "vit",
    pretrain=later("src.models.vit", "load_pretrained"),
    initialization="default",
    note="ViT-B/16 on the native image; can start pre-trained",
)
_add("lenet", "small", channels_last=True, note="LeNet-5: three convolutions, tanh, average pooling")
_add("mlp", "small", note="perceptron 128-128, ReLU")
_add("small_mlp", "small", note="perceptron 32-16, tanh")
_add("large_mlp", "small", note="perceptron 500-300, tanh")
_add("small_inception", "inception", channels_last=True, note="the small Inception of Feldman and Zhang")
_add(
    "cnn_deepobs",
    "small",
    channels_last=True,
    note="DeepOBS's model of three convolutions and three linear layers",
)
_add(
    "resnet20_frn",
    "resnet",
    smallest=lambda in_channels: 5,  # the last maps are then 2x2: FRN leaves only the sign of a single position
    note="ResNet-20 with filter response normalization in place of batch normalization",
)


def require_weights(name: str) -> None:
    """Check that a model has pre-trained weights.

    Raises:
        ArgumentError: It has none.
    """
    if MODELS[name].pretrain is None:
        able = ", ".join(other.name for other in MODELS.values() if other.pretrain)
        raise ArgumentError("pretrained", f": there are no weights for {name}; only for {able}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and what it starts from.

    Attributes:
        model: A name of ``MODELS``.
        pretrained: False; True for torchvision's ImageNet weights, which are downloaded; or the path of a file that
            contains such a state dict.

    Raises:
        ArgumentError: There is no such model, or there are no pre-trained weights for it.
    """

    model: str = option("resnet50", f"one of {', '.join(MODELS)}", choices=tuple(MODELS), metavar="NAME")
    pretrained: bool | str = option(
        False,
        "start vit from ImageNet weights, as the SAMIS paper does: torchvision's, downloaded, or those of FILE",
        nargs="?",
        const=True,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.pretrained:
            require_weights(self.model)

    def as_dict(self) -> dict[str, Any]:
        """What determines the starting weights, beside their seed, as plain values."""
        given = isinstance(self.pretrained, str)
        return {
            "model": self.model,
            **MODELS[self.model].settings,
            "pretrained": file_digest(self.pretrained) if given else self.pretrained,
        }


def build_model(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    seed: int,
    pretrained: bool | str | Path = False,
) -> Network:
    """Build a model on the CPU with weights that depend on the arguments alone.

    The global generators are left as they were. Under ``with torch.device("meta")`` the model is built there, with
    shapes and no weights.

    Args:
        name: A name of ``MODELS``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        seed: Seed of the initial weights.
        pretrained: False; True for torchvision's ImageNet weights, which are downloaded; or the path of a file that
            contains such a state dict.

    Returns:
        A float32 ``Network`` in training mode.

    Raises:
        ArgumentError: The name is unknown, the sizes do not suit the architecture, or it has no pre-trained weights.
        FileError: The pre-trained weights cannot be had or do not fit.
    """
    import torch

    if name not in MODELS:
        raise ArgumentError("model", f"{name!r}: unknown; choose from {', '.join(MODELS)}")
    entry = MODELS[name]
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if value < 1:
            raise ArgumentError(argument, f"{value}: must be at least 1")
    smallest = entry.smallest(in_channels)
    if image_size < smallest:
        raise ArgumentError(
            "model",
            f"{name}: needs images of at least {smallest}x{smallest} pixels for {in_channels} channels, and these "
            f"are {image_size}x{image_size}; choose an image_size of {smallest} or more, or another model",
        )
    if pretrained:
        require_weights(name)
    # Only the CPU's generator is forked and seeded: every draw below is the CPU's.
    device = "meta" if torch.empty(0).device.type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        network = entry.build(num_classes, in_channels, image_size)
        if pretrained and entry.pretrain is not None:
            entry.pretrain(network, pretrained)
    return network
