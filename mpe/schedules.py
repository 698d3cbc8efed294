"""Which examples each retrained model sees, in which order.

Each retrained model shuffles the examples that are left once and visits them in that order in every epoch. Batches
are cut from that order, so every batch but the last is full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src import rng
from src.devices import upload

PASSES_BEFORE = 6
"""Passes over loaders before the first retraining of the papers' scripts, each of which draws one number: training
batches, evaluation on training and test data, a first look, the fit and the variances of the Laplace posterior."""


@dataclass(frozen=True)
class MemberBatch:
    """Which examples the members see in one step.

    Attributes:
        index: Positions in the data, int32 ``(m, b)``, or ``(b,)`` for all members; on the table's device.
        weights: What they count, boolean ``(m, b)``, on the device of the schedules' masks; None where all count 1.
        active: Which members see any, boolean ``(m,)`` on the CPU; None for all.
    """

    index: Tensor
    weights: Tensor | None
    active: Tensor | None


@dataclass(frozen=True)
class MemberSchedules:
    """The orders of m members over L steps of one example.

    Attributes:
        table: Positions, int32 ``(m, L)`` (padded with 0 at the end), or ``(L,)`` for all members.
        counts: How many examples each member trains on, int64 ``(m,)``, on the CPU.
        kept: With a shared table, which of its entries count, boolean ``(m, L)`` on the CPU; None where all do.
        masks: ``kept``, or else ``counts``, on the device where weights are wanted; None for the CPU.
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
        """The same with the table on a device.

        Args:
            device: Of the table, best that of the images.
            masks: Where weights are wanted: on the members' device if they are stacked, else on the CPU, where the
                examples that count are picked.
        """
        found = self.counts if self.kept is None else self.kept
        return MemberSchedules(upload(self.table, device), self.counts, self.kept, upload(found, masks))

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return -(-self.table.shape[-1] // batch_size)

    def batch(self, step: int, batch_size: int) -> MemberBatch:
        """The examples of one step, counted from 0."""
        start = step * batch_size
        stop = min(start + batch_size, self.table.shape[-1])
        index = self.table[..., start:stop]
        # What is asked about weights is asked of arrays on the CPU, so that a GPU is not waited for.
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
    """The seed of each model's permutation.

    Args:
        removed: The positions that each model goes without, ascending; none for a control.
        shuffle: One of ``mpe.config.SHUFFLES``.
        seed: The run's seed.
        replay: For ``replay``, the generator at the first retraining (``replay_generator``); it is not advanced.
        extra_draws: For ``replay``, numbers that the script draws after each retraining: 1 where it evaluates the
            test set (leaving out classes), 0 where it evaluates single images.

    Returns:
        As many seeds; under ``shared`` all are equal. Under ``replay`` a control, which the papers' scripts do not
        have, takes the first retraining's seed, without advancing the sequence.
    """
    if shuffle == "shared":
        return [rng.derived_seed(seed, 0, "retraining, shared")] * len(removed)
    if shuffle == "seeded":
        return [rng.derived_seed(seed, 0, f"retraining without {','.join(map(str, left))}") for left in removed]
    sequence, first = replay.clone_state(), replay.clone_state()
    _draw(first, 1)  # a loader draws for its workers, then its sampler draws the seed
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
    """Each model's own permutation of the examples that are left for it.

    Args:
        removed: The positions that each model goes without.
        seeds: Of each permutation.
        total: N.
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
    """One order for all models; what one goes without counts nothing for it.

    Args:
        removed: The positions that each model goes without.
        permutation: Of all N examples, int64 ``(N,)``.
    """
    total = len(permutation)
    counts = torch.tensor([total - len(left) for left in removed])
    kept = None
    if bool((counts < total).any()):
        kept = torch.ones(len(removed), total, dtype=torch.bool)  # by position, then in the order of the table
        for row, left in enumerate(removed):
            kept[row, torch.from_numpy(left)] = False
        kept = kept[:, permutation]
    return MemberSchedules(permutation.to(torch.int32), counts, kept)


def seeded_permutation(total: int, seed: int) -> Tensor:
    """A permutation of N examples by a generator of its own."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def replay_generator(build: Callable[[], object], *, seed: int = 1, passes: int = PASSES_BEFORE) -> torch.Generator:
    """The random numbers of the papers' scripts, from the first retraining on.

    Those scripts seed torch's global generator, build the model on the CPU and iterate over loaders, each of which
    draws a number. The same numbers come here from a generator of its own; the global one is left as it was.

    Args:
        build: Builds the model, drawing from torch's global generator without seeding it: an entry of
            ``src.models.MODELS``, not ``build_model``, which seeds.
        seed: The scripts' seed.
        passes: Passes over loaders between building and the first retraining.
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
    """What a loader draws, so many times; the last number."""
    number = 0
    for _ in range(times):
        number = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return number
