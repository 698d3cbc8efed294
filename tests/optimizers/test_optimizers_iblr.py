import io
import math
import sys

import pytest
import torch
from torch import nn

from mpe import sensitivities
from src.errors import ArgumentError
from src.models.base import load_optimizer
from src.optimizers import IBLR, IvonOpt, build_optimizer
from src.training import TrainingConfig

N = 100
both_ways = pytest.mark.parametrize("kind", [IBLR, IvonOpt])


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss_of(model, dtype=torch.float64):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return nn.functional.cross_entropy(model(inputs), torch.arange(8) % 3)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def iblr(model, kind=IBLR, **options):
    return kind(model.parameters(), lr=0.2, num_examples=N, delta=2.0, hess_init=0.1, **options)


def train(model, optimizer, first, last, dtype=torch.float64):
    """Train epochs of two steps each, with noise seeded by the epoch."""
    for epoch in range(first, last + 1):
        with torch.random.fork_rng():
            torch.manual_seed(epoch)
            for _ in range(2):
                with optimizer.sampled_params():
                    optimizer.zero_grad()
                    loss_of(model, dtype).backward()
                optimizer.step()


def reference_step(m, h, momentum, t, gradient_at, lr, h0, w, n, b1=0.9, b2=0.99999):
    """Take one iBLR step, written as its five equations; draws one standard normal vector."""
    eps = torch.randn(m.numel(), dtype=m.dtype) / (n * (h + w)).sqrt()
    g = gradient_at(m + eps)
    momentum = b1 * momentum + (1 - b1) * g
    f = n * (h + w) * eps * g
    h_new = b2 * h + (1 - b2) * f + 0.5 * (1 - b2) ** 2 * (h - f) ** 2 / (h + w)
    m = m - lr * (h0 + w) * (momentum / (1 - b1**t) + w * m) / (h_new + w)
    return m, h_new, momentum


