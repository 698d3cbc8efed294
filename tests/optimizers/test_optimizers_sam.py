import copy
import io
import warnings

import pytest
import torch
from torch import nn

from src.optimizers import OPTIMIZERS, SAM, build_optimizer, frozen_batchnorm
from src.training import TrainingConfig


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator, dtype=dtype), torch.arange(8) % 3


def backward(model, dtype=torch.float64):
    inputs, labels = data(dtype)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss


def train(model, optimizer, steps, dtype=torch.float64):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, dtype)
        with optimizer.climbed():
            backward(model, dtype)
        optimizer.second_step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("adaptive", "perturbed", "first", "second"),
    [
        (
            False,
            (1.0062017367, -2.0496138939),
            (0.8981279167, -1.1389741917),
            (0.7285386899, -0.1981266528),
        ),
        (
            True,
            (1.0031189143, -2.0998052578),
            (0.8990614044, -1.0741576200),
            (0.7306352652, -0.0995121781),
        ),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_published_vectors(adaptive, perturbed, first, second, split):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    params = [nn.Parameter(part) for part in (start.split(1) if split else [start])]
    optimizer = SAM(params, sgd, rho=0.05, adaptive=adaptive)

    def loss():
        return (torch.cat(params) ** 4).sum() / 4

    for step, expected in enumerate((first, second)):
        loss().backward()
        optimizer.first_step()
        if step == 0:
            assert torch.cat(params).tolist() == pytest.approx(perturbed, abs=1e-9)
        loss().backward()
        optimizer.second_step()
        assert torch.cat(params).tolist() == pytest.approx(expected, abs=1e-9)
        optimizer.zero_grad()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_climb_has_length_rho_over_all_parameters(adaptive):
    model = network()
    start = weights(model)
    backward(model)
    optimizer = SAM(model.parameters(), sgd, rho=0.3, adaptive=adaptive)
    optimizer.first_step()
    climb = weights(model) - start
    length = (climb / start if adaptive else climb).norm()
    assert length.item() == pytest.approx(0.3, rel=1e-9)


def test_return_is_exact_to_the_bit_in_float32():
    model = network(torch.float32)
    # A large perturbation: subtracting it would leave rounding errors.
    optimizer = SAM(model.parameters(), sgd, rho=1e4)
    start = weights(model)
    backward(model, torch.float32)
    optimizer.first_step()
    assert (weights(model) - start).norm() > 1e3
    optimizer.restore()
    assert torch.equal(weights(model), start)
    optimizer.restore()
    assert torch.equal(weights(model), start)


def test_rho_zero_is_the_base_optimizer():
    plain, sharp = network(), network()
    base = sgd(plain.parameters())
    for _ in range(3):
        base.zero_grad()
        backward(plain)
        base.step()
    train(sharp, SAM(sharp.parameters(), sgd, rho=0.0), 3)
    assert torch.equal(weights(plain), weights(sharp))


def test_the_base_may_be_an_optimizer_or_a_factory_of_any_kind():
    one, two = network(), network()
    train(one, SAM(one.parameters(), torch.optim.AdamW(one.parameters(), lr=0.01)), 3)
    train(two, SAM(two.parameters(), lambda params: torch.optim.AdamW(params, lr=0.01)), 3)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(network()))


def test_second_step_uses_the_second_gradient_only():
    model = network()
    optimizer = SAM(model.parameters(), lambda p: torch.optim.SGD(p, lr=1.0))
    start = weights(model)
    backward(model)
    optimizer.first_step()
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer.second_step()
    torch.testing.assert_close(weights(model), start - 0.25, rtol=0, atol=1e-15)


def test_the_steps_start_from_the_gradients_so_these_may_be_averaged_before():
    """Two half batches, with gradients averaged by hand before each step, give the same weights as the full batch."""
    whole, shared = network(), network()
    train(whole, SAM(whole.parameters(), sgd), 2)
    inputs, labels = data()
    optimizer = SAM(shared.parameters(), sgd)

    def averaged_gradients():
        halves = [
            torch.autograd.grad(
                nn.functional.cross_entropy(shared(inputs[part]), labels[part]), list(shared.parameters())
            )
            for part in (slice(0, 4), slice(4, 8))
        ]
        for p, a, b in zip(shared.parameters(), *halves, strict=True):
            p.grad = (a + b) / 2

    for _ in range(2):
        averaged_gradients()
        optimizer.first_step()
        averaged_gradients()
        optimizer.second_step()
    torch.testing.assert_close(weights(shared), weights(whole), rtol=0, atol=1e-14)


def test_frozen_and_unused_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    frozen = model[0].weight.clone()
    optimizer = SAM([*model.parameters(), unused], sgd)
    start = weights(model)
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))
    assert not torch.equal(weights(model), start)


def test_zero_gradients_do_not_move_or_break_the_weights():
    model = network()
    start = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = SAM(model.parameters(), sgd)
    optimizer.first_step()
    assert torch.equal(weights(model), start)


