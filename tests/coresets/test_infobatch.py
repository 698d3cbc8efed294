""""""

import itertools
import logging
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from support import write_blobs
from torch import nn

from src import rng
from src.coresets.infobatch import InfoBatchPlan, draw, infobatch, split_by_mean
from src.coresets.inputs import LastLayer, Options, Selection, SelectionInputs, make_groups
from src.coresets.registry import find_method
from src.datasets import Batches, load_dataset
from src.errors import FileError
from src.training import ProcessGroup, RunFiles, Trainer, TrainingConfig, run_training


def material(losses, labels=None, seed: int = 1) -> SelectionInputs:
    """Two logits whose cross-entropy for class 0 is the given loss (mirrored for class 1)."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    labels = np.zeros(len(losses), dtype=np.int64) if labels is None else np.asarray(labels)
    margin = -torch.log(torch.expm1(losses))
    logits = torch.stack([margin, torch.zeros_like(margin)], dim=1)
    mirrored = torch.from_numpy(labels).bool()
    logits[mirrored] = logits[mirrored].flip(1)
    network = LastLayer(logits, torch.from_numpy(labels))
    np.testing.assert_allclose(network.losses.numpy(), losses, rtol=1e-12)
    return SelectionInputs(labels, 2, seed, layers=[network])


def select(given: SelectionInputs, fraction: float, per_class: bool = True) -> Selection:
    return infobatch(given, make_groups(given.labels, 2, fraction=fraction, per_class=per_class), Options())


class Scripted:
    """A fake generator that returns the given draws."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places = list(places)

    def choice(self, values: np.ndarray, count: int, replace: bool) -> np.ndarray:
        assert not replace
        assert count == len(self.places)
        return values[self.places]


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_the_expected_gradient_of_one_draw_is_the_full_one(room):
    losses = np.array([0.1, 3.0, 0.2, 0.3, 2.0, 0.1])  # four below the mean
    gradients = np.random.default_rng(0).standard_normal((6, 3))
    sums = []
    for places in itertools.combinations(range(4), room):
        chosen, weights = draw(losses, 2 + room, Scripted(places))
        assert {1, 4} <= set(chosen.tolist())
        assert weights.sum() == pytest.approx(6)
        sums.append(weights @ gradients[chosen])
    np.testing.assert_allclose(np.mean(sums, axis=0), gradients.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_all_at_or_above_the_mean_are_kept_and_the_rest_weigh_more(caplog):
    losses = [0.1, 3.0, 0.2, 0.3, 2.0, 0.1, 0.15, 0.25, 0.12, 0.11]
    selection = select(material(losses), 0.4)
    weights = dict(zip(selection.indices.tolist(), selection.weights, strict=True))
    assert len(weights) == 4
    assert weights.pop(1) == weights.pop(4) == 1
    assert list(weights.values()) == [4.0, 4.0]  # 8 below the mean, 2 of them kept
    assert selection.weighted
    assert not caplog.records


def test_each_group_has_its_own_mean():
    losses, labels = [0.1, 0.2, 0.9, 5.0, 6.0, 10.0], [0, 0, 0, 1, 1, 1]
    selection = select(material(losses, labels), 0.6)
    assert {2, 5} <= set(selection.indices.tolist())
    assert selection.weights.tolist().count(2.0) == 2
    everywhere = select(material(losses, labels), 0.5, per_class=False)
    assert {3, 4, 5} <= set(everywhere.indices.tolist())


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_too_many_above_the_mean_keep_a_random_part_with_a_notice(caplog, fraction):
    losses = [0.01, *[2.0] * 8, 0.02]
    with caplog.at_level(logging.WARNING):
        selection = select(material(losses), fraction)
    assert len(selection.indices) == round(10 * fraction)
    assert set(selection.indices.tolist()) <= set(range(1, 9))
    assert not selection.weighted
    (record,) = caplog.records
    assert "1 of 1 groups" in record.getMessage()
    assert "not the full one" in record.getMessage()


def test_everything_is_kept_with_weight_1_and_without_a_notice(caplog):
    selection = select(material([0.1, 2.0, 0.3, 1.0]), 1.0)
    assert selection.indices.tolist() == [0, 1, 2, 3]
    assert not selection.weighted
    assert not caplog.records


def test_equal_losses_are_at_their_mean():
    losses = np.full(7, 0.1)
    high, low = split_by_mean(losses)
    assert len(high) == 7
    assert not len(low)
    places, weights = draw(losses, 3, np.random.default_rng(0))
    assert len(set(places.tolist())) == 3
    assert (weights == 1).all()


def test_a_seed_repeats_its_draw():
    losses = np.random.default_rng(0).exponential(size=60) + 0.01
    first, again, other = (select(material(losses, seed=seed), 0.7).indices for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_a_group_of_one():
    selection = select(material([0.5, 0.2, 0.4], [0, 1, 1]), 0.01)
    assert len(selection.indices) == 2
    assert 0 in selection.indices


EPOCHS = 8
DEFAULTS = {"epochs": EPOCHS, "learning_rate": 0.01, "lr_sched": "const", "precision": "fp64"}


def anything(count):
    return True


def make_plan(indices, prune_ratio=0.5, epochs=EPOCHS, **options):
    return InfoBatchPlan(torch.as_tensor(indices), prune_ratio=prune_ratio, epochs=epochs, seed=5, **options)


def told(plan, indices, losses):
    """The plan after an epoch with these losses."""
    plan.record(torch.as_tensor(indices), torch.as_tensor(losses, dtype=torch.float64))
    plan.end_epoch(ProcessGroup())
    return plan


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    path = write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=40)
    train, test = load_dataset(f"npz:{path}", "unused")
    return train.subset(torch.arange(4, 34)), test  # 30 examples


@pytest.fixture
def make_trainer(blobs):
    """Build a float64 trainer of a tiny model; with ``plan=None``, it uses all examples."""
    train, test = blobs

    def make(plan, batch_size=7, model=None, after_step=(), **settings):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = (model or (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))))().double()
        cut = {"normalization": train.entry.normalizations["samis"], "dtype": torch.float64}
        config = TrainingConfig(
            **{"epochs": EPOCHS, "learning_rate": 0.01, "lr_sched": "const", "precision": "fp64", **settings}
        )
        batches = Batches(train, batch_size, order="shuffled", seed=3, **cut)
        return Trainer(model, batches, Batches(test, 8, **cut), config, plan=plan, after_step=after_step)

    return make


