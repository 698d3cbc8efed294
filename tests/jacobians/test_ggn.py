"""Diagonal GGN and KFAC compared with full Jacobians and a plain loop for the factors; invariants; refusals."""

import pytest
import torch
import torch.nn.functional as F
from full_jacobians import covariances, ggn_diagonals, loop_jacobians, softmax_covariances
from jacobian_networks import NETWORKS, images_and_labels, network
from torch import nn

from src.jacobians import OutputVariances, Rotated, ggn_diagonal, kronecker_factors
from src.jacobians.ggn import root_of_softmax_covariance

EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0])
def test_root_of_the_softmax_covariance(classes, size):
    draw = torch.Generator().manual_seed(0)
    logits = size * torch.randn(5, classes, generator=draw, dtype=torch.float64)
    root = root_of_softmax_covariance(logits)
    assert root.shape == (5, classes - 1, classes)
    torch.testing.assert_close(root.mT @ root, softmax_covariances(logits), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(root.sum(2), torch.zeros(5, classes - 1).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NETWORKS)
def test_diagonal_equals_the_full_jacobian(name):
    net = network(name)
    images, labels = images_and_labels()
    expected = ggn_diagonals(loop_jacobians(net, images), net(images.clone()).detach())
    ragged = [(part, part_labels) for part, part_labels in zip(images.split(4), labels.split(4), strict=True)]
    found = ggn_diagonal(net, ragged)
    assert found.count == 6
    assert set(found.diagonals) == set(expected)
    for name, diagonal in expected.items():
        torch.testing.assert_close(found.diagonals[name], diagonal, **EXACT)
    little = ggn_diagonal(net, images.split([1, 5]), memory_mb=1e-6)
    for name, diagonal in expected.items():
        torch.testing.assert_close(little.diagonals[name], diagonal, **EXACT)


def groups_of(x, n):
    return x.reshape(n, -1, *x.shape[1:])


def plain_factors(net, images):
    """KFAC with loops over examples, positions and groups: module name -> [A], [B] per group, and t."""
    seen = {}
    found = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (args[0].detach(), output)

        return hook

    modules = {n: m for n, m in net.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    for image in images.split(1):
        logits = net(image.clone())
        curvature = softmax_covariances(logits.detach())[0]
        for name, module in modules.items():
            a, output = seen[name]
            n = getattr(module, "groups", 1)
            if isinstance(module, nn.Conv2d):
                sides = module._reversed_padding_repeated_twice
                a = F.unfold(F.pad(a, sides), module.kernel_size, module.dilation, 0, module.stride)[0]
            else:
                a = a.reshape(-1, a.shape[-1]).T
            rows = [torch.autograd.grad(z, output, retain_graph=True)[0] for z in logits[0]]
            if isinstance(module, nn.Conv2d):
                g = torch.stack([row[0].flatten(1) for row in rows])  # (q, channels, t)
            else:
                g = torch.stack([row.reshape(-1, row.shape[-1]).T for row in rows])
            t = g.shape[2]
            inputs, outputs = found.setdefault(name, ([0.0] * n, [0.0] * n, t))[:2]
            for group, (a_n, g_n) in enumerate(zip(groups_of(a, n), g.unflatten(1, (n, -1)).unbind(1), strict=True)):
                inputs[group] = inputs[group] + a_n @ a_n.T / len(images)
                outputs[group] = outputs[group] + torch.einsum("qot,qr,rpt->op", g_n, curvature, g_n) / t
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("memory_mb", [256.0, 1e-6])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "batchnorm", "layernorm", "encoder", "custom"])
def test_factors_equal_a_plain_loop(name, memory_mb):
    net = network(name)
    images, _ = images_and_labels()
    expected = plain_factors(net, images)
    found = kronecker_factors(net, images.split(4), memory_mb)
    assert set(found.factors) <= set(expected)
    owned = {p for kept in found.factors.values() for p in (kept.weight, kept.bias)} - {None}
    assert owned | set(found.diagonals) == {n for n, _ in net.named_parameters()}
    assert not owned & set(found.diagonals)
    assert len(found.factors) >= 2
    diagonals = ggn_diagonal(net, images.split(4)).diagonals
    for parameter, diagonal in found.diagonals.items():
        torch.testing.assert_close(diagonal, diagonals[parameter], **EXACT)
    posterior = found.posterior(0.7)
    for module, kept in found.factors.items():
        inputs, outputs, t = expected[module]
        assert kept.positions == t
        torch.testing.assert_close(kept.inputs, torch.stack(inputs), **EXACT)
        torch.testing.assert_close(kept.outputs, torch.stack(outputs), **EXACT)
        if kept.bias is not None:
            block = posterior.blocks[kept.bias]
            precision = t * torch.stack(outputs) + 0.7 * torch.eye(outputs[0].shape[0]).double()
            dense = block.outputs @ torch.diag_embed(block.variances) @ block.outputs.mT
            torch.testing.assert_close(dense, torch.linalg.inv(precision), rtol=1e-9, atol=1e-12)
        block = posterior.blocks[kept.weight]
        basis = torch.kron(block.outputs[0], block.inputs[0])
        precision = torch.kron(outputs[0].contiguous(), inputs[0].contiguous()) + 0.7 * torch.eye(len(basis)).double()
        dense = basis @ torch.diag(block.variances[0].flatten()) @ basis.T
        torch.testing.assert_close(dense, torch.linalg.inv(precision), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_variances_under_kfac_equal_the_full_jacobian(name):
    net = network(name)
    images, _ = images_and_labels()
    posterior = kronecker_factors(net, images.split(4)).posterior(1.5)
    expected = covariances(loop_jacobians(net, images), posterior)
    with OutputVariances(net, posterior, full=True) as engine:
        torch.testing.assert_close(engine(images)[1], expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("twice", {"conv.weight", "conv.bias", "shared.weight", "shared.bias"}),
        ("tied", {"one.weight", "one.bias", "two.bias"}),
        ("autoencoding", {"code.weight", "code.bias"}),
        ("batchnorm", {"1.weight", "1.bias", "4.weight", "4.bias", "7.weight", "7.bias"}),
        ("attention", {"attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
                       "attention.out_proj.bias"}),
        ("folded", {"across.weight", "across.bias", "merged.weight", "merged.bias"}),
    ],
)  # fmt: skip
def test_parameters_without_factors_have_diagonals(name, parameters):
    images, _ = images_and_labels()
    found = kronecker_factors(network(name), images.split(4))
    assert set(found.diagonals) == parameters


