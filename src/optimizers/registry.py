"""Optimizers and learning rate schedules by name. Only the optimizers' builders import torch.

A schedule is a pure function of the epoch, or of the step. It has no state to save, and works the same for every
optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from src.training.config import TrainingConfig

IBLR_BACKENDS = ("own", "ivon-opt")
DEFAULT_DELTA = 1.0  # prior precision of iBLR if neither delta nor weight decay is given


def _one_pass(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """SGD, Adam, AdamW: one pass at the current weights."""
    yield


def _sam_passes(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """SAM: one pass at the weights, one at the perturbed weights. Only the first updates BatchNorm's statistics."""
    from src.optimizers.sam import batchnorm_layers, frozen_batchnorm

    yield
    if optimizer.batchnorm is None:  # found once, because an optimizer belongs to one model
        optimizer.batchnorm = batchnorm_layers(model)
    with optimizer.climbed(), frozen_batchnorm(optimizer.batchnorm):
        yield


def _sampled_pass(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """iBLR: one pass at weights sampled from the posterior."""
    with optimizer.sampled_params():
        yield


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer, and how the training loop uses it.

    Attributes:
        build: Builds the optimizer from parameters, the run's settings and the number of training examples.
        settings: The settings it uses in addition to learning rate and weight decay.
        passes: Yields before each forward and backward pass of a step; the step ends with ``optimizer.step()``.
        needs_sampling: Whether each pass samples the weights.
    """

    build: Callable[[list[nn.Parameter], TrainingConfig, int], Optimizer]
    settings: tuple[str, ...] = ()
    passes: Callable[[Optimizer, nn.Module], Iterator[None]] = _one_pass
    needs_sampling: bool = False


def torch_optimizer(name: str, parameters: Iterable[nn.Parameter], **settings: Any) -> Optimizer:
    """Build SGD, Adam or AdamW, with the step fused into one kernel if torch supports it.

    State dicts do not record whether the optimizer is fused; any state dict can be loaded. Loaded tensors get the
    memory layout of the parameters, because a fused CPU kernel iterates over their memory in parallel. Gradients
    must have the strides of their parameters, as those from autograd do.

    Args:
        name: ``sgd``, ``adam`` or ``adamw``.
        parameters: The parameters, on their final device and in their final memory format.
        settings: Settings of torch's optimizer.
    """
    import torch

    parameters = list(parameters)
    exact = (torch.float32, torch.float64)  # torch 2.13's fused SGD takes wrong steps in bfloat16 on a CPU
    fused = all(p.device.type in ("cpu", "cuda") and p.dtype in exact for p in parameters)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(parameters, fused=fused or None, **settings)
    if fused:
        optimizer.register_state_dict_post_hook(_forget_fused)
        optimizer.register_load_state_dict_pre_hook(_set_fused)
        optimizer.register_load_state_dict_post_hook(_match_layouts)
        if settings.get("momentum"):
            optimizer.register_step_pre_hook(_start_late_momenta)
    return optimizer


def _forget_fused(optimizer: Optimizer, state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["fused"] = None


def _set_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "foreach": None, "fused": True} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _start_late_momenta(optimizer: Optimizer, *_: Any) -> None:
    """Give parameters whose first gradient comes after the first step a momentum of 0.

    Fused SGD takes buffers of all parameters or of none. A momentum of 0 leads to the same step as none, because
    dampening is 0.
    """
    for group in optimizer.param_groups:
        stepped = [p for p in group["params"] if p.grad is not None]
        late = [p for p in stepped if optimizer.state[p].get("momentum_buffer") is None]
        if 0 < len(late) < len(stepped):
            for p in late:
                optimizer.state[p]["momentum_buffer"] = p.detach().mul(0)


def _match_layouts(optimizer: Optimizer) -> None:
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if name != "step" and value is not None and value.stride() != parameter.stride():
                values[name] = parameter.detach().to(value.dtype, copy=True).copy_(value)


def _sgd(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    return torch_optimizer(
        "sgd",
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def _adam(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    """Build Adam or AdamW. The weight decay is always set, because AdamW's default is 0.01."""
    return torch_optimizer(config.optimizer, parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _sam(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    from src.optimizers.sam import SAM

    return SAM(parameters, _sgd(parameters, config, num_examples), config.rho, config.adaptive)


def _iblr(parameters: list[nn.Parameter], config: TrainingConfig, num_examples: int) -> Optimizer:
    from src.optimizers.iblr import IBLR, IvonOpt

    delta = config.delta
    if delta is None:
        delta = config.weight_decay * num_examples or DEFAULT_DELTA
    kind = IBLR if config.iblr_backend == "own" else IvonOpt
    return kind(parameters, config.learning_rate, num_examples, delta, config.hess_init)


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": OptimizerEntry(_sgd, ("momentum", "nesterov")),
    "adam": OptimizerEntry(_adam),
    "adamw": OptimizerEntry(_adam),
    "sam": OptimizerEntry(_sam, ("momentum", "nesterov", "rho", "adaptive"), _sam_passes),
    "iblr": OptimizerEntry(_iblr, ("delta", "hess_init", "iblr_backend"), _sampled_pass, needs_sampling=True),
}


def build_optimizer(config: TrainingConfig, parameters: Iterable[nn.Parameter], num_examples: int) -> Optimizer:
    """Build the optimizer of a run.

    Args:
        config: The run's settings. For iblr, the weight decay sets the prior: delta = weight_decay * num_examples.
            For other optimizers, it is the torch optimizer's weight decay.
        parameters: The model's parameters, on their final device.
        num_examples: The number of training examples.

    Raises:
        UserError: The package of iBLR's backend is not installed.
    """
    return OPTIMIZERS[config.optimizer].build(list(parameters), config, num_examples)


# ---------------------------------------------------------------------------------------- learning rate schedules


def _half_cosine(position: float) -> float:
    """Half a cosine period, from 1 at position 0 to 0 at position 1."""
    return (1.0 + math.cos(math.pi * position)) / 2.0


def _step(epoch: float, epochs: int) -> float:
    """Divide by ten after each third of the run."""
    return 0.1 ** ((epoch - 1) // math.ceil(epochs / 3))


def _exp(epoch: float, epochs: int) -> float:
    return 0.98 ** (epoch - 1)


def _after_warmup(share: Callable[[float, int], float], epoch: float, epochs: int) -> float:
    """Linear warmup, followed by a schedule computed as if it covered all ``epochs``."""
    warmup = math.ceil(epochs / 40)
    return epoch / warmup if epoch <= warmup else share(epoch - warmup, epochs)


def _warmup_cosine(epoch: float, epochs: int) -> float:
    """Five cycles. Each rises linearly from 1/100 to a peak, which halves each cycle, and then decays by a cosine."""
    length = math.ceil(epochs / 5)
    warmup = math.ceil(length / 10)
    cycle, position = divmod(epoch - 1, length)
    lowest, peak = 0.01, 0.5**cycle
    if position < warmup:
        return lowest + (peak - lowest) * position / warmup
    return lowest + (peak - lowest) * _half_cosine((position - warmup) / (length - warmup))


def _custom(epoch: float, epochs: int) -> float:
    """Feldman and Zhang's triangle (arXiv:2008.03703): up from 0 over the first 15% of epochs, then nearly to 0."""
    up = 15 * epochs // 100
    done = epoch - 1
    return done / up if done < up else 1.0 - (done - up) / (epochs - up)


def _onecycle(epoch: float, epochs: int) -> float:
    """One triangle: up from 0 over the first quarter of the steps, then down to 0.

    Smith and Topin 2019, "Super-convergence" (arXiv:1708.07120).
    """
    done = (epoch - 1) / epochs
    return min(done / 0.25, (1.0 - done) / 0.75)


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule.

    Attributes:
        share: Takes an epoch (from 1) and the number of epochs, and returns the fraction of the base learning rate.
        depends_on_epochs: Whether the rates of past epochs depend on the total number of epochs. If so, a run cannot
            be extended.
        every_step: Whether the rate changes with every step; ``share`` then also takes fractions of epochs. All
            other schedules change it once per epoch.
    """

    share: Callable[[float, int], float]
    depends_on_epochs: bool = True
    every_step: bool = False


SCHEDULES: dict[str, Schedule] = {
    "const": Schedule(lambda epoch, epochs: 1.0, depends_on_epochs=False),
    "step": Schedule(_step),
    "exp": Schedule(_exp, depends_on_epochs=False),
    "cosine": Schedule(lambda epoch, epochs: _half_cosine((epoch - 1) / epochs)),
    "warmup_step": Schedule(lambda epoch, epochs: _after_warmup(_step, epoch, epochs)),
    "warmup_exp": Schedule(lambda epoch, epochs: _after_warmup(_exp, epoch, epochs)),
    "warmup_cosine": Schedule(_warmup_cosine),
    "custom": Schedule(_custom),
    "onecycle": Schedule(_onecycle, every_step=True),
}


def rate(name: str, epoch: int, epochs: int, lr: float, floor: float = 0.0, progress: float = 0.0) -> float:
    """Return the learning rate of an epoch, or of a point in it.

    The rate is ``floor + (lr - floor) * share(epoch, epochs)``. With ``cosine``, this is the annealing of the MPE
    experiments, whose last epoch is one step above the floor.

    Args:
        name: A key of ``SCHEDULES``.
        epoch: The epoch, from 1 to ``epochs``.
        epochs: The number of epochs of the run.
        lr: The base learning rate.
        floor: The minimum learning rate.
        progress: Fraction of the epoch, in [0, 1]; used only by schedules that change the rate every step.

    Returns:
        The learning rate.

    Raises:
        ValueError: The epoch is not in the run.
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch {epoch} is not one of the run's epochs 1 to {epochs}")
    schedule = SCHEDULES[name]
    return floor + (lr - floor) * schedule.share(epoch + progress if schedule.every_step else epoch, epochs)
