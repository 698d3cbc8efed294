"""CRAIG: weighted examples whose gradients represent all (Mirzasoleiman et al., ICML 2020).

The choice is greedy facility location on last-layer gradients: every example near to a chosen one. CRAIG's
similarities are ``s_ij = max d - d_ij + 1e-3`` with the best similarity 0 before the first pick. So the first pick
has the smallest sum of distances, and from then on the constant cancels: the gain of x is ``sum_i max(0, near_i -
d_ix)`` with ``near_i`` the distance of i to its nearest pick. Nothing here needs ``max d``.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from src import rng
from src.coresets.inputs import (
    CandidateGroup,
    GreedyOptions,
    LastLayer,
    Method,
    Needs,
    Selection,
    SelectionInputs,
    random_parts,
)
from src.lazy import torch

_ROUNDING = 1e-14  # of ||g_i||^2 + ||g_j||^2: squared distances below that are noise, hence 0
_TIE = 1e-9  # relative: gains closer than that are equal
NOTHING = 1e-12  # of the sum of distances to the nearest pick: smaller gains are rounding
_TILE = 256  # sides of the tiles of distances that are computed at once: they stay in a processor's cache
WIDTH = 2048  # of tiles that are narrow
ROWS = 128  # rows of distances to all that exist at once when columns are recomputed
_CACHED = 2**16  # numbers of a matrix that one step of a sum takes, likewise


@dataclass(frozen=True)
class Distances:
    """``d_ij = ||g_i - g_j||`` of last-layer gradients ``g = [e, e (x) h]``, as factors.

    ``d_ij^2 = ||g_i||^2 + ||g_j||^2 - 2 <e_i, e_j> (1 + <h_i, h_j>)``. The products are in float64: in float32 this
    difference would lose distances below ``1e-3 ||g||``. What is below float64's own rounding, ``1e-7 ||g||``, is 0:
    duplicates are at the distance 0 from each other, and each example from itself. Errors are taken in units of the
    group's largest, so that squares of tiny ones do not vanish; choices and weights do not depend on the unit.

    Memory: none beside the layer's own errors and embeddings, in the type they have; those of a tile are converted
    when it is computed.

    Attributes:
        errors: e, ``(n, C)``.
        embeddings: h, ``(n, d)``.
        squares: ``||g_i||^2``, less its rounding, float64 ``(n,)``.
        unit: The largest entry of e, float64 ``()``; 1 where all are 0.
    """

    errors: torch.Tensor
    embeddings: torch.Tensor
    squares: torch.Tensor
    unit: torch.Tensor

    @classmethod
    def of(cls, layer: LastLayer) -> Distances:
        """The distances among the candidates of a last layer."""
        errors, embeddings = layer.errors, layer.embeddings
        largest = torch.maximum(errors.amax(), -errors.amin()).double()
        unit = largest.where(largest > 0, 1.0)
        squares = torch.empty(len(errors), dtype=torch.float64, device=errors.device)
        for first in range(0, len(errors), WIDTH):
            part = slice(first, first + WIDTH)
            norms = (
                torch.linalg.vector_norm(t, dim=1) for t in (errors[part].double() / unit, embeddings[part].double())
            )
            squares[part] = next(norms).square() * (1.0 + next(norms).square()) * (1.0 - _ROUNDING)
        return cls(errors, embeddings, squares, unit)

    def __len__(self) -> int:
        return len(self.squares)

    def at(self, positions: slice | np.ndarray) -> Distances:
        """The same of some."""
        return Distances(self.errors[positions], self.embeddings[positions], self.squares[positions], self.unit)

    def tile(self, positions: slice | np.ndarray) -> Distances:
        """The same of few, ready for :meth:`to`: in float64."""
        part = self.at(positions)
        errors = part.errors.double() / self.unit
        return Distances(errors, part.embeddings.double(), part.squares, torch.ones_like(self.unit))

    def to(self, others: Distances) -> torch.Tensor:
        """Distances of a tile to another, ``(n, m)``; it takes three times the memory of its result."""
        products = (self.errors @ others.errors.T).mul_(-2.0)
        squared = self.squares[:, None] + others.squares
        squared.addcmul_(products, (self.embeddings @ others.embeddings.T).add_(1.0))
        return squared.clamp_(min=0.0).sqrt_()

    def matrix(self) -> np.ndarray:
        """All of them, ``(n, n)``, in main memory; half is computed, the other half mirrored."""
        size = len(self)
        matrix = np.empty((size, size))
        parts = [slice(first, min(first + _TILE, size)) for first in range(0, size, _TILE)]
        factors = [self.tile(part) for part in parts]
        for a, rows in enumerate(parts):
            for b in range(a, len(parts)):
                tile = factors[a].to(factors[b]).cpu().numpy()
                if a == b:
                    tile = np.minimum(tile, tile.T)  # the two halves of a product may round differently
                else:
                    matrix[parts[b], rows] = tile.T
                matrix[rows, parts[b]] = tile
        return matrix

    def nearest(self, picks: np.ndarray, matrix: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of each example, the distance to its nearest pick and that pick's position in ``picks``.

        Of equally near ones the first in ``picks`` counts, where distances that differ by rounding are equal.
        Time: ``n k (C + d)``, with the matrix ``n k``. Memory: a few MB, or ``4 k`` numbers for each of 128 rows.

        Args:
            picks: Positions ``(k,)``.
            matrix: All distances, where they are known.

        Returns:
            float64 ``(n,)`` and int64 ``(n,)``.
        """
        chosen = self.tile(picks)
        near, owner = np.empty(len(self)), np.empty(len(self), dtype=np.int64)
        rows = max(ROWS, min(_TILE, _TILE * WIDTH // len(picks)))
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            if matrix is None:
                found = self.tile(part).to(chosen)
            else:
                found = torch.from_numpy(matrix[part][:, picks]).to(self.squares.device)
            least = found.amin(dim=1)
            near[part] = least.cpu().numpy()
            noise = _ROUNDING * (self.squares[part, None] + chosen.squares)
            tied = found.square_() <= noise.add_(least.square()[:, None])
            owner[part] = tied.cpu().numpy().argmax(axis=1)  # numpy promises the first
        return near, owner


def lazy_greedy(
    bounds: np.ndarray, gain: Callable[[int], float], take: Callable[[int], None], budget: int, nothing: float
) -> list[int]:
    """Lazy greedy (Minoux, 1978): gains only fall, so a gain that tops all older ones is the largest.

    Gains that differ by 1e-9 relative count as equal; of equal ones the lower position wins.

    Args:
        bounds: Gains ``(n,)`` before the first pick, or bounds from above; -inf for what is taken.
        gain: The present gain of a position.
        take: Called for each pick with a gain.
        budget: How many to pick.
        nothing: Gains up to this are none: the choice ends there.

    Returns:
        Positions in the order of the picks.
    """
    free = np.flatnonzero(bounds > -np.inf)
    heap = list(zip((-bounds[free]).tolist(), free.tolist(), strict=True))
    heapq.heapify(heap)
    fresh = np.full(len(bounds), -1).tolist()  # the number of picks when a position's gain was computed
    picks: list[int] = []
    while heap and len(picks) < budget:
        value, position = heap[0]
        if -value <= nothing:
            break
        if fresh[position] != len(picks):
            fresh[position] = len(picks)
            heapq.heapreplace(heap, (-gain(position), position))
            continue
        entry = _lowest_of_equals(heap, value)
        if fresh[entry[1]] != len(picks):
            fresh[entry[1]] = len(picks)
            heapq.heappush(heap, (-gain(entry[1]), entry[1]))
            continue
        picks.append(entry[1])
        take(entry[1])
    return picks


def _lowest_of_equals(heap: list[tuple[float, int]], value: float) -> tuple[float, int]:
    """Take from the heap the entry of lowest position among those whose gain or bound equals the top one."""
    equals = [heapq.heappop(heap)]
    while heap and heap[0][0] <= value * (1.0 - _TIE):
        equals.append(heapq.heappop(heap))
    lowest = min(equals, key=lambda entry: entry[1])
    for entry in equals:
        if entry is not lowest:
            heapq.heappush(heap, entry)
    return lowest


def greedy_on_matrix(matrix: np.ndarray, budget: int) -> np.ndarray:
    """The exact greedy picks on a dense matrix of distances.

    The gain of x is ``sum_i near_i - sum_i min(near_i, d_ix)``, two passes over a row. When no gain is left,
    the budget is filled by position. Time: n^2, and n for each gain that is evaluated again (for a tenth of the
    examples, one to five times n gains on random and on clustered gradients).

    Args:
        matrix: ``(n, n)``, symmetric with zeros on the diagonal, of C order.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in the order of the picks.
    """
    sums = matrix.sum(axis=1)
    first = int((sums <= sums.min() * (1.0 + _TIE)).argmax())
    near, total = matrix[first].copy(), float(sums[first])
    bounds, rows = np.empty(len(matrix)), max(1, _CACHED // len(matrix))
    buffer, ones = np.empty((rows, len(matrix))), np.ones(len(matrix))
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows]
        bounds[start : start + rows] = total - np.minimum(part, near, out=buffer[: len(part)]) @ ones
    bounds[first] = -np.inf
    scratch = buffer[0]

    def gain(position: int) -> float:
        np.minimum(matrix[position], near, out=scratch)
        return total - float(scratch.dot(ones))

    def take(position: int) -> None:
        nonlocal total
        np.minimum(matrix[position], near, out=near)
        total = float(near.dot(ones))

    picks = np.array([first, *lazy_greedy(bounds, gain, take, budget - 1, NOTHING * total)])
    return filled(picks, near, budget)


def filled(picks: np.ndarray, near: np.ndarray, budget: int) -> np.ndarray:
    """The picks and, up to the budget, the examples farthest from them (of equal ones the lower position)."""
    far = near.copy()
    far[picks] = -np.inf
    return np.concatenate([picks, np.argsort(-far, kind="stable")[: budget - len(picks)]])


log = logging.getLogger(__name__)

_SAMPLE = 5_000  # of a large group: its matrix takes 200 MB
_LEAST_SAMPLE = 1_000
_PAIRS = 2**25  # at most, of a large group: 256 MiB
_LEAST_PAIRS = 2**20
_PER_LEADER = 16  # examples of a sample for each pick by it
_PROBES = 256  # candidates by which the number of near pairs is estimated


def fits(count: int, memory: int) -> bool:
    """Whether a group's matrix of float64 distances fits ``memory`` MiB."""
    return 8 * count**2 <= memory * 2**20


def choose(
    distances: Distances,
    budget: int,
    memory: int,
    generator: np.random.Generator,
    matrix: np.ndarray | None = None,
) -> np.ndarray:
    """Picks ``(k,)`` of a group, in their order.

    Args:
        distances: Of the group.
        budget: k.
        memory: MiB that pairwise distances may take.
        generator: Draws the sample, and examples, of a large group.
        matrix: All distances, where they are known.
    """
    size = len(distances)
    if budget == size:
        return np.arange(size)
    if matrix is None and fits(size, memory):
        matrix = distances.matrix()
    if matrix is not None:
        return greedy_on_matrix(matrix, budget)
    sample = int(np.clip((memory * 2**17) ** 0.5, min(_LEAST_SAMPLE, size), min(_SAMPLE, size)))
    positions = np.sort(generator.choice(size, sample, replace=False))
    return greedy_by_sample(
        distances, budget, positions, int(np.clip(memory * 2**17, _LEAST_PAIRS, _PAIRS)), generator
    )


def choose_weighted(
    distances: Distances, budget: int, memory: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A group's picks ``(k,)``, ascending, and of each how many examples have it as their nearest pick."""
    size = len(distances)
    matrix = distances.matrix() if budget < size and fits(size, memory) else None
    picks = np.sort(choose(distances, budget, memory, generator, matrix))
    return picks, weigh(distances, picks, matrix)


def weigh(distances: Distances, picks: np.ndarray, matrix: np.ndarray | None = None) -> np.ndarray:
    """Of each of the picks, given in ascending order, how many examples have it as their nearest."""
    return np.bincount(distances.nearest(picks, matrix)[1], minlength=len(picks)).astype(np.float64)


def greedy_by_sample(
    distances: Distances, budget: int, sample: np.ndarray, pairs: int, generator: np.random.Generator
) -> np.ndarray:
    """Greedy picks for groups whose matrix of distances is too large.

    The first picks, one for 16 of a sample, are those of the exact greedy on the sample. After them an example i is
    nearer to few candidates x than to its pick, and only pairs with ``d_ix < near_i`` can ever add to a gain. One
    pass over all distances keeps those pairs, and the greedy algorithm continues with them, over all
    candidates: given the first picks it is exact (distances rounded to float32).

    Where the pairs are still too many (a crowd of small gradients is a crowd of near pairs), examples are drawn at
    random, with a probability p in proportion to ``near_i`` over the number of i's pairs, and their savings weigh
    ``1 / p``: estimates of the gains without bias. After up to eight times as many picks, examples are drawn again.

    Time: ``n^2 (C + d)`` for each pass. Memory beside the factors: half of them for drawn examples, 8 bytes a pair,
    the sample's matrix, 128 rows of n distances.

    Args:
        distances: Of the group, n.
        budget: k, at most n.
        sample: Positions ``(m,)``, ascending.
        pairs: About how many pairs may be kept.
        generator: Draws the examples.

    Returns:
        Positions ``(k,)`` in the order of the picks.
    """
    leaders = min(budget, max(1, len(sample) // _PER_LEADER))
    picks = sample[greedy_on_matrix(distances.at(sample).matrix(), leaders)]
    near = distances.nearest(picks)[0]
    probes = distances.tile(sample[:: max(1, len(sample) // _PROBES)])
    while len(picks) < budget:
        shares = _shares(near, _near_candidates(distances, probes, near), pairs)
        drawn = np.flatnonzero(generator.random(len(shares)) < shares)
        complete = len(drawn) == len(distances)
        goal = budget if complete else min(budget, max(2 * len(picks), min(8 * len(picks), len(drawn) // 4)))
        log.info("craig: picks from %d to %d of %d on %d examples", len(picks), goal, budget, len(drawn))
        found = _greedy_on_pairs(distances, drawn, near, shares, picks, goal - len(picks))
        if len(found):
            np.minimum(near, distances.nearest(found)[0], out=near)
            picks = np.concatenate([picks, found])
        if not len(found) or (complete and len(picks) < goal):
            break  # no gain is left
    return filled(picks, near, budget)


def _near_candidates(distances: Distances, probes: Distances, near: np.ndarray) -> np.ndarray:
    """About how many candidates x have ``d_ix < near_i``, for each i; half a probe more, so never 0."""
    limits = torch.from_numpy(near).to(distances.squares.device)
    counts = np.empty(len(near))
    for first in range(0, len(near), WIDTH):
        part = slice(first, first + WIDTH)
        counts[part] = (probes.to(distances.tile(part)) < limits[part]).sum(dim=0).cpu().numpy()
    return (counts + 0.5) * (len(near) / len(probes))


def _shares(near: np.ndarray, counts: np.ndarray, pairs: int) -> np.ndarray:
    """Probabilities ``min(1, c near_i / counts_i)`` of examples that keep the expected number of pairs; 1 if all fit.

    The half probe is left out where only the total matters.
    """
    if (counts - counts.min()).sum() <= pairs or not near.any():
        return np.ones(len(near))
    rates = near / counts
    low, high = -60.0, 60.0  # of log c, in units of the largest rate
    rates /= rates.max()
    for _ in range(60):
        middle = (low + high) / 2.0
        fits = np.minimum(1.0, np.exp(middle) * rates) @ counts <= pairs
        low, high = (middle, high) if fits else (low, middle)
    return np.minimum(1.0, np.exp(low) * rates)


def _greedy_on_pairs(
    distances: Distances,
    drawn: np.ndarray,
    near: np.ndarray,
    shares: np.ndarray,
    taken: np.ndarray,
    budget: int,
) -> np.ndarray:
    """The greedy after the picks ``taken``, for the examples ``drawn`` by their ``shares``.

    Where most are drawn, the others stay with savings of none, which saves a copy of the factors.
    """
    if 2 * len(drawn) > len(distances):
        inside = np.bincount(drawn, minlength=len(distances)) > 0
        examples, near = distances, np.where(inside, near, 0.0)
        weights = np.divide(1.0, shares, out=np.zeros(len(shares)), where=inside)
    else:
        examples, near, weights = distances.at(drawn), near[drawn], 1.0 / shares[drawn]
    limits = torch.from_numpy(near.copy()).to(distances.squares.device)
    block = limits.new_empty(ROWS, len(examples))  # one for all: large ones between small lists would fragment memory
    lists: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, len(distances), ROWS):
        lists += _lists(distances.tile(slice(first, first + ROWS)), examples, limits, block)

    def gain(position: int) -> float:
        members, found = lists[position]
        savings = near[members] - found
        return float(np.maximum(savings, 0.0, out=savings) @ weights[members])

    def take(position: int) -> None:
        members, found = lists[position]
        near[members] = np.minimum(near[members], found)

    bounds = np.array([gain(position) for position in range(len(distances))])
    bounds[taken] = -np.inf
    return np.array(lazy_greedy(bounds, gain, take, budget, NOTHING * float(near @ weights)), dtype=np.int64)


def _lists(
    candidates: Distances, examples: Distances, limits: torch.Tensor, block: torch.Tensor
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each candidate, the examples it is nearer to than their limits, and how near; ``block`` is written over."""
    block = block[: len(candidates)]
    for first in range(0, len(examples), WIDTH):
        part = slice(first, first + WIDTH)
        block[:, part] = candidates.to(examples.tile(part))
    row, member = (block < limits).nonzero(as_tuple=True)
    found = block[row, member].float().cpu().numpy()
    ends = torch.bincount(row, minlength=len(candidates)).cumsum(0).cpu().numpy()[:-1]
    return list(zip(np.split(member.int().cpu().numpy(), ends), np.split(found, ends), strict=True))


def craig(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GreedyOptions) -> Selection:
    """CRAIG (Mirzasoleiman et al., ICML 2020, algorithm 1 with facility location, eq. 14), once after pre-training.

    Each group greedily maximizes ``sum_i max_{j in S} s_ij`` with ``s_ij = max d - d_ij + 1e-3``; then every example
    is assigned to its most similar pick (ties to the lower index), and a pick's weight is the number assigned. A pick
    is nearest to itself, so its weight is at least 1 unless it duplicates the gradient of a lower pick: then it is 0.
    The weights of a group sum to its size, and are scaled to mean 1 over all picks at the end.

    Groups whose matrix of distances (float64, ``8 n^2`` bytes) fits ``selection_memory`` are chosen from by the exact
    lazy greedy, one matrix at a time. Larger ones get their first picks by the exact greedy on a random sample, and
    the others by the greedy on all examples (see :func:`greedy_by_sample`).
    Memory then: the group's errors in the logits' type, up to half of the group's factors, and up to 0.8 GB.

    Subsampled, the random parts of a group are chosen from on their own (see :func:`random_parts`): facility location
    is a sum over the examples. (Random candidates for each pick would save nothing: the distances cost more than the
    gains, and ``n ln(1 / epsilon)`` gains need all of them.)

    Args:
        inputs: One layer with ``embeddings``.
        groups: The groups.
        options: ``selection_memory`` in MiB, and ``selection_subsample``.
    """
    generator, epsilon = rng.numpy_generator(inputs.seed, 0, "craig"), options.epsilon(groups)
    if epsilon is not None:
        groups = random_parts(groups, epsilon, rng.numpy_generator(inputs.seed, 0, "craig parts"))
    large = [group for group in groups if not fits(len(group.positions), options.selection_memory)]
    if len(large) < len(groups):
        log.info("craig: exact lazy greedy in %d groups", len(groups) - len(large))
    if large:
        log.info("craig: greedy from a sample's picks in %d groups that exceed --selection_memory", len(large))
    layer = inputs.layers[0]
    chosen, weights = [], []
    for group in groups:
        distances = Distances.of(layer.at(group.positions))
        picks, counts = choose_weighted(distances, group.budget, options.selection_memory, generator)
        chosen.append(group.positions[picks])
        weights.append(counts)
    return Selection.of(chosen, weights).rescaled()


METHODS = (
    Method(
        "craig",
        craig,
        Needs(embeddings=True),
        paper="Mirzasoleiman et al. 2020",
        equation="greedy for sum_i max_{j in S} (max d - d_ij), d between last-layer gradients; weight = how "
        "many are nearest to j (algorithm 1)",
        cost="n^2 (C + d); subsampled: n (C + d)",
        weighted=True,
        options=GreedyOptions,
    ),
)
