import copy

import pytest
import torch
from torch import nn

from src.errors import ArgumentError
from src.models.base import load_optimizer
from src.optimizers import OPTIMIZERS, build_optimizer, torch_optimizer
from src.training import TrainingConfig


def parameters():
    return nn.Linear(3, 2).parameters()


def build_any(name, **settings):
    return build_optimizer(TrainingConfig(epochs=1, learning_rate=0.1, optimizer=name, **settings), parameters(), 10)


def test_the_registry_says_how_to_train():
    model = nn.Linear(3, 2)
    for name, entry in OPTIMIZERS.items():
        optimizer = build_any(name)
        weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        moved = []
        for _ in entry.passes(optimizer, model):
            params = optimizer.param_groups[0]["params"]
            moved.append(any(not torch.equal(p, w) for p, w in zip(params, weights, strict=True)))
            for p in params:
                p.grad = torch.ones_like(p)
        optimizer.step()
        assert moved == {"sam": [False, True], "iblr": [True]}.get(name, [False])
        assert entry.needs_sampling == (name == "iblr")


def test_sgd_has_momentum_and_nothing_else():
    group = build_any("sgd").param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["dampening"]) == (0.9, False, 0, 0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_keeps_its_defaults(name):
    group = build_any(name, weight_decay=0.3).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.3)
    assert group["decoupled_weight_decay"] == (name == "adamw")


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_round_trip_and_rate(name):
    optimizer = build_any(name)
    state = copy.deepcopy(optimizer.state_dict())
    other = build_any(name)
    optimizer.param_groups[0]["lr"] = 0.7
    other.load_state_dict(state)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert other.param_groups[0]["lr"] == 0.1


KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SETTINGS = {"sgd": {"momentum": 0.9, "nesterov": True}, "adam": {}, "adamw": {}}
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.0}  # bfloat16 is not fused


def weights_to_train(dtype, layout):
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 2, 2), (5,), (3, 4))
    values = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    values[0] = values[0].to(memory_format=layout)
    return [nn.Parameter(value) for value in values]


def take_steps(optimizer, parameters, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=draw))
        optimizer.step()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", KINDS)
def test_fused_steps_are_those_of_torch(name, dtype):
    """Compare step by step; then continue from the state of an unfused run with a different memory format."""
    settings = {"lr": 0.1, "weight_decay": 0.1, **SETTINGS[name]}
    plain = weights_to_train(dtype, torch.contiguous_format)
    layout = torch.contiguous_format if dtype == torch.bfloat16 else torch.channels_last
    ours = weights_to_train(dtype, layout)
    expected, optimizer = KINDS[name](plain, **settings), torch_optimizer(name, ours, **settings)
    assert optimizer.param_groups[0]["fused"] is (True if dtype != torch.bfloat16 else None)
    take_steps(expected, plain, range(5))
    take_steps(optimizer, ours, range(5))
    close = {"rtol": 0, "atol": TOLERANCES[dtype]}
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **close)
    with torch.no_grad():
        for p, q in zip(ours, plain, strict=True):
            p.copy_(q)
    continued = torch_optimizer(name, ours, **settings)
    load_optimizer(continued, copy.deepcopy(expected.state_dict()))
    assert continued.param_groups[0]["fused"] == optimizer.param_groups[0]["fused"]
    take_steps(expected, plain, range(5, 10))
    take_steps(continued, ours, range(5, 10))
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **close)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "sam"])
def test_states_are_those_of_unfused_optimizers(name):
    """Older versions, which do not support fused steps, continue from these states."""
    model = nn.Linear(3, 2)
    plain = KINDS[name if name in KINDS else "sgd"](model.parameters(), lr=0.1)
    optimizer = build_optimizer(TrainingConfig(epochs=1, optimizer=name), model.parameters(), 10)
    state = optimizer.state_dict()
    state = state["base"] if name == "sam" else state
    assert state["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()
    assert state["param_groups"][0]["fused"] is None
    assert optimizer.param_groups[0]["fused"]


def test_a_device_without_fused_steps_goes_without():
    parameters = [nn.Parameter(torch.zeros(3, device="meta"))]
    assert not torch_optimizer("adam", parameters, lr=0.1).param_groups[0]["fused"]


@pytest.mark.parametrize(
    ("name", "wrong", "values"),
    [
        ("learning_rate", {}, (0.0, float("nan"), float("inf"))),
        ("lr_sched", {}, ("never",)),
        ("lr_min", {}, (-0.1, 0.2, float("nan"))),
        ("optimizer", {}, ("sgdd",)),
        ("momentum", {}, (1.0, -0.1)),
        ("weight_decay", {}, (-1e-4,)),
        ("rho", {"optimizer": "sam"}, (-0.1,)),
        ("delta", {"optimizer": "iblr"}, (0.0,)),
        ("delta", {"optimizer": "iblr", "weight_decay": 0.1}, (2.0,)),
        ("delta", {"optimizer": "sgd"}, (2.0,)),
        ("hess_init", {"optimizer": "iblr"}, (0.0,)),
        ("nesterov", {"optimizer": "adam"}, (True,)),
        ("nesterov", {"momentum": 0.0}, (True,)),
    ],
)
def test_bad_settings_are_named(name, wrong, values):
    for value in values:
        with pytest.raises(ArgumentError, match=f"^{name}"):
            TrainingConfig(**{"learning_rate": 0.1, **wrong, name: value})


@pytest.mark.parametrize("name", list(KINDS))
def test_a_parameter_whose_gradient_comes_late(name):
    settings = {"momentum": 0.9} if name == "sgd" else {}
    ours, theirs = ([nn.Parameter(torch.arange(3.0)) for _ in range(2)] for _ in range(2))
    optimizers = torch_optimizer(name, ours, lr=0.1, **settings), KINDS[name](theirs, lr=0.1, **settings)
    for step in range(4):
        for early, late in (ours, theirs):
            early.grad = torch.ones(3)
            late.grad = torch.ones(3) if step > 1 else None
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_sam_takes_the_steps_of_its_base_optimizer_with_nesterov_momentum():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    config = TrainingConfig(optimizer="sam", learning_rate=0.1, nesterov=True)
    optimizer = build_optimizer(config, [weight], 10)
    twin, momentum = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        for _ in OPTIMIZERS["sam"].passes(optimizer, torch.nn.Module()):
            weight.grad = 2 * weight.detach()  # the loss |w|^2
        optimizer.step()
        climbed = twin + config.rho * twin / (twin.norm() + 1e-12)
        momentum = 0.9 * momentum + 2 * climbed
        twin = twin - 0.1 * (2 * climbed + 0.9 * momentum)
        torch.testing.assert_close(weight.detach(), twin, rtol=1e-9, atol=0)
