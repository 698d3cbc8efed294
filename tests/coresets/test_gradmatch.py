"""GradMatch compared with matching pursuit on materialized gradients."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch

from src import rng
from src.coresets import gradmatch
from src.coresets.gradmatch import GradMatchOptions, first_largest, pivoted, pursue
from src.coresets.inputs import (
    CandidateGroup,
    LastLayer,
    SelectionInputs,
    errors_of,
    make_groups,
    random_parts,
)
from src.coresets.registry import find_method
from src.errors import ArgumentError, UserError

STORED, RECOMPUTED = 2048, 0  # MiB that select the two algorithms; no flag accepts 0


def problem(n=60, C=4, d=6, seed=0, classes=None):
    """Logits, labels and ReLU embeddings, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % C if classes is None else torch.as_tensor(classes)
    logits = 2 * torch.randn(n, C, dtype=torch.float64, generator=generator)
    logits += torch.nn.functional.one_hot(labels, C)
    return logits, labels, torch.randn(n, d, dtype=torch.float64, generator=generator).clamp_min(0)


def gradients(errors, embeddings):
    """A, ``(C (d + 1), n)``."""
    weight = (errors[:, :, None] * embeddings[:, None, :]).flatten(1)
    return torch.cat([errors, weight], dim=1).numpy().T


def explicit(A, budget, ridge):
    """The published algorithm: solve a least-squares problem from scratch at each pick."""
    b = A.sum(axis=1)
    residual, picks = b, []
    while len(picks) < budget and np.linalg.norm(residual) >= 1e-4 * np.linalg.norm(b):
        products = A.T @ residual
        products[picks] = -np.inf
        picks.append(int(products.argmax()))
        columns = A[:, picks]
        stacked = np.vstack([columns, np.sqrt(ridge) * np.eye(len(picks))])
        x = np.linalg.lstsq(stacked, np.concatenate([b, np.zeros(len(picks))]), rcond=None)[0]
        residual = b - columns @ x
    return picks, nonnegative(A[:, picks], b, ridge)


def nonnegative(columns, b, ridge):
    size = columns.shape[1]
    stacked = np.vstack([columns, np.sqrt(ridge) * np.eye(size)])
    return scipy.optimize.nnls(stacked, np.concatenate([b, np.zeros(size)]))[0]


def material(logits, labels, embeddings, seed=1):
    return SelectionInputs(labels.numpy(), logits.shape[1], seed, layers=[LastLayer(logits, labels, embeddings)])


def select(content, groups, **options):
    return find_method("gradmatch").select(
        content, groups, SimpleNamespace(**{**asdict(GradMatchOptions()), "epsilon": lambda groups: None, **options})
    )


