"""The training loop compared with a plain PyTorch loop: weights, schedule and records."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from src.errors import ArgumentError, TrainingError
from src.optimizers import rate
from src.training import ProcessGroup


def plain_epochs(trainer, model, step):
    """A plain loop over the same batches; ``step(model, images, labels, weights)``."""
    for epoch in range(1, trainer.config.epochs + 1):
        model.train()
        lr = rate(trainer.config.lr_sched, epoch, trainer.config.epochs, trainer.config.learning_rate)
        for batch in trainer.train_batches.epoch(epoch, weights=trainer.weights):
            step(model, lr, batch.images, batch.labels, batch.weights)


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_sgd_is_the_plain_loop_with_weights(make_trainer):
    weights = torch.linspace(0.1, 2, 200)
    trainer = make_trainer(dropout=0.0, weights=weights, dtype=torch.float64, precision="fp64", epochs=3)
    twin = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.9)

    def step(model, lr, images, labels, w):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
        ((w * losses).sum() / w.sum()).backward()
        optimizer.step()

    plain_epochs(trainer, twin, step)
    trainer.fit()
    torch.testing.assert_close(parameters(trainer.model), parameters(twin), rtol=1e-12, atol=1e-14)


def test_sam_is_two_passes_and_one_update_of_the_running_statistics(make_trainer):
    trainer = make_trainer(dropout=0.0, dtype=torch.float64, precision="fp64", epochs=2, optimizer="sam", rho=0.1)
    twin = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.9)

    def step(model, lr, images, labels, w):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        grads = [p.grad.clone() for p in model.parameters()]
        scale = 0.1 / (torch.sqrt(sum((g**2).sum() for g in grads)) + 1e-12)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.add_(scale * g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for p, w0 in zip(model.parameters(), before, strict=True):
                p.copy_(w0)
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
        optimizer.step()

    plain_epochs(trainer, twin, step)
    trainer.fit()
    torch.testing.assert_close(parameters(trainer.model), parameters(twin), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(trainer.model.norm.running_mean, twin.norm.running_mean, rtol=1e-11, atol=1e-13)
    assert int(trainer.model.norm.num_batches_tracked) == 2 * 4


def test_history_reports_mean_loss_per_example_and_accuracy(make_trainer):
    trainer = make_trainer(dropout=0.0, epochs=2)
    trainer.fit()
    loss, correct = trainer.dynamics.arrays()["loss"], trainer.dynamics.arrays()["correct"]
    for epoch, record in enumerate(trainer.history):
        assert record["train_loss"] == pytest.approx(np.nanmean(loss[epoch]), rel=1e-5)
        assert record["train_accuracy"] == pytest.approx(np.nanmean(correct[epoch]), rel=1e-6)
        assert record["learning_rate"] == pytest.approx(rate("cosine", epoch + 1, 2, 0.05))


def test_dynamics_are_those_of_the_first_pass(make_trainer):
    """A tiny learning rate leaves the model unchanged, so that each pass can be repeated."""
    trainer = make_trainer(dropout=0.0, batchnorm=False, epochs=2, learning_rate=1e-30, lr_sched="const")
    trainer.fit()
    arrays = trainer.dynamics.arrays()
    assert arrays["loss"].shape == (2, trainer.train_batches.images.total)
    assert np.isnan(arrays["divergence"][0]).all()
    before = None
    for epoch in (1, 2):
        p_all = torch.full((trainer.train_batches.images.total, 10), float("nan"))
        for batch in trainer.train_batches.epoch(epoch):
            with torch.no_grad():
                z = trainer.model(batch.images)
            p, rows = z.softmax(1), torch.arange(len(z))
            others = z.clone()
            others[rows, batch.labels] = -torch.inf
            twins = {
                "loss": nn.functional.cross_entropy(z, batch.labels, reduction="none"),
                "probability": p[rows, batch.labels],
                "margin": z[rows, batch.labels] - others.amax(1),
                "correct": (z.argmax(1) == batch.labels).float(),
                "el2n": (p - nn.functional.one_hot(batch.labels, 10)).norm(dim=1),
            }
            for name, value in twins.items():
                got = arrays[name][epoch - 1, batch.indices.numpy()]
                np.testing.assert_allclose(got, value.numpy(), rtol=2e-4, atol=1e-6, err_msg=name)
            p_all[batch.indices] = p
        if before is not None:
            divergence = (p_all * (p_all.log() - before.log())).sum(1).numpy()
            np.testing.assert_allclose(arrays["divergence"][1], divergence, rtol=0.02, atol=2e-3)
        before = p_all
    visited = np.zeros(trainer.train_batches.images.total, bool)
    visited[trainer.train_batches.images.indices.numpy()] = True
    assert (np.isnan(arrays["loss"][0]) == ~visited).all()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_batch(make_trainer, rank):
    def spoil(trainer, epoch, step):
        if step == 6:  # the seventh step is batch 3 of epoch 2
            with torch.no_grad():
                trainer.model.head.bias.fill_(float("nan"))

    trainer = make_trainer(after_step=(spoil,), batch_size=66)  # the last batch has no examples for process 2
    trainer.train_batches.rank, trainer.train_batches.world = rank, 3
    with pytest.raises(TrainingError, match="not finite in epoch 2, batch 3"):
        trainer.fit()


def test_library_code_leaves_the_global_generators_alone(make_trainer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_trainer(epochs=1, optimizer="iblr", learning_rate=0.01).fit()
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


class OnePixel(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


def test_a_last_batch_of_one_is_refused_where_batchnorm_cannot_take_it(make_trainer, digits):
    train = digits[0].subset(torch.arange(65))

    make_trainer(train=train, epochs=1).fit()  # 8x8 maps: one example has many values per channel
    with pytest.raises(ArgumentError, match="batch_size: 65 examples leave a last batch of one"):
        make_trainer(train=train, epochs=1, model=OnePixel())


def test_a_last_batch_that_leaves_a_process_one_example_is_refused(make_trainer, digits):
    train = digits[0].subset(torch.arange(67))  # 64 and 3: shares of 2 and 1
    shared = {"train": train, "epochs": 1, "model": OnePixel(), "group": ProcessGroup(rank=0, world=2)}
    with pytest.raises(ArgumentError, match="batch_size: 67 examples leave a last batch of one for a process"):
        make_trainer(**shared)
    make_trainer(**shared, sync_batchnorm=True)


def test_input_gradients_and_class_losses_are_those_of_autograd(make_trainer):
    trainer = make_trainer(
        dropout=0.0, dtype=torch.float64, precision="fp64", epochs=1, augment=False, batch_size=200
    )
    twin = copy.deepcopy(trainer.model)
    (batch,) = trainer.train_batches.epoch(1)
    images = batch.images.clone().requires_grad_()
    nn.functional.cross_entropy(twin.train()(images), batch.labels, reduction="sum").backward()
    trainer.fit()
    arrays = trainer.dynamics.arrays()
    expected = images.grad.flatten(1).norm(dim=1).float()
    np.testing.assert_allclose(arrays["input_gradient"][0, batch.indices], expected, rtol=1e-6)
    trainer.model.eval()
    parts = [(nn.functional.cross_entropy(trainer.model(b.images), b.labels, reduction="none"), b.labels)
             for b in trainer.test_batches]  # fmt: skip
    losses, labels = (torch.cat(part).detach().numpy() for part in zip(*parts, strict=True))
    by_class = [losses[labels == c].mean() for c in range(10)]
    np.testing.assert_allclose(arrays["class_test_loss"][0], by_class, rtol=1e-6)


def test_a_schedule_per_step_sets_the_rate_of_every_step(make_trainer):
    rates = []
    trainer = make_trainer(
        epochs=2, lr_sched="onecycle", after_step=[lambda t, *_: rates.append(t.optimizer.param_groups[0]["lr"])]
    )
    trainer.fit()
    middle = (np.arange(len(rates)) + 0.5) / len(rates)
    assert rates == pytest.approx(np.interp(middle, [0, 0.25, 1], [0, 0.05, 0]))
    assert [record["learning_rate"] for record in trainer.history] == [rates[3], rates[7]]


def test_input_gradients_are_recorded_only_on_request(make_trainer):
    with_gradients, without = make_trainer(dynamics=True), make_trainer(dynamics=True)
    without.dynamics.input_gradients = False
    for trainer in (with_gradients, without):
        trainer.train_epoch(1)
    arrays, fewer = with_gradients.dynamics.arrays(), without.dynamics.arrays()
    assert not np.isnan(arrays.pop("input_gradient")).all()
    assert np.isnan(fewer.pop("input_gradient")).all()
    for name, values in arrays.items():
        np.testing.assert_array_equal(fewer[name], values, err_msg=name)
