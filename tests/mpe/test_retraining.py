"""Retraining compared with plain loops."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from small_retraining import REMOVED, SETTINGS, SIZE, N, logits_of, material, run
from torch import nn

from mpe.retraining import RetrainSettings, retrain
from mpe.schedules import replay_generator
from src.errors import TrainingError
from src.models import build_model


def plainly(orders, settings=SETTINGS, deltas=None):
    """Train each model separately with torch's SGD on the given batches (fixed, or a function of the epoch)."""
    base, images, labels = material()
    found = []
    for number, left in enumerate(REMOVED):
        model = copy.deepcopy(base)
        delta = settings.delta if deltas is None else deltas[number]
        decay = delta / (N - len(left))
        steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, settings.epochs, settings.lr_min)
        for epoch in range(1, settings.epochs + 1):
            for batch in orders(number, epoch):
                if len(batch):
                    steps.zero_grad()
                    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                    steps.step()
            schedule.step()
        found.append(model(images).detach())
    return torch.stack(found).numpy()


@cache
def replayed():
    """Torch's shuffling loaders, after the draws of a script that builds no model and reads the data six times."""
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(6):
            list(torch.utils.data.DataLoader(torch.arange(3)))
        state = torch.get_rng_state()
        for place, left in enumerate(REMOVED):
            if place <= 1:  # the control draws what the first retraining draws
                torch.set_rng_state(state)
            remaining = torch.tensor([i for i in range(N) if i not in left])
            found[place] = list(torch.utils.data.DataLoader(remaining, batch_size=4, shuffle=True))
            list(torch.utils.data.DataLoader(torch.arange(3)))  # the evaluation in between
    return found


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_replayed_retraining_is_that_of_plain_loops(vectorised, chunk):
    settings = RetrainSettings(**{**vars(SETTINGS), "shuffle": "replay"})
    before = torch.get_rng_state()
    found = run(settings, chunk=chunk, vectorised=vectorised, replay=replay_generator(lambda: None), extra_draws=1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(found["logits"], plainly(lambda number, epoch: replayed()[number]), rtol=0, atol=1e-12)
    assert found["number"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_given_order_of_each_epoch_and_a_delta_of_each_network(vectorised):
    deltas = [0.0, 1.0, 2.0, 3.0, 4.0]

    def permutation(epoch):
        return torch.arange(N).roll(epoch)

    def batches(number, epoch):
        order = permutation(epoch).tolist()
        return [[i for i in order[k : k + 4] if i not in REMOVED[number]] for k in range(0, N, 4)]

    found = run(vectorised=vectorised, deltas=deltas, permutation=permutation)
    np.testing.assert_allclose(found["logits"], plainly(batches, deltas=deltas), rtol=0, atol=1e-12)


def test_shuffles_differ_and_seeds_matter():
    seeded, again = run()["logits"], run(chunk=4)["logits"]
    np.testing.assert_allclose(seeded, again, rtol=0, atol=1e-12)
    shared = run(RetrainSettings(**{**vars(SETTINGS), "shuffle": "shared"}))["logits"]
    other = run(RetrainSettings(**{**vars(SETTINGS), "seed": 4}))["logits"]
    for changed in (shared, other):
        assert (np.abs(changed - seeded).max((1, 2)) > 1e-6).all()
    # a model is the same alone or in an ensemble
    np.testing.assert_allclose(run(removed=REMOVED[2:3])["logits"][0], seeded[2], rtol=0, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = material()[0]
    before = copy.deepcopy(model.state_dict())
    run(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_loss_that_is_not_finite_says_what_to_change(vectorised):
    settings = RetrainSettings(**{**vars(SETTINGS), "learning_rate": 1e200, "lr_min": 0.0})
    with pytest.raises(
        TrainingError, match=r"epoch \d of retraining model 1 of 5; try a lower learning rate.*1e\+200"
    ):
        run(settings, vectorised=vectorised)


def test_images_may_be_in_a_cut_out_layout():
    base, images, labels = material()
    wide = torch.zeros(N, 1, SIZE, SIZE + 2, dtype=torch.float64)
    wide[..., :SIZE] = images
    found = retrain(base, wide[..., :SIZE], labels, REMOVED, SETTINGS, measure=logits_of(images), chunk=2)
    assert np.array_equal(found["logits"], run()["logits"])


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer 'sam' is not one of"):
        run(RetrainSettings(**{**vars(SETTINGS), "optimizer": "sam"}))


def test_the_layout_of_images_and_model_changes_nothing_but_roundings():
    model = build_model("cnn_deepobs", 3, 3, 32, seed=0).double()
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(12, 3, 32, 32, generator=draw, dtype=torch.float64), torch.arange(12) % 3
    settings = RetrainSettings(epochs=2, batch_size=5, learning_rate=0.05, lr_min=0.0, delta=1.0)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        rows = retrain(
            model.to(memory_format=layout),
            images.to(memory_format=layout),
            labels,
            [[0], [3, 7]],
            settings,
            measure=lambda ensemble, numbers: {
                "logits": ensemble.logits(images).transpose(0, 1).numpy()[: len(numbers)]
            },
            vectorised=False,
        )
        found.append(rows["logits"])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-11)
