"""Epsilon-flatness: a test vector, a per-example loop, and invariants."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flatness_ground import batches, examples, linear_model, small_network
from torch import nn

from src.metrics.flatness import epsilon_flatness


def loop(net, images, labels, rho=0.05):
    """The perturbation of adaptive SAM, one example at a time."""
    net.eval()
    scores = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(net(image), label), parameters)
        norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(parameters, gradients, strict=True)]).norm()
        moves = [rho * w**2 * g / (norm + 1e-12) for w, g in zip(parameters, gradients, strict=True)]
        scores.append(torch.cat([move.flatten() for move in moves]).norm().item())
    return np.array(scores)


def score(net, images, labels, size=4, **options):
    return epsilon_flatness(net, batches(images, labels, size), total=len(labels), **options)


def test_vector_of_the_linear_model():
    net, image, label = linear_model()
    # the test vector's loss was printed in float32, whose spacing is 1.2e-7 here
    assert F.cross_entropy(net(image), label).item() == pytest.approx(1.1093834, abs=2e-7)
    assert score(net, image, label)[0] == pytest.approx(0.0213830, abs=5e-8)
    assert score(net, image, label, rho=0.1)[0] == pytest.approx(2 * 0.0213830, abs=1e-7)


def test_equals_the_loop():
    net, (images, labels) = small_network(), examples()
    np.testing.assert_allclose(score(net, images, labels), loop(net, images, labels), rtol=1e-10)


def test_single_precision_is_close():
    net, (images, labels) = small_network(), examples()
    expected = loop(net, images, labels)
    np.testing.assert_allclose(score(net.float(), images.float(), labels), expected, rtol=2e-4)


def test_batch_size_memory_and_order_do_not_matter():
    net, (images, labels) = small_network(), examples()
    whole = score(net, images, labels, size=9)
    for size in (1, 4):
        np.testing.assert_allclose(score(net, images, labels, size), whole, rtol=1e-10)
    np.testing.assert_allclose(score(net, images, labels, memory_mb=1e-4), whole, rtol=1e-10)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = score(net, images[order], labels[order])
    np.testing.assert_allclose(shuffled, whole[order.numpy()], rtol=1e-10)


def test_scores_stand_at_original_indices():
    net, (images, labels) = small_network(), examples(3)
    indices = torch.tensor([5, 0, 2])
    scores = epsilon_flatness(net, batches(images, labels, 2, indices), total=7)
    assert scores.dtype == np.float64
    assert np.isnan(scores[[1, 3, 4, 6]]).all()
    np.testing.assert_allclose(scores[indices.numpy()], loop(net, images, labels), rtol=1e-10)


def test_confident_examples_keep_their_rank_and_a_zero_gradient_scores_zero():
    # logits differ by up to 120 nats: errors from 1 down to 1e-52, squares far below float32's range
    net = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5], [-0.5]]))
    images = torch.tensor([[0.0], [1.0], [10.0], [30.0], [35.0], [120.0]])
    scores = score(net, images, torch.zeros(6, dtype=torch.int64))
    exact = loop(net.double(), images.double(), torch.zeros(6, dtype=torch.int64))
    assert scores[0] == 0.0  # no input, no gradient
    np.testing.assert_allclose(scores[:4], exact[:4], rtol=1e-4)
    assert scores[3] > scores[4] > scores[5] >= 0.0


def test_leaves_the_model_alone():
    net, (images, labels) = small_network(), examples()
    net.train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    score(net, images, labels)
    assert [module.training for module in net.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
