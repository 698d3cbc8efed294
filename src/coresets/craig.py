"""CRAIG: weighted examples whose gradients represent the training set (Mirzasoleiman et al., ICML 2020).

Selection is greedy facility location on last-layer gradients: every example should be close to a pick. CRAIG's
similarities are ``s_ij = max d - d_ij + 1e-3``, and the best similarity is 0 before the first pick. The first pick
therefore minimizes the sum of distances. After it the constant cancels: the gain of x is
``sum_i max(0, near_i - d_ix)``, with ``near_i`` the distance of i to its nearest pick. ``max d`` is never needed.
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

_ROUNDING = 1e-14  # relative to ||g_i||^2 + ||g_j||^2; smaller squared distances are rounding noise and become 0
_TIE = 1e-9  # relative; gains closer than this are equal
NOTHING = 1e-12  # relative to the sum of distances to the nearest pick; smaller gains are rounding noise
_TILE = 256  # side of a tile of distances, chosen to fit the CPU cache
WIDTH = 2048  # width of tiles with few rows
ROWS = 128  # rows of distances to all examples in memory at once when columns are recomputed
_CACHED = 2**16  # matrix entries per step of a sum, also chosen to fit the CPU cache


@dataclass(frozen=True)
class Distances:
    """Distances ``d_ij = ||g_i - g_j||`` of last-layer gradients ``g = [e, e (x) h]``, as factors.

    ``d_ij^2 = ||g_i||^2 + ||g_j||^2 - 2 <e_i, e_j> (1 + <h_i, h_j>)``. The products are in float64: in float32 this
    difference would lose distances below ``1e-3 ||g||``. Distances below the rounding of float64, ``1e-7 ||g||``, are
    set to 0, so duplicates are at distance 0 from each other and each example from itself. Errors are divided by the
    group's largest error to keep squares of tiny errors from underflowing; picks and weights do not depend on it.

    Memory: only the layer's own errors and embeddings, in their dtype. A tile is converted when it is computed.

    Attributes:
        errors: e, ``(n, C)``.
        embeddings: h, ``(n, d)``.
        squares: ``||g_i||^2``, less its rounding, float64 ``(n,)``.
        unit: The largest absolute entry of e, float64 ``()``; 1 if all are 0.
    """

    errors: torch.Tensor
    embeddings: torch.Tensor
    squares: torch.Tensor
    unit: torch.Tensor

    @classmethod
    def of(cls, layer: LastLayer) -> Distances:
        """Build the distances between the candidates of a last layer."""
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
        """The factors of a subset of the examples."""
        return Distances(self.errors[positions], self.embeddings[positions], self.squares[positions], self.unit)

    def tile(self, positions: slice | np.ndarray) -> Distances:
        """The factors of a few examples in float64, ready for :meth:`to`."""
        part = self.at(positions)
        errors = part.errors.double() / self.unit
        return Distances(errors, part.embeddings.double(), part.squares, torch.ones_like(self.unit))

    def to(self, others: Distances) -> torch.Tensor:
        """Distances ``(n, m)`` from this tile to another; peak memory is three times the result."""
        products = (self.errors @ others.errors.T).mul_(-2.0)
        squared = self.squares[:, None] + others.squares
        squared.addcmul_(products, (self.embeddings @ others.embeddings.T).add_(1.0))
        return squared.clamp_(min=0.0).sqrt_()

    def matrix(self) -> np.ndarray:
        """All distances, ``(n, n)``, in main memory; half is computed, the other half mirrored."""
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
        """For each example, find the distance to its nearest pick and the pick's index in ``picks``.

        Ties go to the first in ``picks``; distances that differ only by rounding are ties. Time: ``n k (C + d)``, or
        ``n k`` with the matrix. Memory: a few MB, or ``4 k`` numbers for each of 128 rows.

        Args:
            picks: Positions ``(k,)``.
            matrix: All distances, if already computed.

        Returns:
            Distances, float64 ``(n,)``, and indices into ``picks``, int64 ``(n,)``.
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
            owner[part] = tied.cpu().numpy().argmax(axis=1)  # numpy's argmax returns the first match
        return near, owner


def lazy_greedy(
    bounds: np.ndarray, gain: Callable[[int], float], take: Callable[[int], None], budget: int, nothing: float
) -> list[int]:
    """Lazy greedy (Minoux, 1978): gains only decrease, so a fresh gain above all stale ones is the largest.

    Gains within 1e-9 relative count as equal; ties go to the lower position.

    Args:
        bounds: Gains ``(n,)`` before the first pick, or upper bounds; -inf for positions already picked.
        gain: Returns the current gain of a position.
        take: Called with each pick that has a gain.
        budget: Number of picks.
        nothing: Gains up to this value count as zero; selection stops there.

    Returns:
        Positions in selection order.
    """
    free = np.flatnonzero(bounds > -np.inf)
    heap = list(zip((-bounds[free]).tolist(), free.tolist(), strict=True))
    heapq.heapify(heap)
    fresh = np.full(len(bounds), -1).tolist()  # the number of picks at which a position's gain was last computed
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
    """Pop the entry with the lowest position among those whose gain or bound ties with the top one."""
    equals = [heapq.heappop(heap)]
    while heap and heap[0][0] <= value * (1.0 - _TIE):
        equals.append(heapq.heappop(heap))
    lowest = min(equals, key=lambda entry: entry[1])
    for entry in equals:
        if entry is not lowest:
            heapq.heappush(heap, entry)
    return lowest


