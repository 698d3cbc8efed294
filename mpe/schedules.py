"""The order in which each retrained model visits its examples.

Each retrained model shuffles its remaining examples once and visits them in that order in every epoch. Batches are
consecutive slices of that order, so every batch except the last is full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src import rng
from src.devices import upload

PASSES_BEFORE = 6
"""Number of passes over data loaders before the first retraining in the papers' scripts. Each pass draws one random
number. The passes are: training batches, evaluation on training and test data, a first batch, and the fit and the
variances of the Laplace posterior."""


@dataclass(frozen=True)
class MemberBatch:
    """The examples that the members see in one step.

    Attributes:
        index: Positions in the data, int32 ``(m, b)``, or ``(b,)`` shared by all members; on the table's device.
        weights: Example weights, boolean ``(m, b)``, on the device of the schedules' masks; None if all are 1.
        active: Which members see any example, boolean ``(m,)`` on the CPU; None for all.
    """

    index: Tensor
    weights: Tensor | None
    active: Tensor | None


@dataclass(frozen=True)
class MemberSchedules:
    """The visiting orders of m members, of length L.

    Attributes:
        table: Positions, int32 ``(m, L)`` (padded with 0 at the end), or ``(L,)`` shared by all members.
        counts: Number of examples that each member trains on, int64 ``(m,)``, on the CPU.
        kept: For a shared table, which entries each member uses, boolean ``(m, L)`` on the CPU; None for all.
        masks: ``kept`` if not None, otherwise ``counts``, on the device of the weights; None for the CPU.
    """

    table: Tensor
    counts: Tensor
    kept: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def shared(self) -> bool:
        """Whether all members see the same batches."""
        return self.table.ndim == 1

    def to(self, device: torch.device | str, masks: torch.device | str = "cpu") -> "MemberSchedules":
        """Copy the schedules with the table on a device.

        Args:
            device: Device of the table, ideally that of the images.
            masks: Device of the weights: the members' device if they are stacked, otherwise the CPU, where the
                examples with nonzero weight are selected.
        """
        found = self.counts if self.kept is None else self.kept
        return MemberSchedules(upload(self.table, device), self.counts, self.kept, upload(found, masks))

    def steps(self, batch_size: int) -> int:
        """Number of batches per epoch."""
        return -(-self.table.shape[-1] // batch_size)

    def batch(self, step: int, batch_size: int) -> MemberBatch:
        """The examples of one step, counting from 0."""
        start = step * batch_size
        stop = min(start + batch_size, self.table.shape[-1])
        index = self.table[..., start:stop]
        # Control flow depends only on arrays on the CPU, which avoids GPU synchronization.
        if self.shared:
            chosen = None if self.kept is None else self.kept[:, start:stop]
            if chosen is None or chosen.numpy().all():
                return MemberBatch(index, None, None)
            active = chosen.any(1)
            weights = chosen if self.masks is None else self.masks[:, start:stop]
        else:
            if stop <= self.counts.numpy().min():
                return MemberBatch(index, None, None)
            active = self.counts > start
            counts = self.counts if self.masks is None else self.masks
            weights = torch.arange(start, stop, device=counts.device) < counts.unsqueeze(1)
        return MemberBatch(index, weights, None if active.numpy().all() else active)


def shuffle_seeds(
    removed: Sequence[np.ndarray],
    shuffle: str,
    seed: int,
    *,
    replay: torch.Generator | None = None,
    extra_draws: int = 0,
) -> list[int]:
    """Compute the seed of each model's permutation.

    Args:
        removed: The positions removed for each model, ascending; empty for a control.
        shuffle: One of ``mpe.config.SHUFFLES``.
        seed: The run's seed.
        replay: For ``replay``, the generator's state at the first retraining (``replay_generator``); not advanced.
        extra_draws: For ``replay``, how many numbers the script draws after each retraining: 1 if it evaluates the
            test set (leaving out classes), 0 if it evaluates single images.

    Returns:
        One seed per model. With ``shared``, all are equal. With ``replay``, a control, which the papers' scripts do
        not have, uses the first retraining's seed without advancing the sequence.

    Raises:
        ValueError: ``shuffle`` is ``replay``, and ``replay`` is missing.
    """
    if shuffle == "shared":
        return [rng.derived_seed(seed, 0, "retraining, shared")] * len(removed)
    if shuffle == "seeded":
        return [rng.derived_seed(seed, 0, f"retraining without {','.join(map(str, left))}") for left in removed]
    if replay is None:
        raise ValueError("shuffle='replay' needs replay, the generator's state at the first retraining")
    sequence, first = replay.clone_state(), replay.clone_state()
    _draw(first, 1)  # a data loader draws a seed for its workers, then its sampler draws the shuffle seed
    control = _draw(first, 1)
    seeds = []
    for left in removed:
        if not len(left):
            seeds.append(control)
            continue
        _draw(sequence, 1)
        seeds.append(_draw(sequence, 1))
        _draw(sequence, extra_draws)
    return seeds


def own_schedules(removed: Sequence[np.ndarray], seeds: Sequence[int], total: int) -> MemberSchedules:
    """Build schedules in which each model has its own permutation of its remaining examples.

    Args:
        removed: The positions removed for each model.
        seeds: The seed of each permutation.
        total: N, the number of examples.
    """
    counts = torch.tensor([total - len(left) for left in removed])
    table = torch.zeros(len(removed), int(counts.max()), dtype=torch.int32)
    for row, (left, seed) in enumerate(zip(removed, seeds, strict=True)):
        order = seeded_permutation(int(counts[row]), seed)
        if len(left):
            remaining = np.ones(total, dtype=bool)
            remaining[left] = False
            order = torch.from_numpy(remaining.nonzero()[0])[order]
        table[row, : len(order)] = order
    return MemberSchedules(table, counts)


def shared_schedules(removed: Sequence[np.ndarray], permutation: Tensor) -> MemberSchedules:
    """Build schedules with one order for all models, in which a model's removed examples have weight 0.

    Args:
        removed: The positions removed for each model.
        permutation: Permutation of all N examples, int64 ``(N,)``.
    """
    total = len(permutation)
    counts = torch.tensor([total - len(left) for left in removed])
    kept = None
    if bool((counts < total).any()):
        kept = torch.ones(len(removed), total, dtype=torch.bool)  # by position; reordered like the table below
        for row, left in enumerate(removed):
            kept[row, torch.from_numpy(left)] = False
        kept = kept[:, permutation]
    return MemberSchedules(permutation.to(torch.int32), counts, kept)


def seeded_permutation(total: int, seed: int) -> Tensor:
    """Draw a permutation of N examples with a separate generator."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def replay_generator(build: Callable[[], object], *, seed: int = 1, passes: int = PASSES_BEFORE) -> torch.Generator:
    """Create a generator that reproduces the papers' random numbers, starting at the first retraining.

    The papers' scripts seed torch's global generator, build the model on the CPU, and iterate over data loaders, each
    of which draws a number. This function reproduces these draws in a separate generator. The global generator is
    unchanged.

    Args:
        build: Builds the model, drawing from torch's global generator without seeding it: ``build`` of an entry of
            ``src.models.MODELS``, not ``build_model``, which seeds the generator.
        seed: The scripts' seed.
        passes: Number of passes over data loaders between building the model and the first retraining.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
        with torch.device("cpu"):
            build()
        state = torch.default_generator.get_state()
    generator = torch.Generator()
    generator.set_state(state)
    _draw(generator, passes)
    return generator


def _draw(generator: torch.Generator, times: int) -> int:
    """Repeat a data loader's draw and return the last number."""
    number = 0
    for _ in range(times):
        number = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return number
