"""Which examples are removed, and the contents of their files."""

import numpy as np
import pytest
import torch
from mpe_problems import examples, network, random_predictions
from support import example
from torch import nn

from mpe.estimates import estimate, sensitivity
from mpe.posterior import Predictions
from src.training.ensemble import Ensemble

script = example("3_validation_sensitivities")


@pytest.mark.parametrize(
    ("count", "first", "number", "total"),
    [
        (60000, [15281, 21435, 44536, 13518, 47529, 53560, 41094, 6060, 9358, 49039], 1000, 29700949),
        (50000, [26247, 35067, 34590, 16668, 12196, 2600, 9047, 2206, 25607, 11606], 100, 2285851),
    ],
)
def test_the_papers_examples_are_drawn(count, first, number, total):
    before = np.random.get_state()[1].copy()
    drawn = script.drawn_examples(count, number, seed=1)
    assert drawn[:10].tolist() == first
    assert drawn.sum() == total
    assert np.array_equal(np.random.get_state()[1], before)  # the global generator is not advanced


def test_draws_are_distinct_and_go_on():
    everything = script.drawn_examples(30, 30, seed=4)
    assert sorted(everything) == list(range(30))
    assert np.array_equal(script.drawn_examples(30, 7, seed=4), everything[:7])
    assert not np.array_equal(script.drawn_examples(30, 30, seed=5), everything)
    assert script.drawn_examples(30, 0, seed=4).shape == (0,)


def test_examples_spread_over_the_range_of_the_scores():
    scores = np.array([0.0, 0.1, 0.11, 0.5, 0.52, 0.9, 1.0, 0.5])
    assert script.spread_examples(scores, 3).tolist() == [6, 3, 0]  # 1, 0.5 (the first of two), 0
    assert script.spread_examples(scores, 3, taken=[3, 6]).tolist() == [5, 7, 0]
    assert script.spread_examples(scores, 1).tolist() == [6]
    assert script.spread_examples(scores, 0, taken=[2]).tolist() == []
    rest = script.spread_examples(scores, 6, taken=np.array([0, 6]))
    assert sorted(rest) == [1, 2, 3, 4, 5, 7]
    assert sorted(script.spread_examples(np.ones(4), 4)) == [0, 1, 2, 3]


def test_what_the_file_of_estimates_holds():
    found = random_predictions()
    found = Predictions(torch.arange(6) + 10, found.labels, found.logits, found.variances)
    content = script.score_content(found, "woodbury", "abc")
    for form in ("diag", "full", "woodbury"):
        wanted = sensitivity(estimate(found, form)).numpy()
        np.testing.assert_array_equal(content[f"sensitivities_{form}"], wanted)
        assert wanted.dtype == np.float64
    np.testing.assert_array_equal(content["sensitivities"], content["sensitivities_woodbury"])
    assert not np.array_equal(content["sensitivities"], content["sensitivities_full"])
    assert content["indices"].tolist() == list(range(10, 16))
    assert content["labels"].tolist() == found.labels.tolist()
    np.testing.assert_array_equal(content["probabilities"], found.probabilities.numpy())
    assert (content["train_acc"], content["train_nll"]) == (found.accuracy, found.nll)
    assert content["base_weights"] == "abc"
    assert "sensitivities_full" not in script.score_content(random_predictions(full=False), "diag", "abc")


def different_members(net, count):
    """An ensemble whose members have each taken a step on different data."""
    ensemble = Ensemble(net, count, l2=0.1)
    images, labels = examples(5 * count, seed=3)
    ensemble.step(images.unflatten(0, (count, 5)), labels.view(count, 5), None, 0.5)
    return ensemble


def alone(net, weights, images):
    """Softmax of one model, computed with torch."""
    net.load_state_dict(weights)
    return net(images).detach().softmax(1).numpy()


def test_each_network_is_asked_about_the_example_that_it_lacks():
    net, (images, _) = network(), examples(9)
    removed = np.array([6, 2, 8, 0])
    measure = script.measure_removed(images, removed)
    ensemble = different_members(net, 3)
    first = measure(ensemble, range(3))
    assert first["probabilities"].shape == (3, 4)
    assert np.isnan(first["probabilities"][0]).all()
    for member in (1, 2):
        wanted = alone(net, ensemble.member(member), images[[removed[member - 1]]])[0]
        np.testing.assert_allclose(first["probabilities"][member], wanted, rtol=1e-12)
    np.testing.assert_allclose(first["control"], alone(net, ensemble.member(0), images[removed])[None], rtol=1e-12)
    assert np.abs(first["control"][0, 0] - first["probabilities"][1]).max() > 1e-3  # members do differ
    ensemble = different_members(net, 2)
    later = measure(ensemble, range(3, 5))
    assert later["control"].shape == (0, 4, 4)
    for place, position in enumerate(removed[2:]):
        wanted = alone(net, ensemble.member(place), images[[position]])[0]
        np.testing.assert_allclose(later["probabilities"][place], wanted, rtol=1e-12)


def test_the_control_is_asked_in_parts(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).double()
    images = torch.randn(1203, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    removed = script.drawn_examples(1203, 1201, 1)
    wanted = alone(net, net.state_dict(), images[removed])
    for members, most in ((1, 500), (3, 166), (600, 1)):  # memory does not grow with the ensemble
        ensemble, asked = Ensemble(net, members), []

        def logits(part, plain=ensemble.logits, asked=asked):
            asked.append(len(part))
            return plain(part)

        monkeypatch.setattr(ensemble, "logits", logits)
        found = script.measure_removed(images, removed)(ensemble, range(members))
        np.testing.assert_allclose(found["control"][0], wanted, rtol=1e-12)
        assert max(asked) == most
        assert sum(asked) == 1201


REMOVED = np.array([4, 1, 5, 2])
BASE = np.random.default_rng(0).dirichlet(np.ones(3), 6)  # (N, C)
MOVED = np.random.default_rng(1).dirichlet(np.ones(3), 5)
CONTROL = np.random.default_rng(2).dirichlet(np.ones(3), 4)


@pytest.mark.parametrize("models", [1, 3, 5])
def test_what_the_file_of_true_deviations_holds(models):
    """After only the control, in the middle, and at the end."""
    rows = {"probabilities": MOVED[:models].copy(), "control": CONTROL[None]}
    rows["probabilities"][0] = np.nan
    content = script.retrain_content(rows, REMOVED, spread=1, base=BASE, indices=np.arange(6) * 100)
    done = models - 1
    assert content["indices_retrain"].tolist() == [4, 1, 5, 2][:done]
    assert content["indices_retrain"].dtype == np.int64
    assert content["indices_original"].tolist() == [400, 100, 500, 200][:done]
    assert content["spread"].tolist() == [False, False, False, True][:done]
    assert content["softmax_deviations"].shape == (done,)
    assert content["softmax_deviations"].dtype == np.float64
    for row in range(done):
        change = MOVED[row + 1] - BASE[REMOVED[row]]
        np.testing.assert_allclose(content["probability_deviations"][row], change, rtol=1e-14)
        assert content["softmax_deviations"][row] == pytest.approx(sum(abs(value) for value in change), rel=1e-14)
        corrected = sum(abs(value) for value in MOVED[row + 1] - CONTROL[row])
        assert content["softmax_deviations_corrected"][row] == pytest.approx(corrected, rel=1e-14)
    np.testing.assert_array_equal(content["base_probabilities"], BASE[REMOVED[:done]])
    np.testing.assert_array_equal(content["control_probabilities"], CONTROL[:done])
