"""Ensembles: many copies of one network trained side by side, each on batches of its own."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from src.training.members import OPTIMIZERS, SequentialMembers, StackedMembers
from src.training.stacked import StackedBatch, perceptron_layers

LONG_STEP = 20_000_000  # parameters times examples of a step; beyond, a CPU does not gain for certain


class Ensemble:
    """M copies of one network, trained side by side.

    A member's training is that of ``torch.optim.SGD`` (with momentum), ``Adam`` or ``AdamW`` on its own batches, with
    its own L2 weight. The objective of member m on a batch is ``sum(w l) / sum(w) + l2[m] / 2 * |parameters|^2``,
    all parameters included; with adamw the L2 weight is decoupled, as torch's ``weight_decay``.

    Args:
        model: The network, on its device and of its type; it is copied and left as it is. All of its parameters are
            trained.
        count: M.
        l2: The L2 weights ``(M,)``, or one for all.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        momentum: Of sgd.
        vectorised: Whether all members take a step at once, their parameters stacked; else one after another, by
            torch's own optimisers. The weights agree to rounding.
        initial: The state dict from which all members start; by default the model's own.

    Raises:
        ValueError: An argument is out of its range, or the network cannot be vectorised.
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
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"an ensemble of {count} members; give at least 1")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        weights = torch.as_tensor(l2, dtype=torch.float64).cpu()
        if weights.shape not in ((), (count,)) or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"l2 must be one finite number of at least 0, or one for each of {count} members")
        frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
        if frozen:
            raise ValueError(f"an ensemble trains all parameters, but {frozen[0]} does not require gradients")
        if vectorised and (reason := why_not_vectorised(model)):
            raise ValueError(f"this network cannot be trained as a vectorised ensemble: {reason}")
        model = copy.deepcopy(model)
        if initial is not None:
            model.load_state_dict(initial)
        kind = StackedMembers if vectorised else SequentialMembers
        self._members = kind(model, count, weights.expand(count), optimizer, momentum)
        self._count, self._vectorised = count, vectorised
        self._device = next(model.parameters()).device

    def __len__(self) -> int:
        return self._count

    @property
    def vectorised(self) -> bool:
        """Whether all members take a step at once."""
        return self._vectorised

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        return self._device

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        lr: float,
        active: Tensor | None = None,
    ) -> Tensor:
        """Let every active member take one step.

        Args:
            images: ``(M, b, ...)``, each member its own, or ``(b, ...)`` for all; ``labels`` tells which.
            labels: int64 ``(M, b)``, or ``(b,)`` for all members.
            weights: ``(M, b)``, 0 for padding; a member's loss is ``sum(w l) / sum(w)``. None: all 1.
            lr: The learning rate.
            active: Boolean ``(M,)``, best on the CPU; the others are not stepped at all: neither weights nor moments
                nor counts of steps change. A member whose weights are all 0 must not be active. None: all.

        Returns:
            The members' losses ``(M,)``, before the step and without the L2 term; 0 for those that are not active.

        Raises:
            ValueError: The shapes do not belong together.
        """
        shared = labels.ndim == 1
        examples = labels.shape[-1]
        expected = (examples,) if shared else (self._count, examples)
        if tuple(labels.shape) != expected or tuple(images.shape[: labels.ndim]) != expected:
            raise ValueError(
                f"images {tuple(images.shape)} and labels {tuple(labels.shape)} are no batch of {self._count} members"
            )
        if weights is not None and tuple(weights.shape) != (self._count, examples):
            raise ValueError(f"weights {tuple(weights.shape)} are not {(self._count, examples)}")
        rows = None
        if active is not None and not bool(active.all()):
            rows = active.nonzero().squeeze(1).to(self._device)
            if not len(rows):
                return images.new_zeros(self._count)
        labels = labels.expand(self._count, examples)
        if rows is not None:
            images, labels = images if shared else images[rows], labels[rows]
            weights = weights if weights is None else weights[rows.to(weights.device)]
        shares: Tensor | float = 1.0 / max(examples, 1)
        if weights is not None:
            weights = weights.to(images)
            shares = weights / weights.sum(1, keepdim=True)
        losses = self._members.step(StackedBatch(images, labels, shares, shared), lr, rows)
        return losses if rows is None else losses.new_zeros(self._count).index_copy_(0, rows, losses)

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``(M, b, C)`` of all members on the same images ``(b, ...)``, in evaluation mode."""
        return self._members.logits(images, shared=True)

    def member_logits(self, images: Tensor) -> Tensor:
        """Logits ``(M, b, C)`` of each member on images of its own ``(M, b, ...)``, in evaluation mode."""
        if len(images) != self._count:
            raise ValueError(f"images for {len(images)} members, but there are {self._count}")
        return self._members.logits(images, shared=False)

    def member(self, number: int) -> dict[str, Tensor]:
        """A copy of the state dict of member ``number``, counted from 0."""
        return self._members.member(range(self._count)[number])

    def finite(self) -> Tensor:
        """Whether all weights of each member are finite, boolean ``(M,)``."""
        return self._members.finite()

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors on the CPU and plain values, copied."""
        return {"vectorised": self._vectorised, "count": self._count, **self._members.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``.

        Raises:
            ValueError: It is the state of an ensemble of another kind or size.
        """
        if (state.get("vectorised"), state.get("count")) != (self._vectorised, self._count):
            raise ValueError("the state is of an ensemble of another kind or size")
        try:
            self._members.restore(dict(state))
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the state does not fit this ensemble ({str(error).splitlines()[0]})") from error


def why_not_vectorised(model: nn.Module) -> str | None:
    """Why a network's copies cannot be stacked; None where they can.

    Members share the buffers, and all take part in one pass: batch statistics and dropout need passes of their own.
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
    return None


def vectorised_is_faster(model: nn.Module, device: torch.device | str, batch_size: int) -> bool:
    """Whether to vectorise: on a GPU every network that can be, on a CPU perceptrons at small steps.

    On one thread of a CPU, ``benchmarks/training.py`` measures: perceptrons, whose gradients are written by
    hand, gain while a step is short beside what it takes to call it (small_mlp 4.6 times at batch 32, twice at 256;
    large_mlp 1.6 times at 32). Where parameters times batch exceed ``LONG_STEP`` the gain is not certain any more
    (small_mlp at 1024 and large_mlp at 256: 0.8 to 1.1 from run to run; mlp at 256: 1.2 to 1.5). Convolutions under
    ``vmap`` become grouped ones, which gain nothing and lose at large batches. On a GPU nothing was measured: the
    launch of a small network's kernels is expected to take longer than the kernels, so that M members in one launch
    cost little more than one; convolutions may be the exception there, too.

    Args:
        model: The network.
        device: Where it is trained.
        batch_size: Examples per step of each member.
    """
    if why_not_vectorised(model) is not None:
        return False
    if torch.device(device).type != "cpu":
        return True
    parameters = sum(value.numel() for value in model.parameters())
    return perceptron_layers(model) is not None and parameters * batch_size <= LONG_STEP
