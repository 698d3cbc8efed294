"""Moderate: the examples neither near to nor far from the center of their class (Xia et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.coresets.inputs import CandidateGroup, Method, Needs, Options, Selection, SelectionInputs
from src.lazy import torch


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
        "moderate",
        moderate,
        Needs(embeddings=True),
        paper="Xia et al. 2023",
        equation="smallest |d_i - median d| with d_i = ||h_i - mean of h over the class of i||",
        cost="n d + n log n",
    ),
)
