"""Methods that look at embeddings alone: herding, k-center, and Moderate.

Herding follows the mean of all (Welling, ICML 2009); k-center leaves no example far from a chosen one (Sener and
Savarese, ICLR 2018); Moderate takes those neither near to nor far from the center of their class (Xia et al., ICLR
2023).
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

_NOISE = 1e-12  # relative: criteria and distances closer than that are ties
_AHEAD = 64  # points whose products with all k-center computes at once
_TINY = 1e-30  # of the largest square: above what float32 loses below its smallest number


def follow_mean(embeddings: torch.Tensor, budget: int) -> np.ndarray:
    """Pick, again and again, the example that brings the mean of the picks nearest to the mean of all.

    With centered ``c_i = h_i - mu`` and their sum A over the picks,
    ``(|S| + 1)^2 ||mu - mean of S and i||^2 = ||A||^2 + 2 <A, c_i> + ||c_i||^2``, so a pick costs ``n d``. Criteria
    that differ by no more than rounding count as equal; of equal ones the lower index wins.

    Memory: the embeddings in float64, centered.

    Args:
        embeddings: ``(n, d)``.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in the order of the picks.
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
        position = picks[step] = (criteria <= criteria[best] + noise).argmax()  # numpy promises the first
        total += points[position]
        squares[position] = np.inf
    return picks


def herding(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Herding on embeddings, in the form of Rebuffi et al. (CVPR 2017, algorithm 4).

    Of the two forms in use, this one takes the example that brings the mean of the picks nearest to the group's
    mean mu. Welling's takes ``argmax_i <w, h_i>`` with ``w += mu - h_i`` after each pick; they agree where all
    embeddings have one norm (Chen et al., 2010), else Welling's prefers long ones. No example is taken twice.

    Memory: the group's embeddings in float64.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups.
        options: None is read.
    """
    layer = inputs.layers[0]
    return Selection.of([g.positions[follow_mean(layer.at(g.positions).embeddings, g.budget)] for g in groups])


def _distances(points: torch.Tensor, point: torch.Tensor) -> np.ndarray:
    """``||h_i - x||``, ``(n,)``, by differences: exactly 0 for duplicates, and without an ``(n, d)`` temporary."""
    return torch.cdist(points, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0].cpu().numpy()


def farthest_first(embeddings: torch.Tensor, budget: int) -> np.ndarray:
    """Farthest-first traversal: each pick is the example farthest from those picked before.

    The first is the one nearest to the mean. Distances to the nearest pick are kept, so a pick costs ``n d``.
    Distances that differ by no more than rounding count as equal; of equal ones the lower index wins. When all
    distinct points are taken, duplicates (at distance 0) follow by index.

    The ``n d`` are products in float32 with the 64 farthest points at once, since the next picks are mostly among
    them. By a bound on rounding, the products tell which examples a pick may be nearest to; only their distances are
    computed by differences, in float64. So the picks are those of differences alone.

    Memory: the embeddings in float64, once more while they are centered, in float32, and ``64 n`` numbers.

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
    centered = points - mean
    unit = float(centered.abs().max()) or 1.0  # in which no square overflows, and few underflow
    centered = centered.div_(unit)
    if centered.device.type == "cpu":
        centered = centered.float()
    lengths = distances / unit
    squares = np.square(lengths)
    # what float32 may get wrong in 2 <x, y>, over ||y||: d additions and products, x and y themselves, with a reserve
    errors = 4.0 * (len(mean) + 8) * 2.0**-24 * lengths
    nearest = np.full(len(points), np.inf)  # distance to the nearest pick; -inf for picks
    reach = nearest.copy()  # its square in units; 0 for picks
    picks = np.empty(budget, dtype=np.int64)
    ahead: dict[int, np.ndarray] = {}
    for step in range(budget):
        picks[step] = position
        if position not in ahead:
            others = np.argpartition(-nearest, min(_AHEAD, len(points) - 1))[:_AHEAD] if step else []
            rows = torch.tensor(sorted({int(position), *map(int, others)}), device=centered.device)
            products = (centered[rows] @ centered.T).mul_(2.0).cpu().numpy()
            ahead = dict(zip(rows.tolist(), products, strict=True))
        # above ||x - y||^2 by no more than rounding
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

    The radius is at most twice the best one's. The paper starts from labeled examples; here, where there are none,
    from the example nearest to the group's mean, which no seed changes.

    Subsampled, the random parts of a group are chosen from on their own (see :func:`random_parts`). (Random
    candidates for each pick would save nothing: each needs its distances to all picks.)

    Memory: the group's embeddings in float64.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups.
        options: ``selection_subsample``.
    """
    if (epsilon := options.epsilon(groups)) is not None:
        groups = random_parts(groups, epsilon, rng.numpy_generator(inputs.seed, 0, "k-center parts"))
    layer = inputs.layers[0]
    return Selection.of([g.positions[farthest_first(layer.at(g.positions).embeddings, g.budget)] for g in groups])


def center_distances(embeddings: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """``||h_i - mean of h over the examples of label y_i||``, float64 ``(n,)``.

    Class by class, so that beside the embeddings only one class is held in float64, and so that no atomic sums make
    the result depend on the order of a GPU's threads.

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
    """Positions of the ``budget`` values closest to their median (of an even number: the mean of the middle two).

    Of equally close values the lower position wins.
    """
    return np.argsort(np.abs(values - np.median(values)), kind="stable")[:budget]


def moderate(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Moderate coreset (Xia et al., ICLR 2023): distances to the class center closest to their median.

    From the paper: an example's score is the Euclidean distance of its embedding to the mean embedding of its
    class; the examples with scores close to the median of the scores are kept.

    Our reading: close is by the value ``|d_i - median d|``, not by equal ranks below and above (the two differ where
    distances are skewed), and the median is the group's. One group of all takes one median for all classes; the
    centers always are those of all candidates of a label.

    Args:
        inputs: One layer with ``embeddings`` ``(n, d)``.
        groups: The groups.
        options: None is read.
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
