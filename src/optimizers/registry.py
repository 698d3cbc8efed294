"""The optimizers by name. Torch is imported by the builders alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from src.training.config import TrainingConfig

DEFAULT_DELTA = 1.0  # prior precision of iBLR where neither delta nor a weight decay says otherwise


def _one_pass(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """SGD, Adam, AdamW: one pass at the weights."""
    yield


def _sam_passes(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """SAM: one pass at the weights, one at the top of the climb; BatchNorm's statistics follow the first alone."""
    from src.optimizers.sam import frozen_batchnorm

    yield
    with optimizer.climbed(), frozen_batchnorm(model):
        yield


def _sampled_pass(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """iBLR: one pass at weights drawn from the posterior."""
    with optimizer.sampled_params():
        yield


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer, and how the training loop treats it.

    Attributes:
        name: The value of ``--optimizer``.
        build: Makes the optimizer of parameters, the run's settings, and the number of training examples.
        settings: The settings that it reads, beside learning rate and weight decay.
        passes: Yields before each forward and backward pass of a step; a step ends with ``optimizer.step()``.
        needs_sampling: Whether a pass draws its weights.
    """

    name: str
    build: Callable[[list[nn.Parameter], TrainingConfig, int], Optimizer]
    settings: tuple[str, ...] = ()
    passes: Callable[[Optimizer, nn.Module], Iterator[None]] = _one_pass
    needs_sampling: bool = False


def _sgd(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    import torch

    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def _adam(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    import torch

    return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _adamw(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    import torch

    # the weight decay as given: torch's own default is 0.01
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _sam(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    from src.optimizers.sam import SAM

    return SAM(parameters, _sgd(parameters, config, num_examples), config.rho, config.adaptive)


def _iblr(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    from src.optimizers.iblr import IBLR

    delta = config.delta
    if delta is None:
        delta = config.weight_decay * num_examples or DEFAULT_DELTA
    return IBLR(parameters, config.learning_rate, num_examples, delta, config.hess_init)


OPTIMIZERS: dict[str, OptimizerEntry] = {
    entry.name: entry
    for entry in (
        OptimizerEntry("sgd", _sgd, ("momentum", "nesterov")),
        OptimizerEntry("adam", _adam),
        OptimizerEntry("adamw", _adamw),
        OptimizerEntry("sam", _sam, ("momentum", "rho", "adaptive"), _sam_passes),
        OptimizerEntry("iblr", _iblr, ("delta", "hess_init"), _sampled_pass, needs_sampling=True),
    )
}


def build_optimizer(config: TrainingConfig, parameters: Iterable[nn.Parameter], num_examples: int) -> Optimizer:
    """The optimizer of a run.

    Args:
        config: The run's settings. The weight decay is that of the torch optimizer of the name; for iblr it is the
            prior's: delta = weight_decay * num_examples.
        parameters: The model's parameters, on their final device.
        num_examples: The number of training examples.

    Raises:
        UserError: iblr's package is missing.
    """
    return OPTIMIZERS[config.optimizer].build(list(parameters), config, num_examples)
