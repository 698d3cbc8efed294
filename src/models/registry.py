"""The model registry and the function that builds models. Only the builders import torch.

To add a model, write a function ``(num_classes, in_channels, image_size) -> Network`` in the file of its family, and
add one entry here. Other models are named ``FILE.py:NAME``, ``timm:NAME`` or ``torchvision:NAME``; ``model_name``
maps these texts to names for files and settings, and ``model_entry`` maps both to entries.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.artifacts.io import file_digest
from src.cli import check_options, option
from src.errors import ArgumentError, FileError, UserError
from src.lazy import later
from src.rng import global_generators

if TYPE_CHECKING:
    from torch import nn

    from src.models.base import Network
    from src.models.external import SourceFile


@dataclass(frozen=True)
class ModelEntry:
    """One model.

    Attributes:
        name: The value of ``--model``.
        build: ``(num_classes, in_channels, image_size) -> Network``; draws weights from torch's global generator.
        note: A one-line description for users.
        channels_last: Whether float32 training on a CPU was measured to be faster with channels-last memory.
        smallest: Maps the number of channels to the smallest image size that the architecture accepts.
        pretrain: Loads the papers' pretrained weights into a built model; None if there are none.
        build_pretrained: For models of other packages, builds a pretrained model, given also the last argument of
            ``pretrain``; None if there are no weights.
        source: The user's file that defines the model; None for other models.
        initialization: The initialization that runs record, if an earlier version of this project initialized the
            model differently, so that results of both versions are not mixed; None if it never changed.
    """

    name: str
    build: Callable[[int, int, int], nn.Module]
    note: str
    channels_last: bool = False
    smallest: Callable[[int], int] = lambda in_channels: 1
    pretrain: Callable[[Network, bool | str | Path], None] | None = None
    build_pretrained: Callable[[int, int, int, bool | str | Path], nn.Module] | None = None
    source: SourceFile | None = None
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
_add("logistic", "small", note="softmax regression, a single linear layer")
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


PACKAGES = ("timm", "torchvision")
"""The packages whose models ``--model`` accepts, by the prefix before the colon."""

_FORMS = "FILE.py:NAME, timm:NAME or torchvision:NAME"
_OF_PACKAGE = re.compile(rf"({'|'.join(PACKAGES)})[:-]([\w.-]+)")
_OF_FILE = re.compile(r"\w+-[0-9a-f]{8}")
_sources: dict[str, SourceFile] = {}  # the files that callers have named, by the model's name


def model_name(text: str) -> str:
    """Return the name of a model in file names and settings.

    Args:
        text: A key of ``MODELS``; ``timm:NAME`` or ``torchvision:NAME``; ``FILE.py:NAME``, which is read,
            because the name depends on it; or a name in file names. The name of a model from a file is enough to read
            results, but not to build the model.

    Raises:
        ArgumentError: The text is none of these.
        FileError: The file is missing or has a syntax error.
    """
    if text in MODELS or text in _sources:
        return text
    if match := _OF_PACKAGE.fullmatch(text):
        return "-".join(match.groups())
    if _OF_FILE.fullmatch(text):
        return text
    path, colon, attribute = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ArgumentError("model", f"{text!r}: unknown; choose from {', '.join(MODELS)}, or give {_FORMS}")
    from src.models.external import SourceFile

    source = SourceFile(Path(path), attribute)
    if source.name not in _sources or _sources[source.name].path != source.path:
        _sources[source.name] = source
    return source.name


def model_flag(name: str) -> str:
    """Return the value of ``--model`` for a model's name. They differ for models that are not in ``MODELS``."""
    if name in _sources:
        return _sources[name].text
    match = _OF_PACKAGE.fullmatch(name)
    return ":".join(match.groups()) if match else "FILE.py:NAME" if _OF_FILE.fullmatch(name) else name


def model_entry(text: str) -> ModelEntry:
    """Return the entry of a model, given a value of ``--model`` or a name in file names.

    Raises:
        ArgumentError: The model is unknown, or is one of a file that no caller has named.
        FileError: The file is missing or has a syntax error.
    """
    name = model_name(text)
    if name in MODELS:
        return MODELS[name]
    if name not in _sources and (match := _OF_PACKAGE.fullmatch(name)):
        package, model = match.groups()
        build = later("src.models.external", f"build_{package}", model)
        return ModelEntry(name, build, f"{model} of {package}", build_pretrained=build)
    if name not in _sources:
        raise ArgumentError("model", f"{name}: the source is needed; give --model=FILE.py:NAME")
    source = _sources[name]
    return ModelEntry(name, source.build, f"{source.attribute} of {source.path.name}", source=source)


def report_model_error(error: BaseException | None) -> None:
    """Check whether an error comes from the code of a user's model, such as its forward pass.

    Args:
        error: The error that ends a computation; None if there is none.

    Raises:
        FileError: It does; the message names file and line.
    """
    if not isinstance(error, Exception) or isinstance(error, UserError | MemoryError):
        return
    if "out of memory" in str(error) or "allocate memory" in str(error):
        return  # scripts report it with a remedy
    for source in _sources.values():
        if (line := source.line_of(error)) is not None:
            raise FileError(line) from error


