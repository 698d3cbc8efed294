"""Posterior precisions, variances and covariances agree with laplace-torch on models that it supports."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from src.jacobians import OutputVariances, ggn_diagonal, kronecker_factors
from src.models import build_model

laplace = pytest.importorskip("laplace")
from laplace.curvature.asdl import AsdlGGN  # noqa: E402
from laplace.curvature.curvlinops import CurvlinopsGGN  # noqa: E402

BACKENDS = {"asdl": AsdlGGN, "curvlinops": CurvlinopsGGN}


def small_convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def frn_network():
    from src.models.base import FilterResponseNorm

    return nn.Sequential(nn.Conv2d(2, 3, 3), FilterResponseNorm(3), nn.Flatten(), nn.Linear(48, 3))


class Tokens(nn.Module):
    """A linear layer applied to many positions per example."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.enter(x.transpose(1, 2).flatten(2)).tanh().mean(1))


def dilated():
    return nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def batchnorm():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


UNKNOWN = {("frn", "kron"), ("frn", "asdl"), ("tokens", "asdl"), ("dilated", "asdl"), ("batchnorm", "kron")}
"""What laplace-torch cannot fit: a network under a structure, or by a backend."""

NETWORKS = {
    "perceptron": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 7), nn.Tanh(), nn.Linear(7, 3)), (2, 6, 6)),
    "convolutions": (small_convolutions, (2, 6, 6)),
    "small_mlp": (lambda: build_model("small_mlp", 4, 1, 8, seed=0), (1, 8, 8)),
    "lenet": (lambda: build_model("lenet", 3, 1, 28, seed=0), (1, 28, 28)),
    "frn": (frn_network, (2, 6, 6)),
    "tokens": (Tokens, (2, 6, 6)),
    "dilated": (dilated, (2, 6, 6)),
    "batchnorm": (batchnorm, (2, 6, 6)),
}


def built(name, dtype):
    build, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build().to(dtype).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype) / 20)
    return net, torch.randn(7, *shape, generator=draw, dtype=torch.float64).to(dtype)


def theirs(net, images, structure, delta, backend):
    """The functional covariance (b, q, q) of laplace-torch's posterior, fitted on batches of 3, 3 and 1."""
    net = copy.deepcopy(net)  # it leaves attributes on the model
    labels = torch.zeros(len(images), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = laplace.Laplace(
            net, "classification", subset_of_weights="all", hessian_structure=structure, prior_precision=delta,
            backend=BACKENDS[backend],
        )  # fmt: skip
        posterior.fit(DataLoader(TensorDataset(images, labels), batch_size=3))
        jacobians, _ = posterior.backend.jacobians(images)
        return posterior.functional_variance(jacobians).detach()


def ours(net, images, structure, delta):
    fit = {"diag": ggn_diagonal, "kron": kronecker_factors}[structure]
    posterior = fit(net, images.split(3)).posterior(delta)
    with OutputVariances(net, posterior, full=True) as engine:
        return engine(images)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "structure", "backend"),
    [
        (name, structure, backend)
        for name in NETWORKS
        for structure in ("diag", "kron")
        for backend in BACKENDS
        if not {(name, structure), (name, backend)} & UNKNOWN
    ],
)
def test_covariances_equal(name, structure, backend, dtype):
    net, images = built(name, dtype)
    try:
        expected = theirs(net, images, structure, 1.5, backend)
    except torch.linalg.LinAlgError:
        pytest.skip("laplace-torch's eigendecomposition does not converge in this precision")
    found = ours(net, images, structure, 1.5)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance * expected.abs().max().item())
