"""Rank and linear correlation of estimated and true deviations, with bootstrap intervals (Fig. 2)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95
_BLOCK = 1_000_000  # values that are resampled at once
_LEAST = 3  # pairs; two are always perfectly correlated


class Correlation(NamedTuple):
    """A correlation and the ends of its interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" + ("" if np.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def correlation_intervals(
    x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Correlation]:
    """Spearman's and Pearson's correlation of pairs, with percentile bootstrap intervals of 95 %.

    Pairs are resampled with replacement, and ranked anew in each resample, ties by their mean rank. Resamples in
    which ``x`` or ``y`` is constant have no correlation and are skipped.

    Args:
        x: ``(n,)``.
        y: ``(n,)``.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        ``Spearman`` and ``Pearson``; NaN for fewer than 3 pairs and where ``x`` or ``y`` is constant.

    Raises:
        ValueError: The lengths differ.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{x.shape} and {y.shape} are not the shapes of n pairs")
    if len(x) < _LEAST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(("Spearman", "Pearson"), Correlation(np.nan, np.nan, np.nan))
    pairs = [(values, np.unique(values, return_inverse=True)[1]) for values in (x, y)]  # with their dense ranks
    value = _both(pairs, np.arange(len(x))[None])[:, 0]
    found = np.concatenate([_both(pairs, draws) for draws in _draws(len(x), resamples, seed)], axis=1)
    ends = (1 - COVERAGE) / 2, (1 + COVERAGE) / 2
    low, high = np.quantile(found, ends, axis=1) if found.size else np.full((2, 2), np.nan)
    return {
        name: Correlation(*map(float, each))
        for name, *each in zip(("Spearman", "Pearson"), value, low, high, strict=True)
    }


def correlation_text(true: np.ndarray, estimated: np.ndarray) -> str:
    """The number of pairs and their correlations in words, a line each; a dash where there is none."""
    found = correlation_intervals(true, estimated)
    which = "" if np.isnan(found["Spearman"].low) else " (95 % bootstrap intervals)"
    return "\n".join([f"n = {len(true):,}{which}", *(f"{name} {value}" for name, value in found.items())])


def _draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Positions ``(b, count)`` of resamples, in blocks that bound the memory."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        yield generator.integers(count, size=(min(block, resamples - start), count))


def _both(pairs: list[tuple[np.ndarray, np.ndarray]], draws: np.ndarray) -> np.ndarray:
    """Spearman's and Pearson's correlation ``(2, b)`` of resamples, without those that have none."""
    groups = [dense[draws] for _, dense in pairs]
    varied = np.logical_and(*(np.ptp(group, axis=1) > 0 for group in groups))
    ranks = [_ranks(group[varied]) for group in groups]
    values = [values[draws[varied]] for values, _ in pairs]
    return np.stack([_pearson(*ranks), _pearson(*values)])


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Mean ranks ``(b, n)`` within rows, from numbers ``(b, n)`` that order the values: by counting, not sorting."""
    rows, width = len(groups), int(groups.max(initial=0)) + 1
    places = groups + width * np.arange(rows)[:, None]
    counts = np.bincount(places.ravel(), minlength=rows * width).reshape(rows, width)
    return (counts.cumsum(axis=1) - (counts - 1) / 2).ravel()[places]


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlations ``(b,)`` of rows ``(b, n)``, none constant."""
    x, y = (rows - rows.mean(axis=1, keepdims=True) for rows in (x, y))
    x, y = (rows / np.abs(rows).max(axis=1, keepdims=True) for rows in (x, y))  # squares of tiny ones would vanish
    product = np.einsum("bn,bn->b", x, y)
    return np.clip(product / np.sqrt(np.einsum("bn,bn->b", x, x) * np.einsum("bn,bn->b", y, y)), -1, 1)
