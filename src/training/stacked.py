"""Losses and gradients of many copies of one model at once, with parameters stacked along a first axis.

Shapes: M members, b examples per batch, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from src.models import Network

Stack = Mapping[str, Tensor]


class StackedBatch(NamedTuple):
    """One batch for M members.

    Attributes:
        images: ``(M, b, ...)`` with separate images per member, or ``(b, ...)`` shared by all members.
        labels: int64 ``(M, b)``.
        shares: Weight of each example in its member's loss, ``(M, b)``, or one number for all.
        shared: Whether all members use the same images.
    """

    images: Tensor
    labels: Tensor
    shares: Tensor | float
    shared: bool


@dataclass(frozen=True)
class _Activation:
    """An in-place elementwise function, and its derivative as a function of its output."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Tanh: _Activation(torch.tanh_, lambda value: 1.0 - value * value),
    nn.ReLU: _Activation(torch.relu_, lambda value: value > 0),
    nn.Sigmoid: _Activation(torch.sigmoid_, lambda value: value * (1.0 - value)),
}


@dataclass(frozen=True)
class _Layer:
    """A linear layer, given by its parameters' names, and the activation after it."""

    weight: str
    bias: str | None
    activation: _Activation | None = None


class StackedNetwork:
    """Copies of any model, through ``vmap``. Autograd differentiates the sum of the members' losses.

    Args:
        model: The model. Its parameters are not used; its buffers are used by every member.
    """

    def __init__(self, model: nn.Module) -> None:
        def call(parameters: Stack, images: Tensor) -> Tensor:
            return functional_call(model, dict(parameters), (images,))

        self._model = model
        self._calls = {shared: vmap(call, in_dims=(0, None if shared else 0)) for shared in (False, True)}

    def logits(self, parameters: Stack, images: Tensor, *, shared: bool) -> Tensor:
        """Return logits ``(M, b, C)`` in eval mode, without gradients."""
        self._model.eval()
        with torch.no_grad():
            return self._calls[shared](parameters, images)

    def accumulate(self, parameters: Stack, batch: StackedBatch, into: Stack, keep: float) -> Tensor:
        """Set ``into = keep * into + gradient``, in place.

        Args:
            parameters: Stacked parameters, each ``(M, ...)``.
            batch: The batch.
            into: Tensors of the same shapes as ``parameters``.
            keep: The factor; 0 overwrites ``into``, even values that are not finite.

        Returns:
            The members' losses ``(M,)``.
        """
        self._model.train()
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            logits = self._calls[batch.shared](leaves, batch.images)  # (M, b, C)
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            losses = (losses.view(batch.labels.shape) * batch.shares).sum(1)  # (M,)
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            _keep(into[name], keep).add_(gradient)
        return losses.detach()


class StackedPerceptron:
    """Copies of a perceptron, with hand-written gradients that the matrix products add to their targets.

    On a CPU this takes half the time of autograd through ``vmap``, because no gradient needs a separate tensor.

    Args:
        layers: The result of ``perceptron_layers``.
    """

    def __init__(self, layers: tuple[_Layer, ...]) -> None:
        self._layers = layers

    def logits(self, parameters: Stack, images: Tensor, *, shared: bool) -> Tensor:
        """Return logits ``(M, b, C)``, without gradients."""
        with torch.no_grad():
            return self._forward(parameters, images, shared)[-1]

    @torch.no_grad()
    def accumulate(self, parameters: Stack, batch: StackedBatch, into: Stack, keep: float) -> Tensor:
        """See ``StackedNetwork.accumulate``."""
        labels, shares = batch.labels, batch.shares
        values = self._forward(parameters, batch.images, batch.shared)
        log_p = values[-1].log_softmax(-1)  # (M, b, C)
        positions = labels.unsqueeze(-1)
        losses = -(log_p.gather(-1, positions).squeeze(-1) * shares).sum(1)  # (M,)
        error = log_p.exp_()
        error.scatter_add_(-1, positions, error.new_full((), -1.0).expand(positions.shape))  # p - onehot(y)
        error.mul_(shares.unsqueeze(-1) if isinstance(shares, Tensor) else shares)
        for position in reversed(range(len(self._layers))):
            layer, inputs = self._layers[position], values[position]
            if layer.activation is not None:
                error = error.mul_(layer.activation.slope(values[position + 1]))
            target = into[layer.weight]  # (M, out, in)
            if position == 0 and batch.shared:
                rows, flat = error.mT.flatten(0, 1), target.flatten(0, 1)  # (M out, b), (M out, in)
                torch.addmm(flat, rows, inputs, beta=keep, out=flat)
            else:
                torch.baddbmm(target, error.mT, inputs, beta=keep, out=target)
            if layer.bias is not None:
                _keep(into[layer.bias], keep).add_(error.sum(1))
            if position:
                error = torch.bmm(error, parameters[layer.weight])
        return losses

    def _forward(self, parameters: Stack, images: Tensor, shared: bool) -> list[Tensor]:
        """Return the input ``(M, b, d)``, or ``(b, d)`` if shared, followed by each layer's activations."""
        values = [images.flatten(1 if shared else 2)]
        for position, layer in enumerate(self._layers):
            inputs, weight = values[-1], parameters[layer.weight]  # (M, b, in), (M, out, in)
            bias = None if layer.bias is None else parameters[layer.bias].unsqueeze(1)  # (M, 1, out)
            if position == 0 and shared:  # one product for all members
                output = (inputs @ weight.flatten(0, 1).mT).unflatten(1, weight.shape[:2]).transpose(0, 1)
                output = output if bias is None else output.add_(bias)
            else:
                output = torch.bmm(inputs, weight.mT) if bias is None else torch.baddbmm(bias, inputs, weight.mT)
            values.append(output if layer.activation is None else layer.activation.apply(output))
        return values


def _keep(target: Tensor, keep: float) -> Tensor:
    """Multiply ``target`` by ``keep`` in place. 0 also clears values that are not finite."""
    return target.mul_(keep) if keep else target.zero_()


def perceptron_layers(model: nn.Module) -> tuple[_Layer, ...] | None:
    """Return the layers of a perceptron that ``StackedPerceptron`` supports, or None for any other model.

    A supported model flattens the images and then applies linear layers. Each but the last is followed by at most one
    tanh, ReLU or sigmoid, and no parameter is used twice.
    """
    steps = _in_order(model)
    if steps is None or len(steps) < 2 or not _flattens(steps[0]):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers: list[_Layer] = []
    for step in steps[1:]:
        if type(step) is nn.Linear:
            bias = None if step.bias is None else names[id(step.bias)]
            layers.append(_Layer(names[id(step.weight)], bias))
        elif type(step) in _ACTIVATIONS and layers and layers[-1].activation is None:
            layers[-1] = replace(layers[-1], activation=_ACTIVATIONS[type(step)])
        elif type(step) is not nn.Identity and not _flattens(step):
            return None
    used = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
    if not layers or layers[-1].activation is not None:
        return None
    # a parameter used twice would need the sum of two gradients
    return tuple(layers) if sorted(used) == sorted(names.values()) else None


def _flattens(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def _in_order(module: nn.Module) -> list[nn.Module] | None:
    """Return the modules that a plain chain calls, in order, or None if the module may do anything else."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if type(module) is Network:
        parts = [module.body, module.head]
    elif type(module) is nn.Sequential:
        parts = list(module)
    else:
        return [module]
    steps: list[nn.Module] = []
    for part in parts:
        chain = _in_order(part)
        if chain is None:
            return None
        steps += chain
    return steps
