"""Stored tensors, put back where they came from.

``copy_`` and ``load_state_dict`` broadcast, cast integers and drop imaginary parts without a word. What was read
from a file must be of the shape and kind of what it replaces.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def check_tensor(name: str, own: torch.Tensor, stored: Any) -> None:
    """Stop if a stored value cannot take a tensor's place; precisions may differ.

    Raises:
        ValueError: It is no tensor, or of another shape or kind of numbers.
    """
    if not isinstance(stored, torch.Tensor) or stored.layout != torch.strided or stored.is_meta:
        raise ValueError(f"{name} is not a dense tensor")
    if stored.shape != own.shape:
        raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(own.shape)}")
    if (stored.is_floating_point(), stored.is_complex()) != (own.is_floating_point(), own.is_complex()):
        raise ValueError(f"{name} is of {stored.dtype}, not {own.dtype}")


def copy_tensor(name: str, own: torch.Tensor, stored: Any) -> None:
    """Fill a tensor with a stored value.

    Raises:
        ValueError: See ``check_tensor``.
    """
    check_tensor(name, own, stored)
    own.copy_(stored)


def load_weights(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Fill a module with a stored state dict.

    Raises:
        ValueError: A value cannot take its place.
        RuntimeError: A value is missing, or there are others.
    """
    for name, own in module.state_dict().items():
        if name in stored:
            check_tensor(name, own, stored[name])
    module.load_state_dict(stored)