def weights_of(trainer):
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.state_dict().values()])


# ------------------------------------------------------------------------------------------------- the choice


def test_the_entry_is_dynamic_and_weighted():
    entry = find_method("infobatch_dynamic")
    assert entry.dynamic
    assert entry.weighted
    assert entry.option_names == ("infobatch_delta",)


def test_the_first_epoch_and_the_annealed_ones_visit_all():
    plan = make_plan(range(10))
    for epoch in range(1, EPOCHS + 1):
        positions, weights = plan.choose(epoch, anything)
        pruned = epoch not in (1, EPOCHS)  # 8 * 0.875 = 7 epochs are pruned
        assert (len(positions) < 10) == pruned
        assert bool((weights != 1).any()) == pruned
        told(plan, range(10), np.arange(10.0))


@pytest.mark.parametrize(
    ("epochs", "delta", "pruned"), [(200, 0.875, 175), (10, 0.875, 8), (100, 0.29, 29), (3, 1.0, 3), (3, 0.0, 0)]
)
def test_how_many_epochs_are_pruned(epochs, delta, pruned):
    assert make_plan(range(2), epochs=epochs, delta=delta).pruned_epochs == pruned


@pytest.mark.parametrize(
    ("ratio", "low", "kept"), [(0.5, 9, 4), (0.9, 10, 1), (0.7, 10, 3), (0.0, 7, 7), (0.99, 10, 1)]
)
def test_low_losses_are_kept_in_part_and_weigh_more(ratio, low, kept):
    losses = np.concatenate([np.linspace(0, 0.1, low), [5.0, 6.0, 7.0]])
    plan = told(make_plan(range(low + 3), ratio), range(low + 3), losses)
    positions, weights = plan.choose(2, anything)
    assert len(positions) == kept + 3
    assert {low, low + 1, low + 2} <= set(positions.tolist())
    assert weights[low:].tolist() == [1.0, 1.0, 1.0]
    drawn = positions[positions < low]
    assert weights[drawn].tolist() == [low / kept] * kept
    assert weights[positions].sum().item() == pytest.approx(low + 3, rel=1e-15)


