"""Modes of a network: eval mode for a while, and what its training mode can do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode; on leaving, give each the mode it had.

    Args:
        model: the network. Modules that were already in eval mode (frozen BatchNorm) stay so afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def trains_on_one(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether a network can be trained on a single image, which BatchNorm of single values per channel cannot.

    Buffers, modes and random numbers are left as they were.

    Args:
        model: the network.
        image_shape: (c, h, w).
    """
    first = next(model.parameters())
    probe = torch.zeros(1, *image_shape, dtype=first.dtype, device=first.device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(probe)
    except ValueError:
        return False
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training
    return True
