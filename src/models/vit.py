"""The vision transformer ViT-B/16, optionally with pretrained weights.

Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words". The layers are torchvision's. Changes:

- Patches are 16x16 pixels of the native image, which is not resized. As with any convolution of stride 16, only full
  patches are used (the top-left 16x16 pixels of a 28x28 image). Images smaller than 16 pixels are zero-padded to 16.
- Dropout 0.1 acts on the attention weights, the output projection of the attention, and the output of the MLP. There
  is none after adding the position embeddings or inside the MLP.
- Linear layers, and each of the three attention projections separately, have Xavier uniform weights and normal biases
  with standard deviation 1e-6. The patch convolution has PyTorch's default initialization.
"""

from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn
from torch.nn import functional as F

from src._torchvision import torchvision
from src.artifacts.io import read_checkpoint
from src.errors import FileError
from src.models.base import Network, center_pad, load_weights

PRETRAINED_CLASSES = 1000


class ViT(Network):
    """A vision transformer whose head takes the normalized class token.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        patch: Height and width of a patch.
        layers: Number of encoder blocks.
        heads: Attention heads per block.
        width: Token width.
        mlp_width: Width of the MLP's hidden layer.
        dropout: Dropout rate; the module docstring lists where it acts.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        patch: int = 16,
        layers: int = 12,
        heads: int = 12,
        width: int = 768,
        mlp_width: int = 3072,
        dropout: float = 0.1,
    ) -> None:
        side = max(image_size // patch, 1) * patch
        encoder = torchvision.models.VisionTransformer(side, patch, layers, heads, width, mlp_width, dropout, dropout)
        encoder.conv_proj = nn.Conv2d(in_channels, width, patch, patch)
        encoder.heads = nn.Identity()
        encoder.encoder.dropout = nn.Identity()
        for block in encoder.encoder.layers:
            block.mlp[2] = nn.Identity()  # the dropout after GELU
        super().__init__(encoder, nn.Linear(width, num_classes))
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                for projection in module.in_proj_weight.chunk(3):  # query, key, value
                    nn.init.xavier_uniform_(projection)
                nn.init.normal_(module.in_proj_bias, std=1e-6)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6)
        self.side, self.pad = side, center_pad(image_size, patch)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the normalized class token ``(n, width)`` of images ``(n, c, h, w)``."""
        return self.body(self.pad(images)[..., : self.side, : self.side])  # full patches only


def resize_positions(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Resize a square grid of position embeddings bilinearly, keeping the class token's embedding unchanged.

    The corners of both grids coincide.

    Args:
        positions: ``(1, 1 + g * g, d)``, the class token first.
        length: The target length, 1 + a square.

    Returns:
        ``(1, length, d)``.

    Raises:
        ValueError: ``positions`` is not a floating-point tensor with three axes.
    """
    if not isinstance(positions, torch.Tensor) or positions.ndim != 3 or not positions.is_floating_point():
        raise ValueError("its position embedding is not a (1, tokens, width) tensor of floating-point numbers")
    if positions.shape[1] == length:
        return positions
    token, grid = positions[:, :1], positions[:, 1:]
    old, new = round(grid.shape[1] ** 0.5), round((length - 1) ** 0.5)
    grid = grid.transpose(1, 2).unflatten(2, (old, old))  # (1, d, g, g)
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


def load_pretrained(network: ViT, source: bool | str | Path) -> None:
    """Load weights with torchvision's names into a vision transformer.

    Position embeddings are resized to the model's grid. The patch convolution is loaded only for three channels, and
    the head only for 1000 classes; otherwise the head is initialized to zero.

    Args:
        network: The model to load the weights into.
        source: True to download torchvision's ``IMAGENET1K_V1`` weights (trained from scratch on ImageNet-1k), or the
            path of a state dict.

    Raises:
        FileError: The weights cannot be downloaded or read, or belong to another architecture.
    """
    state = dict(_download() if source is True else read_checkpoint(source))
    where = "torchvision's vit_b_16 weights" if source is True else str(source)
    own = network.body.state_dict()
    head = {name: state.pop(f"heads.head.{name}", None) for name in ("weight", "bias")}
    try:
        state["encoder.pos_embedding"] = resize_positions(state["encoder.pos_embedding"], network.body.seq_length)
        if network.body.conv_proj.in_channels != 3:
            state.update({name: own[name] for name in ("conv_proj.weight", "conv_proj.bias")})
        load_weights(network.body, state)
        if network.head.out_features == PRETRAINED_CLASSES:
            load_weights(network.head, head)
        else:
            nn.init.zeros_(network.head.weight)
            nn.init.zeros_(network.head.bias)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(
            f"{where} is not a state dict of torchvision's vit_b_16 ({reason}); choose another file"
        ) from error


def _download() -> dict[str, torch.Tensor]:
    try:
        return torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise FileError(
            f"torchvision's vit_b_16 weights could not be downloaded ({error}); give a local state dict with "
            "--pretrained=FILE"
        ) from error


def vit(num_classes: int, in_channels: int, image_size: int) -> Network:
    """ViT-B/16: 12 blocks, 12 heads, width 768, MLP width 3072, learned position embeddings, class-token head."""
    return ViT(num_classes, in_channels, image_size)
