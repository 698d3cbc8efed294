"""The model registry and the function that builds models. Only the builders import torch.

To add a model, write a function ``(num_classes, in_channels, image_size) -> Network`` in the file of its family, and
add one entry here.
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
        build: ``(num_classes, in_channels, image_size) -> Network``; draws weights from torch's global generator.
        note: A one-line description for users.
        channels_last: Whether float32 training on a CPU was measured to be faster with channels-last memory.
        smallest: Maps the number of channels to the smallest image size that the architecture accepts.
        pretrain: Loads pretrained weights into a built model; None if there are none.
        initialization: The initialization that runs record, if an earlier version of this project initialized the
            model differently, so that results of both versions are not mixed; None if it never changed.
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
        """The model's entries in a run's settings, besides its name."""
        return {} if self.initialization is None else {"initialization": self.initialization}


MODELS: dict[str, ModelEntry] = {}


def _add(name: str, file: str, **facts: Any) -> None:
    """Register the model built by function ``name`` in ``file``; ``facts`` are the fields of ``ModelEntry``."""
    MODELS[name] = ModelEntry(name, later(f"src.models.{file}", name), **facts)


# Help texts list the models in this order: the papers' large models first.
_add("resnet18", "resnet", channels_last=True, initialization="default", note="ResNet-18 with the CIFAR stem")
_add("resnet50", "resnet", channels_last=True, initialization="default", note="ResNet-50 with the CIFAR stem")
_add("resnet20", "resnet", channels_last=True, note="CIFAR's ResNet-20, widths 16-32-64")
_add("resnet8", "resnet", channels_last=True, note="CIFAR-style ResNet-8, widths 16-32-64, for work on a CPU")
_add(
    "fastnet",
    "fastnet",
    channels_last=True,
    smallest=lambda in_channels: 8,
    note="small and wide residual model for good accuracy per second, for --recipe=fast",
)
_add("wideresnet", "resnet", note="WRN-28-10")
_add(
    "inception",
    "inception",
    channels_last=True,
    smallest=lambda in_channels: 5 if in_channels == 1 else 9,
    note="Inception-v3 for small images; torchvision's for 224x224 and larger",
)
_add(
    "vgg19",
    "vgg",
    channels_last=True,
    initialization="default",
    note="VGG-19 with batch normalization; with the ImageNet head for 224x224 and larger",
)
_add("mobile_small", "mobilenet", channels_last=True, note="MobileNetV3, small")
_add("mobile_large", "mobilenet", channels_last=True, note="MobileNetV3, large")
_add(
    "vit",
    "vit",
    pretrain=later("src.models.vit", "load_pretrained"),
    initialization="default",
    note="ViT-B/16 at the native image size; optionally pretrained",
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
    note="the DeepOBS model with three convolutions and three linear layers",
)
_add(
    "resnet20_frn",
    "resnet",
    smallest=lambda in_channels: 5,  # for 2x2 final maps; on 1x1 maps, FRN keeps only the sign
    note="ResNet-20 with filter response normalization in place of batch normalization",
)


def require_weights(name: str) -> None:
    """Check that a model has pretrained weights.

    Raises:
        ArgumentError: It has none.
    """
    if MODELS[name].pretrain is None:
        able = ", ".join(other.name for other in MODELS.values() if other.pretrain)
        raise ArgumentError("pretrained", f": {name} has no pretrained weights; use {able}")


@dataclass(frozen=True)
class ModelConfig:
    """The model and its initial weights.

    Attributes:
        model: A key of ``MODELS``.
        pretrained: False for random weights; True to download torchvision's ImageNet weights; or the path of a file
            with such a state dict.

    Raises:
        ArgumentError: The model does not exist, or has no pretrained weights.
    """

    model: str = option("resnet50", f"one of {', '.join(MODELS)}", choices=tuple(MODELS), metavar="NAME")
    pretrained: bool | str = option(
        False,
        "initialize vit with ImageNet weights, as in the SAMIS paper: downloaded from torchvision, or read from FILE",
        nargs="?",
        const=True,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.pretrained:
            require_weights(self.model)

    def as_dict(self) -> dict[str, Any]:
        """The settings that determine the initial weights, except the seed, as plain values."""
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
    """Build a model on the CPU with weights that depend only on the arguments.

    The global generators are unchanged. Under ``with torch.device("meta")``, the model is built on the meta device,
    with shapes but no weights.

    Args:
        name: A key of ``MODELS``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        seed: Seed of the initial weights.
        pretrained: False for random weights; True to download torchvision's ImageNet weights; or the path of a file
            with such a state dict.

    Returns:
        A float32 ``Network`` in training mode.

    Raises:
        ArgumentError: The name is unknown, the architecture does not support the sizes, or the model has no
            pretrained weights.
        FileError: The pretrained weights cannot be downloaded or read, or do not fit the model.
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
            f"{name}: needs images of at least {smallest}x{smallest} pixels with {in_channels} channels, but these "
            f"are {image_size}x{image_size}; choose an image_size of {smallest} or more, or another model",
        )
    if pretrained:
        require_weights(name)
    # Forking and seeding the CPU generator is enough: all draws below are on the CPU.
    device = "meta" if torch.empty(0).device.type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        network = entry.build(num_classes, in_channels, image_size)
        if pretrained and entry.pretrain is not None:
            entry.pretrain(network, pretrained)
    return network
