"""Variational online Newton: dense reference updates, its fixed point, and the row space of the features."""

import pytest
import torch
from torch import nn

from mpe.von import Von, row_basis
from src.errors import TrainingError

C, D, N, DELTA = 3, 4, 12, 0.7


def problem(seed=0):
    """Features (N, D) with a constant, and labels (N,)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=draw, dtype=torch.float64)
    x[:, -1] = 1.0
    return x, torch.arange(N) % C, draw


def dense_expectations(x, labels, mean, precision, noise, scale):
    """Gradient and Hessian of ``scale`` times the summed loss by autograd, averaged over samples of the weights."""
    root = torch.linalg.cholesky(precision)

    def loss(weights):
        return scale * nn.functional.cross_entropy(x @ weights.view(C, D).mT, labels, reduction="sum")

    samples = [mean.flatten() + torch.linalg.inv(root).mT @ z for z in noise]
    gradients = torch.stack([torch.func.grad(loss)(w) for w in samples]).mean(0)
    hessians = torch.stack([torch.func.hessian(loss)(w) for w in samples]).mean(0)
    return gradients, hessians


def test_updates_are_those_of_dense_matrices():
    x, labels, draw = problem()
    von = Von(C, D, num_examples=N, delta=DELTA, precision_init=5.0, like=x)
    mean = torch.zeros(C * D, dtype=torch.float64)
    precision = 5.0 * torch.eye(C * D, dtype=torch.float64)
    for rate, precision_rate, batch in ((0.5, 0.3, slice(0, 5)), (0.1, 0.6, slice(5, 12)), (0.9, 1.0, slice(0, 12))):
        noise = torch.randn(3, C * D, generator=draw, dtype=torch.float64)
        von.step(x[batch], labels[batch], noise, rate, precision_rate)
        scale = N / len(x[batch])
        gradient, hessian = dense_expectations(x[batch], labels[batch], mean, precision, noise, scale)
        eye = torch.eye(C * D, dtype=torch.float64)
        precision = (1 - precision_rate) * precision + precision_rate * (hessian + DELTA * eye)
        mean = mean - rate * torch.linalg.solve(precision, gradient + DELTA * mean)
        torch.testing.assert_close(von.mean.flatten(), mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(von.precision.tril(), precision.tril(), rtol=1e-10, atol=1e-12)

    logits, covariances = von.predict(x, full=True)
    jacobians = torch.stack([torch.kron(torch.eye(C, dtype=torch.float64), row[None]) for row in x])  # (N, C, C D)
    torch.testing.assert_close(logits, x @ mean.view(C, D).mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(covariances, jacobians @ torch.linalg.inv(precision) @ jacobians.mT)
    torch.testing.assert_close(von.predict(x, full=False)[1], covariances.diagonal(dim1=1, dim2=2))


def test_the_fixed_point_is_stationary():
    """With the same samples in every update, VON converges to the best Gaussian: the expectations vanish there."""
    x, labels, draw = problem()
    von = Von(C, D, num_examples=N, delta=DELTA, precision_init=5.0, like=x)
    half = torch.randn(1500, C * D, generator=draw, dtype=torch.float64)
    noise = torch.cat([half, -half])
    for _ in range(80):
        von.step(x, labels, noise, 0.5, 0.5)
    eye, fresh = torch.eye(C * D, dtype=torch.float64), torch.randn(20000, C, D, generator=draw, dtype=torch.float64)
    precision = von.precision.tril() + von.precision.tril(-1).mT
    root = torch.linalg.cholesky(precision)
    for draws, tolerance in ((noise.view(-1, C, D), 1e-9), (fresh, 0.05)):  # other samples: up to their noise
        weights = von.mean + (draws.flatten(1) @ torch.linalg.inv(root)).view(-1, C, D)
        p = (x @ weights.mT).softmax(2)
        errors = p.mean(0) - nn.functional.one_hot(labels, C)
        gradient = errors.mT @ x + DELTA * von.mean
        curvature = (torch.diag_embed(p) - p.unsqueeze(3) * p.unsqueeze(2)).mean(0)
        hessian = torch.einsum("ncd,ni,nj->cidj", curvature, x, x).reshape(C * D, C * D)
        assert gradient.abs().max() < tolerance
        assert (hessian + DELTA * eye - precision).abs().max() < tolerance
    # the variational mean differs from the mode, where the gradient without samples vanishes
    mode_gradient = (x @ von.mean.mT).softmax(1) - nn.functional.one_hot(labels, C)
    assert (mode_gradient.mT @ x + DELTA * von.mean).abs().max() > 0.01


def test_the_row_space_of_the_features_is_enough():
    x, labels, draw = problem()
    wide = torch.cat([x, x[:, :1] - 2 * x[:, -1:], torch.full((N, 1), 0.3, dtype=torch.float64)], dim=1)  # rank D
    basis = row_basis(wide)
    assert basis.shape == (D + 2, D)
    small, large = (Von(C, size, num_examples=N, delta=DELTA, precision_init=5.0, like=x) for size in (D, D + 2))
    whole = torch.cat([basis, torch.linalg.svd(basis)[0][:, D:]], dim=1)  # an orthonormal basis of all directions
    for _ in range(3):
        noise = torch.randn(2, C, D + 2, generator=draw, dtype=torch.float64)
        small.step(wide @ basis, labels, noise[..., :D].flatten(1), 0.4, 0.2)
        large.step(wide @ whole, labels, noise.flatten(1), 0.4, 0.2)
    found, wanted = small.predict(wide @ basis, full=True), large.predict(wide @ whole, full=True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wide @ (small.mean @ basis.mT).mT, wanted[0])


def test_a_step_that_is_too_long_is_refused():
    x, labels, draw = problem()
    von = Von(C, D, num_examples=N, delta=DELTA, precision_init=1e-3, like=x.float())
    noise = torch.randn(2, C * D, generator=draw)
    with pytest.raises(TrainingError, match="lower --lr or --lr_precision"):
        von.step(x.float(), labels, noise, 1e38, 1e-5)
    flat = Von(C, D, num_examples=N, delta=1e-12, precision_init=5.0, like=x.float())
    with pytest.raises(TrainingError, match="not positive definite"):
        flat.step(x[:1].float(), labels[:1], noise, 1.0, 1.0)  # rank 2
