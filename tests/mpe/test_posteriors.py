"""Posteriors compared with their defining formulas."""

import logging

import pytest
import torch
from mpe_problems import batches, examples, network
from torch import nn

from mpe.posterior import laplace_posterior, optimizer_posterior
from src.jacobians import Rotated
from src.models.base import FilterResponseNorm
from src.optimizers import IBLR

F64 = torch.float64


def gradient_step(net, optimizer, iblr=False):
    images, labels = examples()
    if iblr:
        with torch.random.fork_rng(), optimizer.sampled_params():
            torch.manual_seed(3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
    else:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()


def test_golden_ivon_step(monkeypatch):
    """One scalar parameter and one step, with all numbers computed by hand."""
    w = nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = IBLR([w], lr=0.2, num_examples=100, delta=1.0, hess_init=0.1)
    monkeypatch.setattr(torch, "randn", lambda *size, **options: torch.ones(*size, dtype=F64))
    with optimizer.sampled_params():
        assert w.item() - 1 == pytest.approx(0.3015113446, abs=1e-10)
        (0.5 * w).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["hess"].item() == pytest.approx(0.1000155842, abs=1e-10)
    assert w.item() == pytest.approx(0.8980144488, abs=1e-10)
    model = nn.Module()
    model.weight = w
    block = optimizer_posterior(optimizer, model).blocks["weight"]
    assert block.item() == pytest.approx(0.0908962132, abs=1e-10)


def test_iblr_posterior():
    net = network()
    optimizer = IBLR(net.parameters(), lr=0.1, num_examples=50, delta=3.0, hess_init=0.2)
    gradient_step(net, optimizer, iblr=True)
    blocks = optimizer_posterior(optimizer, net, num_examples=50, delta=3.0).blocks
    flat = optimizer.param_groups[0]["hess"]
    assert flat.std() > 0
    found = torch.cat([blocks[name].flatten() for name, _ in net.named_parameters()])
    torch.testing.assert_close(found, 1 / (50 * flat + 3.0), rtol=1e-12, atol=0)
    for (_, p), own in zip(net.named_parameters(), optimizer.posterior_variance(), strict=True):
        assert own.shape == p.shape


def test_plain_ivon_with_groups_in_another_order():
    ivon = pytest.importorskip("ivon")
    net = network()
    net[0].weight.requires_grad_(False)
    groups = [
        {"params": list(net[5].parameters()), "weight_decay": 0.5, "hess_init": 2.0},
        {"params": [net[0].bias, *net[3].parameters()], "weight_decay": 0.25, "hess_init": 1.0},
    ]
    optimizer = ivon.IVON(groups, lr=0.1, ess=10.0)
    start = 0.0
    for group in optimizer.param_groups:  # every weight gets a different Hessian
        group["hess"] = torch.arange(len(group["hess"]), dtype=F64) + start
        start += 1000.0
    blocks = optimizer_posterior(optimizer, net).blocks
    assert set(blocks) == {"0.bias", "3.weight", "3.bias", "5.weight", "5.bias"}
    hess = torch.arange(24, dtype=F64).view(4, 6)
    torch.testing.assert_close(blocks["5.weight"], 1 / (10 * hess + 5.0), rtol=1e-12, atol=0)
    hess = 1000.0 + 3 + torch.arange(72, dtype=F64).view(6, 12)
    torch.testing.assert_close(blocks["3.weight"], 1 / (10 * hess + 2.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_posterior(kind):
    net = network()
    optimizer = kind([{"params": net[5].parameters()}, {"params": net[:5].parameters(), "lr": 0.1}], lr=0.01)
    for _ in range(3):
        gradient_step(net, optimizer)
    blocks = optimizer_posterior(optimizer, net, num_examples=50, delta=3.0).blocks
    assert list(blocks) == [name for name, _ in net.named_parameters()]
    for name, p in net.named_parameters():
        raw = optimizer.state[p]["exp_avg_sq"]
        assert raw.max() > 0
        torch.testing.assert_close(blocks[name], 1 / (50 * raw.sqrt() + 3.0), rtol=1e-12, atol=0)


def test_adam_second_moments_are_not_corrected():
    w = nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = torch.optim.Adam([w], betas=(0.9, 0.99))
    (4.0 * w).sum().backward()
    optimizer.step()
    model = nn.Module()
    model.weight = w
    block = optimizer_posterior(optimizer, model, num_examples=10, delta=2.0).blocks["weight"]
    assert block.item() == pytest.approx(1 / (10 * (0.01 * 16) ** 0.5 + 2.0), rel=1e-12)


def test_compiled_models_have_plain_names():
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    gradient_step(net, optimizer)
    compiled = nn.Module()
    compiled._orig_mod = net  # as torch.compile wraps it
    blocks = optimizer_posterior(optimizer, compiled, num_examples=7, delta=1.0).blocks
    assert list(blocks) == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize(
    ("build", "arguments", "says"),
    [
        (lambda net: torch.optim.SGD(net.parameters()), {}, "SGD does not learn variances"),
        (lambda net: torch.optim.Adam(net.parameters()), {"num_examples": 7, "delta": 1.0}, "no state for"),
        (lambda net: torch.optim.Adam(net.parameters()), {"num_examples": 7}, "needs num_examples and delta"),
        (lambda net: torch.optim.Adam(net.parameters()), {"num_examples": 7, "delta": 0.0}, "delta positive"),
        (lambda net: torch.optim.Adam(net.parameters()), {"num_examples": 0, "delta": 1.0}, "num_examples must be"),
        (lambda net: IBLR(network().parameters(), 0.1, 7, 1.0), {}, "no state for .* '0.weight'"),
        (lambda net: IBLR(net.parameters(), 0.1, 7, 1.0), {"num_examples": 8}, "num_examples=8 contradicts .* 7"),
        (lambda net: IBLR(net.parameters(), 0.1, 7, 1.0), {"delta": 2.0}, "delta=2.0 contradicts"),
    ],
)
def test_refused_optimizers(build, arguments, says):
    net = network()
    with pytest.raises(ValueError, match=says):
        optimizer_posterior(build(net), net, **arguments)


def test_adam_after_a_step_that_left_a_parameter_out():
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    images, _ = examples()
    net[:3](images).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"'3\.weight'"):
        optimizer_posterior(optimizer, net, num_examples=7, delta=1.0)
    for p in net[3:].parameters():
        p.requires_grad_(False)
    found = optimizer_posterior(optimizer, net, num_examples=7, delta=1.0)
    assert list(found.blocks) == ["0.weight", "0.bias"]


def test_broken_state_is_refused():
    net = network()
    optimizer = IBLR(net.parameters(), 0.1, 7, 1.0)
    optimizer.param_groups[0]["hess"][60] = float("nan")
    with pytest.raises(ValueError, match=r"3\.weight.*positive and finite"):
        optimizer_posterior(optimizer, net)


def test_laplace_structures():
    net, (images, labels) = network(), examples()
    blocks = laplace_posterior(net, batches(images, labels), 2.0, structure="diag").blocks
    assert all(blocks[name].shape == p.shape for name, p in net.named_parameters())
    # the exact diagonal of one parameter: sum over examples of J^T Lambda J
    jacobians = torch.func.jacrev(
        lambda bias: torch.func.functional_call(net, {"5.bias": bias}, (images,))
    )(net[5].bias.detach())  # fmt: skip
    p = net(images).softmax(1).detach()
    fisher = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    diagonal = torch.einsum("ncw,ncd,ndw->w", jacobians, fisher, jacobians)
    torch.testing.assert_close(blocks["5.bias"], 1 / (diagonal + 2.0), rtol=1e-12, atol=0)
    blocks = laplace_posterior(net, batches(images, labels), 2.0).blocks
    assert all(isinstance(block, Rotated) for block in blocks.values())
    assert set(blocks) == {name for name, _ in net.named_parameters()}


def test_diagonal_blocks_beside_factors_are_reported(caplog):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), FilterResponseNorm(3), nn.Flatten(), nn.Linear(48, 4)).double()
    with caplog.at_level(logging.INFO, "mpe.posterior"):
        blocks = laplace_posterior(net, [examples()[0]], 2.0).blocks
    assert isinstance(blocks["0.weight"], Rotated)
    assert isinstance(blocks["1.gamma"], torch.Tensor)
    assert "3 parameters" in caplog.text
    assert "1.tau" in caplog.text


def test_tf32_is_as_before():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
        laplace_posterior(network(), [examples()[0]], 2.0)
        with pytest.raises(ValueError, match="at least one example"):
            laplace_posterior(network(), [], 2.0)
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"delta": 0.0}, "delta must be positive"), ({"delta": 1.0, "structure": "full"}, "kfac, diag")],
)
def test_refused_laplace(arguments, says):
    with pytest.raises(ValueError, match=says):
        laplace_posterior(network(), [examples()[0]], **arguments)