def test_mixed_precisions_share_one_norm():
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0], dtype=torch.bfloat16))
    a.grad, b.grad = a.detach().clone(), b.detach().clone()
    SAM([a, b], sgd, rho=5.0).first_step()
    assert a.item() == pytest.approx(6.0, rel=1e-6)
    assert b.item() == pytest.approx(8.0, rel=1e-2)


def test_an_exception_in_the_second_pass_returns_the_weights():
    model = network()
    optimizer = SAM(model.parameters(), sgd)
    start = weights(model)
    backward(model)

    def broken_pass():
        with optimizer.climbed():
            assert not torch.equal(weights(model), start)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_pass()
    assert torch.equal(weights(model), start)
    twin = network()
    train(twin, SAM(twin.parameters(), sgd), 2)
    train(model, optimizer, 2)
    assert torch.equal(weights(model), weights(twin))


def test_the_rate_set_on_either_reaches_the_other():
    model = network()
    optimizer = SAM(model.parameters(), sgd)
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.base.param_groups[0]["lr"] == 0.0
    start = weights(model)
    train(model, optimizer, 1)
    assert torch.equal(weights(model), start)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.base.param_groups[0]["lr"] == 0.5


def test_resume_is_exact_and_momentum_matters():
    model = network(torch.float32)
    optimizer = SAM(model.parameters(), sgd, rho=0.2, adaptive=True)
    train(model, optimizer, 3, torch.float32)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 4, torch.float32)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(torch.float32, seed=5)
    other = SAM(resumed.parameters(), sgd)
    resumed.load_state_dict(saved["model"])
    without = copy.deepcopy(resumed)
    other.load_state_dict(saved["optimizer"])
    assert (other.rho, other.adaptive) == (0.2, True)
    train(resumed, other, 4, torch.float32)
    assert torch.equal(weights(resumed), weights(model))
    train(without, SAM(without.parameters(), sgd, rho=0.2, adaptive=True), 4, torch.float32)
    assert not torch.equal(weights(without), weights(model))


def test_misuse_is_refused():
    model = network()
    optimizer = SAM(model.parameters(), sgd)
    with pytest.raises(RuntimeError, match="first_step before"):
        optimizer.step()
    backward(model)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.step(lambda: None)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.first_step()
    with pytest.raises(ValueError, match="rho"):
        SAM(model.parameters(), sgd, rho=-1.0)
    with pytest.raises(ValueError, match="different parameters"):
        SAM(model.parameters(), sgd(network().parameters()))
    with pytest.raises(ValueError, match="already built; lr"):
        SAM(model.parameters(), sgd(model.parameters()), lr=0.1)
    with pytest.raises(ValueError, match="all parameter groups"):
        SAM([{"params": model.parameters(), "rho": 0.1}], torch.optim.SGD, lr=0.1)


def test_built_by_name_it_is_sgd_inside():
    model = network()
    config = TrainingConfig(epochs=1, learning_rate=0.1, optimizer="sam", weight_decay=0.01, rho=0.2, adaptive=True)
    optimizer = build_optimizer(config, model.parameters(), 8)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer.base, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 0.01, False)
    assert (optimizer.rho, optimizer.adaptive) == (0.2, True)


BATCHNORMS = [
    (nn.BatchNorm1d, {}, (6, 3)),
    (nn.BatchNorm1d, {"momentum": None}, (6, 3)),
    (nn.BatchNorm2d, {}, (6, 3, 2, 2)),
    (nn.BatchNorm2d, {"momentum": None}, (6, 3, 2, 2)),
    (nn.BatchNorm3d, {"affine": False}, (6, 3, 2, 2, 2)),
    (nn.BatchNorm2d, {"track_running_stats": False}, (6, 3, 2, 2)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), BATCHNORMS)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_batchnorm_changes_no_buffer_and_no_output(kind, options, shape, training):
    model = nn.Sequential(kind(3, **options))
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(shape, generator=generator) * 3 + 1)  # statistics that differ from the next batch's
    model.train(training)
    batch = torch.randn(shape, generator=generator)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with frozen_batchnorm(model):
        inside = model(batch)
        with frozen_batchnorm(model):
            model(batch)
        model(batch)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(batch), inside)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_batchnorm_leaves_the_layers_as_they_were(momentum):
    """After the contexts (one nested, one ended by an exception), the layer behaves as if they had not been used."""
    model, twin = nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    batches = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0))

    def broken_pass(batch):
        with frozen_batchnorm(model):
            with frozen_batchnorm(model):
                model(batch * 7)
            model(batch * 7)
            raise ZeroDivisionError

    for batch in batches:
        model(batch)
        twin(batch)
        with pytest.raises(ZeroDivisionError):
            broken_pass(batch)
    assert model.num_batches_tracked == 3
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, nn.LazyBatchNorm2d, nn.BatchNorm3d])
def test_every_kind_is_held(kind):
    layer = kind() if kind is nn.LazyBatchNorm2d else kind(3)
    if kind is nn.LazyBatchNorm2d:
        layer(torch.ones(2, 3, 1, 1))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert len(before) == 3
    with frozen_batchnorm(nn.Sequential(layer)):
        for buffer in layer.buffers():
            buffer.add_(1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_the_second_pass_runs_the_compiled_code_of_the_first():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).train()
    forward = torch.compile(model, backend=count)
    entry = OPTIMIZERS["sam"]
    optimizer = build_optimizer(TrainingConfig(epochs=1, learning_rate=0.1, optimizer="sam"), model.parameters(), 4)
    images = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        for _ in entry.passes(optimizer, model):
            forward(images).square().sum().backward()
        optimizer.step()
    assert len(graphs) == 1
    assert model[1].num_batches_tracked == 3


