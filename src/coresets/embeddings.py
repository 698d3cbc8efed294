"""Methods that look at embeddings alone: herding, k-center, and Moderate.

Herding follows the mean of all (Welling, ICML 2009); k-center leaves no example far from a chosen one (Sener and
Savarese, ICLR 2018); Moderate takes those neither near to nor far from the center of their class (Xia et al., ICLR
2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.coresets.inputs import CandidateGroup, Method, Needs, Options, Selection, SelectionInputs
from src.lazy import torch

_NOISE = 1e-12  # relative: criteria and distances closer than that are ties


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
        cost="n k d",
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
