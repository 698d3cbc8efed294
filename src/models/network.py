"""The contract that every model keeps, and what several families share."""

import torch
from torch import nn

# From this size on, vgg19 and inception are torchvision's ImageNet networks.
IMAGENET_SIZE = 224


class Network(nn.Module):
    """A body that embeds images and a last linear layer that classifies them.

    Because ``head`` is the last layer and ``features`` its input, the gradient of a loss with respect to the last
    layer needs no hooks: with embedding ``h`` and error ``e`` it is ``[e (x) h, e]``.

    No operation in a body works in place, and no module is called twice in one pass, so that hooks may keep the
    output of any module.

    Attributes:
        body: Maps images ``(n, c, h, w)`` to embeddings ``(n, d)``.
        head: ``nn.Linear(d, num_classes)``.
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            images: ``(n, c, h, w)``.

        Returns:
            The inputs of ``head``, ``(n, d)``.
        """
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(n, num_classes)`` of images ``(n, c, h, w)``."""
        return self.head(self.features(images))


def stem_padding(in_channels: int) -> int:
    """Padding of a first 3x3 convolution: 3 for one channel, which turns 28x28 into 32x32, else 1."""
    return 3 if in_channels == 1 else 1


def centre_pad(image_size: int, target: int) -> nn.Module:
    """A layer that pads square images with zeros to ``target`` pixels, the odd row and column last."""
    missing = max(target - image_size, 0)
    before, after = missing // 2, missing - missing // 2
    return nn.ZeroPad2d((before, after, before, after)) if missing else nn.Identity()


def make_out_of_place(network: nn.Module) -> nn.Module:
    """Switch off ``inplace`` in every layer that has it, so that hooks see outputs that nobody overwrites."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return network


def kaiming_fan_out_(network: nn.Module) -> nn.Module:
    """Draw the weights of all convolutions from Kaiming's normal (fan out, ReLU) and zero their biases.

    Source: He et al. 2015, "Delving deep into rectifiers"; torchvision's choice for ResNet.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
