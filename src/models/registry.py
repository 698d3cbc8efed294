"""The registry of models and their one builder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from src.errors import FlagError
from src.models.network import Network

Build = Callable[[int, int, int], Network]
Pretrain = Callable[[Network, bool | str | Path], None]


@dataclass(frozen=True)
class ModelEntry:
    """What the project knows about a model.

    Attributes:
        name: The value of ``--model``.
        build: ``(num_classes, in_channels, image_size) -> Network``, drawing from torch's global generator.
        channels_last: Whether float32 training on a CPU measured faster with channels-last memory.
        note: One line for users.
        smallest: The smallest image size, by number of channels, that the architecture takes.
        pretrain: Fills a built model with pre-trained weights; None where there are none.
        initialization: What runs record of the starting weights, where an earlier version of this project drew them
            differently, so that results from before and after are not mixed; None where they never changed.
    """

    name: str
    build: Build
    channels_last: bool
    note: str
    smallest: Callable[[int], int]
    pretrain: Pretrain | None
    initialization: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What the settings of a run contain about the model, besides its name."""
        return {} if self.initialization is None else {"initialization": self.initialization}


MODELS: dict[str, ModelEntry] = {}


def register(
    name: str,
    *,
    note: str,
    channels_last: bool = False,
    smallest: Callable[[int], int] = lambda in_channels: 1,
    pretrain: Pretrain | None = None,
    initialization: str | None = None,
) -> Callable[[Build], Build]:
    """Decorate the function that builds model ``name``; the arguments are those of ``ModelEntry``."""

    def add(build: Build) -> Build:
        MODELS[name] = ModelEntry(name, build, channels_last, note, smallest, pretrain, initialization)
        return build

    return add


def model_names() -> list[str]:
    """The values that ``--model`` takes."""
    return list(MODELS)


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
        name: One of ``model_names()``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        seed: Seed of the initial weights.
        pretrained: False; True for torchvision's ImageNet weights, which are downloaded; or the path of a file that
            holds such a state dict.

    Returns:
        A float32 ``Network`` in training mode.

    Raises:
        FlagError: The name is unknown, the sizes do not suit the architecture, or it has no pre-trained weights.
        FileError: The pre-trained weights cannot be had or do not fit.
    """
    if name not in MODELS:
        raise FlagError(f"--model: there is no {name!r}; choose one of {', '.join(MODELS)}")
    entry = MODELS[name]
    for flag, value in (("num_classes", num_classes), ("--channels", in_channels), ("--image_size", image_size)):
        if value < 1:
            raise FlagError(f"{flag}: {value} is not possible; it must be at least 1")
    smallest = entry.smallest(in_channels)
    if image_size < smallest:
        raise FlagError(
            f"--model {name} takes images of {in_channels} channels from {smallest}x{smallest} pixels on, and these "
            f"are {image_size}x{image_size}; choose --image_size {smallest} or more, or another --model"
        )
    if pretrained and entry.pretrain is None:
        able = ", ".join(other.name for other in MODELS.values() if other.pretrain)
        raise FlagError(f"--pretrained: there are no weights for --model {name}; only for {able}")
    # Only the CPU's generator is forked and seeded: every draw below is the CPU's.
    place = "meta" if torch.empty(0).device.type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(place):
        torch.default_generator.manual_seed(seed)
        network = entry.build(num_classes, in_channels, image_size)
        if pretrained and entry.pretrain is not None:
            entry.pretrain(network, pretrained)
    return network
