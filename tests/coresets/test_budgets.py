import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.coresets.inputs import class_budgets, make_groups
from src.datasets.splits import rounded_share
from src.errors import ArgumentError

percents = st.integers(1, 1000)  # per thousand: fractions that are not exact as floats
sizes_of_classes = st.lists(st.integers(0, 60_000), min_size=1, max_size=20)


@settings(deadline=None)
@given(sizes=sizes_of_classes, percent=percents)
def test_a_class_keeps_its_share_rounded_up(sizes, percent):
    expected = [math.ceil(Fraction(percent, 1000) * size) for size in sizes]
    assert class_budgets(np.array(sizes), percent / 1000).tolist() == expected


@given(count=st.integers(0, 1_300_000), percent=percents)
def test_all_together_keep_their_share_rounded_half_up(count, percent):
    assert rounded_share(count, percent / 1000) == math.floor(Fraction(percent, 1000) * count + Fraction(1, 2))


def test_noise_of_floats_lifts_no_budget():
    assert 0.55 * 6000 > 3300
    assert class_budgets(np.array([6000, 0, 1]), 0.55).tolist() == [3300, 0, 1]
    assert class_budgets(np.array([5000, 7, 0]), 1.0).tolist() == [5000, 7, 0]
    assert class_budgets(np.array([5000, 1, 0]), 1e-15).tolist() == [1, 1, 0]
    assert rounded_share(6000, 0.55) == 3300
    assert rounded_share(5, 0.5) == 3
    assert rounded_share(50_000, 1.0) == 50_000


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fraction=st.floats(1e-12, 1.0),
    per_class=st.booleans(),
)
def test_groups_part_the_candidates(labels, fraction, per_class):
    labels = np.array(labels)
    if not per_class and rounded_share(len(labels), fraction) == 0:
        with pytest.raises(ArgumentError, match=r"^fraction .*: keeps none of"):
            make_groups(labels, 6, fraction=fraction, per_class=False)
        return
    groups = make_groups(labels, 6, fraction=fraction, per_class=per_class)
    assert sorted(np.concatenate([g.positions for g in groups]).tolist()) == list(range(len(labels)))
    for group in groups:
        assert (np.diff(group.positions) > 0).all()
        assert 1 <= group.budget <= len(group.positions)
        assert group.label is None or (labels[group.positions] == group.label).all()
    assert [g.label for g in groups] == (sorted(set(labels.tolist())) if per_class else [None])


def test_shots_count_examples_of_each_class_that_has_any():
    groups = make_groups(np.array([0, 2, 2, 0, 2]), 4, shots=2)
    assert [(g.label, g.budget, g.positions.tolist()) for g in groups] == [(0, 2, [0, 3]), (2, 2, [1, 2, 4])]


def test_shots_up_to_keep_all_of_a_smaller_class():
    labels = np.array([0, 2, 2, 0, 2, 3])
    groups = make_groups(labels, 5, shots_up_to=2)
    assert [(g.label, g.budget) for g in groups] == [(0, 2), (2, 2), (3, 1)]
    with pytest.raises(ArgumentError, match=r"class 'dog' has only 1 examples; .*shots_up_to=2"):
        make_groups(labels, 5, shots=2, class_names=["a", "b", "c", "dog", "e"])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"fraction": 0.0}, "fraction 0.0: must be above 0 and at most 1"),
        ({"fraction": -0.1}, "fraction -0.1: must be above 0"),
        ({"fraction": 1.01}, "fraction 1.01: must be above 0"),
        ({"fraction": math.nan}, "fraction nan: must be above 0"),
        ({"fraction": 0.01, "per_class": False}, "fraction 0.01: keeps none of 5 examples"),
        ({"shots": 0}, "shots 0: must be at least 1"),
        ({"shots": 3}, "shots 3: class 0 has only 2 examples; use at most that many"),
        ({"shots": 1, "per_class": False}, "shots: counts examples per class; leave per_class enabled"),
        ({"shots_up_to": 0}, "shots_up_to 0: must be at least 1"),
        ({"shots_up_to": 1, "per_class": False}, "shots_up_to: counts examples per class; leave per_class enabled"),
    ],
)
def test_what_does_not_fit_is_refused(settings_, message):
    with pytest.raises(ArgumentError) as refusal:
        make_groups(np.array([0, 2, 2, 0, 2]), 4, **settings_)
    assert str(refusal.value).startswith(message)
