"""Herding: chosen examples whose mean follows the mean of all (Welling, ICML 2009)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.coresets.inputs import CandidateGroup, Method, Needs, Options, Selection, SelectionInputs
from src.lazy import torch

_NOISE = 1e-12  # relative: criteria closer than that are ties


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


METHODS = (
    Method(
        "herding",
        herding,
        Needs(embeddings=True),
        paper="Welling 2009; Rebuffi et al. 2017",
        equation="greedy argmin_i ||mu - (sum_{j in S} h_j + h_i) / (|S| + 1)||, without replacement",
        cost="n k d",
    ),
)
