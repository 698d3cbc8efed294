"""Reference implementation: full Jacobians, full covariance matrices, and their product."""

import torch
from jacobian_networks import logits as logit_rows
from jacobian_networks import loop_gradients
from torch.func import functional_call, jacrev

from src.jacobians import Rotated


def loop_jacobians(net, images):
    """Jacobians per parameter (b, q, *shape), with one backward pass per example and logit."""
    rows = loop_gradients(net, images, torch.zeros(len(images)), logit_rows)
    return {name: torch.stack([torch.stack([r[name] for r in example]) for example in rows]) for name in rows[0][0]}


def full_jacobians(net, images):
    """Jacobians per parameter (b, q, *shape), with `torch.func.jacrev`, one example at a time."""
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def outputs(values, image):
        return functional_call(net, values, (image,))[0]

    parts = [jacrev(outputs)(parameters, image) for image in images.split(1)]
    return {name: torch.stack([part[name] for part in parts]).detach() for name in parameters}


def dense(block):
    """A parameter's covariance as a matrix."""
    if not isinstance(block, Rotated):
        return torch.diag(block.flatten())
    groups = []
    for group, variances in enumerate(block.variances):
        basis = block.outputs[group]
        if block.inputs is not None:
            basis = torch.kron(basis, block.inputs[group])
        groups.append(basis @ torch.diag(variances.flatten()) @ basis.T)
    return torch.block_diag(*groups)


def covariances(jacobians, posterior):
    """``J S J^T`` (b, q, q), with full matrices."""
    flat = {name: j.reshape(*j.shape[:2], -1) for name, j in jacobians.items()}
    return sum(j @ dense(posterior.blocks[name]) @ j.mT for name, j in flat.items())


def softmax_covariances(outputs):
    """``diag(p) - p p^T`` (b, q, q)."""
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def ggn_diagonals(jacobians, outputs):
    """The diagonal of ``sum_n J^T Lambda J`` per parameter."""
    curvature = softmax_covariances(outputs)
    return {name: torch.einsum("bq...,bqr,br...->...", j, curvature, j) for name, j in jacobians.items()}


def random_posterior(net, seed=0, rotated=True):
    """Random covariances: diagonal for some parameters, rotated (in one or several groups) for the others."""
    draw = torch.Generator().manual_seed(seed)

    def positive(*shape):
        return torch.rand(shape, generator=draw, dtype=torch.float64) + 0.1

    def basis(n, d):
        return torch.linalg.qr(torch.randn(n, d, d, generator=draw, dtype=torch.float64))[0]

    blocks = {}
    for name, p in net.named_parameters():
        module = net.get_submodule(name.rpartition(".")[0])
        n = getattr(module, "groups", 1)
        if not rotated or p.ndim == 0 or len(blocks) % 5 == 4:
            blocks[name] = positive(*p.shape)
            continue
        o = p.shape[0] // n
        outputs = basis(n, o)
        shared = blocks.get(name.replace("bias", "weight"))
        if p.ndim == 1:
            if isinstance(shared, Rotated) and len(blocks) % 2:
                outputs = shared.outputs  # as in KFAC
            blocks[name] = Rotated(positive(n, o), outputs)
        else:
            k = p[0].numel()
            blocks[name] = Rotated(positive(n, o, k), outputs, basis(n, k))
    return blocks
