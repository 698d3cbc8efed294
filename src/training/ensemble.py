"""Ensembles: many copies of one model trained in parallel, each on its own batches."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from src.datasets import Batch
from src.devices import upload
from src.models.base import Network, copy_tensor, eval_mode, load_optimizer, load_weights
from src.optimizers import torch_optimizer
from src.training.stacked import Stack, StackedBatch, StackedNetwork, StackedPerceptron, perceptron_layers

LONG_STEP = 200_000_000  # parameters times examples per step; above this, vectorizing hardly helps on a CPU
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults for Adam and AdamW
ENSEMBLE_OPTIMIZERS = ("sgd", "adam", "adamw")


class Ensemble:
    """M copies of one model, trained in parallel.

    Each member is trained as by ``torch.optim.SGD`` (with momentum), ``Adam`` or ``AdamW`` on its own batches, with
    its own L2 weight. The objective of member m on a batch is ``sum(w l) / sum(w) + l2[m] / 2 * |parameters|^2``,
    including all parameters. With adamw, the L2 weight is decoupled, like torch's ``weight_decay``.

    Args:
        model: The model, on the device and in the dtype to train in. It is copied, not modified. All of its
            parameters are trained.
        count: Number of members M.
        l2: The L2 weights ``(M,)``, or one for all members.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        momentum: Momentum of sgd.
        vectorised: Whether to step all members at once, with stacked parameters. Otherwise members are stepped one
            after another by torch's optimizers. The weights agree up to rounding.
        initial: The initial state dict of all members, or one for each; None for the model's.

    Attributes:
        vectorised: As given.
        device: The members' device.

    Raises:
        ValueError: An argument is out of range, or the model cannot be vectorized.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        *,
        l2: Tensor | float = 0.0,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        vectorised: bool = True,
        initial: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"an ensemble of {count} members; give at least 1")
        if optimizer not in ENSEMBLE_OPTIMIZERS:
            raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(ENSEMBLE_OPTIMIZERS)}")
        weights = torch.as_tensor(l2, dtype=torch.float64).cpu()
        if weights.shape not in ((), (count,)) or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"l2 must be one finite number of at least 0, or one for each of {count} members")
        frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
        if frozen:
            raise ValueError(f"an ensemble trains all parameters, but {frozen[0]} does not require gradients")
        if vectorised and (reason := why_not_vectorised(model)):
            raise ValueError(f"this model cannot be trained as a vectorised ensemble: {reason}")
        model = copy.deepcopy(model)
        if isinstance(initial, Mapping):
            model.load_state_dict(initial)
        kind = StackedMembers if vectorised else SequentialMembers
        self._members = kind(model, count, weights.expand(count), optimizer, momentum)
        if initial is not None and not isinstance(initial, Mapping):
            if len(initial) != count:
                raise ValueError(f"{len(initial)} initial state dicts for {count} members")
            self._members.load(initial)
        self.vectorised, self.device, self._count = vectorised, next(model.parameters()).device, count

    def __len__(self) -> int:
        return self._count

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        lr: float,
        active: Tensor | None = None,
    ) -> Tensor:
        """Take one step of every active member.

        Args:
            images: ``(M, b, ...)`` with separate images per member, or ``(b, ...)`` shared by all members. Shared if
                and only if ``labels`` is 1-D.
            labels: int64 ``(M, b)``, or ``(b,)`` shared by all members.
            weights: ``(M, b)``, 0 for padding; a member's loss is ``sum(w l) / sum(w)``. None for all 1. Fastest on
                the members' device if they are vectorized, else on the CPU.
            lr: The learning rate.
            active: Boolean ``(M,)``, fastest on the CPU. Members that are not active do not change: neither weights,
                moments nor step counts. A member whose weights are all 0 must not be active. None for all active.

        Returns:
            The members' losses ``(M,)``, before the step and without the L2 term; 0 for inactive members.

        Raises:
            ValueError: The shapes do not match.
        """
        shared = labels.ndim == 1
        examples = labels.shape[-1]
        expected = (examples,) if shared else (self._count, examples)
        if tuple(labels.shape) != expected or tuple(images.shape[: labels.ndim]) != expected:
            raise ValueError(
                f"images {tuple(images.shape)} and labels {tuple(labels.shape)} do not match {self._count} members"
            )
        if weights is not None and tuple(weights.shape) != (self._count, examples):
            raise ValueError(f"weights have shape {tuple(weights.shape)}, expected {(self._count, examples)}")
        rows = numbers = None  # the active members, on their device and as given
        labels = labels.expand(self._count, examples)
        if active is not None and not bool(active.all()):
            numbers = active.nonzero().squeeze(1)
            rows = upload(numbers, self.device)
            if not len(rows):
                return images.new_zeros(self._count)
            images, labels = images if shared else images[rows], labels[rows]
            if weights is not None:
                weights = weights[(rows if self.vectorised else numbers).to(weights.device)]
        shares: Tensor | float = 1.0 / max(examples, 1)
        if weights is not None:
            weights = weights.to(self.device if self.vectorised else weights.device, images.dtype)
            shares = weights / weights.sum(1, keepdim=True)
        batch = StackedBatch(images, labels, shares, shared)
        losses = self._members.step(batch, lr, rows if self.vectorised else numbers)
        return losses if rows is None else losses.new_zeros(self._count).index_copy_(0, rows, losses)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(M, b, C)`` of all members on the same images ``(b, ...)``, in eval mode."""
        return self._members.logits(images, shared=True)

    def member_logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(M, b, C)`` of each member on its own images ``(M, b, ...)``, in eval mode."""
        if len(images) != self._count:
            raise ValueError(f"got images for {len(images)} members; the ensemble has {self._count}")
        return self._members.logits(images, shared=False)

    def member(self, number: int) -> dict[str, Tensor]:
        """Return a copy of the state dict of member ``number``, from 0."""
        return self._members.member(range(self._count)[number])

    def finite(self) -> Tensor:
        """Return whether each member's weights are all finite, boolean ``(M,)``."""
        return self._members.finite()

    def state(self) -> dict[str, Any]:
        """Return a copy of everything that the next step depends on, as CPU tensors and plain values."""
        return {"vectorised": self.vectorised, "count": self._count, **self._members.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state``.

        Raises:
            ValueError: The state is from an ensemble of a different kind or size.
        """
        if (state.get("vectorised"), state.get("count")) != (self.vectorised, self._count):
            raise ValueError("the state is from an ensemble of a different kind or size")
        try:
            self._members.restore(dict(state))
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the state does not fit this ensemble ({str(error).splitlines()[0]})") from error


def why_not_vectorised(model: nn.Module, images: Tensor | None = None) -> str | None:
    """Return why copies of a model cannot be stacked, or None if they can.

    Members share buffers and run in one pass, whereas batch statistics and dropout need one pass per member.

    Args:
        model: The model.
        images: A few images to try a model on that is not a ``Network``; None for no trial.
    """
    seen = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in seen:  # torch.func.functional_call would leave the members' weights in it
            return f"{name} is a module that occurs twice"
        seen.add(module)
        if isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats):
            return f"{name} keeps running statistics"
        drops = getattr(module, "p", 0.0) if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(drops, float) and drops > 0.0:
            return f"{name} draws random numbers"
    if images is None or isinstance(model, Network):
        return None
    parameters = dict(model.named_parameters())
    if frozen := [name for name, value in parameters.items() if not value.requires_grad]:
        return f"{frozen[0]} is not trained"
    like = next(iter(parameters.values()))
    pair = {name: torch.stack([value.detach()] * 2) for name, value in parameters.items()}
    try:
        with eval_mode(model):
            StackedNetwork(model).logits(pair, images.to(like).expand(2, *images.shape), shared=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return "the forward pass does not support torch.vmap"
    return None


def stack_batches(batches: Sequence[Batch | None]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Stack one batch of every member, padded with zeros of weight 0 where members differ in size.

    Args:
        batches: One batch per member, or None if it has no more.

    Returns:
        Images ``(m, b, ...)``, labels ``(m, b)``, and ``weights`` and ``active`` of ``Ensemble.step``.
    """
    counts = [0 if batch is None else len(batch.labels) for batch in batches]
    longest = max(counts)
    if min(counts) == longest:
        return (
            torch.stack([each.images for each in batches]),
            torch.stack([each.labels for each in batches]),
            None,
            None,
        )
    like = batches[counts.index(longest)]
    images = like.images.new_zeros(len(batches), *like.images.shape)
    labels = like.labels.new_zeros(len(batches), longest)
    for row, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        if count:
            images[row, :count], labels[row, :count] = batch.images, batch.labels
    held = torch.tensor(counts)
    weights = (torch.arange(longest) < held[:, None]).to(like.images.device)
    return images, labels, weights, held > 0


def vectorised_is_faster(model: nn.Module, device: torch.device | str, batch_size: int) -> bool:
    """Whether vectorizing is expected to be faster: always on a GPU, and on a CPU for perceptrons with short steps.

    Measured on one CPU thread with ``python -m benchmarks.training ensemble``, against the faster of fused SGD for
    one model after another and ``vmap(grad)``: perceptrons, whose gradients are hand-written, gain more the shorter
    the step (small_mlp 1.9 times at batch 32, 1.3 at 1024; large_mlp 1.2 times at 32, 1.05 at 256). If parameters
    times batch size exceed ``LONG_STEP``, almost nothing is gained (large_mlp at 512: 1.02). Under ``vmap``,
    convolutions become grouped convolutions, which are slower (lenet 0.93 times as fast at batch 32, 0.71 at 256).
    Not measured on a GPU: launching a small model's kernels is expected to take longer than running them, so M
    members in one launch cost little more than one; convolutions may be an exception there, too.

    Args:
        model: The model.
        device: The device to train on.
        batch_size: Examples per step of each member.
    """
    if why_not_vectorised(model) is not None:
        return False
    if torch.device(device).type != "cpu":
        return True
    parameters = sum(value.numel() for value in model.parameters())
    return perceptron_layers(model) is not None and parameters * batch_size <= LONG_STEP


# ------------------------------------------------------------------------------------ implementations


class StackedMembers:
    """Steps all members at once, with parameters and optimizer moments stacked along a first axis.

    The updates are those of ``torch.optim.SGD`` (with momentum), ``Adam`` and ``AdamW``, in place.

    Args:
        model: The model; this object takes ownership of it.
        count: Number of members M.
        l2: L2 weights ``(M,)``, float64.
        optimizer: One of ``ENSEMBLE_OPTIMIZERS``.
        momentum: Momentum of sgd.
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
        # equal weights are applied as one scalar, which is faster than one factor per member
        self._l2 = float(l2[0]) if bool((l2 == l2[0]).all()) else l2.to(device)

    def step(self, batch: StackedBatch, lr: float, rows: Tensor | None) -> Tensor:
        """Take one step of the members ``rows`` (all if None), on their batch; return their losses."""
        parameters, moments, steps, l2 = self._parameters, self._moments, self._steps, self._l2
        if rows is not None:  # rare: copy these members' rows, step them, and write them back
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
        """``v = momentum v + gradient + l2 w; w = w - lr v``. The gradient is accumulated directly into v."""
        losses = self._network.accumulate(parameters, batch, momentum, self._momentum)
        velocities, weights = [momentum[name] for name in parameters], list(parameters.values())
        if isinstance(l2, Tensor):
            torch._foreach_addcmul_(velocities, weights, [_column(l2, value) for value in weights])
        elif l2:
            torch._foreach_add_(velocities, weights, alpha=l2)
        torch._foreach_add_(weights, velocities, alpha=-lr)
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
        """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), with a step count per member."""
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
        """Return logits ``(M, b, C)``."""
        return self._network.logits(self._parameters, images, shared=shared)

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the weights of all members, given their state dicts."""
        for name, value in self._parameters.items():
            for number, state in enumerate(states):
                value[number].copy_(state[name])

    def member(self, number: int) -> dict[str, Tensor]:
        """Return the state dict of one member."""
        with torch.no_grad():  # through the model: its state dict lists a shared parameter under each of its names
            for name, value in self._model.named_parameters():
                value.copy_(self._parameters[name][number])
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    def finite(self) -> Tensor:
        """Return whether each member's parameters are all finite, boolean ``(M,)``."""
        return torch.stack([value.flatten(1).isfinite().all(1) for value in self._parameters.values()]).all(0)

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, copied to the CPU."""
        return _on_cpu({"parameters": self._parameters, "moments": self._moments, "steps": self._steps})

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state returned by ``state``."""
        pairs = [(self._parameters, state["parameters"])]
        pairs += [(values, state["moments"][kind]) for kind, values in self._moments.items()]
        for ours, theirs in pairs:
            for name, value in ours.items():
                copy_tensor(name, value, theirs[name])
        copy_tensor("steps", self._steps, state["steps"])


