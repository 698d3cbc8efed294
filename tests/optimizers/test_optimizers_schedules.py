import math

import numpy as np
import pytest
import torch

from src.optimizers import SCHEDULES, rate

NAMES = ["const", "step", "exp", "cosine", "warmup_step", "warmup_exp", "warmup_cosine", "custom", "onecycle"]


def rates(name, epochs, lr=0.4, floor=0.0):
    """The rate halfway through each epoch, which is that of the whole epoch unless the rate changes every step."""
    return [rate(name, epoch, epochs, lr, floor, 0.5) for epoch in range(1, epochs + 1)]


def drops(name, epochs):
    values = rates(name, epochs)
    return [e for e in range(2, epochs + 1) if values[e - 1] < values[e - 2]]


def torch_rates(build, epochs, lr=0.4):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build(optimizer)
    values = []
    for _ in range(epochs):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_the_registry_holds_the_nine_schedules():
    assert list(SCHEDULES) == NAMES
    assert {n for n in NAMES if not SCHEDULES[n].depends_on_epochs} == {"const", "exp"}


@pytest.mark.parametrize("name", NAMES)
def test_depends_on_epochs_is_true_exactly_where_past_rates_change(name):
    changed = any(rates(name, 60) != rates(name, longer)[:60] for longer in (61, 90, 160))
    assert SCHEDULES[name].depends_on_epochs == changed


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("step", 160, [55, 109]),
        ("step", 80, [28, 55]),
        ("step", 20, [8, 15]),
        ("warmup_step", 160, [59, 113]),
        ("const", 160, []),
    ],
)
def test_rates_drop_at_the_published_epochs(name, epochs, expected):
    assert drops(name, epochs) == expected


def test_step_falls_to_a_tenth():
    assert [rate("step", e, 160, 0.4) for e in (54, 55, 109, 160)] == pytest.approx([0.4, 0.04, 0.004, 0.004])


@pytest.mark.parametrize("epochs", [7, 20, 80, 160])
def test_against_torch(epochs):
    lr_scheduler = torch.optim.lr_scheduler
    step = torch_rates(lambda o: lr_scheduler.StepLR(o, math.ceil(epochs / 3), 0.1), epochs)
    exp = torch_rates(lambda o: lr_scheduler.ExponentialLR(o, 0.98), epochs)
    cosine = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, epochs), epochs)
    floored = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, epochs, eta_min=0.01), epochs)
    assert rates("step", epochs) == pytest.approx(step, rel=1e-12)
    assert rates("exp", epochs) == pytest.approx(exp, rel=1e-12)
    assert rates("cosine", epochs) == pytest.approx(cosine, rel=1e-9)
    assert rates("cosine", epochs, floor=0.01) == pytest.approx(floored, rel=1e-9)


def test_cosine_with_a_floor_is_the_annealing_of_the_mpe_experiments():
    lr, low, epochs = 0.1, 1e-3, 30
    expected = [low + (lr - low) * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs)]
    assert rates("cosine", epochs, lr, low) == pytest.approx(expected, rel=1e-14)
    assert rate("cosine", 1, epochs, lr, low) == lr
    assert rate("cosine", epochs, epochs, lr, low) > low


def test_warmup_is_linear_and_the_rule_starts_after_it():
    for name in ("warmup_step", "warmup_exp"):
        assert rates(name, 160)[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rate("warmup_exp", 160, 160, 0.4) == pytest.approx(0.4 * 0.98**155)


def test_warmup_cosine_cycles():
    values = rates("warmup_cosine", 160, lr=1.0)
    for cycle in range(5):
        part = values[32 * cycle : 32 * cycle + 32]
        peak = 0.5**cycle
        assert part[0] == pytest.approx(0.01)
        assert part[2] == pytest.approx((0.01 + peak) / 2)
        assert part.index(max(part)) == 4
        assert part[4] == pytest.approx(peak)
        assert part[18] == pytest.approx((0.01 + peak) / 2)  # 14 of the 28 epochs of descent
        assert sorted(part[4:], reverse=True) == part[4:]


def test_custom_is_the_published_triangle():
    expected = [0.4 * e / 24 if e < 24 else 0.4 * (1 - (e - 24) / 136) for e in range(160)]
    assert rates("custom", 160) == pytest.approx(expected, rel=1e-14, abs=0)
    assert rates("custom", 160)[0] == 0.0


def test_custom_scales_with_rate_and_epochs():
    assert rates("custom", 160, lr=0.1) == pytest.approx([r / 4 for r in rates("custom", 160)])
    assert rates("custom", 320)[::2] == pytest.approx(rates("custom", 160))


def test_onecycle_is_a_triangle_over_the_steps_with_its_peak_at_a_quarter():
    epochs, steps, lr = 5, 8, 0.4
    found = [rate("onecycle", e, epochs, lr, progress=s / steps) for e in range(1, epochs + 1) for s in range(steps)]
    done = np.arange(epochs * steps) / (epochs * steps)
    assert found == pytest.approx(np.interp(done, [0, 0.25, 1], [0, lr, 0]), abs=1e-15)
    assert [name for name in NAMES if SCHEDULES[name].every_step] == ["onecycle"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6, 7, 160])
def test_every_rate_lies_between_floor_and_base(name, epochs):
    for floor in (0.0, 0.1):
        values = rates(name, epochs, floor=floor)
        assert all(floor <= value <= 0.4 for value in values)
        assert max(values) > floor


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_outside_the_run_is_refused(epoch):
    with pytest.raises(ValueError, match="epochs 1 to 2"):
        rate("const", epoch, 2, 0.1)
