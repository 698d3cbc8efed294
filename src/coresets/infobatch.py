"""InfoBatch (Qin et al., ICLR 2024): a static version, selected once before training, and the published version."""

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
    """Split losses into positions at or above their mean and positions below it.

    Args:
        losses: ``(m,)``.
    """
    mean = max(losses.mean(), losses.min())  # rounding must not lift the mean of equal losses above the losses
    mean = min(mean, losses.max())
    return np.flatnonzero(losses >= mean), np.flatnonzero(losses < mean)


def draw(losses: np.ndarray, budget: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Select from one group.

    Args:
        losses: ``(m,)``.
        budget: k, at most m.
        generator: Random generator of the draw.

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
    """A static version of InfoBatch (Qin et al., ICLR 2024, eqs. 4-6), based on the losses of a pre-trained model.

    In each group, all examples whose loss is at least the group's mean are kept with weight 1. The rest of the budget
    is drawn uniformly, without replacement, from the m examples below the mean, each with weight m / kept. The
    expectation of ``sum w_i g_i`` over the draws is therefore the sum of all gradients. This equals one epoch of the
    published method, which draws again in each epoch, with the losses observed during training.

    Weights are not rescaled to mean 1: they sum to the number of candidates, and the training loss,
    ``sum(w l) / sum(w)``, does not depend on their scale.

    If the examples at or above the mean already fill the budget, a random subset of them is kept with weight 1 (all
    of them, if they match the budget). The expected gradient is then not the full gradient, and a warning is logged.

    Args:
        inputs: One layer; its losses are un-augmented, in eval mode.
        groups: The groups of candidates.
        options: Unused.
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
            "infobatch: in %d of %d groups, examples with a loss at or above the mean fill the budget; a random "
            "subset of them is kept with weight 1, so the expected gradient is not the full one; use a larger "
            "--coreset_fraction",
            biased,
            len(groups),
        )
    return Selection.of(picks, weights)


@dataclass(frozen=True)
class InfoBatchOptions(Options):
    """Options of the published InfoBatch, which selects again in each epoch.

    Attributes:
        infobatch_delta: Fraction of the epochs after which pruning stops.
    """

    infobatch_delta: float = option(
        0.875,
        "infobatch_dynamic: fraction of the epochs after which pruning stops",
        number(float, 0, 1),
    )


_FIRST_LOSS = 3.0  # loss of examples not yet visited, the same for all, so none is below the mean
_ROUNDING = 1e-9  # (1 - 0.9) * 10 is slightly below 1 in floating point; keep one example


class InfoBatchPlan:
    """The epochs of InfoBatch (Qin et al., ICLR 2024).

    Let mu be the mean of the most recent losses (3 before the first visit), low = {i : loss_i < mu}, and r the prune
    ratio. An epoch visits all other examples with weight 1, and k = floor((1 - r) |low|) of low, drawn uniformly,
    with weight |low| / k. This is the paper's 1 / (1 - r) up to the floor. For every |low|, it makes the expectation
    of sum(w g) over the draws exactly the sum of all gradients: each example of low is drawn with probability
    k / |low|. For this to hold, at least one example of low is kept, even if the floor is 0. More are kept if the
    last batch would be too small for BatchNorm. After floor(delta * epochs) epochs, and whenever r is 0, all examples
    are visited with weight 1 (annealing).

    The loss of a batch is sum(w l) / b, as in the paper: there are fewer steps, each of full size.

    Memory: three float64 numbers per example, on ``device``.

    Args:
        indices: Original indices ``(n,)`` of the training examples, in order.
        prune_ratio: r, the fraction of low-loss examples to skip, in [0, 1).
        epochs: Total number of epochs.
        seed: Seed of the draws. They depend on the original index, so subsets and resumed runs draw the same numbers.
        delta: Fraction of the epochs with pruning, in [0, 1].
        device: Where losses are stored: the training device, if there are several processes.
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
        self._new = torch.zeros(2, self._total, dtype=torch.float64, device=device)  # this epoch's loss; 1 if visited

    @property
    def depends_on_epochs(self) -> bool:
        """Whether a different number of epochs would change the epochs already trained, because annealing moves."""
        return self.delta < 1.0 and self.prune_ratio > 0.0

    @property
    def losses(self) -> torch.Tensor:
        """The most recent losses ``(n,)``, float64 on the CPU."""
        return self._losses.cpu()[self._indices]

    def choose(self, epoch: int, fits: Callable[[int], bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose an epoch's positions ``(k,)``, ascending, and weights ``(n,)``; see ``EpochPlan``."""
        count = len(self._indices)
        weights = torch.ones(count, dtype=torch.float64)
        losses = self.losses
        mean = losses.numpy().mean()  # numpy's mean does not depend on the number of threads
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
        """Draw ``kept`` of the positions ``low``: those with the smallest random numbers, one per original index."""
        numbers = torch.from_numpy(rng.numpy_generator(self.seed, epoch, "infobatch").random(self._total))
        return low[numbers[self._indices[low]].argsort(stable=True)[:kept]]

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Record the losses ``(b,)`` of the original indices ``(b,)``."""
        indices = indices.to(self._new.device)
        self._new[0, indices] = losses.to(self._new)
        self._new[1, indices] = 1.0

    def end_epoch(self, group: ProcessGroup) -> None:
        """Merge the losses recorded by all processes; each example is visited by at most one."""
        group.sum_([self._new])
        self._losses = torch.where(self._new[1] > 0, self._new[0], self._losses)
        self._new.zero_()

    def state(self) -> dict[str, Any]:
        """The losses by original index, for a checkpoint."""
        return {"losses": self._losses.cpu()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the losses from a checkpoint."""
        from src.models.base import copy_tensor

        copy_tensor("losses", self._losses, state["losses"])
        self._new.zero_()


METHODS = (
    Method(
        "infobatch",
        infobatch,
        Needs(logits=True),
        paper="Qin et al. 2024",
        equation="keep all with loss >= mean and a random subset of the m below, with weight m / kept; once, before "
        "training",
        cost="n",
        weighted=True,
    ),
    Method(
        "infobatch_dynamic",
        None,
        Needs(),
        paper="Qin et al. 2024",
        equation="r = 1 - coreset_fraction; each epoch visits all with loss >= mean and floor((1 - r) m) random ones "
        "of the m below, with weight m / kept; after delta * epochs, all",
        cost="n per epoch",
        weighted=True,
        options=InfoBatchOptions,
    ),
)
