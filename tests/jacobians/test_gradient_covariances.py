"""Covariances of the gradients of two sets of examples compared with explicit Jacobians and covariance matrices."""

import pytest
import torch
from full_jacobians import dense, loop_jacobians, random_posterior
from jacobian_networks import NETWORKS, images_and_labels, network

from src.jacobians import Posterior, gradient_covariances


def of_margin(outputs, labels):
    return outputs.gather(1, labels[:, None])[:, 0] - outputs[:, 0]


def of_loss(outputs, labels):
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


@pytest.mark.parametrize("rotated", [False, True], ids=["diagonal", "rotated"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_product_with_full_matrices(name, rotated):
    net = network(name)
    images, labels = images_and_labels()
    labels = labels.long() % net(images.clone()).shape[1]
    posterior = Posterior(random_posterior(net, rotated=rotated))
    jacobians = loop_jacobians(net, images)
    outputs = net(images.clone()).detach().requires_grad_()
    rows = [torch.autograd.grad(of(outputs, labels).sum(), outputs)[0] for of in (of_margin, of_loss)]
    expected = 0
    for parameter, jacobian in jacobians.items():
        left, right = (torch.einsum("bq,bqp->bp", row, jacobian.reshape(*jacobian.shape[:2], -1)) for row in rows)
        expected = expected + left[:3] @ dense(posterior.blocks[parameter]) @ right.mT
    for memory_mb in (256.0, 0.02):
        batches = [(images[:2], labels[:2]), (images[2:3], labels[2:3])]
        found = gradient_covariances(
            net, posterior, (batches, of_margin), ([(images, labels)], of_loss), memory_mb=memory_mb
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
