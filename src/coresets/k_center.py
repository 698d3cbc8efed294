"""k-center: no example far from a chosen one (Sener and Savarese, ICLR 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.coresets.inputs import CandidateGroup, Method, Needs, Options, Selection, SelectionInputs
from src.lazy import torch

_NOISE = 1e-12  # relative: distances closer than that are ties


def _distances(points: torch.Tensor, point: torch.Tensor) -> np.ndarray:
    """``||h_i - x||``, ``(n,)``, by differences: exactly 0 for duplicates, and without an ``(n, d)`` temporary."""
    return torch.cdist(points, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0].cpu().numpy()


def farthest_first(embeddings: torch.Tensor, budget: int) -> np.ndarray:
    """Farthest-first traversal: each pick is the example farthest from those picked before.

    The first is the one nearest to the mean. Distances to the nearest pick are kept, so a pick costs ``n d``.
    Distances that differ by no more than rounding count as equal; of equal ones the lower index wins. When all
    distinct points are taken, duplicates (at distance 0) follow by index.

    Memory: the embeddings in float64.

    Args:
        embeddings: ``(n, d)``.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in the order of the picks.
    """
    points = embeddings.double()
    mean = points.mean(dim=0)
    distances = _distances(points, mean)
    noise = _NOISE * (float(torch.linalg.vector_norm(mean)) + distances.mean())
    position = (distances <= distances.min() + noise).argmax()  # numpy promises the first
    nearest = np.full(len(points), np.inf)  # distance to the nearest pick; -inf for picks
    picks = np.empty(budget, dtype=np.int64)
    for step in range(budget):
        picks[step] = position
        np.minimum(nearest, _distances(points, points[position]), out=nearest)
        nearest[position] = -np.inf
        farthest = nearest.max()
        position = (nearest >= farthest - _NOISE * max(farthest, 0.0)).argmax()
    return picks


def k_center(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """k-center greedy (Sener and Savarese, ICLR 2018, algorithm 1) on embeddings.

    The radius is at most twice the best one's. The paper starts from labeled examples; here, where there are none,
    from the example nearest to the group's mean, which no seed changes.

    Memory: the group's embeddings in float64.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups.
        options: None is read.
    """
    layer = inputs.layers[0]
    return Selection.of([g.positions[farthest_first(layer.at(g.positions).embeddings, g.budget)] for g in groups])


METHODS = (
    Method(
        "k_center",
        k_center,
        Needs(embeddings=True),
        paper="Sener and Savarese 2018",
        equation="greedy for min_S max_i min_{j in S} ||h_i - h_j|| (algorithm 1), from the example nearest "
        "to the mean",
        cost="n k d",
    ),
)
