"""CRAIG compared with a greedy algorithm that evaluates its objective, on materialized gradients."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from src import rng
from src.coresets import craig
from src.coresets.craig import Distances, choose, choose_weighted, greedy_by_sample, greedy_on_matrix, weigh
from src.coresets.inputs import (
    CandidateGroup,
    GreedyOptions,
    LastLayer,
    SelectionInputs,
    make_groups,
    random_parts,
)
from src.coresets.registry import find_method
from src.errors import UserError

EXACT, LARGE = 2048, 0  # MiB that select the two algorithms; no flag accepts 0


def network(count=30, classes=3, size=4, seed=0, dtype=torch.float64):
    """Random logits, cyclic labels and ReLU embeddings."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=draw, dtype=torch.float64)
    embeddings = torch.randn(count, size, generator=draw, dtype=torch.float64).relu()
    return LastLayer(logits.to(dtype), torch.arange(count) % classes, embeddings.to(dtype))


def dense(layer):
    """Distances of materialized gradients, computed from differences, ``(n, n)``."""
    weight = layer.errors[:, :, None] * layer.embeddings[:, None, :]
    gradients = torch.cat([layer.errors, weight.flatten(1)], dim=1).double().numpy()
    return np.linalg.norm(gradients[:, None] - gradients, axis=2)


def objective(distances, picks):
    """Facility location as defined in the paper."""
    similarities = distances.max() - distances + 1e-3
    return similarities[:, np.asarray(picks, dtype=int)].max(axis=1, initial=0.0).sum()


def greedy_by_value(distances, budget, start=()):
    """Evaluate the objective of every candidate at each pick; ties go to the first candidate."""
    picks = list(start)
    while len(picks) < budget:
        rest = [x for x in range(len(distances)) if x not in picks]
        values = np.array([objective(distances, [*picks, x]) for x in rest])
        picks.append(rest[int((values >= values.max() * (1 - 1e-12)).argmax())])
    return picks


def generator(seed=1):
    return np.random.default_rng(seed)


def select(layer, groups, memory=EXACT, seed=1):
    content = SelectionInputs(layer.labels.numpy(), layer.logits.shape[1], seed, layers=[layer])
    return find_method("craig").select(
        content, groups, SimpleNamespace(selection_memory=memory, epsilon=lambda groups: None)
    )


def clustered(count, seed=0):
    """A class of a few clusters with different widths, in float32."""
    draw = torch.Generator().manual_seed(seed)
    belongs = torch.randint(6, (count,), generator=draw)
    spread = torch.logspace(-2, 0, 6)[belongs][:, None]
    embeddings = (
        2 * torch.randn(6, 8, generator=draw)[belongs] + spread * torch.randn(count, 8, generator=draw)
    ).relu()
    logits = embeddings @ torch.randn(8, 4, generator=draw) + torch.tensor([2.0, 0, 0, 0])
    return LastLayer(logits, torch.zeros(count, dtype=torch.int64), embeddings)


def test_factors_give_the_distances_of_materialised_gradients():
    layer = network(530, classes=2)  # more than a tile
    distances = Distances.of(layer)
    unit = float(layer.errors.abs().max())
    matrix = distances.matrix() * unit
    np.testing.assert_allclose(matrix, dense(layer), rtol=1e-9, atol=1e-9)
    assert (matrix.diagonal() == 0).all()
    assert (matrix == matrix.T).all()
    picks = np.array([3, 77, 500, 529])
    near, owner = distances.nearest(picks)
    np.testing.assert_allclose(near * unit, dense(layer)[:, picks].min(axis=1), rtol=1e-9, atol=1e-9)
    assert (owner == dense(layer)[:, picks].argmin(axis=1)).all()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("budget", [1, 2, 9, 29, 30])
@pytest.mark.parametrize("memory", [EXACT, LARGE])
def test_picks_are_those_of_the_greedy_that_evaluates_the_objective(classes, budget, memory):
    layer = network(30, classes, seed=classes)
    picks = choose(Distances.of(layer), budget, memory, generator())
    expected = greedy_by_value(dense(layer), budget)
    assert sorted(picks) == sorted(expected)
    if budget < 30:
        assert picks.tolist() == expected
    assert objective(dense(layer), picks) == pytest.approx(objective(dense(layer), expected), rel=1e-12)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("memory", [EXACT, LARGE])
