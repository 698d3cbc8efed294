"""Schedules of retraining: constructed by hand, and compared with torch's loaders."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mpe.schedules import (
    own_schedules,
    replay_generator,
    seeded_permutation,
    shared_schedules,
    shuffle_seeds,
)
from src.models import MODELS, build_model

TOTAL, BATCH = 23, 4


def positions(*entries):
    return [np.array(entry, dtype=np.int64) for entry in entries]


def visited(orders, member, batch_size=BATCH):
    """The batches of one member as lists, without padding."""
    found = []
    for step in range(orders.steps(batch_size)):
        batch = orders.batch(step, batch_size)
        row = batch.index if orders.shared else batch.index[member]
        if batch.active is not None and not batch.active[member]:
            assert not batch.weights[member].any()
            continue
        found.append(row.tolist() if batch.weights is None else row[batch.weights[member]].tolist())
    return found


def original(removed, *, seed, name, extra):
    """The batches of each retraining in the papers' scripts: seed, build the model, iterate over loaders."""
    torch.manual_seed(seed)
    MODELS[name].build(4, 1, 8)
    everything = torch.arange(TOTAL)
    test = DataLoader(torch.arange(5), batch_size=2)
    for _ in range(6):
        list(DataLoader(everything, batch_size=BATCH))
    found = []
    for left in removed:
        remaining = torch.tensor([i for i in range(TOTAL) if i not in set(left)])
        found.append([batch.tolist() for batch in DataLoader(remaining, batch_size=BATCH, shuffle=True)])
        for _ in range(extra):
            list(test)
    return found


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("name", ["small_mlp", "lenet"])
def test_replay_repeats_the_loaders_batches(name, extra):
    removed = [[7], [3], list(range(0, TOTAL, 5)), [22]]
    with torch.random.fork_rng():
        expected = original(removed, seed=1, name=name, extra=extra)
    before = torch.get_rng_state()
    generator = replay_generator(lambda: MODELS[name].build(4, 1, 8), seed=1)
    wanted = positions((), *removed)
    for _ in range(2):  # the given generator is not advanced
        seeds = shuffle_seeds(wanted, "replay", 0, replay=generator, extra_draws=extra)
        orders = own_schedules(wanted, seeds, TOTAL)
        assert [visited(orders, member) for member in range(1, 5)] == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds[0] == seeds[1]  # the control has its own shuffle and does not advance the draws
    assert sorted(chain(*visited(orders, 0))) == list(range(TOTAL))


def test_replay_needs_a_build_that_does_not_seed():
    plain = replay_generator(lambda: MODELS["small_mlp"].build(4, 1, 8))
    seeding = replay_generator(lambda: build_model("small_mlp", 4, 1, 8, seed=1))
    assert not torch.equal(plain.get_state(), seeding.get_state())


def test_control_of_a_replay_does_not_depend_on_its_place():
    generator = replay_generator(lambda: None)
    first = shuffle_seeds(positions((), [1], [2]), "replay", 0, replay=generator)
    last = shuffle_seeds(positions([1], [2], ()), "replay", 0, replay=generator)
    assert first == [last[2], last[0], last[1]]


def test_seeded_orders_depend_on_what_is_removed_alone():
    removed = positions((), [4], [9], [9, 4])
    seeds = shuffle_seeds(removed, "seeded", 3)
    backwards = shuffle_seeds(removed[::-1], "seeded", 3)
    assert seeds == backwards[::-1]
    assert len(set(seeds)) == 4
    assert not set(seeds) & set(shuffle_seeds(removed, "seeded", 4))
    orders = own_schedules(removed, seeds, TOTAL)
    assert orders.table.dtype == torch.int32
    assert orders.table.shape == (4, TOTAL)
    assert orders.counts.tolist() == [23, 22, 22, 21]
    for member, left in enumerate(removed):
        batches = visited(orders, member)
        assert sorted(chain(*batches)) == sorted(set(range(TOTAL)) - set(left.tolist()))
        assert [len(batch) for batch in batches[:-1]] == [BATCH] * (len(batches) - 1)
        assert list(chain(*batches)) != sorted(chain(*batches))
    alone = own_schedules(removed[2:3], seeds[2:3], TOTAL)
    assert visited(alone, 0) == visited(orders, 2)


def test_members_with_fewer_examples_rest_at_the_end():
    removed = positions([], range(15))  # 23 examples in 6 steps of 4, 8 in 2
    orders = own_schedules(removed, [1, 2], TOTAL)
    steps = [orders.batch(step, BATCH) for step in range(orders.steps(BATCH))]
    assert [batch.index.shape[1] for batch in steps] == [4, 4, 4, 4, 4, 3]
    assert [batch.weights is None for batch in steps] == [True, True, False, False, False, False]
    assert all(batch.active.tolist() == [True, False] for batch in steps[2:])
    odd = own_schedules(positions([], range(16)), [1, 2], TOTAL).batch(1, BATCH)  # 7 examples: the second batch has 3
    assert odd.active is None
    assert odd.weights.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_shared_orders_leave_out_by_weight():
    removed = positions((), [4], range(8))
    permutation = seeded_permutation(TOTAL, 5)
    orders = shared_schedules(removed, permutation)
    assert orders.shared
    assert orders.table.dtype == torch.int32
    assert orders.counts.tolist() == [23, 22, 15]
    order = permutation.tolist()
    for member, left in enumerate(removed):
        cut = [[i for i in order[k : k + BATCH] if i not in left] for k in range(0, TOTAL, BATCH)]
        assert visited(orders, member) == [batch for batch in cut if batch]
    everyone = shared_schedules(positions((), ()), permutation)
    assert everyone.kept is None
    assert everyone.batch(0, BATCH).weights is None
    assert len(set(shuffle_seeds(removed, "shared", 3))) == 1


def test_a_member_without_examples_in_a_shared_batch_is_not_active():
    batch = shared_schedules(positions((), range(4)), torch.arange(TOTAL)).batch(0, BATCH)
    assert batch.active.tolist() == [True, False]