def require_weights(name: str) -> None:
    """Check that a model has pretrained weights.

    Raises:
        ArgumentError: It has none.
    """
    entry = model_entry(name)
    if entry.pretrain is None and entry.build_pretrained is None:
        able = ", ".join(other.name for other in MODELS.values() if other.pretrain)
        use = (
            "use --init FILE for weights of your own"
            if entry.source
            else f"use {able}, timm:NAME or torchvision:NAME"
        )
        raise ArgumentError("pretrained", f": {name} has no pretrained weights; {use}")


def _model(text: str) -> str:
    """Argparse type for models: returns the name in file names."""
    try:
        return model_name(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(error.text.strip()) from error


def model_option(default: str | None, default_note: str = "") -> Any:
    """Define the field ``model`` of a configuration: its value is the model's name in file names."""
    return option(default, f"one of {', '.join(MODELS)}; or {_FORMS}{default_note}", _model, metavar="NAME")


@dataclass(frozen=True)
class ModelConfig:
    """The model and its initial weights.

    Attributes:
        model: A value that ``model_name`` accepts; stored as the name.
        pretrained: False for random weights; True to download the package's weights, ImageNet weights of torchvision
            for vit; or the path of a file with such a state dict.
        init: The path of a file with all weights of the model, such as a checkpoint; None for random weights.

    Raises:
        ArgumentError: The model does not exist, or has no pretrained weights.
        FileError: The model's file is missing or has a syntax error.
    """

    model: str = model_option("resnet50")
    pretrained: bool | str = option(
        False,
        "initialize vit with ImageNet weights, as in the SAMIS paper, or a model of timm or torchvision with that "
        "package's weights: downloaded, or read from FILE; a head for other classes is left out",
        nargs="?",
        const=True,
        metavar="FILE",
        exclusive="weights",
    )
    init: str | None = option(
        None,
        "start from the weights in FILE: a state dict of the model, also with module. prefixes or under a key such "
        "as state_dict, or a checkpoint (default: random weights)",
        metavar="FILE",
        exclusive="weights",
    )

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "model", model_name(self.model))
        if self.pretrained:
            require_weights(self.model)
        if self.pretrained and self.init:
            raise ArgumentError("init", f"{self.init}: cannot be combined with pretrained; give one of them")

    def as_dict(self) -> dict[str, Any]:
        """The settings that determine the initial weights, except the seed, as plain values."""
        given = isinstance(self.pretrained, str)
        return {
            "model": self.model,
            **model_entry(self.model).settings,
            "pretrained": file_digest(self.pretrained) if given else self.pretrained,
            **({"init": file_digest(self.init)} if self.init else {}),
        }


def build_model(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    seed: int,
    pretrained: bool | str | Path = False,
    init: str | Path | None = None,
) -> nn.Module:
    """Build a model on the CPU with weights that depend only on the arguments.

    The global generators are unchanged. Under ``with torch.device("meta")``, the model is built on the meta device,
    with shapes but no weights.

    Args:
        name: A value that ``model_name`` accepts.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        seed: Seed of the initial weights.
        pretrained: False for random weights; True to download pretrained weights; or the path of a file with them.
        init: The path of a file with all weights of the model; None for random weights.

    Returns:
        A float32 model in training mode: a ``Network`` for keys of ``MODELS``, any module for others.

    Raises:
        ArgumentError: The name is unknown, the architecture does not support the sizes, or the model has no
            pretrained weights.
        FileError: The weights cannot be downloaded or read, or do not fit the model; or the user's file fails, or
            builds a model without the right outputs.
    """
    import torch

    entry = model_entry(name)
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if value < 1:
            raise ArgumentError(argument, f"{value}: must be at least 1")
    smallest = entry.smallest(in_channels)
    if image_size < smallest:
        raise ArgumentError(
            "model",
            f"{entry.name}: needs images of at least {smallest}x{smallest} pixels with {in_channels} channels, but "
            f"these are {image_size}x{image_size}; choose an image_size of {smallest} or more, or another model",
        )
    if pretrained:
        require_weights(entry.name)
    sizes = (num_classes, in_channels, image_size)
    build = partial(entry.build, *sizes)
    if pretrained and entry.build_pretrained is not None:
        build = partial(entry.build_pretrained, *sizes, pretrained)
    # The CPU generators are enough: all draws below are on the CPU.
    device = "meta" if torch.empty(0).device.type == "meta" else "cpu"
    with global_generators(seed), torch.device(device):
        network = build()
        if pretrained and entry.pretrain is not None:
            entry.pretrain(network, pretrained)
    if entry.name not in MODELS:
        from src.models.base import make_out_of_place
        from src.models.external import check_outputs

        check_outputs(network, *sizes, model_flag(entry.name), entry.source)
        network = make_out_of_place(network.train())
    if init is not None:
        from src.models.external import load_initial

        load_initial(network, init, entry.name, num_classes)
    return network