def greedy_on_matrix(matrix: np.ndarray, budget: int) -> np.ndarray:
    """Run exact greedy selection on a dense distance matrix.

    The gain of x is ``sum_i near_i - sum_i min(near_i, d_ix)``, two passes over a row. When no gain is left, the
    budget is filled with the examples farthest from the picks. Time: n^2, plus n per re-evaluated gain (when picking
    a tenth of the examples, one to five times n gains on random and on clustered gradients).

    Args:
        matrix: ``(n, n)``, symmetric with a zero diagonal, C-contiguous.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in selection order.
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
    """Fill the picks up to the budget with the examples farthest from them (ties go to the lower position)."""
    far = near.copy()
    far[picks] = -np.inf
    return np.concatenate([picks, np.argsort(-far, kind="stable")[: budget - len(picks)]])


log = logging.getLogger(__name__)

_SAMPLE = 5_000  # maximum sample size for a large group; its matrix takes 200 MB
_LEAST_SAMPLE = 1_000
_PAIRS = 2**25  # maximum number of pairs for a large group: 256 MiB
_LEAST_PAIRS = 2**20
_PER_LEADER = 16  # sampled examples per pick from the sample
_PROBES = 256  # candidates used to estimate the number of near pairs


def fits(count: int, memory: int) -> bool:
    """Whether a group's float64 distance matrix fits in ``memory`` MiB."""
    return 8 * count**2 <= memory * 2**20


def choose(
    distances: Distances,
    budget: int,
    memory: int,
    generator: np.random.Generator,
    matrix: np.ndarray | None = None,
) -> np.ndarray:
    """Pick ``(k,)`` examples of a group, in selection order.

    Args:
        distances: The group's distances.
        budget: k.
        memory: Memory limit of pairwise distances in MiB.
        generator: Draws the sample and the examples of a large group.
        matrix: All distances, if already computed.
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
    """Return a group's picks ``(k,)``, ascending, and the number of examples nearest to each."""
    size = len(distances)
    matrix = distances.matrix() if budget < size and fits(size, memory) else None
    picks = np.sort(choose(distances, budget, memory, generator, matrix))
    return picks, weigh(distances, picks, matrix)


def weigh(distances: Distances, picks: np.ndarray, matrix: np.ndarray | None = None) -> np.ndarray:
    """Count, for each pick in ascending order, the examples whose nearest pick it is."""
    return np.bincount(distances.nearest(picks, matrix)[1], minlength=len(picks)).astype(np.float64)