def test_weights_count_whom_each_pick_stands_for(per_class, memory):
    layer = network(60)
    groups = make_groups(layer.labels.numpy(), 3, fraction=0.2, per_class=per_class)
    selection = select(layer, groups, memory)
    assert len(selection.indices) == sum(group.budget for group in groups) == 12
    assert selection.weights.mean() == pytest.approx(1.0)
    counts = selection.weights * 60 / 12
    for group in groups:
        inside = np.isin(selection.indices, group.positions)
        assert counts[inside].sum() == pytest.approx(len(group.positions))
        local = np.searchsorted(group.positions, selection.indices[inside])
        distances = dense(layer.at(group.positions))
        assert sorted(local) == sorted(greedy_by_value(distances, group.budget))
        nearest = np.bincount(distances[:, local].argmin(axis=1), minlength=group.budget)
        np.testing.assert_allclose(counts[inside], nearest, rtol=1e-12)


def test_weights_of_a_group_sum_to_its_size_exactly():
    distances = Distances.of(clustered(500))
    for budget in (1, 7, 123, 500):
        picks, weights = choose_weighted(distances, budget, EXACT, generator())
        assert weights.sum() == 500
        assert (np.diff(picks) > 0).all()
        assert (weights >= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [EXACT, LARGE])
def test_of_duplicates_the_lower_index_comes_first_and_stands_for_all(dtype, memory):
    layer = network(25, size=40, dtype=dtype).at(np.tile(np.arange(25), 3))
    distances = Distances.of(layer)
    picks = choose(distances, 70, memory, generator()).tolist()
    place = {pick: step for step, pick in enumerate(picks)}
    assert sorted(picks[:25]) == list(range(25))  # all distinct examples, then copies by index
    assert picks[25:] == list(range(25, 70))
    assert all(place[x] < place[x + 25] for x in range(25))
    chosen = np.sort(picks)
    weights = weigh(distances, chosen)
    assert (weights == weigh(distances, chosen, distances.matrix())).all()
    assert (weights[chosen < 25] == 3).all()
    assert (weights[chosen >= 25] == 0).all()


def test_examples_go_to_the_lower_of_two_duplicates_whatever_products_round_to():
    layer = network(401, classes=5, size=97)
    twice = Distances.of(layer.at(np.concatenate([np.arange(401), np.arange(150)])))
    twice.embeddings[401:] *= 1.0 + 4e-16
    picks = np.concatenate([np.arange(150), np.arange(401, 551)])  # each pick has a copy
    owner = twice.nearest(picks)[1]
    assert (owner < 150).all()
    assert (owner == twice.nearest(np.arange(150))[1]).all()


@pytest.mark.parametrize("memory", [EXACT, LARGE])
def test_of_equally_good_ones_the_lower_index_wins(memory):
    """Unit vectors at equal distances: every pick is a tie."""
    logits = torch.zeros(12, 2, dtype=torch.float64)
    layer = LastLayer(logits, torch.zeros(12, dtype=torch.int64), torch.eye(12, dtype=torch.float64))
    assert choose(Distances.of(layer), 7, memory, generator()).tolist() == list(range(7))


@pytest.mark.parametrize("memory", [EXACT, LARGE])
def test_errors_of_zero(memory):
    certain = torch.tensor([[1e4, 0.0, 0.0]])
    layer = LastLayer(certain.repeat(8, 1), torch.zeros(8, dtype=torch.int64), torch.ones(8, 2))
    assert (layer.errors == 0).all()
    selection = select(layer, [CandidateGroup(np.arange(8), 3, 0)], memory)
    assert selection.indices.tolist() == [0, 1, 2]
    assert selection.weights.tolist() == [3.0, 0.0, 0.0]
    mixed = torch.cat([certain.repeat(6, 1), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])])
    layer = LastLayer(mixed, torch.zeros(8, dtype=torch.int64), torch.zeros(8, 2))
    selection = select(layer, [CandidateGroup(np.arange(8), 3, 0)], memory)
    assert selection.indices.tolist() == [0, 6, 7]
    np.testing.assert_allclose(selection.weights, np.array([6, 1, 1]) * 3 / 8)


