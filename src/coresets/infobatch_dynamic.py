"""InfoBatch as published: examples of low loss are left out anew in each epoch, without bias."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from src import draws
from src.errors import ArgumentError, FlagError
from src.models.restoring import copy_tensor
from src.training import Group

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
        epochs: Epochs of the whole training.
        seed: Seed of the draws; they are made by original index, so a subset or a resume changes none.
        delta: Share of the epochs that are pruned, in [0, 1].
        device: Where losses are kept: that of training, for several processes.

    Raises:
        FlagError: ``prune_ratio`` or ``delta`` is out of its range.
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
        if not 0.0 <= prune_ratio < 1.0:
            raise FlagError(
                f"prune_ratio {prune_ratio:g}: must be at least 0 and below 1",
                f"--coreset_fraction {1 - prune_ratio:g}: must be above 0 and at most 1",
            )
        if not 0.0 <= delta <= 1.0:
            raise ArgumentError(
                "delta", f"{delta:g}: is a share of the epochs; give a number from 0 to 1", "--infobatch_delta"
            )
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
        numbers = torch.from_numpy(draws.numpy_generator(self.seed, epoch, "infobatch").random(self._total))
        return low[numbers[self._indices[low]].argsort(stable=True)[:kept]]

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Take the losses ``(b,)`` of original indices ``(b,)``."""
        indices = indices.to(self._new.device)
        self._new[0, indices] = losses.to(self._new)
        self._new[1, indices] = 1.0

    def end_epoch(self, group: Group) -> None:
        """Take over the losses that any process has seen; each example was visited by one at most."""
        group.sum_([self._new])
        self._losses = torch.where(self._new[1] > 0, self._new[0], self._losses)
        self._new.zero_()

    def state(self) -> dict[str, Any]:
        """The losses, by original index."""
        return {"losses": self._losses.cpu()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        copy_tensor("losses", self._losses, state["losses"])
        self._new.zero_()
