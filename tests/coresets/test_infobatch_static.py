import itertools
import logging

import numpy as np
import pytest
import torch

from src.coresets.budgets import make_groups
from src.coresets.infobatch import draw, infobatch, split_by_mean
from src.coresets.inputs import LastLayer, Options, Selection, SelectionInputs


def material(losses, labels=None, seed: int = 1) -> SelectionInputs:
    """Two logits whose cross-entropy at class 0 (at class 1: mirrored) is the given loss."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    labels = np.zeros(len(losses), dtype=np.int64) if labels is None else np.asarray(labels)
    margin = -torch.log(torch.expm1(losses))
    logits = torch.stack([margin, torch.zeros_like(margin)], dim=1)
    mirrored = torch.from_numpy(labels).bool()
    logits[mirrored] = logits[mirrored].flip(1)
    network = LastLayer(logits, torch.from_numpy(labels))
    np.testing.assert_allclose(network.losses.numpy(), losses, rtol=1e-12)
    return SelectionInputs(labels, 2, seed, networks=[network])


def select(given: SelectionInputs, fraction: float, per_class: bool = True) -> Selection:
    return infobatch(given, make_groups(given.labels, 2, fraction=fraction, per_class=per_class), Options())


class Scripted:
    """In place of a generator: draws what it is told."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places = list(places)

    def choice(self, values: np.ndarray, count: int, replace: bool) -> np.ndarray:
        assert not replace
        assert count == len(self.places)
        return values[self.places]


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_the_expected_gradient_is_the_full_one(room):
    losses = np.array([0.1, 3.0, 0.2, 0.3, 2.0, 0.1])  # four below the mean
    gradients = np.random.default_rng(0).standard_normal((6, 3))
    sums = []
    for places in itertools.combinations(range(4), room):
        chosen, weights = draw(losses, 2 + room, Scripted(places))
        assert {1, 4} <= set(chosen.tolist())
        assert weights.sum() == pytest.approx(6)
        sums.append(weights @ gradients[chosen])
    np.testing.assert_allclose(np.mean(sums, axis=0), gradients.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_all_at_or_above_the_mean_are_kept_and_the_rest_weigh_more(caplog):
    losses = [0.1, 3.0, 0.2, 0.3, 2.0, 0.1, 0.15, 0.25, 0.12, 0.11]
    selection = select(material(losses), 0.4)
    weights = dict(zip(selection.indices.tolist(), selection.weights, strict=True))
    assert len(weights) == 4
    assert weights.pop(1) == weights.pop(4) == 1
    assert list(weights.values()) == [4.0, 4.0]  # 8 below the mean, 2 of them kept
    assert selection.weighted
    assert not caplog.records


def test_each_group_has_its_own_mean():
    losses, labels = [0.1, 0.2, 0.9, 5.0, 6.0, 10.0], [0, 0, 0, 1, 1, 1]
    selection = select(material(losses, labels), 0.6)
    assert {2, 5} <= set(selection.indices.tolist())
    assert selection.weights.tolist().count(2.0) == 2
    everywhere = select(material(losses, labels), 0.5, per_class=False)
    assert {3, 4, 5} <= set(everywhere.indices.tolist())


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_too_many_above_the_mean_keep_a_random_part_with_a_notice(caplog, fraction):
    losses = [0.01, *[2.0] * 8, 0.02]
    with caplog.at_level(logging.WARNING):
        selection = select(material(losses), fraction)
    assert len(selection.indices) == round(10 * fraction)
    assert set(selection.indices.tolist()) <= set(range(1, 9))
    assert not selection.weighted
    (record,) = caplog.records
    assert "1 of 1 groups" in record.getMessage()
    assert "not the full one" in record.getMessage()


def test_everything_is_kept_with_weight_1_and_without_a_notice(caplog):
    selection = select(material([0.1, 2.0, 0.3, 1.0]), 1.0)
    assert selection.indices.tolist() == [0, 1, 2, 3]
    assert not selection.weighted
    assert not caplog.records


def test_equal_losses_are_at_their_mean():
    losses = np.full(7, 0.1)
    high, low = split_by_mean(losses)
    assert len(high) == 7
    assert not len(low)
    places, weights = draw(losses, 3, np.random.default_rng(0))
    assert len(set(places.tolist())) == 3
    assert (weights == 1).all()


def test_a_seed_repeats_its_draw():
    losses = np.random.default_rng(0).exponential(size=60) + 0.01
    first, again, other = (select(material(losses, seed=seed), 0.7).indices for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_a_group_of_one():
    selection = select(material([0.5, 0.2, 0.4], [0, 1, 1]), 0.01)
    assert len(selection.indices) == 2
    assert 0 in selection.indices
