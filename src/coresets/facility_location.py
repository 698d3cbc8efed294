"""Greedy facility location on last-layer gradients: every example near to a chosen one.

CRAIG's similarities are ``s_ij = max d - d_ij + 1e-3`` with the best similarity 0 before the first pick. So the first
pick has the smallest sum of distances, and from then on the constant cancels: the gain of x is
``sum_i max(0, near_i - d_ix)`` with ``near_i`` the distance of i to its nearest pick. Nothing here needs ``max d``.
"""

import heapq
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from src.coresets.material import LastLayer
from src.errors import UserError

log = logging.getLogger(__name__)

_ROUNDING = 1e-14  # of ||g_i||^2 + ||g_j||^2: squared distances below that are noise, hence 0
_TIE = 1e-9  # relative: gains closer than that are equal
_NOTHING = 1e-12  # of the distances' sum after the first pick: smaller gains are rounding
_TILE = 512  # sides of the tiles of distances that are computed at once: they stay in a processor's cache
_WIDTH = 2048
_ROWS = 64  # rows of distances to all that exist at once when columns are recomputed
_CACHED = 2**16  # numbers of a matrix that one step of a sum takes, likewise
_PROBES = 256  # rows by which the number of near pairs is estimated


@dataclass(frozen=True)
class Distances:
    """``d_ij = ||g_i - g_j||`` of last-layer gradients ``g = [e, e (x) h]``, as factors.

    ``d_ij^2 = ||g_i||^2 + ||g_j||^2 - 2 <e_i, e_j> (1 + <h_i, h_j>)``. The products are in float64: in float32 this
    difference would lose distances below ``1e-3 ||g||``. What is below float64's own rounding, ``1e-7 ||g||``, is 0:
    duplicates are at the distance 0 from each other, and each example from itself. Errors are taken in units of the
    group's largest, so that squares of tiny ones do not vanish; choices and weights do not depend on the unit.

    Memory: ``n (C + d)`` float64 numbers.

    Attributes:
        errors: e over its largest entry, float64 ``(n, C)``.
        embeddings: h, float64 ``(n, d)``.
        squares: ``||g_i||^2``, less its rounding, ``(n,)``.
    """

    errors: torch.Tensor
    embeddings: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, network: LastLayer, positions: np.ndarray | None = None) -> "Distances":
        """The distances among candidates of a network, by default all.

        Raises:
            UserError: A gradient is not finite.
        """
        rows = slice(None)
        if positions is not None:
            rows = torch.from_numpy(np.ascontiguousarray(positions)).to(network.labels.device)
        errors, embeddings = network.errors[rows].double(), network.embeddings[rows].double()
        largest = errors.abs().max()
        errors = errors / largest.where(largest > 0, 1.0)
        norms = (torch.linalg.vector_norm(t, dim=1) for t in (errors, embeddings))
        squares = next(norms).square() * (1.0 + next(norms).square()) * (1.0 - _ROUNDING)
        if not bool(squares.isfinite().all()):
            raise UserError("craig: the pre-trained network's gradients are not finite; pre-train at a lower rate")
        return cls(errors, embeddings, squares)

    def __len__(self) -> int:
        return len(self.squares)

    def at(self, places: slice | torch.Tensor) -> "Distances":
        """The same of some."""
        return Distances(self.errors[places], self.embeddings[places], self.squares[places])

    def indices(self, places: np.ndarray) -> torch.Tensor:
        """Places as an index tensor on the factors' device."""
        return torch.from_numpy(np.ascontiguousarray(places)).to(self.squares.device)

    def to(self, others: "Distances") -> torch.Tensor:
        """Distances to others, ``(n, m)``; for tiles: it takes three times the memory of its result."""
        products = (self.errors @ others.errors.T).mul_(-2.0)
        squared = self.squares[:, None] + others.squares
        squared.addcmul_(products, (self.embeddings @ others.embeddings.T).add_(1.0))
        return squared.clamp_(min=0.0).sqrt_()

    def matrix(self) -> np.ndarray:
        """All of them, ``(n, n)``, in main memory; half is computed, the other half mirrored."""
        size = len(self)
        matrix = np.empty((size, size))
        parts = [slice(first, min(first + _TILE, size)) for first in range(0, size, _TILE)]
        factors = [self.at(part) for part in parts]
        for a, rows in enumerate(parts):
            for b in range(a, len(parts)):
                tile = factors[a].to(factors[b]).cpu().numpy()
                if a == b:
                    tile = np.minimum(tile, tile.T)  # the two halves of a product may round differently
                else:
                    matrix[parts[b], rows] = tile.T
                matrix[rows, parts[b]] = tile
        return matrix

    def nearest(self, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each example, the distance to its nearest pick and that pick's place in ``picks``.

        Of equally near ones the first in ``picks`` counts, where distances that differ by rounding are equal.
        Time: ``n k (C + d)``. Memory: ``4 k`` numbers for each of 64 rows.

        Returns:
            float64 ``(n,)`` and int64 ``(n,)``.
        """
        chosen = self.at(self.indices(picks))
        near, owner = np.empty(len(self)), np.empty(len(self), dtype=np.int64)
        rows = max(_ROWS, min(_TILE, _TILE * _WIDTH // len(picks)))
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            found = self.at(part).to(chosen)
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

    Gains that differ by 1e-9 relative count as equal; of equal ones the lower place wins. When no gain is left, the
    rest of the budget goes to the lowest places.

    Args:
        bounds: Gains ``(n,)`` before the first pick, or bounds from above; -inf for what is taken.
        gain: The present gain of a place.
        take: Is told of each pick with a gain.
        budget: How many to pick, at most the finite bounds.
        nothing: Gains up to this are none.

    Returns:
        Places in the order of the picks.
    """
    free = np.flatnonzero(bounds > -np.inf)
    heap = list(zip((-bounds[free]).tolist(), free.tolist(), strict=True))
    heapq.heapify(heap)
    fresh = np.full(len(bounds), -1).tolist()  # the number of picks when a place's gain was computed
    picks: list[int] = []
    while len(picks) < budget:
        value, place = heap[0]
        if -value <= nothing:
            break
        if fresh[place] != len(picks):
            fresh[place] = len(picks)
            heapq.heapreplace(heap, (-gain(place), place))
            continue
        entry = _lowest_of_equals(heap, value)
        if fresh[entry[1]] != len(picks):
            fresh[entry[1]] = len(picks)
            heapq.heappush(heap, (-gain(entry[1]), entry[1]))
            continue
        picks.append(entry[1])
        take(entry[1])
    rest = sorted(place for _, place in heap)
    return picks + rest[: budget - len(picks)]


def _lowest_of_equals(heap: list[tuple[float, int]], value: float) -> tuple[float, int]:
    """Take from the heap the entry of lowest place among those whose gain or bound equals the top one."""
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

    The gain of x is ``sum_i near_i - sum_i min(near_i, d_ix)``, two passes over a row. Time: n^2, and n for each gain
    that is evaluated again (one to five times n on the gradients we measured, for a tenth of the examples).

    Args:
        matrix: ``(n, n)``, symmetric with zeros on the diagonal, of C order.
        budget: k, at most n.

    Returns:
        Places ``(k,)`` in the order of the picks.
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

    def gain(place: int) -> float:
        np.minimum(matrix[place], near, out=scratch)
        return total - float(scratch.dot(ones))

    def take(place: int) -> None:
        nonlocal total
        np.minimum(matrix[place], near, out=near)
        total = float(near.dot(ones))

    return np.array([first, *lazy_greedy(bounds, gain, take, budget - 1, _NOTHING * total)])


def greedy_by_sample(distances: Distances, budget: int, sample: np.ndarray, pairs: int) -> np.ndarray:
    """Greedy picks for groups whose matrix of distances is too large.

    Once there are a few dozen picks, an example i is nearer to few candidates x than to its pick: only the pairs
    with ``d_ix < near_i`` can ever add to a gain. So (1) the first picks are made by the exact greedy on a sample,
    as many as bring the number of such pairs, estimated from 256 rows, down to ``pairs`` (or as the sample can
    give); (2) one pass over all distances keeps those pairs; (3) the greedy goes on with them, over all candidates
    and all examples: given the first picks, its picks are those of the exact greedy (distances rounded to float32).

    Time: ``n^2 (C + d)`` once. Memory: the factors, 8 bytes a pair, the sample's matrix, 64 rows of n distances.

    Args:
        distances: Of the group, n.
        budget: k, at most n.
        sample: Places ``(m,)``, ascending.
        pairs: How many pairs may be kept.

    Returns:
        Places ``(k,)`` in the order of the picks.
    """
    order = greedy_on_matrix(distances.at(distances.indices(sample)).matrix(), min(budget, len(sample)))
    leaders = sample[order]
    probes = distances.at(distances.indices(sample[:: max(1, len(sample) // _PROBES)]))
    near, used = np.full(len(distances), np.inf), 0
    while used < len(leaders):
        count = min(max(1, 2 * used), len(leaders))
        np.minimum(near, distances.nearest(leaders[used:count])[0], out=near)
        used = count
        if _near_pairs(distances, probes, near) <= pairs:
            break
    log.info("craig: %d of %d picks by a sample of %d, the others on near pairs", used, budget, len(sample))
    if used == budget:
        return leaders
    leaders = leaders[:used]
    return np.concatenate([leaders, _greedy_on_pairs(distances, near, leaders, budget - used)])


def _near_pairs(distances: Distances, probes: Distances, near: np.ndarray) -> float:
    """About how many pairs have ``d_ix < near_i``, by some candidates x."""
    limits = torch.from_numpy(near).to(distances.squares.device)
    found = 0
    for first in range(0, len(distances), _WIDTH):
        part = slice(first, first + _WIDTH)
        found += int((probes.to(distances.at(part)) < limits[part]).sum())
    return found / len(probes) * len(distances)


def _greedy_on_pairs(distances: Distances, near: np.ndarray, leaders: np.ndarray, budget: int) -> np.ndarray:
    """The greedy after the first picks, on the pairs with ``d_ix < near_i``; ``near`` is used up."""
    limits = torch.from_numpy(near.copy()).to(distances.squares.device)
    lists: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, len(distances), _ROWS):
        lists += _lists(distances, slice(first, first + _ROWS), limits)

    def gain(place: int) -> float:
        examples, found = lists[place]
        savings = near[examples] - found
        return float(np.maximum(savings, 0.0, out=savings).sum())

    def take(place: int) -> None:
        examples, found = lists[place]
        near[examples] = np.minimum(near[examples], found)

    bounds = np.array([gain(place) for place in range(len(distances))])
    bounds[leaders] = -np.inf
    return np.array(lazy_greedy(bounds, gain, take, budget, _NOTHING * float(near.sum())), dtype=np.int64)


def _lists(distances: Distances, rows: slice, limits: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each candidate among ``rows``, the examples it is nearer to than their limits, and how near."""
    candidates = distances.at(rows)
    block = limits.new_empty(len(candidates), len(distances))
    for first in range(0, len(distances), _WIDTH):
        part = slice(first, first + _WIDTH)
        block[:, part] = candidates.to(distances.at(part))
    row, example = (block < limits).nonzero(as_tuple=True)
    found = block[row, example].float().cpu().numpy()
    ends = torch.bincount(row, minlength=len(candidates)).cumsum(0).cpu().numpy()[:-1]
    return list(zip(np.split(example.int().cpu().numpy(), ends), np.split(found, ends), strict=True))
