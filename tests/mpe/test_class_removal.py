"""Removing a class: the estimate computed by hand, a plain evaluation of the test set, and the file."""

import math

import numpy as np
import pytest
import torch
from mpe_problems import examples, network, random_predictions
from support import example

from mpe.estimates import estimate, loo_losses
from mpe.posterior import Predictions
from src.training.ensemble import Ensemble

loco = example("5_loco")


def by_hand(logits, variances, label):
    """-log softmax(f + v e)[y]."""
    total = sum(math.exp(f) for f in logits)
    errors = [math.exp(f) / total - (c == label) for c, f in enumerate(logits)]
    moved = [f + v * e for f, v, e in zip(logits, variances, errors, strict=True)]
    return -math.log(math.exp(moved[label]) / sum(math.exp(f) for f in moved))


def test_the_estimate_by_hand():
    logits = [[1.0, 2.0, -1.0], [0.3, -0.2, 0.5], [0.0, 1.0, 0.5]]
    variances = [[0.5, 0.2, 0.1], [0.4, 0.1, 0.3], [0.2, 0.2, 0.6]]
    labels = [0, 0, 2]
    losses = [by_hand(f, v, y) for f, v, y in zip(logits, variances, labels, strict=True)]
    assert losses[0] == pytest.approx(1.74561390, abs=5e-9)  # a golden value
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (logits, variances)]
    found = loco.class_estimates(Predictions(torch.arange(3), torch.tensor(labels), *tensors), "diag", 3)
    assert found.keys() == {"est_nll", "est_nll_diag"}
    np.testing.assert_allclose(found["est_nll"], [(losses[0] + losses[1]) / 2, np.nan, losses[2]], rtol=1e-12)
    assert found["est_nll"].dtype == np.float64


def test_one_pass_serves_every_form():
    predictions = random_predictions(n=20)
    found = loco.class_estimates(predictions, "full", 4)
    assert found.keys() == {"est_nll", "est_nll_diag", "est_nll_full", "est_nll_woodbury"}
    np.testing.assert_array_equal(found["est_nll"], found["est_nll_full"])
    for form in ("diag", "full", "woodbury"):
        losses = loo_losses(predictions, estimate(predictions, form))
        wanted = [losses[predictions.labels == c].mean().item() for c in range(4)]
        np.testing.assert_allclose(found[f"est_nll_{form}"], wanted, rtol=1e-12)
    assert not np.allclose(found["est_nll_diag"], found["est_nll_full"], rtol=1e-3)


def different_members(net, count):
    """An ensemble whose members have each taken a step on different data."""
    ensemble = Ensemble(net, count)
    images, labels = examples(5 * count, seed=3)
    ensemble.step(images.unflatten(0, (count, 5)), labels.view(count, 5), None, 1.0)
    return ensemble


@pytest.mark.parametrize("batch", [1000, 7])
def test_the_test_set_is_measured_as_plainly(batch):
    net, (images, labels) = network(), examples(31)
    ensemble = different_members(net, 3)
    found = loco.measure_test(images, labels, batch)(ensemble, range(4, 7))
    assert found["nll"].shape == found["acc"].shape == (3,)
    for member in range(3):
        net.load_state_dict(ensemble.member(member))
        logits = net(images).detach()
        wanted = torch.nn.functional.cross_entropy(logits, labels).item()
        assert found["nll"][member] == pytest.approx(wanted, rel=1e-12)
        assert found["acc"][member] == (logits.argmax(1) == labels).double().mean().item()
    assert len(set(found["nll"])) == 3


@pytest.mark.parametrize(("batch", "parts"), [(1000, [31]), (30, [10, 10, 10, 1]), (2, [1] * 31)])
def test_memory_does_not_grow_with_the_ensemble(batch, parts, monkeypatch):
    images, labels = examples(31)
    ensemble, asked = different_members(network(), 3), []
    plain = ensemble.logits
    monkeypatch.setattr(ensemble, "logits", lambda part: asked.append(len(part)) or plain(part))
    loco.measure_test(images, labels, batch)(ensemble, range(3))
    assert asked == parts  # of three members each


def test_an_impossible_label_costs_at_most_23_nats():
    net, (images, labels) = network(), examples(4)
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.copy_(torch.tensor([200.0, 0.0, 0.0, 0.0]))
    labels = torch.tensor([0, 0, 0, 1])
    found = loco.measure_test(images, labels)(Ensemble(net, 1), range(1))
    assert found["nll"][0] == pytest.approx(-math.log(1e-10) / 4, rel=1e-12)
    assert found["acc"][0] == 0.75


@pytest.mark.parametrize("models", [1, 2, 3])
def test_what_the_file_holds(models):
    """After only the control, in the middle, and at the end; class 1 of three has no examples."""
    rows = {"nll": np.array([0.5, 1.5, 2.5])[:models], "acc": np.array([0.9, 0.6, 0.7])[:models]}
    estimated = {"est_nll": np.array([0.1, np.nan, 0.2]), "est_nll_diag": np.array([0.1, np.nan, 0.2])}
    content = loco.content(rows, estimated, [0, 2], (0.95, 0.4))
    nll, acc = [[1.5, np.nan, 2.5], [0.6, np.nan, 0.7]]
    for place in range(models - 1, 2):
        nll[(0, 2)[place]] = acc[(0, 2)[place]] = np.nan
    np.testing.assert_array_equal(content["perturb_nll"], nll)
    np.testing.assert_array_equal(content["perturb_acc"], acc)
    assert (content["org_acc"], content["org_nll"]) == (0.95, 0.4)
    assert (content["control_acc"], content["control_nll"]) == (0.9, 0.5)
    np.testing.assert_array_equal(content["est_nll"], estimated["est_nll"])