def test_a_single_layer_and_a_single_example_is_the_exact_ggn():
    net = nn.Linear(4, 3).double()
    images = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature = softmax_covariances(net(images).detach())[0]
    block = kronecker_factors(net, [images]).posterior(2.0).blocks["weight"]
    assert isinstance(block, Rotated)
    basis = torch.kron(block.outputs[0], block.inputs[0])
    exact = torch.linalg.inv(torch.kron(curvature, torch.outer(images[0], images[0])) + 2.0 * torch.eye(12).double())
    torch.testing.assert_close(basis @ torch.diag(block.variances.flatten()) @ basis.T, exact, **EXACT)


def test_more_examples_and_a_larger_prior_mean_smaller_variances():
    net = network("convolutions")
    images, _ = images_and_labels(12)

    def total(posterior):
        with OutputVariances(net, posterior) as engine:
            return engine(images)[1].sum()

    for fit in (ggn_diagonal, kronecker_factors):
        few, many = fit(net, [images[:4]]), fit(net, [images, images, images])
        assert many.count == 36
        assert total(many.posterior(1.0)) < total(few.posterior(1.0))
        assert total(few.posterior(2.0)) < total(few.posterior(1.0))


def test_a_frozen_weight_and_a_frozen_bias():
    net = network("mlp")
    net[1].weight.requires_grad_(False)
    net[3].bias.requires_grad_(False)
    images, _ = images_and_labels()
    posterior = kronecker_factors(net, [images]).posterior(1.0)
    assert set(posterior.blocks) == {"1.bias", "3.weight"}
    with OutputVariances(net, posterior, full=True) as engine:
        found = engine(images)[1]
    jacobians = {n: j for n, j in loop_jacobians(net, images).items() if n in posterior.blocks}
    torch.testing.assert_close(found, covariances(jacobians, posterior), **EXACT)


def test_refusals():
    net = network("mlp")
    images, _ = images_and_labels()
    for fit in (ggn_diagonal, kronecker_factors):
        with pytest.raises(ValueError, match="at least one example"):
            fit(net, [])
        for delta in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="prior precision delta must be positive"):
                fit(net, [images]).posterior(delta)
    with pytest.raises(ValueError, match="single output"):
        ggn_diagonal(nn.Sequential(nn.Flatten(), nn.Linear(72, 1)).double(), [images])
    pooled = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match="images of one size; '0' has 9 positions here and had 16"):
        kronecker_factors(pooled, [images, images[..., :5, :5]])


def test_a_module_used_otherwise_in_a_later_batch_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.again = nn.Linear(72, 72), nn.Linear(72, 3), False

        def forward(self, x):
            x = self.body(x.flatten(1)).tanh()
            return self.head(self.body(x) if self.again else x)

    net = Fickle().double()
    images, _ = images_and_labels()

    def batches():
        yield images
        net.again = True
        yield images

    with pytest.raises(ValueError, match=r"every batch to use 'body\.bias' in the same way; use the diagonal"):
        kronecker_factors(net, batches())


def test_leaves_the_model_as_it_was_and_works_under_no_grad():
    net = network("batchnorm").train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images, _ = images_and_labels()
    with torch.no_grad():
        kronecker_factors(net, [images])
        ggn_diagonal(net, [images])
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
