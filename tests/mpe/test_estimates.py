"""Leave-one-out estimates: closed forms, exact refits, shift invariance, and numbers computed by hand."""

import logging

import numpy as np
import pytest
import torch
from mpe_problems import random_predictions

from mpe.estimates import CLASS_COVARIANCES, estimate, left_out_shift, loo_losses, sampled_errors, sensitivity
from mpe.posterior import Predictions

F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def fisher(p):
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


# ------------------------------------------------------------------------------------------------- closed forms


def test_golden_values():
    given = Predictions(torch.arange(1), torch.tensor([0]), tensor([1.0, 2.0, -1.0]), tensor([0.5, 0.2, 0.1]))
    torch.testing.assert_close(given.probabilities, tensor([0.25949646, 0.70538451, 0.03511903]), rtol=0, atol=6e-9)
    found = estimate(given)
    moved = given.logits + found.output_deviations
    torch.testing.assert_close(moved, tensor([0.62974823, 2.14107690, -0.99648810]), rtol=0, atol=6e-9)
    assert loo_losses(given, found).item() == pytest.approx(1.74561390, abs=6e-9)
    assert sensitivity(found).item() == pytest.approx(0.10058407, abs=6e-9)


def test_first_order_forms():
    given = random_predictions()
    e, p = given.residuals.unsqueeze(2), given.probabilities
    found = estimate(given, "full")
    torch.testing.assert_close(found.output_deviations, (given.variances @ e).squeeze(2), rtol=1e-12, atol=1e-15)
    expected = (fisher(p) @ given.variances @ e).squeeze(2)
    torch.testing.assert_close(found.probability_deviations, expected, rtol=1e-12, atol=1e-15)
    assert found.probability_deviations.sum(1).abs().max() < 1e-15
    found = estimate(given, "diag")  # the diagonal form also accepts covariances
    thin = random_predictions(full=False)
    assert torch.equal(found.output_deviations, estimate(thin).output_deviations)
    torch.testing.assert_close(
        found.probability_deviations, p * (1 - p) * thin.variances * given.residuals, rtol=1e-12, atol=0
    )


def test_woodbury_form():
    given = random_predictions(scale=0.5)
    inverse = torch.linalg.inv(torch.eye(4, dtype=F64) - fisher(given.probabilities) @ given.variances)
    expected = (given.variances @ inverse @ given.residuals.unsqueeze(2)).squeeze(2)
    found = estimate(given, "woodbury")
    torch.testing.assert_close(found.output_deviations, expected, rtol=1e-11, atol=1e-14)
    moved = (given.logits + expected).softmax(1) - given.probabilities
    torch.testing.assert_close(found.probability_deviations, moved, rtol=1e-11, atol=1e-14)
    assert not found.unstable.any()


def test_chunks_change_nothing(monkeypatch):
    given = random_predictions(n=11, scale=3.0)
    whole = estimate(given, "woodbury")
    assert 0 < whole.unstable.sum() < 11
    monkeypatch.setattr("mpe.estimates.ENTRIES", 50)
    parts = estimate(given, "woodbury")
    assert torch.equal(whole.unstable, parts.unstable)
    torch.testing.assert_close(whole.output_deviations, parts.output_deviations, rtol=1e-13, atol=0)
    torch.testing.assert_close(whole.probability_deviations, parts.probability_deviations, rtol=1e-12, atol=1e-15)


def test_unstable_examples_keep_the_first_order_form(caplog):
    given = random_predictions(n=20, scale=4.0)
    largest = torch.linalg.eigvals(fisher(given.probabilities) @ given.variances).real.amax(1)
    with caplog.at_level(logging.WARNING, "mpe.estimates"):
        found = estimate(given, "woodbury")
    assert torch.equal(found.unstable, largest >= 1)
    assert 0 < found.unstable.sum() < 20
    assert f"{int(found.unstable.sum())} of 20 examples" in caplog.text
    first = estimate(given, "full")
    for name in ("output_deviations", "probability_deviations"):
        ours, full = getattr(found, name), getattr(first, name)
        assert torch.equal(ours[found.unstable], full[found.unstable])
        assert (ours - full)[~found.unstable].abs().amax(1).gt(1e-6).all()
    assert not estimate(given, "full").unstable.any()


