"""Variances of the logits compared with the explicit ``J S J^T``; invariants; refusals."""

import pytest
import torch
from full_jacobians import covariances, full_jacobians, loop_jacobians, random_posterior
from jacobian_networks import NETWORKS, images_and_labels, network
from torch import nn

from src import devices
from src.jacobians import OutputVariances, Posterior, Rotated, register_layer_rule, rule_from_gradients
from src.jacobians.layer_rules import LAYER_RULES
from src.models import build_model
from src.models.base import FilterResponseNorm

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def variances(net, images, posterior, full=False, memory_mb=256.0):
    with OutputVariances(net, posterior, full=full, memory_mb=memory_mb) as engine:
        logits, found = engine(images.clone())
    assert found.dtype == torch.float64
    torch.testing.assert_close(logits, net(images.clone()).detach())
    return found


def images_like(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(net, seed=0):
    """The model in float64, with all parameters and statistics changed from their initial values."""
    draw = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype) / 10)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5, generator=draw)
                module.running_var.uniform_(0.5, 2.0, generator=draw)
    return net


@pytest.mark.parametrize("rotated", [False, True], ids=["diagonal", "rotated"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_full_jacobian(name, rotated):
    net = network(name)
    images, _ = images_and_labels()
    posterior = Posterior(random_posterior(net, rotated=rotated))
    expected = covariances(loop_jacobians(net, images), posterior)
    torch.testing.assert_close(variances(net, images, posterior, full=True), expected, **EXACT)
    diagonal = variances(net, images, posterior)
    torch.testing.assert_close(diagonal, expected.diagonal(dim1=1, dim2=2), **EXACT)
    for memory_mb in (1e-6, 0.02):  # one example at a time; batches cut in two places
        torch.testing.assert_close(variances(net, images, posterior, memory_mb=memory_mb), diagonal, **EXACT)


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size", "shape"),
    [
        ("mlp", 4, 1, 8, (1, 8, 8)),
        ("small_mlp", 4, 1, 8, (1, 8, 8)),
        ("lenet", 3, 1, 28, (1, 28, 28)),
        ("resnet8", 3, 3, 8, (3, 8, 8)),
        ("resnet20_frn", 2, 3, 8, (3, 8, 8)),
    ],
)
def test_the_projects_networks(name, classes, channels, size, shape):
    net = randomised(build_model(name, classes, channels, size, seed=0))
    images = images_like(2, *shape)
    draw = torch.Generator().manual_seed(1)
    posterior = Posterior({n: torch.rand(p.shape, generator=draw).double() for n, p in net.named_parameters()})
    expected = sum(  # the covariance matrix of this many parameters is not formed
        (j.flatten(2) * posterior.blocks[n].flatten()) @ j.flatten(2).mT
        for n, j in full_jacobians(net, images).items()
    )
    torch.testing.assert_close(variances(net, images, posterior, full=True), expected, rtol=1e-10, atol=1e-12)
    with OutputVariances(net, posterior) as engine:
        found = engine(images)[1]
        assert set(engine.routes.values()) == {"captured"}
    torch.testing.assert_close(found, expected.diagonal(dim1=1, dim2=2), rtol=1e-10, atol=1e-12)


def test_a_small_vision_transformer():
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VisionTransformer(
            image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
        )
    net = randomised(net)
    images = images_like(5, 3, 8, 8)  # five examples, five tokens
    posterior = Posterior(random_posterior(net))
    expected = covariances(full_jacobians(net, images), posterior)
    torch.testing.assert_close(variances(net, images, posterior, full=True), expected, **EXACT)


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 1, 1)])
def test_filter_response_norm(shape):
    net = randomised(nn.Sequential(FilterResponseNorm(4), nn.Conv2d(4, 2, 1), FilterResponseNorm(2), nn.Flatten()))
    images = images_like(6, *shape)
    images[0, 1] = 0.0  # a dead feature map
    with torch.no_grad():
        net[0].tau[0, 1] = net[0].beta[0, 1]  # at the threshold, each side gets half of the gradient
    posterior = Posterior(random_posterior(net, rotated=False))
    expected = covariances(loop_jacobians(net, images), posterior)
    torch.testing.assert_close(variances(net, images, posterior, full=True), expected, **EXACT)


def test_a_rule_for_a_module_of_ones_own():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([0.3, 1.7, 0.2]).double())

        def forward(self, x):
            return x * self.gain

    net = nn.Sequential(network("mlp"), Gain())
    images, _ = images_and_labels()
    posterior = Posterior(random_posterior(net, rotated=False))
    with OutputVariances(net, posterior, full=True) as engine:
        expected = engine(images)[1]
        assert engine.routes["1.gain"] == "fallback"
    rule = rule_from_gradients({"gain"}, lambda module, a, g, names: dict.fromkeys(names, g * a))
    register_layer_rule(Gain, rule)
    try:
        with OutputVariances(net, posterior, full=True) as engine:
            torch.testing.assert_close(engine(images)[1], expected, **EXACT)
            assert engine.routes["1.gain"] == "captured"
        with pytest.raises(ValueError, match="Gain already has a contraction rule"):
            register_layer_rule(Gain, rule_from_gradients({"gain"}, rule.gradients))
    finally:
        del LAYER_RULES[Gain]


