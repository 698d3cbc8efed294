"""Arguments of the selection methods are validated on entry, in the same way for all methods."""

import math

import numpy as np
import pytest
import torch

from src.coresets import METHODS, CandidateGroup, SelectionInputs, make_groups
from src.coresets.inputs import (
    GREEDY_EPSILON,
    GREEDY_LIMIT,
    Draws,
    GreedyOptions,
    LastLayer,
    Options,
    Selection,
    errors_of,
    gradient_norms,
    gradient_sum,
    inner_products,
    products_with,
    random_parts,
)
from src.errors import UserError

LABELS = np.arange(40) % 2
GROUPS = make_groups(LABELS, 2, fraction=0.5)
READERS = [m.name for m in METHODS.values() if m.select is not None and m.needs.embeddings]


def layer(**changes):
    draw = torch.Generator().manual_seed(0)
    parts = {
        "logits": torch.randn(40, 2, generator=draw),
        "labels": torch.from_numpy(LABELS),
        "embeddings": torch.randn(40, 3, generator=draw),
    }
    return LastLayer(**{**parts, **changes})


def spoilt(shape, row, value):
    values = torch.zeros(shape)
    values[row] = value
    return values


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_embeddings_that_are_not_finite_name_the_first_example(name, value):
    method = METHODS[name]
    with pytest.raises(UserError, match="embeddings: the values of example 7 are not finite"):
        method.select(
            SelectionInputs(
                LABELS, 2, scores=np.arange(40.0), layers=[layer(embeddings=spoilt((40, 3), (7, 1), value))]
            ),
            GROUPS,
            method.options(),
        )


def test_infobatch_does_not_choose_nothing_where_a_logit_is_nan():
    with pytest.raises(UserError, match="logits: the values of example 39"):
        METHODS["infobatch"].select(
            SelectionInputs(LABELS, 2, layers=[layer(logits=spoilt((40, 2), 39, float("nan")))]),
            GROUPS,
            Options(),
        )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layer(embeddings=torch.zeros(39, 3)), r"embeddings: has shape \(39, 3\), but there are 40"),
        (lambda: layer(logits=torch.zeros(41, 2)), "logits: has shape"),
        (lambda: layer(gradient_norms=spoilt(40, 3, float("nan"))), "gradient_norms: the values of example 3"),
        (lambda: layer(labels=torch.full((40,), 2)), "labels: label 2 of example 0 is not from 0 to 1"),
        (lambda: SelectionInputs(LABELS, 2, scores=np.zeros(39)), "scores: has shape"),
        (lambda: SelectionInputs(LABELS, 1), "labels: label 1 of example 1 is not from 0 to 0"),
        (lambda: SelectionInputs(LABELS - 1, 2), "labels: label -1 of example 0"),
        (
            lambda: SelectionInputs(LABELS, 2, layers=[layer(), layer(labels=torch.from_numpy(1 - LABELS))]),
            "model 1: .* 0",
        ),
        (lambda: SelectionInputs(LABELS[:39], 2, layers=[layer()]), "model 0: has shape"),
        (lambda: SelectionInputs(LABELS, 2, dynamics={"p": np.zeros((3, 39))}), "dynamics p: has shape"),
        (
            lambda: SelectionInputs(LABELS, 2, dynamics={"p": np.full((3, 40), np.nan)}),
            "dynamics p: the values of example 0",
        ),
        (lambda: CandidateGroup(np.arange(5), 6), "budget 6: the group has 5 examples; choose 1 to 5"),
        (lambda: CandidateGroup(np.arange(5), 6, 3), "budget 6: class 3 has 5"),
        (lambda: CandidateGroup(np.arange(5), 0), "budget 0"),
        (lambda: CandidateGroup(np.arange(0), 0), "budget 0"),
        (lambda: CandidateGroup(np.array([1, 1, 2]), 2), "ascending"),
        (lambda: CandidateGroup(np.array([-1, 1]), 1), "ascending"),
        (lambda: Selection(np.array([3, 5, 3]), np.ones(3)), "indices: an index is negative or repeated"),
        (lambda: Selection(np.array([-3, 5]), np.ones(2)), "indices: an index is negative or repeated"),
        (lambda: Selection(np.array([3, 5]), np.array([1, -1.0])), "weights: a weight is not finite or is negative"),
        (
            lambda: Selection(np.array([3, 5]), np.array([np.nan, 1])),
            "weights: a weight is not finite or is negative",
        ),
        (
            lambda: Selection(np.array([3, 5]), np.array([np.inf, 1])),
            "weights: a weight is not finite or is negative",
        ),
        (lambda: Selection(np.array([3, 5]), np.ones(3)), "weights: got 3 for 2 indices"),
    ],
)
def test_what_does_not_fit_is_one_line(make, says):
    with pytest.raises(UserError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.fixture(name="layer", params=[2, 7], ids=["2 classes", "7 classes"])
def random_layer(request) -> LastLayer:
    draw = torch.Generator().manual_seed(0)
    return LastLayer(
        2 * torch.randn(12, request.param, generator=draw, dtype=torch.float64),
        torch.randint(request.param, (12,), generator=draw),
        torch.randn(12, 5, generator=draw, dtype=torch.float64),
    )


def by_autograd(layer: LastLayer) -> torch.Tensor:
    """Each example's gradient ``[bias, weight]`` of the last layer, ``(n, C (d + 1))``."""
    rows = []
    for logits, label, embedding in zip(layer.logits, layer.labels, layer.embeddings, strict=True):
        weight = torch.zeros(len(logits), len(embedding), dtype=torch.float64, requires_grad=True)
        bias = logits.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy((weight @ embedding + bias)[None], label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (bias, weight))]))
    return torch.stack(rows)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_norms(layer):
    close(gradient_norms(layer.errors, layer.embeddings), by_autograd(layer).norm(dim=1))


