"""Sketches of Jacobians are exact without collisions, unbiased, and reproducible from the seed."""

import pytest
import torch
from full_jacobians import loop_jacobians
from jacobian_networks import NETWORKS, images_and_labels, logits, network

from src.jacobians import gram_matrix, sketch_jacobian


def sketch(net, images, dimension, seed=0, **more):
    return sketch_jacobian(net, images.clone(), logits, torch.zeros(len(images)), dimension, seed, **more)


def test_without_collisions_each_parameter_keeps_its_norm():
    """For one parameter, with at least as many buckets as entries, the sketch is a rotation."""
    net = network("twice")
    for name, p in net.named_parameters():
        p.requires_grad_(name == "shared.weight")
    images, _ = images_and_labels()
    exact = gram_matrix(net, images, logits)
    for dimension in (36, 50):
        rows = sketch(net, images, dimension)
        assert rows.shape == (18, dimension)
        torch.testing.assert_close(rows @ rows.T, exact)


@pytest.mark.parametrize("name", NETWORKS)
def test_right_on_average(name):
    """Over many seeds, the mean approaches the exact kernel at the rate given by a count sketch's variance."""
    net = network(name)
    images, _ = images_and_labels(3)
    psi = torch.cat([j.reshape(9, -1) for j in loop_jacobians(net, images).values()], dim=1)
    exact, seeds, dimension = psi @ psi.T, 40, 16
    found = []
    for seed in range(seeds):
        rows = sketch(net, images, dimension, seed)
        found.append(rows @ rows.T)
    mean = torch.stack(found).mean(0)
    deviation = ((exact.trace() ** 2 + exact.norm() ** 2) / dimension / seeds).sqrt()
    assert (mean - exact).norm() < 2.5 * deviation


def test_errors_shrink_with_the_dimension():
    net = network("convolutions")
    images, _ = images_and_labels()
    exact = gram_matrix(net, images, logits)

    def error(dimension):
        found = (sketch(net, images, dimension, seed) for seed in range(8))
        return sum(((rows @ rows.T) - exact).norm().item() for rows in found)

    assert error(64) < 0.7 * error(16)


def test_the_same_seed_gives_the_same_sketch_in_any_batches():
    net = network("convolutions")
    images, _ = images_and_labels()
    whole = sketch(net, images, 20)
    torch.testing.assert_close(sketch(net, images, 20, memory_mb=1e-6), whole, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(sketch(net, images, 20, seed=1), whole)
    with pytest.raises(ValueError, match="dimension is 0"):
        sketch(net, images, 0)