def test_a_last_layers_prior_directions_cancel_against_errors():
    net = network("mlp")
    images, labels = images_and_labels()
    head = {"3.weight", "3.bias"}
    posterior = Posterior({n: torch.full_like(p, 0.5 * (n in head)) for n, p in net.named_parameters()})
    with torch.no_grad():
        hidden = net[:3](images)
    full = variances(net, images, posterior, full=True)
    offset = 0.5 * (hidden.square().sum(1) + 1.0)  # (|a|^2 + 1) / delta: the classes are uncorrelated
    torch.testing.assert_close(full, offset.view(-1, 1, 1) * torch.eye(3).double(), **EXACT)
    errors = net(images).detach().softmax(1) - nn.functional.one_hot(labels, 3)
    shifted = full + 7.0 * torch.ones(3, 3).double()  # the same shift of all logits
    torch.testing.assert_close((shifted @ errors.unsqueeze(2)), full @ errors.unsqueeze(2), rtol=1e-10, atol=1e-12)


def test_equals_the_leverage_of_ridge_regression():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=draw, dtype=torch.float64)
    precision = x.T @ x + 0.5 * torch.eye(6).double()
    values, vectors = torch.linalg.eigh(precision)
    net = nn.Linear(6, 1, bias=False).double()
    block = Rotated((1 / values).view(1, 1, 6), torch.ones(1, 1, 1).double(), vectors.unsqueeze(0))
    found = variances(net, x, Posterior({"weight": block}))[:, 0]
    torch.testing.assert_close(found, (x @ torch.linalg.inv(precision) * x).sum(1), **EXACT)


def test_frozen_parameters_have_no_variance():
    net = network("batchnorm")
    for name in ("0.weight", "1.bias", "6.weight", "9.bias"):
        net.get_parameter(name).requires_grad_(False)
    images, _ = images_and_labels()
    blocks = {n: b for n, b in random_posterior(net).items() if net.get_parameter(n).requires_grad}
    jacobians = loop_jacobians(net, images)
    expected = covariances(jacobians, Posterior(blocks))
    torch.testing.assert_close(variances(net, images, Posterior(blocks), full=True), expected, **EXACT)


def test_single_precision_and_ragged_batches():
    net = network("convolutions")
    images, _ = images_and_labels(7)
    posterior = Posterior(random_posterior(net))
    expected = variances(net, images, posterior)
    net.float()
    with OutputVariances(net, posterior) as engine:
        found = torch.cat([engine(part)[1] for part in images.float().split([1, 4, 2])])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("all_is_kept", "cuts"), [(False, 22), (True, 6)])
def test_what_is_kept_of_freed_memory_decides_how_batches_are_cut(monkeypatch, all_is_kept, cuts):
    """A script's process keeps all freed memory, so only the budget limits it: 12 times 10 MiB here."""
    monkeypatch.setattr(devices, "_all_is_kept", all_is_kept)
    net = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Flatten(), nn.Linear(16 * 128 * 128, 5)).eval()
    posterior = Posterior({name: torch.ones_like(p) for name, p in net.named_parameters()})
    with OutputVariances(net, posterior, full=True, memory_mb=128.0) as engine:
        assert len(engine.sub_batches(torch.zeros(64, 1, 128, 128))) == cuts


def test_what_does_not_fit_is_refused():
    net = network("mlp")
    blocks = random_posterior(net)
    images, _ = images_and_labels()
    for changes, why in (
        ({"5.weight": torch.ones(1)}, "'5.weight': no such trainable parameter"),
        ({"3.bias": torch.ones(4)}, r"'3.bias' have shape \(4,\), but the parameter has \(3,\)"),
        ({"3.bias": -torch.ones(3)}, "'3.bias' must be finite and nonnegative"),
        ({"3.bias": torch.full((3,), torch.nan)}, "'3.bias' must be finite"),
        ({"3.bias": None}, "'3.bias': no variances in the posterior"),
    ):
        odd = {name: block for name, block in {**blocks, **changes}.items() if block is not None}
        with pytest.raises(ValueError, match=why), OutputVariances(net, Posterior(odd)):
            pass
    assert not any(m._forward_hooks for m in net.modules())
    no_batch = nn.Sequential(net, nn.Flatten(0))
    renamed = Posterior({f"0.{name}": block for name, block in blocks.items()})
    with (
        pytest.raises(ValueError, match=r"logits of shape \(batch, classes\)"),
        OutputVariances(no_batch, renamed) as engine,
    ):
        engine(images)
    net = network("batchnorm")
    with OutputVariances(net, Posterior(random_posterior(net))) as engine:
        net[1].train()
        with pytest.raises(ValueError, match="is in training mode"):
            engine(images)


def test_leaves_the_model_as_it_was():
    net = network("batchnorm").train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images, _ = images_and_labels()
    with OutputVariances(net, Posterior(random_posterior(net))) as engine, torch.no_grad():
        engine(images)
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