def test_inner_products(layer):
    gradients = by_autograd(layer)
    close(inner_products(layer.errors, layer.embeddings), gradients @ gradients.T)
    some, others = layer.at(np.array([4, 1])), layer.at(np.arange(3, 9))
    found = inner_products(some.errors, some.embeddings, others.errors, others.embeddings)
    close(found, gradients[[4, 1]] @ gradients[3:9].T)


def test_sums_and_products_with_a_vector(layer):
    gradients = by_autograd(layer)
    bias, weight = gradient_sum(layer.errors, layer.embeddings)
    close(torch.cat([bias, weight.flatten()]), gradients.sum(dim=0))
    close(products_with(bias, weight, layer.errors, layer.embeddings), gradients @ gradients.sum(dim=0))


def test_inputs_are_left_alone(layer):
    before = layer.errors.clone(), layer.embeddings.clone()
    inner_products(layer.errors, layer.embeddings)
    products_with(*gradient_sum(layer.errors, layer.embeddings), layer.errors, layer.embeddings)
    assert torch.equal(layer.errors, before[0])
    assert torch.equal(layer.embeddings, before[1])


def test_errors_are_softmax_less_onehot_and_sum_to_0(layer):
    expected = torch.softmax(layer.logits, dim=1) - torch.eye(layer.logits.shape[1])[layer.labels]
    close(layer.errors, expected)
    assert layer.errors.sum(dim=1).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_keep_digits_where_the_probability_rounds_to_1(dtype):
    logits = torch.tensor([[60.0, 0.0, 1.0]], dtype=dtype)
    error = errors_of(logits, torch.tensor([0]))[0]
    assert error.dtype == dtype
    exact = np.exp(-60.0) / (1 + np.exp(-60.0) + np.exp(-59.0))
    np.testing.assert_allclose(error[1:].double(), [exact, exact * np.e], rtol=1e-6)
    assert float(error[0]) == pytest.approx(-exact * (1 + np.e), rel=1e-6)


