"""The exact GGN and variances under its posterior, compared with explicit Jacobians; the time of training."""

import pytest
import torch
from full_jacobians import loop_jacobians
from jacobian_networks import NETWORKS, images_and_labels, network

from mpe.posterior import MOMENTUM, laplace_posterior, sgd_time
from src.jacobians import DensePosterior, exact_ggn, output_variances
from src.jacobians.posterior import laplace_variances
from src.models import build_model
from src.optimizers import rate

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def explicit(net, images):
    """Jacobians (b, C, P) and the GGN (P, P), from their definitions."""
    jacobian = torch.cat(
        [rows.reshape(*rows.shape[:2], -1) for rows in loop_jacobians(net, images.clone()).values()], dim=2
    )
    p = net(images.clone()).detach().softmax(1)
    curvature = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    return jacobian, torch.einsum("bcp,bcd,bdq->pq", jacobian, curvature, jacobian)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_explicit_matrix(name):
    net = network(name)
    images, _ = images_and_labels()
    jacobian, ggn = explicit(net, images)
    found = exact_ggn(net, images.clone().split(3), memory_mb=1e-3)  # in parts
    torch.testing.assert_close((found.vectors * found.values) @ found.vectors.mT, ggn, **EXACT)
    covariance = torch.linalg.inv(ggn + 2.0 * torch.eye(len(ggn), dtype=ggn.dtype))
    expected = jacobian @ covariance @ jacobian.mT
    for full in (True, False):
        with output_variances(net, found.posterior(2.0), full=full) as engine:
            logits, variances = engine(images.clone())
        torch.testing.assert_close(logits, net(images.clone()).detach())
        torch.testing.assert_close(variances, expected if full else expected.diagonal(dim1=1, dim2=2), **EXACT)


def test_large_models_are_refused():
    net = build_model("small_mlp", 10, 1, 28, seed=0)
    with pytest.raises(ValueError, match=r"limited to 10,000 parameters, but the model has [\d,]+"):
        exact_ggn(net, [torch.zeros(2, 1, 28, 28)])


def test_no_examples():
    with pytest.raises(ValueError, match="at least one example"):
        exact_ggn(torch.nn.Linear(2, 2), [])


def test_the_time_of_training_on_a_quadratic_loss():
    """The minimum of a quadratic loss moves by ``H^-1 g``; SGD gets as far as the filtered inverse says."""
    draw = torch.Generator().manual_seed(0)
    count, batch_size, epochs, delta, lr, lr_min = 1000, 10, 60, 2.0, 2e-3, 1e-4
    curvature = torch.tensor([0.0, 1.0, 10.0, 300.0, 5000.0], dtype=torch.float64)
    gradient = torch.randn(5, generator=draw, dtype=torch.float64)
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr, momentum=MOMENTUM)
    for epoch in range(1, epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate("cosine", epoch, epochs, lr, lr_min)
        for _ in range(count // batch_size):
            optimizer.zero_grad()
            (((curvature + delta) * weights.square() / 2 - gradient * weights).sum() / count).backward()
            optimizer.step()
    time = sgd_time(epochs, lr, lr_min, count, batch_size)
    reached = weights.detach() / gradient
    torch.testing.assert_close(reached, laplace_variances(curvature, delta, time), rtol=0.02, atol=0.0)
    assert reached[0] < 0.2 / delta < 0.99 / 5002 * 2500 < reached[4] * 2500  # far from converged; converged
    torch.testing.assert_close(laplace_variances(curvature, delta, 1e9), laplace_variances(curvature, delta))


@pytest.mark.parametrize("structure", ["kfac", "diag", "ggn"])
def test_every_structure_takes_the_time(structure):
    """For a short time, all directions have the variance ``time``."""
    net = network("mlp")
    images, _ = images_and_labels()
    posterior = laplace_posterior(net, [images], 2.0, structure=structure, time=1e-9)
    if isinstance(posterior, DensePosterior):
        values = [posterior.variances]
    else:
        values = [getattr(block, "variances", block) for block in posterior.blocks.values()]
    for block in values:
        torch.testing.assert_close(block, torch.full_like(block, 1e-9), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("delta", "time"), [(0.0, None), (-1.0, 1.0), (1.0, 0.0), (float("inf"), None)])
def test_refused(delta, time):
    with pytest.raises(ValueError, match="must be positive"):
        laplace_variances(torch.ones(2), delta, time)
