import logging

import numpy as np
import pytest

from src import rng
from src.coresets import CandidateGroup, SelectionInputs, ccs, make_groups
from src.coresets.ccs import CCSOptions
from src.errors import ArgumentError, FileError


def material(scores, labels=None, seed=1):
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.zeros(len(scores), dtype=np.int64) if labels is None else labels
    return SelectionInputs(labels, int(labels.max()) + 1, seed, scores)


def slow_ccs(material, groups, cutoff, bins):
    """Algorithm 1, one example at a time, with the same random draws."""
    generator = rng.numpy_generator(material.seed, 0, "ccs")
    chosen = []
    for group in groups:
        by_ease = sorted(group.positions, key=lambda i: (material.scores[i], i))
        cut = min(int(cutoff * len(by_ease) + 1e-9), len(by_ease) - group.budget)
        kept = sorted(by_ease[: len(by_ease) - cut])
        low, high = min(material.scores[kept]), max(material.scores[kept])
        boxes = [[] for _ in range(bins)]
        for i in kept:
            place = 0 if high == low else int((material.scores[i] - low) / (high - low) * bins)
            boxes[min(place, bins - 1)].append(i)
        waiting = [number for number in range(bins) if boxes[number]]
        rest, takes = group.budget, {}
        while waiting:
            fewest = min(waiting, key=lambda number: (len(boxes[number]), number))
            takes[fewest] = min(len(boxes[fewest]), rest // len(waiting))
            rest -= takes[fewest]
            waiting.remove(fewest)
        for number in sorted(takes):
            chosen.extend(generator.choice(np.array(boxes[number]), takes[number], replace=False))
    return np.sort(chosen)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize(
    ("fraction", "cutoff", "bins"), [(0.1, 0.3, 50), (0.33, 0.0, 7), (0.5, 0.9, 10), (0.7, 0.2, 1)]
)
def test_equals_the_plain_algorithm(per_class, fraction, cutoff, bins):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 200)
    scores = np.where(rng.random(200) < 0.3, rng.integers(0, 4, 200), rng.normal(size=200))
    groups = make_groups(labels, 3, fraction=fraction, per_class=per_class)
    made = material(scores, labels)
    selection = ccs.ccs(made, groups, CCSOptions(ccs_cutoff=cutoff, ccs_bins=bins))
    np.testing.assert_array_equal(selection.indices, slow_ccs(made, groups, cutoff, bins))
    assert len(np.unique(selection.indices)) == sum(group.budget for group in groups)
    assert not selection.weighted


def test_hardest_are_cut_and_all_strata_are_covered():
    rng = np.random.default_rng(0)
    scores = np.abs(rng.normal(size=1000))  # many easy, few hard
    selection = ccs.ccs(
        material(scores), [CandidateGroup(np.arange(1000), 100)], CCSOptions(ccs_cutoff=0.2, ccs_bins=10)
    )
    kept = np.sort(scores)[:800]
    assert scores[selection.indices].max() <= kept[-1]
    counts = np.bincount(ccs.strata(np.concatenate([kept[[0, -1]], scores[selection.indices]]), 10)[2:], minlength=10)
    np.testing.assert_array_equal(counts, 10)


def test_ties_at_the_cut_keep_the_lower_index():
    scores = np.array([5.0, 1, 5, 1, 5, 1])
    selection = ccs.ccs(material(scores), [CandidateGroup(np.arange(6), 4)], CCSOptions(ccs_cutoff=0.34))
    np.testing.assert_array_equal(selection.indices, [0, 1, 3, 5])


def test_stratum_budgets_give_what_small_strata_lack_to_the_others():
    np.testing.assert_array_equal(ccs.stratum_budgets(np.array([10, 1, 10]), 9), [4, 1, 4])
    np.testing.assert_array_equal(ccs.stratum_budgets(np.array([3, 3, 3]), 5), [1, 2, 2])
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(1, 20, rng.integers(1, 12))
        budget = rng.integers(1, sizes.sum() + 1)
        takes = ccs.stratum_budgets(sizes, int(budget))
        assert takes.sum() == budget
        assert (takes <= sizes).all()


def test_published_cutoffs():
    assert ccs.published_cutoff(0.0) == 0.0
    for pruned, cutoff in ccs.CUTOFFS:
        assert ccs.published_cutoff(pruned) == pytest.approx(cutoff)
    assert ccs.published_cutoff(0.85) == pytest.approx(0.2)
    assert ccs.published_cutoff(0.99) == pytest.approx(0.3)
    scores = np.arange(100.0)
    selection = ccs.ccs(material(scores), [CandidateGroup(np.arange(100), 10)], CCSOptions())
    assert selection.indices.max() < 70


@pytest.mark.parametrize("cutoff", [None, 0.0, 0.99])
def test_edges(cutoff):
    options = CCSOptions(ccs_cutoff=cutoff)
    groups = [
        CandidateGroup(np.array([0]), 1),
        CandidateGroup(np.arange(1, 9), 8),
        CandidateGroup(np.arange(9, 20), 1),
    ]
    scores = np.concatenate([np.arange(9.0), np.full(11, 2.0)])
    selection = ccs.ccs(material(scores), groups, options)
    np.testing.assert_array_equal(selection.indices[:9], np.arange(9))
    assert len(selection.indices) == 10


def test_equal_scores_are_drawn_uniformly():
    counts = np.zeros(6)
    for seed in range(300):
        counts[
            ccs.ccs(material(np.zeros(6), seed=seed), [CandidateGroup(np.arange(6), 2)], CCSOptions()).indices
        ] += 1
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 2 / 3)).all()


def test_seeds_reproduce():
    scores = np.random.default_rng(0).normal(size=300)
    group = [CandidateGroup(np.arange(300), 60)]
    first, second, other = (ccs.ccs(material(scores, seed=seed), group, CCSOptions()).indices for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_cutoff_beyond_the_budget_is_capped_with_a_notice(caplog):
    with caplog.at_level(logging.INFO):
        selection = ccs.ccs(material(np.arange(10.0)), [CandidateGroup(np.arange(10), 8)], CCSOptions(ccs_cutoff=0.5))
    np.testing.assert_array_equal(selection.indices, np.arange(8))
    assert "1 of 1 groups" in caplog.text


def test_complaints():
    group = [CandidateGroup(np.arange(3), 1)]
    with pytest.raises(ArgumentError, match=r"^ccs_cutoff 1\.0"):
        ccs.ccs(material(np.zeros(3)), group, CCSOptions(ccs_cutoff=1.0))
    with pytest.raises(ArgumentError, match=r"^ccs_bins 0"):
        ccs.ccs(material(np.zeros(3)), group, CCSOptions(ccs_bins=0))
    for bad, words in ((np.nan, "no score"), (np.inf, "infinite")):
        with pytest.raises(FileError, match=words):
            ccs.ccs(material([0.0, bad, 1.0]), group, CCSOptions())
