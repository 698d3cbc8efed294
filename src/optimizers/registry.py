"""The optimisers by name. Torch is imported by the builders alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.errors import ArgumentError, FlagError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

DEFAULT_DELTA = 1.0  # prior precision of iBLR where neither delta nor a weight decay says otherwise
DEFAULT_HESS_INIT = 0.1  # the MPE experiments' choice


@dataclass(frozen=True)
class OptimizerSettings:
    """What `build_optimizer` was asked for; each builder reads what concerns it."""

    lr: float
    momentum: float
    weight_decay: float
    rho: float
    adaptive: bool
    num_examples: int | None
    delta: float | None
    hess_init: float | None
    nesterov: bool


@dataclass(frozen=True)
class OptimizerEntry:
    """How the training loop treats an optimiser.

    Attributes:
        name: The value of ``--optimizer``.
        build: Makes the optimiser.
        passes: Forward and backward passes per batch; with 2, the first lies before ``first_step``.
        needs_sampling: Whether the pass runs inside ``sampled_params()``.
        has_nesterov: Whether its momentum can be Nesterov's.
    """

    name: str
    build: Callable[[list[nn.Parameter], OptimizerSettings], Optimizer]
    passes: int = 1
    needs_sampling: bool = False
    has_nesterov: bool = False


def _sgd(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    import torch

    return torch.optim.SGD(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )


def _adam(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    import torch

    return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    import torch

    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _sam(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    from src.optimizers.sam import SAM

    return SAM(parameters, lambda params: _sgd(params, settings), settings.rho, settings.adaptive)


def _iblr(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    from src.optimizers.iblr import IBLR

    if settings.num_examples is None:
        raise ValueError("iblr needs num_examples, the number of training examples")
    delta = settings.delta
    if delta is not None and settings.weight_decay > 0.0:
        raise FlagError(
            "delta and weight_decay both set the prior of iblr; give one of them",
            "--delta and --weight_decay both set the prior of iblr; give one of them",
        )
    if delta is None:
        delta = settings.weight_decay * settings.num_examples or DEFAULT_DELTA
    hess_init = DEFAULT_HESS_INIT if settings.hess_init is None else settings.hess_init
    return IBLR(parameters, settings.lr, settings.num_examples, delta, hess_init)


OPTIMIZERS: dict[str, OptimizerEntry] = {
    entry.name: entry
    for entry in (
        OptimizerEntry("sgd", _sgd, has_nesterov=True),
        OptimizerEntry("adam", _adam),
        OptimizerEntry("adamw", _adamw),
        OptimizerEntry("sam", _sam, passes=2),
        OptimizerEntry("iblr", _iblr, needs_sampling=True),
    )
}


def optimizer_names() -> list[str]:
    """The names of all optimisers."""
    return list(OPTIMIZERS)


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    rho: float = 0.05,
    adaptive: bool = False,
    num_examples: int | None = None,
    delta: float | None = None,
    hess_init: float | None = None,
    nesterov: bool = False,
) -> Optimizer:
    """Build an optimiser by name.

    Args:
        name: A name from `OPTIMIZERS`.
        parameters: The model's parameters, on their final device.
        lr: The base learning rate.
        momentum: Of sgd, and of the SGD inside sam.
        weight_decay: As the torch optimiser of that name defines it, taken as given also for adamw (where torch's own
            default is 0.01). For iblr it is the prior's: delta = weight_decay * num_examples.
        rho: Radius of sam.
        adaptive: Whether sam scales its climb by the weights.
        num_examples: Number of training examples (iblr).
        delta: Prior precision of iblr. Without it and without weight decay: 1.
        hess_init: Initial Hessian of iblr, default 0.1.
        nesterov: Whether the momentum of sgd is Nesterov's (Sutskever et al. 2013, as torch has it).

    Returns:
        The optimiser.

    Raises:
        FlagError: If the name is unknown or a number is out of its range.
        UserError: If iblr's package is missing.
        ValueError: If iblr is built without ``num_examples``.
    """
    if name not in OPTIMIZERS:
        raise ArgumentError("optimizer", f"{name!r}: unknown; choose from {', '.join(OPTIMIZERS)}")
    _check("lr", lr, above=0.0, flag="--learning_rate")
    _check("momentum", momentum, at_least=0.0, below=1.0)
    _check("weight_decay", weight_decay, at_least=0.0)
    _check("rho", rho, at_least=0.0)
    _check("delta", delta, above=0.0)
    _check("hess_init", hess_init, above=0.0)
    if delta is not None and not OPTIMIZERS[name].needs_sampling:
        raise ArgumentError("delta", f": is the prior precision of iblr; leave it out with {name}")
    if nesterov and not OPTIMIZERS[name].has_nesterov:
        able = ", ".join(entry.name for entry in OPTIMIZERS.values() if entry.has_nesterov)
        raise ArgumentError("nesterov", f": is a momentum of {able} alone; leave it out with {name}")
    if nesterov and momentum == 0.0:
        raise ArgumentError("nesterov", ": needs a momentum above 0; give one, or leave it out")
    settings = OptimizerSettings(lr, momentum, weight_decay, rho, adaptive, num_examples, delta, hess_init, nesterov)
    return OPTIMIZERS[name].build(list(parameters), settings)


def _check(
    name: str,
    value: float | None,
    *,
    flag: str | None = None,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    if value is None or (above < value < below and value >= at_least):
        return
    limits = {"greater than": above, "at least": at_least, "below": below}
    wanted = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))
    raise ArgumentError(name, f"{value}: must be a finite number {wanted}", flag)
