"""laplace-torch as backend: it agrees with the engine, and unsupported models are clearly refused."""

import copy
import warnings

import pytest
import torch
from mpe_problems import batches, examples, network
from torch import nn

from mpe.config import STRUCTURES
from mpe.laplace_torch import LaplaceTorchVariances, laplace_backend
from mpe.posterior import laplace_posterior, predict
from src.errors import ArgumentError
from src.jacobians import output_variances
from src.models import build_model
from src.models.base import FilterResponseNorm

pytest.importorskip("laplace")

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


class Tokens(nn.Module):
    """A linear layer applied to many positions per example, which ASDL computes incorrectly."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.enter(x.transpose(1, 2).flatten(2)).tanh().mean(1))


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.head = nn.Linear(72, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.middle(self.middle(self.enter(x.flatten(1)).tanh()).tanh()).tanh())


def frn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), FilterResponseNorm(3), nn.Flatten(), nn.Linear(48, 4))


def batchnorm():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4))


def dilated():
    return nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))


def built(build, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return build().to(dtype)


def ours(net, given, delta, structure, full):
    posterior = laplace_posterior(net, given, delta, structure=structure)
    with output_variances(net, posterior, full=full) as engine:
        return predict(engine, given)


def theirs(net, given, delta, structure, full, **options):
    return predict(LaplaceTorchVariances(net, given, delta, structure=structure, full=full, **options), given)


def compare(net, given, structure, full, tolerance, **options):
    expected, found = ours(net, given, 1.5, structure, full), theirs(net, given, 1.5, structure, full, **options)
    torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
    limit = tolerance * expected.variances.abs().max().item()
    torch.testing.assert_close(found.variances, expected.variances, rtol=tolerance, atol=limit)
    return expected


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_equals_the_engine(structure, full, dtype):
    given = batches(*examples(dtype=dtype))  # 3, 3 and 1
    expected = compare(network(dtype), given, structure, full, TOLERANCES[dtype])
    assert expected.variances.shape == ((7, 4, 4) if full else (7, 4))


def test_small_memory_cuts_batches():
    compare(network(), batches(*examples()), "kfac", False, 1e-10, memory_mb=1e-3)


def test_a_network_of_the_project():
    net = build_model("small_mlp", 4, 2, 6, seed=0).double()
    compare(net, batches(*examples()), "kfac", False, 1e-10)


@pytest.mark.parametrize(
    ("build", "structure", "backend"),
    [
        (Tokens, "kfac", "CurvlinopsGGN"),
        (Tokens, "diag", "CurvlinopsGGN"),
        (dilated, "kfac", "CurvlinopsGGN"),
        (frn, "diag", "CurvlinopsGGN"),
        (Twice, "diag", None),
        (batchnorm, "diag", None),
        (network, "kfac", "AsdlGGN"),
        (network, "diag", "AsdlGGN"),
    ],
)
def test_the_backend_is_chosen_by_trial(build, structure, backend):
    net, given = built(build).eval(), batches(*examples())
    chosen = laplace_backend(net, given[0][0], structure)
    assert backend in (None, chosen.__name__)
    compare(net, given, structure, True, 1e-10)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (frn, "FilterResponseNorm '1'"),
        (batchnorm, "BatchNorm2d '1'"),
        (Twice, "Linear 'middle', which runs more than once"),
    ],
)
def test_refused_before_any_work(build, says):
    """laplace-torch would silently accept these models and omit blocks or compute something else."""
    given = CountedBatches(batches(*examples()))
    with pytest.raises(ArgumentError, match=r"laplace_backend laplace-torch: .*; use fast") as caught:
        LaplaceTorchVariances(built(build), given, 1.0)
    assert says in str(caught.value)
    assert given.passes == 2  # the first batch, and the number of examples


class CountedBatches(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_shared_and_partly_frozen_weights_are_refused():
    shared = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)).double()
    shared[3].weight = shared[2].weight
    with pytest.raises(ArgumentError, match="shares its weights"):
        laplace_backend(shared, examples()[0], "kfac")
    net = network()
    net[3].bias.requires_grad_(False)
    with pytest.raises(ArgumentError, match="partly frozen Linear '3'"):
        laplace_backend(net, examples()[0], "kfac")


def test_frozen_layers_are_left_out():
    net = network()
    for p in net[0].parameters():
        p.requires_grad_(False)
    compare(net, batches(*examples()), "kfac", False, 1e-10)
    assert not net[0].weight.requires_grad


@pytest.mark.parametrize("structure", ["kfac", "diag"])
def test_the_model_stays_as_it_was(structure):
    net = network().train()
    net[3].eval()
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    attributes = copy.deepcopy({name: set(vars(module)) for name, module in net.named_modules()})
    filters, draws = list(warnings.filters), torch.get_rng_state()
    theirs(net, batches(*examples()), 2.0, structure, False)
    assert net.training
    assert not net[3].training
    assert net[0].weight.grad.eq(7.0).all()
    assert net[3].weight.grad is None
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in net.named_modules()}
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())
    assert filters == list(warnings.filters)
    assert torch.equal(draws, torch.get_rng_state())
