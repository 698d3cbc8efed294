"""Find label errors from out-of-sample class probabilities: which labels are probably wrong, and how many.

A model that was not trained on example i predicts class probabilities ``p_i``. Its label ``y_i`` is modeled as a
noisy copy of the true class: ``P(y_i = k | true class j) = T[j, k]``, so that

    P(true class j | x_i, y_i) = q_i(j) T[j, y_i] / sum_l q_i(l) T[l, y_i],   q_i(j) proportional to p_i(j)^t.

The noise matrix T maximizes the likelihood of the labels (expectation maximization), with a Dirichlet prior worth s
examples per class whose mean is uniform noise at the overall rate. The exponent t >= 1 makes the probabilities
sharper: a model that was trained on noisy labels, or for a short time, is less sure than it could be. First t, for
uniform noise, then s maximizes the likelihood of held-out labels. If cats are often labeled as dogs, an image labeled
as a dog that looks somewhat like a cat is thus more suspicious than one that looks somewhat like a truck. Scores that
depend on the probabilities of one example alone, such as the probability of the label, cannot tell the two apart.

The idea of a noise matrix estimated from out-of-sample probabilities is that of confident learning (Northcutt et al.
2021), which counts examples above per-class thresholds instead. Shapes: n examples, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.artifacts.io import read_npy, read_npz
from src.artifacts.store import check_same_data, checked_array
from src.cli import check_options, number, option
from src.errors import ArgumentError, FileError, MeasurementError
from src.metrics.compare import ranked
from src.metrics.registry import score_name

FLOOR = 2.0**-17  # half the resolution of stored probabilities; smaller probabilities are raised to it
EXPONENTS = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)
STRENGTHS = (2.0, 20.0, 200.0)
_UNIFORM = 1e9  # a strength at which the noise matrix is the mean of its prior
_FOLDS = 5
_LARGEST = 50_000  # examples from which the exponent and the strength are chosen
_TOLERANCE, _ITERATIONS = 1e-5, 300
_REMEDY = "give an (n, classes) array of out-of-sample probabilities, one row per training example"


@dataclass(frozen=True)
class AuditConfig:
    """What to audit labels with.

    Attributes:
        probabilities: A file of out-of-sample class probabilities; None for that of ``compute_memorization.py``.
        top: The number of examples to list; None for the estimated number of label errors.
        combine: Stored scores whose ranks are averaged with those of the audit.
        cleanlab: Whether to add the ranking of the package cleanlab.
        overwrite: Whether to replace an audit with different settings.
    """

    probabilities: Path | None = option(
        None,
        "out-of-sample class probabilities: .npy, or .npz with an array probabilities or a single array; one row per "
        "training example (default: out_of_sample_{dataset}.npz in --metrics_folder)",
        Path,
        metavar="FILE",
    )
    top: int | None = option(
        None,
        "number of examples to list (default: the estimated number of label errors)",
        number(int, 1),
        metavar="N",
    )
    combine: list[str] = option(
        [],
        "scores to combine with the audit, such as aum; examples are then listed by the mean of their ranks "
        "(default: none)",
        score_name,
        nargs="+",
        metavar="MODE",
    )
    cleanlab: bool = option(
        False, "add the ranking and the decisions of the package cleanlab (pip install -r requirements-audit.txt)"
    )
    overwrite: bool = option(False, "replace an audit that was made with different settings")

    def __post_init__(self) -> None:
        check_options(self)


class Audit(NamedTuple):
    """Which labels are probably wrong. Examples without probabilities have NaN, and the suggestion -1.

    Attributes:
        score: Log odds that the label is wrong, float64 ``(n,)``.
        suggested: The most probable other class, int64 ``(n,)``.
        probability: The probability that the suggested class is the true one ``(n,)``.
        expected: The expected number of wrong labels. It tends to be too low, since what a model is unsure about is
            attributed to the image and not to the label.
        confident: The number of wrong labels by :func:`confident_count`, which tends to be too high.
        noise: T, the probability of each label given the true class, ``(C, C)``.
        exponent: t.
        strength: s.
    """

    score: np.ndarray
    suggested: np.ndarray
    probability: np.ndarray
    expected: float
    confident: float
    noise: np.ndarray
    exponent: float
    strength: float

    @property
    def errors(self) -> float:
        """The estimated number of wrong labels: the geometric mean of the two counts, whose biases are opposite."""
        return float(np.sqrt(self.expected * self.confident))


def audit(probabilities: np.ndarray, labels: np.ndarray, seed: int = 0) -> Audit:
    """Estimate which labels are wrong.

    Args:
        probabilities: Class probabilities from models that were not trained on the example, ``(n, C)``; rows may be
            NaN.
        labels: The given labels, int ``(n,)``.
        seed: Seed of the folds in which the exponent and the strength of the prior are chosen.

    Raises:
        MeasurementError: Fewer examples than classes have probabilities.
    """
    known = np.flatnonzero(np.isfinite(probabilities).all(1))
    p, y = np.asarray(probabilities, np.float64)[known], np.asarray(labels)[known]
    classes = p.shape[1]
    if len(known) < max(classes, _FOLDS):
        raise MeasurementError(f"only {len(known)} examples have probabilities; an audit needs at least {classes}")
    exponent, strength = choose(p, y, seed)
    q = sharpened(p, exponent)
    noise = fit_noise(q, y, strength)
    joint = q * noise[:, y].T  # (n, C)
    rows = np.arange(len(y))
    given = joint[rows, y]
    joint[rows, y] = 0
    other = joint.sum(1)
    score, suggested = np.full(len(labels), np.nan), np.full(len(labels), -1)
    probability = np.full(len(labels), np.nan)
    score[known] = np.log(other) - np.log(given)
    suggested[known] = joint.argmax(1)
    probability[known] = joint.max(1) / (given + other)
    expected = float((other / (given + other)).sum())
    confident = confident_count(p, y)
    return Audit(score, suggested, probability, expected, confident, noise, exponent, strength)


def confident_count(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The number of wrong labels by the confident joint of Northcutt et al. 2021 (Confident learning, eq. 1 to 3).

    The share of wrong labels among the examples that count is estimated for each given label.

    Args:
        probabilities: ``(n, C)``.
        labels: ``(n,)``.
    """
    _, which, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    classes = confident_classes(probabilities, labels)
    counts, wrong = classes >= 0, classes != labels
    shares = np.bincount(which, counts & wrong) / np.maximum(np.bincount(which, counts), 1)
    return float(shares @ sizes)


