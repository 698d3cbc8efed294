"""Methods that use only embeddings: herding, k-center, and Moderate.

Herding matches the mean of all examples (Welling, ICML 2009). k-center leaves no example far from a pick (Sener and
Savarese, ICLR 2018). Moderate keeps examples at a medium distance from their class center (Xia et al., ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src import rng
from src.coresets.inputs import (
    CandidateGroup,
    Method,
    Needs,
    Options,
    Selection,
    SelectionInputs,
    SubsampleOptions,
    random_parts,
)
from src.lazy import torch

_NOISE = 1e-12  # relative: criteria and distances closer than this are ties
_AHEAD = 64  # points whose products with all others k-center computes at once
_TINY = 1e-30  # relative to the largest square; covers what float32 loses to underflow


def follow_mean(embeddings: torch.Tensor, budget: int) -> np.ndarray:
    """Repeatedly pick the example that brings the mean of the picks nearest to the mean of all examples.

    With centered ``c_i = h_i - mu`` and their sum A over the picks,
    ``(|S| + 1)^2 ||mu - mean of S and i||^2 = ||A||^2 + 2 <A, c_i> + ||c_i||^2``, so a pick costs ``n d``. Criteria
    that differ only by rounding count as equal; ties go to the lower index.

    Memory: the embeddings in float64, centered.

    Args:
        embeddings: ``(n, d)``.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in selection order.
    """
    points = embeddings.double()
    mean = points.mean(dim=0)
    points = points - mean
    size = float(torch.linalg.vector_norm(mean))
    norms = torch.linalg.vector_norm(points, dim=1)
    total = torch.zeros_like(points[0])
    squares, lengths = norms.square().cpu().numpy(), norms.cpu().numpy()
    picks = np.empty(budget, dtype=np.int64)
    for step in range(budget):
        criteria = squares + 2.0 * (points @ total).cpu().numpy()
        best = criteria.argmin()
        noise = _NOISE * lengths[best] * (lengths[best] + 2.0 * float(torch.linalg.vector_norm(total)) + size)
        position = picks[step] = (criteria <= criteria[best] + noise).argmax()  # argmax returns the first match
        total += points[position]
        squares[position] = np.inf
    return picks


def herding(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Herding on embeddings, in the form of Rebuffi et al. (CVPR 2017, algorithm 4).

    Of the two common forms, this one picks the example that brings the mean of the picks nearest to the group's
    mean mu. Welling's form picks ``argmax_i <w, h_i>`` and updates ``w += mu - h_i``. The two agree if all embeddings
    have the same norm (Chen et al., 2010); otherwise Welling's favors long ones. No example is picked twice.

    Memory: the group's embeddings in float64.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups of candidates.
        options: Unused.
    """
    layer = inputs.layers[0]
    return Selection.of([g.positions[follow_mean(layer.at(g.positions).embeddings, g.budget)] for g in groups])


def _distances(points: torch.Tensor, point: torch.Tensor) -> np.ndarray:
    """``||h_i - x||``, ``(n,)``, from differences: exactly 0 for duplicates, and no ``(n, d)`` temporary."""
    return torch.cdist(points, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0].cpu().numpy()


def farthest_first(embeddings: torch.Tensor, budget: int) -> np.ndarray:
    """Farthest-first traversal: each pick is the example farthest from all earlier picks.

    The first pick is the example nearest to the mean. Distances to the nearest pick are stored, so a pick costs
    ``n d``. Distances that differ only by rounding count as equal; ties go to the lower index. Once all distinct
    points are picked, duplicates (at distance 0) follow by index.

    The ``n d`` term is a float32 product with the 64 farthest points at once, because the next picks are mostly among
    them. A rounding bound on the products tells which examples a pick may be nearest to; only their distances are
    computed from differences, in float64. The picks are therefore identical to those from differences alone.

    Memory: the embeddings in float64, a second copy during centering, a float32 copy, and ``64 n`` numbers.

    Args:
        embeddings: ``(n, d)``.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in selection order.
    """
    points = embeddings.double()
    mean = points.mean(dim=0)
    distances = _distances(points, mean)
    noise = _NOISE * (float(torch.linalg.vector_norm(mean)) + distances.mean())
    position = (distances <= distances.min() + noise).argmax()  # argmax returns the first match
    centered = points - mean
    unit = float(centered.abs().max()) or 1.0  # in this unit no square overflows, and few underflow
    centered = centered.div_(unit)
    if centered.device.type == "cpu":
        centered = centered.float()
    lengths = distances / unit
    squares = np.square(lengths)
    # bound on the float32 error of 2 <x, y>, over ||y||: d additions and products, rounding of x and y, and a margin
    errors = 4.0 * (len(mean) + 8) * 2.0**-24 * lengths
    nearest = np.full(len(points), np.inf)  # distance to the nearest pick; -inf for picks
    reach = nearest.copy()  # squared distance to the nearest pick, in `unit`; 0 for picks
    picks = np.empty(budget, dtype=np.int64)
    ahead: dict[int, np.ndarray] = {}
    for step in range(budget):
        picks[step] = position
        if position not in ahead:
            others = np.argpartition(-nearest, min(_AHEAD, len(points) - 1))[:_AHEAD] if step else []
            rows = torch.tensor(sorted({int(position), *map(int, others)}), device=centered.device)
            products = (centered[rows] @ centered.T).mul_(2.0).cpu().numpy()
            ahead = dict(zip(rows.tolist(), products, strict=True))
        # a lower bound of ||x - y||^2, up to rounding
        least = squares - ahead[position]
        least -= errors * lengths[position]
        near = np.flatnonzero(least <= reach - (squares[position] - _TINY))
        rows = torch.from_numpy(near).to(points.device)
        nearest[near] = np.minimum(nearest[near], _distances(points[rows], points[position]))
        nearest[position] = -np.inf
        reach[near] = np.square(np.maximum(nearest[near], 0.0) / unit)
        farthest = nearest.max()
        position = (nearest >= farthest - _NOISE * max(farthest, 0.0)).argmax()
    return picks


