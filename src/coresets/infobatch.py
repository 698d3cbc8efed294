"""InfoBatch (Qin et al., ICLR 2024): as one choice before training, and as published, chosen in each epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from src import rng
from src.cli import number, option
from src.coresets.inputs import CandidateGroup, Method, Needs, Options, Selection, SelectionInputs
from src.lazy import torch

if TYPE_CHECKING:
    from src.training import ProcessGroup

log = logging.getLogger(__name__)


def split_by_mean(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the losses at or above their mean, and of those below it.

    Args:
        losses: ``(m,)``.
    """
    mean = max(losses.mean(), losses.min())  # rounding must not lift the mean of equal losses above them
    mean = min(mean, losses.max())
    return np.flatnonzero(losses >= mean), np.flatnonzero(losses < mean)


def draw(losses: np.ndarray, budget: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The choice in one group.

    Args:
        losses: ``(m,)``.
        budget: k, at most m.
        generator: Draws which.

    Returns:
        Positions ``(k,)`` and weights ``(k,)``.
    """
    high, low = split_by_mean(losses)
    room = budget - len(high)
    if room <= 0:
        return generator.choice(high, budget, replace=False), np.ones(budget)
    if not len(low):
        return high, np.ones(len(high))
    kept = generator.choice(low, room, replace=False)
    return np.concatenate([high, kept]), np.repeat([1.0, len(low) / room], [len(high), room])


def infobatch(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """A static form of InfoBatch (Qin et al., ICLR 2024, eqs. 4-6), by the losses of a pre-trained model.

    In each group: all examples whose loss is at least the group's mean are kept with weight 1; the rest of the
    budget is drawn uniformly, without replacement, from the m below it, each with weight m / kept. So the
    expectation of ``sum w_i g_i`` over the draws is the sum of all gradients. In one epoch that is the published
    method; published, it draws again in each epoch, with losses seen in training.

    Weights are not rescaled to mean 1: they sum to the number of candidates, and the loss of training,
    ``sum(w l) / sum(w)``, does not depend on their scale.

    Where no example below the mean has room, a random part of those above it is kept with weight 1 (all, where the
    budget is as many); the expected gradient then is not the full one, and a warning is logged.

    Args:
        inputs: One layer; its losses are un-augmented, in eval mode.
        groups: The groups.
        options: None is read.
    """
    losses = inputs.layers[0].losses.cpu().numpy()
    generator = rng.numpy_generator(inputs.seed, 0, "infobatch")
    picks, weights, biased = [], [], 0
    for group in groups:
        positions, weight = draw(losses[group.positions], group.budget, generator)
        picks.append(group.positions[positions])
        weights.append(weight)
        biased += bool(group.budget < len(group.positions) and (weight == 1).all())
    if biased:
        log.warning(
            "infobatch: in %d of %d groups the examples of a loss at or above the mean fill the budget; a random "
            "part of them is kept with weight 1, so the expected gradient is not the full one; give a larger "
            "--coreset_fraction",
            biased,
            len(groups),
        )
    return Selection.of(picks, weights)


@dataclass(frozen=True)
class InfoBatchOptions(Options):
    """Options of InfoBatch in each epoch.

    Attributes:
        infobatch_delta: Share of the epochs after which nothing is pruned.
    """

    infobatch_delta: float = option(
        0.875,
        "infobatch_dynamic: share of the epochs after which everything is trained on",
        number(float, 0, 1),
    )


_FIRST_LOSS = 3.0  # of examples not yet seen, the same for all: none lies below the mean
_ROUNDING = 1e-9  # (1 - 0.9) * 10 is a hair below 1; one is kept


class InfoBatchPlan:
    """The epochs of InfoBatch (Qin et al., ICLR 2024).

    With mu the mean of the last seen losses (3 before the first), low = {i : loss_i < mu} and the prune ratio r, an
    epoch visits all others with weight 1, and k = floor((1 - r) |low|) of low, drawn uniformly, with weight
    |low| / k. That is the paper's 1 / (1 - r) up to the floor, and for every |low| makes the expectation of
    sum(w g) over the draws exactly the sum of all gradients: each of low comes with probability k / |low|. So that
    this holds, at least one of low is kept (where the floor is 0); one more is kept where the last batch would be
    too small for BatchNorm. After floor(delta * epochs) epochs all are visited with weight 1 (annealing), also
    where r is 0.

    The loss of a batch is sum(w l) / b, as in the paper: fewer steps, each of the full size.

    Memory: three float64 numbers per example, on ``device``.

    Args:
        indices: Original indices ``(n,)`` of the training examples, in their order.
        prune_ratio: r, the share of low-loss examples left out, in [0, 1).
        epochs: Epochs of the full training.
        seed: Seed of the draws; they are made by original index, so a subset or a resume changes none.
        delta: Share of the epochs that are pruned, in [0, 1].
        device: Where losses are kept: that of training, for several processes.
    """

    divide_by_size = True

    def __init__(
        self,
        indices: torch.Tensor,
        *,
        prune_ratio: float,
        epochs: int,
        seed: int,
        delta: float = 0.875,
        device: torch.device | str = "cpu",
    ) -> None:
        self.prune_ratio, self.seed, self.delta = prune_ratio, seed, delta
        self.pruned_epochs = math.floor(delta * epochs + _ROUNDING)
        self._indices = indices.cpu()
        self._total = int(self._indices.max()) + 1
        self._losses = torch.full((self._total,), _FIRST_LOSS, dtype=torch.float64, device=device)
        self._new = torch.zeros(2, self._total, dtype=torch.float64, device=device)  # this epoch's loss, whether seen

    @property
    def depends_on_epochs(self) -> bool:
        """Whether another number of epochs would have changed the epochs already trained: annealing may move."""
        return self.delta < 1.0 and self.prune_ratio > 0.0

    @property
    def losses(self) -> torch.Tensor:
        """The last seen losses ``(n,)``, float64 on the CPU."""
        return self._losses.cpu()[self._indices]

    def choose(self, epoch: int, fits: Callable[[int], bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions ``(k,)`` of an epoch, ascending, and weights ``(n,)``; see ``EpochPlan``."""
        count = len(self._indices)
        weights = torch.ones(count, dtype=torch.float64)
        losses = self.losses
        mean = losses.numpy().mean()  # numpy's: its bits do not depend on the number of threads
        low = (losses < mean).nonzero()[:, 0]  # (m,)
        if epoch > self.pruned_epochs or not len(low):
            return torch.arange(count), weights
        kept = max(1, math.floor((1.0 - self.prune_ratio) * len(low) + _ROUNDING))
        while kept < len(low) and not fits(count - len(low) + kept):
            kept += 1
        visited = torch.ones(count, dtype=torch.bool)
        visited[low] = False
        chosen = self._draw(low, kept, epoch)
        visited[chosen] = True
        weights[chosen] = len(low) / kept
        return visited.nonzero()[:, 0], weights

    def _draw(self, low: torch.Tensor, kept: int, epoch: int) -> torch.Tensor:
        """``kept`` of the positions ``low``: those of the smallest of one uniform number per original index."""
        numbers = torch.from_numpy(rng.numpy_generator(self.seed, epoch, "infobatch").random(self._total))
        return low[numbers[self._indices[low]].argsort(stable=True)[:kept]]

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Take the losses ``(b,)`` of original indices ``(b,)``."""
        indices = indices.to(self._new.device)
        self._new[0, indices] = losses.to(self._new)
        self._new[1, indices] = 1.0

    def end_epoch(self, group: ProcessGroup) -> None:
        """Take over the losses that any process has seen; each example was visited by one at most."""
        group.sum_([self._new])
        self._losses = torch.where(self._new[1] > 0, self._new[0], self._losses)
        self._new.zero_()

    def state(self) -> dict[str, Any]:
        """The losses, by original index."""
        return {"losses": self._losses.cpu()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        from src.models.base import copy_tensor

        copy_tensor("losses", self._losses, state["losses"])
        self._new.zero_()


METHODS = (
    Method(
        "infobatch",
        infobatch,
        Needs(logits=True),
        paper="Qin et al. 2024",
        equation="all of loss >= mean, and random ones of the m below it, of weight m / kept; once, before training",
        cost="n",
        weighted=True,
    ),
    Method(
        "infobatch_dynamic",
        None,
        Needs(),
        paper="Qin et al. 2024",
        equation="r = 1 - coreset_fraction; each epoch visits all of loss >= mean, and floor((1 - r) m) random ones "
        "of the m below it, of weight m / kept; after delta * epochs all",
        cost="n per epoch",
        weighted=True,
        options=InfoBatchOptions,
    ),
)
