import io
import math
import sys

import pytest
import torch
from torch import nn

from src.errors import UserError
from src.optimizers import IBLR, build_optimizer
from src.training import TrainingConfig

N = 100


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss_of(model, dtype=torch.float64):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return nn.functional.cross_entropy(model(inputs), torch.arange(8) % 3)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def iblr(model, **options):
    return IBLR(model.parameters(), lr=0.2, num_examples=N, delta=2.0, hess_init=0.1, **options)


def train(model, optimizer, first, last, dtype=torch.float64):
    """Epochs of two steps each, the noise seeded by the epoch."""
    for epoch in range(first, last + 1):
        with torch.random.fork_rng():
            torch.manual_seed(epoch)
            for _ in range(2):
                with optimizer.sampled_params():
                    optimizer.zero_grad()
                    loss_of(model, dtype).backward()
                optimizer.step()


def reference_step(m, h, momentum, t, gradient_at, lr, h0, w, n, b1=0.9, b2=0.99999):
    """One iBLR step from its five lines; draws one standard normal vector."""
    eps = torch.randn(m.numel(), dtype=m.dtype) / (n * (h + w)).sqrt()
    g = gradient_at(m + eps)
    momentum = b1 * momentum + (1 - b1) * g
    f = n * (h + w) * eps * g
    h_new = b2 * h + (1 - b2) * f + 0.5 * (1 - b2) ** 2 * (h - f) ** 2 / (h + w)
    m = m - lr * (h0 + w) * (momentum / (1 - b1**t) + w * m) / (h_new + w)
    return m, h_new, momentum


@pytest.mark.parametrize("beta2", [0.99999, 0.9])
def test_against_the_five_line_form(beta2):
    model, twin = network(), network()
    optimizer = iblr(model, beta2=beta2)

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


def test_golden_scalar(monkeypatch):
    """The published step: standard normal draw 1, gradient 0.5."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = IBLR([parameter], lr=0.2, num_examples=100, delta=1.0, hess_init=0.1)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.ones(*shape, dtype=torch.float64))
    with optimizer.sampled_params():
        assert parameter.item() == pytest.approx(1.3015113446, abs=1e-10)
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    assert parameter.item() == pytest.approx(0.8980144488, abs=1e-10)
    assert optimizer.param_groups[0]["hess"].item() == pytest.approx(0.1000155842, abs=1e-10)
    assert optimizer.posterior_variance()[0].item() == pytest.approx(0.0908962132, abs=1e-10)


def test_resume_in_fresh_objects_is_exact():
    model = network(torch.float32)
    optimizer = iblr(model, beta2=0.99)
    train(model, optimizer, 1, 3, torch.float32)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 4, 6, torch.float32)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.rand(5)  # the state of the global generator must not matter
    resumed = network(torch.float32, seed=9)
    other = iblr(resumed, beta2=0.99)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.inner.current_step == 6
    train(resumed, other, 4, 6, torch.float32)
    assert torch.equal(weights(resumed), weights(model))
    for key in ("hess", "momentum"):
        assert torch.equal(other.param_groups[0][key], optimizer.param_groups[0][key])


def test_loading_moves_the_state_to_the_parameters():
    model = network()
    optimizer = iblr(model)
    train(model, optimizer, 1, 1)
    state = optimizer.state_dict()
    other = iblr(network(torch.float32))
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert group is other.inner.param_groups[0]
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


def test_a_loaded_state_is_not_shared():
    model = network()
    optimizer = iblr(model, beta2=0.9)
    train(model, optimizer, 1, 1)
    twin = network()
    other = iblr(twin, beta2=0.9)
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.param_groups[0]["hess"].clone()
    train(twin, other, 2, 2)
    assert torch.equal(optimizer.param_groups[0]["hess"], before)
    assert not torch.equal(other.param_groups[0]["hess"], before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("train_pass", [True, False])
def test_an_exception_restores_the_mean_and_training_goes_on(error, train_pass):
    model, twin = network(), network()
    optimizer, undisturbed = iblr(model), iblr(twin)
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


def test_outside_the_context_the_parameters_are_the_mean():
    model = network(torch.float32)
    optimizer = iblr(model)
    mean = weights(model)
    with optimizer.sampled_params(train=False):
        sample = weights(model)
    assert torch.equal(weights(model), mean)
    deviation = (sample - mean) / torch.cat([v.flatten() for v in optimizer.posterior_variance()]).sqrt()
    assert 0.5 < deviation.std() < 1.5


def test_frozen_parameters_are_left_alone_and_unused_ones_count_as_zero():
    model = network()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    frozen, start = model[0].weight.clone(), weights(model)
    optimizer = IBLR([*model.parameters(), unused], lr=0.1, num_examples=N, delta=1.0)
    train(model, optimizer, 1, 2)
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.zeros(3, dtype=torch.float64))
    assert not torch.equal(weights(model), start)
    shapes = [tuple(v.shape) for v in optimizer.posterior_variance()]
    assert shapes == [(5,), (3, 5), (3,), (3,)]


def test_the_rate_of_the_group_is_the_rate_of_the_step():
    model = network()
    optimizer = iblr(model)
    mean = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1, 1)
    assert torch.equal(weights(model), mean)


def test_misuse_is_refused():
    model = network()
    optimizer = iblr(model)
    with pytest.raises(RuntimeError, match="sampled_params before"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: None)
    with optimizer.sampled_params(train=False):
        with pytest.raises(RuntimeError, match="cannot be saved"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params():
            pass
    with pytest.raises(ValueError, match="the model has \\[43\\]"):
        optimizer.load_state_dict(iblr(nn.Linear(2, 2)).state_dict())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ivon", None)
    with pytest.raises(UserError, match="ivon-opt"):
        iblr(network())


@pytest.mark.parametrize(
    ("options", "delta"),
    [({"weight_decay": 0.02}, 2.0), ({"delta": 60.0}, 60.0), ({}, 1.0)],
)
def test_prior_precision_of_the_builder(options, delta):
    config = TrainingConfig(epochs=1, learning_rate=0.1, optimizer="iblr", **options)
    optimizer = build_optimizer(config, network().parameters(), N)
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == pytest.approx(delta / N)
    assert (group["ess"], group["beta1"], group["beta2"]) == (N, 0.9, 0.99999)
    variance = optimizer.posterior_variance()[0]
    assert variance[0, 0].item() == pytest.approx(1 / (N * 0.1 + delta))
    assert math.isinf(group["clip_radius"])
