"""Diagonal variances in pieces and channels-last backward passes are exact, and are used when intended."""

import pytest
import torch
from full_jacobians import covariances, loop_jacobians, random_posterior
from jacobian_networks import NETWORKS, images_and_labels, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpe.posterior import laplace_posterior
from src.jacobians import OutputVariances, Posterior, variances
from src.jacobians.capture import suits_channels_last
from src.models import build_model
from src.models.base import same_max_pool

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def exact_diagonal(net, images, posterior):
    return covariances(loop_jacobians(net, images), posterior).diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("tile", [1, 2**20], ids=["row by row", "whole"])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_stays_exact(name, tile, monkeypatch):
    monkeypatch.setattr(variances, "suits_channels_last", lambda model: True)
    monkeypatch.setattr(variances, "WORTH_A_CALL", 0)
    monkeypatch.setattr(variances, "TILE", tile)
    net = network(name)
    images, _ = images_and_labels()
    posterior = Posterior(random_posterior(net, rotated=False))
    with OutputVariances(net, posterior) as engine:
        logits, found = engine(images.clone())
    torch.testing.assert_close(found, exact_diagonal(net, images, posterior), **EXACT)
    torch.testing.assert_close(logits, net(images.clone()).detach())


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Functional(nn.Sequential):
    def forward(self, x):
        return torch.nn.functional.pad(super().forward(x).mul_(2), (1, 0, 2, 0))


REST = {
    "two pools": (nn.ReLU(inplace=True), *same_max_pool(), nn.Conv2d(16, 16, 2), nn.Tanh(), *same_max_pool()),
    "overlapping, dilated, rounded up": (nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 1), ceil_mode=True), nn.ReLU()),
    "mean over all": (nn.MaxPool2d(2), nn.Conv2d(16, 32, 2), nn.AdaptiveAvgPool2d(1)),
    "mean over one each": (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 3)), nn.ReLU(inplace=True)),
    "mean over some": (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)),
    "stride and no bias": (nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.MaxPool2d(2)),
    "groups": (nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4), nn.MaxPool2d(2)),
    "padding as a string": (
        nn.Conv2d(16, 16, 2, padding="same"),
        nn.Conv2d(16, 16, 3, padding="valid"),
        nn.MaxPool2d(2),
    ),
    "checkpointed": (Checkpointed(nn.Conv2d(16, 16, 2), nn.ReLU(), nn.MaxPool2d(2)),),
    "called twice": (nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1)] * 2), nn.MaxPool2d(2)),
    "in place and functional": (
        Functional(nn.Conv2d(16, 16, 3), nn.MaxPool2d(2)),
        nn.MaxPool2d(2, return_indices=False),
    ),
}


def built(rest):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
        body = nn.Sequential(nn.Conv2d(2, 16, 3), *rest, nn.Flatten()).double()
        net = nn.Sequential(body, nn.Linear(body(images).shape[1], 4).double()).eval()
        posterior = Posterior(random_posterior(net, rotated=False))
    return net, images, posterior


@pytest.mark.parametrize("memory_mb", [1e-6, 256.0], ids=["one at a time", "at once"])
@pytest.mark.parametrize("name", REST)
def test_suited_networks_are_exact(name, memory_mb, monkeypatch):
    monkeypatch.setattr(variances, "WORTH_A_CALL", 0)
    net, images, posterior = built(REST[name])
    with OutputVariances(net, posterior, memory_mb=memory_mb) as engine:
        assert engine._capture.channels_last
        found = engine(images)[1]
        assert "fallback" not in engine.routes.values()
        torch.testing.assert_close(engine(images)[1], found, **EXACT)
    torch.testing.assert_close(found, exact_diagonal(net, images, posterior), **EXACT)
    assert not any(module._forward_hooks for module in net.modules())


def test_gradients_keep_the_layout():
    net, images, posterior = built(REST["two pools"])
    strides = []
    with OutputVariances(net, posterior) as engine:
        take = engine.take_captured
        engine.take_captured = lambda record, *rest: strides.append(record.gradient.stride()) or take(record, *rest)
        engine(images)
    assert [stride[2] for stride in strides if len(stride) == 5] == [1, 1]


def test_single_precision():
    net = build_model("cnn_deepobs", 3, 3, 32, seed=0).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    blocks = {name: torch.rand(p.shape, generator=draw) for name, p in net.named_parameters()}
    with OutputVariances(net, Posterior(blocks)) as engine:
        assert engine._capture.channels_last
        found = engine(images)[1]
    with OutputVariances(net.double(), Posterior(blocks), full=True) as engine:
        assert not engine._capture.channels_last
        expected = engine(images.double())[1]
    torch.testing.assert_close(found, expected.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("name", "suited"),
    [("cnn_deepobs", True), ("lenet", False), ("resnet8", False), ("resnet20_frn", False), ("mlp", False)],
)
def test_which_networks_go_channels_last(name, suited):
    assert suits_channels_last(build_model(name, 10, 3, 32, seed=0)) is suited


@pytest.mark.parametrize("name", ["cnn_deepobs", "lenet", "resnet20_frn"])
@pytest.mark.parametrize("structure", ["diag", "kfac"])
def test_models_whose_weights_are_channels_last(name, structure):
    """The memory format of weights and images changes neither curvature nor variances."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = build_model(name, 3, 3, 32, seed=0).double().eval().to(memory_format=layout)
        inputs = images.to(memory_format=layout)
        posterior = laplace_posterior(net, [inputs], 1.0, structure=structure)
        with OutputVariances(net, posterior) as engine:
            found.append(engine(inputs))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
