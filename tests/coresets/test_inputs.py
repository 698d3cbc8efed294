"""What library callers give to the selection methods is checked where it enters, for all methods alike."""

import numpy as np
import pytest
import torch

from src.coresets import METHODS, CandidateGroup, LastLayer, Selection, SelectionInputs, make_groups
from src.coresets.inputs import Options
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
    with pytest.raises(UserError, match="embeddings: those of example 7 are not finite"):
        method.select(
            SelectionInputs(
                LABELS, 2, scores=np.arange(40.0), networks=[layer(embeddings=spoilt((40, 3), (7, 1), value))]
            ),
            GROUPS,
            method.options(),
        )


def test_infobatch_does_not_choose_nothing_where_a_logit_is_nan():
    with pytest.raises(UserError, match="logits: those of example 39"):
        METHODS["infobatch"].select(
            SelectionInputs(LABELS, 2, networks=[layer(logits=spoilt((40, 2), 39, float("nan")))]),
            GROUPS,
            Options(),
        )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layer(embeddings=torch.zeros(39, 3)), r"embeddings: has the shape \(39, 3\), but there are 40"),
        (lambda: layer(logits=torch.zeros(41, 2)), "logits: has the shape"),
        (lambda: layer(gradient_norms=spoilt(40, 3, float("nan"))), "gradient_norms: those of example 3"),
        (lambda: layer(labels=torch.full((40,), 2)), "labels: 2, of example 0, is not one of 0 to 1"),
        (lambda: SelectionInputs(LABELS, 2, scores=np.zeros(39)), "scores: has the shape"),
        (lambda: SelectionInputs(LABELS, 1), "labels: 1, of example 1, is not one of 0 to 0"),
        (lambda: SelectionInputs(LABELS - 1, 2), "labels: -1, of example 0"),
        (
            lambda: SelectionInputs(LABELS, 2, networks=[layer(), layer(labels=torch.from_numpy(1 - LABELS))]),
            "network 1: .* 0",
        ),
        (lambda: SelectionInputs(LABELS[:39], 2, networks=[layer()]), "network 0: has the shape"),
        (lambda: SelectionInputs(LABELS, 2, dynamics={"p": np.zeros((3, 39))}), "dynamics p: has the shape"),
        (
            lambda: SelectionInputs(LABELS, 2, dynamics={"p": np.full((3, 40), np.nan)}),
            "dynamics p: those of example 0",
        ),
        (lambda: CandidateGroup(np.arange(5), 6), "budget 6: the group has 5 examples; choose 1 to 5"),
        (lambda: CandidateGroup(np.arange(5), 6, 3), "budget 6: class 3 has 5"),
        (lambda: CandidateGroup(np.arange(5), 0), "budget 0"),
        (lambda: CandidateGroup(np.arange(0), 0), "budget 0"),
        (lambda: CandidateGroup(np.array([1, 1, 2]), 2), "ascending"),
        (lambda: CandidateGroup(np.array([-1, 1]), 1), "ascending"),
        (lambda: Selection(np.array([3, 5, 3]), np.ones(3)), "indices: 3 is there twice"),
        (lambda: Selection(np.array([-3, 5]), np.ones(2)), "indices: -3 is negative"),
        (lambda: Selection(np.array([3, 5]), np.array([1, -1.0])), "weights: -1, of index 5"),
        (lambda: Selection(np.array([3, 5]), np.array([np.nan, 1])), "weights: nan, of index 3"),
        (lambda: Selection(np.array([3, 5]), np.array([np.inf, 1])), "weights: inf, of index 3"),
        (lambda: Selection(np.array([3, 5]), np.ones(3)), "weights: there are 3 for 2 indices"),
    ],
)
def test_what_does_not_fit_is_one_line(make, says):
    with pytest.raises(UserError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)