@pytest.mark.parametrize("memory", [STORED, RECOMPUTED])
@pytest.mark.parametrize("one_class", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_picks_and_weights_are_those_of_explicit_pursuit(memory, one_class, ridge, seed):
    logits, labels, embeddings = problem(seed=seed, classes=[0] * 60 if one_class else None)
    errors = errors_of(logits, labels)
    picks, weights = pursue(errors, embeddings, 15, ridge, memory)
    wanted, values = explicit(gradients(errors, embeddings), 15, ridge)
    assert picks.tolist() == wanted
    np.testing.assert_allclose(weights, values, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("memory", [STORED, RECOMPUTED])
def test_weights_stay_at_zero_where_least_squares_would_be_negative(memory):
    negative = 0
    for seed in range(6):
        logits, labels, embeddings = problem(n=80, C=5, d=12, seed=seed)
        errors = errors_of(logits, labels)
        A = gradients(errors, embeddings)
        picks, weights = pursue(errors, embeddings, 40, 0.01, memory)
        B = A[:, picks]
        x = np.linalg.solve(B.T @ B + 0.01 * np.eye(40), B.T @ A.sum(axis=1))
        negative += (x < 0).any()
        np.testing.assert_allclose(weights, nonnegative(B, A.sum(axis=1), 0.01), rtol=1e-7, atol=1e-9)
        assert len(picks) == 40  # examples of weight 0 are kept
    assert negative


@pytest.mark.parametrize("size", [1, 7, 40])
def test_block_pivoting_solves_the_nonnegative_problem_from_any_start(size):
    generator = np.random.default_rng(size)
    for _ in range(20):
        factor = generator.normal(size=(size + 2, size))
        target = generator.normal(size=size + 2)
        found = pivoted(factor.T @ factor, factor.T @ target, generator.random(size) < 0.5)
        np.testing.assert_allclose(found, scipy.optimize.nnls(factor, target)[0], rtol=1e-6, atol=1e-8)


def test_the_general_solver_steps_in_where_pivoting_does_not_settle(monkeypatch):
    logits, labels, embeddings = problem(n=80, C=5, d=12, seed=3)
    errors = errors_of(logits, labels)
    usual = pursue(errors, embeddings, 40, 0.01)
    assert (usual[1] == 0).any()
    monkeypatch.setattr(gradmatch, "pivoted", lambda *arguments: None)
    other = pursue(errors, embeddings, 40, 0.01)
    assert (other[0] == usual[0]).all()
    np.testing.assert_allclose(other[1], usual[1], rtol=1e-7, atol=1e-9)


def test_pivoting_gives_up_on_singular_matrices():
    assert pivoted(np.zeros((2, 2)), np.ones(2), np.array([True, True])) is None


@pytest.mark.parametrize("memory", [STORED, RECOMPUTED])
def test_it_stops_early_where_the_target_is_reached(memory):
    logits, labels, embeddings = problem(n=90, C=2, d=3)  # gradients span 4 dimensions at most
    errors = errors_of(logits, labels)
    picks, weights = pursue(errors, embeddings, 50, 0.0, memory)
    A = gradients(errors, embeddings)
    wanted, values = explicit(A, 50, 0.0)
    assert picks.tolist() == wanted
    assert len(picks) < 50
    np.testing.assert_allclose(A[:, picks] @ weights, A[:, wanted] @ values, atol=1e-8)


def test_a_budget_left_over_is_filled_at_random_with_weight_one():
    logits, labels, embeddings = problem(n=90, C=2, d=3, classes=[0] * 90)
    content = material(logits, labels, embeddings)
    groups = [CandidateGroup(np.arange(90), 50, 0)]
    found = select(content, groups, gradmatch_lambda=0.0)
    core, weights = pursue(errors_of(logits, labels), embeddings, 50, 0.0)
    assert len(core) < 10
    assert len(set(found.indices.tolist())) == 50
    assert set(core) <= set(found.indices)
    scale = (weights.sum() + 50 - len(core)) / 50
    for place, weight in zip(found.indices, found.weights, strict=True):
        expected = weights[core.tolist().index(place)] if place in core else 1.0
        assert weight * scale == pytest.approx(expected)
    again = select(content, groups, gradmatch_lambda=0.0)
    assert (again.indices == found.indices).all()
    assert (again.weights == found.weights).all()
    other = select(material(logits, labels, embeddings, seed=2), groups, gradmatch_lambda=0.0)
    assert set(other.indices) != set(found.indices)


@pytest.mark.parametrize("memory", [STORED, RECOMPUTED])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_zero_gradients_are_chosen_at_random_with_equal_weights(memory, ridge):
    labels = torch.zeros(20, dtype=torch.int64)
    logits = torch.tensor([[800.0, -800.0]]).repeat(20, 1)  # float32, errors exactly 0
    content = material(logits, labels, torch.rand(20, 3))
    found = select(content, [CandidateGroup(np.arange(20), 7, 0)], gradmatch_lambda=ridge, selection_memory=memory)
    assert len(set(found.indices.tolist())) == 7
    assert (found.weights == 1).all()


def test_gradients_that_cancel_leave_nothing_to_match():
    errors = torch.tensor([[0.3, -0.3], [-0.3, 0.3], [0.1, -0.1], [-0.1, 0.1]], dtype=torch.float64)
    picks, weights = pursue(errors, torch.ones(4, 2, dtype=torch.float64), 3, 1.0)
    assert len(picks) == len(weights) == 0


@pytest.mark.parametrize("memory", [STORED, RECOMPUTED])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_some_zero_gradients_and_duplicates_leave_budgets_exact(memory, ridge):
    logits, labels, embeddings = problem(n=24, C=3, d=5, classes=[0] * 24)
    logits[::2] = logits[1::2]
    embeddings[::2] = embeddings[1::2]
    logits[-4:] = torch.tensor([900.0, -900.0, -900.0], dtype=torch.float64)
    errors = errors_of(logits, labels)
    for budget in (1, 9, 24):
        picks, weights = pursue(errors, embeddings, budget, ridge, memory)
        assert picks[0] % 2 == 0  # ties go to the lower index
        assert len(set(picks.tolist())) == len(picks)
        assert (weights >= 0).all()
        found = select(
            material(logits, labels, embeddings),
            [CandidateGroup(np.arange(24), budget, 0)],
            gradmatch_lambda=ridge,
            selection_memory=memory,
        )
        assert len(found.indices) == budget == len(set(found.indices.tolist()))
        assert found.weights.mean() == pytest.approx(1)
    if ridge:
        assert sorted(picks) == list(range(24))


@pytest.mark.parametrize("way", [gradmatch._Stored, gradmatch._Recomputed])
def test_more_picks_than_dimensions_without_ridge_give_the_nonnegative_minimum(way):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        errors = torch.rand(12, 1, dtype=torch.float64, generator=generator) + 0.1
        embeddings = torch.randn(12, 2, dtype=torch.float64, generator=generator)  # gradients have 3 entries
        state = way(errors, embeddings, 6, 0.0)
        for pick in range(6):
            state.take(pick)
        assert state.factor.size == 3
        A = gradients(errors, embeddings)
        weights = gradmatch._nonnegative_weights(state)
        least = A[:, :6] @ nonnegative(A[:, :6], A.sum(axis=1), 0.0)
        np.testing.assert_allclose(A[:, :6] @ weights, least, atol=1e-9)  # w is not unique, but the weighted sum is
        assert (weights >= 0).all()


def test_ties_go_to_the_lower_index():
    assert first_largest(torch.tensor([1.0, 3.0, 3.0, 2.0])) == 1
    assert first_largest(torch.tensor([1.0, 3.0 - 1e-13, 3.0, 2.0], dtype=torch.float64), 1e-12) == 1
    assert first_largest(torch.tensor([-torch.inf, -2.0])) == 1


def test_classes_are_matched_on_their_own_and_weighted_against_each_other():
    logits, labels, embeddings = problem(n=90, C=3, classes=[0] * 50 + [1] * 30 + [2] * 10)
    content = material(logits, labels, embeddings)
    groups = make_groups(labels.numpy(), 3, fraction=0.2)
    found = select(content, groups)
    assert np.bincount(labels[found.indices], minlength=3).tolist() == [10, 6, 2]
    total, raw = 0.0, {}
    for group in groups:
        rows = torch.from_numpy(group.positions)
        picks, weights = pursue(errors_of(logits[rows], labels[rows]), embeddings[rows], group.budget, 1.0)
        raw.update(zip(group.positions[picks].tolist(), weights, strict=True))
        total += weights.sum()
    np.testing.assert_allclose(found.weights, [raw[i] * 18 / total for i in found.indices], rtol=1e-10)


@pytest.mark.parametrize("per_class", [True, False])
def test_float32_material_and_both_ways_agree(per_class):
    logits, labels, embeddings = (t.float() if t.is_floating_point() else t for t in problem(n=50, C=3))
    groups = make_groups(labels.numpy(), 3, fraction=0.3, per_class=per_class)
    content = material(logits, labels, embeddings)
    found, other = select(content, groups), select(content, groups, selection_memory=RECOMPUTED)
    assert found.indices.tolist() == other.indices.tolist()
    np.testing.assert_allclose(found.weights, other.weights, rtol=1e-9)
    assert len(found.indices) == sum(group.budget for group in groups)


@pytest.mark.parametrize("size", [1, 2])
def test_groups_of_one_and_two(size):
    logits, labels, embeddings = problem(n=size, C=2, classes=[0] * size)
    content = material(logits, labels, embeddings)
    for budget in range(1, size + 1):
        found = select(content, [CandidateGroup(np.arange(size), budget, 0)])
        assert len(found.indices) == budget
        assert found.weights.mean() == pytest.approx(1)


def test_bad_values_are_refused():
    logits, labels, embeddings = problem(n=8)
    groups = [CandidateGroup(np.arange(8), 2)]
    with pytest.raises(ArgumentError, match=r"^gradmatch_lambda -1"):
        GradMatchOptions(gradmatch_lambda=-1.0)
    embeddings[3, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        select(material(logits, labels, embeddings), groups)


def test_random_parts_match_their_own_sums():
    content, groups = material(*problem(n=600)), [CandidateGroup(np.arange(600), 90)]
    near = find_method("gradmatch").select(content, groups, GradMatchOptions(selection_subsample=0.15))
    parts = random_parts(groups, 0.15, rng.numpy_generator(1, 0, "gradmatch parts"))
    assert len(parts) > 2
    wanted = select(content, parts)
    assert near.indices.tolist() == wanted.indices.tolist()
    np.testing.assert_array_equal(near.weights, wanted.weights)
    assert len(near.indices) == 90
