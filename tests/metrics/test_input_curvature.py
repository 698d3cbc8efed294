"""Input curvature: a test vector, a per-example loop, invariants, and refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flatness_ground import batches, examples, linear_model, small_network
from torch import nn

from src.metrics.flatness import input_curvature


def loop(net, images, labels, h=3.0):
    net.eval()

    def gradient(image, label):
        leaf = image.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(leaf), label), leaf)[0]

    scores = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        before = gradient(image, label)
        s = before.sign()
        z = (s + 1e-7) / (s.norm() + 1e-7)
        scores.append((gradient(image + h * z, label) - before).norm().item())
    return np.array(scores)


def score(net, images, labels, size=4, **options):
    return input_curvature(net, batches(images, labels, size), total=len(labels), **options)


def test_vector_of_the_linear_model():
    assert score(*linear_model())[0] == pytest.approx(0.6399703, abs=5e-8)


@pytest.mark.parametrize("h", [3.0, 0.01])
def test_equals_the_loop(h):
    net, (images, labels) = small_network(), examples()
    np.testing.assert_allclose(score(net, images, labels, h=h), loop(net, images, labels, h), rtol=1e-10)


def test_single_precision_is_close():
    net, (images, labels) = small_network(), examples()
    expected = loop(net, images, labels)
    np.testing.assert_allclose(score(net.float(), images.float(), labels), expected, rtol=1e-3)


def test_batch_size_and_order_do_not_matter():
    net, (images, labels) = small_network(), examples()
    whole = score(net, images, labels, size=9)
    for size in (1, 4):
        np.testing.assert_allclose(score(net, images, labels, size), whole, rtol=1e-10)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(score(net, images[order], labels[order]), whole[order.numpy()], rtol=1e-10)


def test_scores_stand_at_original_indices():
    net, (images, labels) = small_network(), examples(3)
    indices = torch.tensor([5, 0, 2])
    scores = input_curvature(net, batches(images, labels, 2, indices), total=7)
    assert scores.dtype == np.float64
    assert np.isnan(scores[[1, 3, 4, 6]]).all()
    np.testing.assert_allclose(scores[indices.numpy()], loop(net, images, labels), rtol=1e-10)


def test_a_first_layer_in_place_and_frozen_weights():
    net = nn.Sequential(nn.ELU(inplace=True), nn.Flatten(), nn.Linear(36, 3)).double().requires_grad_(False)
    images, labels = examples()
    kept = images.clone()
    with torch.no_grad():
        found = score(net, images, labels)
    assert torch.equal(images, kept)
    plain = nn.Sequential(nn.ELU(), nn.Flatten(), net[2])
    np.testing.assert_allclose(found, loop(plain, images, labels), rtol=1e-10)


def test_dependent_examples_are_refused():
    images, labels = examples()
    net = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(36, 3)).double()
    with pytest.raises(ValueError, match="BatchNorm '0' keeps no running statistics"):
        score(net, images, labels)

    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward((x - x.mean(0)).flatten(1))

    with pytest.raises(ValueError, match="depends on the other images"):
        score(Mixing(36, 3).double(), images, labels)


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
