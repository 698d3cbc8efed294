"""Dense Hessians and GGNs of tiny networks, to check operators against, and matrices with known spectra."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "jacobians"))
from jacobian_networks import NETWORKS, images_and_labels, network

from src.datasets.batches import Batch

__all__ = ["NETWORKS", "Matrix", "batch", "batches", "dense", "images_and_labels", "network", "small_network"]


def batch(images, labels):
    return Batch(images, labels, torch.arange(len(labels)), torch.ones(len(labels)))


def batches(images, labels, size):
    return [batch(x, y) for x, y in zip(images.split(size), labels.split(size), strict=True)]


def small_network(seed=0):
    """A convolution, BatchNorm, ReLU and a linear layer, 79 parameters; for images (n, 2, 6, 6)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(3, 3),
        ).double()  # fmt: skip
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


def dense(net, images, labels, name="hessian"):
    """The matrix (P, P) over the parameters that require gradients, from torch's derivatives of its definition."""
    names, parameters = zip(*((n, p) for n, p in net.named_parameters() if p.requires_grad), strict=True)
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])

    def outputs(vector):
        parts = zip(names, vector.split(sizes), parameters, strict=True)
        return functional_call(net, {n: t.view(p.shape) for n, t, p in parts}, (images.clone(),))

    with sdpa_kernel(SDPBackend.MATH):
        if name == "hessian":
            return torch.autograd.functional.hessian(lambda v: F.cross_entropy(outputs(v), labels), flat)
        jacobian = torch.autograd.functional.jacobian(outputs, flat)
        p = outputs(flat).softmax(dim=1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(labels)


class Matrix:
    """An operator for a known matrix."""

    name = "matrix"

    def __init__(self, values):
        self.values = values
        self.size, self.dtype, self.device, self.products = len(values), values.dtype, values.device, 0

    def __matmul__(self, vector):
        self.products += 1
        return self.values @ vector

    @classmethod
    def of_spectrum(cls, eigenvalues, dtype=torch.float64, seed=0):
        """A matrix with these eigenvalues and random eigenvectors."""
        draw = torch.Generator().manual_seed(seed)
        values = torch.as_tensor(eigenvalues, dtype=torch.float64)
        q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))
        matrix = (q * values) @ q.T
        return cls(((matrix + matrix.T) / 2).to(dtype))
