"""Greedy facility location on last-layer gradients: every example near to a chosen one.

CRAIG's similarities are ``s_ij = max d - d_ij + 1e-3`` with the best similarity 0 before the first pick. So the first
pick has the smallest sum of distances, and from then on the constant cancels: the gain of x is
``sum_i max(0, near_i - d_ix)`` with ``near_i`` the distance of i to its nearest pick. Nothing here needs ``max d``.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from src.coresets.material import LastLayer
from src.errors import UserError

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

    def nearest(self, picks: np.ndarray, matrix: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of each example, the distance to its nearest pick and that pick's place in ``picks``.

        Of equally near ones the first in ``picks`` counts, where distances that differ by rounding are equal.
        Time: ``n k (C + d)``, with the matrix ``n k``. Memory: a few MB, or ``4 k`` numbers for each of 128 rows.

        Args:
            picks: Places ``(k,)``.
            matrix: All distances, where they are known.

        Returns:
            float64 ``(n,)`` and int64 ``(n,)``.
        """
        chosen = self.at(self.indices(picks))
        near, owner = np.empty(len(self)), np.empty(len(self), dtype=np.int64)
        rows = max(ROWS, min(_TILE, _TILE * WIDTH // len(picks)))
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            if matrix is None:
                found = self.at(part).to(chosen)
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

    Gains that differ by 1e-9 relative count as equal; of equal ones the lower place wins.

    Args:
        bounds: Gains ``(n,)`` before the first pick, or bounds from above; -inf for what is taken.
        gain: The present gain of a place.
        take: Is told of each pick with a gain.
        budget: How many to pick.
        nothing: Gains up to this are none: the choice ends there.

    Returns:
        Places in the order of the picks.
    """
    free = np.flatnonzero(bounds > -np.inf)
    heap = list(zip((-bounds[free]).tolist(), free.tolist(), strict=True))
    heapq.heapify(heap)
    fresh = np.full(len(bounds), -1).tolist()  # the number of picks when a place's gain was computed
    picks: list[int] = []
    while heap and len(picks) < budget:
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
    return picks


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

    The gain of x is ``sum_i near_i - sum_i min(near_i, d_ix)``, two passes over a row. When no gain is left,
    the budget is filled by place. Time: n^2, and n for each gain that is evaluated again (for a tenth of the
    examples, one to five times n gains on random and on clustered gradients).

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

    picks = np.array([first, *lazy_greedy(bounds, gain, take, budget - 1, NOTHING * total)])
    return filled(picks, near, budget)


def filled(picks: np.ndarray, near: np.ndarray, budget: int) -> np.ndarray:
    """The picks and, up to the budget, the examples farthest from them (of equal ones the lower place)."""
    far = near.copy()
    far[picks] = -np.inf
    return np.concatenate([picks, np.argsort(-far, kind="stable")[: budget - len(picks)]])
