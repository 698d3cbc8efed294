import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.coresets import ranked
from src.coresets.config import SelectionConfig
from src.coresets.inputs import CandidateGroup, LastLayer, Options, SelectionInputs, make_groups
from src.coresets.registry import METHODS
from src.errors import ArgumentError, FileError
from src.metrics import SCORES

few_values = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1.0, 2.0, np.inf])  # many ties


def by_sorting(scores, groups: list[CandidateGroup], highest: bool) -> list[int]:
    kept: list[int] = []
    for group in groups:
        order = sorted(group.positions.tolist(), key=lambda i: (scores[i], i))
        kept += order[-group.budget :] if highest else order[: group.budget]
    return sorted(kept)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(few_values | st.floats(allow_nan=False), st.integers(0, 3)), min_size=1, max_size=40),
    fraction=st.floats(0.01, 1.0),
    highest=st.booleans(),
    per_class=st.booleans(),
)
def test_the_kept_are_an_end_of_the_order_by_score_and_index(rows, fraction, highest, per_class):
    scores, labels = np.array([score for score, _ in rows]), np.array([label for _, label in rows])
    try:
        groups = make_groups(labels, 4, fraction=fraction, per_class=per_class)
    except ArgumentError:  # a budget of 0
        assert not per_class
        return
    selection = ranked.keep_by_rank(scores, groups, highest=highest, what="score")
    assert selection.indices.tolist() == by_sorting(scores, groups, highest)
    assert not selection.weighted


def test_groups_may_leave_examples_out_and_come_in_any_order():
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0])
    groups = [CandidateGroup(np.array([3, 4]), 1), CandidateGroup(np.array([0, 1, 2]), 2)]
    assert ranked.keep_by_rank(scores, groups, highest=True, what="score").indices.tolist() == [0, 2, 4]
    assert ranked.keep_by_rank(scores, groups, highest=False, what="score").indices.tolist() == [1, 2, 3]


def test_more_groups_than_int16_can_number():
    scores = np.random.default_rng(0).standard_normal(70_000)
    groups = [CandidateGroup(np.array([2 * i, 2 * i + 1]), 1) for i in range(35_000)]
    pairs = scores.reshape(-1, 2)
    kept = ranked.keep_by_rank(scores, groups, highest=True, what="score").indices
    assert (kept == pairs.argmax(axis=1) + 2 * np.arange(35_000)).all()


@pytest.mark.parametrize(
    ("scores", "budget", "highest", "decided"),
    [
        ([0, 0, 0, 0, 1], 2, False, 2),  # two of four zeros
        ([0, 0, 0, 0, 1], 2, True, 1),  # the one, and a zero
        ([0, 0, 1, 1], 2, False, None),  # the cut falls between values
        ([0, 0, 0, 0], 4, False, None),  # all are kept
        ([np.inf, np.inf, 0], 1, True, 1),
    ],
)
def test_a_notice_counts_what_ties_decide(caplog, scores, budget, highest, decided):
    groups = [CandidateGroup(np.arange(len(scores)), budget)]
    with caplog.at_level(logging.WARNING):
        ranked.keep_by_rank(np.array(scores, dtype=float), groups, highest=highest, what="min_forg")
    if decided is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert record.getMessage().startswith(f"min_forg: {decided} of {budget} selected")


def test_few_ties_need_no_notice(caplog):
    scores = np.arange(1000.0)
    scores[499] = 500.0
    ranked.keep_by_rank(scores, [CandidateGroup(np.arange(1000), 500)], highest=True, what="score")
    assert not caplog.records


def test_a_missing_score_is_refused_by_the_original_index():
    material = SelectionInputs(np.zeros(3), 1, scores=np.array([1.0, np.nan, np.inf]), names=np.array([10, 77, 80]))
    with pytest.raises(FileError, match=r"min_mem: .* 1 of 3 .*example 77"):
        ranked.checked_scores(material, "min_mem")


