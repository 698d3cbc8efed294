"""Networks trained with several L2 parameters: each is measured as itself, and the file grows with them."""

import numpy as np
import pytest
import torch
from mpe_problems import batches, diagonal_variances, examples, network

from mpe.estimates import estimate, loo_losses
from mpe.l2_selection import l2_content, measure_deltas
from mpe.posterior import Predictions
from src.training.ensemble import Ensemble

DELTAS = [0.5, 1.0, 4.0, 20.0]


def measured(class_cov, members):
    """What is kept of each member of an ensemble, and the network that they were loaded into."""
    net, (images, labels), (test_images, test_labels) = network(), examples(), examples(9, seed=5)
    ensemble = Ensemble(net, len(members), l2=torch.tensor([DELTAS[number] for number in members]))
    for _ in range(3):
        ensemble.step(images, labels, None, 0.5)
    full = class_cov != "diag"

    def predictions(delta):
        logits, variances = diagonal_variances(net, images, labels, delta, full)
        return Predictions(torch.arange(len(labels)), labels, logits, variances)

    def test():
        logits = net(test_images)
        right = (logits.argmax(1) == test_labels).double().mean().item()
        return right, torch.nn.functional.cross_entropy(logits, test_labels).item()

    measure = measure_deltas(DELTAS, class_cov, net, predictions, test)
    rows = [measure(ensemble.member(place), number) for place, number in enumerate(members)]
    return rows, ensemble, predictions, net


@pytest.mark.parametrize("class_cov", ["diag", "woodbury"])
def test_each_is_measured_with_its_own_weights_and_delta(class_cov):
    members = range(2, 4)
    rows, ensemble, predictions, net = measured(class_cov, members)
    forms = ("diag",) if class_cov == "diag" else ("diag", "full", "woodbury")
    names = {"test_accs", "test_nlls", "train_acc", "train_nll", *(f"estimated_nll_{form}" for form in forms)}
    assert all(row.keys() == names for row in rows)
    images, labels = batches(*examples(9, seed=5), size=9)[0]
    for place, number in enumerate(members):
        net.load_state_dict(ensemble.member(place))
        found = predictions(DELTAS[number])
        for form in forms:
            wanted = loo_losses(found, estimate(found, form)).mean().item()
            assert rows[place][f"estimated_nll_{form}"] == pytest.approx(wanted, rel=1e-12)
        assert rows[place]["train_nll"] == pytest.approx(found.nll, rel=1e-12)
        assert rows[place]["train_acc"] == found.accuracy
        test_nll = torch.nn.functional.cross_entropy(net(images), labels).item()
        assert rows[place]["test_nlls"] == pytest.approx(test_nll, rel=1e-12)
    assert rows[0]["train_nll"] < rows[1]["train_nll"]  # the larger delta holds the weights back


@pytest.mark.parametrize("done", [1, 3])
def test_what_the_file_holds(done):
    names = (
        "test_accs",
        "test_nlls",
        "train_acc",
        "estimated_nll_diag",
        "estimated_nll_full",
        "estimated_nll_woodbury",
    )
    rows = {name: np.linspace(0.1, 0.9, done) + place for place, name in enumerate(names)}
    content = l2_content(rows, np.array(DELTAS), "full")
    assert content.keys() == {"deltas", "estimated_nll", *names}
    assert content["deltas"].tolist() == DELTAS[:done]
    assert content["deltas"].dtype == np.float64
    assert [type(value) for value in content["estimated_nll"]] == [np.float64] * done
    assert content["estimated_nll"] == rows["estimated_nll_full"].tolist()
    assert [type(value) for value in content["test_accs"]] == [float] * done
    assert [type(value) for value in content["test_nlls"]] == [np.float32] * done
    assert isinstance(content["estimated_nll_diag"], np.ndarray)
