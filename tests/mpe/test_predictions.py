"""Predictions: one pass, with the arithmetic of the paper's experiments."""

import math

import pytest
import torch
from mpe_problems import batches, diagonal_variances, examples, network, random_predictions

from mpe.posterior import Predictions, clamped_errors, laplace_posterior, predict
from src.jacobians import OutputVariances


def run(net, given, full=False, **options):
    images = examples(dtype=net[0].weight.dtype)[0]
    posterior = laplace_posterior(net, [images], 2.0, structure="diag")
    with OutputVariances(net, posterior, full=full) as engine:
        return predict(engine, given, **options)


@pytest.mark.parametrize("full", [False, True])
def test_one_pass_over_ragged_batches(full):
    net, (images, labels) = network(), examples()
    logits, variances = diagonal_variances(net, images, labels, 2.0, full)
    found = run(net, batches(images, labels), full)
    assert found.full == full
    torch.testing.assert_close(found.logits, logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.variances, variances, rtol=1e-12, atol=1e-14)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.indices, torch.arange(7))
    diagonal = variances.diagonal(dim1=1, dim2=2) if full else variances
    torch.testing.assert_close(found.diagonal, diagonal, rtol=1e-12, atol=1e-14)
    assert {t.dtype for t in (found.logits, found.variances, found.errors)} == {torch.float64}


def test_float32_networks_give_float64():
    net, (images, labels) = network(torch.float32), examples(dtype=torch.float32)
    found = run(net, batches(images, labels))
    assert {found.logits.dtype, found.variances.dtype} == {torch.float64}
    torch.testing.assert_close(found.logits.float(), net(images).detach(), rtol=1e-5, atol=1e-6)


def test_original_indices_and_empty_batches():
    net, (images, labels) = network(), examples()
    order = torch.tensor([5, 2, 40, 1, 0, 3, 9])
    given = [(images[cut], labels[cut], order[cut]) for cut in (slice(3), slice(0), slice(3, 7))]
    assert torch.equal(run(net, given).indices, order)
    weights = [(i, y, torch.ones(len(y))) for i, y in batches(images, labels)]  # no indices: a float third entry
    assert torch.equal(run(net, weights).indices, torch.arange(7))


def test_quantities():
    found = random_predictions()
    p = found.logits.exp() / found.logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(found.probabilities, p, rtol=1e-13, atol=0)
    onehot = torch.eye(4, dtype=torch.float64)[found.labels]
    torch.testing.assert_close(found.errors, p - onehot, rtol=1e-12, atol=0)
    chosen = p[torch.arange(6), found.labels]
    assert found.nll == pytest.approx(-chosen.log().mean().item(), rel=1e-12)
    assert found.accuracy == pytest.approx((p.argmax(1) == found.labels).double().mean().item())


def test_clamps():
    low, high = 1e-10, 1 - 1e-10
    given = torch.tensor([0.0, -0.0, 1e-12, -1e-12, 0.5, -0.5, 1.0, -1.0], dtype=torch.float64)
    expected = torch.tensor([low, low, low, -low, 0.5, -0.5, high, -high], dtype=torch.float64)
    assert torch.equal(clamped_errors(given), expected)
    logits = torch.tensor([[800.0, 0.0], [800.0, 0.0]], dtype=torch.float64)
    found = Predictions(torch.arange(2), torch.tensor([0, 1]), logits, torch.ones(2, 2, dtype=torch.float64))
    assert torch.equal(found.errors, torch.tensor([[low, low], [high, -high]], dtype=torch.float64))
    assert found.nll == pytest.approx(-math.log(1e-10) / 2, rel=1e-12)  # one example: at most 23.026 nats
    assert found.accuracy == 0.5


def test_the_model_stays_as_it_was():
    net, (images, labels) = network().train(), examples()
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    net[3].eval()
    net[3].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run(net, batches(images, labels))
    assert net.training
    assert not net[3].training
    assert not net[3].bias.requires_grad
    assert net[0].weight.grad.eq(7.0).all()
    assert net[5].weight.grad is None
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_refusals():
    net, (images, labels) = network(), examples()
    with pytest.raises(ValueError, match="no examples"):
        run(net, [])
    with pytest.raises(ValueError, match="class numbers below 4"):
        run(net, [(images, labels + 3)])
    with pytest.raises(ValueError, match="duplicate indices"):
        run(net, [(images, labels, torch.zeros(7, dtype=torch.int64))])
    with pytest.raises(ValueError, match="do not match"):
        Predictions(torch.arange(3), torch.arange(3), torch.zeros(3, 3), torch.zeros(3, 4))