def test_errors_are_exactly_0_where_nothing_is_left():
    assert (errors_of(torch.tensor([[2e3, 0.0, 0.0]]), torch.tensor([0])) == 0).all()


def test_norms_of_small_errors_do_not_vanish():
    errors = torch.tensor([[-1e-30, 1e-30]])  # squares underflow in float32
    found = gradient_norms(errors, torch.zeros(1, 3))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(2**0.5 * 1e-30, rel=1e-6)


def test_losses_and_subsets(layer):
    expected = -torch.log_softmax(layer.logits, dim=1)[torch.arange(12), layer.labels]
    close(layer.losses, expected)
    positions = np.array([7, 2, 2])
    close(layer.at(positions).losses, expected[positions])
    assert layer.at(positions).gradient_norms is None
    assert torch.equal(layer.at(positions).embeddings, layer.embeddings[positions])
    assert LastLayer(layer.logits, layer.labels).at(positions).embeddings is None


def test_a_selection_is_put_in_the_order_of_the_data_with_its_weights():
    selection = Selection.of([np.array([5, 1]), np.array([0, 3])], [np.array([1, 2]), np.array([3, 6])])
    assert selection.indices.tolist() == [0, 1, 3, 5]
    assert selection.weights.tolist() == [3, 2, 6, 1]
    assert selection.weighted
    assert selection.rescaled().weights.tolist() == [1, 2 / 3, 2, 1 / 3]
    assert not Selection.of([np.array([2, 1])]).weighted
    with pytest.raises(UserError, match="all 0"):
        Selection.of([np.array([2])], [np.zeros(1)]).rescaled()


def test_a_choice_is_subsampled_by_itself_above_a_number_of_gains():
    side = math.isqrt(GREEDY_LIMIT)
    at, above = CandidateGroup(np.arange(side), side), CandidateGroup(np.arange(side + 1), side)
    assert [GreedyOptions().epsilon(groups) for groups in ([at], [above], [at, at])] == [None, *[GREEDY_EPSILON] * 2]
    assert GreedyOptions(selection_subsample="exact").epsilon([above]) is None
    assert GreedyOptions(selection_subsample=0.3).epsilon([at]) == 0.3


@pytest.mark.parametrize("value", ["never", 0, 0.6, -0.1, float("nan")])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match=r"auto, exact, or a number above 0 and at most 0\.5"):
        GreedyOptions(selection_subsample=value)


def test_draws_are_unused_ascending_and_of_the_size_of_the_paper():
    draws = Draws(100, 20, 0.1, np.random.default_rng(0))
    assert draws.size == math.ceil(5 * math.log(10))
    taken, seen = [], set()
    for _ in range(100):
        drawn = draws.draw()
        assert len(drawn) == min(draws.size, 100 - len(taken))
        assert (np.diff(drawn) > 0).all()
        assert not set(drawn) & set(taken)
        seen |= set(drawn)
        draws.take(drawn[-1])
        taken.append(drawn[-1])
    assert seen == set(range(100))


@pytest.mark.parametrize("epsilon", [0.5, 0.2, 0.1])
@pytest.mark.parametrize("fraction", [0.001, 0.013, 0.3, 1.0])
def test_parts_split_examples_and_budget(epsilon, fraction):
    groups = make_groups(np.repeat([0, 1, 2], [997, 40, 3]), 3, fraction=fraction)
    parts = random_parts(groups, epsilon, np.random.default_rng(0))
    for group in groups:
        own = [part for part in parts if part.label == group.label]
        assert np.array_equal(np.sort(np.concatenate([part.positions for part in own])), group.positions)
        assert sum(part.budget for part in own) == group.budget
        sizes, budgets = [len(part.positions) for part in own], [part.budget for part in own]
        assert max(sizes) - min(sizes) <= 1
        assert max(budgets) - min(budgets) <= 2
    if epsilon == 0.2 and fraction == 0.3:
        assert sum(part.label == 0 for part in parts) == round(997 / (2 * math.log(5) / 0.04))
