"""Restoring stored tensors.

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
        ValueError: It is not a dense tensor, or its shape or kind of number (real, complex, integer) differs.
    """
    if not isinstance(stored, torch.Tensor) or stored.layout != torch.strided or stored.is_meta:
        raise ValueError(f"{name} is not a dense tensor")
    if stored.shape != own.shape:
        raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(own.shape)}")
    if (stored.is_floating_point(), stored.is_complex()) != (own.is_floating_point(), own.is_complex()):
        raise ValueError(f"{name} has type {stored.dtype}, not {own.dtype}")


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


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Fill an optimizer with a stored state of the same form.

    Raises:
        ValueError: A value cannot take its place. Other exceptions mean that the state is of another form.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_optimizer(optimizer.state_dict(), stored, parameters)
    optimizer.load_state_dict(stored)


def _check_optimizer(own: Mapping[str, Any], stored: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
    if "param_groups" not in own:  # SAM's and iBLR's, around the state of another optimizer
        for name, value in own.items():
            if isinstance(value, dict):
                _check_optimizer(value, stored[name], parameters)
            elif type(stored[name]) is not type(value):
                raise ValueError(f"{name} is not like {value}")
        return
    for mine, theirs in zip(own["param_groups"], stored["param_groups"], strict=True):
        for name, value in mine.items():
            other = theirs.get(name, value)  # older versions of torch have fewer settings
            if isinstance(value, torch.Tensor):
                check_tensor(name, value, other)
            elif type(value) in (int, float):  # rates and weight decays change while training goes on
                if type(other) not in (int, float):
                    raise ValueError(f"{name} is not a number")
            elif _plain(other) != _plain(value):
                raise ValueError(f"{name} is not {value}")
    for index, values in stored["state"].items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if value is not None:
                check_tensor(name, torch.zeros(()) if name == "step" else parameters[index], value)


def _plain(value: Any) -> Any:
    """A tuple as a list, which some states hold in its place."""
    return list(value) if isinstance(value, tuple) else value
