"""The contract of every model, evaluation mode, and loading stored tensors into models and optimizers.

``copy_`` and ``load_state_dict`` silently broadcast, cast integers and drop imaginary parts. A tensor that was read
from a file must therefore have the shape and the kind of number of the one that it replaces.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; on leaving, restore the mode of each.

    Args:
        model: The model. Modules that were already in evaluation mode (frozen BatchNorm) stay in it.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def trains_on_one(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether a model can be trained on a single image, which BatchNorm of single values per channel cannot.

    Buffers, modes and random states are left unchanged.

    Args:
        model: The model.
        image_shape: (c, h, w).
    """
    first = next(model.parameters())
    probe = torch.zeros(1, *image_shape, dtype=first.dtype, device=first.device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with eval_mode(model), torch.no_grad(), torch.random.fork_rng():
            model.train()(probe)
    except ValueError:
        return False
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return True


def check_tensor(name: str, own: torch.Tensor, stored: Any) -> None:
    """Check that a stored value can replace a tensor; precisions may differ.

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
        ValueError: A value cannot replace the module's.
        RuntimeError: A value is missing or unknown.
    """
    for name, own in module.state_dict().items():
        if name in stored:
            check_tensor(name, own, stored[name])
    module.load_state_dict(stored)


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Fill an optimizer with a stored state of the same form.

    Raises:
        ValueError: A value cannot replace the optimizer's. Other exceptions mean that the state has another form.
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
            elif type(value) in (int, float):  # rates and weight decays change during training
                if type(other) not in (int, float):
                    raise ValueError(f"{name} is not a number")
            elif _plain(other) != _plain(value):
                raise ValueError(f"{name} is not {value}")
    for index, values in stored["state"].items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if value is not None:
                check_tensor(name, torch.zeros(()) if name == "step" else parameters[index], value)


def _plain(value: Any) -> Any:
    """A tuple as a list, which some states contain in its place."""
    return list(value) if isinstance(value, tuple) else value