def test_ridge_regression_is_exact():
    """For one output and quadratic loss, v e / (1 - v) equals exact refits; also two outputs."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, d, generator=draw, dtype=F64) for d in (6, 2))
    delta = 0.7

    def fitted(keep):
        return torch.linalg.solve(x[keep].T @ x[keep] + delta * torch.eye(6, dtype=F64), x[keep].T @ y[keep])

    w = fitted(torch.ones(30, dtype=torch.bool))
    v = ((x @ torch.linalg.inv(x.T @ x + delta * torch.eye(6, dtype=F64))) * x).sum(1)
    assert v.max() > 0.3
    errors = x @ w - y
    left_out = torch.stack([x[i] @ fitted(torch.arange(30) != i) for i in range(30)])
    one = torch.ones(30, 1, 1, dtype=F64)
    shift, largest = left_out_shift(v.view(-1, 1, 1), errors[:, :1], one)
    torch.testing.assert_close(shift, v.unsqueeze(1) * errors[:, :1] / (1 - v.unsqueeze(1)), rtol=1e-12, atol=0)
    torch.testing.assert_close(x @ w[:, :1] + shift, left_out[:, :1], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(largest, v, rtol=1e-12, atol=0)
    eye = torch.eye(2, dtype=F64)
    shift, _ = left_out_shift(v.view(-1, 1, 1) * eye, errors, eye.expand(30, 2, 2))
    torch.testing.assert_close(x @ w + shift, left_out, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------- convex regression, exact refits


def refit(x, y, delta, start, weights=None):
    """Newton's method for softmax regression with a penalty; exact to rounding."""
    n, d = x.shape
    c = start.shape[1]
    weights = torch.ones(n, dtype=F64) if weights is None else weights
    w = start.clone()
    for _ in range(60):
        p = (x @ w).softmax(1)
        gradient = x.T @ (weights.unsqueeze(1) * (p - y)) + delta * w
        if gradient.abs().max() < 1e-12:
            return w
        hessian = torch.einsum("n,nd,ncb,ne->dceb", weights, x, fisher(p), x).reshape(d * c, d * c)
        step = torch.linalg.solve(hessian + delta * torch.eye(d * c, dtype=F64), gradient.flatten()).view(d, c)
        w = w - step
    raise AssertionError("Newton's method has not converged")


@pytest.fixture(scope="module")
def convex():
    """Predictions under the exact Laplace posterior, true leave-one-out logits, and the training loss."""
    n, d, c, delta = 90, 5, 4, 1.0
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw, dtype=F64)
    logits = x @ torch.randn(d, c, generator=draw, dtype=F64) * 1.2
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw).squeeze(1)
    y = torch.eye(c, dtype=F64)[labels]
    w = refit(x, y, delta, torch.zeros(d, c, dtype=F64))
    p = (x @ w).softmax(1)
    hessian = torch.einsum("nd,ncb,ne->dceb", x, fisher(p), x).reshape(d * c, d * c)
    sigma = torch.linalg.inv(hessian + delta * torch.eye(d * c, dtype=F64)).view(d, c, d, c)
    variances = torch.einsum("nd,dceb,ne->ncb", x, sigma, x)
    given = Predictions(torch.arange(n), labels, x @ w, variances)
    true = torch.stack([x[i] @ refit(x, y, delta, w, 1.0 - torch.eye(n, dtype=F64)[i]) for i in range(n)])
    return given, true