def greedy_by_sample(
    distances: Distances, budget: int, sample: np.ndarray, pairs: int, generator: np.random.Generator
) -> np.ndarray:
    """Greedy selection for groups whose distance matrix does not fit in memory.

    The first picks, one per 16 sampled examples, come from exact greedy on the sample. After them, only few
    candidates x are nearer to an example i than its pick, and only pairs with ``d_ix < near_i`` can contribute to a
    gain. One pass over all distances collects those pairs, and greedy selection continues on them, over all
    candidates. Given the first picks, it is exact (with distances rounded to float32).

    If there are still too many pairs (many small gradients make many near pairs), examples are sampled with a
    probability p proportional to ``near_i`` over the number of i's pairs, and their savings are weighted by
    ``1 / p``. The estimated gains are unbiased. Examples are resampled after at most eight times as many picks.

    Time: ``n^2 (C + d)`` per pass. Memory in addition to the factors: up to half of them for the sampled examples, 8
    bytes per pair, the sample's matrix, and 128 rows of n distances.

    Args:
        distances: The distances of a group of n.
        budget: k, at most n.
        sample: Positions ``(m,)``, ascending.
        pairs: Approximate maximum number of pairs.
        generator: Samples the examples.

    Returns:
        Positions ``(k,)`` in selection order.
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
        log.info("craig: picks %d to %d of %d, using %d examples", len(picks), goal, budget, len(drawn))
        found = _greedy_on_pairs(distances, drawn, near, shares, picks, goal - len(picks))
        if len(found):
            np.minimum(near, distances.nearest(found)[0], out=near)
            picks = np.concatenate([picks, found])
        if not len(found) or (complete and len(picks) < goal):
            break  # no gain is left
    return filled(picks, near, budget)


def _near_candidates(distances: Distances, probes: Distances, near: np.ndarray) -> np.ndarray:
    """Estimate, for each i, how many candidates x have ``d_ix < near_i``; half a probe is added to avoid 0."""
    limits = torch.from_numpy(near).to(distances.squares.device)
    counts = np.empty(len(near))
    for first in range(0, len(near), WIDTH):
        part = slice(first, first + WIDTH)
        counts[part] = (probes.to(distances.tile(part)) < limits[part]).sum(dim=0).cpu().numpy()
    return (counts + 0.5) * (len(near) / len(probes))


def _shares(near: np.ndarray, counts: np.ndarray, pairs: int) -> np.ndarray:
    """Sampling probabilities ``min(1, c near_i / counts_i)`` that keep the expected number of pairs; 1 if all fit.

    The check that all pairs fit leaves out the extra half probe.
    """
    if (counts - counts.min()).sum() <= pairs or not near.any():
        return np.ones(len(near))
    rates = near / counts
    low, high = -60.0, 60.0  # bounds of log c, in units of the largest rate
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
    """Continue greedy selection after the picks ``taken``, on examples ``drawn`` with probabilities ``shares``.

    If most examples are drawn, the others stay with zero savings, which avoids a copy of the factors.
    """
    if 2 * len(drawn) > len(distances):
        inside = np.bincount(drawn, minlength=len(distances)) > 0
        examples, near = distances, np.where(inside, near, 0.0)
        weights = np.divide(1.0, shares, out=np.zeros(len(shares)), where=inside)
    else:
        examples, near, weights = distances.at(drawn), near[drawn], 1.0 / shares[drawn]
    limits = torch.from_numpy(near.copy()).to(distances.squares.device)
    block = limits.new_empty(ROWS, len(examples))  # reused: many large blocks would fragment memory
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
    """For each candidate, list the examples within their limits and the distances; overwrites ``block``."""
    block = block[: len(candidates)]
    for first in range(0, len(examples), WIDTH):
        part = slice(first, first + WIDTH)
        block[:, part] = candidates.to(examples.tile(part))
    row, member = (block < limits).nonzero(as_tuple=True)
    found = block[row, member].float().cpu().numpy()
    ends = torch.bincount(row, minlength=len(candidates)).cumsum(0).cpu().numpy()[:-1]
    return list(zip(np.split(member.int().cpu().numpy(), ends), np.split(found, ends), strict=True))


def craig(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GreedyOptions) -> Selection:
    """CRAIG (Mirzasoleiman et al., ICML 2020, algorithm 1 with facility location, eq. 14), run after pre-training.

    Each group greedily maximizes ``sum_i max_{j in S} s_ij`` with ``s_ij = max d - d_ij + 1e-3``. Then every example
    is assigned to its most similar pick (ties go to the lower index), and a pick's weight is the number of examples
    assigned to it. A pick is nearest to itself, so its weight is at least 1, unless it duplicates the gradient of a
    lower pick; then its weight is 0. The weights of a group sum to its size. At the end, all weights are scaled to
    mean 1.

    If a group's distance matrix (float64, ``8 n^2`` bytes) fits in ``selection_memory``, exact lazy greedy is used,
    one matrix at a time. A larger group gets its first picks from exact greedy on a random sample, and the others
    from greedy over all examples (see :func:`greedy_by_sample`). It then uses memory for the group's errors in the
    logits' dtype, up to half of the group's factors, and up to 0.8 GB.

    With subsampling, each random part of a group is selected from independently (see :func:`random_parts`): facility
    location is a sum over examples. Random candidates for each pick would not save time: the distances cost more than
    the gains, and ``n ln(1 / epsilon)`` gains need all of them.

    Args:
        inputs: One layer with ``embeddings``.
        groups: The groups of candidates.
        options: ``selection_memory`` in MiB, and ``selection_subsample``.
    """
    generator, epsilon = rng.numpy_generator(inputs.seed, 0, "craig"), options.epsilon(groups)
    if epsilon is not None:
        groups = random_parts(groups, epsilon, rng.numpy_generator(inputs.seed, 0, "craig parts"))
    large = [group for group in groups if not fits(len(group.positions), options.selection_memory)]
    if len(large) < len(groups):
        log.info("craig: using exact lazy greedy in %d groups", len(groups) - len(large))
    if large:
        log.info("craig: using sampled greedy in %d groups that exceed --selection_memory", len(large))
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
        Needs(logits=True, embeddings=True),
        paper="Mirzasoleiman et al. 2020",
        equation="greedy for sum_i max_{j in S} (max d - d_ij), d between last-layer gradients; weight = number of "
        "examples nearest to j (algorithm 1)",
        cost="n^2 (C + d); subsampled: n (C + d)",
        weighted=True,
        options=GreedyOptions,
    ),
)
