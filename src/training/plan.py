"""Which examples each epoch of training visits, where that is not all of them."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from src.training.distributed import ProcessGroup


class EpochPlan(Protocol):
    """Chooses the examples of each epoch anew, possibly by the losses that training has seen (dynamic pruning).

    The loop calls ``choose`` before an epoch, ``record`` after each of its steps, ``end_epoch`` after the last.
    With several processes all hold the same plan, and each records the losses of its share.
    """

    @property
    def divide_by_size(self) -> bool:
        """Whether a batch's loss is sum(w l) / b, with b its examples; else sum(w l) / sum(w)."""
        ...

    @property
    def depends_on_epochs(self) -> bool:
        """Whether another number of epochs would have changed the epochs already trained."""
        ...

    def choose(self, epoch: int, fits: Callable[[int], bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """The examples of an epoch.

        Args:
            epoch: Its number, from 1.
            fits: Whether the loop can train on so many examples: their last batch may leave a process a single
                one, which some networks' BatchNorm cannot normalise. All examples always fit.

        Returns:
            Positions in the training set, int64 ``(k,)`` with k >= 1, each once and in any order; and the weights
            of all examples of the set, ``(n,)``, of which those of the positions are read.
        """
        ...

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Take a step's losses ``(b,)``, unweighted and before the step, of original indices ``(b,)``."""
        ...

    def end_epoch(self, group: ProcessGroup) -> None:
        """Close an epoch: put the records of all processes together."""
        ...

    def state(self) -> dict[str, Any]:
        """What the next epoch needs, for the resume state: tensors and plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        ...