def test_quality_against_exact_refits(convex):
    """For convex softmax regression, the diagonal form is worst and Woodbury is best, nearly exact."""
    given, true = convex
    true_nll = -true.log_softmax(1)[torch.arange(len(given)), given.labels].mean().item()
    deviations = (true.softmax(1) - given.probabilities).abs().sum(1)
    gap, correlation, median = {}, {}, {}
    for form in CLASS_COVARIANCES:
        found = estimate(given, form)
        scores = sensitivity(found)
        gap[form] = abs(loo_losses(given, found).mean().item() - true_nll)
        correlation[form] = np.corrcoef(scores, deviations)[0, 1]
        median[form] = ((scores - deviations).abs() / deviations).median().item()
        assert not found.unstable.any()  # the full GGN guarantees it
    assert gap["diag"] > 5 * gap["full"] > 10 * gap["woodbury"]
    assert correlation["diag"] < correlation["full"] < correlation["woodbury"]
    assert correlation["diag"] > 0.8
    assert correlation["woodbury"] > 0.999
    assert median["diag"] > 5 * median["full"] > 10 * median["woodbury"]
    assert median["woodbury"] < 0.02


def test_the_sign_of_the_training_gap(convex):
    given, true = convex
    true_nll = -true.log_softmax(1)[torch.arange(len(given)), given.labels].mean().item()
    for form in CLASS_COVARIANCES:
        losses = loo_losses(given, estimate(given, form))
        assert losses.mean() > given.nll
    assert true_nll > given.nll
    # the first-order form underestimates; the diagonal form overestimates, because it counts shifts of all logits
    assert loo_losses(given, estimate(given, "full")).mean() < true_nll < loo_losses(given, estimate(given)).mean()


@pytest.mark.parametrize("shift", [0.5, 40.0])
def test_gauge(convex, shift):
    """A variance common to all logits does not affect probabilities; only the diagonal form counts it."""
    given, _ = convex
    moved = Predictions(given.indices, given.labels, given.logits, given.variances + shift)
    for form in ("full", "woodbury"):
        before, after = estimate(given, form), estimate(moved, form)
        torch.testing.assert_close(after.probability_deviations, before.probability_deviations, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loo_losses(moved, after), loo_losses(given, before), rtol=1e-9, atol=1e-12)
        assert not after.unstable.any()
    assert (sensitivity(estimate(moved)) / sensitivity(estimate(given))).min() > 1 + 0.2 * shift


# ------------------------------------------------------------------------------------------- clamps and losses


def test_clamped_losses_and_factors():
    logits = tensor([200.0, 0.0], [200.0, 0.0])
    given = Predictions(torch.arange(2), torch.tensor([1, 0]), logits, torch.ones(2, 2, dtype=F64))
    found = estimate(given)
    clamped, plain = loo_losses(given, found), loo_losses(given, found, clamp=False)
    assert clamped[0].item() == pytest.approx(23.0258509, abs=1e-6)
    assert plain[0].item() == pytest.approx(202.0, abs=1e-6)  # 200 and the error of 1 on each side
    assert plain[1].item() == pytest.approx(0.0, abs=1e-12)
    # p (1 - p) is clamped to at least 1e-10
    torch.testing.assert_close(
        found.probability_deviations, tensor([1e-10, -1e-10], [1e-20, 1e-20]), rtol=1e-6, atol=0
    )


def test_other_errors():
    given = random_predictions()
    other = tensor([0.1, -0.3, 0.1, 0.1]).expand(6, 4)
    for form in CLASS_COVARIANCES:
        first, doubled = estimate(given, form, other), estimate(given, form, 2 * other)
        torch.testing.assert_close(doubled.output_deviations, 2 * first.output_deviations, rtol=1e-12, atol=1e-15)
        assert not torch.allclose(first.output_deviations, estimate(given, form).output_deviations)


def test_refusals():
    with pytest.raises(ValueError, match="diag, full, woodbury"):
        estimate(random_predictions(), "half")
    for form in ("full", "woodbury"):
        with pytest.raises(ValueError, match="full=True"):
            estimate(random_predictions(full=False), form)