def test_losses_at_the_mean_are_not_low_and_those_not_seen_stay():
    plan = told(make_plan(range(4)), range(4), [1.0, 2.0, 2.0, 3.0])
    positions, weights = plan.choose(2, anything)
    assert positions.tolist() == [0, 1, 2, 3]  # 2 is not below 2, and at least one low-loss example is kept
    assert weights.tolist() == [1.0] * 4
    told(plan, [3], [0.5])
    assert plan.losses.tolist() == [1.0, 2.0, 2.0, 0.5]


def test_equal_losses_prune_without_emptying_an_epoch():
    plan = told(make_plan(range(7), 0.99), range(7), [0.1] * 7)  # however the mean is rounded
    positions, weights = plan.choose(2, anything)
    assert len(positions) >= 1
    assert weights[positions].sum().item() == pytest.approx(7)


def test_draws_belong_to_original_indices_and_epochs():
    indices = np.array([3, 8, 11, 20, 21, 30, 37, 44])
    losses = np.array([0.1] * 7 + [9.0])
    plan = told(make_plan(indices), indices, losses)
    for epoch in (2, 3):
        numbers = rng.numpy_generator(5, epoch, "infobatch").random(50)  # more than needed: the same numbers
        expected = sorted(np.argsort(numbers[indices[:7]])[:3].tolist())
        assert plan.choose(epoch, anything)[0].tolist() == [*expected, 7]
    again = told(make_plan(indices), indices, losses)
    assert torch.equal(plan.choose(3, anything)[0], again.choose(3, anything)[0])
    counts = Counter(p for e in range(1, 701) for p in plan._draw(torch.arange(7), 3, e).tolist())
    assert sum(counts.values()) == 2100
    assert all(abs(counts[p] - 2100 / 7) < 5 * math.sqrt(700 * 3 / 7 * 4 / 7) for p in range(7))


def test_an_example_more_is_kept_where_the_last_batch_would_be_too_small():
    plan = told(make_plan(range(20)), range(20), [0.1] * 10 + [9.0] * 10)
    for misfits, size in (((), 15), ((15,), 16), ((15, 16), 17), (range(15, 20), 20)):
        positions, weights = plan.choose(2, lambda count, misfits=misfits: count not in misfits)
        assert len(positions) == size
        assert weights[positions].sum().item() == pytest.approx(20, rel=1e-15)


# ------------------------------------------------------------------------------------------------ the training


