"""GLISTER compared with autograd and brute force."""

import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.coresets import glister
from src.coresets.glister import GlisterOptions, Validation, greedy, held_out
from src.coresets.inputs import CandidateGroup, Draws, LastLayer, SelectionInputs, make_groups
from src.coresets.registry import find_method
from src.errors import ArgumentError, UserError

KERNEL, FACTORS = 2048, 0  # MiB that select the two algorithms for small V; no flag accepts 0


def problem(n=60, C=3, d=5, seed=0, classes=None):
    """A last layer, embeddings and labels in float64."""
    torch.manual_seed(seed)
    head = nn.Linear(d, C, dtype=torch.float64)
    nn.init.normal_(head.weight)
    labels = torch.arange(n) % C if classes is None else torch.as_tensor(classes)
    return head, torch.randn(n, d, dtype=torch.float64), labels


def layer(head, embeddings, labels, rows=slice(None)):
    return LastLayer(head(embeddings[rows]).detach(), labels[rows], embeddings[rows])


def mean_gradient(head, embeddings, labels):
    """The gradient of the mean cross-entropy, bias and weights in one vector, by autograd."""
    loss = F.cross_entropy(head(embeddings), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (head.bias, head.weight))])


def stepped(head, embeddings, labels, picks, eta):
    """The last layer after one step along the mean gradient of the picks."""
    after = copy.deepcopy(head)
    if len(picks):
        step = mean_gradient(head, embeddings[picks], labels[picks])
        with torch.no_grad():
            after.bias -= eta * step[: len(head.bias)]
            after.weight -= eta * step[len(head.bias) :].view_as(head.weight)
    return after


def brute_force(head, embeddings, labels, pool, judges, picks, eta):
    """Gains of the candidates, by autograd."""
    after = stepped(head, embeddings, labels, picks, eta)
    v = mean_gradient(after, embeddings[judges], labels[judges])
    each = [mean_gradient(head, embeddings[[x]], labels[[x]]) for x in pool]
    return torch.stack([g @ v for g in each])


def slow_greedy(head, embeddings, labels, pool, first, judges, budget, eta, refresh=1):
    picks = []
    for count in range(budget):
        if count % refresh == 0:
            gains = brute_force(head, embeddings, labels, pool, judges, picks, eta)
        open_ = [p for p in range(len(pool)) if pool[p] not in picks and (count >= first or p < first)]
        picks.append(pool[max(open_, key=lambda p: float(gains[p]))])
    return picks


def select(head, embeddings, labels, groups, seed=1, **options):
    content = SelectionInputs(labels.numpy(), head.out_features, seed, layers=[layer(head, embeddings, labels)])
    return find_method("glister").select(content, groups, GlisterOptions(**options))