@both_ways
@pytest.mark.parametrize("beta2", [0.99999, 0.9])
def test_against_the_five_line_form(beta2, kind):
    model, twin = network(), network()
    optimizer = iblr(model, kind, beta2=beta2)

    def gradient_at(flat):
        nn.utils.vector_to_parameters(flat, twin.parameters())
        gradients = torch.autograd.grad(loss_of(twin), list(twin.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    m = weights(model)
    h, momentum = torch.full_like(m, 0.1), torch.zeros_like(m)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for t in range(1, 41):
            m, h, momentum = reference_step(m, h, momentum, t, gradient_at, 0.2, 0.1, 2.0 / N, N, b2=beta2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(40):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                loss_of(model).backward()
            optimizer.step()
    torch.testing.assert_close(weights(model), m, rtol=0, atol=1e-12)
    variance = torch.cat([v.flatten() for v in optimizer.posterior_variance()])
    torch.testing.assert_close(variance, 1 / (N * h + 2.0), rtol=1e-12, atol=0)
    assert not torch.allclose(h, torch.full_like(h, 0.1), rtol=1e-6, atol=0)


@both_ways
def test_golden_scalar(monkeypatch, kind):
    """The published step, with standard normal draw 1 and gradient 0.5."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = kind([parameter], lr=0.2, num_examples=100, delta=1.0, hess_init=0.1)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.ones(*shape, dtype=torch.float64))
    with optimizer.sampled_params():
        assert parameter.item() == pytest.approx(1.3015113446, abs=1e-10)
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    assert parameter.item() == pytest.approx(0.8980144488, abs=1e-10)
    assert optimizer.param_groups[0]["hess"].item() == pytest.approx(0.1000155842, abs=1e-10)
    assert optimizer.posterior_variance()[0].item() == pytest.approx(0.0908962132, abs=1e-10)


@both_ways
def test_resume_in_fresh_objects_is_exact(kind):
    model = network(torch.float32)
    optimizer = iblr(model, kind, beta2=0.99)
    train(model, optimizer, 1, 3, torch.float32)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 4, 6, torch.float32)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.rand(5)  # the state of the global generator must not matter
    resumed = network(torch.float32, seed=9)
    other = iblr(resumed, kind, beta2=0.99)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.state_dict()["current_step"] == 6
    train(resumed, other, 4, 6, torch.float32)
    assert torch.equal(weights(resumed), weights(model))
    for key in ("hess", "momentum"):
        assert torch.equal(other.param_groups[0][key], optimizer.param_groups[0][key])


@both_ways
def test_loading_moves_the_state_to_the_parameters(kind):
    model = network()
    optimizer = iblr(model, kind)
    train(model, optimizer, 1, 1)
    state = optimizer.state_dict()
    other = iblr(network(torch.float32), kind)
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert group["hess"].dtype == group["momentum"].dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in other.posterior_variance())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loading_on_a_gpu():
    model = network(torch.float32)
    optimizer = iblr(model)
    train(model, optimizer, 1, 1, torch.float32)
    moved = network(torch.float32).cuda()
    other = iblr(moved)
    other.load_state_dict(optimizer.state_dict())
    assert all(v.is_cuda for v in other.posterior_variance())
    with other.sampled_params():
        other.zero_grad()
        moved(torch.ones(2, 4, device="cuda")).square().sum().backward()
    other.step()
    assert torch.isfinite(weights(moved)).all()


@both_ways
def test_a_loaded_state_is_not_shared(kind):
    model = network()
    optimizer = iblr(model, kind, beta2=0.9)
    train(model, optimizer, 1, 1)
    twin = network()
    other = iblr(twin, kind, beta2=0.9)
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.param_groups[0]["hess"].clone()
    train(twin, other, 2, 2)
    assert torch.equal(optimizer.param_groups[0]["hess"], before)
    assert not torch.equal(other.param_groups[0]["hess"], before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("train_pass", [True, False])
@both_ways
def test_an_exception_restores_the_mean_and_training_goes_on(error, train_pass, kind):
    model, twin = network(), network()
    optimizer, undisturbed = iblr(model, kind), iblr(twin, kind)
    mean = weights(model)

    def broken_pass():
        with optimizer.sampled_params(train=train_pass):
            assert not torch.equal(weights(model), mean)
            loss_of(model).backward()
            raise error

    with pytest.raises(error):
        broken_pass()
    assert torch.equal(weights(model), mean)
    train(model, optimizer, 1, 2)
    train(twin, undisturbed, 1, 2)
    assert torch.equal(weights(model), weights(twin))


@both_ways
def test_outside_the_context_the_parameters_are_the_mean(kind):
    model = network(torch.float32)
    optimizer = iblr(model, kind)
    mean = weights(model)
    with optimizer.sampled_params(train=False):
        sample = weights(model)
    assert torch.equal(weights(model), mean)
    deviation = (sample - mean) / torch.cat([v.flatten() for v in optimizer.posterior_variance()]).sqrt()
    assert 0.5 < deviation.std() < 1.5


@both_ways
def test_frozen_parameters_are_left_alone_and_unused_ones_count_as_zero(kind):
    model = network()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    frozen, start = model[0].weight.clone(), weights(model)
    optimizer = kind([*model.parameters(), unused], lr=0.1, num_examples=N, delta=1.0)
    train(model, optimizer, 1, 2)
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.zeros(3, dtype=torch.float64))
    assert not torch.equal(weights(model), start)
    shapes = [tuple(v.shape) for v in optimizer.posterior_variance()]
    assert shapes == [(5,), (3, 5), (3,), (3,)]


@both_ways
def test_the_rate_of_the_group_is_the_rate_of_the_step(kind):
    model = network()
    optimizer = iblr(model, kind)
    mean = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1, 1)
    assert torch.equal(weights(model), mean)


@both_ways
def test_misuse_is_refused(kind):
    model = network()
    optimizer = iblr(model, kind)
    with pytest.raises(RuntimeError, match="sampled_params before"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: None)
    with optimizer.sampled_params(train=False):
        with pytest.raises(RuntimeError, match="cannot be saved"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params():
            pass
    with optimizer.sampled_params():
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match="cannot be saved"):
        optimizer.state_dict()
    with pytest.raises(ValueError, match="the model has \\[43\\]"):
        optimizer.load_state_dict(iblr(nn.Linear(2, 2)).state_dict())


def test_only_the_packages_own_step_needs_the_package(monkeypatch):
    """Training, continuing from a state that the package wrote, and scores from the posterior work without it."""
    model = network()
    packages = iblr(model, IvonOpt)
    train(model, packages, 1, 1)
    monkeypatch.setitem(sys.modules, "ivon", None)
    optimizer = iblr(model)
    load_optimizer(optimizer, packages.state_dict())
    train(model, optimizer, 2, 2)
    loader = [(torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)]
    assert sensitivities(model, loader, optimizer).scores.shape == (6,)
    with pytest.raises(ArgumentError, match=r"^iblr_backend ivon-opt: .*pip install -r requirements-iblr\.txt$"):
        iblr(model, IvonOpt)


def convolutional(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 6, 2), nn.Tanh(), nn.Conv2d(6, 4, (1, 3), stride=2), nn.Flatten(), nn.LazyLinear(3)
        model = nn.Sequential(*layers)
        model(torch.zeros(1, 1, 4, 6))
    return model.to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_200_steps_are_those_of_the_package(dtype, layout):
    images = torch.randn(20, 16, 1, 4, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    for kind in (IBLR, IvonOpt):
        model = convolutional(dtype).to(memory_format=layout)
        optimizer = iblr(model, kind, beta2=0.999)
        optimizer.param_groups[0]["lr"] = 0.1
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for step in range(200):
                with optimizer.sampled_params():
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(images[step % 20]), torch.arange(16) % 3).backward()
                optimizer.step()
        group = optimizer.param_groups[0]
        found.append((weights(model), group["hess"], group["momentum"]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert not torch.allclose(found[0][1], torch.tensor(0.1, dtype=dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize("first", [IBLR, IvonOpt])
def test_either_way_continues_from_the_state_of_the_other(first):
    second = IvonOpt if first is IBLR else IBLR
    model, twin = network(), network()
    optimizer, undisturbed = iblr(model, first, beta2=0.9), iblr(twin, second, beta2=0.9)
    train(model, optimizer, 1, 3)
    train(twin, undisturbed, 1, 6)
    other = iblr(model, second, beta2=0.9)
    load_optimizer(other, optimizer.state_dict())
    train(model, other, 4, 6)
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-12)
    assert other.state_dict().keys() == optimizer.state_dict().keys()
    assert other.state_dict()["current_step"] == 12


@both_ways
def test_several_passes_are_averaged(kind):
    """Two passes with the same noise equal one; gradients g and 3 g average to 2 g."""
    stepped = []
    for factors in ((2.0,), (1.0, 3.0)):
        model = network()
        optimizer = iblr(model, kind)
        for factor in factors:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                with optimizer.sampled_params():
                    optimizer.zero_grad(set_to_none=False)
                    (factor * loss_of(model)).backward()
        optimizer.zero_grad(set_to_none=False)  # the collected values do not share memory with the gradients
        optimizer.step()
        stepped.append(torch.cat([weights(model), optimizer.param_groups[0]["hess"]]))
    torch.testing.assert_close(*stepped, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "delta"),
    [({"weight_decay": 0.02}, 2.0), ({"delta": 60.0}, 60.0), ({}, 1.0)],
)
@pytest.mark.parametrize(("backend", "kind"), [(None, IBLR), ("own", IBLR), ("ivon-opt", IvonOpt)])
def test_prior_precision_of_the_builder(options, delta, backend, kind):
    options = options if backend is None else {**options, "iblr_backend": backend}
    config = TrainingConfig(epochs=1, learning_rate=0.1, optimizer="iblr", **options)
    optimizer = build_optimizer(config, network().parameters(), N)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == pytest.approx(delta / N)
    assert (group["ess"], group["beta1"], group["beta2"]) == (N, 0.9, 0.99999)
    variance = optimizer.posterior_variance()[0]
    assert variance[0, 0].item() == pytest.approx(1 / (N * 0.1 + delta))
    assert math.isinf(group["clip_radius"])