class SequentialMembers:
    """Steps members one after another, each with its own torch optimizer. Works for any model.

    Takes the same arguments as ``StackedMembers``.
    """

    def __init__(self, model: nn.Module, count: int, l2: Tensor, optimizer: str, momentum: float) -> None:
        self._models = [copy.deepcopy(model).train() for _ in range(count)]
        more = {"momentum": momentum} if optimizer == "sgd" else {}
        self._optimizers = [
            torch_optimizer(optimizer, member.parameters(), lr=0.0, weight_decay=decay, **more)
            for member, decay in zip(self._models, l2.tolist(), strict=True)
        ]

    def step(self, batch: StackedBatch, lr: float, rows: Tensor | None) -> Tensor:
        """See ``StackedMembers.step``."""
        losses = []
        for position, number in enumerate(range(len(self._models)) if rows is None else rows.tolist()):
            images = batch.images if batch.shared else batch.images[position]
            labels, shares = batch.labels[position], batch.shares
            if isinstance(shares, Tensor):  # examples of zero weight must not enter BatchNorm statistics either
                counting = shares[position].nonzero().squeeze(1)
                shares = upload(shares[position][counting], labels.device)
                counting = upload(counting, labels.device)
                images, labels = images[counting], labels[counting]
            model, optimizer = self._models[number], self._optimizers[number]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss = (nn.functional.cross_entropy(model(images), labels, reduction="none") * shares).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def logits(self, images: Tensor, *, shared: bool) -> Tensor:
        """Return logits ``(M, b, C)``."""
        found = []
        for number, member in enumerate(self._models):
            with eval_mode(member), torch.no_grad():
                found.append(member(images if shared else images[number]))
        return torch.stack(found)

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """See ``StackedMembers.load``."""
        for member, state in zip(self._models, states, strict=True):
            member.load_state_dict(state)

    def member(self, number: int) -> dict[str, Tensor]:
        """Return the state dict of one member."""
        return {name: value.clone() for name, value in self._models[number].state_dict().items()}

    def finite(self) -> Tensor:
        """Return whether each member's parameters are all finite, boolean ``(M,)``."""
        return torch.stack(
            [torch.stack([value.isfinite().all() for value in member.parameters()]).all() for member in self._models]
        )

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, copied to the CPU."""
        pairs = zip(self._models, self._optimizers, strict=True)
        return {"members": [_on_cpu([member.state_dict(), optimizer.state_dict()]) for member, optimizer in pairs]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state returned by ``state``."""
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
    """Reshape ``(M,)`` to broadcast over ``(M, ...)``, in the same dtype."""
    return numbers.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _add_scaled(target: Tensor, value: Tensor, scale: float | Tensor) -> Tensor:
    """Compute ``target + scale * value`` in place; the scale is a number or one number per member."""
    if isinstance(scale, Tensor):
        return target.addcmul_(value, _column(scale, value))
    return target.add_(value, alpha=scale) if scale else target


def _on_cpu(value: Any) -> Any:
    """Return a copy with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return [_on_cpu(entry) for entry in value] if isinstance(value, list | tuple) else value