# ---------------------------------------------------------------------------------------------- sampled errors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampled_errors_converge():
    """Two classes: the mean probability is an integral over one Gaussian, by Gauss-Hermite quadrature."""
    logits, variances = tensor([0.3, -0.6], [2.0, 0.0]), tensor([0.5, 0.9], [2.0, 0.1])
    given = Predictions(torch.arange(2), torch.tensor([0, 1]), logits, variances)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    gaps = (logits[:, :1] - logits[:, 1:]) + variances.sum(1, keepdim=True).sqrt() * nodes
    p = (gaps.sigmoid() * weights).sum(1)
    expected = torch.stack([p, 1 - p], 1) - torch.eye(2, dtype=F64)
    found = sampled_errors(given, samples=40_000, generator=generator())
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-3)  # five standard errors
    assert (expected - given.errors).abs().min() > 0.02  # which is smaller than the measured error
    covariances = torch.diag_embed(variances) + 50.0  # a common shift cancels if samples are correlated
    moved = Predictions(given.indices, given.labels, logits, covariances)
    found = sampled_errors(moved, samples=40_000, generator=generator(), correlated=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-3)
    assert (sampled_errors(moved, samples=40_000, generator=generator()) - expected).abs().max() > 0.05


@pytest.mark.parametrize("full", [False, True])
def test_sampled_errors_do_not_depend_on_chunks(full):
    given = random_predictions(n=23, c=3, full=full)
    whole = sampled_errors(given, samples=7, generator=generator(), correlated=full)
    for chunk in (1, 5, 22):
        parts = sampled_errors(given, samples=7, generator=generator(), chunk=chunk, correlated=full)
        torch.testing.assert_close(whole, parts, rtol=1e-13, atol=1e-15)
    assert not torch.allclose(whole, sampled_errors(given, samples=7, generator=generator(1), correlated=full))


def test_correlated_samples_are_of_the_covariance():
    """Centered logits have covariance H V H; small perturbations change the probabilities by Lambda times them."""
    given = random_predictions(n=3, scale=1e-8)
    draws = generator()
    noise = torch.empty(3, 1, 4, dtype=F64)
    for own in noise:
        own.normal_(generator=draws)
    found = sampled_errors(given, samples=1, generator=generator(), correlated=True) - given.residuals
    centre = torch.eye(4, dtype=F64) - 0.25
    values, vectors = torch.linalg.eigh(centre @ given.variances @ centre)
    assert values[:, 1:].min() > 1e-11  # three directions remain
    root = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    expected = (fisher(given.probabilities) @ root @ noise.mT).squeeze(2)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-8)  # the second order


@pytest.mark.parametrize("shift", [0.5, 40.0])
def test_correlated_samples_do_not_see_the_gauge(shift):
    given = random_predictions()
    same = Predictions(given.indices, given.labels, given.logits, torch.eye(4, dtype=F64).repeat(6, 1, 1))
    for found in (given, same):  # equal eigenvalues leave the eigenvectors undetermined
        moved = Predictions(found.indices, found.labels, found.logits, found.variances + shift)
        first, second = (sampled_errors(x, generator=generator(), correlated=True) for x in (found, moved))
        torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-9)
        assert (first - found.residuals).abs().max() > 0.01
        assert first.sum(1).abs().max() < 1e-14  # not clamped
    sure = Predictions(given.indices, given.labels, given.logits * 1000, given.variances)
    assert sampled_errors(sure, generator=generator(), correlated=True).abs().min() < 1e-20
    assert sampled_errors(sure, generator=generator()).abs().min() == 1e-10


def test_sampled_errors_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    sampled_errors(random_predictions(), generator=generator())
    assert torch.equal(before, torch.get_rng_state())


def test_sampled_errors_without_variance_are_the_errors():
    given = random_predictions(full=False)
    still = Predictions(given.indices, given.labels, given.logits, torch.zeros_like(given.variances))
    found = sampled_errors(still, samples=3, generator=generator())
    torch.testing.assert_close(found, given.errors, rtol=1e-12, atol=0)
