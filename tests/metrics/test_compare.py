"""Rank comparisons: closed forms, slow reference implementations, and known numbers of the published files."""

import csv

import numpy as np
import pytest
import scipy.stats
from support import PUBLISHED, needs_published

from src.errors import ArgumentError, UserError
from src.metrics import Proxy
from src.metrics.compare import (
    against_reference,
    comparison_table,
    half_overlaps,
    spearman,
    spearman_test,
    spearman_within_class,
    top_overlap,
)

_LOADED = {}


def published(mode, dataset):
    if (mode, dataset) not in _LOADED:
        _LOADED[mode, dataset] = Proxy(mode, dataset, folder=PUBLISHED).scores
    return _LOADED[mode, dataset]


@needs_published
@pytest.mark.parametrize(
    ("dataset", "a", "b", "rho"),
    [
        ("cifar100", "mem", "samis_loss", 0.9254),
        ("cifar100", "mem", "samis_prob", 0.8533),
        ("cifar100", "samis_loss", "samis_prob", 0.9217),
        ("cifar10", "forg", "etl", 0.9449),
        ("cifar10", "forg", "eps", 0.8044),
        ("cifar10", "forg", "flat", 0.5391),
        ("cifar10", "etl", "eps", 0.8492),
        ("cifar10", "etl", "flat", 0.5628),
        ("cifar10", "eps", "flat", 0.5629),
        ("svhn", "samis_loss", "samis_prob", 0.9918),
    ],
)
def test_published_rank_correlations(dataset, a, b, rho):
    assert spearman(published(a, dataset), published(b, dataset)) == pytest.approx(rho, abs=5.1e-5)


@needs_published
@pytest.mark.parametrize(("mode", "half", "top"), [("samis_loss", 22426, 0.577), ("samis_prob", 21992, 0.292)])
def test_published_overlaps_with_memorization(mode, half, top):
    mem, scores = published("mem", "cifar100"), published(mode, "cifar100")
    assert half_overlaps(scores, mem) == (half, half, 25000, 25000)
    assert top_overlap(scores, mem) == pytest.approx(top, abs=5e-4)


def test_spearman_is_about_ranks():
    x = np.array([0.3, -1.0, 5.0, 2.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    rho, p_value = spearman_test(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4]))
    assert rho == pytest.approx(0.8)
    assert 0 < p_value < 1


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_spearman_is_scipys(decimals):
    rng = np.random.default_rng(decimals)
    for size in (3, 4, 30, 500):
        a = rng.normal(size=size).round(decimals)
        a[0], a[1] = np.inf, -9
        for b in ((a + rng.normal(size=size)).round(decimals), rng.normal(size=size), a, -a):
            expected = scipy.stats.spearmanr(a, b)
            assert spearman_test(a, b) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-10)


def test_what_cannot_be_ranked_is_nan_and_nan_is_left_out():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert np.isnan(spearman(x, np.ones(4)))
    holes = np.array([1.0, np.nan, 3.0, 4.0])
    assert spearman(holes, np.array([1.0, -99.0, 3.0, 4.0])) == pytest.approx(1.0)
    with pytest.raises(UserError, match="different data sets"):
        spearman(x, x[:3])


def test_within_class_removes_what_the_class_explains():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 200)
    a, b = labels * 10 + rng.random(800), labels * 10 + rng.random(800)
    assert spearman(a, b) > 0.9
    assert abs(spearman_within_class(a, b, labels)) < 0.2
    each = [spearman(a[labels == c], b[labels == c]) for c in range(4)]
    assert spearman_within_class(a, b, labels) == pytest.approx(np.mean(each))
    assert spearman_within_class(a, a, labels) == pytest.approx(1.0)


def test_halves_and_tops_break_ties_by_index():
    tied = np.zeros(5)
    rising = np.arange(5.0)
    assert half_overlaps(tied, rising) == (2, 3, 2, 3)
    assert half_overlaps(tied, -rising) == (0, 1, 2, 3)
    assert top_overlap(tied, rising, 0.4) == 1.0
    assert top_overlap(rising, -rising, 0.4) == 0.0
    for fraction in (0, 1.5):
        with pytest.raises(ArgumentError, match="fraction"):
            top_overlap(tied, rising, fraction)


def test_the_table_holds_what_was_computed():
    a, b = np.array([1.0, 2, 3, 4, 5, 6]), np.array([1.0, 3, 2, 4, 6, 5])
    cell = against_reference(a, b, np.array([0, 0, 0, 1, 1, 1]))
    assert cell["spearman"] == spearman(a, b)
    assert (cell["lower_half"], cell["upper_half"]) == (3, 3)
    rows = list(csv.DictReader(comparison_table({"eps": {"mem": cell}}).splitlines()))
    assert [(row["score"], row["reference"]) for row in rows] == [("eps", "mem")]
    assert {name: float(rows[0][name]) for name in cell} == pytest.approx(cell)
