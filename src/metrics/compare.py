"""Measure how well two scores agree. Every function skips examples for which either score is NaN."""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

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
    return float(np.corrcoef(ranked(a), ranked(b))[0, 1])


def ranked(values: np.ndarray) -> np.ndarray:
    """Ranks of ``values`` ``(n,)`` from 1 to n; ties share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


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


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over axis 0, skipping NaN, in float64; NaN where all entries are NaN."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


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


def pareto_front(costs: Sequence[float | None], values: Sequence[float]) -> list[int]:
    """Find the scores that no other score beats: none costs at most as much and agrees at least as well.

    Equal scores do not beat each other.

    Args:
        costs: k costs; None if unknown, which excludes the score.
        values: k agreements; NaN excludes the score.

    Returns:
        Their positions, by ascending cost.
    """
    known = [i for i, cost in enumerate(costs) if cost is not None and not np.isnan(values[i])]
    front, best = [], -np.inf
    for _, group in itertools.groupby(sorted(known, key=lambda i: (costs[i], -values[i])), key=lambda i: costs[i]):
        tied = list(group)
        top = values[tied[0]]
        if top > best:
            front += [i for i in tied if values[i] == top]
            best = top
    return front


# ------------------------------------------------------------------------------------------------------- bootstrap

_BLOCK = 2**20  # counts in memory at a time, examples times resamples: 8 MiB


class Interval(NamedTuple):
    """A statistic with its percentile interval."""

    value: float
    low: float
    high: float


class _Ranking:
    """Ranks values in resamples of their examples.

    A resample is represented by how often it contains each example. The mean rank of a value then follows from the
    cumulative counts of the values below it, so values are sorted only once. Ranks are those of scipy's ``rankdata``
    on the resample.

    Args:
        values: ``(n,)``, without NaN; g of them are distinct.
    """

    def __init__(self, values: np.ndarray) -> None:
        distinct, self.group = np.unique(values, return_inverse=True)
        self._order = np.argsort(self.group, kind="stable")
        self._starts = np.searchsorted(self.group[self._order], np.arange(len(distinct)))

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """Sum weights ``(n, R)`` over the examples with each distinct value, in ascending order: ``(g, R)``."""
        ordered = weights[self._order]
        return ordered if len(self._starts) == len(ordered) else np.add.reduceat(ordered, self._starts, axis=0)

    def __call__(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rank each distinct value, and compute ``12 * sum (rank - mean rank)^2`` over the resample.

        Args:
            counts: float64 ``(n, R)``, how often each of R resamples contains each example.

        Returns:
            Ranks ``(g, R)``, which have no meaning for values that a resample does not contain, and spreads ``(R,)``.
        """
        sizes = self.sums(counts)
        total = counts.sum(axis=0)
        ranks = np.cumsum(sizes, axis=0)
        ranks -= 0.5 * sizes
        ranks += 0.5
        return ranks, total**3 - np.einsum("gr,gr,gr->r", sizes, sizes, sizes)


