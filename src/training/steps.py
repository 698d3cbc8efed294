"""One optimisation step for each kind of optimiser.

A step takes ``passes``, which runs the forward and backward pass on the current batch and leaves the gradients in
place, and returns what the first pass returned: the reported loss and predictions are those of the first pass.
"""

from collections.abc import Callable

import torch
from torch import nn

from src.optimizers import SAM, frozen_batchnorm

Pass = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def plain_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, one_pass: Pass
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGD, Adam, AdamW: one pass, one step."""
    optimizer.zero_grad(set_to_none=True)
    result = one_pass()
    optimizer.step()
    return result


def sam_step(optimizer: SAM, model: nn.Module, one_pass: Pass) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM (Foret et al. 2021): climb by the first gradient, descend by the second, taken at the top.

    BatchNorm's running statistics follow the first pass alone.
    """
    optimizer.zero_grad(set_to_none=True)
    result = one_pass()
    with optimizer.climbed(), frozen_batchnorm(model):
        one_pass()
    optimizer.second_step()
    return result


def sampled_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, one_pass: Pass
) -> tuple[torch.Tensor, torch.Tensor]:
    """IBLR (Lin et al. 2020, as in IVON): one pass at weights drawn from the posterior."""
    with optimizer.sampled_params():
        optimizer.zero_grad(set_to_none=True)
        result = one_pass()
    optimizer.step()
    return result