def k_center(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: SubsampleOptions) -> Selection:
    """k-center greedy (Sener and Savarese, ICLR 2018, algorithm 1) on embeddings.

    The radius is at most twice the optimum. The paper starts from labeled examples. Here there are none, so the first
    pick is the example nearest to the group's mean, which does not depend on the seed.

    With subsampling, each random part of a group is selected from independently (see :func:`random_parts`). Random
    candidates for each pick would not save time: each candidate needs its distances to all picks.

    Memory: the group's embeddings in float64.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups of candidates.
        options: ``selection_subsample``.
    """
    if (epsilon := options.epsilon(groups)) is not None:
        groups = random_parts(groups, epsilon, rng.numpy_generator(inputs.seed, 0, "k-center parts"))
    layer = inputs.layers[0]
    return Selection.of([g.positions[farthest_first(layer.at(g.positions).embeddings, g.budget)] for g in groups])


def center_distances(embeddings: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Distances to the class mean: ``||h_i - mean of h over the examples with label y_i||``, float64 ``(n,)``.

    One class is processed at a time: only that class is copied to float64, and there are no atomic sums whose result
    would depend on the order of GPU threads.

    Args:
        embeddings: h, ``(n, d)``.
        labels: ``(n,)``.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    distances = np.empty(len(labels))
    for members in np.split(order, starts):
        rows = embeddings[torch.from_numpy(members).to(embeddings.device)].double()
        distances[members] = torch.linalg.vector_norm(rows - rows.mean(dim=0), dim=1).cpu().numpy()
    return distances


def nearest_to_median(values: np.ndarray, budget: int) -> np.ndarray:
    """Positions of the ``budget`` values closest to their median (for an even count, the mean of the middle two).

    Ties go to the lower position.
    """
    return np.argsort(np.abs(values - np.median(values)), kind="stable")[:budget]


def moderate(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Moderate coreset (Xia et al., ICLR 2023): keep distances to the class center that are closest to their median.

    From the paper: an example's score is the Euclidean distance of its embedding to the mean embedding of its
    class; the examples with scores close to the median score are kept.

    Our interpretation: closeness is ``|d_i - median d|``, not equal rank ranges below and above the median (the two
    differ for skewed distances). The median is that of the group, so a single group has one median for all classes.
    The center of a class is always the mean over all candidates with that label.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups of candidates.
        options: Unused.
    """
    distances = center_distances(inputs.layers[0].embeddings, np.asarray(inputs.labels))
    return Selection.of([g.positions[nearest_to_median(distances[g.positions], g.budget)] for g in groups])


METHODS = (
    Method(
        "herding",
        herding,
        Needs(embeddings=True),
        paper="Welling 2009; Rebuffi et al. 2017",
        equation="greedy argmin_i ||mu - (sum_{j in S} h_j + h_i) / (|S| + 1)||, without replacement",
        cost="n k d",
    ),
    Method(
        "k_center",
        k_center,
        Needs(embeddings=True),
        paper="Sener and Savarese 2018",
        equation="greedy for min_S max_i min_{j in S} ||h_i - h_j|| (algorithm 1), from the example nearest "
        "to the mean",
        cost="n k d; subsampled: n d",
        options=SubsampleOptions,
    ),
    Method(
        "moderate",
        moderate,
        Needs(embeddings=True),
        paper="Xia et al. 2023",
        equation="smallest |d_i - median d| with d_i = ||h_i - mean of h over the class of i||",
        cost="n d + n log n",
    ),
)
