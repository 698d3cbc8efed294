"""D2: select difficult and diverse examples by message passing on a neighbor graph (Maharana et al., ICLR 2024)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.cli import number, option
from src.coresets.ccs import finite_scores
from src.coresets.inputs import CandidateGroup, MemoryOptions, Method, Needs, Selection, SelectionInputs
from src.lazy import torch

_FORWARD_DECAY = 1.0  # gamma_f
_ROWS = 256  # maximum rows of distances computed at once; more is not faster
_NOISE = 1e-12  # relative to the largest squared norm; squared distances closer than this are ties


@dataclass(frozen=True)
class D2Options(MemoryOptions):
    """Options of D2.

    Attributes:
        d2_neighbors: Number of neighbors k in the graph.
        d2_gamma: Decay gamma_r of the reverse messages.
    """

    d2_neighbors: int = option(5, "d2: nearest neighbors in the graph", number(int, 0))
    d2_gamma: float = option(1.0, "d2: decay of the reverse messages", number(float, 0))


@dataclass(frozen=True)
class Graph:
    """An undirected graph over m examples; each edge appears in both directions, sorted by start, then end.

    Attributes:
        starts: ``(m + 1,)``: the edges of example i have indices ``starts[i]`` to ``starts[i + 1]``.
        ends: int64 ``(e,)``.
        squares: Squared distances ``(e,)``, scaled to mean 1.
    """

    starts: np.ndarray
    ends: np.ndarray
    squares: np.ndarray


def nearest_neighbors(embeddings: torch.Tensor, k: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest neighbors of each example; ties go to the lower index.

    The search is exhaustive, in float64, in blocks of rows. Distances that differ only by rounding count as equal.

    Args:
        embeddings: ``(m, d)``.
        k: From 1 to m - 1.
        memory: Memory limit of a block in MiB (a block has at least one row).

    Returns:
        The neighbors' positions, int64 ``(m, k)``, ascending, and their squared distances, float64 ``(m, k)``.
    """
    points = embeddings.double()
    points = points - points.mean(dim=0)  # less cancellation in |a|^2 + |b|^2 - 2ab
    norms = torch.einsum("md,md->m", points, points)
    step = norms.max() * _NOISE
    row = 8 * (3 * len(points) + 2 * k * points.shape[1])  # bytes: distances, differences and temporaries
    rows = int(np.clip(memory * 2**20 // row, 1, _ROWS))
    positions, squares = [], []
    for first in range(0, len(points), rows):
        block = points[first : first + rows]
        distances = torch.addmm(norms, block, points.T, alpha=-2.0).add_(norms[first : first + rows, None])
        if step > 0:
            distances.div_(step).round_()
        else:
            distances.zero_()
        distances.diagonal(offset=first).fill_(torch.inf)
        near = _lowest(distances, k)
        positions.append(near.cpu())
        difference = points[near] - block[:, None]  # b k d
        squares.append(torch.einsum("bkd,bkd->bk", difference, difference).cpu())
    return torch.cat(positions).numpy(), torch.cat(squares).numpy()


def _lowest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k lowest values in each row of ``(b, m)``, ascending; ties go to the first columns (k < m)."""
    bound, beyond = values.topk(k + 1, dim=1, largest=False, sorted=True).values[:, k - 1 :].split(1, dim=1)
    chosen = values <= bound
    crowded = (bound == beyond).nonzero()[:, 0]
    if len(crowded):
        part, bound = values[crowded], bound[crowded]
        ties = part == bound
        room = k - (part < bound).sum(dim=1, keepdim=True)
        chosen[crowded] = (part < bound) | (ties & (ties.cumsum(dim=1) <= room))
    return chosen.nonzero()[:, 1].view(len(values), k)


def neighbor_graph(embeddings: torch.Tensor, k: int, memory: int) -> Graph:
    """Build the graph that joins two examples if either is among the other's k nearest neighbors.

    Args:
        embeddings: ``(m, d)``.
        k: Number of neighbors; capped at m - 1.
        memory: Memory limit of a block of distances in MiB.
    """
    size = len(embeddings)
    k = min(k, size - 1)
    if k < 1:
        return Graph(np.zeros(size + 1, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    positions, squares = nearest_neighbors(embeddings, k, memory)
    one, other = np.repeat(np.arange(size), k), positions.ravel()
    _, first = np.unique(np.minimum(one, other) * size + np.maximum(one, other), return_index=True)
    one, other, squares = one[first], other[first], squares.ravel()[first]
    mean = squares.mean()
    squares = squares / mean if mean > 0 else squares
    begin, end = np.concatenate([one, other]), np.concatenate([other, one])
    order = np.lexsort((end, begin))
    starts = np.concatenate([[0], np.cumsum(np.bincount(begin, minlength=size))])
    return Graph(starts, end[order], np.tile(squares, 2)[order])


def forward_messages(difficulty: np.ndarray, graph: Graph) -> np.ndarray:
    """``x_u + sum over neighbors v of exp(-gamma_f d_uv^2) x_v``, ``(m,)``, with gamma_f = 1."""
    begin = np.repeat(np.arange(len(difficulty)), np.diff(graph.starts))
    messages = np.exp(-_FORWARD_DECAY * graph.squares) * difficulty[graph.ends]
    return difficulty + np.bincount(begin, weights=messages, minlength=len(difficulty))


def greedy_picks(values: np.ndarray, graph: Graph, gamma: float, budget: int) -> np.ndarray:
    """Take the highest value ``budget`` times; each pick u sends ``-exp(-gamma d_uv^2) x_u`` to its neighbors v.

    The heap gets a new entry whenever a value changes; outdated entries are skipped.

    Args:
        values: x, ``(m,)``.
        graph: The neighbor graph.
        gamma: gamma_r.
        budget: From 1 to m.

    Returns:
        Positions in selection order; ties go to the lower position.
    """
    x, starts, ends = values.tolist(), graph.starts.tolist(), graph.ends.tolist()
    weights = np.exp(-gamma * graph.squares).tolist()
    heap = [(-value, position) for position, value in enumerate(x)]
    heapq.heapify(heap)
    taken = [False] * len(x)
    picks: list[int] = []
    while len(picks) < budget:
        negative, position = heapq.heappop(heap)
        if taken[position] or -negative != x[position]:
            continue
        taken[position] = True
        picks.append(position)
        for edge in range(starts[position], starts[position + 1]):
            end = ends[edge]
            if not taken[end]:
                x[end] -= weights[edge] * x[position]
                heapq.heappush(heap, (-x[end], end))
    return np.array(picks, dtype=np.int64)


def scaled_difficulty(scores: np.ndarray) -> np.ndarray:
    """Scale scores linearly to [0, 1]; return ones if all scores are equal."""
    width = np.ptp(scores)
    return (scores - scores.min()) / width if width > 0 else np.ones(len(scores))


def d2(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: D2Options) -> Selection:
    """D2 pruning (Maharana et al., ICLR 2024): message passing for diversity and difficulty.

    From the paper: examples are nodes of an undirected k-nearest-neighbor graph in embedding space, with difficulty
    as the node feature x. A forward pass adds to each node its neighbors' features times ``exp(-gamma_f d^2)``
    (gamma_f = 1). Then the node with the highest feature is picked repeatedly, and each pick subtracts
    ``exp(-gamma_r d^2)`` times its feature from its neighbors' features (gamma_r = ``d2_gamma``).

    Our interpretation: the difficulty is the negated AUM, scaled to [0, 1] in each group (messages only accumulate if
    features are nonnegative). Two examples are joined if either is among the other's k nearest. Squared distances are
    divided by their mean over the group's edges, which removes the scale of the embeddings. Each group is selected
    from independently, with a graph of its own members. Subtractions can make a feature negative; it is then sent
    unchanged, as in the paper's formula. With ``d2_neighbors`` 0, D2 keeps the most difficult examples.

    Memory: the group's embeddings in float64, and blocks of at most 256 rows of distances, within
    ``selection_memory``. Time: the distances of all pairs, then O((m + e) log(m + e)) for e edges.

    Args:
        inputs: ``scores`` ``(n,)``, the negated AUM, HIGH is hard; one layer with ``embeddings`` ``(n, d)``.
        groups: The groups of candidates.
        options: Neighbors, decay and memory.

    Raises:
        FileError: A candidate has no finite score.
    """
    scores = finite_scores(inputs, "d2")
    embeddings = inputs.layers[0].embeddings
    picks = []
    for group in groups:
        members = torch.from_numpy(np.ascontiguousarray(group.positions)).to(embeddings.device)
        graph = neighbor_graph(embeddings[members], options.d2_neighbors, options.selection_memory)
        values = forward_messages(scaled_difficulty(scores[group.positions]), graph)
        picks.append(group.positions[greedy_picks(values, graph, options.d2_gamma, group.budget)])
    return Selection.of(picks)


METHODS = (
    Method(
        "d2",
        d2,
        Needs(reduced="aum", embeddings=True),
        paper="Maharana et al. 2024",
        equation="highest x_u + sum_v exp(-d_uv^2) x_v; each pick u subtracts exp(-gamma d_uv^2) x_u from its "
        "neighbors v",
        cost="n^2 d + k n log n",
        options=D2Options,
    ),
)
