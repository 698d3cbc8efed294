"""Measure how well two scores agree. Every function skips examples for which either score is NaN."""

import csv
import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from src.errors import ArgumentError, UserError


class Overlap(NamedTuple):
    """Number of examples that two rankings share in their lower and upper halves, and the sizes of the halves."""

    lower: int
    upper: int
    lower_size: int
    upper_size: int


def _pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both scores restricted to examples for which neither is NaN, and the mask of those examples."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(
            f"scores of shapes {a.shape} and {b.shape} cannot be compared: they belong to different data sets"
        )
    both = ~(np.isnan(a) | np.isnan(b))
    return a[both], b[both], both


def spearman_test(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation and its p-value; NaN if a score is constant.

    Args:
        a: ``(n,)``.
        b: ``(n,)``.
    """
    rho = spearman(a, b)
    if np.isnan(rho):
        return rho, rho
    from scipy.special import stdtr  # the same formula as scipy.stats.spearmanr, which takes a second to import

    freedom = len(_pairs(a, b)[0]) - 2
    with np.errstate(divide="ignore"):  # if the correlation is 1 or -1
        t = rho * np.sqrt(np.divide(freedom, (rho + 1) * (1 - rho)))
    return rho, float(2 * stdtr(freedom, -abs(t)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two scores ``(n,)``; NaN if one is constant."""
    a, b, _ = _pairs(a, b)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    ranks = []
    for values in (a, b):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[which])  # ties share their mean rank
    return float(np.corrcoef(ranks)[0, 1])


def spearman_within_class(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of Spearman's correlation within each class, skipping classes with a constant score.

    Args:
        a: ``(n,)``.
        b: ``(n,)``.
        labels: ``(n,)`` int.
    """
    a, b, both = _pairs(a, b)
    labels = np.asarray(labels)[both]
    each = [spearman(a[labels == c], b[labels == c]) for c in np.unique(labels)]
    each = [rho for rho in each if not np.isnan(rho)]
    return float(np.mean(each)) if each else float("nan")


def half_overlaps(a: np.ndarray, b: np.ndarray) -> Overlap:
    """Count the examples that both rankings place in their lower half, and in their upper half.

    The lower half is the first floor(n/2) examples of a stable sort (ties broken by index).
    """
    a, b, _ = _pairs(a, b)
    half = len(a) // 2
    order_a, order_b = np.argsort(a, kind="stable"), np.argsort(b, kind="stable")
    lower = len(np.intersect1d(order_a[:half], order_b[:half]))
    upper = len(np.intersect1d(order_a[half:], order_b[half:]))
    return Overlap(lower, upper, half, len(a) - half)


def top_overlap(a: np.ndarray, b: np.ndarray, fraction: float = 0.1) -> float:
    """Fraction of the top ``fraction`` of examples by ``a`` that are also in the top ``fraction`` by ``b``.

    The top examples are the last ones of a stable sort. 1 is full agreement; ``fraction`` is the chance level.

    Raises:
        ArgumentError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ArgumentError("fraction", f"{fraction}: must be in (0, 1]")
    a, b, _ = _pairs(a, b)
    k = max(1, round(fraction * len(a)))
    top_a, top_b = np.argsort(a, kind="stable")[-k:], np.argsort(b, kind="stable")[-k:]
    return len(np.intersect1d(top_a, top_b)) / k


def against_reference(
    scores: np.ndarray, reference: np.ndarray, labels: np.ndarray | None = None
) -> dict[str, float]:
    """Compute every agreement measure between a score and a reference such as memorization.

    Returns:
        ``spearman``, ``p_value``, ``lower_half`` and ``upper_half`` (numbers of shared examples) with their sizes,
        ``top_tenth`` (fraction shared), and ``spearman_within_class`` if labels are given.
    """
    rho, p_value = spearman_test(scores, reference)
    halves = half_overlaps(scores, reference)
    report = {
        "spearman": rho,
        "p_value": p_value,
        "lower_half": halves.lower,
        "upper_half": halves.upper,
        "lower_half_size": halves.lower_size,
        "upper_half_size": halves.upper_size,
        "top_tenth": top_overlap(scores, reference),
    }
    if labels is not None:
        report["spearman_within_class"] = spearman_within_class(scores, reference, labels)
    return report


def comparison_table(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Format comparisons as csv text, one line per score and reference.

    Args:
        table: Maps a score, then a reference, to the result of :func:`against_reference`.
    """
    text = io.StringIO()
    first = next(iter(next(iter(table.values())).values()))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["score", "reference", *first])
    for score, row in table.items():
        for reference, numbers in row.items():
            writer.writerow([score, reference, *numbers.values()])
    return text.getvalue()