@pytest.mark.parametrize("memory", [KERNEL, FACTORS])
@pytest.mark.parametrize("blocks", [[[3]], [[3], [9], [20]], [[3, 9], [20, 1, 0]]])
def test_refreshed_gradient_is_that_of_a_real_step(memory, blocks):
    head, embeddings, labels = problem()
    judges = [50, 51, 52, 53]  # fewer than d
    pool = list(range(40))
    validation = Validation(
        layer(head, embeddings, labels, pool), layer(head, embeddings, labels, judges), 0.7, memory
    )
    assert (validation.kernel is not None) == (memory == KERNEL)
    validation.refresh(np.array([], dtype=np.int64))
    start = validation.gains()
    torch.testing.assert_close(start, brute_force(head, embeddings, labels, pool, judges, [], 0.7))
    for block in blocks:
        validation.refresh(np.array(block))
    gains = validation.gains()
    torch.testing.assert_close(validation.gains(np.array([7, 30])), gains[[7, 30]])
    picks = [pick for block in blocks for pick in block]
    wanted = brute_force(head, embeddings, labels, pool, judges, picks, 0.7)
    torch.testing.assert_close(gains, wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(gains, start)


def test_refreshed_errors_are_those_of_a_real_step():
    head, embeddings, labels = problem()
    judges, picks = list(range(45, 60)), [4, 8]
    validation = Validation(layer(head, embeddings, labels), layer(head, embeddings, labels, judges), 0.3)
    found = validation.judged(np.array(picks))
    logits = stepped(head, embeddings, labels, picks, 0.3)(embeddings[judges])
    torch.testing.assert_close(found, logits.softmax(dim=1) - F.one_hot(labels[judges], 3))


@pytest.mark.parametrize("memory", [KERNEL, FACTORS])
@pytest.mark.parametrize(("count", "eta"), [(4, 0.1), (4, 5.0), (12, 5.0)])
@pytest.mark.parametrize("refresh", [1, 3])
def test_order_of_picks_is_that_of_brute_force(memory, count, eta, refresh):
    head, embeddings, labels = problem()
    judges, pool = list(range(60 - count, 60)), list(range(30))
    options = SimpleNamespace(glister_eta=eta, glister_refresh=refresh, selection_memory=memory)
    found = greedy(layer(head, embeddings, labels, pool), 30, layer(head, embeddings, labels, judges), 20, options)
    assert found.tolist() == slow_greedy(head, embeddings, labels, pool, 30, judges, 20, eta, refresh)


def test_the_refresh_matters():
    head, embeddings, labels = problem()
    pool, judges = layer(head, embeddings, labels), layer(head, embeddings, labels, list(range(40, 60)))
    once = greedy(pool, 60, judges, 20, GlisterOptions(glister_eta=5.0, glister_refresh=100))
    assert once.tolist() != greedy(pool, 60, judges, 20, GlisterOptions(glister_eta=5.0)).tolist()
    validation = Validation(pool, judges, 5.0)
    validation.refresh(np.array([], dtype=np.int64))
    gains = validation.gains().numpy()
    assert once.tolist() == np.argsort(-gains, kind="stable")[:20].tolist()


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.95, 1.0])
def test_groups_are_judged_by_their_own_and_held_out_examples_come_last(per_class, fraction):
    head, embeddings, labels = problem(n=44)
    groups = make_groups(labels.numpy(), 3, fraction=fraction, per_class=per_class)
    found = select(head, embeddings, labels, groups, glister_eta=2.0)
    held = held_out(labels.numpy(), 3, 1)
    wanted = []
    for group in groups:
        candidates = [p for p in group.positions if not held[p]]
        judges = [p for p in group.positions if held[p]]
        wanted += slow_greedy(
            head, embeddings, labels, candidates + judges, len(candidates), judges, group.budget, 2.0
        )
        if group.budget <= len(candidates):
            assert not set(wanted) & set(judges)
    assert found.indices.tolist() == sorted(wanted)
    assert (found.weights == 1).all()


def test_hold_out_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2, 3, 5], [100, 26, 2, 1, 9])
    held = held_out(labels, 6, 1)
    assert np.bincount(labels[held], minlength=6).tolist() == [10, 3, 1, 0, 0, 1]
    assert (held == held_out(labels, 6, 1)).all()
    assert (held != held_out(labels, 6, 2)).any()


def test_a_class_without_held_out_examples_is_judged_by_all():
    head, embeddings, labels = problem(n=21, classes=[0] * 10 + [1] * 10 + [2])
    groups = make_groups(labels.numpy(), 3, fraction=0.5)
    assert select(head, embeddings, labels, groups).indices[-1] == 20


@pytest.mark.parametrize("size", [1, 2])
def test_groups_of_one_and_two(size):
    head, embeddings, labels = problem(n=size, classes=[1] * size)
    for budget in range(1, size + 1):
        found = select(head, embeddings, labels, [CandidateGroup(np.arange(size), budget, 1)])
        assert len(found.indices) == budget
    held = held_out(labels.numpy(), 3, 1)
    first = select(head, embeddings, labels, [CandidateGroup(np.arange(size), 1, 1)]).indices
    assert not held[first].any()


def test_without_any_second_example_the_candidates_are_the_judges():
    head, embeddings, labels = problem(n=3, classes=[0, 1, 2])
    found = select(head, embeddings, labels, [CandidateGroup(np.arange(3), 2)])
    wanted = slow_greedy(head, embeddings, labels, [0, 1, 2], 3, [0, 1, 2], 2, 0.1)
    assert found.indices.tolist() == sorted(wanted)


