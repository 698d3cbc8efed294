import copy

import pytest
import torch
from torch import nn

from src.errors import FlagError
from src.optimizers import OPTIMIZERS, build_optimizer, optimizer_names


def parameters():
    return nn.Linear(3, 2).parameters()


def test_the_registry_says_how_to_train():
    assert optimizer_names() == ["sgd", "adam", "adamw", "sam", "iblr"]
    assert [name for name, entry in OPTIMIZERS.items() if entry.passes == 2] == ["sam"]
    assert [name for name, entry in OPTIMIZERS.items() if entry.needs_sampling] == ["iblr"]
    for entry in OPTIMIZERS.values():
        assert entry.needs_sampling == hasattr(build_any(entry.name), "sampled_params")
        assert (entry.passes == 2) == hasattr(build_any(entry.name), "first_step")


def build_any(name, **options):
    return build_optimizer(name, parameters(), lr=0.1, num_examples=10, **options)


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
    ("name", "options", "message"),
    [
        ("sgdd", {}, "optimizer 'sgdd': unknown; choose from sgd, adam, adamw, sam, iblr"),
        ("sgd", {"lr": 0.0}, "lr 0.0: must be a finite number greater than 0"),
        ("sgd", {"lr": float("nan")}, "lr "),
        ("adam", {"lr": float("inf")}, "lr "),
        ("sgd", {"momentum": 1.0}, "momentum 1.0: must be a finite number at least 0 and below 1"),
        ("sgd", {"weight_decay": -1e-4}, "weight_decay"),
        ("sam", {"rho": -0.1}, "rho"),
        ("iblr", {"delta": 0.0}, "delta"),
        ("sgd", {"delta": 2.0}, "delta: .* leave it out"),
        ("iblr", {"hess_init": 0.0}, "hess_init"),
        ("iblr", {"delta": 2.0, "weight_decay": 0.1}, "give one of them"),
    ],
)
def test_bad_flags_are_named(name, options, message):
    with pytest.raises(FlagError, match=message):
        build_optimizer(name, parameters(), **{"lr": 0.1, "num_examples": 10, **options})


def test_iblr_needs_the_number_of_examples():
    with pytest.raises(ValueError, match="num_examples"):
        build_optimizer("iblr", parameters(), lr=0.1)