def confident_classes(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class that each example counts as in the confident joint, int64 ``(n,)``; -1 if it does not count.

    An example counts as class j if its probability of j is at least the mean of the examples labeled j; of several
    such classes, the most probable.

    Args:
        probabilities: ``(n, C)``.
        labels: ``(n,)``.
    """
    present, which, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    thresholds = np.full(probabilities.shape[1], np.inf)
    thresholds[present] = np.bincount(which, probabilities[np.arange(len(labels)), labels]) / sizes
    candidates = np.where(probabilities >= thresholds, probabilities, -1.0)
    return np.where(candidates.max(1) >= 0, candidates.argmax(1), -1)


def sharpened(probabilities: np.ndarray, exponent: float) -> np.ndarray:
    """Raise probabilities ``(n, C)`` to a power, and normalize. Zeros are raised to ``FLOOR`` first."""
    powers = np.clip(probabilities, FLOOR, None) ** exponent
    return powers / powers.sum(1, keepdims=True)


def fit_noise(probabilities: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    """Estimate the noise matrix by expectation maximization.

    Args:
        probabilities: Probabilities of the true class ``(n, C)``, positive.
        labels: The given labels ``(n,)``.
        strength: Number of prior examples per class. Their labels are wrong at the overall rate, which is estimated
            at the same time, and equally often in favor of every other class.

    Returns:
        ``T[j, k] = P(label k | true class j)``, ``(C, C)``.
    """
    classes = probabilities.shape[1]
    order = np.argsort(labels, kind="stable")
    ordered = probabilities[order]
    present, starts = np.unique(labels[order], return_index=True)
    edges = [*starts, len(labels)]

    def uniform(rate: float) -> np.ndarray:
        return np.where(np.eye(classes, dtype=bool), 1 - rate, rate / max(classes - 1, 1))

    noise = uniform(0.1)
    for _ in range(_ITERATIONS):
        counts = np.zeros((classes, classes))
        for label, (start, end) in zip(present, itertools.pairwise(edges), strict=True):
            joint = ordered[start:end] * noise[:, label]
            counts[:, label] = (joint / joint.sum(1, keepdims=True)).sum(0)
        rate = np.clip(1 - np.trace(counts) / len(labels), 1e-3, 0.5)
        updated = counts + strength * uniform(rate)
        updated /= updated.sum(1, keepdims=True)
        change = np.abs(updated - noise).max()
        noise = updated
        if change < _TOLERANCE:
            break
    return noise


def choose(probabilities: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Choose the exponent, then the strength of the prior, that make the labels of held-out examples most likely.

    The exponent is chosen for uniform noise. A free noise matrix could make up for a wrong one.

    Args:
        probabilities: ``(n, C)``.
        labels: ``(n,)``.
        seed: Seed of the five folds, and of the examples if there are more than 50,000.
    """
    order = np.random.default_rng(seed).permutation(len(labels))[:_LARGEST]
    fold, p, y = np.arange(len(order)) % _FOLDS, probabilities[order], labels[order]

    def likelihood(exponent: float, strength: float) -> float:
        q, total = sharpened(p, exponent), 0.0
        for k in range(_FOLDS):
            noise = fit_noise(q[fold != k], y[fold != k], strength)
            total += float(np.log((q[fold == k] * noise[:, y[fold == k]].T).sum(1)).sum())
        return total

    exponent = max(EXPONENTS, key=lambda value: likelihood(value, _UNIFORM))
    return exponent, max(STRENGTHS, key=lambda value: likelihood(exponent, value))


def mean_rank(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Average the ranks of several scores, as shares of the examples, so that the highest possible value is 1.

    Args:
        scores: k arrays ``(n,)``; an example with NaN in any of them has none. Ties share their mean rank.

    Returns:
        ``(n,)``.
    """
    known = ~np.isnan(scores).any(axis=0)
    ranks = np.full(known.shape, np.nan)
    ranks[known] = np.mean([ranked(np.asarray(values)[known]) for values in scores], axis=0) / known.sum()
    return ranks


def cleanlab_issues(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank and select label errors with the package cleanlab: confident learning, normalized margin.

    Args:
        probabilities: ``(n, C)``; rows may be NaN.
        labels: ``(n,)``.

    Returns:
        The rank of each example, from 1, 0 for those without probabilities, int64 ``(n,)``; and whether cleanlab
        selects it as a label error ``(n,)``.

    Raises:
        ArgumentError: The package is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise ArgumentError(
            "cleanlab", ": needs the package cleanlab; install it with: pip install -r requirements-audit.txt"
        ) from error
    known = np.flatnonzero(np.isfinite(probabilities).all(1))
    p, y = np.clip(np.asarray(probabilities, np.float64)[known], FLOOR, None), np.asarray(labels)[known]
    p /= p.sum(1, keepdims=True)
    quality = get_label_quality_scores(y, p, method="normalized_margin")
    rank, issue = np.zeros(len(labels), np.int64), np.zeros(len(labels), bool)
    rank[known[np.argsort(quality, kind="stable")]] = np.arange(1, len(known) + 1)
    issue[known] = find_label_issues(y, p, n_jobs=1)
    return rank, issue


# ---------------------------------------------------------------------------------------------------------- files


def read_probabilities(path: str | Path, total: int, classes: int, labels: str) -> np.ndarray:
    """Read out-of-sample class probabilities.

    Args:
        path: An npy file, or an npz file with an array ``probabilities`` or a single array.
        total: n, the number of training examples.
        classes: C.
        labels: The label hash of the data set, compared if the file records one.

    Returns:
        float64 ``(n, C)``; rows of NaN for examples without probabilities.

    Raises:
        FileError: The file is missing or damaged, does not fit the data set, or has other numbers than probabilities.
    """
    path = Path(path)
    content = read_npz(path) if path.suffix == ".npz" else {"probabilities": read_npy(path)}
    if "probabilities" not in content and len(content) == 1:
        content = {"probabilities": next(iter(content.values()))}
    recorded = {name: str(content[name]) for name in ("label_hash",) if name in content}
    check_same_data(path, recorded, label_hash=labels)
    values = checked_array(path, content, "probabilities", 2, finite=False, remedy=_REMEDY).astype(np.float64)
    if values.shape != (total, classes):
        raise FileError(f"{path}: has shape {values.shape}, but the data set needs ({total}, {classes}); {_REMEDY}")
    empty = np.isnan(values).all(1)
    sums = np.where(empty, 1, values.sum(1))
    wrong = ~empty & ~((np.abs(sums - 1) < 0.02) & (values >= 0).all(1))  # NaN compares as False; float16 rounds sums
    if wrong.any():
        first = np.flatnonzero(wrong)[0]
        raise FileError(
            f"{path}: row {first} is not a list of probabilities (its sum is {sums[first]:.4g}); {_REMEDY}, or NaN"
        )
    if empty.all():
        raise FileError(f"{path}: all rows are NaN; {_REMEDY}")
    return values


def common_mistakes(found: Audit, labels: np.ndarray, count: int = 10) -> list[tuple[int, int, int]]:
    """The most common mistakes.

    Args:
        found: The audit.
        labels: The given labels ``(n,)``.
        count: How many to return.

    Returns:
        For each, the suggested class, the given class, and the number of examples that are more likely wrong than
        not; most common first.
    """
    wrong = np.nan_to_num(found.score, nan=-1.0) > 0
    pairs, counts = np.unique(np.stack([found.suggested[wrong], labels[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:count]
    return [(int(pairs[0, k]), int(pairs[1, k]), int(counts[k])) for k in order]