def test_ties_and_zero_gradients_go_by_index():
    head, embeddings, labels = problem(n=30, classes=[0] * 30)
    held = held_out(labels.numpy(), 3, 1)
    free = np.flatnonzero(~held)
    zero = LastLayer(torch.tensor([[900.0, -900.0, -900.0]]).repeat(30, 1), labels, embeddings.float())
    found = find_method("glister").select(
        SelectionInputs(labels.numpy(), 3, layers=[zero]), [CandidateGroup(np.arange(30), 8, 0)], GlisterOptions()
    )
    assert found.indices.tolist() == free[:8].tolist()
    embeddings[:] = embeddings[0]
    found = select(head, embeddings, labels, [CandidateGroup(np.arange(30), 8, 0)])
    assert found.indices.tolist() == free[:8].tolist()


def test_float32_material_keeps_the_picks_and_the_seed_decides():
    head, embeddings, labels = problem(n=60)
    groups = make_groups(labels.numpy(), 3, fraction=0.3)
    single = LastLayer(head(embeddings).detach().float(), labels, embeddings.float())
    content = SelectionInputs(labels.numpy(), 3, layers=[single])
    found = find_method("glister").select(content, groups, GlisterOptions())
    assert found.indices.tolist() == select(head, embeddings, labels, groups).indices.tolist()
    assert found.indices.tolist() != select(head, embeddings, labels, groups, seed=5).indices.tolist()


def test_two_classes():
    head, embeddings, labels = problem(n=40, C=2)
    groups = make_groups(labels.numpy(), 2, fraction=0.25)
    found = select(head, embeddings, labels, groups)
    assert np.bincount(labels[found.indices]).tolist() == [5, 5]


def test_a_long_run_says_how_to_shorten_it(monkeypatch, caplog):
    head, embeddings, labels = problem(n=40)
    monkeypatch.setattr(glister, "_LONG", -1.0)
    with caplog.at_level(logging.INFO, logger=glister.__name__):
        select(head, embeddings, labels, [CandidateGroup(np.arange(40), 10)])
    assert "--glister_refresh" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"glister_eta": -0.1}, "glister_eta"), ({"glister_refresh": 0}, "glister_refresh")],
)
def test_bad_values_are_refused(options, flag):
    head, embeddings, labels = problem(n=12)
    with pytest.raises(ArgumentError, match=flag):
        select(head, embeddings, labels, [CandidateGroup(np.arange(12), 2)], **options)


def test_gradients_that_are_not_finite_are_refused():
    head, embeddings, labels = problem(n=12)
    embeddings[4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        select(head, embeddings, labels, [CandidateGroup(np.arange(12), 2)])


@pytest.mark.parametrize("memory", [KERNEL, FACTORS])
@pytest.mark.parametrize("refresh", [1, 3])
def test_drawing_all_candidates_is_the_exact_greedy(memory, refresh):
    head, embeddings, labels = problem()
    pool, judges = layer(head, embeddings, labels, slice(40)), layer(head, embeddings, labels, slice(40, 60))
    options = SimpleNamespace(glister_eta=5.0, glister_refresh=refresh, selection_memory=memory)
    draws = [Draws(count, count, 1e-30, np.random.default_rng(0)) for count in (30, 10)]
    found = greedy(pool, 30, judges, 36, options, draws)
    assert found.tolist() == greedy(pool, 30, judges, 36, options).tolist()


def test_subsampled_picks_lower_the_loss_nearly_as_much():
    head, embeddings, labels = problem(n=600)
    groups = make_groups(labels.numpy(), 3, fraction=0.1)
    judged = held_out(labels.numpy(), 3, 1)

    def loss(picks):
        after = stepped(head, embeddings, labels, picks, 1.0)
        return float(F.cross_entropy(after(embeddings[judged]), labels[judged]).detach())

    exact = select(head, embeddings, labels, groups, glister_eta=1.0, selection_subsample="exact")
    near = select(head, embeddings, labels, groups, glister_eta=1.0, selection_subsample=0.05)
    assert len(near.indices) == len(exact.indices)
    assert not judged[near.indices].any()
    start, lowest, reached = loss([]), loss(exact.indices), loss(near.indices)
    assert start - reached > 0.8 * (start - lowest)
    everything = make_groups(labels.numpy(), 3, fraction=1.0)
    assert len(select(head, embeddings, labels, everything, selection_subsample=0.5).indices) == 600