def test_tiny_gradients_are_told_apart():
    layer = network(30)
    small = LastLayer(layer.logits, layer.labels, layer.embeddings)
    small.__dict__["errors"] = layer.errors * 1e-200  # squares underflow
    for budget in (1, 10):
        expected = choose(Distances.of(layer), budget, EXACT, generator())
        assert choose(Distances.of(small), budget, EXACT, generator()).tolist() == expected.tolist()


def test_near_duplicates_in_float32_are_told_apart():
    """Distances of 1e-5 of the norm: in float32, the inner-product identity would give only rounding noise."""
    draw = torch.Generator().manual_seed(0)
    embeddings = 1.0 + 1e-5 * torch.randn(40, 512, generator=draw)
    layer = LastLayer(torch.zeros(40, 2), torch.zeros(40, dtype=torch.int64), embeddings)
    distances = dense(layer)
    found = Distances.of(layer).matrix() * 0.5  # the scale of the errors
    np.testing.assert_allclose(found, distances, rtol=1e-4, atol=1e-9)
    assert choose(Distances.of(layer), 10, EXACT, generator()).tolist() == greedy_by_value(distances, 10)


@pytest.mark.parametrize("memory", [EXACT, LARGE])
def test_group_of_one_and_whole_groups(memory):
    layer = network(7)
    groups = [CandidateGroup(np.array([4]), 1, 0), CandidateGroup(np.array([0, 2, 5, 6]), 4, 1)]
    selection = select(layer, groups, memory)
    assert selection.indices.tolist() == [0, 2, 4, 5, 6]
    assert selection.weights.tolist() == [1.0] * 5