@pytest.mark.parametrize("mode", SCORES)
def test_stored_scores_keep_the_end_that_the_mode_names(mode):
    (method,) = (method for method in METHODS.values() if method.needs.stored == mode)
    labels = np.array([0, 1, 0, 1, 0, 1])
    material = SelectionInputs(labels, 2, scores=np.array([3.0, 0.0, 1.0, 5.0, 2.0, 4.0]))
    groups = make_groups(labels, 2, shots=1)
    large, few = (
        method.select(material, groups, method.options(coreset_mode=mode)) for mode in ("large", "few_shot")
    )
    assert large.indices.tolist() == [0, 3]
    assert few.indices.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["forget", "csl", "aum", "tdds"])
def test_reduced_scores_keep_the_highest(name):
    method = METHODS[name]
    assert "coreset_mode" not in method.option_names
    scores = np.array([0.0, np.inf, 2.0, 1.0])
    material = SelectionInputs(np.zeros(4, dtype=int), 1, scores=scores, dynamics={"correct": np.ones((2, 4))})
    selection = method.select(material, [CandidateGroup(np.arange(4), 2)], method.options())
    assert selection.indices.tolist() == [1, 2]


def test_forgetting_keeps_what_was_never_learned_before_all_else():
    correct = np.array([[1.0, 0.0, 1.0, np.nan], [0.0, 0.0, 1.0, 1.0]])
    material = SelectionInputs(
        np.zeros(4, dtype=int), 1, scores=np.array([1.0, 0.0, 0.0, 0.0]), dynamics={"correct": correct}
    )
    for budget, kept in ((1, [1]), (2, [0, 1])):
        selection = METHODS["forget"].select(material, [CandidateGroup(np.arange(4), budget)], Options())
        assert selection.indices.tolist() == kept


def random_networks(count: int, labels: np.ndarray) -> list[LastLayer]:
    draw = torch.Generator().manual_seed(0)
    return [
        LastLayer(
            3 * torch.randn(len(labels), 3, generator=draw, dtype=torch.float64),
            torch.from_numpy(labels),
            torch.randn(len(labels), 4, generator=draw, dtype=torch.float64),
            torch.rand(len(labels), generator=draw, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def explicit_scores(name: str, networks: list[LastLayer], gradient: str) -> np.ndarray:
    scores = []
    for network in networks:
        errors = torch.softmax(network.logits, dim=1) - torch.eye(3, dtype=torch.float64)[network.labels]
        if name == "el2n":
            scores.append(errors.norm(dim=1).numpy())
        elif gradient == "full":
            scores.append(network.gradient_norms.numpy())
        else:
            weight = (errors[:, :, None] * network.embeddings[:, None, :]).flatten(1)
            scores.append(torch.cat([errors, weight], dim=1).norm(dim=1).numpy())
    return np.mean(scores, axis=0)


@pytest.mark.parametrize(("name", "gradient"), [("el2n", "last"), ("grand", "last"), ("grand", "full")])
@pytest.mark.parametrize("ensemble", [1, 3])
def test_norms_are_averaged_over_networks_and_the_highest_kept(name, gradient, ensemble):
    labels = np.random.default_rng(0).integers(3, size=50)
    networks = random_networks(ensemble, labels)
    groups = make_groups(labels, 3, fraction=0.3)
    method = METHODS[name]
    assert method.needs.ensemble
    options = method.options(grand_gradient=gradient) if name == "grand" else method.options()
    selection = method.select(SelectionInputs(labels, 3, layers=networks), groups, options)
    expected = by_sorting(explicit_scores(name, networks, gradient), groups, highest=True)
    assert selection.indices.tolist() == expected


def test_the_mode_of_a_selection_is_that_of_its_options():
    assert SelectionConfig("min_mem", coreset_mode="few_shot").options.coreset_mode == "few_shot"
    assert SelectionConfig("random", coreset_mode="few_shot").options == METHODS["random"].options()
    with pytest.raises(ArgumentError, match="few_shot: the method's options have large"):
        SelectionConfig("min_mem", coreset_mode="few_shot", options=METHODS["min_mem"].options())
