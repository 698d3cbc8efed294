"""The two ways of training the members of an ensemble: stacked, or one after another."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.models.base import copy_tensor, eval_mode, load_optimizer, load_weights
from src.training.stacked import Stack, StackedBatch, StackedNetwork, StackedPerceptron, perceptron_layers

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam and AdamW, torch's defaults
OPTIMIZERS = ("sgd", "adam", "adamw")


class StackedMembers:
    """All members at once: parameters and the optimiser's moments are stacked along a first axis.

    The updates are those of ``torch.optim.SGD`` (with momentum), ``Adam`` and ``AdamW``, in place.

    Args:
        model: The network, for this object alone.
        count: M.
        l2: ``(M,)``, float64.
        optimizer: One of ``OPTIMIZERS``.
        momentum: Of sgd.
    """

    def __init__(self, model: nn.Module, count: int, l2: Tensor, optimizer: str, momentum: float) -> None:
        self._model, self._optimizer, self._momentum = model, optimizer, momentum
        layers = perceptron_layers(self._model)
        self._network = StackedNetwork(self._model) if layers is None else StackedPerceptron(layers)
        self._parameters = {
            name: value.detach().expand(count, *value.shape).clone(memory_format=torch.contiguous_format)
            for name, value in self._model.named_parameters()
        }
        kinds = ("momentum",) if optimizer == "sgd" else ("first", "second")
        self._moments = {kind: _zeros_like(self._parameters) for kind in kinds}
        device = next(iter(self._parameters.values())).device
        self._steps = torch.zeros(count, dtype=torch.float64, device=device)
        # equal ones enter the update as a number, which is faster than a factor for each member
        self._l2 = float(l2[0]) if bool((l2 == l2[0]).all()) else l2.to(device)

    def step(self, batch: StackedBatch, lr: float, rows: Tensor | None) -> Tensor:
        """One step of the members ``rows`` (all if None), to whom the batch belongs; their losses."""
        parameters, moments, steps, l2 = self._parameters, self._moments, self._steps, self._l2
        if rows is not None:  # rare: copies of these members' rows, stepped and put back
            parameters, steps = _take(parameters, rows), steps[rows]
            moments = {kind: _take(values, rows) for kind, values in moments.items()}
            l2 = l2 if isinstance(l2, float) else l2[rows]
        steps += 1
        if self._optimizer == "sgd":
            losses = self._sgd(parameters, moments["momentum"], batch, lr, l2)
        else:
            losses = self._adam(parameters, moments, steps, batch, lr, l2)
        if rows is not None:
            self._steps[rows] = steps
            _put(self._parameters, rows, parameters)
            for kind, values in moments.items():
                _put(self._moments[kind], rows, values)
        return losses

    def _sgd(self, parameters: Stack, momentum: Stack, batch: StackedBatch, lr: float, l2: float | Tensor) -> Tensor:
        """``v = momentum v + gradient + l2 w; w = w - lr v``; the gradient goes straight into v."""
        losses = self._network.accumulate(parameters, batch, momentum, self._momentum)
        for name, value in parameters.items():
            value.sub_(_add_scaled(momentum[name], value, l2), alpha=lr)
        return losses

    def _adam(
        self,
        parameters: Stack,
        moments: Mapping[str, Stack],
        steps: Tensor,
        batch: StackedBatch,
        lr: float,
        l2: float | Tensor,
    ) -> Tensor:
        """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), each member with its count of steps."""
        gradients = _zeros_like(parameters)
        losses = self._network.accumulate(parameters, batch, gradients, 0.0)
        scale = lr / (1.0 - BETAS[0] ** steps)  # (M,)
        root = (1.0 - BETAS[1] ** steps).sqrt()
        for name, value in parameters.items():
            gradient, first, second = gradients[name], moments["first"][name], moments["second"][name]
            if self._optimizer == "adam":
                _add_scaled(gradient, value, l2)
            else:
                value.mul_(1.0 - lr * (l2 if isinstance(l2, float) else _column(l2, value)))
            first.lerp_(gradient, 1.0 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
            spread = torch.sqrt(second, out=gradient).div_(_column(root, value)).add_(EPS)
            value.sub_(torch.div(first, spread, out=gradient).mul_(_column(scale, value)))
        return losses

    def logits(self, images: Tensor, *, shared: bool) -> Tensor:
        """Logits ``(M, b, C)``."""
        return self._network.logits(self._parameters, images, shared=shared)

    def member(self, number: int) -> dict[str, Tensor]:
        """The state dict of one member."""
        with torch.no_grad():  # through the network, whose state dict names a parameter with two owners twice
            for name, value in self._model.named_parameters():
                value.copy_(self._parameters[name][number])
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    def finite(self) -> Tensor:
        """Whether all parameters of each member are finite, ``(M,)``."""
        return torch.stack([value.flatten(1).isfinite().all(1) for value in self._parameters.values()]).all(0)

    def state(self) -> dict[str, Any]:
        """What the next step depends on, copied to the CPU."""
        return {
            "parameters": {name: value.to("cpu", copy=True) for name, value in self._parameters.items()},
            "moments": {
                kind: {name: value.to("cpu", copy=True) for name, value in values.items()}
                for kind, values in self._moments.items()
            },
            "steps": self._steps.to("cpu", copy=True),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        pairs = [(self._parameters, state["parameters"])]
        pairs += [(values, state["moments"][kind]) for kind, values in self._moments.items()]
        for ours, theirs in pairs:
            for name, value in ours.items():
                copy_tensor(name, value, theirs[name])
        copy_tensor("steps", self._steps, state["steps"])


class SequentialMembers:
    """One member after another, each a copy of the network with torch's own optimiser; any network will do.

    The arguments are those of ``StackedMembers``.
    """

    def __init__(self, model: nn.Module, count: int, l2: Tensor, optimizer: str, momentum: float) -> None:
        self._models = [copy.deepcopy(model).train() for _ in range(count)]
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        more = {"momentum": momentum} if optimizer == "sgd" else {}
        self._optimizers = [
            kinds[optimizer](member.parameters(), lr=0.0, weight_decay=decay, **more)
            for member, decay in zip(self._models, l2.tolist(), strict=True)
        ]

    def step(self, batch: StackedBatch, lr: float, rows: Tensor | None) -> Tensor:
        """As of ``StackedMembers``."""
        losses = []
        for place, number in enumerate(range(len(self._models)) if rows is None else rows.tolist()):
            images = batch.images if batch.shared else batch.images[place]
            labels, shares = batch.labels[place], batch.shares
            if isinstance(shares, Tensor):  # an example that does not count must not enter BatchNorm either
                counting = shares[place].nonzero().squeeze(1)
                images, labels, shares = images[counting], labels[counting], shares[place][counting]
            losses.append(self._step_one(number, images, labels, shares, lr))
        return torch.stack(losses)

    def _step_one(self, number: int, images: Tensor, labels: Tensor, shares: Tensor | float, lr: float) -> Tensor:
        optimizer = self._optimizers[number]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = (nn.functional.cross_entropy(self._models[number](images), labels, reduction="none") * shares).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def logits(self, images: Tensor, *, shared: bool) -> Tensor:
        """Logits ``(M, b, C)``."""
        found = []
        for number, member in enumerate(self._models):
            with eval_mode(member), torch.no_grad():
                found.append(member(images if shared else images[number]))
        return torch.stack(found)

    def member(self, number: int) -> dict[str, Tensor]:
        """The state dict of one member."""
        return {name: value.clone() for name, value in self._models[number].state_dict().items()}

    def finite(self) -> Tensor:
        """Whether all parameters of each member are finite, ``(M,)``."""
        return torch.stack(
            [torch.stack([value.isfinite().all() for value in member.parameters()]).all() for member in self._models]
        )

    def state(self) -> dict[str, Any]:
        """What the next step depends on, copied to the CPU."""
        pairs = zip(self._models, self._optimizers, strict=True)
        return {"members": [_on_cpu([member.state_dict(), optimizer.state_dict()]) for member, optimizer in pairs]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for member, optimizer, (weights, steps) in zip(self._models, self._optimizers, state["members"], strict=True):
            load_weights(member, weights)
            load_optimizer(optimizer, steps)


def _zeros_like(values: Stack) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in values.items()}


def _take(values: Stack, rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def _put(values: Stack, rows: Tensor, new: Stack) -> None:
    for name, value in values.items():
        value[rows] = new[name]


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    """``(M,)`` as a factor of ``(M, ...)``, in its type."""
    return numbers.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _add_scaled(target: Tensor, value: Tensor, scale: float | Tensor) -> Tensor:
    """``target + scale * value`` in place, the scale one number or one of each member."""
    if isinstance(scale, Tensor):
        return target.addcmul_(value, _column(scale, value))
    return target.add_(value, alpha=scale) if scale else target


def _on_cpu(value: Any) -> Any:
    """A copy with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return [_on_cpu(entry) for entry in value] if isinstance(value, list | tuple) else value
