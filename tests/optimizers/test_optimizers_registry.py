import copy

import pytest
import torch
from torch import nn

from src.errors import ArgumentError
from src.optimizers import OPTIMIZERS, build_optimizer
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
        ("nesterov", {"optimizer": "sam"}, (True,)),
        ("nesterov", {"momentum": 0.0}, (True,)),
    ],
)
def test_bad_settings_are_named(name, wrong, values):
    for value in values:
        with pytest.raises(ArgumentError, match=f"^{name}"):
            TrainingConfig(**{"learning_rate": 0.1, **wrong, name: value})
