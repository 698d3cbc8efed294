import numpy as np
import pytest
from scipy import stats

from src import rng
from src.coresets import CandidateGroup, SelectionInputs, dual, make_groups
from src.coresets.dual import DualOptions
from src.errors import ArgumentError, FileError


def material(scores, probability, labels=None, seed=1):
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.zeros(len(scores), dtype=np.int64) if labels is None else labels
    return SelectionInputs(labels, int(labels.max()) + 1, seed, scores, {"probability": np.asarray(probability)})


def planted(n=400, seed=0):
    """Probabilities over 12 epochs around each example's mean, and scores like DUAL's."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.05, 0.95, n)
    probability = np.clip(mean + rng.normal(size=(12, n)) * 0.5 * mean * (1 - mean), 0, 1).astype(np.float32)
    return (1 - probability.mean(axis=0)) * probability.std(axis=0, ddof=1), probability


def slow_dual(material, groups, c):
    """Compute weights one by one with SciPy's Beta density; take the largest weight times exponentiated noise."""
    probability = material.dynamics["probability"]
    n = probability.shape[1]
    means = [np.mean([float(p) for p in probability[:, i] if not np.isnan(p)]) for i in range(n)]
    mu = means[int(np.argmax(material.scores))]
    generator = rng.numpy_generator(material.seed, 0, "dual")
    chosen = []
    for group in groups:
        pruned = 1 - group.budget / len(group.positions)
        beta = 15 * (1 - mu) * (1 - pruned**c)
        noise = generator.gumbel(size=len(group.positions))
        density, keys = stats.beta(15 - beta, beta).pdf(means), {}
        for i, gumbel in zip(group.positions, noise, strict=True):
            keys[i] = density[i] * material.scores[i] * np.exp(gumbel)
        chosen.extend(sorted(group.positions, key=lambda i: (-keys[i], i))[: group.budget])
    return np.sort(chosen)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize(("fraction", "c"), [(0.1, 4.0), (0.5, 5.5), (0.9, 1.0)])
def test_equals_the_plain_way(per_class, fraction, c):
    scores, probability = planted(120)
    probability[np.random.default_rng(1).random(probability.shape) < 0.1] = np.nan  # epochs without a visit
    labels = np.arange(120) % 3
    made = material(scores, probability, labels)
    groups = make_groups(labels, 3, fraction=fraction, per_class=per_class)
    selection = dual.dual_selection(made, groups, DualOptions(dual_c=c))
    np.testing.assert_array_equal(selection.indices, slow_dual(made, groups, c))
    assert len(selection.indices) == sum(group.budget for group in groups)
    assert not selection.weighted


def test_density_is_scipys_up_to_a_constant():
    p = np.linspace(0.01, 0.99, 30)
    difference = dual.log_density(p, 11.4, 3.6) - stats.beta(11.4, 3.6).logpdf(p)
    np.testing.assert_allclose(difference, difference[0], rtol=1e-12)
    assert np.isfinite(dual.log_density(np.array([0.0, 1.0]), 15.0, 0.0)).all()


def test_the_density_moves_from_mu_to_easy_examples():
    means = []
    for pruned in (0.0, 0.3, 0.7, 0.9, 0.99):
        alpha, beta = dual.beta_parameters(0.3, pruned, 4.0)
        assert alpha + beta == pytest.approx(15.0)
        means.append(alpha / 15)
    assert means[0] == pytest.approx(0.3)
    assert (np.diff(means) > 0).all()
    assert means[-1] > 0.95


def test_easy_examples_become_likelier_as_more_is_pruned():
    scores, probability = planted(3000)
    mean = probability.mean(axis=0)
    kept = []
    for budget in (2000, 600, 150, 60):
        selection = dual.dual_selection(
            material(scores, probability), [CandidateGroup(np.arange(3000), budget)], DualOptions()
        )
        kept.append(mean[selection.indices].mean())
    assert (np.diff(kept) > 0).all()
    assert kept[-1] > kept[0] + 0.2


def test_one_draw_has_the_wanted_probabilities():
    scores, factors = np.array([1.0, 2, 3, 0, 4]), np.log([4.0, 1, 1, 9, 0.5])
    counts = np.zeros(5)
    generator = np.random.default_rng(0)
    for _ in range(4000):
        counts[dual.weighted_choice(scores, factors, 1, generator)] += 1
    expected = np.array([4.0, 2, 3, 0, 2]) / 11 * 4000
    assert counts[3] == 0
    assert stats.chisquare(np.delete(counts, 3), np.delete(expected, 3)).pvalue > 1e-3


def test_extreme_weights_stay_ordered():
    picks = dual.weighted_choice(
        np.array([1e-300, 1e-300, 1.0]), np.array([-900.0, 0, 900]), 2, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(picks, [2, 1])


def test_scores_of_zero_come_last_and_are_drawn_uniformly():
    probability = np.array([[0.5, 0.99, 0.01, 0.9, 0.1, 0.5]] * 3)
    counts = np.zeros(6)
    for seed in range(600):
        made = material([0.1, 0, 0, 0, 0, 0], probability, seed=seed)
        counts[dual.dual_selection(made, [CandidateGroup(np.arange(6), 2)], DualOptions()).indices] += 1
    assert counts[0] == 600
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
    zeros = material(np.zeros(6), probability)
    assert len(dual.dual_selection(zeros, [CandidateGroup(np.arange(6), 3)], DualOptions()).indices) == 3


def test_without_the_density_the_highest_scores_are_kept():
    scores, _ = planted(50)
    made = SelectionInputs(np.zeros(50, dtype=np.int64), 1, 1, scores)
    selection = dual.dual_selection(made, [CandidateGroup(np.arange(50), 7)], DualOptions(dual_beta=False))
    np.testing.assert_array_equal(selection.indices, np.sort(np.argsort(scores)[-7:]))


def test_edges():
    scores, probability = planted(12)
    groups = [
        CandidateGroup(np.array([0]), 1),
        CandidateGroup(np.arange(1, 8), 7),
        CandidateGroup(np.arange(8, 12), 1),
    ]
    selection = dual.dual_selection(material(scores, probability), groups, DualOptions())
    np.testing.assert_array_equal(selection.indices[:8], np.arange(8))
    assert len(selection.indices) == 9
    certain = material(np.full(4, 0.2), np.ones((3, 4)))  # mu = 1: beta = 0
    assert len(dual.dual_selection(certain, [CandidateGroup(np.arange(4), 2)], DualOptions()).indices) == 2


def test_seeds_reproduce():
    scores, probability = planted(200)
    group = [CandidateGroup(np.arange(200), 40)]
    first, second, other = (
        dual.dual_selection(material(scores, probability, seed=seed), group, DualOptions()).indices
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_complaints():
    scores, probability = planted(5)
    group = [CandidateGroup(np.arange(5), 2)]
    with pytest.raises(ArgumentError, match=r"^dual_c 0"):
        dual.dual_selection(material(scores, probability), group, DualOptions(dual_c=0))
    scores[2] = np.nan
    with pytest.raises(FileError, match="no score"):
        dual.dual_selection(material(scores, probability), group, DualOptions())