def _resampled(
    scores: Sequence[_Ranking], reference: _Ranking, counts: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Spearman's correlation of each score with the reference in each resample, and its AUROC for a binary reference.

    For a binary reference with n1 ones and n0 zeros, ``sum (rank - mean)^2 = N n1 n0 / 4``, and the Mann-Whitney
    statistic is a linear function of the rank covariance: ``AUROC = 1/2 + 2 cov / (N n1 n0)``.

    Args:
        scores: k rankings.
        reference: The reference's ranking.
        counts: float64 ``(n, R)``.

    Returns:
        Two lists of k arrays ``(R,)``; NaN if a score or the reference is constant in a resample.
    """
    total = counts.sum(axis=0)
    ranks, spread = reference(counts)
    weighted = counts * ranks[reference.group]
    correlations, areas = [], []
    for score in scores:
        own_ranks, own_spread = score(counts)
        covariance = np.einsum("gr,gr->r", own_ranks, score.sums(weighted)) - total * (total + 1) ** 2 / 4
        varies = np.minimum(spread, own_spread) > total  # if not constant, at least 3 N (N - 1); allows for rounding
        nan = np.full(len(total), np.nan)
        correlations.append(np.divide(12 * covariance, np.sqrt(np.abs(spread * own_spread)), out=nan, where=varies))
        areas.append(0.5 + 6 * np.divide(covariance, spread, out=nan.copy(), where=spread > total))
    return correlations, areas


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of ``scores`` ``(n,)`` for finding the examples ``positive`` (bool ``(n,)``).

    It is the probability that a random positive example scores higher than a random other one; ties count one half.
    NaN scores are skipped. NaN if only one kind of example remains.
    """
    scores, positive, _ = _pairs(scores, positive)
    if not len(scores):
        return float("nan")
    _, areas = _resampled([_Ranking(scores)], _Ranking(positive > 0), np.ones((len(scores), 1)))
    return float(areas[0][0])


def bootstrap(
    scores: Sequence[np.ndarray],
    reference: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Interval]]:
    """Compute the rank agreement of several scores with a reference, with percentile bootstrap intervals.

    Resamples are drawn over examples, with replacement, and are the same for all scores. In each, every statistic is
    recomputed exactly: values are re-ranked, and ties share their mean rank, including the copies of an example. An
    interval contains the sampling variation of the examples, but not the variation between training runs.

    Args:
        scores: k arrays ``(n,)``. An example with NaN in a score or in the reference is skipped for that score.
        reference: ``(n,)``; bool if it marks planted examples.
        labels: The classes ``(n,)``; None to skip correlations within classes.
        resamples: Number of resamples.
        confidence: The probability content of the intervals.
        seed: Seed of the resamples.
        progress: Whether to show a progress bar.

    Returns:
        Per score, ``spearman``, ``spearman_within_class`` (if labels are given) and, for a bool reference, ``auroc``.
        A mean over classes skips classes in which a score or the reference is constant.
    """
    planted = np.asarray(reference).dtype == bool
    by_mask: dict[bytes, list[int]] = {}  # scores of the same examples are ranked together
    for number, values in enumerate(scores):
        by_mask.setdefault(_pairs(values, reference)[2].tobytes(), []).append(number)
    found: list[dict[str, Interval]] = [{} for _ in scores]
    total = resamples * len(by_mask)
    bar = tqdm(total=total, desc="bootstrap", unit="resample", leave=False, disable=None if progress else True)
    for numbers in by_mask.values():
        known = np.flatnonzero(_pairs(scores[numbers[0]], reference)[2])
        classes = np.zeros(len(known)) if labels is None else np.asarray(labels)[known]
        order = np.argsort(classes, kind="stable")  # makes each class a slice
        known, classes = known[order], classes[order]
        own = [np.asarray(scores[number], dtype=np.float64)[known] for number in numbers]
        truth = np.asarray(reference, dtype=np.float64)[known]
        starts = []
        if labels is not None and len(known):
            starts = np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]]).tolist()
        edges = [slice(start, end) for start, end in itertools.pairwise([*starts, len(known)])]
        parts = [slice(None), *(edge for edge in edges if edge.stop - edge.start >= 3)]
        rankings = [([_Ranking(values[part]) for values in own], _Ranking(truth[part])) for part in parts]
        drawn: dict[str, list[np.ndarray]] = {"spearman": [], "spearman_within_class": [], "auroc": []}
        for counts in _draw(len(reference), resamples, seed):
            here = counts[known]
            each = [_resampled(*ranking, here[part]) for part, ranking in zip(parts, rankings, strict=True)]
            drawn["spearman"].append(np.array(each[0][0]))
            drawn["auroc"].append(np.array(each[0][1]))
            if labels is not None:
                within = np.array([correlations for correlations, _ in each[1:]])
                drawn["spearman_within_class"].append(mean_known(within.reshape(-1, len(own), counts.shape[1])))
            bar.update(counts.shape[1])
        for place, number in enumerate(numbers):
            measured = {"spearman": spearman(own[place], truth)}
            if labels is not None:
                measured["spearman_within_class"] = spearman_within_class(own[place], truth, classes)
            if planted:
                measured["auroc"] = auroc(own[place], truth)
            found[number] = {
                name: percentile_interval(value, np.concatenate([block[place] for block in drawn[name]]), confidence)
                for name, value in measured.items()
            }
    bar.close()
    return found


def _draw(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw bootstrap resamples of n examples, in blocks of counts ``(n, R)``, float64."""
    rng = np.random.default_rng(seed)
    while resamples:
        width = min(max(1, _BLOCK // n), resamples)
        cells = rng.integers(n, size=(width, n)) * width + np.arange(width)[:, None]
        yield np.bincount(cells.ravel(), minlength=n * width).reshape(n, width).astype(np.float64)
        resamples -= width


def percentile_interval(value: float, drawn: np.ndarray, confidence: float) -> Interval:
    """A statistic with the percentile interval of its resampled values ``(R,)``, of which NaN are skipped."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or np.isnan(value):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))