def test_gradients_that_are_not_finite_are_refused():
    layer = network(6)
    layer.embeddings[3, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        select(layer, [CandidateGroup(np.arange(5), 2)])


class LargestInFloat64(TorchDispatchMode):
    """Records the number of elements of the largest float64 tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            self.numbers = max(self.numbers, found.numel())
        return found


def test_a_large_group_is_never_copied_to_float64():
    count, classes, size = 5_000, 300, 300
    layer = network(count, classes, size, dtype=torch.float32)
    with LargestInFloat64() as found:
        select(layer, [CandidateGroup(np.arange(count), 90)], memory=1)
    # blocks of 2,048 rows of logits, and of 128 rows of distances; the factors have 3,000,000 numbers
    assert 2_048 * classes <= found.numbers < 1_000_000


@pytest.mark.parametrize("pairs", [3_000, 30_000, 10**7])  # examples are drawn in two or more rounds; once; all kept
def test_the_way_of_large_groups_comes_close_to_the_exact_one(pairs, caplog):
    distances = Distances.of(clustered(1_200))
    matrix = distances.matrix()
    sample = np.sort(generator().choice(1_200, 400, replace=False))
    with caplog.at_level(logging.INFO):
        picks = greedy_by_sample(distances, 200, sample, pairs, generator())
    assert len(caplog.records) >= (2 if pairs == 3_000 else 1)
    assert len(set(picks.tolist())) == 200
    assert objective(matrix, picks) >= 0.99 * objective(matrix, greedy_on_matrix(matrix, 200))


def test_with_all_pairs_the_large_way_is_the_greedy_from_its_first_picks():
    layer = network(80, seed=5)
    distances, sample = Distances.of(layer), np.arange(0, 80, 2)
    picks = greedy_by_sample(distances, 12, sample, 10**6, generator()).tolist()
    matrix = dense(layer)
    leaders = [int(sample[x]) for x in greedy_by_value(matrix[np.ix_(sample, sample)], 2)]
    assert picks == greedy_by_value(matrix, 12, leaders)


def test_the_large_way_keeps_no_more_pairs_than_allowed(monkeypatch):
    distances, kept = Distances.of(clustered(1_200)), []
    lists = craig._lists

    def counted(*arguments):
        found = lists(*arguments)
        kept[-1] += sum(len(members) for members, _ in found)
        return found

    def round_of(*arguments, whole=craig._greedy_on_pairs):
        kept.append(0)
        return whole(*arguments)

    monkeypatch.setattr(craig, "_lists", counted)
    monkeypatch.setattr(craig, "_greedy_on_pairs", round_of)
    greedy_by_sample(distances, 200, np.arange(0, 1_200, 3), 10_000, generator())
    assert max(kept) < 1.25 * 10_000


@pytest.mark.parametrize(("pairs", "most"), [(600, False), (2_000, True)])
def test_gains_on_drawn_examples_weigh_by_their_shares(pairs, most, monkeypatch):
    """The mean of sampled gains over draws is the gain on all examples."""
    distances, found = Distances.of(clustered(120)), []
    matrix, taken = distances.matrix(), np.array([3, 50, 90])
    near = matrix[:, taken].min(axis=1)
    counts = (matrix < near[:, None]).sum(axis=1) + 0.5
    shares = craig._shares(near, counts, pairs)
    assert shares @ counts == pytest.approx(pairs)
    assert shares[near > 0].min() > 0
    drawn = np.flatnonzero(generator().random(120) < shares)
    assert (len(drawn) > 60) == most
    monkeypatch.setattr(craig, "lazy_greedy", lambda bounds, *rest: found.append(bounds) or [])
    craig._greedy_on_pairs(distances, drawn, near, shares, taken, 1)
    savings = np.maximum(near[:, None] - matrix, 0.0)
    expected = (savings[drawn] / shares[drawn, None]).sum(axis=0)
    expected[taken] = -np.inf
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_it_says_which_way_it_goes_and_repeats_itself(monkeypatch, caplog):
    monkeypatch.setattr(craig, "_LEAST_SAMPLE", 100)
    monkeypatch.setattr(craig, "_LEAST_PAIRS", 2_000)
    layer = clustered(400)
    groups = [CandidateGroup(np.arange(300), 60, 0), CandidateGroup(np.arange(300, 400), 20, 1)]
    with caplog.at_level(logging.INFO):
        first = select(layer, groups, memory=LARGE)
        assert "sampled greedy in 2 groups" in caplog.text
        assert "exact" not in caplog.text
        select(layer, groups, memory=EXACT)
        assert "exact lazy greedy in 2 groups" in caplog.text
    again, other = select(layer, groups, memory=LARGE), select(layer, groups, memory=LARGE, seed=2)
    assert (first.indices == again.indices).all()
    assert (first.weights == again.weights).all()
    assert (first.indices != other.indices).any()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(2, 4),
    st.integers(0, 1_000),
    st.sampled_from([EXACT, LARGE]),
)
def test_budgets_are_exact_and_nothing_is_picked_twice(sizes, classes, seed, memory):
    (count, budget), draw = sizes, np.random.default_rng(seed)
    layer = network(40, classes, 2, seed).at(draw.integers(0, 40, count))  # with duplicates
    distances = Distances.of(layer)
    picks, weights = choose_weighted(distances, budget, memory, generator())
    assert len(picks) == len(np.unique(picks)) == budget
    assert picks.min() >= 0
    assert picks.max() < count
    assert weights.sum() == count


def test_parts_are_chosen_from_on_their_own_and_lose_little():
    layer = network(900)
    groups = [CandidateGroup(np.arange(900), 90)]
    content = SelectionInputs(layer.labels.numpy(), 3, layers=[layer])
    exact, near = (
        find_method("craig").select(content, groups, GreedyOptions(selection_subsample=value))
        for value in ("exact", 0.1)
    )
    assert len(near.indices) == 90
    assert near.weights.sum() == pytest.approx(90)
    distances = dense(layer)
    far = [distances[:, picks].min(axis=1).mean() for picks in (exact.indices, near.indices, np.arange(90))]
    assert far[0] < far[1] < far[0] + 0.3 * (far[2] - far[0])
    parts = random_parts(groups, 0.1, rng.numpy_generator(1, 0, "craig parts"))
    assert len(parts) == 2
    for part in parts:
        wanted = greedy_by_value(dense(layer.at(part.positions)), 5)  # its first five
        assert set(part.positions[wanted]) <= set(near.indices)