def test_the_expected_gradient_is_the_full_one(make_trainer, blobs, monkeypatch):
    """For all draws of an epoch with one batch, a step with learning rate 1 is the gradient of sum(w l) / b."""
    indices = blobs[0].indices
    low, losses = 6, torch.full((30,), 4.0)
    losses[[2, 3, 11, 17, 23, 29]] = 0.5
    settings = {"batch_size": 30, "learning_rate": 1.0, "momentum": 0.0}

    def step(plan):
        trainer = make_trainer(plan, **settings)
        before = weights_of(trainer).clone()
        trainer.train_epoch(1)
        return (before - weights_of(trainer)) * trainer.history[0].get("examples", 30)

    full, steps = step(None), []
    for chosen in combinations(range(low), 2):
        plan = told(make_plan(indices, 0.6), indices, losses)
        monkeypatch.setattr(plan, "_draw", lambda low, kept, epoch, c=chosen: low[list(c)])
        steps.append(step(plan))
    assert len(steps) == 15
    assert (steps[0] - full).norm() > 1e-2 * full.norm()
    torch.testing.assert_close(torch.stack(steps).mean(0), full, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_training_is_the_slow_loop(make_trainer, blobs, ratio):
    indices = blobs[0].indices
    trainer, twin = make_trainer(make_plan(indices, ratio)), make_trainer(None)
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.01, momentum=0.9)
    stored, sizes = {int(i): 3.0 for i in indices}, []
    for epoch in range(1, EPOCHS + 1):
        weight = dict.fromkeys(stored, 1.0)
        if epoch <= 7:
            mean = sum(stored.values()) / 30
            low = [i for i in stored if stored[i] < mean]
            numbers = rng.numpy_generator(5, epoch, "infobatch").random(1000)
            kept = sorted(low, key=lambda i: numbers[i])[: math.floor((1 - ratio) * len(low) + 1e-9)]
            for i in low:
                weight[i] = len(low) / len(kept) if i in kept else 0.0
        positions = [p for p, i in enumerate(indices.tolist()) if weight[i]]
        sizes.append(len(positions))
        for batch in twin.train_batches.epoch(epoch, torch.tensor(positions)):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(twin.model(batch.images), batch.labels, reduction="none")
            sum(weight[int(i)] * loss / len(losses) for i, loss in zip(batch.indices, losses, strict=True)).backward()
            optimizer.step()
            stored.update(zip(batch.indices.tolist(), losses.tolist(), strict=True))
    trainer.fit()
    assert [record["examples"] for record in trainer.history] == sizes
    assert sizes[0] == sizes[-1] == 30 > max(sizes[1:-1])
    torch.testing.assert_close(weights_of(trainer), weights_of(twin), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(trainer.plan.losses, torch.tensor(list(stored.values())).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_pruning_nothing_is_training_on_all_bit_for_bit(make_trainer, blobs, optimizer):
    plain, planned = make_trainer(None, optimizer=optimizer), make_trainer(
        make_plan(blobs[0].indices, 0.0), optimizer=optimizer
    )  # fmt: skip
    plain.fit()
    planned.fit()
    assert torch.equal(weights_of(plain), weights_of(planned))
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    for a, b in zip(plain.history, planned.history, strict=True):
        assert [a[name] for name in names] == [b[name] for name in names]


def batchnorm_of_one_value():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))


def test_no_epoch_leaves_batchnorm_a_single_example(make_trainer, blobs, monkeypatch):
    answers = []

    def noting(count, fits=Trainer._fits):
        answers.append(fits(trainer, count))
        return answers[-1]

    trainer = make_trainer(make_plan(blobs[0].indices), batch_size=2, model=batchnorm_of_one_value)
    monkeypatch.setattr(trainer, "_fits", noting)
    trainer.fit()
    assert False in answers
    assert all(record["examples"] % 2 == 0 for record in trainer.history)


class KilledError(Exception):
    pass


def test_an_interrupted_run_ends_with_the_same_bits(make_trainer, blobs, tmp_path):
    def kill(trainer, epoch, step):
        if epoch == 5 and step == trainer.steps + 2:
            raise KilledError

    def run(name, epochs=EPOCHS, resume=True, **options):
        trainer = make_trainer(make_plan(blobs[0].indices, epochs=epochs), epochs=epochs, **options)
        files = RunFiles(tmp_path / name / "ckpts", tmp_path / name / "resume")
        run_training(trainer, files, trainer.config.as_dict(), {"format": "network-1"}, resume=resume)
        return trainer

    whole = run("whole", model=batchnorm_of_one_value)
    with pytest.raises(KilledError):
        run("killed", model=batchnorm_of_one_value, after_step=(kill,))
    resumed = run("killed", model=batchnorm_of_one_value)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert torch.equal(whole.plan.losses, resumed.plan.losses)
    assert [r["train_loss"] for r in whole.history] == [r["train_loss"] for r in resumed.history]
    with pytest.raises(FileError, match=r"different settings: epochs \(8 vs. 9\)"):
        run("killed", epochs=9, model=batchnorm_of_one_value)


def test_when_epochs_may_be_raised():
    assert make_plan(range(3)).depends_on_epochs
    assert not make_plan(range(3), delta=1.0).depends_on_epochs
    assert not make_plan(range(3), 0.0).depends_on_epochs