# ------------------------------------------------------------------------------ as in a plain loop of another project


def slow_sam_step(model, buffers, *, lr=0.1, momentum=0.9, rho=0.05):
    """One step of SAM with SGD, written out with full-batch gradients."""
    inputs, labels = data()
    parameters = list(model.parameters())

    def gradients():
        return torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), parameters)

    start = [p.detach().clone() for p in parameters]
    first = gradients()
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, first, strict=True):
            p.add_(g, alpha=float(rho / norm))
    second = gradients()
    with torch.no_grad():
        for p, w, g, buffer in zip(parameters, start, second, buffers, strict=True):
            buffer.mul_(momentum).add_(g)
            p.copy_(w - lr * buffer)


def part_losses(model):
    """The batch's mean loss as a sum over three parts of different sizes."""
    inputs, labels = data()
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        yield nn.functional.cross_entropy(model(inputs[part]), labels[part], reduction="sum") / len(labels)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_accumulation_and_loss_scaling_take_the_full_batch_step(scaled):
    """Both the perturbation and the step come from the accumulated gradients; a scale of 2^16 changes neither."""
    model, slow = network(), network()
    buffers = [torch.zeros_like(p) for p in slow.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for _ in range(3):
        slow_sam_step(slow, buffers)
        for loss in part_losses(model):
            scaler.scale(loss).backward()
        optimizer.first_step(zero_grad=True)
        for loss in part_losses(model):
            scaler.scale(loss).backward()
        if scaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.second_step()
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns if a schedule sees no step
            schedule.step()
        torch.testing.assert_close(weights(model), weights(slow), rtol=0, atol=1e-13)
    assert not scaled or scaler.get_scale() == 2.0**16


def test_a_closure_takes_both_steps_and_second_step_may_clear_gradients():
    model, slow = network(), network()
    buffers = [torch.zeros_like(p) for p in slow.parameters()]
    optimizer = SAM([{"params": model[0].parameters()}], torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": model[2].parameters()})
    slow_sam_step(slow, buffers)
    before = backward(model)
    after = optimizer.step(lambda: backward(model))
    assert after > before  # the loss at w + e
    torch.testing.assert_close(weights(model), weights(slow), rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match="call backward"):  # no step along the gradients of the last batch
        optimizer.step(lambda: backward(model))
    torch.testing.assert_close(weights(model), weights(slow), rtol=0, atol=1e-14)
    slow_sam_step(slow, buffers)
    backward(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step(zero_grad=False)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    optimizer.zero_grad()
    backward(model)
    optimizer.second_step(zero_grad=True)
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(weights(model), weights(slow), rtol=0, atol=1e-14)


def test_clipping_after_unscaling_once():
    """The second gradient is unscaled by hand, then clipped; the first is not unscaled."""
    plain, model = network(), network()
    plain_optimizer, optimizer = (SAM(m.parameters(), torch.optim.SGD, lr=0.1) for m in (plain, model))
    scaler = torch.amp.GradScaler("cpu")
    backward(plain)
    plain_optimizer.first_step()
    backward(plain)
    assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01) > 0.01
    plain_optimizer.second_step()
    for last in (False, True):
        inputs, labels = data()
        scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
        if not last:
            optimizer.first_step()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=1e-14)


@pytest.mark.parametrize("overflows", ["first", "second"])
def test_an_overflow_in_either_pass_restores_weights_and_takes_no_step(overflows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    inputs, labels = data()

    def scaled_pass(factor):
        scaler.scale(nn.functional.cross_entropy(model(inputs), labels) * factor).backward()

    for infinite in (True, False):  # after the overflow, a step with the lower scale
        start = weights(model)
        scaled_pass(float("inf") if infinite and overflows == "first" else 1.0)
        buffers = [buffer.clone() for buffer in model.buffers()]
        with optimizer.climbed(), frozen_batchnorm(model):
            scaled_pass(float("inf") if infinite and overflows == "second" else 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(weights(model), start) == infinite
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        assert scaler.get_scale() == 2.0**15
        optimizer.state_dict()  # not at w + e
